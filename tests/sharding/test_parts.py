"""Rows of one part in the host memory of every process, and back."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import make_mesh
from tests.conftest import ROOT, environment, free_port
from v4jax.inference.parts import fetch_row, place, spread

PARTS = 4
DTYPES = ("uint32", "float8_e4m3fn", "bool", "bfloat16")


def held(seed: int) -> list[np.ndarray]:
    """Arrays [4, ...] of several types and shapes, from random bits."""
    rng = np.random.default_rng(seed)
    shapes = [(PARTS, 3, 5), (PARTS, 7), (PARTS,), (PARTS, 2, 1, 9)]
    return [
        rng.integers(0, 2, shape).astype(bool)
        if dtype == "bool"
        else rng.integers(0, 256, (*shape, jnp.dtype(dtype).itemsize), np.uint8)
        .view(dtype)
        .reshape(shape)
        for dtype, shape in zip(DTYPES, shapes)
    ]


def check(mesh: jax.sharding.Mesh) -> None:
    """Every part's row, taken out and put back where the rows of all parts lie."""
    rows = jax.NamedSharding(mesh, jax.P(("fsdp", "expert")))
    arrays = held(seed=1)
    placed = [place(array, rows) for array in arrays]
    arrays[0][:] = 0  # it was copied
    for part in range(PARTS):
        found = fetch_row(placed, part)
        again = fetch_row(spread(found, PARTS, rows), (part + 1) % PARTS)
        for row, back, array in zip(found, again, held(seed=1)):
            assert row.dtype == array.dtype and row.shape == (1, *array.shape[1:])
            assert row.tobytes() == back.tobytes() == array[part : part + 1].tobytes()


def test_of_one_device():
    placed = [place(array[:1], None) for array in held(seed=1)]
    again = spread(fetch_row(placed, 0), 1, None)
    for x, array in zip(again, held(seed=1)):
        assert np.asarray(x).tobytes() == array[:1].tobytes()


@pytest.mark.parametrize("shape", [{"fsdp": 2, "expert": 2}, {"expert": 4, "tensor": 2}], ids=str)
def test_of_a_mesh(shape):
    check(make_mesh(**shape))


CODE = """
import sys, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
assert jax.device_count() == 4  # before tests/conftest.py asks for more
from sharding import make_mesh
from tests.sharding import test_parts
from v4jax.inference import parts
parts.PIECE = 64  # rows begin and end inside pieces
test_parts.check(make_mesh(fsdp=2, expert=2))
"""


def test_of_two_processes():
    address = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(number)],
            cwd=ROOT,
            env=environment(devices=2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
