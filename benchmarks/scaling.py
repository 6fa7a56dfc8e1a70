"""What orchestration costs on more nodes: captioning and training on 1, 2 and 4 logical nodes.

The nodes are raylets of their own on this machine, so real work would not scale here. Work is a
fixed pause per item instead, which any number of nodes can have at once: what is missing to the
ideal is what Ray, the storage and this program cost. Items grow with the nodes.

    python benchmarks/scaling.py [--nodes 1 2 4]

Captioning goes through the whole stage: chunks are read, done, published and sealed. Its pause is a
captioner's, and time counts from where the first chunk is begun, without the start of workers; two
sizes are run, so that the last chunks, which not all nodes have, cancel out. Training goes through
Ray Data and Ray Train with a small model; its pause is each step's. The model's own work and that
of making batches are on top of the pause, on all nodes at once, on this machine's cores.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for the tests' clusters
os.environ["RAY_AUTH_MODE"] = "disabled"

import pyarrow as pa  # noqa: E402
from _common import header, machine, row, verdict  # noqa: E402
from PIL import Image  # noqa: E402

from ray_jobs.caption import CaptionConfig, caption  # noqa: E402
from ray_jobs.cluster import RayConfig, connected  # noqa: E402
from ray_jobs.ingest import IngestConfig, ingest  # noqa: E402
from ray_jobs.ingestion.manifest import Manifest  # noqa: E402
from ray_jobs.storage import Storage  # noqa: E402
from ray_jobs.train import train  # noqa: E402
from ray_jobs.training.config import TrainConfig  # noqa: E402
from rwkv_clip.descriptions import Caption  # noqa: E402
from tests.ray_jobs.clusters import cluster  # noqa: E402
from tests.ray_jobs.small import TRAIN  # noqa: E402

GOAL = 0.9
CHUNK_ROWS = 16
SMALL, LARGE = 48, 240  # items of captioning, for each node
ITEM_SECONDS = 0.05
STEP_ITEMS = 32  # for each node
STEP_SECONDS = 1.6
STEPS, WARM_STEPS = 10, 3


def load() -> Callable[[Sequence[Image.Image]], list[Caption]]:
    """The captioner: a pause for each image."""

    def answer(images: Sequence[Image.Image]) -> list[Caption]:
        time.sleep(ITEM_SECONDS * len(images))
        return [Caption("an item", ("item",))] * len(images)

    return answer


class Pause:
    """Called by the first worker after each step, which the others wait for."""

    def __call__(self, _: Mapping[str, float]) -> None:
        time.sleep(STEP_SECONDS)


def pairs(folder: Path, rows: int) -> Storage:
    """A storage with pairs that have no captions."""
    storage = Storage.at(folder)
    source = {"kind": "emoji", "limit": rows, "unit_rows": 4 * CHUNK_ROWS}
    config = {"source": source, "cpus_per_task": 0.5, "row_group_rows": CHUNK_ROWS}
    ingest(IngestConfig.model_validate(config), storage, "train")
    for part in Manifest.from_storage(storage).parts:
        table = storage.read_table(part.path)
        for name in ("caption", "tags"):
            at = table.schema.get_field_index(name)
            field = table.schema.field(at)
            table = table.set_column(at, field, pa.nulls(len(table), field.type))
        storage.write_table(part.path, table, row_group_size=CHUNK_ROWS)
    return storage


def caption_seconds(folder: Path, nodes: int, items: int) -> float:
    """From the first chunk to the last one; ends the program if a row is lost or double."""
    storage = pairs(folder, items)
    engine = {"kind": "python", "model": "scaling:load", "workers": nodes, "cpus": 1.2}
    config = CaptionConfig.model_validate({"engine": engine, "chunk_rows": CHUNK_ROWS})
    result = caption(config, storage)
    if result.rows != items or result.sources != {"model": items}:
        raise SystemExit(f"captioning lost or doubled rows: {result}")
    return float(storage.read_json("captions/train/record.json")["engine_seconds"])


def caption_efficiency(folder: Path, nodes: int) -> float:
    small = caption_seconds(folder / "small", nodes, SMALL * nodes)
    large = caption_seconds(folder / "large", nodes, LARGE * nodes)
    return (LARGE - SMALL) * ITEM_SECONDS / (large - small)


def train_efficiency(folder: Path, nodes: int) -> float:
    batch = STEP_ITEMS * nodes
    storage = Storage.at(folder)
    source = {"kind": "emoji", "limit": 2 * batch, "unit_rows": batch}
    ingest(IngestConfig.model_validate({"source": source, "cpus_per_task": 0.5}), storage, "train")
    settings = {
        **TRAIN, "batch": batch, "epochs": STEPS / 2, "workers": nodes, "cpus_per_worker": 1.2,
        "checkpoint_steps": 10_000,
    }  # fmt: skip
    result = train(TrainConfig.model_validate(settings), storage, on_record=Pause())
    if [record["step"] for record in result.history] != list(range(1, STEPS + 1)):
        raise SystemExit("training lost or doubled steps")
    # A record's seconds are those since the record before, whose pause is among them.
    return STEP_SECONDS / median(record["seconds"] for record in result.history[WARM_STEPS:])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Orchestration on more logical nodes.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    print(machine())
    print(f"the target is {GOAL:.0%} of the ideal\n")
    header("nodes", "captions/s", "of the ideal", "trained pairs/s", "of the ideal", "")
    for nodes in arguments.nodes:
        with tempfile.TemporaryDirectory() as root, cluster(cpus=1) as made:
            for _ in range(nodes):
                made.node(cpus=2)
            with connected(RayConfig(address=made.address)):
                captioned = caption_efficiency(Path(root, "caption"), nodes)
                trained = train_efficiency(Path(root, "train"), nodes)
        rates = nodes / ITEM_SECONDS * captioned, nodes * STEP_ITEMS / STEP_SECONDS * trained
        cells = [
            cell
            for rate, share in zip(rates, (captioned, trained), strict=True)
            for cell in (f"{rate:.1f}", f"{100 * share:.1f} %")
        ]
        row(f"{nodes}", *cells, verdict(min(captioned, trained) >= GOAL))
    return 0


if __name__ == "__main__":
    sys.exit(main())
