"""Checked inputs, and embeddings read in blocks.

Choices:
- Similarities are products in float64 (float32 where a device has nothing wider), whatever the
  embeddings are stored in: rounding then never decides between two items, and no autocast, TF32
  or blocking changes a score.
- Embeddings stay in the type they came in; a block is widened when it is read. A million of them
  then need no second copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = Tensor | npt.NDArray[Any]
Integers = Array | Sequence[int]

# 32 MiB of float64 similarities at a time: large enough for full matrix-product speed.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Embeddings:
    """Rows [N, D] that are finite, and what scales each to length 1 (or 1, where not wanted).

    Attributes:
        data: [N, D], as it came.
        scale: [N], what a row is multiplied by.
        longest: the length of the longest row after scaling.
    """

    data: Tensor
    scale: Tensor
    longest: float

    @classmethod
    def of(
        cls,
        name: str,
        value: Array,
        *,
        normalize: bool = True,
        device: torch.device | None = None,
    ) -> Embeddings:
        """Raises ValueError naming the array: not [N, D], empty, or not finite."""
        data = matrix(name, value)
        scale = check_finite(name, data).to(device or data.device)
        if normalize:
            # A row of zeros has no direction; it stays zero and is like nothing.
            scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale.reciprocal(), 0.0)
            return cls(data, scale, 1.0)
        return cls(data, torch.ones_like(scale), float(scale.max()))

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def device(self) -> torch.device:
        """Where blocks are."""
        return self.scale.device

    def block(self, rows: slice | Tensor) -> Tensor:
        """The scaled rows, in the type that similarities are computed in."""
        index = rows.to(self.data.device) if isinstance(rows, Tensor) else rows
        block = self.data[index].to(self.device, self.scale.dtype)
        return block * self.scale[rows][:, None]


def matrix(name: str, value: Array) -> Tensor:
    """A floating tensor [N, D], N and D at least 1, without a graph.

    Raises:
        ValueError: for another shape.
        TypeError: for another type.
    """
    tensor = _tensor(name, value)
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; takes [items, dimensions], at least one "
            "of each"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; takes floating numbers")
    return tensor


def indices(
    name: str, value: Integers, rows: tuple[str, int], bound: int, device: torch.device
) -> Tensor:
    """Integers [N] in 0..bound-1, int64 on the device; rows are what they must be as many as.

    Raises:
        ValueError: another shape, or a number outside the bound; the message names the first.
        TypeError: no integers.
    """
    tensor = _tensor(name, value if isinstance(value, Tensor | np.ndarray) else np.asarray(value))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} is {tensor.dtype}; takes integers")
    if tensor.dim() != 1 or len(tensor) != rows[1]:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; takes [{rows[1]}], one for each row of "
            f"{rows[0]}"
        )
    tensor = tensor.to(device, torch.int64)
    outside = torch.nonzero((tensor < 0) | (tensor >= bound))
    if len(outside):
        position = int(outside[0])
        raise ValueError(f"{name}[{position}] is {int(tensor[position])}; takes 0 to {bound - 1}")
    return tensor


def check_finite(name: str, data: Tensor) -> Tensor:
    """The lengths of rows [N]; raises ValueError naming the first row that is not finite."""
    wide = widest(data.device)
    step = rows_at_a_time(CHUNK_ELEMENTS, data.shape[1])
    norms = torch.cat(
        [torch.linalg.vector_norm(data[rows].to(wide), dim=1) for rows in slices(len(data), step)]
    )
    bad = torch.nonzero(~norms.isfinite())
    if len(bad):
        raise ValueError(
            f"{name}[{int(bad[0])}] is not finite ({len(bad)} of {len(data)} rows are not): the "
            "model diverged, or its number type overflowed"
        )
    return norms


def widest(device: torch.device) -> torch.dtype:
    """The widest floating type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def slices(count: int, step: int) -> Iterator[slice]:
    """0..count in slices of at most step."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def square_side(chunk_elements: int) -> int:
    """The side of a square block of at most chunk_elements, which must be at least 1."""
    _check_chunk(chunk_elements)
    return math.isqrt(chunk_elements)


def rows_at_a_time(chunk_elements: int, columns: int) -> int:
    """Rows of a block of at most chunk_elements (at least 1), or one row if that is larger."""
    _check_chunk(chunk_elements)
    return max(1, chunk_elements // columns)


def rounding_error(dtype: torch.dtype, dimensions: int) -> float:
    """How far two computations of one product of vectors of length 1 can be apart."""
    return 2 * dimensions * torch.finfo(dtype).eps


def _check_chunk(chunk_elements: int) -> None:
    if chunk_elements < 1:
        raise ValueError(f"chunk_elements is {chunk_elements}; it must be at least 1")


def _tensor(name: str, value: Array) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; takes a tensor or a NumPy array")
    # PyTorch takes no negative strides, and warns of arrays it must not write to, as Arrow's are.
    array = np.ascontiguousarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
