"""The command line: `v4jax COMMAND ...`, one module a command."""

import importlib
import sys

from v4jax.cli.errors import one_message

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "a conversation in the terminal",
    "score": "logits of given tokens, or the perplexity of a text",
    "batch": "a file of requests, restartable",
    "finetune": "train from scratch or from a checkpoint",
    "convert": "checkpoints between formats and names",
    "plan": "does a job fit a TPU slice, and how fast could it be",
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        print(
            f"usage: v4jax COMMAND [options]\n\n{lines}\n\nv4jax COMMAND --help lists its options."
        )
        return
    if argv[0] == "--version":
        from v4jax import __version__

        print(__version__)
        return
    if argv[0] not in COMMANDS:
        raise SystemExit(f"v4jax: no command {argv[0]!r}: expected one of {', '.join(COMMANDS)}.")
    sys.argv = [f"v4jax {argv[0]}", *argv[1:]]
    with one_message():
        importlib.import_module(f"v4jax.cli.{argv[0]}").main()
