"""Finding and opening a source's files, on any file system that pyarrow knows."""

import errno
import math
import os
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from ray_jobs.sources.base import FilesConfig, SourceError
from ray_jobs.storage import S3Config, Storage, StorageConfig

_Item = TypeVar("_Item")
_Done = TypeVar("_Done")

_MAGIC = re.compile(r"[*?\[]")
HIDDEN = (".", "_")  # folders that others left behind or began, such as _temporary and .cache
# Such files. Spark's _SUCCESS and _metadata have no ending that any source asks for.
_HIDDEN_FILES = (".", "_committed_", "_started_")
_SLASH_IN_BRACKETS = re.compile(r"\[[^\]]*/")
# Arrow has the codes of S3 and of Google's store in its words only.
_DENIED = re.compile("AWS Error ACCESS_DENIED|PERMISSION_DENIED")
# For that of an archived object S3 and Arrow have no name, so there are the server's words.
_ARCHIVED = re.compile(
    "InvalidObjectState|INVALID_OBJECT_STATE|not valid for the object's|"
    "not valid for the current state of the object"
)
_LISTINGS = 16  # at a time
_READS = 16  # of files ahead


@dataclass(frozen=True)
class File:
    """A file that was found.

    Attributes:
        uri: as `open_file` takes it.
        label: its name below what the configuration names, or where several entries have folders
            of one name, below what these share: the same wherever the files lie.
        size: in bytes.
        modified: in seconds since 1970; None where the file system does not say.
    """

    uri: str
    label: str
    size: int
    modified: int | None


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


def is_denied(error: OSError) -> bool:
    """Whether it says that something may not be asked for, rather than that it cannot be now."""
    return error.errno == errno.EACCES or _DENIED.search(str(error)) is not None


def is_forbidden(error: OSError) -> bool:
    """Whether it says that a file may not be read: for want of rights, or as it is archived."""
    return is_denied(error) or _ARCHIVED.search(str(error)) is not None


def done_ahead(
    work: Callable[[_Item], _Done],
    items: Iterable[_Item],
    size: Callable[[_Item], int] = lambda _: 0,
    most: float = math.inf,
) -> Iterator[tuple[_Item, Future[_Done]]]:
    """Items in their order, with work on them that goes on while those before them are used.

    Args:
        work: is done in threads.
        items: what there is to do.
        size: of an item.
        most: the sizes of all that is ahead.
    """
    pool = ThreadPoolExecutor(_READS, "ahead")
    waiting: deque[tuple[_Item, Future[_Done]]] = deque()
    total = 0
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            total += size(item)
            while len(waiting) == _READS or (waiting and total > most):
                total -= size(waiting[0][0])
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


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
    base = path
    try:
        base = _static(path, s3)
        filesystem, root = locate(base, s3)
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            return [_file(info, base if "://" in base else root, posixpath.basename(root))]
        if info.type == pafs.FileType.NotFound:
            raise SourceError(f"source.path: {base} does not exist{_here(base)}")
        wanted = path.removeprefix(base).lstrip("/")
        prefix = root.rstrip("/") + "/"
        below = _there(filesystem, [prefix + name for name in usual if path == base])
        count = len(below)
        if not below:
            below, count = _below(filesystem, root, tuple(suffixes), _enters(wanted, prefix))
    except OSError as error:
        raise SourceError(f"source.path: {base} cannot be listed: {error}") from error
    pattern = _pattern(wanted)
    *folders, name = wanted.replace("**", "**/").split("/")  # a ** is of folders, too
    if any(part.startswith(hidden) for part in folders):
        hidden = ()
    hidden_files = () if name.startswith(HIDDEN) else _HIDDEN_FILES
    # What the file system calls the folder may lack a part of its URI, such as the host.
    start = base.rstrip("/") if "://" in base else root.rstrip("/")
    named = ((info, info.path.removeprefix(prefix)) for info in below)
    files = [
        _file(info, name_below(start, label), label)
        for info, label in named
        if info.type == pafs.FileType.File
        and label.lower().endswith(tuple(suffixes))
        and not posixpath.basename(label).startswith(hidden_files)
        and not any(part.startswith(hidden) for part in label.split("/")[:-1])
        and pattern.fullmatch(label)
    ]
    if not files:
        literal = "; a [ that is part of a name is written [[]" if "[" in wanted else ""
        raise SourceError(
            f"source.path: {path} holds no file that ends in {' or '.join(suffixes)} "
            f"({count:,} other files and folders){literal}"
        )
    for file in files:
        if "" in file.label.split("/"):
            raise SourceError(
                f"source.path: {file.uri} has two slashes in its key, and cannot be read so; "
                "rename it, or name the others by a pattern"
            )
    return sorted(files, key=lambda file: file.uri)


def _file(info: pafs.FileInfo, uri: str, label: str) -> File:
    modified = None if info.mtime_ns is None else info.mtime_ns // 1_000_000_000
    return File(uri, label, info.size, modified)


def _real(uri: str) -> str:
    """The same for all links to a file: `latest` beside the folder that it leads to."""
    return uri if "://" in uri else os.path.realpath(uri)


def _below(
    filesystem: pafs.FileSystem,
    root: str,
    suffixes: tuple[str, ...],
    enters: Callable[[str], bool] | None,
) -> tuple[list[pafs.FileInfo], int]:
    """What is below a folder, of this machine's only the files that end so; how much there is.

    Args:
        filesystem: that it is on.
        root: the folder.
        suffixes: of files.
        enters: tells which folders are looked into; all if absent.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        if enters is None:  # then few requests take all of it
            below = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        else:
            below = _entered(filesystem, root, enters)
        return below, len(below)
    paths = list(_walk(root, enters or (lambda _: True)))
    ending = [path for path in paths if path.lower().endswith(suffixes)]
    for path in ending:
        if os.fsencode(path) != path.encode("utf-8", "replace"):
            raise SourceError(
                f"source.path: {root} has a file whose name is not UTF-8, "
                f"{os.fsencode(os.path.relpath(path, root))!r}; rename it"
            )
    return filesystem.get_file_info(ending), len(paths)


def _entered(
    filesystem: pafs.FileSystem, root: str, enters: Callable[[str], bool]
) -> list[pafs.FileInfo]:
    """What is in a folder and in those below it that are to be looked into, by a listing each."""
    found: list[pafs.FileInfo] = []
    folders = [root]
    with ThreadPoolExecutor(_LISTINGS) as pool:
        while folders:
            some = [*pool.map(partial(_entries, filesystem), folders)]
            found += [info for infos in some for info in infos]
            folders = [
                info.path
                for infos in some
                for info in infos
                if info.type == pafs.FileType.Directory and enters(info.path)
            ]
    return found


def _entries(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    below = filesystem.get_file_info(pafs.FileSelector(folder))
    # On S3 a folder is in itself where a key goes on with another slash.
    return [info for info in below if info.path.rstrip("/") != folder.rstrip("/")]


def _walk(
    folder: str, enters: Callable[[str], bool], above: frozenset[str] = frozenset()
) -> Iterator[str]:
    """All paths below a folder. Links that lead in a circle, which Arrow follows, are not."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.path
            if entry.is_dir() and enters(entry.path):
                yield from _walk(entry.path, enters, above | {real})


def _enters(wanted: str, prefix: str) -> Callable[[str], bool] | None:
    """Tells whether what a pattern means may be in a folder; None if it may be in any.

    Args:
        wanted: the pattern.
        prefix: begins the paths of folders, and is no part of the pattern.
    """
    if not wanted or "**" in wanted or _SLASH_IN_BRACKETS.search(wanted):
        return None
    folders = wanted.split("/")[:-1]
    levels = [_pattern("/".join(folders[:depth])) for depth in range(1, len(folders) + 1)]

    def enters(path: str) -> bool:
        below = path.removeprefix(prefix)
        depth = below.count("/")
        return depth < len(levels) and levels[depth].fullmatch(below) is not None

    return enters


def _there(filesystem: pafs.FileSystem, paths: Sequence[str]) -> list[pafs.FileInfo]:
    """The files among some paths; none where one may not be asked for. Raises OSError."""
    try:
        found = filesystem.get_file_info(list(paths))
    except OSError as error:
        if is_denied(error):
            return []
        raise
    return [info for info in found if info.type == pafs.FileType.File]


def _static(path: str, s3: S3Config) -> str:
    """The part of a pattern before its first special character, up to a slash.

    All of it if something is called so. Raises OSError.
    """
    match = _MAGIC.search(path)
    if match is None or _exists(path, s3):
        return path
    return path[: path.rfind("/", 0, match.start()) + 1].rstrip("/") or (
        "/" if path.startswith("/") else "."
    )


def _exists(path: str, s3: S3Config) -> bool:
    filesystem, place = locate(path, s3)
    try:
        return bool(filesystem.get_file_info(place).type != pafs.FileType.NotFound)
    except OSError as error:
        if is_denied(error):  # as S3 says of what is not there to those who may not list
            return False
        raise


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
