"""Images a second on one core: `ImageTransform` against a plain Pillow and NumPy pipeline.

The plain pipeline decodes in full, resizes, crops and normalises in float32. Both results are
compared before anything is timed (their distance, in 1/255, is in the table); the two are timed in
turn and the medians reported. The goal is that nothing is slower than the plain pipeline.

    python benchmarks/transforms.py [--repeats 9]
"""

import argparse
import io
import statistics
from collections.abc import Callable

import numpy as np
import torch
from _common import machine, seconds, verdict
from PIL import Image

from rwkv_clip.transforms import CLIP_MEAN, CLIP_STD, ImageTransform

CASES = [
    ("JPEG", 500, 375),
    ("JPEG", 640, 480),
    ("JPEG", 1280, 960),
    ("JPEG", 4000, 3000),
    ("PNG", 500, 375),
    ("WEBP", 640, 480),
]
GOAL = 1.0
SIDE = 224
# Draft decoding keeps twice the resolution of the output; see rwkv_clip/transforms.py.
LARGEST_MEAN_DISTANCE = 1.0


def encoded(kind: str, width: int, height: int) -> bytes:
    """Smooth shapes with some noise, compressed as photographs are."""
    y, x = np.mgrid[:height, :width] / height
    rng = np.random.default_rng(0)
    channels = [np.sin(x * (20 + 7 * c)) * np.cos(y * (15 + 5 * c)) * 80 + 128 for c in range(3)]
    pixels = np.stack(channels, 2) + rng.normal(0, 6, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def plain(data: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    size = (SIDE * width // min(image.size), SIDE * height // min(image.size))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    image = image.crop((left, top, left + SIDE, top + SIDE))
    pixels = np.asarray(image).astype(np.float32) / 255
    pixels = (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    evaluate, train = ImageTransform(SIDE), ImageTransform(SIDE, train=True)
    std = torch.tensor(CLIP_STD)[:, None, None]
    torch.set_num_threads(1)
    times = {}
    print(machine())
    print(
        f"{'images':<18}{'eval/s':>8}{'train/s':>9}{'plain/s':>9}{'times':>7}{'mean':>7}{'max':>6}"
    )
    for kind, width, height in CASES:
        data = encoded(kind, width, height)
        distance = (evaluate(data) - plain(data)).abs() * std * 255
        if distance.mean() > LARGEST_MEAN_DISTANCE:
            raise SystemExit(f"{kind} {width}x{height}: pixels differ; nothing was timed")
        works: list[Callable[[], object]] = [
            lambda d=data: evaluate(d),
            lambda d=data: train(d, 0),
            lambda d=data: plain(d),
        ]
        rounds = [[seconds(work) for work in works] for _ in range(repeats)]
        ours, training, theirs = (statistics.median(c) for c in zip(*rounds, strict=True))
        speeds = f"{1 / ours:>8.0f}{1 / training:>9.0f}{1 / theirs:>9.0f}"
        distances = f"{distance.mean():>7.2f}{distance.max():>6.1f}"
        name = f"{kind} {width}x{height}"
        times[name] = theirs / ours
        print(f"{name:<18}{speeds}{times[name]:>7.2f}{distances}")
    worst = min(times, key=times.__getitem__)
    met = verdict(times[worst] >= GOAL)
    print(f"least: {times[worst]:.2f} times plain for {worst}, at least {GOAL}: {met}")


if __name__ == "__main__":
    main()
