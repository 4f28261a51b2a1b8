import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from v4jax.checkpoint.safetensors import (
    CheckpointError,
    NewTensor,
    SafetensorsFile,
    write_safetensors,
)


def entry(tag, shape, begin, end):
    return {"dtype": tag, "shape": shape, "data_offsets": [begin, end]}


def contents(header, data: bytes = b"", *, spaces: int = 0, length: int | None = None) -> bytes:
    """Bytes of a file; `header` is JSON or the bytes to put in its place."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    encoded += b" " * spaces
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def opened(tmp_path, raw: bytes) -> SafetensorsFile:
    path = tmp_path / "some.safetensors"
    path.write_bytes(raw)
    return SafetensorsFile(path)


# Reading ------------------------------------------------------------------------------------------

# Tag, shape, bytes as they lie in the file, and the values they stand for.
STORED = [
    ("U8", [3], bytes([0, 127, 255]), [0, 127, 255]),
    ("I8", [4], bytes([0x21, 0xF8, 0x80, 0xFF]), [33, -8, -128, -1]),
    # sign, 4 exponent bits (bias 7), 3 mantissa bits
    (
        "F8_E4M3",
        [2, 3],
        bytes([0x00, 0x38, 0xC4, 0x7E, 0x01, 0x88]),
        [[0.0, 1.0, -3.0], [448.0, 2.0**-9, -(2.0**-6)]],
    ),
    ("F8_E8M0", [4], bytes([0, 126, 127, 254]), [2.0**-127, 0.5, 1.0, 2.0**127]),
    ("F8_E5M2", [2], bytes([0x3C, 0xC5]), [1.0, -5.0]),
    ("BF16", [2, 2], bytes.fromhex("803f 20c0 8000 0000"), [[1.0, -2.5], [128 * 2.0**-133, 0.0]]),
    ("F16", [2], bytes.fromhex("003c ff7b"), [1.0, 65504.0]),
    ("F32", [1, 3], bytes.fromhex("0000c03f 000000c5 01000000"), [[1.5, -2048.0, 2.0**-149]]),
    ("F64", [1], bytes.fromhex("000000000000f0bf"), [-1.0]),
    ("I16", [2], bytes.fromhex("ff7f 0080"), [32767, -32768]),
    ("I32", [2], bytes.fromhex("01020000 feffffff"), [513, -2]),
    ("I64", [2], bytes.fromhex("0700000001000000 ffffffffffffffff"), [2**32 + 7, -1]),
    ("BOOL", [2], bytes([1, 0]), [True, False]),
]


def read_as_numbers(array: np.ndarray) -> list:
    exact = array.dtype.kind in "iub"
    return array.tolist() if exact else array.astype(np.float64).tolist()


@pytest.mark.parametrize("tag, shape, data, expected", STORED, ids=[row[0] for row in STORED])
def test_hand_written_bytes_read_as_the_values_they_stand_for(tmp_path, tag, shape, data, expected):
    view = opened(tmp_path, contents({"x": entry(tag, shape, 0, len(data))}, data)).view("x")
    assert view.shape == tuple(shape)
    assert read_as_numbers(view) == expected
    assert view.tobytes() == data


def test_the_dtype_of_every_tag_is_the_one_that_jax_uses(tmp_path):
    dtypes = {
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "I8": np.int8,
        "I32": np.int32,
        "I64": np.int64,
        "U8": np.uint8,
    }
    for tag, dtype in dtypes.items():
        size = np.dtype(dtype).itemsize
        raw = contents({"x": entry(tag, [1], 0, size)}, bytes(size))
        assert opened(tmp_path, raw).view("x").dtype == np.dtype(dtype)


def test_codes_for_nan_read_as_nan(tmp_path):
    header = {"e4m3": entry("F8_E4M3", [2], 0, 2), "e8m0": entry("F8_E8M0", [1], 2, 3)}
    file = opened(tmp_path, contents(header, bytes([0x7F, 0xFF, 0xFF])))
    assert np.isnan(file.view("e4m3").astype(np.float32)).all()
    assert np.isnan(file.view("e8m0").astype(np.float32)).all()


@pytest.mark.parametrize("spaces", [0, 1, 2, 3, 64])
def test_tensors_side_by_side_read_exactly_wherever_they_start(tmp_path, spaces):
    header, data = {}, b""
    for tag, shape, stored, _ in STORED:
        header[tag] = entry(tag, shape, len(data), len(data) + len(stored))
        data += stored
    file = opened(tmp_path, contents(header, data, spaces=spaces))
    assert list(file.tensors) == [tag for tag, *_ in STORED]
    assert any(info.begin % file.view(tag).itemsize for tag, info in file.tensors.items())
    for tag, shape, _, expected in STORED:
        assert file.tensors[tag].tag == tag
        assert file.tensors[tag].shape == tuple(shape)
        assert read_as_numbers(file.view(tag)) == expected


def test_matrices_are_row_major(tmp_path):
    view = opened(tmp_path, contents({"x": entry("U8", [2, 3], 0, 6)}, bytes(range(6)))).view("x")
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_header_may_list_tensors_in_any_order(tmp_path):
    header = {"second": entry("U8", [1], 1, 2), "first": entry("U8", [1], 0, 1)}
    file = opened(tmp_path, contents(header, bytes([5, 6])))
    assert list(file.tensors) == ["second", "first"]
    assert (file.view("first").tolist(), file.view("second").tolist()) == ([5], [6])


def test_a_scalar_has_no_axes(tmp_path):
    view = opened(tmp_path, contents({"x": entry("F32", [], 0, 4)}, struct.pack("<f", 0.25))).view(
        "x"
    )
    assert view.shape == ()
    assert view.item() == 0.25


def test_metadata_is_kept_apart_from_tensors(tmp_path):
    header = {"__metadata__": {"format": "pt", "note": "ä"}, "x": entry("U8", [1], 0, 1)}
    file = opened(tmp_path, contents(header, b"\x09"))
    assert file.metadata == {"format": "pt", "note": "ä"}
    assert list(file.tensors) == ["x"]
    assert file.view("x").tolist() == [9]
    assert opened(tmp_path, contents({"x": entry("U8", [1], 0, 1)}, b"\x09")).metadata == {}


def test_a_file_without_tensors_is_valid(tmp_path):
    assert opened(tmp_path, contents({})).tensors == {}


@pytest.mark.parametrize(
    "header",
    [
        {"none": entry("F32", [0, 3], 0, 0), "x": entry("U8", [2], 0, 2)},
        {"x": entry("U8", [2], 0, 2), "none": entry("F32", [0, 3], 0, 0)},
        {"x": entry("U8", [2], 0, 2), "none": entry("F32", [0, 3], 2, 2)},
    ],
    ids=["first", "first, listed last", "at the end of the file"],
)
def test_tensors_without_elements_take_no_place(tmp_path, header):
    file = opened(tmp_path, contents(header, b"\x01\x02"))
    assert file.view("none").shape == (0, 3)
    assert file.view("x").tolist() == [1, 2]


def test_views_cannot_be_written_to(tmp_path):
    view = opened(tmp_path, contents({"x": entry("U8", [1], 0, 1)}, b"\x09")).view("x")
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


# Damage -------------------------------------------------------------------------------------------

TWO = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [2], 4, 12)}
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "shorter than the length": (b"\x01\x00\x00", "3 bytes"),
    "no header": (contents(b""), "header is not valid"),
    "header longer than the file": (contents(TWO, bytes(12), length=10_000), "length 10000"),
    "absurd header length": (contents(TWO, bytes(12), length=2**63), f"length {2**63}"),
    "not JSON": (contents(b"this is not JSON"), "header is not valid"),
    "not UTF-8": (contents(b'{"\xff": {}}'), "header is not valid"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "not a safetensors file"),
    "a list": (contents([]), "header is not valid"),
    "null": (contents(b"null"), "header is not valid"),
    "entry is no object": (contents({"a": 3}), "header is not valid"),
    "no dtype": (contents({"a": {"shape": [0], "data_offsets": [0, 0]}}), "dtype"),
    "no shape": (contents({"a": {"dtype": "U8", "data_offsets": [0, 0]}}), "shape"),
    "no offsets": (contents({"a": {"dtype": "U8", "shape": [0]}}), "data_offsets"),
    "one offset": (
        contents({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}),
        "not valid",
    ),
    "unknown dtype": (contents({"a": entry("F4", [2], 0, 1)}, b"\0"), "'F4' is unknown"),
    "dtype is a list": (contents({"a": entry(["U8"], [1], 0, 1)}, b"\0"), "not valid"),
    "negative offset": (contents({"a": entry("U8", [1], -1, 0)}, b"\0"), "impossible offsets"),
    "end before begin": (contents({"a": entry("U8", [1], 2, 1)}, b"\0\0"), "impossible offsets"),
    "negative shape": (contents({"a": entry("U8", [-1, -1], 0, 1)}, b"\0"), "impossible"),
    "text as offset": (contents({"a": entry("U8", [1], "0", "1")}, b"\0"), "not valid"),
    "fewer bytes than the shape needs": (
        contents({"a": entry("F32", [2], 0, 4)}, bytes(8)),
        "a: 4 bytes, its shape needs 8",
    ),
    "more bytes than the shape needs": (
        contents({"a": entry("F32", [1], 0, 8)}, bytes(8)),
        "a: 8 bytes, its shape needs 4",
    ),
    "dtype of another width": (
        contents({"a": entry("I64", [1], 0, 4)}, bytes(4)),
        "a: 4 bytes, its shape needs 8",
    ),
    "overlap": (
        contents({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3)),
        "b: overlaps",
    ),
    "overlap listed backwards": (
        contents({"b": entry("U8", [2], 1, 3), "a": entry("U8", [2], 0, 2)}, bytes(3)),
        "b: overlaps",
    ),
    "overlap with one before the last": (
        contents(
            {
                "a": entry("U8", [5], 0, 5),
                "b": entry("U8", [0], 5, 5),
                "c": entry("U8", [1], 4, 5),
            },
            bytes(5),
        ),
        "c: overlaps",
    ),
    "the same place twice": (
        contents({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, bytes(2)),
        "b: overlaps",
    ),
    "truncated data": (contents(TWO, bytes(11)), r"b: .*truncated"),
    "no data": (contents(TWO), "a: .*truncated.*b: .*truncated"),
}


@pytest.mark.parametrize("raw, problem", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_its_name_and_the_problem(tmp_path, raw, problem):
    with pytest.raises(CheckpointError, match=rf"(?s)some\.safetensors.*{problem}"):
        opened(tmp_path, raw)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = contents(TWO, bytes(12))
    assert opened(tmp_path, whole).view("b").tolist() == [0, 0]
    for length in range(len(whole)):
        with pytest.raises(CheckpointError, match=r"some\.safetensors"):
            opened(tmp_path, whole[:length])


def test_all_broken_tensors_are_listed_at_once(tmp_path):
    header = {
        "a": entry("F32", [2], 0, 4),
        "b": entry("U8", [4], 4, 8),
        "c": entry("U8", [4], 6, 10),
        "d": entry("U8", [4], 10, 14),
    }
    with pytest.raises(
        CheckpointError, match=r"(?s)a: 4 bytes.*c: overlaps.*d: .*truncated"
    ) as info:
        opened(tmp_path, contents(header, bytes(12)))
    assert "b:" not in str(info.value)


# Writing ------------------------------------------------------------------------------------------


def tensor(name: str, tag: str, data: np.ndarray) -> NewTensor:
    return NewTensor(name, tag, data.shape, lambda: data)


SOME = [
    tensor("half", "BF16", np.array([[1.0, -2.5]], ml_dtypes.bfloat16)),
    tensor("scalar", "F32", np.array(1.5, np.float32)),
    tensor("packed", "I8", np.array([-8, 33, -1], np.int8)),
    tensor("table", "I64", np.array([[2**32 + 7], [-1]], np.int64)),
]


def test_a_written_file_has_exactly_these_bytes(tmp_path):
    path = tmp_path / "new.safetensors"
    write_safetensors(path, SOME, {"format": "pt"})
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"half":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]},'
        b'"scalar":{"dtype":"F32","shape":[],"data_offsets":[4,8]},'
        b'"packed":{"dtype":"I8","shape":[3],"data_offsets":[8,11]},'
        b'"table":{"dtype":"I64","shape":[2,1],"data_offsets":[11,27]}}'
    )
    data = bytes.fromhex("803f20c0 0000c03f f821ff 0700000001000000 ffffffffffffffff")
    assert path.read_bytes() == contents(header, data, spaces=-len(header) % 8)
    assert os.listdir(tmp_path) == ["new.safetensors"]


@pytest.mark.parametrize("name", ["x" * n for n in range(1, 10)])
def test_data_starts_at_a_multiple_of_eight(tmp_path, name):
    path = tmp_path / "new.safetensors"
    write_safetensors(path, [tensor(name, "F32", np.array([1.5], np.float32))])
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert raw[8 + length :] == struct.pack("<f", 1.5)


def test_without_metadata_none_is_written(tmp_path):
    write_safetensors(tmp_path / "new.safetensors", SOME)
    assert b"__metadata__" not in (tmp_path / "new.safetensors").read_bytes()


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    tensors = {}
    for tag, *_ in STORED:
        dtype = SafetensorsFile(_one(tmp_path, tag)).view("x").dtype
        codes = random.integers(0, 2 if tag == "BOOL" else 256, (3, 5, dtype.itemsize))
        tensors[f"größe/{tag}"] = (tag, codes.astype(np.uint8).view(dtype)[..., 0])
    path = tmp_path / "new.safetensors"
    write_safetensors(path, [tensor(name, tag, data) for name, (tag, data) in tensors.items()])
    file = SafetensorsFile(path)
    assert list(file.tensors) == list(tensors)
    for name, (tag, data) in tensors.items():
        assert (file.tensors[name].tag, file.view(name).dtype) == (tag, data.dtype)
        assert file.view(name).shape == (3, 5)
        assert file.view(name).tobytes() == data.tobytes()


def _one(tmp_path, tag):
    stored = next(row for row in STORED if row[0] == tag)
    path = tmp_path / f"{tag}.safetensors"
    path.write_bytes(contents({"x": entry(tag, stored[1], 0, len(stored[2]))}, stored[2]))
    return path


def test_transposed_arrays_are_written_row_major(tmp_path):
    data = np.arange(6, dtype=np.uint8).reshape(2, 3).T
    write_safetensors(tmp_path / "new.safetensors", [tensor("x", "U8", data)])
    assert SafetensorsFile(tmp_path / "new.safetensors").view("x").tolist() == data.tolist()


def test_tensors_are_read_one_after_the_other(tmp_path):
    path, sizes = tmp_path / "new.safetensors", []

    def read():
        (temporary,) = os.listdir(tmp_path)
        sizes.append((tmp_path / temporary).stat().st_size)
        return np.zeros(1_000_000, np.uint8)

    write_safetensors(path, [NewTensor(name, "U8", (1_000_000,), read) for name in "abc"])
    assert [size // 1_000_000 for size in sizes] == [0, 1, 2], "the one before is in the file"
    assert path.stat().st_size > 3_000_000


def broken() -> np.ndarray:
    raise OSError("the disk is gone")


FAILING = {
    "read raises": (NewTensor("x", "U8", (2,), broken), OSError, "the disk is gone"),
    "another dtype": (
        NewTensor("x", "BF16", (2,), lambda: np.zeros(2, np.float16)),
        ValueError,
        r"x is float16\[2\]: expected BF16\[2\]",
    ),
    "same width, another dtype": (
        NewTensor("x", "I8", (2,), lambda: np.zeros(2, np.uint8)),
        ValueError,
        r"x is uint8\[2\]: expected I8\[2\]",
    ),
    "another shape": (
        NewTensor("x", "U8", (2,), lambda: np.zeros((2, 1), np.uint8)),
        ValueError,
        r"x is uint8\[2, 1\]: expected U8\[2\]",
    ),
}


@pytest.mark.parametrize("second, error, message", FAILING.values(), ids=FAILING.keys())
def test_a_failed_write_leaves_nothing_behind(tmp_path, second, error, message):
    with pytest.raises(error, match=message):
        write_safetensors(tmp_path / "new.safetensors", [SOME[0], second])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("second, error, message", FAILING.values(), ids=FAILING.keys())
def test_a_failed_write_leaves_the_old_file_as_it_was(tmp_path, second, error, message):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"what was there before")
    with pytest.raises(error, match=message):
        write_safetensors(path, [SOME[0], second])
    assert os.listdir(tmp_path) == ["new.safetensors"]
    assert path.read_bytes() == b"what was there before"


def test_a_successful_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "new.safetensors"
    path.write_bytes(b"what was there before")
    write_safetensors(path, SOME)
    assert list(SafetensorsFile(path).tensors) == ["half", "scalar", "packed", "table"]
    assert os.listdir(tmp_path) == ["new.safetensors"]


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "new", [NewTensor("x", "U8", (1,), interrupted)])
    assert os.listdir(tmp_path) == []
