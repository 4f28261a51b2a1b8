"""What trains a model: `Trainer` holds the state, runs steps, evaluates, saves and resumes.

trainer = v4jax.Trainer(model, v4jax.train.adamw(1e-4), trainable=v4jax.LoRA(rank=16))
trainer.fit(v4jax.train.TokenStream("tokens.npy", 512), 1000, output="runs/a")
trainer.save("runs/a/adapter")
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sharding import TRAIN
from v4jax.checkpoint import saving
from v4jax.checkpoint.adapters import save_adapter
from v4jax.nn.lora import LoRA, LoRAParam, add_lora, merge_lora
from v4jax.nn.model import Transformer
from v4jax.nn.placement import mesh_of, on_mesh, require_placed
from v4jax.nn.quantization import Chosen, everything, not_expert, to_float, to_released
from v4jax.train.data import Data
from v4jax.train.losses import Batch, Loss, LossWeights, Metrics
from v4jax.train.state import Saver
from v4jax.train.step import TrainState, TrainStep

TRAINABLE = {"all": everything, "no-experts": not_expert}
FORMATS = ("released", "float", "adapter")
Record = dict[str, float]  # a line of metrics.jsonl


class Trainer:
    """Trains a model, on the mesh that it lies on.

    Args:
      model: from `v4jax.load(folder, use="train")`, or a new one. Its arrays are moved into the trainer.
      optimizer: any optax transformation; `v4jax.train.adamw(1e-4)` is that of the report.
      trainable: "all"; "no-experts", which leaves the routed experts packed as they are stored; a
        `LoRA`, which leaves everything and trains adapters; or a function of a parameter's path
        ("stages.0.blocks.0.attention.wq_a.kernel") and variable. What trains becomes float32.
      weights: of the terms of the loss.
      qat: train with the rounding of the released format in the loop (docs/low_precision.md).
      remat: recompute layers in the backward pass.
      bias_speed: of the routing bias, per step. Pre-training takes 1e-3; 0 leaves it.
      seed: of new adapters.
      loss: another one than the training loss, as `v4jax.train.DPO()`.

    Attributes:
      steps: steps taken so far.

    Raises:
      ValueError: an unknown `trainable`, a LoRA target that no matrix has, weights that lie as serving
        reads them, or what `TrainStep` refuses.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: optax.GradientTransformation,
        *,
        trainable: str | LoRA | Chosen = "all",
        weights: LossWeights = LossWeights(),
        qat: bool = False,
        remat: bool = True,
        bias_speed: float = 0.0,
        seed: int = 0,
        loss: Loss | None = None,
    ):
        if isinstance(trainable, str) and trainable not in TRAINABLE:
            raise ValueError(
                f"trainable={trainable!r}: expected one of {', '.join(map(repr, TRAINABLE))}, a LoRA, or "
                "a function of path and variable."
            )
        self._mesh, self.steps = mesh_of(model), 0
        self.lora: LoRA | None = None
        chosen: Chosen
        if isinstance(trainable, LoRA):
            self.lora, chosen = trainable, _is_adapter
        else:
            chosen = TRAINABLE[trainable] if isinstance(trainable, str) else trainable
        with self._on_mesh():
            require_placed(nnx.state(model), TRAIN)
            if self.lora is not None:
                model = add_lora(model, self.lora, seed=seed)
            model = to_float(model, only=chosen)
            self._step = TrainStep(
                model,
                optimizer,
                weights,
                trainable=chosen,
                qat=qat,
                remat=remat,
                bias_speed=bias_speed,
                loss=loss,
            )
            self._state = self._step.init()

    @property
    def state(self) -> TrainState:
        """Parameters and the optimizer's state. A step replaces it, and frees its arrays."""
        return self._state

    @property
    def model(self) -> Transformer:
        """The model as it is now, adapters included. The next step frees its arrays."""
        return self._step.model(self._state)

    def step(self, tokens: Sequence) -> Metrics:
        """One step on inputs, the tokens after them, and those after these, [B, T] each, or a `Batch`."""
        with self._on_mesh():
            self._state, metrics = self._step.step(self._state, tokens)
        self.steps += 1
        return metrics

    def batch(self, data: Data, step: int, batch_size: int) -> tuple:
        """Tokens of a step as `step` takes them. Every process reads its own rows.

        Raises:
          ValueError: the mesh does not divide the batch, or a token is outside the vocabulary.
        """
        with self._on_mesh():
            return self._step.batch(data, step, batch_size)

    def loss(self, tokens: Sequence) -> float:
        """Mean next-token loss in nats, without changing anything; tokens as for `step`."""
        with self._on_mesh():
            return float(self._step.loss(self._state, tokens))

    def evaluate(self, data: Data, batch_size: int = 8, batches: int = 4) -> float:
        """Mean next-token loss in nats over fixed rows of held-out data, of the tokens that count."""
        losses, counts = [], []
        for number in range(batches):
            batch = self.batch(data, number, batch_size)
            losses.append(self.loss(batch))
            with self._on_mesh():
                counts.append(float(batch.loss_weights.sum()) if isinstance(batch, Batch) else 1.0)
        return float(np.average(losses, weights=counts))

    def run(
        self,
        data: Data,
        steps: int,
        *,
        batch_size: int = 8,
        output: str | os.PathLike | None = None,
        evaluation: Data | None = None,
        eval_every: int = 250,
        save_every: int = 250,
        log_every: int = 10,
    ) -> Iterator[Record]:
        """Trains until `steps` steps are done in all, and yields a record every `log_every`.

        A step's batch depends on the data's seed and the step alone: with an `output` that has states,
        training goes on from the newest one and computes what it would have.

        Args:
          batch_size: sequences a step.
          output: a folder that gets state/ every `save_every` steps, and metrics.jsonl.
          evaluation: held-out data, measured every `eval_every` steps ("heldout_ce" of a record).

        Raises:
          ValueError: a loss or a parameter became NaN or infinite. The last good state is kept.
        """
        data.require_ids(self._step.cfg.vocab_size)
        folder = None if output is None else pathlib.Path(output)
        saver = None if folder is None else self.resume(folder)

        def records() -> Iterator[Record]:
            first, started = self.steps, time.monotonic()
            with contextlib.ExitStack() as stack:
                if saver is not None:
                    stack.callback(saver.close)
                log = stack.enter_context(_metrics_file(folder, first))
                for number in range(first, steps):
                    metrics = self.step(self.batch(data, number, batch_size))
                    done, is_last = number + 1, number + 1 == steps
                    is_eval = evaluation is not None and (done % eval_every == 0 or is_last)
                    if done % log_every == 0 or is_last or is_eval:
                        record = _record(done, metrics)
                        if evaluation is not None and is_eval:
                            record["heldout_ce"] = round(self.evaluate(evaluation, batch_size), 5)
                        log.write(json.dumps(record) + "\n")
                        log.flush()
                        seconds = time.monotonic() - started
                        rate = (done - first) * batch_size * data.seq_len / seconds
                        yield {**record, "tokens_per_second": rate}
                    if saver is not None and (done % save_every == 0 or is_last):
                        self._require_finite(metrics, done, saver)
                        saver.save(done, self._state)
                        saver.wait()

        return records()

    def resume(self, output: str | os.PathLike) -> Saver:
        """Takes the newest state of a run's folder, if it is further than this trainer."""
        saver = Saver(pathlib.Path(output) / "state")
        if (saver.latest or 0) > self.steps:
            with self._on_mesh():
                found = saver.restore(self._state)
            assert found is not None
            self._state, self.steps = found
        return saver

    def fit(self, data: Data, steps: int, *, progress: bool = True, **options) -> list[Record]:
        """`run` to its end, with a progress bar. Options as there.

        Returns:
          the records.
        """
        records: list[Record] = []
        shown = progress and jax.process_index() == 0
        found = self.run(data, steps, **options)
        with tqdm(total=steps, initial=self.steps, unit="step", disable=not shown) as bar:
            if self.steps and shown:
                output = options.get("output")
                where = f" of {pathlib.Path(output) / 'state'}" if output is not None else ""
                bar.write(f"going on from step {self.steps}{where}")
            for record in found:
                records.append(record)
                bar.n = int(record["step"])
                bar.set_postfix(
                    ce=record["ce"],
                    loss=record["loss"],
                    tok_s=round(record["tokens_per_second"]),
                )
                if "heldout_ce" in record:
                    bar.write(f"step {bar.n}: held-out loss {record['heldout_ce']:.4f}")
        return records

    def save(self, folder: str | os.PathLike, format: str | None = None) -> None:
        """Writes what was trained.

        Args:
          folder: new, or empty.
          format: "released" (FP4 experts, FP8 linears), "float", or "adapter" (PEFT's files; of a
            `LoRA` only). With a LoRA the first two have it merged in. Default: "adapter" of a LoRA,
            else "released".

        Raises:
          ValueError: an unknown format, or "adapter" without one; `folder` has a checkpoint; the model
            is spread over several hosts.
        """
        format = format or ("released" if self.lora is None else "adapter")
        if format not in FORMATS or (format == "adapter" and self.lora is None):
            raise ValueError(
                f"format={format!r}: expected one of {', '.join(map(repr, FORMATS))}, and "
                '"adapter" for a model that was trained with a LoRA.'
            )
        if format == "adapter":
            return save_adapter(self.model, folder)
        model = to_float(self.model) if format == "float" else self.model
        model = model if self.lora is None else merge_lora(model)
        return saving.save(to_released(model) if format == "released" else model, folder)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return on_mesh(self._mesh)

    def _require_finite(self, metrics: Metrics, step: int, saver: Saver) -> None:
        """A state with NaN never takes the place of a good one."""
        if math.isfinite(float(metrics.loss)) and self._step.is_finite(self._state):
            return
        raise ValueError(
            f"step {step}: the loss is {float(metrics.loss)}, or a parameter is not finite. Nothing was "
            f"saved; the last good state, if any, is in {saver.folder}. Try a lower learning rate or "
            "a longer warm-up, in another output folder."
        )


def _is_adapter(path: str, variable: nnx.Variable) -> bool:
    del path
    return isinstance(variable, LoRAParam)


def _record(step: int, metrics: Metrics) -> Record:
    terms = {name: round(float(getattr(metrics, name)), 5) for name in metrics.logged}
    return {"step": step, **terms}


def _metrics_file(folder: pathlib.Path | None, step: int):
    """metrics.jsonl of a run that goes on after a step; of the first process alone."""
    if folder is None or jax.process_index() != 0:
        return open(os.devnull, "w", encoding="utf-8")
    path = folder / "metrics.jsonl"
    if path.exists():
        _drop_lines_after(path, step)
    return open(path, "a", encoding="utf-8")


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Leaves out the steps behind the state that a run goes on from."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # half a line: the run was killed while it wrote
            continue
    path.with_suffix(".new").write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(path.with_suffix(".new"), path)
