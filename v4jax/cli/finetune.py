"""Trains a model on conversations, texts or tokens: from scratch, or from a checkpoint.

    v4jax finetune --checkpoint DIR --data chat.jsonl --output runs/a --trainable lora --dtype bfloat16
    v4jax finetune --model nano --tokens runs/nano/data/tokens.npy --output runs/nano
    v4jax finetune --config runs/a/config.toml --output runs/b --lr 1e-4

`--data` has an example a line, which the released prompt format renders; loss is on what the assistant writes
(docs/training.md; `v4jax data check FILE` shows it). `--tokens` is one array of ids, cut into windows. With
`--loss dpo` the examples are preference pairs.

With `--loss indexer` attention sees all compressed entries, and the indexers alone learn what it looks at: the
warm-up before training on sparse attention.

AdamW or Muon over the next token, the token after it (MTP), the indexer's loss and router balance. What trains
is float32; with `--trainable no-experts` or `lora` the other weights stay packed as they are stored.
With `--qat` every step computes with weights and activations rounded as the released format and code
round them (docs/low_precision.md). Run the same command again to go on after an interruption: a step's
batch depends on the seed and the step only. `--output` gets state/ (Orbax), metrics.jsonl, and at the
end model/ in the released layout, FP4 experts and FP8 linears included (or float32 with `--save float`),
or adapter/ in PEFT's files. Ctrl-C and SIGTERM save first.

`--config FILE` reads these options from TOML, one a line (`seq-len = 512`); flags win. `--output` gets all
of them in config.toml, which can be given again.

Over several devices with `--mesh fsdp=4,expert=2`, over several hosts as v4jax/cli/pod.py shows, with an
`--output` that they share: each writes some files of model/.
"""

import argparse
import contextlib
import functools
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils

from v4jax import checkpoint, stores
from v4jax.checkpoint.folders import weight_files
from v4jax.checkpoint.hf_config import from_hf
from v4jax.cli import run_folder
from v4jax.cli.errors import one_message
from v4jax.cli.finetune_options import OPTIMIZERS, make_parser, parse_args
from v4jax.cli.pod import on_mesh, start_processes
from v4jax.cli.settings import write_config
from v4jax.config import VARIANTS, V4Config
from v4jax.inference.batch.files import fingerprint
from v4jax.nn.documents import alignment
from v4jax.nn.lora import PRESETS, LoRA
from v4jax.nn.model import Transformer
from v4jax.nn.numerics import plain, released
from v4jax.nn.quantization import Chosen
from v4jax.planning import costs
from v4jax.planning.devices import require_room_to_train, training_mesh
from v4jax.text.tokenizer import Tokenizer
from v4jax.train.anticipation import Anticipation
from v4jax.train.choosing import matching
from v4jax.train.data import Data, Examples, PreferencePairs, TokenStream
from v4jax.train.indexer_warmup import IndexerWarmup
from v4jax.train.losses import Loss, LossWeights
from v4jax.train.preferences import DPO, log_probs
from v4jax.train.samples import Prompts
from v4jax.train.schedules import schedule
from v4jax.train.spikes import Spikes
from v4jax.train.trainer import TRAINABLE, Trainer

# What does not decide the numbers of a run. A state is not continued with other values of the rest.
_FREE = (
    "output",
    "eval_tokens",
    "eval_data",
    "save_every",
    "eval_every",
    "log_every",
    "tokenizer",
    "save",
    "mesh",
    "remat",
    *("config", "sample", "sample_tokens", "tensorboard", "export", "max_skipped"),
    *("distributed", "coordinator", "num_processes", "process_id"),
)
# Of `--data` alone: they are no settings of a run over tokens.
_OF_DATA = ("data", "mode", "no_packing", "too_long")


def identity_of(args: argparse.Namespace) -> dict[str, object]:
    """Settings and files that a run's numbers depend on."""
    found = {name: value for name, value in vars(args).items() if name not in _FREE}
    if args.data:
        found["data"] = fingerprint([args.data, tokenizer_file(args)])
        found["release"] = Tokenizer(tokenizer_file(args)).release
    else:
        found = {name: value for name, value in found.items() if name not in _OF_DATA}
        found["tokens"] = fingerprint([args.tokens])
    if args.checkpoint:
        files = [stores.join(args.checkpoint, "config.json"), *weight_files(args.checkpoint)]
        found["checkpoint"] = fingerprint(files)
    if args.init_adapter:
        files = [stores.join(args.init_adapter, "adapter_config.json")]
        found["init_adapter"] = fingerprint([*files, *weight_files(args.init_adapter)])
    return found


def tokenizer_file(args: argparse.Namespace) -> str:
    """The `tokenizer.json` that data is encoded with."""
    return stores.in_folder(args.tokenizer or args.checkpoint, "tokenizer.json")


def why_no_more_steps(args: argparse.Namespace) -> str:
    """Why a run with these settings cannot have more steps than before; "" if it can."""
    if args.schedule != "constant":
        return f"the rates of --schedule {args.schedule} depend on the steps in all, those of constant do not"
    return ""


def config_of(args: argparse.Namespace) -> V4Config:
    """The architecture that is trained."""
    return VARIANTS[args.model]() if args.model else from_hf(args.checkpoint)


def start_model(args: argparse.Namespace) -> Transformer:
    """The model to start from, its weights in the formats that they are stored in."""
    numerics, scan = released(args.dtype) if args.qat else plain(args.dtype), not names_layers(args)
    if args.checkpoint:
        return checkpoint.load(
            args.checkpoint, numerics, use="train", scan_layers=scan, progress=True
        )
    cfg = config_of(args)

    def make() -> Transformer:
        return Transformer(cfg, numerics, scan_layers=scan, rngs=nnx.Rngs(args.seed))

    return jax.jit(make)()


def names_layers(args: argparse.Namespace) -> bool:
    """Whether --train or --freeze name some layers, which then have arrays of their own."""
    names = [*(args.train or ()), *(args.freeze or ())]
    return any(re.match(r"layers\.\d", name) for name in names)


def chosen_by(args: argparse.Namespace, model: Transformer) -> Chosen:
    """Which of the model's own parameters train.

    Raises:
      ValueError: a name that matches nothing.
    """
    if args.train or args.freeze:
        return matching(model, *(args.train or ["*"]), but=args.freeze or ())
    return TRAINABLE.get(args.trainable, _nothing)


def make_trainer(args: argparse.Namespace, model: Transformer) -> Trainer:
    """What the options describe; the model's arrays are moved into it."""
    trainable: str | LoRA | Chosen = chosen_by(args, model)
    if args.init_adapter:
        model, trainable = checkpoint.load_adapter(model, args.init_adapter), "adapter"
    elif args.trainable == "lora":
        targets = [end for name in args.lora_targets for end in PRESETS.get(name, (name,))]
        trainable = LoRA(
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            targets=tuple(dict.fromkeys(targets)),
            rslora=args.lora_rslora,
            dropout=args.lora_dropout,
        )
    optimizer = OPTIMIZERS[args.optimizer](
        schedule(args.schedule, args.lr, args.steps, warmup_steps=args.warmup),
        b1=args.b1,
        b2=args.b2,
        weight_decay=args.weight_decay,
        clip_norm=args.clip_norm,
        state_dtype=args.optimizer_dtype,
    )
    weights = LossWeights(
        mtp=args.mtp_weight,
        balance=args.balance_weight,
        indexer=args.indexer_weight,
        z=args.z_weight,
    )
    loss: Loss | None = None
    if args.loss == "dpo":
        loss = DPO(beta=args.dpo_beta, balance=args.balance_weight, indexer=args.indexer_weight)
    if args.loss == "indexer":
        loss = IndexerWarmup()
    skip_above: float | Spikes = args.skip_above
    if args.skip_spikes is not None:
        skip_above = Spikes(args.skip_spikes, args.spike_steps, at_most=args.skip_above)
    anticipate = None
    if args.anticipate_routing != "off":
        anticipate = Anticipation(
            when=args.anticipate_routing, delay=args.routing_delay, steps=args.routing_steps
        )
    return Trainer(
        model,
        optimizer,
        trainable=trainable,
        weights=weights,
        qat=args.qat,
        bias_speed=args.bias_speed,
        remat=args.remat,
        micro_batches=args.micro_batches,
        skip_above=skip_above,
        anticipate=anticipate,
        seed=args.seed,
        loss=loss,
    )


def read_data(
    args: argparse.Namespace, file: pathlib.Path | None, tokens: pathlib.Path | None
) -> Data:
    """A file of examples, or else an array of tokens."""
    if file is None:
        assert tokens is not None  # one of them is required
        return TokenStream(tokens, args.seq_len, seed=args.seed)
    read: Callable[..., Data] = PreferencePairs
    if args.loss != "dpo":
        align = alignment(config_of(args))
        read = functools.partial(Examples, packing=not args.no_packing, align=align)
    return read(
        file,
        Tokenizer(tokenizer_file(args)),
        args.seq_len,
        seed=args.seed,
        too_long=args.too_long,
        mode=args.mode,
    )


def _nothing(path: str, variable: nnx.Variable) -> bool:
    """Of the model's own parameters a LoRA trains none."""
    del path, variable
    return False


def make_prompts(args: argparse.Namespace) -> Prompts | None:
    """What --sample gives, as messages of a user beside conversations."""
    if not args.sample:
        return None
    if jax.process_count() > 1:
        raise ValueError("--sample: samples are made by one process, and this run has several.")
    is_chat = args.data is not None and args.data.suffix == ".jsonl"
    mode = (args.mode or "non-think") if is_chat else "raw"
    tokenizer = Tokenizer(tokenizer_file(args))
    return Prompts(args.sample, tokenizer, mode=mode, max_new_tokens=args.sample_tokens)


def main() -> None:
    """Trains, saves and exports."""
    logging.getLogger("absl").propagate = False  # pages by Orbax of what is said in a sentence
    parser = make_parser(__doc__)
    args = parse_args(parser)
    process, count = start_processes(args)
    if args.mesh == "auto":
        args.mesh, why = training_mesh(config_of(args), jax.devices())
        if process == 0:
            print(f"mesh: {why}", file=sys.stderr)
    with on_mesh(args.mesh):
        train(args, parser, process, count)


def train(args: argparse.Namespace, parser: argparse.ArgumentParser, process: int, count: int):
    """The run, as one of `count` processes; the first prints and logs."""
    is_first = process == 0
    data, cfg = read_data(args, args.data, args.tokens), config_of(args)
    data.require_ids(cfg.vocab_size)
    evaluation = None
    if args.eval_data or args.eval_tokens:
        evaluation = read_data(args, args.eval_data, args.eval_tokens)
        evaluation.require_ids(cfg.vocab_size)
    prompts = make_prompts(args)
    if is_first and args.data:
        print(data, file=sys.stderr)
    shapes = nnx.eval_shape(
        lambda: Transformer(cfg, scan_layers=not names_layers(args), rngs=nnx.Rngs(0))
    )
    moments = 1 if args.optimizer == "muon" else 2
    require_room_to_train(
        shapes,
        chosen_by(args, shapes),
        args.mesh or {},
        jax.devices()[0],
        state_bytes=moments * jnp.dtype(args.optimizer_dtype).itemsize,
    )
    with run_folder.locked(args.output) if is_first else contextlib.nullcontext():
        if not is_first:
            args.output.mkdir(parents=True, exist_ok=True)
        else:
            own = identity_of(args)
            run_folder.claim(args.output, own, parser, why_no_more_steps(args))
            write_config(args.output / "config.toml", parser, args)
        _run(args, data, evaluation, prompts, is_first, count)


def _run(args: argparse.Namespace, data, evaluation, prompts, is_first: bool, count: int) -> None:
    """Trains in a folder that is this run's, and exports."""
    model, cfg = start_model(args), config_of(args)
    for pairs in (data, evaluation):
        if isinstance(pairs, PreferencePairs):
            pairs.reference = log_probs(model, pairs, batch_size=args.batch_size)
    trainer = make_trainer(args, model)
    del model
    flops = None
    if args.trainable:  # of names it is not counted
        one = costs.training_flops(cfg, args.seq_len, remat="none", trainable=args.trainable)
        flops = args.batch_size * one.total
    trainer.fit(
        data,
        args.steps,
        batch_size=args.batch_size,
        output=args.output,
        evaluation=evaluation,
        eval_every=args.eval_every,
        save_every=args.save_every,
        log_every=args.log_every,
        prompts=prompts,
        tensorboard=args.tensorboard,
        step_flops=flops,
        max_skipped=args.max_skipped,
    )
    if args.export == "best":
        loss = trainer.take_best(args.output)
        if is_first:
            print(f"the lowest held-out loss was {loss:.4f}, after step {trainer.steps}")
    written = args.output / ("adapter" if args.save == "adapter" else "model")
    if is_first:
        shutil.rmtree(written, ignore_errors=True)  # `claim` made sure that it is ours
    if count > 1:
        multihost_utils.sync_global_devices("the folder is free")
    if is_first or trainer.num_devices > jax.local_device_count():
        trainer.save(written, args.save)
    if not is_first:
        return
    source = args.tokenizer or args.checkpoint
    if source and stores.is_file(stores.in_folder(source, "tokenizer.json")):
        Tokenizer(source).save(written)
    print(f"wrote {written}")


if __name__ == "__main__":
    with one_message():
        main()
