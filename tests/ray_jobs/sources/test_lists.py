"""What is asked for of a list, and of the names that it holds."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from ray_jobs.sources import Rejected, Source, SourceConfig, folder, lists, open_source
from ray_jobs.storage import Storage, StorageConfig
from tests.ray_jobs.s3_server import BUCKET, Server

Png = Callable[[int], bytes]


def source(path: Path | str, **options: Any) -> Source:
    config = {"kind": "folder", "path": str(path), **options}
    return open_source(TypeAdapter(SourceConfig).validate_python(config))


def rows_of(one: Source) -> list[Any]:
    return [row for unit in one.units() for row in one.read(unit)]


def named(names: list[str]) -> bytes:
    rows = [{"file_name": name, "text": f"text of {name[:9]}"} for name in names]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Watched:
    """An open file that tells how many bytes are read of it."""

    def __init__(self, file: pa.NativeFile, read: list[int]) -> None:
        self._file, self._read = file, read

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int) -> bytes:
        data = bytes(self._file.read(size))
        self._read.append(len(data))
        return data


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_every_unit_asks_for_its_own_bytes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"list.{kind}"
    rows = [{"url": f"http://host/{at}.png", "text": f"text {at}"} for at in range(100)]
    with path.open("w", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    read: list[int] = []
    opened = lists.open_file
    monkeypatch.setattr(lists, "open_file", lambda *arguments: Watched(opened(*arguments), read))
    one = source(path, kind="urls", unit_rows=10)
    units = one.units()
    assert len(units) == 10
    read.clear()
    found = [row for unit in units for row in one._rows(unit)]
    assert [row["web_text"] for row in found] == [row["text"] for row in rows]
    header = (units[0].offset or 0) if kind == "csv" else 0
    assert sum(read) == path.stat().st_size - header
    # Another process has not looked at the file's beginning yet, and does so once.
    lists._head.cache_clear()
    lists._sampled.cache_clear()
    read.clear()
    assert len([row for unit in units for row in one._rows(unit)]) == 100
    assert sum(read) <= 3 * path.stat().st_size


def test_a_list_that_is_listed_again_is_looked_at_again(tmp_path: Path, png: Png) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    for column in ("text", "note"):
        (tmp_path / "list.csv").write_text(f"file_name,{column}\n0.png,a cat\n")
        (row,) = rows_of(source(tmp_path, columns={"web_text": column}))
        assert row["web_text"] == "a cat"


@pytest.mark.parametrize("name", ["s3://bucket/0.png", "https://host/0.png", "file:///0.png"])
def test_an_image_that_is_a_uri_is_told_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_bytes(named([name]))
    (row,) = rows_of(source(tmp_path))
    assert isinstance(row, Rejected)
    assert row.reason == "image_is_uri"
    assert row.detail.startswith(f"'{name}': is a URI; takes names relative to the list's folder")


def test_a_name_that_is_longer_than_keys_are_costs_its_row(s3: Server, png: Png) -> None:
    at = {"s3": {"endpoint": s3.endpoint}}
    storage = Storage(StorageConfig.model_validate({"uri": f"s3://{BUCKET}/data", **at}))
    storage.write_bytes("0.png", png(0))
    long = "é" * 510  # with the folder's, over 1,024 bytes
    storage.write_bytes("metadata.jsonl", named([f"{long}.png", "0.png"]))
    asked: list[str] = []
    s3.refuses = lambda method, path: bool(asked.append(path))
    too_long, good = rows_of(source(storage.uri, **at))
    assert (too_long.reason, good["image"]) == ("no_image", png(0))
    assert len(too_long.detail) < 300
    assert too_long.detail.endswith("é.png': there is no such file")
    assert max(map(len, asked)) < 100


BAD_REQUEST = "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."


@pytest.mark.parametrize("expired", [False, True])
def test_a_name_that_a_server_refuses_costs_its_row_unless_it_refuses_everything(
    expired: bool, tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(2):
        (tmp_path / f"{at}.png").write_bytes(png(at))
    (tmp_path / "list.jsonl").write_bytes(named(["0.png", "1.png"]))
    one = source(tmp_path)
    (unit,) = one.units()
    real = folder.FolderSource._inside

    def inside(self: Any, where: str, name: str, most: int) -> tuple[str, bytes]:
        if name == "1.png":
            raise OSError(BAD_REQUEST)
        return real(self, where, name, most)

    monkeypatch.setattr(folder.FolderSource, "_inside", inside)
    if not expired:
        good, refused = one.read(unit)
        assert (good["image"], refused.reason) == (png(0), "refused_name")
        return

    def refuse(*_: object) -> Any:
        raise OSError(BAD_REQUEST)

    monkeypatch.setattr(folder, "open_file", refuse)
    with pytest.raises(OSError, match="HTTP status 400"):
        list(one.read(unit))
