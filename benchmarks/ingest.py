"""Images a second decoded, augmented, tokenized and delivered to a trainer, against a DataLoader.

Both read the same photographs as JPEG of web size with a text each, crop and flip them to 224
pixels at random, tokenize the text, and deliver batches to this process with the same number of
workers, where they end as normalised float32. The baseline is PyTorch's DataLoader over a data set
as it is usually written: Pillow decodes the whole image, then crops, resizes and flips, and workers
normalise. It holds its files in memory; ours reads them from Parquet, sends uint8 and normalises
here, as the trainer does. A second baseline has our image transform inside the DataLoader, which
parts what the transform gains from what the delivery does.

The photographs are cut at random from the two that scikit-learn carries. That pixels agree with the
transform's definition is what the tests of `rwkv_clip.transforms` hold; here the number of images
and the ids are compared before any figure is printed.

    python benchmarks/ingest.py [--workers 2] [--images 1024] [--batches 24]
"""

import argparse
import io
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import header, machine, row, verdict
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import rwkv_clip
from ray_jobs.cluster import RayConfig, connected
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.storage import Storage
from ray_jobs.training.batches import BatchMaker, Images, PairFiles, stream
from ray_jobs.training.loop import normalise
from ray_jobs.training.plan import DataPlan
from rwkv_clip.memory import keep_freed_memory
from rwkv_clip.model.config import named_config
from rwkv_clip.transforms import CLIP_MEAN, CLIP_STD, image_transform

GOAL = 1.5
# The last of them is a row that sizing.py looks for.
PLAIN, TRANSFORM = "DataLoader, plain Pillow", "DataLoader, our transform"
OURS = "Ray Data, our transform"
BATCH, SIZE, CONTEXT = 128, 224, 77
WARM_BATCHES = 4
Files = list[tuple[str, bytes, str]]
"""Of each photograph its name, its bytes and its text."""

_MEAN = torch.tensor(CLIP_MEAN).view(3, 1, 1)
_STD = torch.tensor(CLIP_STD).view(3, 1, 1)


def text_of(at: int) -> str:
    """The text of a photograph, for all who read it."""
    return f"photograph number {at} of a temple or a flower, as the web describes it"


def write_photographs(folder: Path, count: int) -> None:
    """Cuts of two photographs, 640 x 480, as JPEG files with a JSONL file of texts."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    lines = []
    for at in range(count):
        photograph = photographs[at % len(photographs)]
        width = int(rng.integers(280, 560))
        height = width * 3 // 4
        left = int(rng.integers(0, photograph.width - width + 1))
        top = int(rng.integers(0, photograph.height - height + 1))
        cut = photograph.crop((left, top, left + width, top + height)).resize((640, 480))
        cut.save(folder / f"{at:05d}.jpg", quality=90)
        text = text_of(at)
        lines.append(f'{{"file_name": "{at:05d}.jpg", "id": "{at}", "text": "{text}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))


class Photographs(Dataset[dict[str, Any]]):
    """A data set as it is usually written."""

    def __init__(self, files: Files, ours: bool) -> None:
        self.files = files
        config = named_config("RWKV-CLIP-B-32")
        self.transform = image_transform(config, train=True) if ours else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> dict[str, Any]:
        name, data, text = self.files[at]
        rng = np.random.default_rng()
        if self.transform is not None:
            pixels = self.transform(data, rng)
        else:
            pixels = plain_transform(data, rng)
        return {"pixels": pixels, "tokens": rwkv_clip.tokenize([text], CONTEXT)[0], "id": name}


def plain_transform(data: bytes, rng: np.random.Generator) -> Tensor:
    """Random crop, resize, flip and normalisation with Pillow and PyTorch."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    area = image.width * image.height * rng.uniform(0.7, 1.0)
    aspect = math.exp(rng.uniform(math.log(0.8), math.log(1.25)))
    width = min(round(math.sqrt(area * aspect)), image.width)
    height = min(round(math.sqrt(area / aspect)), image.height)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    cut = image.crop((left, top, left + width, top + height))
    cut = cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1).float().div(255)
    return (pixels - _MEAN) / _STD


def loader_rate(
    files: list[tuple[str, bytes, str]], workers: int, batches: int, ours: bool
) -> float:
    """Images a second that a DataLoader delivers."""
    loader = DataLoader(
        Photographs(files, ours),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
        prefetch_factor=4,
    )

    def endless() -> Iterator[Mapping[str, Any]]:
        while True:
            yield from loader

    return rate(endless(), batches)


def ray_rate(storage: Storage, workers: int, batches: int) -> float:
    """Images a second that Ray Data delivers, as to a training worker."""
    files = PairFiles.of(storage)
    plan = DataPlan(files.flat_row_groups, BATCH, 2 * workers, 4, 0)
    images = Images.of(named_config("RWKV-CLIP-B-32"))
    maker = BatchMaker(files, plan, plan.lanes_of(0, 1), images, CONTEXT)
    arrived = stream(maker, 0, batches + WARM_BATCHES + 8, 1.0, workers)

    mean, scale = (255 * _MEAN)[None], (1 / (255 * _STD))[None]

    def normalised() -> Iterator[Mapping[str, Any]]:
        for batch in arrived:
            pixels = torch.from_numpy(batch["pixels"])
            yield {"id": batch["id"], "pixels": normalise(pixels, mean, scale)}

    return rate(normalised(), batches)


def rate(arriving: Iterator[Mapping[str, Any]], batches: int) -> float:
    """Images a second after the first batches."""
    for _ in range(WARM_BATCHES):
        next(arriving)
    start = time.perf_counter()
    for _ in range(batches):
        batch = next(arriving)
        if len(batch["id"]) != BATCH or len(set(batch["id"])) != BATCH:
            raise SystemExit("a batch has lost or doubled images")
    return batches * BATCH / (time.perf_counter() - start)


def main() -> int:
    """Measure in turn and print."""
    parser = argparse.ArgumentParser(description="Ray Data against a DataLoader.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    workers, batches = arguments.workers, arguments.batches
    rates: dict[str, list[float]] = {name: [] for name in (PLAIN, TRANSFORM, OURS)}
    print(machine())
    keep_freed_memory()  # as a training worker does; DataLoader's workers inherit it
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "photographs")
        folder.mkdir()
        write_photographs(folder, arguments.images)
        files = [
            (path.stem, path.read_bytes(), text_of(int(path.stem)))
            for path in sorted(folder.glob("*.jpg"))
        ]
        storage = Storage.at(Path(root, "storage"))
        with connected(RayConfig(num_cpus=workers, object_store_gb=1.0)):
            source = {"kind": "folder", "path": str(folder)}
            ingest(IngestConfig.model_validate({"source": source}), storage, "train")
            for _ in range(arguments.repeats):
                rates[OURS].append(ray_rate(storage, workers, batches))
                for name, ours in ((PLAIN, False), (TRANSFORM, True)):
                    rates[name].append(loader_rate(files, workers, batches, ours))
    cores = min(workers, os.cpu_count() or 1)
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name}: in all {', '.join(f'{value:.0f}' for value in values)} images/s")
    print()
    header("", "images/s a core", "of the DataLoader", "target", "")
    for name, median in medians.items():
        share = median / medians[PLAIN]
        told = f"{share:.2f}" if name != PLAIN else ""
        target = (f"{GOAL}", verdict(share >= GOAL)) if name == OURS else ("", "")
        row(name, f"{median / cores:.1f}", told, *target)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
