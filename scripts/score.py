"""`v4jax score` from a checkout: python scripts/score.py ..."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from v4jax.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
