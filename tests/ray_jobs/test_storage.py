"""An S3 storage on a real server: whole files or none, and patience that travels."""

import _thread
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from ray_jobs import storage as module
from ray_jobs.ingest import IngestConfig
from ray_jobs.pipeline import PipelineConfig
from ray_jobs.sources import open_source
from ray_jobs.sources.base import on_server
from ray_jobs.storage import S3Config, Storage, StorageConfig, refused_by_server
from tests.ray_jobs.s3_server import BUCKET, Server


def storage(server: Server, attempts: int = 10) -> Storage:
    s3 = S3Config(endpoint=server.endpoint, attempts=attempts)
    return Storage(StorageConfig(uri=f"s3://{BUCKET}/run", s3=s3))


def refuse(server: Server, requests: int) -> None:
    """Let the server answer so many requests with 503."""
    until = server.refused + requests
    server.refuses = lambda method, path: server.refused < until


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://", "names no bucket"),
        ("s3:/bucket/run", "begins with s3://"),
        ("s3://bucket//run", "has a part without a name"),
        ("gs:///run", "has a part without a name"),
        ("s4://bucket/run", "on no known file system; takes a folder or .*s3://"),
        ("file:///a b", "is no folder"),
        ("~nobody-of-that-name/run", "is no folder"),
        (" ", "takes a folder or a URI"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_any_work(uri: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        StorageConfig(uri=uri)


@pytest.mark.parametrize(
    "uri",
    [
        *("runs/a: b", "/", "~/run", "runs//a", "s3://bucket", "s3://bucket/a#b", "gs://b/run"),
        *("abfss://c@a/run", "file:///a", "hdfs:///run"),
    ],
)
def test_other_places_are_taken_as_they_are_called(uri: str) -> None:
    assert StorageConfig(uri=uri).uri == uri


@pytest.mark.parametrize("endpoint", ["httpx://host", "http://", "http://host:port", "a b", ":9"])
def test_an_endpoint_that_is_none_is_told_before_any_work(endpoint: str) -> None:
    with pytest.raises(ValidationError, match=r"takes one such as http://host:9000"):
        S3Config(endpoint=endpoint)


def test_an_endpoint_without_a_scheme_is_what_arrow_makes_of_it() -> None:
    told = {
        **{"host": "https://host", "host:9000": "https://host:9000"},
        **{"http://[::1]:9000/": "http://[::1]:9000/", "https://host/s3": "https://host/s3"},
    }
    for endpoint, url in told.items():
        config = S3Config(endpoint=endpoint)
        assert (config.endpoint, config.endpoint_url) == (endpoint, url)
    assert S3Config().endpoint_url is None


def test_what_a_server_says_is_told_by_the_key_of_the_storage(s3: Server) -> None:
    config = StorageConfig(uri="s3://nosuch/run", s3=S3Config(endpoint=s3.endpoint))
    place = Storage(config)
    with pytest.raises(OSError, match="NO_SUCH_BUCKET") as caught:
        place.write_bytes("a", b"a")
    told = refused_by_server(caught.value, place)
    assert told is not None
    assert told.startswith(f"storage.uri: S3 at {s3.endpoint} does not do what s3://nosuch/run ")
    assert "NO_SUCH_BUCKET" in told
    assert refused_by_server(caught.value, storage(s3)) is None, "it is another bucket's"
    assert refused_by_server(caught.value, Storage.at("/run")) is None
    assert refused_by_server(OSError("no disk"), place) is None


def test_a_file_is_read_by_one_request(s3: Server) -> None:
    place, asked = storage(s3), list[str]()
    for size in (0, 2, 3_000_000):
        place.write_bytes("a", bytes(size))
        asked.clear()
        s3.refuses = lambda method, path: bool(asked.append(method))
        assert place.read_bytes("a") == bytes(size)
        assert asked == ["HEAD", "GET"][: 2 if size else 1]


def test_a_busy_server_is_asked_again_in_other_processes_too(s3: Server) -> None:
    filesystem = pickle.loads(pickle.dumps(storage(s3).filesystem))
    refuse(s3, 3)  # one more than Arrow's own patience takes
    with filesystem.open_output_stream(f"{BUCKET}/run/b") as stream:
        stream.write(b"b")
    assert s3.refused == 3
    assert storage(s3).read_bytes("b") == b"b"


def stop_halfway(storage: Storage) -> None:
    with storage.writing("b") as stream:
        stream.write(b"b" * 20_000_000)
        raise ZeroDivisionError


def test_patience_ends_and_nothing_half_written_is_left(s3: Server) -> None:
    impatient = storage(s3, attempts=2)
    s3.refuses = lambda method, path: True
    with pytest.raises(OSError, match="SLOW_DOWN"):
        impatient.write_bytes("a", b"a")
    s3.refuses = lambda method, path: False
    assert not impatient.exists("a")
    with pytest.raises(ZeroDivisionError):
        stop_halfway(impatient)
    assert s3.objects() == []


@pytest.mark.parametrize(("method", "times"), [("POST", 1), ("PUT", 2), ("POST", 2)])
def test_a_large_file_whose_sending_fails_anywhere_is_not_there(
    method: str, times: int, s3: Server
) -> None:
    asked: list[str] = []  # to begin, to take a part, or to complete

    def refuses(of: str, path: str) -> bool:
        asked.append(of)
        return of == method and asked.count(of) >= times

    s3.refuses = refuses
    with pytest.raises(OSError, match="AWS Error"):
        storage(s3, attempts=2).write_bytes("large", bytes(12_000_000))
    assert s3.refused
    s3.refuses = lambda method, path: False
    assert s3.objects() == []
    storage(s3).write_bytes("large", bytes(12_000_000))
    assert storage(s3).size("large") == 12_000_000


@pytest.fixture
def interruptible() -> Iterator[None]:
    """An interrupt is one, also in the processes that tests are shared out to."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_does_not_publish_half_of_a_large_file(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 10_000_000)
    place = storage(s3)
    interrupt = iter([_thread.interrupt_main])  # once

    def refuses(method: str, path: str) -> bool:
        if method == "PUT":
            next(interrupt, lambda: None)()
        return False

    s3.refuses = refuses
    with pytest.raises(KeyboardInterrupt):
        place.write_bytes("large", bytes(22_000_000))
    assert place.size("large") == 22_000_000


def test_json_that_is_not_there_is_none_and_what_is_no_json_is_told(
    s3: Server, tmp_path: Path
) -> None:
    for place in (storage(s3), Storage.at(tmp_path)):
        assert place.find_json("folder/record.json") is None
        place.write_json("folder/record.json", {"rows": 1})
        assert place.find_json("folder/record.json") == {"rows": 1}
        place.write_bytes("folder/record.json", b"{")
        with pytest.raises(ValueError, match="is not JSON"):
            place.find_json("folder/record.json")


def test_what_waits_to_be_sent_is_not_in_memory(s3: Server) -> None:
    place = storage(s3)
    with place.writing("large") as stream:
        before = pa.total_allocated_bytes()
        for _ in range(10):
            stream.write(bytes(3_000_000))
        assert pa.total_allocated_bytes() - before < 3_000_000
    assert place.size("large") == 30_000_000


def test_a_large_file_goes_in_parts_and_is_whole(s3: Server) -> None:
    data = bytes(range(256)) * 100_000
    storage(s3).write_bytes("large", data)
    assert storage(s3).read_bytes("large") == data
    assert storage(s3).names() == ["large"]


def test_what_a_killed_writer_left_is_removed_when_it_is_nobody_s(tmp_path: Path) -> None:
    place = Storage.at(tmp_path)
    place.write_bytes("pairs/train/a", b"a")
    folder = tmp_path / "pairs/train"
    old, new, other = folder / ".tmp-1-b", folder / ".tmp-2-b", tmp_path / ".tmp-3-b"
    for file in (old, new, other):
        file.write_bytes(b"half")
    for file in (old, other, folder / "a"):
        os.utime(file, (0, time.time() - 25 * 3600))
    place.delete_unfinished("pairs/train")
    place.delete_unfinished("pairs/test")
    assert sorted(folder.iterdir()) == [new, folder / "a"]
    assert other.exists()


def test_files_are_on_the_storage_s_server_unless_they_name_another(s3: Server) -> None:
    place = storage(s3)
    place.write_bytes("list.jsonl", b'{"file_name": "a.png", "caption": "a"}')
    elsewhere = {"endpoint": "http://elsewhere:9000"}
    files = {"kind": "folder", "path": f"{place.uri}/list.jsonl"}
    config = PipelineConfig.model_validate(
        {
            "storage": {"uri": place.uri, "s3": {"endpoint": s3.endpoint}},
            "train_data": {"source": files},
            "test_data": {"source": {**files, "s3": elsewhere}},
            "evaluation": {
                "retrieval": [{"name": "own", "test": {"path": files["path"]}}],
            },
        }
    )
    filled = on_server(config, config.storage.s3)
    assert len(open_source(filled.train_data.source).units()) == 1
    assert filled.evaluation.retrieval[0].test.s3.endpoint == s3.endpoint
    assert filled.test_data.source.s3.endpoint == elsewhere["endpoint"]
    assert config.train_data.source.s3.endpoint is None


def test_patience_does_not_tell_runs_apart(tmp_path: Path) -> None:
    sources = ({"kind": "folder", "path": str(tmp_path), "s3": {"attempts": n}} for n in (1, 2))
    digests = {IngestConfig.model_validate({"source": source}).digest() for source in sources}
    assert len(digests) == 1
