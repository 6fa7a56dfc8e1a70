"""One place for everything a run keeps: a folder, `s3://`, or any file system that pyarrow knows.

Choices:
- Names are relative and use `/`. A name either holds its whole content or does not exist: local
  files are written beside their place and moved there; object stores publish on completion.
- No name is written with two different contents, except for small JSON records. So whoever redoes
  work after a crash writes the same bytes to the same names, and nothing needs a lock.
"""

import hashlib
import json
import posixpath
import re
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import Field, PositiveInt, field_validator

from rwkv_clip.config import BaseConfig

_TEMPORARY = ".tmp-"
_ONE_REQUEST = 8_000_000  # bytes; Arrow sends up to 10 MB so
_PIECE = 80_000_000  # bytes, sent at a time: eight parts of Arrow's
# Of the file systems that pyarrow knows; any that fsspec knows is reached by `fsspec+NAME://`.
_OBJECTS = ("s3", "gs", "gcs", "abfs", "abfss")  # whose paths are names, which Arrow takes whole
_SCHEMES = ("file", *_OBJECTS, "hdfs", "viewfs", "hf", "mock")
_S3_TOLD = re.compile(r"(?:When [^\n]*)?AWS Error [^\n]*")  # Arrow's words
_ROWS = 16  # at a time: encoded images are large
_NOBODYS_SECONDS = 86_400.0  # without a byte written, a file that is not finished is given up


def digest_of_json(value: object) -> str:
    """The SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class S3Config(BaseConfig):
    """How an `s3://` storage is reached. Credentials come from the usual AWS chain."""

    endpoint: str | None = Field(None, description="URL of a MinIO or Ceph server; AWS if absent")
    region: str | None = Field(None, description="region name; the AWS chain's if absent")
    # Left out of what tells runs apart: it decides nothing of what comes out.
    attempts: PositiveInt = Field(
        10,
        description="at a request, with growing pauses; ten take a minute and a half",
        exclude=True,
    )

    @field_validator("endpoint")
    @classmethod
    def _is_a_server(cls, endpoint: str | None) -> str | None:
        if endpoint and not _is_server(_with_scheme(endpoint)):
            raise ValueError(f"{endpoint!r} is no server's URL; takes one such as http://host:9000")
        return endpoint  # as it is written: it is a part of what tells ingestions apart

    @property
    def endpoint_url(self) -> str | None:
        """The endpoint as a URL."""
        return _with_scheme(self.endpoint) if self.endpoint else None


def _with_scheme(endpoint: str) -> str:
    """An endpoint as Arrow understands it that lacks a scheme, which others insist on."""
    return endpoint if "://" in endpoint else f"https://{endpoint}"


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0  # which raises for what is no port
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and not any(map(str.isspace, url))


class StorageConfig(BaseConfig):
    """Where a run keeps everything."""

    uri: str = Field(description="a folder, s3://bucket/prefix, or another pyarrow file system")
    s3: S3Config = S3Config()

    @field_validator("uri")
    @classmethod
    def _is_a_place(cls, uri: str) -> str:
        if not uri.strip():
            raise ValueError("takes a folder or a URI such as s3://bucket/prefix")
        scheme, colon, rest = uri.partition(":")
        if colon and scheme in _SCHEMES:
            if not rest.startswith("//"):
                raise ValueError(f"{uri} lacks slashes; such a URI begins with {scheme}://")
            if scheme != "file" and not rest.strip("/"):
                raise ValueError(f"{uri} names no bucket; takes {scheme}://bucket/prefix")
            if scheme in _OBJECTS and "//" in uri.removeprefix(f"{scheme}:/").rstrip("/"):
                raise ValueError(f"{uri} has a part without a name: slashes follow on one another")
        elif rest.startswith("//") and not scheme.startswith("fsspec+"):
            known = ", ".join(f"{one}://" for one in _SCHEMES)
            raise ValueError(f"{uri} is on no known file system; takes a folder or {known}")
        try:
            if scheme == "file":
                pafs.FileSystem.from_uri(uri)
            Path(uri).expanduser()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{uri} is no folder: {error}") from error
        return uri.rstrip("/") or "/"


class _S3(pafs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """An S3 server that may be busy; stays as patient in other processes, which Arrow's forgets.

    Args:
        config: how it is reached.
        delayed: send what is small by one request. A large file is then begun when its first piece
            is sent; if the server refuses that, Arrow publishes an empty one.
    """

    def __init__(self, config: S3Config, delayed: bool = True) -> None:
        self.config, self.delayed = config, delayed
        options = {"endpoint_override": config.endpoint, "region": config.region}
        super().__init__(
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=config.attempts),
            allow_delayed_open=delayed,
            **{name: value for name, value in options.items() if value},
        )

    def __reduce__(self) -> tuple[type["_S3"], tuple[S3Config, bool]]:
        return _S3, (self.config, self.delayed)


class _Local(pafs.LocalFileSystem):  # type: ignore[misc]  # pyarrow has no types
    """Local files that appear whole, also those that others write: Ray Train's record of a run."""

    def __reduce__(self) -> tuple[type["_Local"], tuple[()]]:
        return _Local, ()

    @contextmanager
    def open_output_stream(self, path: str, *arguments: Any, **options: Any) -> Iterator[Any]:
        """A file to write; it appears at its path when the block ends well, and only then."""
        folder, base = posixpath.split(path)
        temporary = posixpath.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex}-{base}")
        try:
            with super().open_output_stream(temporary, *arguments, **options) as stream:
                yield stream
            self.move(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


class Storage:
    """Files under one root. Small, and safe to send to other processes and nodes."""

    def __init__(self, config: StorageConfig) -> None:
        self.config = config
        if "://" not in config.uri:
            # A relative folder means the driver's, wherever the worker that gets this runs.
            folder = Path(config.uri).expanduser().resolve()
            self.config = config.model_copy(update={"uri": str(folder)})

    @classmethod
    def at(cls, uri: str | Path) -> "Storage":
        """A storage at a folder or URI, everything else by default."""
        return cls(StorageConfig(uri=str(uri)))

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    @property
    def uri(self) -> str:
        return self.config.uri

    @cached_property
    def _where(self) -> tuple[pafs.FileSystem, str]:
        uri = self.config.uri
        if not uri.startswith("s3://"):
            filesystem, root = pafs.FileSystem.from_uri(uri)
            return _Local() if isinstance(filesystem, pafs.LocalFileSystem) else filesystem, root
        return _S3(self.config.s3), uri.removeprefix("s3://")

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._where[0]

    @cached_property
    def _opening_at_once(self) -> pafs.FileSystem:
        """The file system for large files; see _S3."""
        return _S3(self.config.s3, False) if isinstance(self.filesystem, _S3) else self.filesystem

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The name as `filesystem` takes it."""
        return posixpath.join(self._where[1], name) if name else self._where[1]

    def child_uri(self, name: str) -> str:
        """The name as a URI or absolute path."""
        return f"{self.uri}/{name}"

    def child(self, name: str) -> "Storage":
        """The storage below a name."""
        return Storage(self.config.model_copy(update={"uri": self.child_uri(name)}))

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        found: bool = self.filesystem.get_file_info(self.path(name)).type != pafs.FileType.NotFound
        return found

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return int(self.filesystem.get_file_info(self.path(name)).size or 0)

    def names(self, name: str = "", suffix: str = "", recursive: bool = False) -> list[str]:
        """The names of the files below a folder, sorted; none if there is no such folder."""
        selector = pafs.FileSelector(self.path(name), recursive=recursive, allow_not_found=True)
        root = self.path().rstrip("/") + "/"
        return sorted(
            info.path.removeprefix(root)
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
            and info.path.endswith(suffix)
            and _TEMPORARY not in info.base_name
        )

    @contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A file to write; it appears under its name when the block ends well, and only then."""
        path = self.path(name)
        if self.is_local:
            self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
            with self.filesystem.open_output_stream(path) as stream:
                yield stream
            return
        # An object store's stream publishes what it has when it is dropped, so nothing is sent
        # before all of it is there: on this machine's disk, as parts may be gigabytes.
        with TemporaryFile() as whole:
            yield pa.PythonFile(whole, "w")
            whole.flush()
            # In a thread, because an interrupt would drop the stream in the middle.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._send, path, whole).result()

    def _send(self, path: str, whole: IO[bytes]) -> None:
        """Publish a file that is complete. What could fail here must be what the stream knows."""
        size = whole.tell()
        data = pa.py_buffer(mmap(whole.fileno(), size, access=ACCESS_READ) if size else b"")
        filesystem = self.filesystem if size < _ONE_REQUEST else self._opening_at_once
        with filesystem.open_output_stream(path) as stream:
            for start in range(0, size, _PIECE):
                stream.write(data[start : start + _PIECE])
                stream.flush()  # waits: what was written and not sent yet is held in memory

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole."""
        with self.writing(name) as stream:
            stream.write(data)

    def read_bytes(self, name: str) -> bytes:
        """A file's content; raises FileNotFoundError."""
        with self.filesystem.open_input_file(self.path(name)) as file:
            return bytes(file.read(file.size()))  # by one request; without a size they are many

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON document."""
        self.write_bytes(name, json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON document; raises FileNotFoundError, and ValueError where it is none."""
        data = self.read_bytes(name)
        try:
            return json.loads(data)
        except ValueError as error:
            raise ValueError(f"{self.child_uri(name)} is not JSON: {error}") from error

    def find_json(self, name: str) -> Any:
        """As `read_json`; None if there is no such file."""
        try:
            return self.read_json(name)
        except FileNotFoundError:
            return None

    def write_table(self, name: str, table: pa.Table, row_group_size: int | None = None) -> None:
        """Write a Parquet file, compressed with zstd."""
        with self.writing(name) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=row_group_size)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read a Parquet file, or some of its columns."""
        with self.filesystem.open_input_file(self.path(name)) as stream:
            return pq.read_table(stream, columns=columns)

    @contextmanager
    def parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file to read parts of; each read asks for all that it takes at once."""
        with self.filesystem.open_input_file(self.path(name)) as stream:
            yield pq.ParquetFile(stream, pre_buffer=True)

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a Parquet file, of which only a row group or so is in memory."""
        with self.filesystem.open_input_file(self.path(name)) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(_ROWS):
                yield from batch.to_pylist()

    def read_footer(self, name: str) -> pq.FileMetaData:
        """What a Parquet file says of itself."""
        with self.filesystem.open_input_file(self.path(name)) as stream:
            return pq.read_metadata(stream)

    def read_rows(self, name: str, columns: list[str], first: int, rows: int) -> pa.Table:
        """Some rows of a Parquet file; only the row groups that hold them are read."""
        with self.parquet(name) as file:
            groups, begin, skipped = [], 0, 0
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if end <= first:
                    skipped = end
                elif begin < first + rows:
                    groups.append(group)
                begin = end
            return file.read_row_groups(groups, columns=columns).slice(first - skipped, rows)

    def delete_unfinished(self, name: str) -> None:
        """Remove from a local folder what writers that were killed a day ago or more left there."""
        if not self.is_local:
            return
        for file in Path(self.path(name)).glob(f"{_TEMPORARY}*"):
            with suppress(OSError):  # another job removed it, or it is another user's
                if file.stat().st_mtime < time.time() - _NOBODYS_SECONDS:
                    file.unlink()

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens if there is none."""
        info = self.filesystem.get_file_info(self.path(name))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)


def refused_by_server(error: BaseException, storage: Storage) -> str | None:
    """What to do about a request that a storage on S3 could not answer; None for other errors."""
    scheme, _, place = storage.uri.partition("://")
    told = _S3_TOLD.findall(str(error))  # tasks' errors have all that led to them around it
    if scheme != "s3" or not told:
        return None
    bucket = place.partition("/")[0]
    if "in bucket '" in told[-1] and f"in bucket '{bucket}'" not in told[-1]:
        return None  # a source's
    server = f" at {storage.config.s3.endpoint}" if storage.config.s3.endpoint else ""
    return (
        f"storage.uri: S3{server} does not do what {storage.uri} needs ({told[-1]}). Look at that "
        "name, at storage.s3 and at the keys that the AWS chain finds (AWS_ACCESS_KEY_ID, a "
        "profile or a role), and start again; what is done is kept"
    )
