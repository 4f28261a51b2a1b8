"""A conversation in the terminal.

    v4jax chat --checkpoint nano --mode think-high

Type a message, or /mode NAME, /reset, /quit. In the thinking modes the reasoning is shown in
brackets; as in the released format, it is dropped from the history when the next message comes.
Every turn feeds the whole conversation again. Ctrl-C ends a reply, and keeps what there is of it.
"""

import sys
from collections.abc import Iterator

from v4jax.cli.errors import one_message
from v4jax.cli.generate import accept_any_text, sampling_of
from v4jax.cli.options import (
    add_adapter_option,
    add_checkpoint_option,
    add_mesh_option,
    add_numerics_options,
    add_sampling_options,
    command_parser,
    numerics_of,
)
from v4jax.cli.serving import load_for_serving
from v4jax.inference.engine import Engine
from v4jax.text.format import MODES, THINK_END, EncodingError, resolve_mode
from v4jax.text.parse import parse_partial_completion
from v4jax.text.tokenizer import Tokenizer

LONG_CONVERSATION = 32_768  # tokens that a mesh is chosen for


def reply(engine: Engine, tokenizer: Tokenizer, messages: list[dict], mode: str, args) -> dict:
    """Generates, prints and returns the assistant's next message."""
    prompt = tokenizer.render(messages, mode)
    ids = tokenizer.encode(prompt.text)
    is_thinking, is_ended, text = prompt.thinking_mode == "thinking", False, ""

    def until_end() -> Iterator[int]:
        nonlocal is_ended
        for step in engine.stream([ids], sampling_of(args, args.seed + len(messages))):
            token = int(step[0])
            is_ended = token in tokenizer.stop_ids
            if not is_ended:
                yield token

    if is_thinking:
        print("[", end="", flush=True)
    try:
        for piece in tokenizer.decode_stream(until_end()):
            text += piece
            print(piece.replace(THINK_END, "]\n"), end="", flush=True)
        why = "" if is_ended else f"cut after {args.max_new_tokens} tokens: see --max-new-tokens"
    except KeyboardInterrupt:
        why = "interrupted"
    print()
    if why:
        what = "the reasoning" if is_thinking and THINK_END not in text else "the reply"
        print(f"({what} was {why})", file=sys.stderr)
    return parse_partial_completion(text, prompt.thinking_mode, is_complete=True)


def main() -> None:
    """Reads messages until the end of the input."""
    parser = command_parser("chat", __doc__)
    add_checkpoint_option(parser)
    add_adapter_option(parser)
    parser.add_argument(
        "--mode", choices=list(MODES), default="non-think", help="how much it thinks first"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_mesh_option(parser)
    add_sampling_options(parser)
    add_numerics_options(parser)
    args = parser.parse_args()

    tokenizer = Tokenizer(args.checkpoint)
    resolve_mode(args.mode, tokenizer.release)
    tokenizer.encode(args.system or "")
    numerics = numerics_of(args)
    model = load_for_serving(args, numerics, context=LONG_CONVERSATION, adapter=args.adapter)
    engine = Engine(model, tokenizer, slots=1, cache=args.cache)
    accept_any_text()
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, mode = list(start), args.mode
    print(f"{engine.cfg.name}, {mode}; /mode NAME, /reset, /quit", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = list(start)
        elif command == "/mode":
            try:
                resolve_mode(value, tokenizer.release)
                mode = value
            except EncodingError as error:
                print(error, file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                messages = [*asked, reply(engine, tokenizer, asked, mode, args)]
            except ValueError as error:  # of this message: too long, or not in UTF-8
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    with one_message():
        main()
