"""Parquet files: other people's columns, row groups, and pages that are broken."""

import os
import uuid
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import FileSystem, LocalFileSystem
from pydantic import TypeAdapter

from ray_jobs.pairs import RejectedRowError, RowLimits, make_pair
from ray_jobs.sources import (
    Rejected,
    Source,
    SourceConfig,
    SourceError,
    files,
    open_source,
    parquet,
)
from ray_jobs.sources.files import WatchedFile
from ray_jobs.storage import S3Config, Storage, StorageConfig
from rwkv_clip.tokenizer import tokenize
from tests.ray_jobs.s3_server import BUCKET, Server

Png = Callable[[int], bytes]


def source(path: Path | str | list[str], kind: str = "parquet", **options: Any) -> Source:
    config = {"kind": kind, "path": path if isinstance(path, list) else str(path), **options}
    return open_source(TypeAdapter(SourceConfig).validate_python(config))


def rows_of(one: Source) -> list[Any]:
    return [row for unit in one.units() for row in one.read(unit)]


def write(path: Path, table: dict[str, Any], group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, row_group_size=group)


def pairs(png: Png, count: int) -> dict[str, Any]:
    return {
        "id": [f"p{i}" for i in range(count)],
        "image": [png(i) for i in range(count)],
        "web_text": [f"text {i}" for i in range(count)],
    }


def test_our_own_columns_need_no_mapping(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", pairs(png, 10))
    one = source(tmp_path, unit_rows=8)
    assert [(unit.first, unit.rows) for unit in one.units()] == [(0, 8), (8, 2)]
    rows = rows_of(one)
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(10)]
    assert rows[9]["image"] == png(9)
    assert rows[9]["origin"] == "a.parquet row 9"


def test_other_names_are_mapped(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", {"key": [1, 2], "jpg": [png(1), png(2)], "alt": ["one", "two"]})
    one = source(tmp_path, columns={"id": "key", "image": "jpg", "web_text": "alt"})
    assert [(row["id"], row["web_text"]) for row in rows_of(one)] == [("1", "one"), ("2", "two")]


def test_folders_patterns_and_lists_find_files_once_and_in_order(tmp_path: Path, png: Png) -> None:
    for name in ("x/b.parquet", "x/a.parquet", "y/deep/c.parquet", "x/.hidden.parquet"):
        write(tmp_path / name, pairs(png, 1))
    (tmp_path / "x/readme.txt").write_text("no data")

    def found(path: Any) -> list[str]:
        return [Path(unit.path).name for unit in source(path).units()]

    assert found(tmp_path) == ["a.parquet", "b.parquet", "c.parquet"]
    assert found(f"{tmp_path}/x/*.parquet") == ["a.parquet", "b.parquet"]
    assert found(f"{tmp_path}/**/c.parquet") == ["c.parquet"]
    assert found(f"{tmp_path}/?/[ac]*") == ["a.parquet"]
    assert found([f"{tmp_path}/x/b.parquet", f"{tmp_path}/x"]) == ["b.parquet", "a.parquet"]
    assert found(f"file://{tmp_path}/y") == ["c.parquet"]
    assert found(f"{tmp_path}/x/[!a].parquet") == ["b.parquet"]


def test_what_others_left_behind_is_not_read(tmp_path: Path, png: Png) -> None:
    for name in ("a", "_temporary/0/b", ".cache/c", "x/_old/d", "x/e"):
        write(tmp_path / f"{name}.parquet", pairs(png, 1))

    def found(path: str) -> list[str]:
        return [Path(unit.path).name[0] for unit in source(f"{tmp_path}{path}").units()]

    assert found("") == found("/**/*.parquet") == ["a", "e"]
    assert found("/_temporary") == found("/_temporary/**") == ["b"]
    assert found("/*/_old/*.parquet") == ["d"]


def test_of_files_only_those_that_writers_leave_are_not_read(tmp_path: Path, png: Png) -> None:
    left = ("_SUCCESS", "_metadata", "_common_metadata", "_committed_1", "_started_1", ".a")
    for name in (*left, "_committed_2.parquet", "_started_2.parquet", ".x.parquet"):
        (tmp_path / name).write_bytes(b"no data")
    for name in ("_a", "_metadata", "b", "_temporary/_c"):
        write(tmp_path / f"{name}.parquet", pairs(png, 1))

    def found(path: str) -> list[str]:
        one = files.find_files(source(f"{tmp_path}{path}").config, (".parquet",), hidden=("_",))
        return [file.label for file in one]

    assert found("") == found("/*.parquet") == ["_a.parquet", "_metadata.parquet", "b.parquet"]
    assert len(rows_of(source(tmp_path))) == 3
    assert found("/**/_a*") == found("/_a.parquet") == ["_a.parquet"]
    assert found("/**/_[ac]*") == ["_a.parquet", "_committed_2.parquet"]
    assert found("/_temp**") == ["_temporary/_c.parquet"]
    for name in (".x.parquet", "_committed_2.parquet"):
        assert found(f"/{name}") == found(f"/{name[:-3]}*") == [name]


def test_a_file_is_found_once_and_in_either_case(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "v1/a.PARQUET", pairs(png, 1))
    (tmp_path / "latest").symlink_to(tmp_path / "v1")
    (unit,) = source(tmp_path).units()
    assert unit.label == "latest/a.PARQUET"
    assert len(rows_of(source(tmp_path / "v1/a.PARQUET"))) == 1


def test_links_that_lead_in_a_circle_are_not_followed(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a/z.parquet", pairs(png, 1))
    (tmp_path / "b").mkdir()
    (tmp_path / "a/b").symlink_to(tmp_path / "b")
    (tmp_path / "b/a").symlink_to(tmp_path / "a")
    assert [unit.label for unit in source(tmp_path).units()] == ["a/z.parquet"]


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("part-[!0]", "part-1", True), ("part-[!0]", "part-0", False), ("a[!b]c", "a/c", False),
        ("[^0]", "1", True), ("[]a]", "]", True), ("[!]a]", "]", False), (r"[\d]", "5", False),
        ("[a-c]", "b", True), ("[a^]", "^", True), ("[[]", "[", True), ("a[b", "a[b", True),
    ],
)  # fmt: skip
def test_brackets_in_patterns_are_those_of_a_shell(pattern: str, name: str, fits: bool) -> None:
    assert bool(files._pattern(pattern).fullmatch(name)) is fits


def test_a_pattern_that_is_none_is_told(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", pairs(png, 1))
    with pytest.raises(SourceError, match=r"\[z-a\]\* is no pattern: bad character range"):
        source(f"{tmp_path}/[z-a]*").units()


def test_made_up_ids_do_not_depend_on_where_the_files_lie(tmp_path: Path, png: Png) -> None:
    table = pairs(png, 2)
    del table["id"]
    write(tmp_path / "one/data/a.parquet", table)
    write(tmp_path / "two/data/a.parquet", table)
    ids = [[row["id"] for row in rows_of(source(tmp_path / name))] for name in ("one", "two")]
    assert ids == [["data/a.parquet:0", "data/a.parquet:1"]] * 2


def test_files_of_one_name_in_several_places_give_different_ids(tmp_path: Path, png: Png) -> None:
    table = pairs(png, 1)
    del table["id"]
    for name in ("cc3m/a.parquet", "cc12m/a.parquet", "cc12m/b.parquet"):
        write(tmp_path / name, table)
    rows = rows_of(source([f"{tmp_path}/cc3m", f"{tmp_path}/cc12m"]))
    wanted = ["cc3m/a.parquet:0", "cc12m/a.parquet:0", "cc12m/b.parquet:0"]
    assert [row["id"] for row in rows] == wanted
    rows = rows_of(source([f"{tmp_path}/cc3m/a.parquet", f"{tmp_path}/cc12m/b.parquet"]))
    assert [row["id"] for row in rows] == ["cc3m/a.parquet:0", "cc12m/b.parquet:0"]


def test_a_relative_path_is_that_of_the_driver(
    tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data/a.parquet", pairs(png, 1))
    monkeypatch.chdir(tmp_path)
    one = source("data")
    units = one.units()
    monkeypatch.chdir("/")
    assert len(list(one.read(units[0]))) == 1


def test_hugging_face_images_are_structs(tmp_path: Path, png: Png) -> None:
    images = [{"bytes": png(1), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    write(tmp_path / "a.parquet", {"image": images, "text": ["one", "two"]})
    rows = rows_of(source(tmp_path, "hf_parquet"))
    assert rows[0]["image"] == png(1)
    assert rows[0]["web_text"] == "one"
    with pytest.raises(RejectedRowError, match=r"no_image: .*'path': 'b.png'"):
        make_pair(rows[1], RowLimits())


def test_the_published_yfcc15m_is_read(tmp_path: Path, png: Png) -> None:
    tokens = tokenize(["A red bicycle leans on a wall.", ""]).float().tolist()
    table = {
        "images": [{"bytes": png(1)}, {"bytes": png(2)}],
        "texts": pa.array(tokens, pa.list_(pa.float32())),
    }
    write(tmp_path / "train-00000-of-01507.parquet", table)
    texts = {"column": "texts", "are": ["description"]}
    rows = rows_of(source(tmp_path, "hf_parquet", columns={"image": "images"}, texts=texts))
    assert [row.get("description") for row in rows] == ["a red bicycle leans on a wall .", ""]


def test_a_column_may_hold_several_texts(tmp_path: Path, png: Png) -> None:
    tokens = tokenize(["raw words", "a nice caption"]).flatten().tolist()
    write(tmp_path / "tokens.parquet", {"image": [png(1)], "texts": [tokens]})
    write(tmp_path / "strings.parquet", {"image": [png(2)], "texts": [["raw words", None]]})
    write(tmp_path / "a-none.parquet", {"image": [png(3)], "texts": [None]})
    write(tmp_path / "b-empty.parquet", {"image": [png(4)], "texts": [[]]})
    texts = {"column": "texts", "are": ["web_text", "caption"]}
    none, empty, strings, numbers = rows_of(source(tmp_path, texts=texts))
    assert not any(row.get(name) for row in (none, empty) for name in texts["are"])
    assert (numbers["web_text"], numbers["caption"]) == ("raw words", "a nice caption")
    assert (strings["web_text"], strings.get("caption")) == ("raw words", None)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(60_000, pa.int64()), (-1, pa.int64()), (None, pa.int64()), (float("nan"), pa.float32())],
)
def test_token_ids_that_are_none_cost_their_row(
    bad: object, kind: pa.DataType, tmp_path: Path, png: Png
) -> None:
    good = tokenize(["a nice caption"])[0].tolist()
    broken = ([bad, *good[1:]], [*good[:2], bad, *good[3:]], good)
    images = [png(seed) for seed in range(3)]
    write(tmp_path / "a.parquet", {"image": images, "texts": pa.array(broken, pa.list_(kind))})
    *rejected, row = rows_of(source(tmp_path, texts={"column": "texts", "are": ["caption"]}))
    for number, one in enumerate(rejected):
        assert (one.id, one.origin) == (f"a.parquet:{number}", f"a.parquet row {number}")
        assert one.reason == "bad_row"
        assert "source.texts.column 'texts': no token ids: " in one.detail
    assert row["caption"] == "a nice caption"


WORDS = "ant bee cat dog elk fox gnu hen ibis jay koala lion mole newt".split()


@pytest.fixture
def published(tmp_path: Path, png: Png) -> dict[str, Any]:
    """Two files of seven rows in row groups of four, and an array of their texts beside them."""
    for name, seeds in (("a", range(7)), ("b", range(7, 14))):
        tokens = tokenize([f"description {WORDS[seed]}" for seed in seeds]).tolist()
        table = {"images": [{"bytes": png(seed)} for seed in seeds], "texts": tokens}
        write(tmp_path / "data" / f"{name}.parquet", table)
    texts = [tokenize([f"raw {word}", f"caption {word}"]).flatten() for word in WORDS]
    np.save(tmp_path / "texts.npy", np.stack(texts))
    return {
        "columns": {"image": "images"},
        "texts": {"column": "texts", "are": ["description"]},
        "beside": {"path": str(tmp_path / "texts.npy"), "are": ["web_text", "caption"]},
        "unit_rows": 4,
    }


def test_texts_may_lie_in_an_array_beside_the_files(
    tmp_path: Path, png: Png, published: dict[str, Any]
) -> None:
    one = source(tmp_path / "data", "hf_parquet", **published)
    assert [unit.before for unit in one.units()] == [0, 0, 7, 7]
    rows = rows_of(one)
    assert len(rows) == 14
    for seed, row in enumerate(rows):
        assert row["image"] == png(seed)
        texts = [row[name] for name in ("web_text", "caption", "description")]
        assert texts == [f"{kind} {WORDS[seed]}" for kind in ("raw", "caption", "description")]


def test_a_row_beside_that_holds_no_token_ids_costs_its_pair(
    tmp_path: Path, png: Png, published: dict[str, Any]
) -> None:
    texts = np.load(tmp_path / "texts.npy").astype(np.float32)
    texts[5, 3] = np.nan
    np.save(tmp_path / "texts.npy", texts)
    rows = rows_of(source(tmp_path / "data", "hf_parquet", **published))
    assert [at for at, row in enumerate(rows) if isinstance(row, Rejected)] == [5]
    assert (rows[5].reason, rows[5].origin) == ("bad_row", "a.parquet row 5")
    assert "source.beside: no token ids" in rows[5].detail
    assert rows[6]["web_text"] == f"raw {WORDS[6]}"


def test_an_array_that_is_replaced_by_another_is_noticed(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    one = source(tmp_path / "data", "hf_parquet", **published)
    units = one.units()
    path = tmp_path / "texts.npy"
    texts = np.load(path)
    np.save(path, texts)
    assert one.units() == units
    np.save(path, texts[::-1])
    assert not {unit.beside for unit in one.units()} & {unit.beside for unit in units}
    with pytest.raises(OSError, match=r"texts\.npy was changed since it was listed"):
        list(one.read(units[0]))


def test_an_array_that_is_not_the_files_is_found_before_work(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    path = tmp_path / "texts.npy"

    def units(**options: Any) -> None:
        source(tmp_path / "data", "hf_parquet", **{**published, **options}).units()

    with pytest.raises(SourceError, match=r"names 1 texts of 77 numbers, and .* has 154"):
        units(beside={"path": str(path), "are": ["web_text"]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(SourceError, match="ends before its 14 rows do"):
        units()
    np.save(path, np.zeros((13, 154), np.int64))
    with pytest.raises(SourceError, match=r"has 13 rows and the files of .* have 14"):
        units()
    np.save(path, np.array([["words"]], object), allow_pickle=True)
    with pytest.raises(SourceError, match="holds object"):
        units()
    path.write_bytes(b"no array")
    with pytest.raises(SourceError, match=r"cannot be read as a .npy file"):
        units()


def test_a_broken_page_loses_its_row_group_and_no_more(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "a.parquet"
    write(path, pairs(png, 12))
    group = pq.ParquetFile(path).metadata.row_group(1)
    column = group.column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    rows = rows_of(source(tmp_path))
    assert [isinstance(row, Rejected) for row in rows] == [False] * 4 + [True] * 4 + [False] * 4
    assert rows[4].reason == "unreadable"
    assert rows[4].origin == "a.parquet row 4"


def test_large_row_groups_are_cut(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", pairs(png, 26), group=20)
    for options, most in (({"unit_rows": 6}, 6), ({"unit_bytes": 1}, 1), ({"unit_rows": 7}, 7)):
        one = source(tmp_path, **options)
        units = one.units()
        assert max(unit.rows for unit in units) <= most
        assert len({unit.name for unit in units}) == len(units)
        assert [row["id"] for row in rows_of(one)] == [f"p{i}" for i in range(26)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes are read of files, by request; and every row group counts as a large one."""
    made: list[int] = []
    read = WatchedFile.read

    def counted(self: WatchedFile, size: int = -1) -> pa.Buffer:
        made.append(size)
        return read(self, size)

    monkeypatch.setattr(WatchedFile, "read", counted)
    monkeypatch.setattr(parquet, "_SMALL_GROUP_BYTES", 0)
    monkeypatch.setattr(parquet, "_BUFFER_BYTES", 10_000)
    monkeypatch.setattr(parquet._Reader, "_kept", deque(maxlen=1))
    return made


def test_the_pieces_of_a_large_row_group_are_read_one_after_the_other(
    tmp_path: Path, asked: list[int]
) -> None:
    images = [np.random.default_rng(seed).bytes(5_000) for seed in range(640)]
    table = pa.table({"image": images, "text": [f"text {seed}" for seed in range(640)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, data_page_size=1, write_batch_size=5, use_dictionary=False)
    one = source(tmp_path, "hf_parquet", unit_rows=60)
    units = one.units()
    assert len(units) == 11

    def numbers(*wanted: int) -> list[int]:
        rows = [row for at in wanted for row in one.read(units[at])]
        assert all(row["image"] == images[int(row["web_text"][5:])] for row in rows)
        return [int(row["web_text"][5:]) for row in rows]

    def places(*wanted: int) -> list[int]:
        return [at for one in wanted for at in range(640 * one // 11, 640 * (one + 1) // 11)]

    asked.clear()
    assert numbers(0) == places(0)
    assert sum(asked) < path.stat().st_size / 3
    # As a process reads when others take a part of the pieces.
    assert numbers(1, 2, 4, 7, 10) == places(1, 2, 4, 7, 10)
    assert sum(asked) < 1.4 * path.stat().st_size  # with the footers
    assert numbers(3, 5) == places(3, 5)


def test_a_piece_that_was_not_read_to_its_end_is_read_again(
    tmp_path: Path, png: Png, asked: list[int]
) -> None:
    write(tmp_path / "a.parquet", pairs(png, 20), group=20)
    write(tmp_path / "b.parquet", pairs(png, 20), group=20)
    one = source(tmp_path, unit_rows=10)
    units = one.units()

    def ids(at: int) -> list[str]:
        return [row["id"] for row in one.read(units[at])]

    stopped = one.read(units[0])
    next(stopped)
    stopped.close()
    assert ids(1) == [f"p{i}" for i in range(10, 20)]
    assert ids(0) == ids(2) == [f"p{i}" for i in range(10)]
    assert ids(1) == ids(3) == [f"p{i}" for i in range(10, 20)]


def test_a_broken_page_loses_its_row_group_in_every_unit(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "a.parquet"
    write(path, pairs(png, 12), group=6)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    rows = rows_of(source(tmp_path, unit_rows=2))
    assert [isinstance(row, Rejected) for row in rows] == [True] * 6 + [False] * 6
    assert [row.origin for row in rows[:6]] == [f"a.parquet row {at}" for at in range(6)]


def on_s3(s3: Server, table: dict[str, Any], group: int) -> Source:
    """A file on a server that is asked once only, and by one request for each row group."""
    options = S3Config(endpoint=s3.endpoint, attempts=1)
    storage = Storage(StorageConfig(uri=f"s3://{BUCKET}/data", s3=options))
    storage.write_table("a.parquet", pa.table(table), row_group_size=group)
    return source(storage.uri, s3={"endpoint": s3.endpoint, "attempts": 1})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that are made, in seconds; none takes any time."""
    made: list[float] = []
    monkeypatch.setattr(parquet, "time", SimpleNamespace(sleep=made.append))
    return made


def test_an_outage_rejects_no_row(s3: Server, png: Png, pauses: list[float]) -> None:
    one = on_s3(s3, pairs(png, 12), group=4)
    (unit,) = one.units()
    rows = one.read(unit)
    found = [next(rows) for _ in range(4)]
    # The second row group twice does not come; in between the file can be opened.
    answers = iter([True, False, False, True])
    s3.refuses = lambda method, path: next(answers, False)
    found += rows
    assert [row["id"] for row in found] == [f"p{i}" for i in range(12)]
    assert pauses == [1.0, 4.0]


def test_a_server_that_stays_away_stops_the_reading(
    s3: Server, png: Png, pauses: list[float]
) -> None:
    one = on_s3(s3, pairs(png, 12), group=4)
    (unit,) = one.units()
    rows = one.read(unit)
    next(rows)
    s3.refuses = lambda method, path: True
    with pytest.raises(OSError, match="AWS Error"):
        list(rows)
    assert pauses == [1.0, 4.0]
    with pytest.raises(OSError, match=r"a\.parquet cannot be reached"):
        next(one.read(unit))
    with pytest.raises(SourceError, match=r"cannot be listed"):
        one.units()


def test_a_file_that_changes_while_it_is_read_rejects_no_row(
    tmp_path: Path, png: Png, pauses: list[float]
) -> None:
    path = tmp_path / "a.parquet"
    write(path, pairs(png, 12), group=4)
    one = source(tmp_path)
    (unit,) = one.units()
    rows = one.read(unit)
    found = [next(rows) for _ in range(4)]
    with path.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(OSError, match=r"bytes when it was listed, and has 10"):
        found += rows
    assert len(found) == 4


def test_strings_that_are_no_utf8_are_read_with_replacement_characters(
    tmp_path: Path, png: Png
) -> None:
    odd = pa.array([b"caf\xe9", b"tea", None], pa.binary()).view(pa.string())
    table = {
        "image": pa.StructArray.from_arrays([[png(1), png(2), b""], odd], ["bytes", "path"]),
        "web_text": odd,
        "caption": odd.cast(pa.large_binary()).view(pa.large_string()),
        "tags": pa.ListArray.from_arrays([0, 2, 2, 3], odd),
        "description": odd.dictionary_encode(),
    }
    write(tmp_path / "a.parquet", table)
    first, second, third = rows_of(source(tmp_path))
    for name in ("web_text", "caption", "description"):
        assert [row[name] for row in (first, second, third)] == ["caf\ufffd", "tea", None]
    assert [row["tags"] for row in (first, second, third)] == [["caf\ufffd", "tea"], [], [None]]
    assert (first["id"], first["image"], third["image"]) == ("a.parquet:0", png(1), b"")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"image": "imag"}},
            r"columns.image: .*no column 'imag' \(did you mean 'image'",
        ),
        ({"columns": {"caption": "blip"}}, "columns.caption: .*no column 'blip'.*it has id, image"),
        ({"columns": {"image": "id"}}, "columns.image: 'id' of .* is string; takes binary"),
        ({"columns": {"web_text": None}}, "has none of the texts; name at least one"),
        ({"texts": {"column": "t", "are": ["caption"]}}, "texts.column: .*no column 't'"),
        ({"texts": {"column": "id", "are": ["caption"]}}, "texts.column: 'id' of .* is string; ta"),
        (
            {"texts": {"column": "regions", "are": ["caption"]}},
            "texts.column: 'regions' .* is list<",
        ),
        ({"columns": {"tags": "regions"}}, "columns.tags: 'regions' .* a list of texts. Name an"),
        ({"columns": {"id": "regions"}}, "columns.id: 'regions' .* takes text or whole numbers"),
        ({"columns": {"caption": "number"}}, "columns.caption: 'number' .* is int64; takes text. "),
        (
            {"columns": {"caption": "several"}},
            r"columns.caption: 'several' .* source.texts: \{column: several, are: \[caption\]\}",
        ),
        ({"columns": {"caption": "scores"}}, "columns.caption: 'scores' .* is map<"),
    ],
)
def test_a_wrong_column_is_found_before_work(
    options: dict[str, Any], message: str, tmp_path: Path, png: Png
) -> None:
    odd = {
        "regions": [[{"x": 1}]],
        "number": [5],
        "several": [["one", "two"]],
        "scores": pa.array([[("dog", 0.9)]], pa.map_(pa.string(), pa.float64())),
    }
    write(tmp_path / "a.parquet", {**pairs(png, 1), **odd})
    with pytest.raises(SourceError, match=message):
        source(tmp_path, **options).units()


@pytest.mark.parametrize("twice", ["image", "web_text"])
def test_a_name_that_two_columns_have_is_told(twice: str, tmp_path: Path, png: Png) -> None:
    table = pa.table(pairs(png, 1))
    pq.write_table(table.append_column(twice, table[twice]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=f"columns.{twice}: .* several columns '{twice}'; rename"):
        source(tmp_path).units()


def test_a_column_of_several_texts_may_be_called_as_ours(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", {**pairs(png, 1), "caption": [["one", "two"]]})
    (row,) = rows_of(source(tmp_path, texts={"column": "caption", "are": ["caption"]}))
    assert (row["web_text"], row["caption"]) == ("text 0", "one")


@pytest.mark.parametrize(
    ("kind", "is_struct"),
    [
        (pa.large_binary(), False),
        (pa.binary_view(), False),
        (pa.dictionary(pa.int32(), pa.binary()), False),
        (None, False),  # of a fixed size
        (pa.binary_view(), True),
    ],
)
def test_images_are_bytes_in_any_form(
    kind: pa.DataType | None, is_struct: bool, tmp_path: Path, png: Png
) -> None:
    images = pa.array([png(1)] * 2, pa.binary() if kind else pa.binary(len(png(1))))
    if kind is not None:
        images = images.dictionary_encode() if pa.types.is_dictionary(kind) else images.cast(kind)
    if is_struct:
        images = pa.StructArray.from_arrays([images], ["bytes"])
    write(tmp_path / "a.parquet", {"image": images, "web_text": ["one", "two"]})
    assert [row["image"] for row in rows_of(source(tmp_path))] == [png(1)] * 2


def test_texts_may_be_views_of_lists(tmp_path: Path, png: Png) -> None:
    texts = pa.array([["raw", "nice"]], pa.list_view(pa.string()))
    write(tmp_path / "a.parquet", {"image": [png(1)], "texts": texts, "tags": texts})
    columns = {"column": "texts", "are": ["web_text", "caption"]}
    (row,) = rows_of(source(tmp_path, texts=columns))
    assert (row["web_text"], row["caption"], row["tags"]) == ("raw", "nice", ["raw", "nice"])


UUID = "c8c9cacb-cccd-cecf-d0d1-d2d3d4d5d6d7"


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (pa.array([1.0, None, 2.5]), ["1", None, 2.5]),
        (pa.array([Decimal(7)] * 3, pa.decimal128(20, 2)), ["7"] * 3),
        (pa.array([uuid.UUID(UUID).bytes] * 3, pa.binary(16)), [UUID] * 3),
        (pa.array([uuid.UUID(UUID).bytes] * 3, pa.uuid()), [UUID] * 3),
        (
            pa.array([b"sixteen letters.", b"caf\xe9", b"7"]),
            ["sixteen letters.", "hex:636166e9", "7"],
        ),
        (pa.array([b"\0\xff", b"00ff", b"hex:00ff"]), ["hex:00ff", "00ff", "hex:6865783a30306666"]),
        (pa.array([b"\0\1", b"\0 ", b"ab"], pa.binary(2)), ["hex:0001", "hex:0020", "ab"]),
        (pa.array([b" a b ", b"a\tb", b"\xc2\xa0a"]), ["a b", "a\tb", "a"]),
    ],
)
def test_ids_may_be_of_many_types(
    ids: pa.Array, told: list[object], tmp_path: Path, png: Png
) -> None:
    write(tmp_path / "a.parquet", {**pairs(png, 3), "id": ids})
    assert [row["id"] for row in rows_of(source(tmp_path))] == told


def test_a_wrong_path_is_found_before_work(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nothing.here does not exist"):
        source(tmp_path / "nothing/here").units()
    with pytest.raises(SourceError, match=r"holds no file that ends in .parquet"):
        source(tmp_path).units()
    with pytest.raises(SourceError, match="holds no file"):
        source(f"{tmp_path}/*.parquet").units()
    with pytest.raises(SourceError, match="neither a path nor a URI"):
        source("gopher://host/data").units()
    with pytest.raises(SourceError, match="empty list"):
        source([]).units()


def test_a_name_that_is_not_utf8_is_told_if_its_file_is_read(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", pairs(png, 1))
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    odd.with_suffix(".jpg").write_bytes(b"an image")
    assert len(source(tmp_path).units()) == 1
    (tmp_path / "a.parquet").rename(odd.with_suffix(".parquet"))
    with pytest.raises(SourceError, match=r"a file whose name is not UTF-8, b'caf.xe9.parquet'"):
        source(tmp_path).units()


def test_files_on_a_host_keep_it(tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    host = "hdfs://nn:8020"

    def locate(uri: str, _: object) -> tuple[FileSystem, str]:
        return LocalFileSystem(), f"{tmp_path}{uri.removeprefix(host)}"

    monkeypatch.setattr(files, "locate", locate)
    write(tmp_path / "data/x/a.parquet", pairs(png, 1))
    for path in ("/data", "/data/", "/data/*/a.parquet", "/data/x/a.parquet"):
        (found,) = source(host + path).units()
        assert found.path == f"{host}/data/x/a.parquet"


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, png: Png) -> None:
    write(tmp_path / "a.parquet", pairs(png, 1))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then the download broke off")
    with pytest.raises(SourceError, match=r"b.parquet cannot be read as Parquet.*Fetch the file"):
        source(tmp_path).units()


def test_an_empty_file_has_no_units(tmp_path: Path, png: Png) -> None:
    schema = pa.schema([("image", pa.binary()), ("web_text", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert source(tmp_path).units() == []
