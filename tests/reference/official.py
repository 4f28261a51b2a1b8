"""DeepSeek-V4 in NumPy, written from the published description: whole sequences, one at a time.

Slow and plain on purpose. Everything is float64 between the places where the released code rounds;
`cast` is the rounding of activations (identity, or to bfloat16). It reads the checkpoint's tensors
by their released names and shares no code with the project.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np

_DTYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        data = np.frombuffer(raw[begin:end], _DTYPES[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"])
    return tensors


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float64."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def exact(x: np.ndarray) -> np.ndarray:
    """No rounding."""
    return x


def power_of_two_above(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    return np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))


def quantize(x: np.ndarray, block: int, largest: float, floor: float, dtype) -> np.ndarray:
    """Rounds to `dtype` with a power-of-two scale per `block` channels, and back."""
    blocks = x.reshape(*x.shape[:-1], -1, block).astype(np.float32)
    amax = np.maximum(np.abs(blocks).max(-1, keepdims=True), np.float32(floor))
    scale = power_of_two_above(amax * np.float32(1 / largest))
    values = np.clip(blocks / scale, -largest, largest).astype(np.float32).astype(dtype)
    return (values.astype(np.float64) * scale).reshape(x.shape)


def quantize_e4m3(x: np.ndarray, block: int) -> np.ndarray:
    return quantize(x, block, 448.0, 1e-4, ml_dtypes.float8_e4m3fn)


def quantize_e2m1(x: np.ndarray, block: int) -> np.ndarray:
    return quantize(x, block, 6.0, 6 * 2.0**-126, ml_dtypes.float4_e2m1fn)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = np.exp(x - x.max(axis=axis, keepdims=True))
    return x / x.sum(axis=axis, keepdims=True)


class Official:
    """The released model on one sequence."""

    def __init__(
        self,
        folder: pathlib.Path,
        cast: Callable[[np.ndarray], np.ndarray] = exact,
        *,
        cast_sqrt: bool = False,
    ):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = read_tensors(folder / "model.safetensors")
        self.cast = cast
        # torch's CPU rsqrt of fewer bfloat16 values than a vector register holds rounds the root
        # before it is inverted; the reference's decoding steps have that, its prefill has not.
        self.cast_root = cast if cast_sqrt else exact

    def tensor(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float64)

    def weight(self, name: str) -> np.ndarray:
        """A linear's weight [out, in] with its scales applied."""
        values = self.tensors[f"{name}.weight"]
        if f"{name}.scale" not in self.tensors:
            return values.astype(np.float64)
        scale = self.tensor(f"{name}.scale")
        if values.dtype == np.uint8:
            codes = np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1)
            return _E2M1[codes] * np.repeat(scale, 32, axis=1)
        scale = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
        return values.astype(np.float64) * scale[: values.shape[0], : values.shape[1]]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """FP8 activations by FP8 or FP4 weights."""
        block = min(128, x.shape[-1])
        return self.cast(quantize_e4m3(x, block) @ self.weight(name).T)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return self.cast(self.tensor(f"{name}.weight") * (x / rms))

    def frequencies(self, ratio: int) -> np.ndarray:
        config, dim = self.config, self.config["qk_rope_head_dim"]
        theta = config["compress_rope_theta"] if ratio else config["rope_theta"]
        f = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
        if not ratio:
            return f
        yarn = config["rope_scaling"]

        def corr(beta):
            length = yarn["original_max_position_embeddings"]
            return dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(corr(yarn["beta_fast"])), 0)
        high = min(math.ceil(corr(yarn["beta_slow"])), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return f / yarn["factor"] * ramp + f * (1 - ramp)

    def rope(self, x, positions, ratio, inverse=False):
        """Rotates the last channels of x [T, ..., H]."""
        dim = self.config["qk_rope_head_dim"]
        f = self.frequencies(ratio).astype(np.float32)
        angle = (positions[:, None].astype(np.float32) * f).astype(np.float64)
        turn = np.exp((-1j if inverse else 1j) * angle)
        turn = turn.reshape(len(positions), *[1] * (x.ndim - 2), dim // 2)
        pairs = x[..., -dim:].reshape(*x.shape[:-1], dim // 2, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        tail = np.stack([z.real, z.imag], axis=-1).reshape(*x.shape[:-1], dim)
        return np.concatenate([x[..., :-dim], self.cast(tail)], axis=-1)

    def round_kv(self, kv):
        nope = self.config["head_dim"] - self.config["qk_rope_head_dim"]
        return np.concatenate([self.cast(quantize_e4m3(kv[:, :nope], 64)), kv[:, nope:]], axis=-1)

    def hc_pre(self, streams, name):
        """streams [T, M, D] -> u [T, D], post [T, M], comb [T, M, M]."""
        config, m = self.config, self.config["hc_mult"]
        fn, base, scale = (self.tensor(f"{name}_{part}") for part in ("fn", "base", "scale"))
        flat = streams.reshape(len(streams), -1)
        rms = np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + config["rms_norm_eps"])
        raw = flat @ fn.T / rms
        eps = config["hc_eps"]
        pre = sigmoid(raw[:, :m] * scale[0] + base[:m]) + eps
        post = 2 * sigmoid(raw[:, m : 2 * m] * scale[1] + base[m : 2 * m])
        comb = (raw[:, 2 * m :] * scale[2] + base[2 * m :]).reshape(-1, m, m)
        comb = softmax(comb, axis=2) + eps
        comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
        for _ in range(config["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(axis=2, keepdims=True) + eps)
            comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
        return self.cast(np.einsum("tm,tmd->td", pre, streams)), post, comb

    def hc_post(self, f, streams, post, comb):
        mixed = np.einsum("tjk,tjd->tkd", comb, streams)
        return self.cast(post[:, :, None] * f[:, None] + mixed)

    def compress(self, x, name, width, ratio):
        """Entries [T // ratio, width] of x [T, D]."""
        value = x @ self.tensor(f"{name}.wkv.weight").T
        gate = x @ self.tensor(f"{name}.wgate.weight").T
        ape, count = self.tensor(f"{name}.ape"), len(x) // ratio
        entries = np.zeros((count, width))
        for w in range(count):
            own = slice(ratio * w, ratio * (w + 1))
            if ratio == 4:
                values, gates = value[own, width:], gate[own, width:] + ape[:, width:]
                if w > 0:
                    before = slice(ratio * (w - 1), ratio * w)
                    values = np.concatenate([value[before, :width], values])
                    gates = np.concatenate([gate[before, :width] + ape[:, :width], gates])
            else:
                values, gates = value[own], gate[own] + ape
            entries[w] = (softmax(gates, axis=0) * values).sum(axis=0)
        entries = self.norm(self.cast(entries), f"{name}.norm")
        return self.rope(entries, ratio * np.arange(count), ratio)

    def select(self, x, latent, name, positions):
        """Selected entries [T, number of entries] (bool) by the indexer."""
        config = self.config
        heads, width = config["index_n_heads"], config["index_head_dim"]
        hadamard = np.array([[1.0]])
        while len(hadamard) < width:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        hadamard = hadamard / math.sqrt(width)

        def rotate(y):
            return self.cast(quantize_e2m1(self.cast(y @ hadamard), 32))

        keys = rotate(self.compress(x, f"{name}.compressor", width, 4))
        q = self.linear(latent, f"{name}.wq_b").reshape(len(x), heads, width)
        q = rotate(self.rope(q, positions, 4))
        weights = self.cast(x @ self.tensor(f"{name}.weights_proj.weight").T)
        weights = self.cast(weights * (width**-0.5 * heads**-0.5))
        dots = self.cast(np.einsum("tad,sd->tas", q, keys))
        scores = self.cast(self.cast(np.maximum(dots, 0) * weights[:, :, None]).sum(axis=1))
        selected = np.zeros(scores.shape, bool)
        for t in range(len(x)):
            visible = (t + 1) // 4
            order = np.argsort(-scores[t, :visible], kind="stable")
            selected[t, order[: config["index_topk"]]] = True
        return selected

    def attention(self, x, name, ratio):
        config = self.config
        heads, dim, length = config["num_attention_heads"], config["head_dim"], len(x)
        positions = np.arange(length)
        latent = self.norm(self.linear(x, f"{name}.wq_a"), f"{name}.q_norm")
        q = self.linear(latent, f"{name}.wq_b").reshape(length, heads, dim)
        mean = self.cast(np.mean(self.cast(q**2), axis=-1, keepdims=True))
        q = self.cast(
            q * self.cast(1 / self.cast_root(np.sqrt(self.cast(mean + config["rms_norm_eps"]))))
        )
        q = self.rope(q, positions, ratio)
        kv = self.norm(self.linear(x, f"{name}.wkv"), f"{name}.kv_norm")
        keys = self.round_kv(self.rope(kv, positions, ratio))
        age = positions[:, None] - positions[None, :]
        visible = (age >= 0) & (age < config["sliding_window"])
        if ratio:
            entries = self.round_kv(self.compress(x, f"{name}.compressor", dim, ratio))
            if ratio == 4:
                seen = self.select(x, latent, f"{name}.indexer", positions)
            else:
                seen = np.arange(len(entries)) < ((positions + 1) // ratio)[:, None]
            keys = np.concatenate([keys, entries])
            visible = np.concatenate([visible, seen], axis=1)
        scores = np.einsum("tnh,sh->tns", q, keys) / math.sqrt(dim)
        scores = np.where(visible[:, None], scores, -np.inf)
        peak = scores.max(axis=-1, keepdims=True)
        p = np.exp(scores - peak)
        sink = np.exp(self.tensor(f"{name}.attn_sink")[:, None] - peak)
        total = p.sum(axis=-1, keepdims=True) + sink
        out = self.cast(np.einsum("tns,sh->tnh", self.cast(p), keys) / total)
        out = self.rope(out, positions, ratio, inverse=True)
        groups = config["o_groups"]
        out = out.reshape(length, groups, -1)
        wo_a = self.weight(f"{name}.wo_a").reshape(groups, -1, out.shape[-1])
        low = self.cast(np.einsum("tgi,gri->tgr", out, wo_a))
        return self.linear(low.reshape(length, -1), f"{name}.wo_b")

    def expert(self, x, name, weight=None):
        limit = self.config["swiglu_limit"]
        gate = np.minimum(self.linear(x, f"{name}.w1"), limit)
        up = np.clip(self.linear(x, f"{name}.w3"), -limit, limit)
        y = gate * sigmoid(gate) * up
        y = y if weight is None else weight[:, None] * y
        return self.linear(self.cast(y), f"{name}.w2")

    def moe(self, x, tokens, name):
        config = self.config
        scores = np.sqrt(np.logaddexp(0, x @ self.tensor(f"{name}.gate.weight").T))
        if f"{name}.gate.tid2eid" in self.tensors:
            experts = self.tensors[f"{name}.gate.tid2eid"][tokens]
        else:
            biased = scores + self.tensor(f"{name}.gate.bias")
            experts = np.argsort(-biased, axis=-1)[:, : config["num_experts_per_tok"]]
        weights = np.take_along_axis(scores, experts, axis=-1)
        weights = weights / weights.sum(-1, keepdims=True) * config["routed_scaling_factor"]
        out = np.zeros_like(x)
        for e in range(config["n_routed_experts"]):
            rows, slots = np.where(experts == e)
            if len(rows):
                out[rows] += self.expert(x[rows], f"{name}.experts.{e}", weights[rows, slots])
        return self.cast(out + self.expert(x, f"{name}.shared_experts"))

    def block(self, streams, tokens, name, ratio):
        """streams [T, M, D] -> [T, M, D]"""
        u, post, comb = self.hc_pre(streams, f"{name}.hc_attn")
        out = self.attention(self.norm(u, f"{name}.attn_norm"), f"{name}.attn", ratio)
        streams = self.hc_post(out, streams, post, comb)
        u, post, comb = self.hc_pre(streams, f"{name}.hc_ffn")
        out = self.moe(self.norm(u, f"{name}.ffn_norm"), tokens, f"{name}.ffn")
        return self.hc_post(out, streams, post, comb)

    def layer(self, index, streams, tokens):
        return self.block(streams, tokens, f"layers.{index}", self.config["compress_ratios"][index])

    def head(self, streams, prefix="", norm="norm"):
        """streams [T, M, D] -> logits [T, V]"""
        fn, base, scale = (self.tensor(f"{prefix}hc_head_{p}") for p in ("fn", "base", "scale"))
        flat = streams.reshape(len(streams), -1)
        rms = np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        weights = sigmoid(flat @ fn.T / rms * scale + base) + self.config["hc_eps"]
        y = self.cast(np.einsum("tm,tmd->td", weights, streams))
        return self.norm(y, norm) @ self.tensor("head.weight").T

    def mtp(self, streams, next_tokens):
        """Logits [T, V] of the MTP block."""
        e = self.norm(self.tensor("embed.weight")[next_tokens], "mtp.0.enorm")
        h = self.norm(streams, "mtp.0.hnorm")
        x = self.cast(self.linear(e, "mtp.0.e_proj")[:, None] + self.linear(h, "mtp.0.h_proj"))
        x = self.block(x, next_tokens, "mtp.0", 0)
        return self.head(x, "mtp.0.", "mtp.0.norm")
