"""`v4jax finetune` from a checkout: python scripts/finetune.py ..."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from v4jax.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
