"""Loss and gradients of one training step here and in transformers on torch: the same weights and tokens.

    python -m venv ../torch && ../torch/bin/pip install -r benchmarks/against_transformers/requirements.txt
    python -m benchmarks.compare_gradients --python ../torch/bin/python
    python -m benchmarks.compare_gradients --python ../torch/bin/python --tokens 1024 --own-choices

Both compute in float32 (`plain` numerics here) the cross-entropy of the next token, of one sequence, and
write weights and gradients as checkpoints. These are read under the released names; weights have to be equal
bit for bit. A tensor's difference is the norm of the difference over the norm of transformers' gradient, and
the table has the largest of each kind. A gradient that is zero on one side alone is infinitely far off. MTP
blocks are left out: transformers has none. Exits with 1 if something differs by more than `BOUND`.

Where two scores are nearly the same, the sides round to another order and choose another entry or expert: they
compute gradients of two functions then. So this project is given transformers' choices (docs/training.md,
"Given choices"), and how many of its own are others is counted. With `--own-choices` it takes its own.
"""

import argparse
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping

import numpy as np

from benchmarks.compare_transformers import Side, commands
from v4jax import nano_path
from v4jax.checkpoint import Checkpoint

BOUND = 1e-4  # relative, of the loss and of each gradient


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Released name -> floats, without those of MTP blocks and those that are no parameters."""
    found = {}
    for name, tensor in Checkpoint(folder).tensors.items():
        is_fixed = name.endswith(("ffn.gate.bias", "ffn.gate.tid2eid"))
        if not is_fixed and not name.startswith("mtp."):
            found[name] = np.asarray(tensor.view(), np.float32)
    return found


def require_same_names(ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    """Raises ValueError if one side has a tensor that the other has not."""
    alone = sorted(set(ours) ^ set(theirs))
    if alone:
        shown = ", ".join(f"{name} ({'ours' if name in ours else 'theirs'})" for name in alone[:8])
        raise ValueError(f"{len(alone)} tensors are on one side alone: {shown}.")


def difference(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Norm of the difference over the norm of theirs, in float64. None: both are zero."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    norm, apart = np.linalg.norm(theirs), np.linalg.norm(ours - theirs)
    if norm == 0:
        return None if apart == 0 else float("inf")
    return float(apart / norm)


def kind_of(name: str) -> str:
    """A name without the number of its layer and expert."""
    return re.sub(r"(experts)\.\d+", r"\1", re.sub(r"^layers\.\d+\.", "", name))


def by_kind(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, list[tuple[str, float | None]]]:
    """Kind -> names of its tensors and their differences, in the order of `theirs`.

    Raises:
      ValueError: one side has a tensor that the other has not.
    """
    require_same_names(ours, theirs)
    found: dict[str, list[tuple[str, float | None]]] = {}
    for name, value in theirs.items():
        found.setdefault(kind_of(name), []).append((name, difference(ours[name], value)))
    return found


def row(kind: str, differences: list[tuple[str, float | None]]) -> tuple[str, float]:
    """A line of the table: tensors, those that are zero on both sides, the worst; and its difference."""
    apart = {name: value for name, value in differences if value is not None}
    start = f"| `{kind}` | {len(differences)} | {len(differences) - len(apart)} |"
    if not apart:
        return f"{start} | |", 0.0
    worst = max(apart, key=lambda name: apart[name])
    return f"{start} {apart[worst]:.1e} | `{worst}` |", apart[worst]


def other_choices(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many tokens chose otherwise, by layer, of choices [B, T, layers, K] in any order."""
    return (np.sort(ours, axis=-1) != np.sort(theirs, axis=-1)).any(axis=-1).sum(axis=(0, 1))


def report(tokens: int, losses: tuple[float, float], folders: tuple[pathlib.Path, ...]) -> bool:
    """Prints the table of one length; whether all of it is within the bound."""
    ours, theirs = (tensors_of(folder / "gradients") for folder in folders)
    weights = [tensors_of(folder / "weights") for folder in folders]
    require_same_names(*weights)
    other = [name for name in weights[0] if not np.array_equal(*(w[name] for w in weights))]
    if other:
        raise ValueError(f"weights differ: {', '.join(other[:8])} ({len(other)} in all).")
    of_loss = abs(losses[0] - losses[1]) / abs(losses[1])
    print(
        f"\n{tokens:,} tokens: loss {losses[0]:.7f}, transformers {losses[1]:.7f} ({of_loss:.1e})"
    )
    chosen = [np.load(folder / "choices.npz") for folder in folders]
    for name, what in (("experts", "by layer"), ("selections", "by layer with an indexer")):
        counts = other_choices(*(side[name] for side in chosen)).tolist()
        print(f"tokens with other {name}, {what}: {', '.join(map(str, counts))}")
    print()
    print("| kind | tensors | zero on both sides | largest relative difference | of |")
    print("|---|---|---|---|---|")
    worst = of_loss
    for kind, differences in by_kind(ours, theirs).items():
        line, apart = row(kind, differences)
        print(line)
        worst = max(worst, apart)
    whole = [np.concatenate([side[name].ravel() for name in theirs]) for side in (ours, theirs)]
    print(f"| all as one vector | | | {difference(*whole):.1e} | |")
    return worst <= BOUND


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", required=True, help="that has torch and transformers")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=nano_path())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of torch (default: all)"
    )
    parser.add_argument(
        "--own-choices", action="store_true", help="choose experts and entries on each side"
    )
    args = parser.parse_args()
    within = True
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        ours, torch = commands(args.python, args.checkpoint, root / "transformers")
        for tokens in args.tokens:
            mine, theirs = root / f"ours-{tokens}", root / f"theirs-{tokens}"
            chosen = None if args.own_choices else str(theirs / "choices.npz")
            losses = []
            for command, output, given in (  # one after the other
                (torch, theirs, {}),
                (ours, mine, {"choices": chosen}),
            ):
                side = Side(command, args.threads)
                numbers = dict(tokens=tokens, output=str(output), **given)
                losses.append(side.ask("gradients", numbers)["result"])
                side.end()
            within &= report(tokens, (losses[1], losses[0]), (mine, theirs))
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
