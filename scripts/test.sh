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
if [ $# -eq 0 ]; then
    # These compare the last bits of programs, as users compile them; the rest compiles faster (conftest.py).
    as_users="tests/v4jax/test_parity.py tests/v4jax/test_frozen.py tests/v4jax/test_lora.py tests/v4jax/test_qat.py"
    "$venv/bin/python" -m pytest -n 2 --dist worksteal $as_users
    for file in $as_users; do set -- "$@" "--ignore=$file"; done
    export V4JAX_TEST_FAST=1
fi
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
