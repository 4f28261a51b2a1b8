"""Generation, sampling, scoring and batch jobs."""
