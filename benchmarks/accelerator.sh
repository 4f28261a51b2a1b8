#!/bin/sh
# What this machine's GPU or TPU makes of v4jax: op tests, models against the CPU, a table of timings.
# Ten minutes at the most. Writes a page to be committed: sh benchmarks/accelerator.sh --output FILE.md
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD" XLA_PYTHON_CLIENT_PREALLOCATE=false
exec "${PYTHON:-python3}" -m benchmarks.accelerator "$@"
