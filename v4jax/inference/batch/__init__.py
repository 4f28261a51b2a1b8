"""Batch jobs: a file of requests in, a file of results out, on any number of hosts."""

from v4jax.inference.batch.files import JobError, merge_files
from v4jax.inference.batch.job import Job, Progress
from v4jax.inference.batch.plan import Plan
from v4jax.inference.batch.requests import Request, RequestError, Settings, parse_request

__all__ = [
    "Job",
    "JobError",
    "Plan",
    "Progress",
    "Request",
    "RequestError",
    "Settings",
    "merge_files",
    "parse_request",
]
