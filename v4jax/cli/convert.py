"""Converts a checkpoint to another storage format, to other tensor names, or both.

    v4jax convert nano runs/nano-bf16 --to bf16
    v4jax convert runs/nano-bf16 runs/nano-fp4 --to released
    v4jax convert DIR NEW --names transformers
    v4jax convert DIR NEW --adapter runs/a/adapter --to fp4-bf16

Formats: `released` (FP4 experts, FP8 linears), `fp8` (FP8 experts too), `base` (the same with F32
scales, as the Base releases have them), `bf16`, `fp4-bf16` and `fp8-bf16` (experts in FP4 or FP8, linears
in BF16), and `stored` (nothing changes). With --adapter a LoRA is added to its matrices, and they are rounded
to the format, in which small changes are lost in part: FP4 loses most. No accelerator is used, and memory holds one tensor at a time. Run the same command again
to continue after an interruption. TARGET/report.json says what changed, for each kind of tensor.
"""

import argparse

import jax
from tqdm import tqdm

from v4jax.checkpoint.convert import FORMATS, NAMINGS, Conversion
from v4jax.cli.errors import one_message
from v4jax.cli.options import checkpoint_folder, command_parser, local_folder


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("convert", __doc__)
    parser.add_argument(
        "source",
        type=checkpoint_folder,
        help="folder with config.json and safetensors files, or its URL",
    )
    parser.add_argument("target", type=local_folder, help="new folder, or one to continue")
    parser.add_argument("--to", choices=list(FORMATS), default="stored", help="storage format")
    parser.add_argument("--names", choices=NAMINGS, default="released", help="tensor names")
    parser.add_argument(
        "--allow-lossy",
        action="store_true",
        help="round where a conversion between formats that should be exact is not",
    )
    parser.add_argument(
        "--adapter",
        type=checkpoint_folder,
        metavar="FOLDER",
        help="a LoRA in PEFT's files, which is merged",
    )
    return parser.parse_args()


def table(report: dict) -> str:
    """The report's lines, in columns; what only moved is counted at the end."""
    rows = [("tensors", "count", "from", "to", "max error", "relative", "saturated")]
    kept = 0
    for kind in report["kinds"]:
        if kind["source"] == kind["target"]:
            kept += kind["tensors"]
            continue
        errors = f"{kind['max_error']:.3g}", f"{kind['relative_error']:.2%}"
        counts = f"{kind['tensors']:,}", kind["source"], kind["target"]
        rows.append((kind["kind"], *counts, *errors, f"{kind['saturated']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([*(lines if len(rows) > 1 else ()), f"{kept:,} tensors kept their format"])


def main() -> None:
    """Converts, with a progress bar, and prints the report."""
    args = parse_args()
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy, and is not needed
    conversion = Conversion(
        args.source,
        args.target,
        to=args.to,
        naming=args.names,
        allow_lossy=args.allow_lossy,
        adapter=args.adapter,
    )
    size = conversion.num_bytes
    with tqdm(total=size, unit="B", unit_scale=True, desc=args.target.name) as bar:
        report = conversion.run(bar.update)
    print(table(report))
    for note in report["notes"]:
        print(f"note: {note}")
    for kind in report["kinds"]:
        for name, what in kind["lossy"].items():
            print(f"rounded: {name}, {what}")
    print(f"wrote {size:,} bytes of tensors to {args.target}")


if __name__ == "__main__":
    with one_message():
        main()
