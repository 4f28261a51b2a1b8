"""What commands share: how their help looks, and options with one spelling, default and text."""

import argparse
import functools
import pathlib

from pallas_kernels import tuning
from pallas_kernels.dispatch import Tuned
from v4jax import stores
from v4jax.checkpoint.loading import folder_of
from v4jax.cli.pod import parse_mesh
from v4jax.nn.numerics import RECIPES, Numerics

DTYPES = ("float32", "bfloat16")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs stay as written, and an option that has a default shows it."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        empty = isinstance(action.default, str | dict | tuple) and not action.default
        if action.option_strings and not (hidden or empty) and "default" not in text:
            text += f" (default: {action.default})".replace("%", "%%")
        return text


def command_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `v4jax COMMAND`, whose help is the docstring of the command's module.

    Args:
      command: its name.
      doc: one line, then paragraphs; those that are indented are examples.
    """
    first, *paragraphs = (doc or "").strip().split("\n\n")
    examples = [p.rstrip() for p in paragraphs if p.startswith("    ")]
    texts = [p.strip() for p in paragraphs if not p.startswith("    ")]
    description = "\n\n".join([first, *texts])
    epilog = "\n".join(["examples:", *examples]) if examples else None
    return argparse.ArgumentParser(
        prog=f"v4jax {command}", description=description, epilog=epilog, formatter_class=_Help
    )


def checkpoint_folder(text: str) -> pathlib.Path | str:
    """The folder of a checkpoint, or its URL."""
    try:
        return folder_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_folder(text: str) -> pathlib.Path:
    """A folder or file of this machine: every output, and every input that is no checkpoint."""
    try:
        return stores.require_local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_checkpoint_option(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--checkpoint."""
    parser.add_argument(
        "--checkpoint",
        type=checkpoint_folder,
        metavar="DIR",
        required=required,
        help="folder with config.json, safetensors files and tokenizer.json, or its URL (gs://, "
        's3://); "nano": the bundled model',
    )


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """--adapter of the commands whose model has one, and no more."""
    parser.add_argument(
        "--adapter",
        type=checkpoint_folder,
        metavar="FOLDER",
        help="a LoRA that the model has, in PEFT's files, or its URL",
    )


def add_named_adapters_option(
    parser: argparse.ArgumentParser, *, may_be_alone: bool = False
) -> None:
    """--adapter NAME=FOLDER, several times: [(name, folder), ...].

    Args:
      may_be_alone: FOLDER without a name is taken too, as (None, folder).
    """
    alone = ". FOLDER alone: a LoRA of all requests" if may_be_alone else ""
    parser.add_argument(
        "--adapter",
        type=functools.partial(_adapter, may_be_alone=may_be_alone),
        action="append",
        default=[],
        metavar="[NAME=]FOLDER" if may_be_alone else "NAME=FOLDER",
        help="a LoRA that requests ask for by this name, in PEFT's files; may be given several "
        f"times{alone}",
    )


def _adapter(text: str, *, may_be_alone: bool) -> tuple[str | None, pathlib.Path | str]:
    name, is_named, folder = text.partition("=")
    if may_be_alone and (not is_named or "/" in name):  # a path may have the sign too
        return None, checkpoint_folder(text)
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FOLDER.")
    return name, checkpoint_folder(folder)


def add_numerics_options(
    parser: argparse.ArgumentParser, *, dtype: str = "bfloat16"
) -> argparse._ArgumentGroup:
    """--dtype, --numerics, --recipe, --cache and --kernel-sizes: what is computed in which format, and how.

    `numerics_of` has what they say, but for the cache.

    Args:
      dtype: the default of --dtype.
    """
    group = parser.add_argument_group("numerics and memory")
    group.add_argument("--dtype", choices=DTYPES, default=dtype, help="of activations")
    group.add_argument(
        "--numerics",
        choices=("plain", "released"),
        default="released",
        help="released: every FP8 and FP4 rounding of the released inference code; "
        "plain: none of them",
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        help="how released numerics multiply FP8 and FP4 weights, see docs/numerics.md "
        "(default: released)",
    )
    group.add_argument(
        "--cache",
        choices=("packed", "float"),
        help="KV cache in FP8 and FP4, or in floats (default: packed where it is exact)",
    )
    group.add_argument(
        "--kernel-sizes",
        type=_kernel_sizes,
        metavar="FILE",
        help="sizes of kernels for this TPU, see docs/kernels.md (default: the chip's own)",
    )
    return group


def numerics_of(args: argparse.Namespace) -> Numerics:
    """Of a command with `add_numerics_options`.

    Raises:
      ValueError: a recipe that these numerics do not have.
    """
    return Numerics(args.numerics, args.dtype, args.kernel_sizes, args.recipe)


def _kernel_sizes(text: str) -> Tuned:
    try:
        return tuning.load(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_mesh_option(parser: argparse.ArgumentParser) -> None:
    """--mesh of the commands that run a model: "auto", or sizes by axis."""
    parser.add_argument(
        "--mesh",
        type=lambda text: text if text == "auto" else parse_mesh(text),
        metavar="AXIS=SIZE,...",
        default="auto",
        help='such as "expert=8"; auto: one device if the model fits on it, else all there are',
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--temperature, --top-p, --top-k, --min-p, --max-new-tokens, --seed: how a token is chosen."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    group.add_argument("--top-p", type=float, help="only the likeliest tokens of this total share")
    group.add_argument("--top-k", type=int, help="only this many of the likeliest tokens")
    group.add_argument("--min-p", type=float, help="only tokens this likely beside the likeliest")
    group.add_argument("--max-new-tokens", type=int, default=256, help="tokens at most")
    group.add_argument("--seed", type=int, default=0, help="of the random numbers")
    return group
