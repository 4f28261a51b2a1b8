#!/bin/sh
# Makes an environment, installs v4jax and lets the bundled model write a few lines.
# Needs Python 3.11 or newer with pip, and nothing else. PYTHON=... picks the interpreter.
set -eu
cd "$(dirname "$0")/.."
venv=${V4JAX_VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable .
exec "$venv/bin/v4jax" generate --checkpoint v4jax/assets/nano --mode raw \
    --temperature 0.5 --max-new-tokens 160 \
    --prompt 'Elizabeth was surprised to see him, but'
