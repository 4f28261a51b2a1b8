#!/bin/sh
# Makes an environment, installs v4jax with its test requirements, checks style and types, and runs
# all tests.
# Needs Python 3.11 or newer with pip, and nothing else. PYTHON=... picks the interpreter.
set -eu
cd "$(dirname "$0")/.."
venv=${V4JAX_VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[test]'
"$venv/bin/python" -m ruff check .
"$venv/bin/python" -m ruff format --check .
"$venv/bin/python" -m mypy
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
