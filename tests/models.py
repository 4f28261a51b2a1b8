"""Models with random numbers, and a compiled step of them, that several tests take."""

import dataclasses
import functools
import pathlib
import shutil
import tempfile

import jax
from flax import nnx

import v4jax
from sharding import make_mesh
from tests.conftest import NANO
from v4jax import Transformer, V4Config, tiny
from v4jax.nn.placement import specs


def random_model(cfg, *args, seed: int = 0, **options) -> Transformer:
    """`Transformer(cfg, *args, **options)` with the numbers of a seed, on the ambient mesh if there is one.

    Made on one device: a program that makes numbers for a mesh takes five times as long to compile.
    """

    def make(key):
        return Transformer(cfg, *args, **options, rngs=nnx.Rngs(key))

    if jax.sharding.get_abstract_mesh().empty:
        return jax.jit(make)(jax.random.key(seed))
    with jax.set_mesh(make_mesh()):
        model = jax.jit(make)(jax.random.key(seed))
    graphdef, state = nnx.split(model)
    places = jax.tree.map(
        lambda spec: jax.NamedSharding(jax.sharding.get_mesh(), spec),
        specs(state, model.rules),
        is_leaf=lambda x: isinstance(x, jax.P),
    )
    return nnx.merge(graphdef, jax.device_put(state, places))


def one_of_each() -> V4Config:
    """`tiny()` with a layer of each kind: about half of its code to compile."""
    window, _, hca, csa, *_ = tiny().layers
    return dataclasses.replace(tiny(), layers=(window, csa, hca), mtp_layers=())


@functools.cache
def extend(model):
    """(tokens [B, T], counts [B], cache) -> logits [B, T, V] and the new cache; donates the old one.

    A partial of the compiled function, whose first argument is bound to the model's arrays.
    """
    graphdef, params = nnx.split(model)

    @functools.partial(jax.jit, donate_argnames=("cache",))
    def step(params, tokens, counts, cache):
        model = nnx.merge(graphdef, params)
        streams, cache = model.extend(tokens, counts, cache)
        return model.logits(model.hidden(streams)), cache

    return functools.partial(step, params)


@functools.cache
def small_nano() -> pathlib.Path:
    """A folder with the bundled model's first two layers: less than half of its code to compile."""
    folder = pathlib.Path(_temporary().name)
    cfg = v4jax.from_hf(NANO)
    cfg = dataclasses.replace(cfg, layers=cfg.layers[:2], mtp_layers=())
    v4jax.save(v4jax.load(NANO, config=cfg), folder / "nano")
    shutil.copy(NANO / "tokenizer.json", folder / "nano")
    return folder / "nano"


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="v4jax-")
