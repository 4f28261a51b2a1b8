"""The command line: `v4jax COMMAND ...`, one module a command."""

import importlib
import os
import sys

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "a conversation in the terminal",
    "score": "logits of given tokens, or the perplexity of a text",
    "verify": "does this installation compute the right thing with a checkpoint",
    "batch": "a file of requests, restartable",
    "serve": "an OpenAI-compatible HTTP server",
    "finetune": "train from scratch or from a checkpoint",
    "data": "look at a file of training data: lengths, loss masks, malformed lines",
    "convert": "checkpoints between formats and names",
    "plan": "does a job fit a TPU slice, and how fast could it be",
}
# What the model's programs need of libtpu, which reads them when it is loaded.
LIBTPU_FLAGS = (
    "--xla_tpu_enable_async_ragged_all_to_all=true",
    "--xla_tpu_control_large_2nd_minor_layout_for_x16=false",
)
_HELP = """\
usage: v4jax COMMAND [options]

DeepSeek-V4 in JAX: run, score, train and convert its checkpoints.

{commands}

  v4jax COMMAND --help   the options of a command, with examples
  v4jax --version        the version

example, with the small model that comes with the package:
  v4jax generate --checkpoint nano --mode raw --prompt "Emma was"
"""


def main(argv: list[str] | None = None) -> None:
    """Runs one command.

    Args:
      argv: its name and options; default those that the program was started with.

    Raises:
      SystemExit: with 2 for bad input, after one message on stderr.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands=lines), end="")
        return
    if argv[0] == "--version":
        from v4jax import __version__

        print(f"v4jax {__version__}")
        return
    command, *options = argv
    if command not in COMMANDS:
        print(_unknown(command), file=sys.stderr)
        raise SystemExit(2)
    from v4jax.cli.errors import one_message  # with jax, which help does without

    _set_libtpu_flags()
    sys.argv = [f"v4jax {command}", *options]
    with one_message():
        importlib.import_module(f"v4jax.cli.{command}").main()


def _set_libtpu_flags() -> None:
    """Adds `LIBTPU_FLAGS` to those of the environment, which win. Where no TPU is, nothing reads them."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    set_already = {flag.partition("=")[0] for flag in given}
    new = [flag for flag in LIBTPU_FLAGS if flag.partition("=")[0] not in set_already]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*given, *new])


def _unknown(command: str) -> str:
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return f"error: no command {command!r}.{meant} Commands are {', '.join(COMMANDS)}."
