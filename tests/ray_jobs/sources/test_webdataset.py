"""Tar shards: samples of several files, names that are not to be trusted, and broken ends."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ray_jobs.pairs import RowLimits, make_pair
from ray_jobs.sources import (
    Rejected,
    Source,
    SourceConfig,
    SourceError,
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
    assert [(row["id"], row["web_text"]) for row in rows_of(one)] == [("77", "hi"), (None, None)]


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
