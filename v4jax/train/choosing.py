"""Parameters to train, or to leave, by name."""

import fnmatch
import re
from collections.abc import Iterator, Sequence

from flax import nnx

from v4jax.nn.model import Transformer
from v4jax.nn.quantization import Chosen


def matching(model: Transformer, *patterns: str, but: Sequence[str] = ()) -> Chosen:
    """What a `Trainer` takes as `trainable`: the parameters that match a pattern, and none of `but`.

        matching(model, "layers.20-42")                      the upper half
        matching(model, "*", but=["embed", "head", "*.moe.router"])

    A pattern is a path from its beginning on, with `*` for anything. A path without its end names all
    that is below it. Layers are counted through: "layers.3.attention.wq_a.kernel", and "layers.0-3" is
    layers 0 to 3. Paths of the model ("stages.0.blocks.0.attention") are taken too.

    Raises:
      ValueError: no pattern; one that matches nothing, with the names that there are; or layers that lie
        in one array with others that are not chosen.
    """
    if not patterns:
        raise ValueError('no patterns: expected some, as "layers.0-3" or "*.moe.router".')
    names = dict(_names(model))
    for pattern in (*patterns, *but):
        if not any(_matches(name, [pattern]) for own in names.values() for name in own):
            raise ValueError(
                f"{pattern!r} matches no parameter of {model.cfg.name}. There are, with N a layer of "
                f"0-{len(model.cfg.layers) - 1}: {', '.join(_known(names))}."
            )
    chosen = set()
    for path, (whole, *layers) in names.items():
        left = _matches(whole, but)
        taken = [
            (_matches(whole, patterns) or _matches(name, patterns))
            and not (left or _matches(name, but))
            for name in layers or [whole]
        ]
        if any(taken) and not all(taken):
            numbers = [int(name.split(".")[1]) for name in layers]
            trained = [number for number, is_taken in zip(numbers, taken) if is_taken]
            raise ValueError(
                f"{layers[0].split('.', 2)[2]} of layers {_listed(numbers)} is one array, and of "
                f"these {_listed(trained)} would train: expected all or none of them, or a model of "
                'v4jax.load(folder, use="train", scan_layers=False), whose layers lie apart.'
            )
        if all(taken):
            chosen.add(path)

    def is_chosen(path: str, variable: nnx.Variable) -> bool:
        del variable
        return path in chosen

    return is_chosen


def _names(model: Transformer) -> Iterator[tuple[str, list[str]]]:
    """The path of every parameter, and its names: the path, and one for each layer that it holds."""
    first, starts = 0, []
    for stage in model.stages:
        starts.append(first)
        first += stage.repeats * len(stage.blocks)
    for keys, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = ".".join(map(str, keys))
        names, (head, *rest) = [path], path.split(".")
        if head == "stages":
            number, block = int(rest[0]), int(rest[2])
            stage = model.stages[number]
            for repeat in range(stage.repeats):
                layer = starts[number] + repeat * len(stage.blocks) + block
                names.append(".".join(["layers", str(layer), *rest[3:]]))
        yield path, names


def _matches(name: str, patterns: Sequence[str]) -> bool:
    for pattern in patterns:
        layers = re.match(r"layers\.(\d+)-(\d+)(?=\.|$)", pattern)
        if layers:
            number = re.match(r"layers\.(\d+)\.", name)
            if not number or not int(layers[1]) <= int(number[1]) <= int(layers[2]):
                continue
            pattern = f"layers.{number[1]}{pattern[layers.end() :]}"
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*"):
            return True
    return False


def _known(names: dict[str, list[str]]) -> list[str]:
    """Names, those of equal layers once."""
    return sorted({re.sub(r"^layers\.\d+", "layers.N", own[-1]) for own in names.values()})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
