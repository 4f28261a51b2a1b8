"""Continues a prompt.

    v4jax generate --checkpoint nano --prompt "Emma was" --mode raw
    v4jax generate --checkpoint DIR --prompt "Name three primes." --mode think-high
    v4jax generate --checkpoint DIR --prompt "Who is Emma?" --json-schema person.json

In the modes non-think, think-high and think-max (and think-low, since the 0731 release) the prompt is
rendered as a user turn; `raw` continues the text as it is. With --json-schema the answer is JSON of that
schema, which the rendered prompt tells as well; reasoning is free. The token rate goes to stderr.
"""

import argparse
import io
import json
import pathlib
import sys
import time

from v4jax.cli.errors import one_message
from v4jax.cli.options import (
    add_adapter_option,
    add_checkpoint_option,
    add_mesh_option,
    add_numerics_options,
    add_sampling_options,
    command_parser,
    local_folder,
    numerics_of,
)
from v4jax.cli.profiling import add_profile_option, profiled
from v4jax.cli.serving import load_for_serving
from v4jax.inference.engine import Engine
from v4jax.inference.grammar import Grammar
from v4jax.inference.sampling import Sampling
from v4jax.text.format import MODES
from v4jax.text.prompt import with_bos
from v4jax.text.tokenizer import Tokenizer


def sampling_of(args: argparse.Namespace, seed: int | None = None) -> Sampling:
    """What the options of `add_sampling_options` describe."""
    names = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    options = {name: getattr(args, name) for name in names}
    return Sampling(**options, seed=args.seed if seed is None else seed)


def accept_any_text() -> None:
    """Bytes that are not UTF-8, and characters that the terminal has not, end no program.

    What such bytes are read as `Tokenizer.encode` refuses by name.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors=errors)


def render(tokenizer: Tokenizer, prompt: str, mode: str, schema: dict | None = None) -> str:
    """The text that is fed to the model."""
    if mode == "raw":
        return with_bos(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.render(messages, mode, response_format=schema).text


def read_schema(path: pathlib.Path) -> dict:
    """The JSON object in a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is none.
    """
    try:
        schema = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        found = type(schema).__name__
        raise ValueError(  # noqa: TRY004 - of the file, as other wrong ones
            f"{path} has {found}: expected a JSON schema, {{...}}."
        )
    return schema


def main() -> None:
    """Generates and prints."""
    parser = command_parser("generate", __doc__)
    add_checkpoint_option(parser)
    add_adapter_option(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what is asked or continued"
    )
    parser.add_argument(
        "--mode", choices=["raw", *MODES], default="non-think", help="how much it thinks first"
    )
    parser.add_argument(
        "--json-schema", type=local_folder, metavar="FILE", help="of the answer, which is JSON then"
    )
    add_mesh_option(parser)
    add_sampling_options(parser)
    add_numerics_options(parser)
    add_profile_option(parser)
    args = parser.parse_args()

    sampling = sampling_of(args)
    numerics = numerics_of(args)
    tokenizer = Tokenizer(args.checkpoint)
    schema = None if args.json_schema is None else read_schema(args.json_schema)
    grammar = None if schema is None else Grammar.json_schema(schema)
    text = render(tokenizer, args.prompt, args.mode, schema)
    prompt = tokenizer.encode(text)  # fails before loading
    context = len(prompt) + args.max_new_tokens
    model = load_for_serving(args, numerics, context=context, adapter=args.adapter)
    engine = Engine(model, tokenizer, slots=1, cache=args.cache)
    accept_any_text()
    times = [time.monotonic()]

    def ids():
        for step in engine.stream([prompt], sampling, grammar=grammar):
            times.append(time.monotonic())
            if step[0] not in tokenizer.stop_ids:
                yield step[0]

    with profiled(engine, args.profile):
        for piece in tokenizer.decode_stream(ids()):
            print(piece, end="", flush=True)
        print()
    count = len(times) - 1
    rate = (count - 1) / (times[-1] - times[1]) if count > 1 else 0.0
    print(
        f"[{len(prompt)} prompt tokens, {count} generated; first after {times[1] - times[0]:.2f} s "
        f"(compilation included), then {rate:.1f} tokens/s]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    with one_message():
        main()
