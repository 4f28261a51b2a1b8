"""`v4jax verify` from a checkout: python scripts/verify.py ..."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from v4jax.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
