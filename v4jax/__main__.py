"""`python -m v4jax COMMAND ...`"""

from v4jax.cli import main

main()
