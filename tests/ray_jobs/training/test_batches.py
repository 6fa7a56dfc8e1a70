"""Batches as a training worker gets them from Ray Data."""

from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.pairs import PAIR_SCHEMA, pair_table
from ray_jobs.storage import Storage, StorageConfig
from ray_jobs.training.batches import BatchMaker, Images, PairFiles, choose_text, rows_at, stream
from ray_jobs.training.plan import DataPlan
from rwkv_clip.model.config import named_config
from tests.ray_jobs.s3_server import BUCKET


def test_a_run_of_many_lots_of_windows_has_the_batches_of_one(emoji_storage):
    files = PairFiles.of(emoji_storage)
    plan = DataPlan(files.flat_row_groups, 32, 4, 4, 0)
    images = Images.of(named_config("RWKV-CLIP-Tiny"))
    maker = BatchMaker(files, plan, plan.lanes_of(0, 2), images, 16)
    last = plan.steps_per_epoch + 5
    assert plan.steps_per_epoch % plan.shuffle_steps  # an epoch's last window is cut

    def ids(**windows: int) -> list[list[str]]:
        arrived = stream(maker, 1, last, 0.2, **windows)
        return [batch["id"].tolist() for batch in arrived]

    at_once = ids()
    assert [len(batch) for batch in at_once] == [16] * (last - 1)
    assert at_once == ids(windows=2)  # three lots, and the cut window inside of one


def test_rows_of_images_over_two_gigabytes_are_read():
    image = pa.array([bytes(9_000_000)])
    ids = pa.chunked_array([[str(at)] for at in range(256)])
    table = pa.table({"id": ids, "image": pa.chunked_array([image] * len(ids))})
    assert table.nbytes > 2**31
    rows = rows_at(table, np.array([0, 7, 255]))
    assert [(row["id"], len(row["image"])) for row in rows] == [
        (at, 9_000_000) for at in ("0", "7", "255")
    ]


def test_row_groups_on_a_server_are_waited_for_together(s3):
    config = StorageConfig(uri=f"s3://{BUCKET}/run", s3={"endpoint": s3.endpoint, "attempts": 2})
    storage = Storage(config)
    pairs = [{"id": str(at), "image": b"i", "web_text": "t"} for at in range(8)]
    storage.write_table("pairs", pair_table(pairs), row_group_size=2)
    together = Barrier(4)

    def refuses(method: str, path: str) -> bool:
        if method == "HEAD":
            together.wait(timeout=10)
        return False

    s3.refuses = refuses
    files = PairFiles(storage, ("pairs",), ((2,) * 4,))
    order = np.array([7, 0, 3, 4, 1])
    assert [pair["id"] for pair in files.take(order)] == [str(row) for row in order]


def test_a_part_in_batches_of_any_size_asks_a_server_the_same(s3):
    config = StorageConfig(uri=f"s3://{BUCKET}/run", s3={"endpoint": s3.endpoint})
    storage = Storage(config)
    pairs = [{"id": str(at), "image": b"i", "web_text": "t"} for at in range(12)]
    parts, row_groups = ("a", "b"), ((1, 3), (4, 3, 1))
    for part, rows in zip(parts, (pairs[:4], pairs[4:]), strict=True):
        with storage.writing(part) as stream, pq.ParquetWriter(stream, PAIR_SCHEMA) as file:
            first = 0
            for size in row_groups[parts.index(part)]:
                file.write_table(pair_table(rows[first : first + size]))
                first += size
    asked: list[str] = []
    s3.refuses = lambda method, path: bool(asked.append(method))
    files = PairFiles(storage, parts, row_groups)
    requests = []
    for size in (1, 3, 5, 99):
        asked.clear()
        found = [[pair["id"] for pair in batch] for batch in files.batches(1, size)]
        ids = [pair["id"] for pair in pairs[4:]]
        assert found == [ids[at : at + size] for at in range(0, 8, size)]
        requests.append(sorted(asked))
    assert requests == [requests[0]] * 4


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ({"web_text": "my cat", "caption": "a cat", "tags": ["cat"]}, "my cat"),
        ({"web_text": None, "caption": "a cat", "tags": ["cat"]}, ""),
        ({"web_text": "", "caption": None, "tags": ["cat", "grass"]}, "cat, grass"),
        ({"web_text": None, "caption": None, "tags": None}, ""),
    ],
)
def test_a_training_on_web_texts_alone_sees_nothing_else(pair, expected):
    weights = {"web_text": 1.0, "caption": 0.0, "description": 0.0}
    assert choose_text(pair, weights, np.random.default_rng(0)) == expected
