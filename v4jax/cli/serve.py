"""An OpenAI-compatible HTTP server, with a page to chat in.

    v4jax serve --checkpoint nano
    v4jax serve --checkpoint DIR --host 0.0.0.0 --port 80 --slots 32 --mode think-high
    v4jax serve --checkpoint DIR --adapter emma=runs/a/adapter --adapter box=runs/b/adapter

It answers at /v1/chat/completions and /v1/completions, says how it is at /health and /metrics, and
shows the page at /. docs/serving.md lists the fields. Requests name an adapter in the field `model`. With
an API key (--api-key, or better the environment variable V4JAX_API_KEY) everything under /v1 asks for it.
SIGTERM and Ctrl-C let requests finish for --grace seconds.

On several hosts the same command runs on each, with one mesh over all their devices (docs/tpu_pod.md):

    v4jax serve --checkpoint DIR --distributed --mesh expert=32

Process 0 listens, and the others do its steps until it ends.
"""

import os
import sys

from v4jax import checkpoint
from v4jax.cli.errors import one_message
from v4jax.cli.options import (
    add_checkpoint_option,
    add_named_adapters_option,
    add_numerics_options,
    command_parser,
    numerics_of,
)
from v4jax.cli.pod import add_pod_arguments, parse_pod_args, start_processes
from v4jax.cli.profiling import add_profile_option, profiled
from v4jax.cli.serving import load_for_serving, named_adapters
from v4jax.inference.engine import Engine
from v4jax.text.format import MODES, resolve_mode
from v4jax.text.tokenizer import Tokenizer


def main() -> None:
    """Loads the model and serves until a signal comes."""
    parser = command_parser("serve", __doc__)
    add_checkpoint_option(parser)
    add_named_adapters_option(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0: all of this machine")
    group.add_argument("--port", type=int, default=8000, help="0: any that is free")
    group.add_argument("--api-key", metavar="KEY", help="what requests have to show")
    group.add_argument(
        "--served-name", metavar="NAME", help="the model's name in requests (default: the config's)"
    )
    group.add_argument("--max-body-mb", type=float, default=16.0, help="size of a request")
    group.add_argument("--timeout", type=float, default=3600.0, help="seconds of a request")
    group.add_argument("--grace", type=float, default=30.0, help="seconds to finish at the end")
    group = parser.add_argument_group("generation")
    group.add_argument("--slots", type=int, default=8, help="requests that run together")
    group.add_argument("--queue", type=int, default=1024, help="requests that may wait")
    group.add_argument(
        "--cache-tokens",
        type=int,
        default=131_072,
        help="tokens of context of all requests together, and the longest of one",
    )
    group.add_argument(
        "--mode", choices=list(MODES), default="non-think", help="of requests that ask for none"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=32_768, help="of requests that ask for none"
    )
    add_numerics_options(parser)
    add_profile_option(parser)
    add_pod_arguments(parser, auto=True)
    args = parse_pod_args(parser)

    try:
        from v4jax.inference.server import ServerSettings, bind, make_app, serve
    except ImportError as error:
        raise ValueError(str(error)) from error
    tokenizer = Tokenizer(args.checkpoint)
    resolve_mode(args.mode, tokenizer.release)
    numerics = numerics_of(args)
    for name, least in (("grace", 0), ("queue", 1), ("slots", 1), ("cache_tokens", args.slots)):
        if getattr(args, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name)}: expected {least} or more.")
    model_name = args.served_name or checkpoint.Checkpoint(args.checkpoint).config.name
    adapters = named_adapters(args.adapter, model_name)
    settings = ServerSettings(
        model=model_name,
        api_key=args.api_key or os.environ.get("V4JAX_API_KEY"),
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        max_context=args.cache_tokens,
        max_body_bytes=int(args.max_body_mb * 2**20),
        timeout=args.timeout,
    )
    process, count = start_processes(args)
    sock = bind(args.host, args.port) if process == 0 else None  # fails before the model is loaded
    model = load_for_serving(
        args, numerics, context=args.cache_tokens // args.slots, batch=args.slots
    )
    engine = Engine(
        model,
        tokenizer,
        slots=args.slots,
        cache=args.cache,
        cache_tokens=args.cache_tokens,
        queue=args.queue,
        adapters={name: one.path for name, one in adapters.items()},
    )
    if sock is None:
        engine.follow()
        return
    if count > 1:
        engine.lead()
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"{'server':9} http://{shown}:{port}, model {settings.model!r}", file=sys.stderr)
    app = make_app(engine, settings)
    with profiled(engine, args.profile):
        serve(app, sock, args.grace)
    engine.end()


if __name__ == "__main__":
    with one_message():
        main()
