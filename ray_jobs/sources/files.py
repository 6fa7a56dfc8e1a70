"""Finding and opening a source's files, on any file system that pyarrow knows."""

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Self
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from ray_jobs.sources.base import FilesConfig, SourceError
from ray_jobs.storage import S3Config, Storage, StorageConfig

_MAGIC = re.compile(r"[*?\[]")
HIDDEN = (".", "_")  # folders that others left behind or began, such as _temporary and .cache
# Such files. Spark's _SUCCESS and _metadata have no ending that any source asks for.
_HIDDEN_FILES = (".", "_committed_", "_started_")


@dataclass(frozen=True)
class File:
    """A file that was found.

    Attributes:
        uri: as `open_file` takes it.
        label: its name below what the configuration names, or where several entries have folders
            of one name, below what these share: the same wherever the files lie.
        size: in bytes.
    """

    uri: str
    label: str
    size: int


def find_files(
    config: FilesConfig,
    suffixes: Sequence[str],
    *,
    usual: Sequence[str] = (),
    hidden: tuple[str, ...] = HIDDEN[:1],
) -> list[File]:
    """The files that `path` means, those of each entry sorted, none twice; raises SourceError.

    Args:
        config: the source's configuration.
        suffixes: the endings that files of a folder must have, such as `.parquet`, in either case.
        usual: names of files which, where a folder has any, are all that is read of it; then it
            is not listed.
        hidden: what folders' names begin with that are not looked into, unless a pattern names
            some such. So it is with files that others left behind, whatever this says.
    """
    found: dict[str, File] = {}
    if not config.paths:
        raise SourceError("source.path: is an empty list; name a file, a folder or a pattern")
    for path in config.paths:
        for file in _find(path, config.s3, suffixes, usual, hidden):
            found.setdefault(_real(file.uri), file)
    files = list(found.values())
    folders = {(posixpath.dirname(file.label), posixpath.dirname(file.uri)) for file in files}
    if len({below for below, _ in folders}) == len(folders):
        return files
    # Data sets often hold the same names, and ids are made of them; then their folders' tell which.
    parts = [file.uri.split("/") for file in files]
    alike = takewhile(lambda names: len({*names}) == 1, zip(*parts, strict=False))
    shared = min(len(list(alike)), min(map(len, parts)) - 1)
    return [
        replace(file, label="/".join(part[shared:]))
        for file, part in zip(files, parts, strict=True)
    ]


def open_file(uri: str, s3: S3Config, size: int | None = None) -> pa.NativeFile:
    """Open a file for random access.

    Args:
        uri: of the file.
        s3: where it is on S3.
        size: in bytes, when it was listed.

    Raises:
        OSError: it cannot be reached, or was changed since.
    """
    filesystem, path = locate(uri, s3)
    file = filesystem.open_input_file(path)
    found = file.size()
    if size is not None and found != size:
        file.close()
        raise OSError(f"it had {size:,} bytes when it was listed, and has {found:,}")
    return file


class WatchedFile:
    """A file that remembers that it could not be read.

    Arrow's decoders raise the same errors for content that is broken and for a server that is away;
    what tells them apart is whether the bytes came.

    Attributes:
        size: in bytes.
        outage: why they did not come; None if they did, whatever was made of them.
    """

    def __init__(self, uri: str, s3: S3Config, size: int | None = None) -> None:
        """Open it as `open_file` does; raises OSError."""
        self.outage: OSError | None = None
        self._file = open_file(uri, s3, size)
        self.size = int(self._file.size())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def close(self) -> None:
        self._file.close()

    def seek(self, position: int, whence: int = 0) -> int:
        return int(self._file.seek(position, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, size: int = -1) -> pa.Buffer:
        """So many bytes, fewer at the file's end; raises OSError."""
        left = max(0, self.size - self.tell())
        wanted = left if size < 0 else min(size, left)
        try:
            data = self._file.read_buffer(wanted)
            if len(data) < wanted:
                raise OSError(f"{len(data):,} bytes came where {wanted:,} were asked for")
        except OSError as error:
            self.outage = error
            raise
        return data


def locate(uri: str, s3: S3Config) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path in it; raises SourceError."""
    scheme, is_uri, rest = uri.partition("://")
    try:
        if not is_uri:
            storage = Storage(StorageConfig(uri=uri))
            return storage.filesystem, storage.path()
        if scheme == "s3":
            return _s3_filesystem(s3), rest.rstrip("/")
        # pyarrow refuses spaces and accents in URIs, and takes what follows # or ? for no name.
        host, _, path = rest.rstrip("/").partition("/")
        filesystem, root = _filesystem(f"{scheme}://{host}/")
        return filesystem, posixpath.join(root, unquote(path)) if path else root
    except (ValueError, NotImplementedError) as error:
        raise SourceError(
            f"source.path: {uri} is neither a path nor a URI of a known file system ({error}); "
            "takes a path, s3://BUCKET/KEY, gs://, hdfs:// or file://"
        ) from error


def name_below(folder: str, name: str) -> str:
    """A name below a folder, as `locate` takes it: a % is an escape in all URIs but those of S3."""
    escaped = "://" in folder and not folder.startswith("s3://")
    return f"{folder}/{name.replace('%', '%25') if escaped else name}"


@lru_cache(maxsize=8)
def _s3_filesystem(s3: S3Config) -> pafs.FileSystem:
    return Storage(StorageConfig(uri="s3://bucket", s3=s3)).filesystem


@lru_cache(maxsize=8)
def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    filesystem, path = pafs.FileSystem.from_uri(root)
    return filesystem, path


def _find(
    path: str,
    s3: S3Config,
    suffixes: Sequence[str],
    usual: Sequence[str],
    hidden: tuple[str, ...],
) -> list[File]:
    base = _static(path)
    filesystem, root = locate(base, s3)
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            return [File(base if "://" in base else root, posixpath.basename(root), info.size)]
        if info.type == pafs.FileType.NotFound:
            raise SourceError(f"source.path: {base} does not exist{_here(base)}")
        prefix = root.rstrip("/") + "/"
        below = _there(filesystem, [prefix + name for name in usual if path == base])
        count = len(below)
        if not below:
            below, count = _below(filesystem, root, tuple(suffixes))
    except OSError as error:
        raise SourceError(f"source.path: {base} cannot be listed: {error}") from error
    wanted = path.removeprefix(base).lstrip("/")
    pattern = _pattern(wanted)
    *folders, name = wanted.replace("**", "**/").split("/")  # a ** is of folders, too
    if any(part.startswith(hidden) for part in folders):
        hidden = ()
    hidden_files = () if name.startswith(HIDDEN) else _HIDDEN_FILES
    # What the file system calls the folder may lack a part of its URI, such as the host.
    start = base.rstrip("/") if "://" in base else root.rstrip("/")
    named = ((info, info.path.removeprefix(prefix)) for info in below)
    files = [
        File(name_below(start, label), label, info.size)
        for info, label in named
        if info.type == pafs.FileType.File
        and label.lower().endswith(tuple(suffixes))
        and not posixpath.basename(label).startswith(hidden_files)
        and not any(part.startswith(hidden) for part in label.split("/")[:-1])
        and pattern.fullmatch(label)
    ]
    if not files:
        raise SourceError(
            f"source.path: {path} holds no file that ends in {' or '.join(suffixes)} "
            f"({count:,} other files and folders)"
        )
    return sorted(files, key=lambda file: file.uri)


def _real(uri: str) -> str:
    """The same for all links to a file: `latest` beside the folder that it leads to."""
    return uri if "://" in uri else os.path.realpath(uri)


def _below(
    filesystem: pafs.FileSystem, root: str, suffixes: tuple[str, ...]
) -> tuple[list[pafs.FileInfo], int]:
    """What is below a folder, of this machine's only the files that end so; how much there is."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        below = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        return below, len(below)
    paths = list(_walk(root))
    ending = [path for path in paths if path.lower().endswith(suffixes)]
    for path in ending:
        if os.fsencode(path) != path.encode("utf-8", "replace"):
            raise SourceError(
                f"source.path: {root} has a file whose name is not UTF-8, "
                f"{os.fsencode(os.path.relpath(path, root))!r}; rename it"
            )
    return filesystem.get_file_info(ending), len(paths)


def _walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """All paths below a folder. Links that lead in a circle, which Arrow follows, are not."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.path
            if entry.is_dir():
                yield from _walk(entry.path, above | {real})


def _there(filesystem: pafs.FileSystem, paths: Sequence[str]) -> list[pafs.FileInfo]:
    """The files among some paths; none where one may not be asked for."""
    try:
        found = filesystem.get_file_info(list(paths))
    except OSError:
        return []
    return [info for info in found if info.type == pafs.FileType.File]


def _static(path: str) -> str:
    """The part of a pattern before its first special character, up to a slash."""
    match = _MAGIC.search(path)
    if match is None or ("://" not in path and Path(path).exists()):
        return path
    return path[: path.rfind("/", 0, match.start()) + 1].rstrip("/") or (
        "/" if path.startswith("/") else "."
    )


def _pattern(text: str) -> re.Pattern[str]:
    """A pattern as a regular expression: * stays within a folder, ** does not."""
    if not text:
        return re.compile(".*")
    parts = re.split(r"(\*\*/?|\*|\?|\[[!^]?\]?[^\]]+\])", text)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    try:
        return re.compile(
            "".join(
                meaning.get(part) or (_any_of(part) if at % 2 else re.escape(part))
                for at, part in enumerate(parts)
            )
        )
    except re.error as error:
        raise SourceError(f"source.path: {text} is no pattern: {error}") from error


def _any_of(part: str) -> str:
    """A shell's [characters], or [!others], none of which is a slash, as a regular expression."""
    others = part[1] in "!^"
    characters = re.sub(r"([][^&|~\\])", r"\\\1", part[2 if others else 1 : -1])
    return f"(?!/)[{'^' * others}{characters}]"


def _here(path: str) -> str:
    """Where a relative path was looked for."""
    if "://" in path or Path(path).is_absolute():
        return ""
    return f" in {Path.cwd()}; paths are those of the machine that starts the job"
