"""The weights of the B/32 golden values, made anew instead of stored: integers, one rounding.

A parameter's i-th value, in row-major order, is mean + half * (2 u - 1) in float64, rounded once
to float32, and then to bfloat16 where the published parameter is bfloat16. u in [0, 1) is the
upper 24 bits of splitmix64((crc32(key) << 32) + i); mean and half depend on the key alone.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 16  # elements at a time, to stay in the cache


def fill(key: str, shape: Sequence[int], dtype: str = "float32") -> npt.NDArray[np.float32]:
    """A parameter's values, in float32 also where its type is bfloat16."""
    n = math.prod(shape)
    mean, half = _uniform(key, shape)
    values = np.empty(n, np.float32)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        values[start:stop] = mean + half * (2.0 * _stream(key, start, stop) - 1.0)
    if dtype == "bfloat16":
        values = _round_to_bfloat16(values)
    return values.reshape(shape)


def _stream(key: str, start: int, stop: int) -> npt.NDArray[np.float64]:
    seed = (zlib.crc32(key.encode()) << 32) + 0x9E3779B97F4A7C15
    x = np.arange(start, stop, dtype=np.uint64)
    x += np.uint64(seed % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)) * 2.0**-24


def _uniform(key: str, shape: Sequence[int]) -> tuple[float, float]:
    """The mean and half the width of a parameter's distribution; the first match counts."""
    last = key.rsplit(".", 1)[-1]
    rules = (
        (key == "logit_scale", 2.5, 0.5),
        (key.endswith("projection.weight"), 0.0, math.sqrt(3 / math.prod(shape[1:]))),
        (key.endswith("projection.bias"), 0.0, 0.1),
        (last == "pos_embed", 0.0, 0.2),
        (last == "cls_token", 0.0, 0.5),
        (key.endswith("emb.weight"), 0.0, 0.5),
        (last.endswith(("_w1", "_w2")), 0.0, 0.05),
        (last == "time_decay", -3.5, 2.5),
        (last == "time_faaaa", 0.0, 0.5),
        (last.startswith(("time_maa_", "spatial_mix_")), 0.5, 0.5),
        (last == "bias", 0.0, 0.1),
        (last == "weight" and len(shape) == 1, 1.0, 0.2),
        (last == "weight", 0.0, math.sqrt(3 / math.prod(shape[1:]))),
    )
    return next((mean, half) for matches, mean, half in rules if matches)


def _round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    bits = values.view(np.uint32)
    to_even = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return (((bits + to_even) >> np.uint32(16)) << np.uint32(16)).view(np.float32)
