"""Which files a path means, wherever they lie."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from ray_jobs.sources import FolderConfig, ParquetConfig, SourceError
from ray_jobs.sources.base import FilesConfig
from ray_jobs.sources.files import find_files
from ray_jobs.storage import S3Config
from tests.ray_jobs.s3_server import BUCKET, Server

USUAL = ("metadata.jsonl", "metadata.csv")


def on_s3(server: Server, path: str, *, attempts: int = 10) -> FilesConfig:
    s3 = S3Config(endpoint=server.endpoint, attempts=attempts)
    return FilesConfig(path=f"s3://{BUCKET}/{path}", s3=s3)


def put(server: Server, *keys: str) -> None:
    client = server.client()
    for key in keys:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"content")


def labels(config: FilesConfig, suffix: str = ".parquet", usual: tuple[str, ...] = ()) -> list[str]:
    return [file.label for file in find_files(config, (suffix,), usual=usual)]


def test_other_lists_are_not_taken_for_the_usual_one_while_it_cannot_be_asked_for(
    s3: Server,
) -> None:
    put(s3, "data/metadata.jsonl", "data/old/drafts.jsonl")
    s3.refuses = lambda method, path: method == "HEAD" and path.endswith("metadata.jsonl")
    with pytest.raises(SourceError, match=r"s3://runs/data cannot be listed: .*metadata.jsonl"):
        labels(on_s3(s3, "data", attempts=1), ".jsonl", USUAL)
    s3.refuses = lambda method, path: False
    assert labels(on_s3(s3, "data"), ".jsonl", USUAL) == ["metadata.jsonl"]


def test_usual_lists_that_may_not_be_asked_for_are_none(s3: Server) -> None:
    put(s3, "data/list.jsonl")
    # So S3 answers, of what is not there, whoever may not list.
    s3.forbid("data/metadata.*")
    assert labels(on_s3(s3, "data"), ".jsonl", USUAL) == ["list.jsonl"]


def test_keys_with_an_empty_part_are_told(s3: Server) -> None:
    put(s3, "data//a.parquet", "data/b.parquet", "/c.parquet")
    with pytest.raises(SourceError, match=r"s3://runs/data//a\.parquet has two slashes"):
        labels(on_s3(s3, "data"))
    with pytest.raises(SourceError, match=r"s3://runs//c\.parquet has two slashes"):
        labels(on_s3(s3, "**/*.parquet"))
    assert labels(on_s3(s3, "data/*.parquet")) == ["b.parquet"]
    assert labels(on_s3(s3, "*/*.parquet")) == ["data/b.parquet"]


@pytest.mark.parametrize("path", ["s3://src//x", "gs:///x", ["s3://src/x", "s3://src/x//y/"]])
def test_a_path_with_an_empty_part_is_refused_by_its_key(path: str | list[str]) -> None:
    with pytest.raises(ValidationError, match=r"path\n.* has two slashes where one belongs"):
        ParquetConfig.model_validate({"kind": "parquet", "path": path})
    for fine in ("s3://src/x//", "file:///data//x", "/data//x"):
        FolderConfig(kind="folder", path=fine)


TREE = ("part-0.parquet", "deep/0/a.parquet", "deep/1/a.parquet", "other/0/a.parquet", "deep/0/b/c")
MEANT = {
    "part-*.parquet": (["part-0.parquet"], 3),
    "*/0/*.parquet": (["deep/0/a.parquet", "other/0/a.parquet"], 9),
    "d*/[0-1]/a.parquet": (["deep/0/a.parquet", "deep/1/a.parquet"], 8),
    "d*/0/x.parquet": ([], 7),
    "deep/**/a.parquet": (["0/a.parquet", "1/a.parquet"], 6),
    "d*/0[/]a.parquet": ([], 11),
}


@pytest.mark.parametrize("pattern", MEANT)
@pytest.mark.parametrize("remote", [False, True])
def test_no_more_is_listed_than_a_pattern_may_mean(
    remote: bool, pattern: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if remote:
        server = request.getfixturevalue("s3")
        put(server, *(f"data/{name}" for name in TREE))
        config = on_s3(server, f"data/{pattern}")
    else:
        for name in TREE:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"content")
        config = FilesConfig(path=f"{tmp_path}/{pattern}")
    meant, count = MEANT[pattern]
    if meant:
        assert labels(config) == meant
    with pytest.raises(SourceError, match=rf"holds no file .* \({count} other"):
        labels(config, ".none")


def test_what_is_called_like_a_pattern_is_read(s3: Server) -> None:
    put(s3, "data/br[1].parquet", "data/br1.parquet", "data/set[1]/a.parquet")
    assert labels(on_s3(s3, "data/br[1].parquet")) == ["br[1].parquet"]
    assert labels(on_s3(s3, "data/set[1]")) == ["a.parquet"]
    assert labels(on_s3(s3, "data/br[[]*.parquet")) == ["br[1].parquet"]
    assert labels(on_s3(s3, "data/br[1-9].parquet")) == ["br1.parquet"]
    with pytest.raises(SourceError, match=r"a \[ that is part of a name is written \[\[\]"):
        labels(on_s3(s3, "data/[a]*.parquet"))
