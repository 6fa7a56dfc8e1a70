"""Tar files as streams, also packed ones: their files, one after the other.

Choices:
- A packed file is told by its first bytes, whatever it is called. All of its streams are unpacked,
  however many lie one behind the other: bgzip, pbzip2 and pixz write a stream for each block.
  `tarfile`, which unpacks the first alone, gets what is unpacked.
- A shard may be several archives that were joined (`cat a.tar b.tar`), so behind an archive's end
  the next one is looked for. What is none is passed over.
- What cannot be unpacked is told as `tarfile` tells what it cannot read, and never as an OSError:
  that is an outage, after which the file is read again.
- Headers are no longer than names are, and files no larger than a limit.
"""

import bz2
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import pyarrow as pa

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# What reading a shard raises that is broken.
BROKEN = (tarfile.TarError, EOFError, ValueError, RecursionError)
_LONGEST_FIRST = sorted(SUFFIXES, key=len, reverse=True)
_SKIPPED_BYTES = 10 << 30  # a member that claims more is not even passed over
_HEADER_BYTES = 1_000_000  # of a member, with what is said before it of its name
_READ_BYTES = 8_000_000  # by a request
# Unpacked at once, and come of it at most: images hardly shrink, so mostly one call takes all.
_PACKED_BYTES = 1 << 14
_UNPACKED_BYTES = 1 << 15
_EXTENDED = frozenset(
    {
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    }
)


def stem_of(label: str) -> str:
    """A shard's name without its suffix."""
    for suffix in _LONGEST_FIRST:
        label = label.removesuffix(suffix)
    return label


@dataclass(frozen=True)
class ShardFile:
    """A file of a shard, that can be read until the next one is looked for.

    Attributes:
        name: as the shard has it, without `./` before it.
        size: in bytes.
        link: what it is in place of a file, for a person; empty for a file.
    """

    name: str
    size: int
    link: str
    _shard: tarfile.TarFile
    _member: tarfile.TarInfo

    def read(self) -> bytes:
        content = self._shard.extractfile(self._member)
        return content.read() if content else b""


def shard_files(file: pa.NativeFile) -> Iterator[ShardFile]:
    """The files of a shard, and links in place of such, in their order; not hidden ones.

    Raises:
        BROKEN: any of these, where the shard breaks off.
        OSError: the file cannot be reached now.
    """
    with pa.BufferedInputStream(file, _READ_BYTES) as stream:
        content = _unpacked(stream)
        packed = isinstance(content, _Unpacked)
        with tarfile.open(  # type: ignore[call-overload] # the stubs ask for more than it uses
            fileobj=content,
            mode="r|",
            bufsize=_UNPACKED_BYTES if packed else tarfile.RECORDSIZE,
            tarinfo=_Member,
        ) as tar:
            for member in tar:
                tar.members.clear()  # it would hold all of them
                if member.size > _SKIPPED_BYTES:
                    raise tarfile.ReadError(f"{member.name!r} claims {member.size:,} bytes")
                name = member.name.removeprefix("./")
                link = _link(member)
                # Folders and devices hold nothing that could be lost.
                if (member.isreg() or link) and not name.rpartition("/")[2].startswith("."):
                    yield ShardFile(name, member.size, link, tar, member)


def _link(member: tarfile.TarInfo) -> str:
    kinds = {tarfile.LNKTYPE: "hard", tarfile.SYMTYPE: "symbolic"}
    kind = kinds.get(member.type)
    return f"a {kind} link to {member.linkname!r}" if kind else ""


class _Member(tarfile.TarInfo):
    """A member of archives that end where they say so, and not where they become unreadable."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        end: Exception | None = None
        while True:
            try:
                return super().fromtarfile(archive)
            except tarfile.EOFHeaderError as error:  # type: ignore[attr-defined] # the stubs lack it
                end = error
                archive.offset = archive.fileobj.tell()
            except tarfile.HeaderError as error:
                if end is not None:
                    raise end from None
                # Behind the first member, `tarfile` takes any broken header for the end.
                raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> "_Member":
        # `tarfile` reads headers whole, one within the other; the offset is still where they began.
        begin = archive.offset
        if self.type in _EXTENDED:
            read = archive.fileobj.tell() - begin + sum(map(len, archive.pax_headers.values()))
        if self.type in _EXTENDED and read + self.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of over {_HEADER_BYTES:,} bytes at byte {begin:,}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"a sparse file at byte {begin:,}")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return] # as above

    def _proc_gnusparse_10(self, *_: object) -> None:
        # Its header has no end before a number in it says so.
        raise tarfile.ReadError("a sparse file")


class _Unpacker(Protocol):
    """What `bz2` and `lzma` unpack one stream with."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipUnpacker:
    """`zlib`'s, used as theirs are."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


# What a stream begins with, and what unpacks it.
_PACKINGS: tuple[tuple[re.Pattern[bytes], Callable[[], _Unpacker]], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), _GzipUnpacker),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),  # the latter is empty
    (re.compile(rb"\xfd7zXZ|\x5d\x00\x00\x80"), lzma.LZMADecompressor),
)
_MAGIC_BYTES = 10  # that tell


class _Plain:
    """A stream of which the beginning was read."""

    def __init__(self, begin: bytes, stream: pa.NativeFile) -> None:
        self._begin = begin
        self._stream = stream

    def read(self, size: int) -> bytes:
        begin, self._begin = self._begin, b""
        return begin or self._stream.read(size)


class _Unpacked:
    """What a stream of packed streams holds; where the last of them breaks off is its end."""

    def __init__(
        self,
        begin: bytes,
        stream: pa.NativeFile,
        magic: re.Pattern[bytes],
        new: Callable[[], _Unpacker],
    ) -> None:
        self._packed = begin
        self._stream = stream
        self._magic = magic
        self._new = new
        self._unpacker = new()

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end; raises ReadError for what cannot be unpacked."""
        while not self._unpacker.eof or self._next():
            packed, self._packed = self._packed, b""
            ended = False
            if not packed and self._unpacker.needs_input:
                packed = self._stream.read(_PACKED_BYTES)
                ended = not packed
            try:
                content = self._unpacker.decompress(packed, size)
            except (OSError, zlib.error, lzma.LZMAError) as error:
                raise tarfile.ReadError(f"invalid compressed data: {error}") from error
            if content or ended:
                return content
        return b""

    def _next(self) -> bool:
        """Go on to the next stream, behind zeros if there are some; False if there is none."""
        rest = self._unpacker.unused_data.lstrip(b"\x00")
        while len(rest) < _MAGIC_BYTES and (more := self._stream.read(_PACKED_BYTES)):
            rest = (rest + more).lstrip(b"\x00")
        if not self._magic.match(rest):
            return False
        self._packed, self._unpacker = rest, self._new()
        return True


def _unpacked(stream: pa.NativeFile) -> _Plain | _Unpacked:
    begin = stream.read(tarfile.RECORDSIZE)
    for magic, new in _PACKINGS:
        if magic.match(begin):
            return _Unpacked(begin, stream, magic, new)
    return _Plain(begin, stream)
