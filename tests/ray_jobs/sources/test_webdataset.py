"""Tar shards: samples of several files, names that are not to be trusted, and broken ends."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ray_jobs.ingest import IngestConfig
from ray_jobs.ingestion.parts import Reading
from ray_jobs.pairs import RowLimits, make_pair
from ray_jobs.sources import (
    Rejected,
    Source,
    SourceConfig,
    SourceError,
    Unit,
    open_source,
    webdataset,
)

Png = Callable[[int], bytes]


def source(path: Path, **options: Any) -> Source:
    config = {"kind": "webdataset", "path": str(path), **options}
    return open_source(TypeAdapter(SourceConfig).validate_python(config))


def rows_of(one: Source) -> list[Any]:
    return [row for unit in one.units() for row in one.read(unit)]


def tar(files: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def samples(png: Png, count: int, first: int = 0) -> dict[str, bytes]:
    files = {}
    for number in range(first, first + count):
        files[f"{number:05d}.png"] = png(number)
        files[f"{number:05d}.txt"] = f"text {number}".encode()
        files[f"{number:05d}.json"] = json.dumps({"blip": f"caption {number}"}).encode()
    return files


def lzma_alone(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


def test_neighbours_of_one_key_are_a_sample(tmp_path: Path, png: Png) -> None:
    (tmp_path / "00000.tar").write_bytes(tar(samples(png, 3)))
    (tmp_path / "00001.tar.gz").write_bytes(gzip.compress(tar(samples(png, 2, 3))))
    one = source(tmp_path, columns={"caption": "json.blip"})
    rows = rows_of(one)
    assert len(one.units()) == 2
    assert [row["id"] for row in rows] == [f"0000{i // 3}/{i:05d}" for i in range(5)]
    assert [row["web_text"] for row in rows] == [f"text {i}".encode() for i in range(5)]
    assert rows[4]["caption"] == "caption 4"
    assert rows[4]["image"] == png(4)


def test_keys_may_be_in_folders_and_files_of_other_kinds(tmp_path: Path, png: Png) -> None:
    files = {
        "./dogs/1.seg.png": png(1),
        "dogs/1.cls": b"1\n",
        "dogs/2.JPG": png(2),
        "dogs/2.cls": b"0",
        "dogs/2.npy": b"array",
        "dogs/._2.png": b"left by a Mac",
    }
    (tmp_path / "a.tar").write_bytes(tar(files))
    one = source(tmp_path, columns={"caption": "cls", "web_text": None}, classes=["cat", "dog"])
    assert [(row["id"], row["caption"]) for row in rows_of(one)] == [
        ("a/dogs/1", "dog"),
        ("a/dogs/2", "cat"),
    ]


def test_a_sample_s_text_file_may_hold_its_tags(tmp_path: Path, png: Png) -> None:
    files = {"1.png": png(1), "1.txt": b"dog, cat", "1.json": b'{"title": "hi"}'}
    (tmp_path / "a.tar").write_bytes(tar(files))
    (row,) = rows_of(source(tmp_path, columns={"web_text": "json.title", "tags": "txt"}))
    pair = make_pair(row, RowLimits())
    assert (pair["web_text"], pair["tags"]) == ("hi", ["dog", "cat"])


def test_ids_may_come_from_the_json_file(tmp_path: Path, png: Png) -> None:
    files = {
        "1.png": png(1),
        "1.json": b'{"uid": 77, "alt": "hi"}',
        "2.png": png(2),
        "2.json": b"{",
    }
    (tmp_path / "a.tar").write_bytes(tar(files))
    one = source(tmp_path, columns={"id": "json.uid", "web_text": "json.alt"})
    good, broken = rows_of(one)
    assert (good["id"], good["web_text"]) == ("77", "hi")
    assert (broken.id, broken.reason) == ("a/2", "bad_row")


def test_json_that_cannot_be_read_is_told_where_it_is_asked_for(tmp_path: Path, png: Png) -> None:
    written = json.dumps({"alt": "caf\u00e9"}, ensure_ascii=False)
    contents = [
        written.encode("utf-8-sig"),
        written.encode("utf-16"),
        written[:-2].encode(),
        b"",
        b"[" * 100_000,
        b'["alt"]',
        written.encode("latin-1"),
    ]
    files = {}
    for at, content in enumerate(contents):
        files |= {f"{at}.png": png(at), f"{at}.txt": b"hi", f"{at}.json": content}
    (tmp_path / "a.tar").write_bytes(tar(files))
    first, *broken, last = rows_of(source(tmp_path, columns={"caption": "json.alt"}))
    assert (first["caption"], last["caption"]) == ("caf\u00e9", "caf\ufffd")
    assert [(row.id, row.reason) for row in broken] == [
        (f"a/{at}", "bad_row") for at in range(1, 6)
    ]
    assert broken[4].detail == "its JSON file is no object in UTF-8: a list"
    assert [row["web_text"] for row in rows_of(source(tmp_path))] == [b"hi"] * 7


def test_the_image_is_the_file_whose_ending_says_no_more(tmp_path: Path, png: Png) -> None:
    for at, order in enumerate((("depth.png", "png", "seg.png"), ("png", "depth.png"))):
        files = {f"1.{ending}": png(at if ending == "png" else 9) for ending in order}
        (tmp_path / f"{at}.tar").write_bytes(tar({**files, "1.txt": b"hi"}))
    assert [row["image"] for row in rows_of(source(tmp_path))] == [png(0), png(1)]
    one = source(tmp_path, columns={"image": "Depth.png"})
    assert [row["image"] for row in rows_of(one)] == [png(9)] * 2


@pytest.mark.parametrize("endings", [("jpg", "png"), ("left.png", "right.png")])
def test_an_image_that_may_be_another_is_told(
    endings: tuple[str, str], tmp_path: Path, png: Png
) -> None:
    files = {f"1.{ending}": png(at) for at, ending in enumerate(endings)}
    ambiguous = {**files, "1.txt": b"hi"}
    (tmp_path / "a.tar").write_bytes(tar({**samples(png, 20), **ambiguous}))
    *good, refused = rows_of(source(tmp_path))
    assert not any(isinstance(row, Rejected) for row in good)
    told = (refused.id, refused.reason, refused.detail)
    assert told == ("a/1", "ambiguous_image", f"one of {', '.join(endings)}?")
    (tmp_path / "a.tar").write_bytes(tar(ambiguous))
    with pytest.raises(SourceError, match=f"columns.image: .*the one of {', '.join(endings)} that"):
        source(tmp_path).units()
    (row,) = rows_of(source(tmp_path, columns={"image": endings[1]}))
    assert row["image"] == png(1)
    with pytest.raises(SourceError, match=r"columns.image: .*none is 'webp'"):
        source(tmp_path, columns={"image": "webp"}).units()


def test_a_storage_of_before_one_could_name_the_image_goes_on() -> None:
    for columns, told in (({}, False), ({"image": "jpg"}, True)):
        config = TypeAdapter(SourceConfig).validate_python(
            {"kind": "webdataset", "path": "x", "columns": columns}
        )
        assert ("image" in config.model_dump(mode="json")["columns"]) is told


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({"1.png": 600, "1.txt": 300}, True),
        ({"1.png": 600, "1.txt": 500}, False),
        ({"1.mask.png": 900, "1.png": 600, "1.txt": 300}, True),
        ({"1.png": 600, "1.mask.png": 900, "1.npy": 5000, "1.txt": 300}, True),
        ({"1.mask.png": 1001, "1.txt": 1}, False),
    ],
)
def test_a_sample_s_files_are_read_as_far_as_they_are_asked_for(
    files: dict[str, int], kept: bool, tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "MAX_FILE_BYTES", 1000)
    content = {name: bytes(size) for name, size in files.items()}
    (tmp_path / "a.tar").write_bytes(tar({**content, **samples(png, 1)}))
    row, good = rows_of(source(tmp_path))
    assert good["image"] == png(0)
    if kept:
        assert (row["image"], row["web_text"]) == (bytes(600), bytes(300))
    else:
        assert (row.id, row.reason) == ("a/1", "sample_too_large")


def extended(kind: bytes, size: int) -> bytes:
    """A header that is about the next member, and its content."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    return header.tobuf() + bytes(size + -size % 512)


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        (extended(tarfile.XHDTYPE, 2_000_000), "a header of over 1,000,000 bytes"),
        (extended(tarfile.GNUTYPE_LONGNAME, 2_000_000), "a header of over 1,000,000 bytes"),
        (extended(tarfile.XGLTYPE, 600_000) * 2, "a header of over 1,000,000 bytes"),
        (extended(tarfile.XHDTYPE, 0) * 1500, "RecursionError"),
        (extended(tarfile.GNUTYPE_SPARSE, 0), "a sparse file"),
    ],
)
def test_headers_are_no_longer_than_names(
    headers: bytes, told: str, tmp_path: Path, png: Png
) -> None:
    data = tar(samples(png, 2)).rstrip(b"\x00")
    (tmp_path / "a.tar").write_bytes(data + bytes(-len(data) % 512) + headers + bytes(1024))
    first, broken, second = rows_of(source(tmp_path))
    assert (first["id"], second["id"]) == ("a/00000", "a/00001")
    assert told in broken.detail


def test_a_long_name_is_read(tmp_path: Path, png: Png) -> None:
    name = "/".join(["folder"] * 100)
    (tmp_path / "a.tar").write_bytes(tar({f"{name}/1.png": png(1), f"{name}/1.txt": b"hi"}))
    (row,) = rows_of(source(tmp_path))
    assert row["id"] == f"a/{name}/1"


def test_a_shard_that_changes_after_listing_stops_the_reading(tmp_path: Path, png: Png) -> None:
    (tmp_path / "a.tar").write_bytes(tar(samples(png, 2)))
    one = source(tmp_path)
    (unit,) = one.units()
    (tmp_path / "a.tar").write_bytes(tar(samples(png, 40)))
    with pytest.raises(OSError, match=r"it had 10,240 bytes when it was listed, and has "):
        list(one.read(unit))


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_shard_gives_what_was_readable(packed: bool, tmp_path: Path, png: Png) -> None:
    data = tar(samples(png, 20))
    data = gzip.compress(data)[:-600] if packed else data[: len(data) // 2 + 100]
    (tmp_path / ("a.tar.gz" if packed else "a.tar")).write_bytes(data)
    rows = rows_of(source(tmp_path))
    good = [row for row in rows if not isinstance(row, Rejected)]
    assert [row["web_text"] for row in good] == [f"text {i}".encode() for i in range(len(good))]
    assert 5 < len(good) < 20
    (broken,) = (row for row in rows if isinstance(row, Rejected))
    assert broken.reason == "unreadable"
    assert "breaks off after" in broken.detail


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, lzma_alone])
@pytest.mark.parametrize("size", [512, 10_000])
def test_all_streams_of_a_packed_shard_are_read(
    pack: Callable[[bytes], bytes], size: int, tmp_path: Path, png: Png
) -> None:
    streams = [pack(piece) for piece in pieces(tar(samples(png, 8)), size)]
    # As bgzip ends a file, and tapes pad one; what follows is nobody's.
    data = pack(b"").join(streams) + pack(b"") + bytes(3000)
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar.gz").write_bytes(bytes(1000).join(streams) + b"left by a broken download")
    rows = rows_of(source(tmp_path))
    assert [row["web_text"] for row in rows] == [f"text {i}".encode() for i in range(8)] * 2
    assert [row["image"] for row in rows] == [png(i) for i in range(8)] * 2


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_break_in_a_later_stream_is_told(
    pack: Callable[[bytes], bytes], tmp_path: Path, png: Png
) -> None:
    data = random.Random(1).randbytes(200_000)
    files = {**samples(png, 20), "00020.png": data, **samples(png, 1, 21)}
    *whole, last = [pack(piece) for piece in pieces(tar(files), 150_000)]
    middle = bytearray(last)
    middle[len(last) // 2 : len(last) // 2 + 40] = bytes(40)
    begin = b"".join(whole)
    for name, end in (("cut", last[:200]), ("without", b""), ("changed", bytes(middle))):
        (tmp_path / f"{name}.tar.gz").write_bytes(begin + end)
    for name in ("cut", "without", "changed"):
        *good, broken = rows_of(source(tmp_path / f"{name}.tar.gz"))
        texts = [row["web_text"] for row in good]
        assert texts[:20] == [f"text {i}".encode() for i in range(20)], name
        assert broken.reason == "unreadable"
        assert broken.detail.startswith("breaks off after 2")


def test_archives_that_are_joined_are_all_read(tmp_path: Path, png: Png) -> None:
    archives = [tar(samples(png, 3, first)) for first in (0, 3, 6)]
    kept = {}
    for name, data in (
        ("streams", b"".join(map(gzip.compress, archives))),
        ("stream", bz2.compress(b"".join(archives) + b"no header" * 100)),
        ("plain", b"".join(archives) + b"no header" * 100),
        ("none", gzip.compress(bytes(1024) + archives[0])),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        kept[name] = [row["web_text"] for row in rows_of(source(tmp_path / f"{name}.tar"))]
    nine = [f"text {i}".encode() for i in range(9)]
    assert kept == {"streams": nine, "stream": nine, "plain": nine, "none": nine[:3]}


def test_a_packed_shard_is_unpacked_piece_by_piece(tmp_path: Path, png: Png) -> None:
    files = {"0.npy": bytes(16_000_000), **samples(png, 2)}
    for name, pack in (("a", gzip.compress), ("b", bz2.compress)):
        (tmp_path / f"{name}.tar").write_bytes(pack(tar(files)))
    one = source(tmp_path)
    units = one.units()
    tracemalloc.start()
    try:
        rows = [row for unit in units for row in one.read(unit)]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row["web_text"] for row in rows] == [None, b"text 0", b"text 1"] * 2
    assert most < 8_000_000  # half of what one member holds


def link_to(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, target
    return link


def test_a_sample_that_needs_a_link_is_told(tmp_path: Path, png: Png) -> None:
    files: dict[str, Any] = {
        "0.png": png(0),
        "0.txt": b"hi",
        "0.npy": link_to("0.npy", "x.npy", tarfile.SYMTYPE),
        "1.png": link_to("1.png", "0.png", tarfile.LNKTYPE),
        "1.txt": link_to("1.txt", "0.txt", tarfile.LNKTYPE),
        "2.png": png(2),
        "2.txt": link_to("2.txt", "0.txt", tarfile.SYMTYPE),
        "3.png": png(3),
        "3.depth.png": link_to("3.depth.png", "0.png", tarfile.LNKTYPE),
        "3.txt": b"hi",
    }
    (tmp_path / "a.tar").write_bytes(tar(files))
    rows = rows_of(source(tmp_path))
    told = [(row.id, row.reason, row.detail) for row in rows if isinstance(row, Rejected)]
    assert told == [
        ("a/1", "link", "png is a hard link to '0.png', and links are not followed"),
        ("a/2", "link", "txt is a symbolic link to '0.txt', and links are not followed"),
    ]
    assert [row["id"] for row in rows if not isinstance(row, Rejected)] == ["a/0", "a/3"]


def test_neighbours_of_one_key_with_the_same_files_are_not_merged(tmp_path: Path, png: Png) -> None:
    data = b"".join(
        tar({"x.png": png(at), "x.TXT" if at else "x.txt": f"text {at}".encode()})[: 4 * 512]
        for at in range(3)
    )
    (tmp_path / "a.tar").write_bytes(data + tar(samples(png, 1)))
    rows = rows_of(source(tmp_path))
    assert [row["web_text"] for row in rows] == [b"text 0", b"text 1", b"text 2", b"text 0"]
    reading = Reading(RowLimits())
    assert [pair["id"] for pair in reading.pairs(rows)] == ["a/x", "a/00000"]
    assert reading.reasons() == {"duplicate_id": 2}


def test_shards_that_differ_in_their_suffix_have_ids_of_their_own(tmp_path: Path, png: Png) -> None:
    data = tar(samples(png, 1))
    for name in ("0.tar", "1.tar", "1.tar.gz", "1.tgz", "2.tgz"):
        packed = gzip.compress(data) if name.endswith("gz") else data
        (tmp_path / name).write_bytes(packed)
    one = source(tmp_path)
    shards = ["0", "1.tar", "1.tar.gz", "1.tgz", "2"]
    assert [row["id"] for row in rows_of(one)] == [f"{shard}/00000" for shard in shards]
    # As tasks read them, which get units from their records.
    again = [row["id"] for unit in one.units() for row in one.read(Unit(**unit.as_dict()))]
    assert again == [f"{shard}/00000" for shard in shards]


def test_names_that_lead_out_are_refused(tmp_path: Path, png: Png) -> None:
    link = tarfile.TarInfo("3.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("4.png")
    device.type = tarfile.CHRTYPE
    files: dict[str, Any] = {
        **samples(png, 1),
        "../../etc/cron.d/1.png": png(1),
        "/root/.ssh/2.png": png(2),
        "3.png": link,
        "4.png": device,
    }
    (tmp_path / "a.tar").write_bytes(tar(files))
    rows = rows_of(source(tmp_path))
    refused = {row.id for row in rows if isinstance(row, Rejected) and row.reason == "unsafe_name"}
    assert refused == {"../../etc/cron.d/1.png", "/root/.ssh/2.png"}
    assert [row["id"] for row in rows if not isinstance(row, Rejected)] == ["a/00000"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar"}


def test_a_member_that_claims_gigabytes_is_not_read(tmp_path: Path, png: Png) -> None:
    huge = tarfile.TarInfo("9.png")
    huge.size = 1 << 50
    data = tar(samples(png, 2)).rstrip(b"\x00")
    data += b"\x00" * (-len(data) % 512) + huge.tobuf() + png(1)
    (tmp_path / "a.tar").write_bytes(data)
    first, broken, second = rows_of(source(tmp_path))
    assert (first["id"], second["id"]) == ("a/00000", "a/00001")
    assert broken.detail.endswith("'9.png' claims 1,125,899,906,842,624 bytes")


def test_a_broken_header_is_no_end(tmp_path: Path, png: Png) -> None:
    data = bytearray(tar(samples(png, 4)))
    data[6 * 1024 : 6 * 1024 + 512] = b"?" * 512  # of the third sample's first file
    (tmp_path / "a.tar").write_bytes(data)
    rows = rows_of(source(tmp_path))
    assert [getattr(row, "reason", None) for row in rows] == [None, "unreadable", None]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no samples"),
        ({"1.txt": b"hi"}, "begins with samples of txt; an image ends in jpg"),
        ({"1.png": b"png", "1.cls": b"3"}, "samples of cls, png, but the texts are asked of txt"),
    ],
)
def test_a_shard_without_pairs_is_found_before_work(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(tar({**files}))
    with pytest.raises(SourceError, match=message):
        source(tmp_path).units()


def test_odd_shards_at_the_front_are_no_reason_to_stop(tmp_path: Path, png: Png) -> None:
    good = tar(samples(png, 2))
    for at in range(200):
        (tmp_path / f"{at:03d}.tar").write_bytes(tar({}) if at < 60 else good)
    assert len(source(tmp_path).units()) == 200
    for at in range(40):
        (tmp_path / f"{at:03d}.tar").write_bytes(tar({f"{n}.png": png(n) for n in range(40)}))
    assert len(source(tmp_path).units()) == 200
    for path in sorted(tmp_path.iterdir())[40:]:
        path.unlink()
    with pytest.raises(
        SourceError, match=r"000\.tar and 19 others begin with samples of png, but the texts"
    ):
        source(tmp_path).units()


def test_a_shard_s_first_samples_may_lack_a_text(tmp_path: Path, png: Png) -> None:
    files = {f"x{at:02d}.png": png(at) for at in range(25)}
    (tmp_path / "a.tar").write_bytes(tar({**files, **samples(png, 5)}))
    texts = [row["web_text"] for row in rows_of(source(tmp_path))]
    assert texts == [None] * 25 + [f"text {i}".encode() for i in range(5)]


def test_images_and_texts_that_are_no_neighbours_are_found_before_work(
    tmp_path: Path, png: Png
) -> None:
    images = {f"{at}.png": png(at) for at in range(30)}
    (tmp_path / "a.tar").write_bytes(tar({**images, **{f"{at}.txt": b"hi" for at in range(30)}}))
    with pytest.raises(SourceError, match="of png, txt, but none has an image and a text; files"):
        source(tmp_path).units()


def test_what_has_no_effect_tells_no_storages_apart() -> None:
    digests = {
        IngestConfig.model_validate(
            {"source": {"kind": "webdataset", "path": "x", **options}}
        ).digest()
        for options in ({}, {"unit_rows": 4096}, {"unit_rows": 7})
    }
    # That of storages of before, which goes on being theirs.
    assert digests == {"587c844d6ba1a6637045192adcef3c233589de00388a4a8eb1d297d59ba19682"}


def test_what_is_no_tar_file_is_found_before_work(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"<html>moved</html>" * 100)
    with pytest.raises(SourceError, match="holds no samples"):
        source(tmp_path).units()


def test_a_place_that_no_sample_has_is_told() -> None:
    with pytest.raises(ValidationError, match=r"takes txt, cls, or json\.KEY"):
        source(Path("x"), columns={"web_text": "json"})


def test_a_key_that_the_first_samples_lack_is_told(
    tmp_path: Path, png: Png, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").write_bytes(tar(samples(png, 2)))
    source(tmp_path, columns={"caption": "json.blip"}).units()
    assert not caplog.messages
    source(tmp_path, columns={"caption": "json.blib"}).units()
    (told,) = caplog.messages
    assert "source.columns.caption: the first samples of" in told
    assert "have no 'blib' in their JSON (did you mean 'blip'?), which has blip; later" in told
    with pytest.raises(SourceError, match=r"columns\.web_text: .* have no 'alt' in their JSON"):
        source(tmp_path, columns={"web_text": "json.alt"}).units()


def test_of_a_list_in_the_json_file_the_first_text_is_taken(tmp_path: Path, png: Png) -> None:
    captions = json.dumps({"captions": ["a cat", "a dog"]}).encode()
    (tmp_path / "a.tar").write_bytes(tar({"1.png": png(1), "1.json": captions}))
    (row,) = rows_of(source(tmp_path, columns={"web_text": None, "caption": "json.captions"}))
    assert make_pair(row, RowLimits())["caption"] == "a cat"
