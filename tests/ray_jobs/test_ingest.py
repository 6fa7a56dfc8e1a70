"""Ingest: every pair once, whatever happens in between, and a reason for every other row."""

import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ray.data.exceptions import ExecutionTimeoutError

from ray_jobs import ingest as module
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.duplicates import hash_of, hash_of_words, later_duplicates
from ray_jobs.ingestion.manifest import IngestError, Manifest
from ray_jobs.ingestion.parts import Reading
from ray_jobs.pairs import PAIR_SCHEMA, REJECTED_SCHEMA, RowLimits, pair_table
from ray_jobs.sources import Rejected, SourceError, Unit
from ray_jobs.sources.base import UnreachableError
from ray_jobs.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def pair(number: int, **changes: Any) -> dict[str, Any]:
    text = f"a text about thing {'abcdefghijklmnopqrstuvwxyz'[number % 26] * (2 + number // 26)}"
    return {"id": f"p{number:03d}", "image": png(number), "web_text": text, **changes}


def write(folder: Path, *files: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    for index, rows in enumerate(files):
        pq.write_table(pair_table(rows), folder / f"{index}.parquet")


def config(source: Path | dict[str, Any], **options: Any) -> IngestConfig:
    if isinstance(source, Path):
        source = {"kind": "parquet", "path": str(source)}
    return IngestConfig.model_validate({"source": source, "cpus_per_task": 0.5, **options})


def read_again(config: IngestConfig, storage: Storage, index: int) -> None:
    """Make a part as a run does that has not seen that it is done."""
    run = module._Ingestion(config, storage, "train")
    run.writer.write(index, run.source.units()[index], run.source)


def content(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read_bytes(name) for name in storage.names(recursive=True)}


def ids_of(storage: Storage, name: str = "train") -> list[str]:
    manifest = Manifest.from_storage(storage, name)
    return [
        identity
        for part in manifest.parts
        for identity in storage.read_table(part.path, ["id"])["id"].to_pylist()
    ]


def rejected_of(storage: Storage) -> list[tuple[str, str]]:
    return [
        (row["id"], row["reason"])
        for name in storage.names("rejected/train")
        for row in storage.read_table(name).to_pylist()
    ]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.at(tmp_path / "storage")


def test_emoji_become_pairs(storage: Storage) -> None:
    emoji = {"kind": "emoji", "limit": 50, "unit_rows": 20}
    manifest = ingest(config(emoji, row_group_rows=8), storage)
    assert [part.rows for part in manifest.parts] == [20, 20, 10]
    assert manifest.parts[0].row_groups == (8, 8, 4)
    assert manifest.rows == 50
    assert manifest == Manifest.from_storage(storage)
    for part in manifest.parts:
        file = pq.ParquetFile(storage.path(part.path))
        assert file.schema_arrow == PAIR_SCHEMA
        groups = tuple(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
        assert groups == part.row_groups
        assert storage.size(part.path) == part.bytes
    assert len(set(ids_of(storage))) == 50


def test_row_groups_of_large_images_are_shorter_also_without_their_duplicates(
    storage: Storage, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2400, 2400)).save(buffer, "BMP")
    large = {"image": buffer.getvalue()}  # of which four are 69 MB
    write(
        tmp_path / "data",
        [pair(i, **large) for i in range(5)],
        [pair(i, **large) for i in (0, 6, 7, 8, 9, 10)],
    )
    manifest = ingest(config(tmp_path / "data"), storage)
    assert [part.row_groups for part in manifest.parts] == [(4, 1), (4, 1)]
    for part in manifest.parts:
        file = storage.read_footer(part.path)
        groups = tuple(file.row_group(at).num_rows for at in range(file.num_row_groups))
        assert groups == part.row_groups


def test_what_is_done_is_done(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1), pair(2)])
    first = ingest(config(tmp_path / "data"), storage)
    (tmp_path / "data/0.parquet").unlink()
    assert ingest(config(tmp_path / "data"), storage) == first
    # What does not change the rows does not change the data set either.
    assert (
        ingest(config(tmp_path / "data", max_rejected_share=1, cpus_per_task=1), storage) == first
    )


@pytest.mark.parametrize("change", [{"image": png(99)}, {"caption": "of a corrected caption"}])
@pytest.mark.parametrize("repeated", [False, True])
def test_pairs_of_the_same_ids_are_other_data(
    repeated: bool, change: dict[str, Any], storage: Storage, tmp_path: Path
) -> None:
    def digest(name: str, *rows: dict[str, Any]) -> str:
        write(tmp_path / name, [*rows, *rows[: int(repeated)]])
        return ingest(config(tmp_path / name), storage, name).data_digest

    first = digest("first", pair(0), pair(1), pair(2), pair(3), pair(4))
    assert digest("same", pair(0), pair(1), pair(2), pair(3), pair(4)) == first
    assert digest("other", pair(0), pair(1, **change), pair(2), pair(3), pair(4)) != first


def test_two_data_sets_share_a_storage(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "a", [pair(1)])
    write(tmp_path / "b", [pair(2)])
    ingest(config(tmp_path / "a"), storage, "train")
    ingest(config(tmp_path / "b"), storage, "test")
    assert (ids_of(storage), ids_of(storage, "test")) == (["p001"], ["p002"])


def test_a_run_that_lost_some_parts_ends_like_an_undisturbed_one(
    storage: Storage, tmp_path: Path
) -> None:
    write(
        tmp_path / "data",
        [pair(i) for i in range(5)],
        [pair(i) for i in range(3, 8)],
        [pair(i, image=b"") for i in range(1)] + [pair(9), pair(9)],
        [pair(4), pair(10)],
    )
    options = config(tmp_path / "data", row_group_rows=2, max_rejected_share=0.5)
    whole = ingest(options, storage)
    undisturbed = content(storage)
    assert ids_of(storage) == [f"p{i:03d}" for i in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10)]

    for lost in (
        ["pairs/train/manifest.json"],
        ["pairs/train/manifest.json", "pairs/train/part-00001.json"],
        [
            "pairs/train/manifest.json",
            "pairs/train/part-00000.json",
            "keys/train/part-00003.parquet",
        ],
        ["pairs/train/manifest.json", "pairs/train", "rejected/train"],
    ):
        for name in lost:
            storage.delete(name)
        assert ingest(options, storage) == whole
        assert content(storage) == undisturbed


def test_a_crash_while_duplicates_are_taken_out_loses_nothing(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path / "data", [pair(1), pair(2)], [pair(2), pair(3), pair(1)])
    options = config(tmp_path / "data", max_rejected_share=0.5)
    whole = ingest(options, storage)
    undisturbed = content(storage)
    # As if the part had been written anew, and its record had not.
    read_again(options, storage, 1)
    storage.delete("pairs/train/manifest.json")
    assert ingest(options, storage) == whole
    assert content(storage) == undisturbed
    # As if its record had been written, and the other file not removed.
    storage.write_bytes("pairs/train/part-00001.parquet", b"what was read")
    storage.delete("pairs/train/manifest.json")
    assert ingest(options, storage) == whole
    assert content(storage) == undisturbed


def test_a_part_of_an_older_release_is_kept_where_it_is(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1), pair(2)], [pair(2), pair(3)])
    options = config(tmp_path / "data", max_rejected_share=0.5)
    whole = ingest(options, storage)
    name, place = "pairs/train/part-00001.json", "pairs/train/part-00001.parquet"
    record = storage.read_json(name)
    storage.write_bytes(place, storage.read_bytes(record.pop("path")))
    storage.write_json(name, record)
    storage.delete("pairs/train/manifest.json")
    manifest = ingest(options, storage)
    assert [part.path for part in manifest.parts] == ["pairs/train/part-00000.parquet", place]
    assert manifest.data_digest == whole.data_digest
    assert ids_of(storage) == ["p001", "p002", "p003"]


def test_what_another_run_still_reads_changes_nothing_of_what_is_done(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path / "data", [pair(1), pair(2)], [pair(2), pair(3), pair(1, image=b"")])
    options = config(tmp_path / "data", max_rejected_share=0.5)
    whole = ingest(options, storage)
    done = content(storage)
    read_again(options, storage, 1)
    assert ingest(options, storage) == whole
    for part in whole.parts:
        assert storage.read_footer(part.path).num_rows == part.rows
    assert ids_of(storage) == ["p001", "p002", "p003"]
    assert {name: data for name, data in content(storage).items() if name in done} == {
        **done,
        # Of no consequence once the manifest is there, and of none for its next one, either.
        "pairs/train/part-00001.json": storage.read_bytes("pairs/train/part-00001.json"),
    }


def test_a_worker_that_dies_is_replaced(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "died"

    class Deadly:
        def units(self) -> list[Unit]:
            return [Unit(str(first), first=first, rows=3) for first in range(0, 9, 3)]

        def read(self, unit: Unit) -> Iterator[dict[str, Any]]:
            for number in range(unit.first, unit.first + 3):
                if number == 4 and not mark.exists():
                    mark.touch()
                    os._exit(1)
                yield pair_of(number)

    pair_of = {number: pair(number) for number in range(9)}.__getitem__
    monkeypatch.setattr(module, "open_source", lambda _: Deadly())
    manifest = ingest(config(tmp_path), storage)
    assert mark.exists()
    assert [part.rows for part in manifest.parts] == [3, 3, 3]
    assert ids_of(storage) == [f"p{i:03d}" for i in range(9)]


@pytest.mark.parametrize("done", [False, True])
def test_another_configuration_is_refused(done: bool, storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1), pair(2)])
    ingest(config(tmp_path / "data"), storage)
    if not done:
        storage.delete("pairs/train/manifest.json")
    with pytest.raises(
        IngestError, match=r"another configuration or version\. Choose another storage"
    ):
        ingest(config(tmp_path / "data", row_group_rows=7), storage)


def test_other_files_under_a_begun_run_are_refused(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1)], [pair(2)])
    ingest(config(tmp_path / "data"), storage)
    storage.delete("pairs/train/manifest.json")
    same = tmp_path / "data/0.parquet"
    written = same.stat().st_mtime_ns
    write(tmp_path / "data", [pair(1)], [pair(2), pair(3)])
    os.utime(same, ns=(written, written))
    with pytest.raises(IngestError, match=r"source was another .*1\.parquet"):
        ingest(config(tmp_path / "data"), storage)


def test_files_of_the_same_size_under_a_begun_run_are_refused_and_under_a_finished_one_are_not(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path / "data", [pair(1)], [pair(2)])
    options, replaced = config(tmp_path / "data"), tmp_path / "data/1.parquet"
    os.utime(replaced, (1_000_000_000, 1_000_000_000.5))
    whole = ingest(options, storage)
    os.utime(replaced, (1_000_000_060, 1_000_000_060))
    assert ingest(options, storage) == whole
    storage.delete("pairs/train/manifest.json")
    with pytest.raises(
        IngestError,
        match=r"1\.parquet rows 0 to 0 was written anew, with as many bytes, at 2001-09-09T01:47:40"
        r".*, after 2001-09-09T01:46:40.*; if it holds .* `touch -d .*1\.parquet` lets this go on",
    ):
        ingest(options, storage)
    os.utime(replaced, (1_000_000_000, 1_000_000_000))  # fractions are not copied by every tool
    assert ingest(options, storage) == whole


def test_an_ingestion_that_an_older_release_began_goes_on(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1)], [pair(2)])
    options = config(tmp_path / "data")
    whole = ingest(options, storage)
    for index in range(2):
        name = f"pairs/train/part-0000{index}.json"
        record = storage.read_json(name)
        # It took note of neither.
        del record["unit"]["modified"], record["unit"]["end"]
        storage.write_json(name, record)
    storage.delete("pairs/train/manifest.json")
    storage.delete("keys/train/part-00001.parquet")
    os.utime(tmp_path / "data/0.parquet", (1, 1))
    assert ingest(options, storage) == whole


@pytest.mark.parametrize("began", ["", "/"])
@pytest.mark.parametrize("goes_on", ["", "/"])
def test_a_slash_at_a_folder_s_end_makes_no_other_configuration(
    began: str, goes_on: str, storage: Storage, tmp_path: Path
) -> None:
    def options(end: str) -> IngestConfig:
        return config({"kind": "parquet", "path": f"{tmp_path}/data{end}"})

    write(tmp_path / "data", [pair(1)])
    whole = ingest(options(began), storage)
    # As an older release wrote it, to which both were different.
    older = options(began)._digest(lambda path: path)
    for name in ("pairs/train/manifest.json", "pairs/train/part-00000.json"):
        text = storage.read_bytes(name).decode()
        storage.write_bytes(name, text.replace(whole.config_digest, older).encode())
    assert ingest(options(goes_on), storage).data_digest == whole.data_digest
    storage.delete("pairs/train/manifest.json")
    assert ingest(options(goes_on), storage) == whole
    assert options("").digest() == options("")._digest(lambda path: path)


def test_the_first_row_of_an_id_wins(storage: Storage, tmp_path: Path) -> None:
    write(
        tmp_path / "data",
        [pair(1, web_text="first"), pair(1, web_text="same part")],
        [pair(2), pair(1, web_text="other part")],
    )
    manifest = ingest(config(tmp_path / "data", max_rejected_share=0.5), storage)
    assert ids_of(storage) == ["p001", "p002"]
    assert storage.read_table(manifest.parts[0].path)["web_text"].to_pylist() == ["first"]
    assert rejected_of(storage) == [("p001", "duplicate_id")] * 2
    assert manifest.rejected == {"duplicate_id": 2}
    assert manifest.duplicates == {"id": 2, "image": 0, "text": 0}


def test_a_part_of_duplicates_alone_disappears(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1), pair(2)], [pair(1)], [pair(3)])
    manifest = ingest(config(tmp_path / "data", max_rejected_share=0.5), storage)
    assert [part.name for part in manifest.parts] == ["part-00000", "part-00002"]


def test_an_id_column_that_is_none_stops_the_job(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", *[[pair(7)]] * 4)
    with pytest.raises(IngestError, match=r"3 of 4 rows \(75.0 %\).*duplicate_id \(3\)"):
        ingest(config(tmp_path / "data"), storage)
    assert not storage.exists("pairs/train/manifest.json")


@pytest.mark.parametrize("drop", [False, True])
def test_repeated_images_and_texts_are_counted_and_may_be_dropped(
    drop: bool, storage: Storage, tmp_path: Path
) -> None:
    write(
        tmp_path / "data",
        [pair(1), pair(2, web_text="The quick brown fox!")],
        [pair(3, image=png(1)), pair(4, web_text="fox, quick brown the 2024")],
        [pair(5, web_text="a dog"), pair(6, web_text="a dog")],
    )
    options = config(tmp_path / "data", drop_duplicate_images=drop, drop_near_duplicate_texts=drop)
    manifest = ingest(options, storage)
    assert manifest.duplicates == {"id": 0, "image": 1, "text": 1}
    kept = [1, 2, 5, 6] if drop else [1, 2, 3, 4, 5, 6]
    assert ids_of(storage) == [f"p00{i}" for i in kept]
    dropped = [("p003", "duplicate_image"), ("p004", "near_duplicate_text")]
    assert rejected_of(storage) == (dropped if drop else [])


def test_every_unusable_row_is_told(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [{"file_name": f"{i}.png", "text": f"text {i}"} for i in range(12)]
    for number in range(9):
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "9.png").write_bytes(b"")
    (folder / "10.png").write_bytes(png(10)[:50])
    lines += [{"file_name": "../x.png", "text": "\ud800"}, {"file_name": "8.png", "text": ""}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n"
    (folder / "metadata.jsonl").write_text(text)
    source = {"kind": "folder", "path": str(folder)}
    manifest = ingest(config(source, max_rejected_share=0.5), storage)
    assert manifest.rows == 9
    found = [(identity.partition(":")[0], reason) for identity, reason in rejected_of(storage)]
    assert sorted(found) == [
        ("", "bad_row"),
        ("../x.png", "outside_folder"),
        ("10.png", "image_undecodable"),
        ("11.png", "no_image"),
        ("8.png", "no_text"),
        ("9.png", "no_image"),
    ]
    table = storage.read_table("rejected/train/part-00000.parquet")
    assert table.schema == REJECTED_SCHEMA
    assert table["origin"].to_pylist()[-1] == "metadata.jsonl row 14"


def test_ids_that_differ_at_their_end_alone_are_told_apart(
    storage: Storage, tmp_path: Path
) -> None:
    begin = "https://example.com/" + "p" * 600
    rows = [pair(i, id=f"{begin}{i}") for i in range(3)] + [
        pair(3, id="short\x1b[2J\n\u202e👩\u200d🚒")
    ]
    write(tmp_path / "data", rows)
    ingest(config(tmp_path / "data"), storage)
    *long, short = ids_of(storage)
    assert len(set(long)) == 3
    assert {len(one) for one in long} == {512}
    assert all(one.startswith(begin[:479] + ":") for one in long)
    # Shown without what steers a terminal, and told from an id that is written so.
    assert re.fullmatch(re.escape(r"short\x1b[2J\n\u202e" + "👩\u200d🚒") + ":[0-9a-f]{32}", short)


def test_what_steers_a_terminal_is_not_quoted() -> None:
    odd = Rejected("1", "u.jsonl row 0", "bad_row", "http\x1b]0;owned\x07\x1b[2J\n\u202efine")
    reading = Reading(RowLimits())
    assert list(reading.pairs([odd, {"id": "\x1b[1m", "origin": "a\x9b", "image": b"x"}])) == []
    assert reading.examples()["bad_row"] == [
        r"u.jsonl row 0: http\x1b]0;owned\x07\x1b[2J\n\u202efine"
    ]
    assert (reading.rejected[1].id, reading.rejected[1].origin) == (r"\x1b[1m", r"a\x9b")


def test_too_many_unusable_rows_stop_the_job(storage: Storage, tmp_path: Path) -> None:
    bad = [pair(i, image=b"<html>") for i in range(6)] + [pair(8, web_text="")]
    write(tmp_path / "data", bad, [pair(i) for i in range(20, 30)])
    for _ in range(2):  # also when it is started again
        with pytest.raises(
            IngestError,
            match=r"7 of 17 rows \(41.2 %\) cannot be used, over max_rejected_share \(20.0 %\)\. "
            r"Commonest reasons: image_undecodable \(6, such as 0\.parquet row 0: no image begins",
        ):
            ingest(config(tmp_path / "data"), storage)
    assert ingest(config(tmp_path / "data", max_rejected_share=0.5), storage).rows == 10


def test_it_stops_early(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EARLY_ROWS", 5)
    write(tmp_path / "data", *[[pair(i, image=b"") for i in range(9)]] * 40)
    with pytest.raises(IngestError, match="no_image"):
        ingest(config(tmp_path / "data"), storage)
    assert len(storage.names("pairs/train", ".json")) < 30


def test_one_broken_part_does_not_stop_it_whichever_comes_first(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_EARLY_ROWS", 5)
    broken = [pair(i, image=b"") for i in range(9)]
    good = [[pair(9 * part + i) for i in range(9)] for part in range(1, 25)]
    write(tmp_path / "data", broken, *good)
    assert ingest(config(tmp_path / "data", max_rejected_share=0.05), storage).rows == 9 * 24


def test_what_a_killed_run_left_half_written_is_removed(storage: Storage, tmp_path: Path) -> None:
    left = [Path(storage.uri, kind, "train/.tmp-1-part") for kind in ("pairs", "rejected", "keys")]
    for file in left:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
        os.utime(file, (0, 0))
    write(tmp_path / "data", [pair(1)])
    ingest(config(tmp_path / "data"), storage)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"kind": "parquet", "path": "x"}, r"smaller units \(source.unit_rows\)"),
        ({"kind": "webdataset", "path": "x"}, "smaller shards"),
    ],
)
def test_a_run_that_hangs_tells_what_helps(
    source: dict[str, Any], told: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(_: object) -> Iterator[Any]:
        raise ExecutionTimeoutError

    monkeypatch.setattr(ray.data.Dataset, "iter_rows", hang)
    with pytest.raises(IngestError, match=f"no part was done in 7200 s.* begin with {told} in an"):
        list(module._Ingestion(config(source), storage, "train")._run([{"index": 0}], print))


def test_a_source_without_rows_is_an_error(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [])
    with pytest.raises(IngestError, match="parquet source is empty: no file that train_data"):
        ingest(config(tmp_path / "data"), storage)
    write(tmp_path / "data", [pair(1, image=b"")])
    with pytest.raises(IngestError, match=r"no row could be used.*no_image"):
        ingest(config(tmp_path / "data", max_rejected_share=1), storage)
    with pytest.raises(SourceError, match="does not exist"):
        ingest(config(tmp_path / "nothing"), storage)


def test_a_file_that_cannot_be_reached_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    calls = []

    def work(index: int) -> Any:
        calls.append(index)
        raise OSError("connection reset")

    answer = module._answer(3, "s3://bucket/a.parquet", work)
    assert calls == [3, 3, 3]
    assert (
        "s3://bucket/a.parquet cannot be read or written (connection reset)" in answer["error"][0]
    )


@pytest.mark.parametrize(("error", "asked"), [(UnreachableError("away"), 3), (SourceError("x"), 1)])
def test_a_file_of_the_source_is_asked_again_if_it_was_out_of_reach(
    error: Exception, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None))
    calls = []

    def work(index: int) -> Any:
        calls.append(index)
        raise error

    answer = module._answer(3, "a.parquet", work)
    assert len(calls) == asked
    assert f"{error}" in answer["error"][0]
    assert "What is done is kept" in answer["error"][0]


def test_a_source_that_cannot_be_listed_is_told(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden:
        def units(self) -> list[Unit]:
            raise OSError("ACCESS_DENIED")

    monkeypatch.setattr(module, "open_source", lambda _: Forbidden())
    with pytest.raises(IngestError, match=r"parquet source cannot be listed \(ACCESS_DENIED\)"):
        ingest(config(tmp_path), storage)


def test_a_manifest_that_is_not_there_is_told(storage: Storage) -> None:
    with pytest.raises(IngestError, match="was not ingested to its end; run ingest"):
        Manifest.from_storage(storage)


def test_limits_are_passed_on(storage: Storage, tmp_path: Path) -> None:
    write(tmp_path / "data", [pair(1)])
    with pytest.raises(IngestError, match="image_too_small"):
        ingest(config(tmp_path / "data", limits={"min_side": 9}), storage)


@given(st.lists(st.integers(0, 6), max_size=30), st.data())
def test_later_duplicates_are_found(values: list[int], data: st.DataObject) -> None:
    considered = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    later, first = later_duplicates(np.array(values, np.uint64), np.array(considered, bool))
    expected, seen = [], {}
    for row, (value, counts) in enumerate(zip(values, considered, strict=True)):
        if value and counts and seen.setdefault(value, row) != row:
            expected.append((row, seen[value]))
    assert sorted(zip(later.tolist(), first.tolist(), strict=True)) == expected


def test_texts_of_the_same_words_are_alike() -> None:
    one = hash_of_words("A red-brown fox jumps, 2 times")
    assert one == hash_of_words("times FOX a brown   jumps red")
    assert one != hash_of_words("a red brown fox jumps")
    assert hash_of_words("a fox 1 2 3 4") == 0
    # As storages of all versions have it.
    assert one == hash_of(b"a brown fox jumps red times")


@pytest.mark.parametrize(
    ("text", "same", "other", "short"),
    [
        ("海滩上奔跑的棕色狗", "「海滩上奔跑的棕色狗」 2024", "海滩上奔跑的棕色猫", "棕色的狗"),
        ("红色运动鞋 Nike 男士", "NIKE 男士，红色运动鞋", "红色运动鞋 Nike 女士", "Nike 男士"),
        ("砂浜を走る茶色の犬", "砂浜を走る茶色の犬。", "砂浜を走る茶色の猫", "走る犬"),
        ("สุนัขสีน้ำตาลบนชายหาด", "สุนัขสีน้ำตาลบนชายหาด!", "แมวสีน้ำตาลบนชายหาด", "สุนัข"),
    ],
)
def test_texts_without_spaces_are_compared_by_their_characters(
    text: str, same: str, other: str, short: str
) -> None:
    assert hash_of_words(text) == hash_of_words(same) != 0
    assert hash_of_words(text) != hash_of_words(other)
    assert hash_of_words(short) == 0


def test_rejected_rows_travel() -> None:
    row = Rejected("a", "b", "c", "d")
    assert pickle.loads(pickle.dumps(row)) == row
