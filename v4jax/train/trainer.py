"""What trains a model: `Trainer` holds the state, runs steps, evaluates, saves and resumes.

trainer = v4jax.Trainer(model, v4jax.train.adamw(1e-4), trainable=v4jax.LoRA(rank=16))
trainer.fit(v4jax.train.TokenStream("tokens.npy", 512), 1000, output="runs/a")
trainer.save("runs/a/adapter")
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import optax
from flax import nnx

from sharding import TRAIN
from v4jax.checkpoint.errors import CheckpointError
from v4jax.nn.lora import LoRA, LoRAParam, add_lora, lora_of
from v4jax.nn.model import Transformer
from v4jax.nn.placement import mesh_of, on_mesh, require_placed
from v4jax.nn.quantization import Chosen, everything, is_indexer, not_expert, to_float
from v4jax.nn.remat import require_policy
from v4jax.train.anticipation import Anticipation
from v4jax.train.data import Data
from v4jax.train.events import Event, Record, StepDone
from v4jax.train.export import export
from v4jax.train.lookahead import Lookahead
from v4jax.train.losses import Batch, Loss, LossWeights, Metrics
from v4jax.train.progress import show
from v4jax.train.run import Options, require_count, run
from v4jax.train.samples import Prompts
from v4jax.train.spikes import Spikes
from v4jax.train.state import Saver, freed
from v4jax.train.step import TrainState, TrainStep
from v4jax.train.stopping import StopOnSignal

TRAINABLE = {"all": everything, "no-experts": not_expert, "indexer": is_indexer}


class Trainer:
    """Trains a model, on the mesh that it lies on.

    Args:
      model: from `v4jax.load(folder, use="train")`, or a new one. Its arrays are moved into the trainer.
      optimizer: any optax transformation; `v4jax.train.adamw(1e-4)` is that of the report.
      trainable: "all"; "no-experts", which leaves the routed experts packed as they are stored;
        "indexer", which trains those of CSA layers alone; a `LoRA`, which leaves everything and trains
        new adapters; "adapter", those that the model has (`v4jax.checkpoint.load_adapter`); or a function of a parameter's path ("stages.0.blocks.0.attention.wq_a.kernel") and
        variable. What trains becomes float32.
      weights: of the terms of the loss.
      qat: train with the rounding of the released format in the loop (docs/low_precision.md).
      remat: what layers keep for the backward pass: from most memory to least "none" (everything),
        "attention", "outputs", "layers", which computes each layer again, or "offload"
        (`v4jax.nn.remat`).
      bias_speed: of the routing bias, per step. Pre-training takes 1e-3; 0 leaves it.
      micro_batches: parts of a batch that gradients are taken of one after the other, which needs the
        memory of one of them. The result is that of the whole batch.
      skip_above: a step whose gradients have a larger global norm changes nothing; of `Spikes`, one whose
        norm is far above those of the steps before. One whose loss or norm is NaN or infinite never does.
      anticipate: choose experts by the parameters of some steps before, after a skipped step or always.
      seed: of new adapters, and of what their dropout leaves out.
      loss: another one than the training loss, as `v4jax.train.DPO()` or `IndexerWarmup()`.

    Attributes:
      steps: steps taken so far.

    Raises:
      ValueError: an unknown `trainable` or `remat`, a LoRA target that no matrix has, weights that lie as
        serving reads them, or what `TrainStep` refuses.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: optax.GradientTransformation,
        *,
        trainable: str | LoRA | Chosen = "all",
        weights: LossWeights = LossWeights(),
        qat: bool = False,
        remat: str = "layers",
        bias_speed: float = 0.0,
        micro_batches: int = 1,
        skip_above: float | Spikes = math.inf,
        anticipate: Anticipation | None = None,
        seed: int = 0,
        loss: Loss | None = None,
    ):
        if isinstance(trainable, str) and trainable not in (*TRAINABLE, "adapter"):
            raise ValueError(
                f"trainable={trainable!r}: expected one of {', '.join(map(repr, TRAINABLE))}, 'adapter', a "
                "LoRA, as v4jax.LoRA(rank=16), or a function of path and variable."
            )
        require_policy(remat)
        self._mesh, self.steps = mesh_of(model), 0
        self.lora: LoRA | None = None
        chosen: Chosen
        if isinstance(trainable, LoRA):
            self.lora, chosen = trainable, is_adapter
        elif trainable == "adapter":
            self.lora, chosen = lora_of(model), is_adapter
        else:
            chosen = TRAINABLE[trainable] if isinstance(trainable, str) else trainable
        with self._on_mesh():
            require_placed(nnx.state(model), TRAIN)
            if isinstance(trainable, LoRA):
                model = add_lora(model, trainable, seed=seed)
            model = to_float(model, only=chosen)
            self._step = TrainStep(
                model,
                optimizer,
                weights,
                trainable=chosen,
                qat=qat,
                remat=remat,
                bias_speed=bias_speed,
                micro_batches=micro_batches,
                skip_above=skip_above,
                anticipate=anticipate,
                loss=loss,
                seed=seed,
            )
        self._lookahead = None if anticipate is None else Lookahead(anticipate, self._step)
        self._state: TrainState | None = None

    @property
    def state(self) -> TrainState:
        """Parameters and the optimizer's state. A step replaces it, and frees its arrays."""
        if self._state is None:  # so that a saved state is not read beside a new one
            with self._on_mesh():
                self._state = self._step.init()
        return self._state

    @property
    def num_devices(self) -> int:
        """Devices that share the work."""
        return 1 if self._mesh is None else self._mesh.size

    @property
    def model(self) -> Transformer:
        """The model as it is now, adapters included. The next step frees its arrays."""
        return self._step.model(self.state)

    def step(self, tokens: Sequence) -> Metrics:
        """One step on inputs, the tokens after them, and those after these, [B, T] each, or a `Batch`."""
        with self._on_mesh():
            self._state, metrics = self._step.step(self.state, tokens, self.steps)
        self.steps += 1
        return metrics

    def batch(self, data: Data, step: int, batch_size: int) -> tuple:
        """Tokens of a step as `step` takes them. Every process reads its own rows.

        Raises:
          ValueError: the mesh does not divide the batch, or a token is outside the vocabulary.
        """
        with self._on_mesh():
            return self._step.batch(data, step, batch_size)

    def next_batch(self, data: Data, batch_size: int) -> Sequence:
        """`batch` of the next step; with `anticipate`, its experts too where they are chosen ahead.

        Raises:
          ValueError: as `batch`.
        """
        if self._lookahead is None:
            return self.batch(data, self.steps, batch_size)
        state = self.state
        with self._on_mesh():
            batch, self._state = self._lookahead.batch(state, self.steps, data, batch_size)
        return batch

    def loss(self, tokens: Sequence) -> float:
        """Mean next-token loss in nats, without changing anything; tokens as for `step`."""
        with self._on_mesh():
            return float(self._step.loss(self.state, tokens))

    def evaluate(self, data: Data, batch_size: int = 8, batches: int = 4) -> float:
        """Mean next-token loss in nats over fixed rows of held-out data, of the tokens that count."""
        losses, counts = [], []
        for number in range(batches):
            batch = self.batch(data, number, batch_size)
            losses.append(self.loss(batch))
            with self._on_mesh():
                weights = batch.loss_weights if isinstance(batch, Batch) else None
                counts.append(1.0 if weights is None else float(weights.sum()))
        return float(np.average(losses, weights=counts))

    def events(
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
        prompts: Prompts | None = None,
        tensorboard: bool = False,
        step_flops: float | None = None,
        max_skipped: int = 10,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Trains until `steps` steps are done in all, and tells what happens (`v4jax.train.events`).

        A step's batch depends on the data's seed and the step alone: with an `output` that has states,
        training goes on from the newest one and computes what it would have.

        Args:
          batch_size: sequences a step.
          output: a folder that gets state/ every `save_every` steps, and metrics.jsonl. In state/ are the
            newest two states, and the one with the lowest held-out loss.
          evaluation: held-out data, measured every `eval_every` steps.
          log_every: steps between those whose numbers are told.
          prompts: gone on with where the held-out loss is measured.
          tensorboard: also write output/tensorboard.
          step_flops: FLOP of a step, for the share of the devices' peak
            (`v4jax.planning.costs.training_flops`).
          max_skipped: end after so many skipped steps in a row.
          stop: asked after every step; true ends the run there, with a save. Over several processes
            where a step's numbers are due.

        Raises:
          TypeError: data of another kind, as an array, which a `TokenStream` takes.
          ValueError: an id is outside the vocabulary; too many steps were skipped, or a parameter became
            NaN or infinite. The last good state is kept.
          CheckpointError: a state cannot be written, or none can be read.
        """
        require_count("steps", steps)
        for name, each in (("data", data), ("evaluation", evaluation)):
            if each is None and name == "evaluation":
                continue
            if not isinstance(each, Data):
                raise TypeError(
                    f"{name} is a {type(each).__name__}: expected a TokenStream (of an array of ids), "
                    "Examples or PreferencePairs (of files) of v4jax.train."
                )
            each.require_ids(self._step.cfg.vocab_size)
        if prompts is not None and evaluation is None:
            raise ValueError("prompts: expected evaluation= beside them, which says when.")
        folder, before = None if output is None else pathlib.Path(output), self.steps
        saver = None if folder is None else self.resume(folder)
        options = Options(
            batch_size=batch_size,
            output=folder,
            evaluation=evaluation,
            eval_every=eval_every,
            save_every=save_every,
            log_every=log_every,
            prompts=prompts,
            tensorboard=tensorboard,
            step_flops=step_flops,
            max_skipped=max_skipped,
            stop=stop,
        )
        return run(self, data, steps, options, saver, self.steps > before)

    def run(self, data: Data, steps: int, **options) -> Iterator[Record]:
        """`events`, of which only the numbers of steps: a record every `log_every`. Options as there."""
        events = self.events(data, steps, **options)
        return (event.record for event in events if isinstance(event, StepDone))

    def fit(self, data: Data, steps: int, *, progress: bool = True, **options) -> list[Record]:
        """`run` to its end, with a progress bar. Options as there.

        Ctrl-C and SIGTERM end it after a step, with a save.

        Returns:
          the records.

        Raises:
          KeyboardInterrupt, SystemExit: after that save, with status 130 or 143.
        """
        shown = progress and jax.process_index() == 0
        with StopOnSignal() as stop:
            events = self.events(data, steps, **{"stop": stop, **options})
            events = show(events, self.steps, steps, stop) if shown else events
            records = [event.record for event in events if isinstance(event, StepDone)]
        if self.steps < steps:
            stop.raise_()
        return records

    def resume(self, output: str | os.PathLike) -> Saver:
        """Takes the newest state of a run's folder, if it is further than this trainer.

        Raises:
          CheckpointError: it is of something else; or none can be read, and this trainer, whose own
            arrays had to make room, is of no use any more.
        """
        saver = Saver(pathlib.Path(output) / "state")
        if (saver.latest or 0) > self.steps:
            self._take(saver)
        return saver

    def take_best(self, output: str | os.PathLike) -> float:
        """Takes the state of a run's folder whose held-out loss is the lowest.

        Returns:
          that loss.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        saver = Saver(pathlib.Path(output) / "state")
        try:
            if saver.best is None:
                raise CheckpointError(
                    f"{saver.folder} has no state with a held-out loss: expected those of a run with "
                    "evaluation=."
                )
            step, loss = saver.best
            if step != self.steps:
                self._take(saver, step)
        finally:
            saver.close()
        return loss

    def _take(self, saver: Saver, step: int | None = None) -> None:
        """Restores into shapes: arrays that the saved state replaces make room for it first."""
        with self._on_mesh():
            if self._state is None:
                shapes = self._step.shapes()
                saver.require_like(shapes)
                self._step.forget()
            else:
                saver.require_like(self._state)
                if self._lookahead is not None:
                    self._lookahead.forget()
                shapes, self._state = freed(self._state), None
            tokens = None if self._mesh is None else jax.NamedSharding(self._mesh, TRAIN.tokens)
            found = saver.restore(shapes, step, tokens)
            assert found is not None
            self._state, self.steps = found

    def continued(self, prompts: Prompts) -> tuple[tuple[str, str], ...]:
        """Pairs of a prompt and how the model goes on with it, greedily."""
        with self._on_mesh():
            return prompts.continued(self._step, self.state)

    def require_finite(self, metrics: Metrics, folder: str | os.PathLike) -> None:
        """A state with NaN never takes the place of a good one.

        Args:
          metrics: of the last step.
          folder: of the states, for the message.

        Raises:
          ValueError: its loss, if it was not skipped, or a parameter is NaN or infinite.
        """
        loss = float(metrics.loss)
        if (bool(metrics.skipped) or math.isfinite(loss)) and self._step.is_finite(self.state):
            return
        raise ValueError(
            f"step {self.steps}: the loss is {loss}, or a parameter is not finite. Nothing was "
            f"saved; the last good state, if any, is in {folder}. Try a lower learning rate or "
            "a longer warm-up, in another output folder."
        )

    def save(self, folder: str | os.PathLike, format: str | None = None) -> None:
        """Writes what was trained. With a mesh over several hosts, all of them call it together.

        Args:
          folder: new, or empty; of hosts, one that they share.
          format: "released" (FP4 experts, FP8 linears), "float", or "adapter" (PEFT's files; of a
            `LoRA` only). With a LoRA the first two have it merged in. Default: "adapter" of a LoRA,
            else "released".

        Raises:
          ValueError: an unknown format, or "adapter" without one; `folder` has a checkpoint.
        """
        export(self.model, folder, self.lora, format)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return on_mesh(self._mesh)


def is_adapter(path: str, variable: nnx.Variable) -> bool:
    """Whether a variable is a factor of an adapter."""
    del path
    return isinstance(variable, LoRAParam)
