"""Folders of images with a list beside them; and lists in general, as URLs come in them too."""

import csv
import gzip
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from ray_jobs.pairs import RowLimits, make_pair
from ray_jobs.sources import (
    FolderConfig,
    Rejected,
    Source,
    SourceConfig,
    SourceError,
    Unit,
    files,
    folder,
    lists,
    open_source,
)
from ray_jobs.sources.lists import list_units, present_columns, read_list
from ray_jobs.storage import S3Config, Storage, StorageConfig
from tests.ray_jobs.s3_server import BUCKET, Server

Png = Callable[[int], bytes]


def source(path: Path, **options: Any) -> Source:
    config = {"kind": "folder", "path": str(path), **options}
    return open_source(TypeAdapter(SourceConfig).validate_python(config))


def rows_of(one: Source) -> list[Any]:
    return [row for unit in one.units() for row in one.read(unit)]


def texts_of(one: Source) -> list[str]:
    return [row.reason if isinstance(row, Rejected) else row["web_text"] for row in rows_of(one)]


@pytest.fixture
def images(tmp_path: Path, png: Png) -> Path:
    (tmp_path / "img").mkdir()
    for number in range(6):
        (tmp_path / f"img/{number}.png").write_bytes(png(number))
    return tmp_path


def entries(count: int = 6) -> list[dict[str, Any]]:
    return [{"file_name": f"img/{i}.png", "text": f"text, {i}\nline two"} for i in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), **options)


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", **options: Any) -> None:
    with path.open("w", newline="", **options) as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "jsonl.gz", "CSV.GZ", "parquet"])
@pytest.mark.parametrize("unit_rows", [2, 100])
def test_lists_of_every_kind_are_read_alike(kind: str, unit_rows: int, images: Path) -> None:
    path = images / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(entries()), path, row_group_size=2)
    elif "jsonl" in kind:
        write_jsonl(path, entries())
    else:
        write_csv(path, entries(), "\t" if kind == "tsv" else ",")
    if kind.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    one = source(path, unit_rows=unit_rows)
    assert [unit.rows for unit in one.units()] == ([2] * 3 if unit_rows == 2 else [6])
    rows = rows_of(one)
    assert [row["web_text"] for row in rows] == [f"text, {i}\nline two" for i in range(6)]
    assert rows[0]["id"] == "img/0.png:4fdc6f16fb57"
    assert [row["id"].partition(":")[0] for row in rows] == [f"img/{i}.png" for i in range(6)]
    assert [row["image"] for row in rows] == [
        (images / f"img/{i}.png").read_bytes() for i in range(6)
    ]


def test_a_folder_is_searched_for_its_lists(images: Path) -> None:
    write_jsonl(images / "metadata.jsonl", entries(2))
    assert len(rows_of(source(images))) == 2


def test_a_folder_with_a_list_of_the_usual_name_is_not_searched(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []
    real = os.scandir

    def scandir(path: str) -> Any:
        listed.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    write_jsonl(images / "img/other.jsonl", [{"file_name": "0.png", "text": "hi"}])
    assert len(rows_of(source(images))) == 1
    assert listed.count(str(images)) == 1
    write_jsonl(images / "metadata.jsonl", entries(2))
    write_csv(images / "metadata.csv", entries(3))
    assert [unit.label for unit in source(images).units()] == ["metadata.csv", "metadata.jsonl"]
    assert listed.count(str(images)) == 1
    labels = [unit.label for unit in source(images / "**/*.jsonl").units()]
    assert labels == ["img/other.jsonl", "metadata.jsonl"]


def test_lists_are_looked_at_several_at_a_time(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_jsonl(images / f"{name}.jsonl", entries(2))
    # Each waits for the other.
    both = threading.Barrier(2, timeout=20)
    looked_at: set[str] = set()

    def present(unit: Unit, *arguments: Any, **options: Any) -> Any:
        if unit.label not in looked_at:
            looked_at.add(unit.label)
            both.wait()
        return present_columns(unit, *arguments, **options)

    monkeypatch.setattr(folder, "present_columns", present)
    assert len(source(images).units()) == 2


def test_broken_lines_are_rejected_and_the_rest_is_read(images: Path) -> None:
    lines = [
        json.dumps(entries()[0]).encode(),
        b'{"file_name": "img/1.png", "text": "caf\xe9"}',
        b'{"file_name": "img/2.png", "te',
        b"",
        b"[1, 2]",
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b'\xef\xbb\xbf{"file_name": "img/3.png", "text": "with a mark"}',
        b'{"file_name": "img/4.png", "text": "no line end"}',
    ]
    (images / "metadata.jsonl").write_bytes(b"\n".join(lines))
    assert texts_of(source(images, unit_rows=3)) == [
        "text, 0\nline two", "caf\ufffd", "bad_row", "bad_row", "bad_row", "bad_row",
        "with a mark", "no line end",
    ]  # fmt: skip


def test_broken_csv_rows_are_rejected_and_the_rest_is_read(images: Path) -> None:
    text = "file_name,text\nimg/0.png,zero\n\nimg/1.png\nimg/2.png,two,three\nimg/3.png,three\n"
    (images / "metadata.csv").write_text(text)
    assert texts_of(source(images)) == ["zero", "bad_row", "bad_row", "three"]


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        # The quotes that open or end other fields are not this one's; some look as if they were.
        (['0\t"never closed', "1\tone", "2\ttwo"], ["bad_row", "one", "two"]),
        (['0\t"a', "1\tone", '2\tis "b"', "3\tthree"], ["bad_row", "one", 'is "b"', "three"]),
        (['0\t"a', "1\tone", '2\t"b', "3\tthree"], ["bad_row", "one", "bad_row", "three"]),
        (['0\t"a', "1\tone", '2\tsize 5"', "3\tthree"], ["bad_row", "one", 'size 5"', "three"]),
        (['"0\ta', '1\t"one"', "2\ttwo"], ["bad_row", "one", "two"]),
        (['0\t"one', '', '\t\tline"', "1\tone"], ["one\n\n\t\tline", "one"]),
        (['0\t"a ""b"" and', 'c"', '1\t"one"'], ['a "b" and\nc', "one"]),
        (['0\t"5" screen', "1\tone"], ["5 screen", "one"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("unit_rows", [1, 100])
def test_a_quote_that_nothing_closes_costs_its_line(
    unit_rows: int, lines: list[str], kept: list[str], images: Path
) -> None:
    for number in range(4):
        (images / str(number)).write_bytes(b"an image")
    (images / "list.tsv").write_text("\n".join(["file_name\ttext", *lines]) + "\n")
    assert texts_of(source(images, unit_rows=unit_rows)) == kept


CR_ROWS = ["zero", "one\r\rof two\nlines", '"two"', "three, the last"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("last_end", ["\r", ""])
def test_lines_may_end_with_cr_alone_wherever_a_list_is_cut(
    kind: str, block: int, last_end: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "_BLOCK_BYTES", block)
    path = images / f"list.{kind}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if "csv" in kind else "\t", lineterminator="\r")
        writer.writerow(["file_name", "text"])
        writer.writerows([f"img/{at}.png", text] for at, text in enumerate(CR_ROWS))
    content = path.read_bytes().removesuffix(b"\r") + last_end.encode()
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    for unit_rows in (1, 3, 100):
        one = source(images, unit_rows=unit_rows)
        assert len(one.units()) == -(-4 // unit_rows)
        assert texts_of(one) == CR_ROWS


def test_a_quote_that_nothing_closes_costs_its_line_where_lines_end_with_cr(images: Path) -> None:
    lines = ["file_name\ttext", 'img/0.png\t"a', "img/1.png\tone", 'img/2.png\tis "b"', ""]
    (images / "list.tsv").write_bytes("\r".join(lines).encode())
    assert texts_of(source(images)) == ["bad_row", "one", 'is "b"']


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_a_cr_in_a_list_of_other_line_ends_is_no_end(end: str, images: Path) -> None:
    rows = ['"file\rname",text', 'img/0.png,"a\rb"', "img/1.png,a\rb", "img/2.png,two"]
    content = "".join(row + end for row in rows).encode()
    (images / "list.csv").write_bytes(content)
    one = source(images, unit_rows=1, columns={"image": "file\rname"})
    assert texts_of(one) == ["a\rb", "bad_row", "two"]
    starts = [content.index(f"img/{at}".encode()) for at in range(3)]
    assert [unit.offset for unit in one.units()] == starts


def test_a_name_that_two_columns_of_a_list_have_is_told(images: Path) -> None:
    text = "file_name,text,text,other,other,,\nimg/0.png,good,,,,,\n"
    for name, delimiter in (("list.csv", ","), ("list.tsv", "\t")):
        (images / name).write_text(text.replace(",", delimiter))
        told = rf"columns.web_text: .*{name} has several columns 'text'; rename all but one"
        with pytest.raises(SourceError, match=told):
            source(images / name).units()
        (images / name).write_text(text.replace("text,text", "text,note").replace(",", delimiter))
        assert texts_of(source(images / name)) == ["good"]


def test_no_quoted_field_has_more_lines_than_a_text(images: Path) -> None:
    def texts(lines: int) -> list[str]:
        quoted = "\n".join(str(line) for line in range(lines))
        (images / "list.csv").write_text(
            f'file_name,text\nimg/0.png,"{quoted}"\nimg/1.png,"one"\n', newline=""
        )
        return texts_of(source(images))

    assert texts(1000) == ["\n".join(map(str, range(1000))), "one"]
    assert texts(1001) == ["bad_row"] * 1001 + ["one"]


def test_a_compressed_list_that_breaks_off_gives_the_rows_before(images: Path) -> None:
    write_jsonl(images / "list.jsonl", entries(1) * 100_000)
    packed = gzip.compress((images / "list.jsonl").read_bytes(), 1)
    (images / "list.jsonl").unlink()
    (images / "list.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    units = list_units(FolderConfig(kind="folder", path=str(images)), print)
    assert len(units) > 3
    rows = [row for unit in units for row in read_list(unit, None, S3Config())]
    assert len(rows) > 10_000
    assert [origin for origin, _ in rows[:-1]] == [
        f"list.jsonl.gz row {number}" for number in range(len(rows) - 1)
    ]
    assert [row for _, row in rows[:-1] if isinstance(row, Rejected)] == []
    assert isinstance(rows[-1][1], Rejected)
    assert (rows[-1][1].reason, rows[-1][1].origin) == ("unreadable", "list.jsonl.gz")
    assert rows[-2][1] == entries(1)[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_compressed_list_that_is_none_is_found_before_work(kind: str, images: Path) -> None:
    (images / f"list.{kind}.gz").write_bytes(b"no archive")
    with pytest.raises(SourceError, match=rf"source.path: .*list\.{kind}\.gz .*incorrect header"):
        source(images).units()


def test_lines_that_are_no_json_at_all_are_found_before_work(images: Path) -> None:
    (images / "list.jsonl").write_text(json.dumps(entries(3), indent=1))
    with pytest.raises(SourceError, match=r"no row of .*list.jsonl can be read, the first.*JSON"):
        source(images).units()


def test_a_tilde_is_the_home_folder(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(images / "metadata.jsonl", entries(1))
    monkeypatch.setenv("HOME", str(images.parent))
    assert len(rows_of(source(Path("~", images.name)))) == 1
    assert Storage.at("~/runs").uri == str(images.parent / "runs")


def on_s3(server: Server, png: Png, count: int = 6) -> Source:
    s3 = S3Config(endpoint=server.endpoint)
    storage = Storage(StorageConfig(uri=f"s3://{BUCKET}/data", s3=s3))
    listed = "".join(json.dumps(row) + "\n" for row in entries(count))
    storage.write_bytes("metadata.jsonl", listed.encode())
    for number in range(count):
        storage.write_bytes(f"img/{number}.png", png(number))
    config = {"kind": "folder", "path": storage.uri, "s3": {"endpoint": server.endpoint}}
    return open_source(TypeAdapter(SourceConfig).validate_python(config))


ODD_NAMES = ("a b", "100%", "%41", "A", "a#b", "a", "what?", "[1]", "{2}", "été 日本", "+&=;,", "'")


@pytest.mark.parametrize("place", ["", "file://", "s3://"])
def test_files_may_be_called_as_they_like(place: str, tmp_path: Path, png: Png, s3: Server) -> None:
    root = f"s3://{BUCKET}" if place == "s3://" else str(tmp_path)
    server = S3Config(endpoint=s3.endpoint)
    storage = Storage(StorageConfig(uri=root, s3=server))
    for at, name in enumerate(ODD_NAMES):
        storage.write_bytes(f"all/{name}/{name}.png", png(at))
        row = {"file_name": f"{name}.png", "text": name}
        storage.write_bytes(f"all/{name}/list {name}.jsonl", json.dumps(row).encode())

    def texts(path: str, names: Sequence[str]) -> None:
        options = {"kind": "folder", "path": path, "s3": {"endpoint": s3.endpoint}}
        rows = rows_of(open_source(TypeAdapter(SourceConfig).validate_python(options)))
        assert {row["web_text"]: row["image"] for row in rows} == {
            name: png(ODD_NAMES.index(name)) for name in names
        }
        assert {row["id"].rpartition("/")[2].partition(":")[0] for row in rows} == {
            f"{name}.png" for name in names
        }

    where = root if place == "s3://" else place + root
    texts(f"{where}/all", ODD_NAMES)
    texts(f"{where}/all/a b", ["a b"])
    texts(f"{where}/all/a#b/list a#b.jsonl", ["a#b"])
    texts(f"{where}/all/été 日本/*.jsonl", ["été 日本"])
    if place == "file://":
        texts(f"{where}/all/100%25/list%20100%25.jsonl", ["100%"])


def test_names_in_other_stores_are_read_as_in_ours() -> None:
    for name, uri in (("a b", "a b"), ("a b", "a%20b"), ("é#?", "é#?"), ("%41", "%2541")):
        filesystem, path = files.locate(f"gs://anonymous@bucket/{uri}/", S3Config())
        assert (filesystem.type_name, path) == ("gcs", f"bucket/{name}")
    assert files.name_below("gs://bucket/data", "%41") == "gs://bucket/data/%2541"
    assert files.locate("file:///", S3Config())[1] == "/"


def test_an_object_that_is_forbidden_costs_its_pair(s3: Server, png: Png) -> None:
    one = on_s3(s3, png)
    s3.forbid("data/img/3.png")
    rows = rows_of(one)
    assert [isinstance(row, Rejected) for row in rows] == [False] * 3 + [True] + [False] * 2
    assert (rows[3].reason, rows[3].detail) == ("image_forbidden", "'img/3.png': may not be read")


def test_an_object_in_an_archive_costs_its_pair(s3: Server, png: Png) -> None:
    one = on_s3(s3, png)
    archived = {"Bucket": BUCKET, "Key": "data/img/3.png", "StorageClass": "GLACIER"}
    # Arrow reads the server's words only where as many bytes were asked for.
    s3.client().put_object(Body=png(3) + bytes(10_000), **archived)
    rows = rows_of(one)
    assert [isinstance(row, Rejected) for row in rows] == [False] * 3 + [True] + [False] * 2
    assert rows[3].reason == "image_forbidden"


def test_credentials_that_run_out_cost_no_pair(s3: Server, png: Png) -> None:
    one = on_s3(s3, png, 40)
    (unit,) = one.units()
    rows = one.read(unit)
    next(rows)
    s3.forbid("data/*")
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        list(rows)


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("img/*", SourceError, r"none of .* may be read; .*s3:GetObject"),
        ("*", OSError, r"metadata\.jsonl.*ACCESS_DENIED"),
    ],
)
def test_files_that_are_all_forbidden_are_found_before_work(
    key: str, kind: type[Exception], message: str, s3: Server, png: Png
) -> None:
    one = on_s3(s3, png)
    s3.forbid(f"data/{key}")
    with pytest.raises(kind, match=message):
        one.units()


def test_images_come_by_two_requests_each_and_several_at_a_time(s3: Server, png: Png) -> None:
    one = on_s3(s3, png)
    (unit,) = one.units()
    asked: Counter[str] = Counter()
    all_asked = threading.Barrier(6, timeout=20)

    def refuses(method: str, path: str) -> bool:
        if path.endswith(".png"):
            asked[method] += 1
            all_asked.wait()
        return False

    s3.refuses = refuses
    rows = list(one.read(unit))
    assert [row["image"] for row in rows] == [png(number) for number in range(6)]
    assert asked == {"HEAD": 6, "GET": 6}


def test_large_images_are_read_when_their_turn_has_come(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(images / "metadata.jsonl", entries() * 10)
    (images / "img/3.png").write_bytes(b"large" * 1000)
    monkeypatch.setattr(folder, "_AHEAD_BYTES", 1000)
    one = source(images)
    (unit,) = one.units()
    read: list[tuple[int, threading.Thread]] = []

    def image(self: Any, *arguments: Any) -> tuple[str, bytes]:
        found = unwatched(self, *arguments)
        read.append((len(found[1]), threading.current_thread()))
        return found

    unwatched = folder.FolderSource._image
    monkeypatch.setattr(folder.FolderSource, "_image", image)
    rows = list(one.read(unit))
    assert [row["image"] for row in rows] == [
        (images / f"img/{number}.png").read_bytes() for number in range(6)
    ] * 10
    assert {thread for size, thread in read if size > 1000} == {threading.main_thread()}
    assert threading.main_thread() not in {thread for size, thread in read if 0 < size < 1000}


def test_ten_megabytes_in_a_line_are_read(images: Path) -> None:
    write_jsonl(images / "metadata.jsonl", [{**entries()[0], "text": "x" * 10_000_000}])
    assert len(texts_of(source(images))[0]) == 10_000_000


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        "img/../../secret.png",
        "img/link.png",
        "..\\secret.png",
        "..",
    ],
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, images: Path) -> None:
    inner = images / "inner"
    (images / "img").rename(images / "moved")
    inner.mkdir()
    (images / "moved").rename(inner / "img")
    (images / "secret.png").write_bytes((inner / "img/0.png").read_bytes())
    (inner / "img/link.png").symlink_to(images / "secret.png")
    write_jsonl(inner / "metadata.jsonl", [{"file_name": name, "text": "hi"}, *entries(1)])
    refused, good = rows_of(source(inner))
    assert refused.reason == "outside_folder"
    assert good["id"].startswith("img/0.png:")


def test_files_that_are_not_there_are_rejected(images: Path) -> None:
    names = ["img/77.png", "img", "", None, "img/\x00.png", "x" * 300, "img/\ud83d.png"]
    (images / "img/round.png").symlink_to(images / "img/round.png")
    os.mkfifo(images / "img/pipe.png")
    names += ["img/round.png", "img/pipe.png", "img/0.png"]
    write_jsonl(images / "metadata.jsonl", [{"file_name": name, "text": "hi"} for name in names])
    assert texts_of(source(images)) == ["no_image"] * (len(names) - 1) + ["hi"]


def test_a_missing_column_is_found_before_work(images: Path) -> None:
    write_jsonl(images / "metadata.jsonl", [{"path": "img/0.png", "text": "hi"}])
    with pytest.raises(
        SourceError, match=r"columns.image: .*no column 'file_name'.*it has path, text"
    ):
        source(images).units()
    assert len(rows_of(source(images, columns={"image": "path"}))) == 1
    with pytest.raises(SourceError, match=r"columns.caption: .*no column 'blip'"):
        source(images, columns={"image": "path", "caption": "blip"}).units()


def test_made_up_ids_tell_an_image_s_texts_apart(images: Path) -> None:
    name = "/".join(["img/.."] * 100) + "/img/0.png"  # longer than an id may be
    listed = [{"file_name": name, "text": text} for text in ("a dog", "a cat", "a dog")]
    write_jsonl(images / "metadata.jsonl", [*listed, {**listed[0], "tags": ["dog"]}])
    ids = [make_pair(row, RowLimits())["id"] for row in rows_of(source(images))]
    assert ids[0] == ids[2]
    assert len(set(ids)) == 3
    assert all("/img/0.png:" in identity for identity in ids)


def test_a_key_is_used_wherever_a_row_of_json_lines_has_it(
    images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lists, "_SAMPLE_ROWS", 2)
    late = {"caption": "a caption", "tags": "dog", "blip": "another", "id": "no id for some"}
    write_jsonl(images / "metadata.jsonl", [*entries(3), {**entries(4)[3], **late}])
    *_, row = rows_of(source(images, unit_rows=3))
    assert (row["caption"], row["tags"]) == ("a caption", "dog")
    assert row["id"].startswith("img/3.png:")
    assert not caplog.messages
    *_, row = rows_of(source(images, columns={"caption": "blip"}))
    assert row["caption"] == "another"
    (told,) = caplog.messages
    assert "columns.caption: the beginning of" in told
    assert "has no 'blip'; its later rows may" in told
    for columns in ({"id": "id"}, {"image": "blip"}):
        with pytest.raises(SourceError, match=r"the beginning of .* has no column"):
            source(images, columns=columns).units()


def test_lists_of_texts_and_what_is_no_text_are_told(
    images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    several = [{**row, "caption": {"en": "a cat"}} for row in entries(2)]
    several[0]["text"] = ["", "a cat", "a dog"]
    write_jsonl(images / "metadata.jsonl", several)
    rows = [make_pair(row, RowLimits()) for row in rows_of(source(images))]
    assert [row["web_text"] for row in rows] == ["a cat", "text, 1\nline two"]
    assert [row["caption"] for row in rows] == [None, None]
    (told,) = caplog.messages
    assert "columns.web_text: 'text' of" in told
    assert "has lists, of which the first text is taken" in told
    assert "metadata.jsonl is no text, and left out" in told
    with pytest.raises(SourceError, match=r"columns.caption: 'caption' of .* is no text"):
        source(images, columns={"caption": "caption"}).units()


def test_names_ids_and_texts_may_be_plain_bytes(images: Path) -> None:
    row = {"id": b"12", "file_name": b"img/1.png", "text": b"a cat"}
    pq.write_table(pa.Table.from_pylist([row]), images / "metadata.parquet")
    (row,) = rows_of(source(images))
    pair = make_pair(row, RowLimits())
    assert (pair["id"], pair["web_text"]) == ("12", "a cat")
    assert pair["image"] == (images / "img/1.png").read_bytes()


def test_a_column_of_another_type_is_found_before_work(images: Path) -> None:
    rows = [{**row, "caption": ["one", "two"]} for row in entries()]
    pq.write_table(pa.Table.from_pylist(rows), images / "metadata.parquet")
    with pytest.raises(SourceError, match=r"columns.caption: 'caption' of .* is list<.*takes text"):
        source(images).units()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz"])
def test_a_list_that_changes_after_listing_stops_the_reading(kind: str, images: Path) -> None:
    path = images / f"metadata.{kind}"

    def write(count: int) -> None:
        (write_jsonl if "jsonl" in kind else write_csv)(path, entries(count))
        if kind.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))

    write(4)
    one = source(images, unit_rows=2)
    units = one.units()
    write(6)
    for unit in units:
        with pytest.raises(OSError, match=r"bytes when it was listed, and has"):
            list(read_list(unit, None, S3Config()))


def test_a_list_of_another_kind_is_refused(images: Path) -> None:
    (images / "list.xlsx").write_bytes(b"PK")
    with pytest.raises(
        SourceError, match=r"no list that can be read; takes files ending in .jsonl"
    ):
        source(images / "list.xlsx").units()


def test_an_empty_list_has_no_units(images: Path) -> None:
    for content in (b"", b"\n", b"\xef\xbb\xbf\r\n \r\n"):
        (images / "metadata.jsonl").write_bytes(content)
        assert source(images).units() == []
    (images / "metadata.jsonl").unlink()
    (images / "metadata.csv").write_text("file_name,text\n")
    assert source(images).units() == []
