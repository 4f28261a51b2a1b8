"""A conversation in the terminal.

    v4jax chat --checkpoint v4jax/assets/nano --mode think-high

Type a message, or /mode NAME, /reset, /quit. In the thinking modes the reasoning is shown in
brackets; as in the released format, it is dropped from the history when the next message comes.
Every turn feeds the whole conversation again.
"""

import argparse
import pathlib
import sys

from v4jax import Numerics, checkpoint
from v4jax.cli.errors import one_message
from v4jax.cli.generate import add_sampling_arguments
from v4jax.inference.generate import Generator
from v4jax.inference.sampling import sampler_of
from v4jax.text.format import MODES, THINK_END
from v4jax.text.parse import parse_partial_completion
from v4jax.text.prompt import encode_messages
from v4jax.text.tokenizer import Tokenizer


def reply(
    generator: Generator, tokenizer: Tokenizer, messages: list[dict], mode: str, args
) -> dict:
    """Generates, prints and returns the assistant's next message."""
    thinking_mode, effort = MODES[mode]
    prompt = tokenizer.encode(encode_messages(messages, thinking_mode, reasoning_effort=effort))
    steps = generator.stream(
        [prompt],
        sampler=sampler_of(args.temperature, args.top_k, args.top_p),
        max_new_tokens=args.max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        seed=args.seed + len(messages),
    )
    ids = (step[0] for step in steps if step[0] not in tokenizer.stop_ids)
    text = ""
    if thinking_mode == "thinking":
        print("[", end="", flush=True)
    for piece in tokenizer.decode_stream(ids):
        text += piece
        print(piece.replace(THINK_END, "]\n"), end="", flush=True)
    print()
    return parse_partial_completion(text, thinking_mode)


def main() -> None:
    """Reads messages until the end of the input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--mode", choices=list(MODES), default="non-think")
    parser.add_argument("--system", help="system message")
    add_sampling_arguments(parser)
    args = parser.parse_args()

    tokenizer = Tokenizer(args.checkpoint)
    numerics = Numerics(args.numerics, args.dtype, recipe=args.recipe)
    generator = Generator(checkpoint.load(args.checkpoint, numerics), cache=args.cache)
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, mode = list(start), args.mode
    print(f"{generator.cfg.name}, {mode}; /mode NAME, /reset, /quit", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(start)
        elif command == "/mode":
            if value in MODES:
                mode = value
            else:
                print(f"mode {value!r}: expected one of {', '.join(MODES)}", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append(reply(generator, tokenizer, messages, mode, args))


if __name__ == "__main__":
    with one_message():
        main()
