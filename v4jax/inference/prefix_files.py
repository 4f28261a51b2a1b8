"""A prefix on a disk: a document that is read once and asked about in many sessions.

One `.npz` file: the arrays of a `prefix.Stored`, and a header that says what they belong to: the digest
of the tokens, and the model that computed them. Arrays of formats that NumPy does not have are written
as bits.
"""

import hashlib
import json
import os
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.inference.prefix import Stored

_SAMPLE = 8  # values of each array of the model that tell it apart, of its first row


def model_digest(leaves, described: str) -> str:
    """Tells a model from others: some values of each of its arrays, and a text about it.

    The same whatever mesh it lies on, unless that leaves a device fewer values of a row. On the process
    that has the first device.
    """
    sha = hashlib.sha256(described.encode())
    for leaf in leaves:
        begins = (s for s in leaf.addressable_shards if not any(i.start for i in s.index))
        first = next(begins)
        with jax.set_mesh(jax.sharding.Mesh(np.array([first.device]), ("device",))):
            some = first.data[(0,) * (leaf.ndim - 1)][:_SAMPLE] if leaf.ndim else first.data
        sha.update(f"{leaf.shape} {leaf.dtype}".encode() + np.asarray(some).tobytes())
    return sha.hexdigest()


def write(path: str | os.PathLike, stored: Stored, digest: bytes, model: str) -> None:
    """Writes a prefix; the file appears when it is whole.

    Raises:
      OSError: it cannot be written.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((stored.state, stored.pages))]
    header = {
        "digest": digest.hex(),
        "model": model,
        "length": stored.length,
        "wide": stored.wide,
        "dtypes": [str(leaf.dtype) for leaf in leaves],
    }
    arrays: dict[str, Any] = {
        f"{n:05d}": leaf.view(f"u{leaf.dtype.itemsize}") for n, leaf in enumerate(leaves)
    }
    temporary = f"{os.fspath(path)}.new"
    with open(temporary, "wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: str | os.PathLike, tree: Any, model: str) -> tuple[Stored, bytes]:
    """A prefix and the digest of its tokens.

    Args:
      tree: structure of (state, pages) as the engine has them.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no file of a prefix, is damaged, or belongs to another model.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            leaves = [
                file[f"{n:05d}"].view(jnp.dtype(dtype)) for n, dtype in enumerate(header["dtypes"])
            ]
        digest, length, wide = bytes.fromhex(header["digest"]), header["length"], header["wide"]
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no prefix that an engine has saved: {error}.") from error
    if header["model"] != model:
        raise ValueError(
            f"{path} was saved by an engine with another model, numerics or cache format: its rows "
            "mean nothing to this one."
        )
    if len(leaves) != tree.num_leaves:
        raise ValueError(f"{path} has {len(leaves)} arrays: expected {tree.num_leaves}.")
    state, pages = jax.tree.unflatten(tree, leaves)
    return Stored(length, wide, state, pages), digest
