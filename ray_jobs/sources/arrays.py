"""Texts that lie in a NumPy array of their own, a row a pair, beside the files of images.

The raw texts and captions of Kaichengalex/YFCC15M are published so: token ids [15061515, 154], two
texts of 77 a row. Of a file of gigabytes each task reads its own rows.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from ray_jobs.sources.base import SourceError, UnreachableError
from ray_jobs.sources.files import open_file
from ray_jobs.storage import S3Config

# NumPy's are not annotated.
_read_magic: Any = npy.read_magic
_HEADERS: dict[Any, Any] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_READ_ROWS = 1024  # in memory at once
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 14


@dataclass(frozen=True)
class ArrayFile:
    """A .npy file of numbers [rows, width].

    Attributes:
        uri: of the file.
        rows, width: its shape.
        dtype: of its numbers.
        begin: where they begin, in bytes.
        sample: a digest over what it holds here and there, which tells it from another of its
            shape, wherever copies of it lie.
    """

    uri: str
    rows: int
    width: int
    dtype: np.dtype[Any]
    begin: int
    sample: str

    @classmethod
    def open(cls, uri: str, s3: S3Config) -> "ArrayFile":
        """Read a file's header.

        Raises:
            UnreachableError: the file cannot be reached.
            SourceError: it holds anything but rows of numbers.
        """
        try:
            with open_file(uri, s3) as stream:
                version = _read_magic(stream)
                if version not in _HEADERS:
                    raise ValueError(f"its version is {version}")
                shape, by_columns, dtype = _HEADERS[version](stream)
                begin, size = stream.tell(), stream.size()
                sample = _sample(stream, size)
        except OSError as error:
            raise UnreachableError(
                f"source.beside.path: {uri} cannot be reached: {error}"
            ) from error
        except ValueError as error:
            raise SourceError(
                f"source.beside.path: {uri} cannot be read as a .npy file: {error}"
            ) from error
        # Objects would have to be unpickled, which no input is.
        if len(shape) != 2 or by_columns or dtype.kind not in "iuf":
            raise SourceError(
                f"source.beside.path: {uri} holds {dtype} {list(shape)}; takes numbers "
                "[rows, width], row after row"
            )
        if size < begin + math.prod(shape) * dtype.itemsize:
            raise SourceError(
                f"source.beside.path: {uri} ends before its {shape[0]:,} rows do; fetch it again"
            )
        return cls(uri, shape[0], shape[1], dtype, begin, sample)

    def read(self, first: int, s3: S3Config) -> Iterator[Sequence[float]]:
        """The rows from one on."""
        size = self.width * self.dtype.itemsize
        with open_file(self.uri, s3) as stream:
            stream.seek(self.begin + first * size)
            for at in range(first, self.rows, _READ_ROWS):
                rows = min(_READ_ROWS, self.rows - at)
                block = np.frombuffer(stream.read(rows * size), self.dtype)
                yield from block.reshape(rows, self.width).tolist()


def _sample(stream: pa.NativeFile, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - _SAMPLE_BYTES)
    for at in range(_SAMPLES):
        stream.seek(last * at // (_SAMPLES - 1))
        digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
