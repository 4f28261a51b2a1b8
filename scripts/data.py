"""`v4jax data` from a checkout: python scripts/data.py ..."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from v4jax.cli import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
