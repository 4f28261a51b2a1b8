"""Policies of what layers keep for the backward pass: their memory, their gradients, their names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.dispatch import Implementation
from tests.models import random_model
from tests.tolerances import FLOAT32, assert_close
from v4jax import Trainer, nano, tiny
from v4jax.cli.plan import describe_policies
from v4jax.nn.choices import LayerChoices
from v4jax.nn.numerics import plain
from v4jax.nn.remat import POLICIES
from v4jax.planning import costs
from v4jax.planning.plan import Job, _estimate, _parameter_parts, abstract_model
from v4jax.planning.policies import by_policy
from v4jax.train import adamw

LENGTH = 139  # past the window and four times the picks, divided by nothing


@functools.cache
def layer(ratio: int, implementation: Implementation = "xla"):
    """A layer of that ratio: config, parameters, streams, and its loss by parameters, streams and policy.

    It has eight heads, which the kernels do not fill up.
    """
    spec = next(spec for spec in tiny().layers if spec.ratio == ratio and not spec.hash_routed)
    cfg = dataclasses.replace(tiny(), layers=(spec,), mtp_layers=(), num_heads=8)
    model = random_model(cfg, plain(implementation=implementation))
    graphdef, params, fixed = nnx.split(model.stages[0], nnx.Param, ...)
    draw = np.random.default_rng(0)
    shape = (1, LENGTH, cfg.num_streams * cfg.embed_dim)
    streams, weights = (jnp.asarray(draw.normal(size=shape), jnp.float32) for _ in range(2))
    tokens = jnp.asarray(draw.integers(0, cfg.vocab_size, shape[:2]), jnp.int32)

    def loss(params, streams, remat):
        stage = nnx.merge(graphdef, params, fixed)
        options = dict(remat=remat, as_released=False)
        out, (stats,), _ = stage(streams, tokens, None, [LayerChoices()], **options)
        return jnp.sum(out * weights) + jnp.sum(stats.indexer_loss)

    return cfg, params, streams, loss


def kept_bytes(implementation: Implementation, remat: str) -> int:
    """Bytes of all that a layer's backward pass is given, parameters included."""
    _, params, streams, loss = layer(4, implementation)
    given = jax.eval_shape(
        lambda *args: jax.vjp(lambda *a: loss(*a, remat), *args)[1], params, streams
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize(
    ("implementation", "policies"),
    [("xla", ("outputs", "attention")), (("interpret", "xla"), ("attention",))],
    ids=["xla", "kernels"],
)
def test_layers_keep_what_their_policy_says(implementation, policies):
    cfg, *_ = layer(4, implementation)
    (spec,) = cfg.layers
    least = kept_bytes(implementation, "layers")

    def more(remat: str) -> float:
        """Than "layers", by the formula, whose picks are bits; those of XLA's forms are indices."""
        less, kept = (
            costs.kept_bytes(cfg, spec, LENGTH, name, width=4) for name in ("layers", remat)
        )
        is_list = spec.indexer and remat == "attention" and implementation == "xla"
        picks = 4 * spec.indexer.topk - 4096 / 8 if is_list else 0
        return LENGTH * (kept - less + picks)

    for remat in policies:
        assert kept_bytes(implementation, remat) - least == more(remat)


@pytest.mark.parametrize("remat", [remat for remat in POLICIES if remat != "none"])
def test_gradients_are_those_of_keeping_everything(remat):
    _, params, streams, loss = layer(4)

    gradients = jax.tree.leaves(_gradients(loss, remat)(params, streams))

    expected = jax.tree.leaves(_gradients(loss, "none")(params, streams))
    for found, of in zip(gradients, expected, strict=True):
        assert_close(found, of, FLOAT32)


@functools.cache
def _gradients(loss, remat: str):
    return jax.jit(jax.grad(functools.partial(loss, remat=remat), argnums=(0, 1)))


@pytest.mark.parametrize("remat", ["all", True, False, None])
def test_a_policy_that_there_is_not_is_refused_with_those_there_are(remat):
    model = nnx.eval_shape(lambda: random_model(layer(4)[0]))
    with pytest.raises(
        ValueError, match=rf"remat={remat!r}: expected one of 'none', 'attention', 'outputs', 'l"
    ):
        Trainer(model, adamw(1e-3), remat=remat)
    with pytest.raises(ValueError, match="expected one of 'none'"):
        costs.training_flops(tiny(), 64, remat=remat)
    with pytest.raises(ValueError, match="expected one of 'none'"):
        Job(kind="train", context=64, batch=1, remat=remat)


def test_serving_has_no_policy():
    with pytest.raises(
        ValueError, match="remat='none': expected it for kind='train', and this is 'decode'"
    ):
        Job(kind="decode", context=64, batch=1, remat="none")


def test_plans_of_a_policy():
    cfg = dataclasses.replace(nano(), mtp_layers=())
    job = Job(kind="train", context=4096, batch=4)
    sizes = dict(fsdp=2, expert=1, tensor=1, context=1)
    found = {one.name: one for one in by_policy(cfg, job, sizes)}

    # Two sequences a device; four residual streams of five layers in bfloat16.
    streams = 2 * 4096 * 5 * 4 * 256 * 2
    assert (found["layers"].kept, found["layers"].host) == (streams, 0)
    assert (found["offload"].kept, found["offload"].host) == (0, streams)
    assert found["outputs"].kept == streams * 6 / 4
    # Heads, their denominators in float32, and 1,024 entries as bits in two CSA layers.
    attention = 2 * 4096 * (5 * 4 * (96 * 2 + 4) + 2 * 4096 / 8)
    assert found["attention"].kept == found["outputs"].kept + attention
    assert found["none"].kept is None

    model = abstract_model(cfg, job, scan_layers=True)
    parts = _parameter_parts(model, job, sizes)
    held = [
        _estimate(model, dataclasses.replace(job, remat=remat), sizes, parts, (0, 0)).transient
        for remat in POLICIES
    ]
    assert held == sorted(held, reverse=True)
    assert held[3] - held[4] == streams


def test_a_plan_shows_every_policy():
    job = Job(kind="train", context=4096, batch=4, remat="outputs")
    policies = by_policy(nano(), job, dict(fsdp=2, expert=1, tensor=1, context=1))

    title, *lines = describe_policies(policies, job.remat)

    assert title.startswith("--remat (here outputs): GiB")
    assert [line.split()[0] for line in lines] == list(POLICIES)
    assert lines[0].split()[1] == "everything"
    assert lines[3].split()[1] == "0.08"  # 80 MiB
    assert lines[4].endswith("on the host 0.08")


def test_policies_compute_again_what_they_do_not_keep():
    cfg, length = dataclasses.replace(tiny(), mtp_layers=()), 300
    forward = costs.prefill_flops(cfg, length) + costs.head_flops(cfg) * (length - 1)
    again = {
        remat: costs.training_flops(cfg, length, remat=remat) + forward * -3 for remat in POLICIES
    }

    assert again["none"].total == pytest.approx(0)
    assert again["layers"].total == again["offload"].total == pytest.approx(forward.total)
    last = cfg.o_groups * cfg.o_lora_rank + (cfg.moe.experts_per_token + 1) * cfg.moe.expert_dim
    spared = 2 * last * cfg.embed_dim * length * len(cfg.layers)
    assert forward.linear - again["outputs"].linear == pytest.approx(spared)
    assert again["outputs"].attention == pytest.approx(forward.attention)
    assert again["attention"].linear == pytest.approx(again["outputs"].linear)
    assert again["attention"].attention == again["attention"].indexer == pytest.approx(0)
