"""The tensors of the released models, by name, format and shape, without allocating any."""

import collections
import re

import pytest

from tests.reference.checkpoints import released_table
from tests.v4jax.test_config import FLASH, PRO
from v4jax.checkpoint.saving import announced
from v4jax.config import flash, pro

FLASH_COUNTS = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792}
PRO_COUNTS = {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424}


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize(
    "model, config, count, num_bytes, mtp_count, counts",
    [
        (flash(), FLASH, 69_187, 159_609_485_896, 1_575, FLASH_COUNTS),
        (pro(), PRO, 145_116, 864_704_792_696, 2_343, PRO_COUNTS),
    ],
    ids=["flash", "pro"],
)
def test_a_released_model_is_written_as_the_published_tensors(
    model, config, count, num_bytes, mtp_count, counts, scan_layers
):
    tensors = announced(model, scan_layers=scan_layers)
    assert len(tensors) == count
    assert sum(tensor.nbytes for tensor in tensors) == num_bytes
    assert collections.Counter(tensor.tag for tensor in tensors) == counts
    assert sum(tensor.name.startswith("mtp.0.") for tensor in tensors) == mtp_count
    assert {t.name: (t.tag, t.shape) for t in tensors} == released_table(config)


def test_layers_differ_by_exactly_the_published_names():
    names = collections.defaultdict(set)
    for tensor in announced(flash(), scan_layers=True):
        if match := re.fullmatch(r"layers\.(\d+)\.(.*)", tensor.name):
            names[int(match[1])].add(match[2])
    compressor = {"ape", "wkv.weight", "wgate.weight", "norm.weight"}
    hca = {f"attn.compressor.{part}" for part in compressor}
    csa = hca | {f"attn.indexer.compressor.{part}" for part in compressor}
    csa |= {f"attn.indexer.{n}" for n in ("wq_b.weight", "wq_b.scale", "weights_proj.weight")}
    hashed, scored = {"ffn.gate.tid2eid"}, {"ffn.gate.bias"}
    common = names[0] & names[3]
    assert names[0] == names[1] == common | hashed
    assert names[2] == common | hashed | csa
    assert all(names[i] == common | scored | hca for i in range(3, 43, 2))
    assert all(names[i] == common | scored | csa for i in range(4, 43, 2))
    assert len(names) == 43
