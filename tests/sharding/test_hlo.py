"""Reading collectives out of compiled HLO: kinds, sizes, groups, loops."""

import jax
import jax.numpy as jnp
import pytest
from jax import P

from sharding import make_mesh
from v4jax.planning.hlo import array_bytes, collectives, exchanges


def _text(fn, *shapes, **sizes) -> str:
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(fn, in_specs=P(("fsdp", "expert")), out_specs=P(), check_vma=False)
        arrays = [
            jax.ShapeDtypeStruct(
                s, jnp.float32, sharding=jax.NamedSharding(mesh, P(("fsdp", "expert")))
            )
            for s in shapes
        ]
        return jax.jit(mapped).lower(*arrays).compile().as_text()


def test_array_bytes():
    assert array_bytes("bf16[16,4096]") == 131_072
    assert array_bytes("u8[3]") == array_bytes("f8e4m3fn[3]") == array_bytes("pred[3]") == 3
    assert array_bytes("u4[6]") == 3
    assert array_bytes("f32[]") == 4


def test_a_gather_is_found_with_its_group_and_bytes():
    def fn(x):
        return jax.lax.all_gather(x, "expert", tiled=True)

    (found,) = collectives(_text(fn, (64, 128), fsdp=2, expert=4))

    assert (found.kind, found.group, found.count) == ("all-gather", 4, 1)
    assert found.sent_bytes == 32 * 128 * 4 * 3 / 4


def test_collectives_in_a_loop_count_every_time_it_runs():
    def fn(x):
        def body(carry, _):
            return jax.lax.psum(carry, ("fsdp", "expert")) * 0.1, None

        return jax.lax.scan(body, x, length=7)[0]

    (found,) = collectives(_text(fn, (8, 128), fsdp=2, expert=4))

    assert (found.kind, found.group, found.count) == ("all-reduce", 8, 7)
    assert found.sent_bytes == pytest.approx(7 * 2 * 128 * 4 * 7 / 8)


def test_counts_of_asynchronous_forms_and_ragged_exchanges():
    text = """HloModule m

%body (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %s = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %r = bf16[8,4]{1,0} ragged-all-to-all(%p, %p), replica_groups={{0,1,2,3}}
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %w = bf16[8,4]{1,0} while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    found = {c.kind: c for c in collectives(text)}

    assert found["all-gather"].count == found["ragged-all-to-all"].count == 5
    assert found["all-gather"].sent_bytes == 5 * 16 * 4 * 2 / 2
    assert found["ragged-all-to-all"].sent_bytes == 5 * 8 * 4 * 2 * 3 / 4


def test_loops_without_a_stated_count_run_to_their_condition_s_bound():
    """As TPU programs state it; a loop without a constant bound depends on data."""
    text = """HloModule m

%bounded (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} constant(20)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%free (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} get-tuple-element(%s), index=1
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%inner (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %x = bf16[8,4]{1,0} all-reduce(%s), replica_groups={{0,1}}, to_apply=%add
}

%outer (s: (s32[], s32[])) -> (s32[], s32[]) {
  %s = (s32[], s32[]) parameter(0)
  %w = (s32[], s32[]) while(%s), condition=%free, body=%inner
}

ENTRY %main (a: (s32[], s32[])) -> (s32[], s32[]) {
  %a = (s32[], s32[]) parameter(0)
  ROOT %w = (s32[], s32[]) while(%a), condition=%bounded, body=%outer
}
"""
    (found,) = collectives(text)

    assert found.count == 20


def test_work_between_the_start_and_the_end_of_a_collective():
    text = """HloModule m, is_scheduled=true

%product (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%uneven (s: bf16[8,8]) -> bf16[8,8] {
  %s = bf16[8,8]{1,0} parameter(0)
  %start.9 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%s), replica_groups={{0,1}}
  ROOT %done.9 = bf16[8,8]{1,0} all-gather-done(%start.9)
}

ENTRY %main (a: bf16[32,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[32,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  %x = ((bf16[32,8]{1,0}, bf16[20,8]{1,0}, s32[4]{0}), bf16[20,8]{1,0}) ragged-all-to-all-start(%a, %b)
  %f = bf16[8,8]{1,0} fusion(%b), kind=kOutput, calls=%product, metadata={op_name="jit(f)/shard_map/moe/dot"}
  %x.1 = ((bf16[32,8]{1,0}, bf16[20,8]{1,0}, s32[4]{0}), bf16[20,8]{1,0}) ragged-all-to-all-start(%a, %f)
  %done = bf16[20,8]{1,0} ragged-all-to-all-done(%x)
  %n = bf16[8,8]{1,0} negate(%b)
  %done.1 = bf16[20,8]{1,0} ragged-all-to-all-done(%x.1)
  ROOT %w = bf16[8,8]{1,0} while(%n), condition=%c, body=%uneven, metadata={op_name="jit(f)/uneven_rounds/while"}
}
"""
    first, second = exchanges(text)

    assert first.kind == second.kind == "ragged-all-to-all"
    assert first.result == "bf16[20,8]"  # what travels fits into it
    assert first.count == second.count == 1
    assert (first.work, second.work) == (("moe/dot",), ())
    (counted,) = collectives(text)  # nothing of the loop that only uneven loads take
    assert counted.kind == "ragged-all-to-all"
    with pytest.raises(ValueError, match="not scheduled"):
        exchanges(text.replace(", is_scheduled=true", ""))


def test_a_started_reduce_scatter_counts_with_what_a_device_keeps():
    text = """HloModule m

ENTRY %main (a: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %s = ((f32[8,4]{1,0}, token[]), f32[2,4]{1,0}) reduce-scatter-start(%a), replica_groups={{0,1,2,3}}
  ROOT %d = f32[2,4]{1,0} reduce-scatter-done(%s)
}
"""
    (found,) = collectives(text)

    assert (found.result, found.sent_bytes) == ("f32[2,4]", 2 * 4 * 4 * 3)


def test_collectives_that_are_wrapped_in_a_computation_are_the_same():
    text = """HloModule m, is_scheduled=true

%inner (p: bf16[32,8], q: bf16[20,8]) -> bf16[20,8] {
  %p = bf16[32,8]{1,0} parameter(0)
  %q = bf16[20,8]{1,0} parameter(1)
  ROOT %r = bf16[20,8]{1,0} ragged-all-to-all(%p, %q), channel_id=1, replica_groups={{0,1,2,3}}
}

%sent (p: bf16[32,8], q: bf16[20,8]) -> bf16[20,8] {
  %p = bf16[32,8]{1,0} parameter(0)
  %q = bf16[20,8]{1,0} parameter(1)
  ROOT %r = bf16[20,8]{1,0} call(%p, %q), to_apply=%inner
}

ENTRY %main (a: bf16[32,8], b: bf16[20,8]) -> bf16[20,8] {
  %a = bf16[32,8]{1,0} parameter(0)
  %b = bf16[20,8]{1,0} parameter(1)
  %x = ((bf16[32,8]{1,0}, bf16[20,8]{1,0}), bf16[20,8]{1,0}) async-start(%a, %b), calls=%sent
  %c = bf16[8,8]{1,0} convolution(%b, %b), metadata={op_name="jit(f)/dot"}
  ROOT %done = bf16[20,8]{1,0} async-done(%x)
}
"""
    (exchange,), (counted,) = exchanges(text), collectives(text)

    assert (exchange.kind, exchange.work) == ("ragged-all-to-all", ("dot",))
    assert (counted.kind, counted.group, counted.count) == ("ragged-all-to-all", 4, 1)
    assert counted.sent_bytes == 20 * 8 * 2 * 3 / 4
