"""`v4jax serve` from a checkout: python scripts/serve.py ..."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from v4jax.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
