"""What the endpoint adds to the model: throughput at saturation, and a lone request's latency.

    python benchmarks/serving.py
    RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 python benchmarks/serving.py

These are measured in turn in one run, on the same cores, each round all of them: the model's own
batches in a bare loop; the endpoint; and a plain web server around the same model, which takes one
request at a time. A lone request is also sent to the least that Ray Serve can make of it, an
ingress and a deployment without batches or checks: what that adds is Serve's. Clients run in a
process of their own, which shares the cores. Vectors of all servers are compared with the model's
before anything is timed.
"""

import argparse
import asyncio
import base64
import io
import json
import logging
import multiprocessing as mp
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import ray
import torch
from _common import header, machine, refuse_unless, row, verdict
from _plain_server import on_serve
from PIL import Image
from ray import serve

import rwkv_clip
from rwkv_clip.model import RWKVCLIP, create_model, load_checkpoint, save_checkpoint
from serve.app import build
from serve.command import fewer_hops, start
from serve.config import ServeFile

WORDS = "a photo of two small dogs that run along the beach behind a red ball at sunset".split()
HA_PROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
TARGETS = {"image": 0.90, "text": 0.70}
LATENCY_MS = 10.0
OURS, PLAIN, LEAST = "the endpoint", "the plain server", "Serve's least"
LONE_TURNS, LONE_SECONDS, LONE_CALLS = 12, 1.0, 20


def texts(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, 12)) for _ in range(count)]


def photographs(count: int) -> list[bytes]:
    """JPEGs of 320 x 240 with the content of smooth pictures and some grain."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)
        grain = generator.normal(0, 6, (240, 320, 3))
        noisy = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=85)
        files.append(out.getvalue())
    return files


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bodies(tower: str, items: int, count: int) -> list[bytes]:
    """Requests of so many items each."""
    if tower == "text":
        inputs: list[str] = texts(items * count)
    else:
        inputs = [
            "data:image/jpeg;base64," + base64.b64encode(file).decode()
            for file in photographs(items * count)
        ]
    return [
        json.dumps({"input": inputs[at : at + items], "encoding_format": "base64"}).encode()
        for at in range(0, items * count, items)
    ]


async def _load(
    address: str, requests: list[bytes], clients: int, seconds: float
) -> tuple[int, float, list[float]]:
    """Clients that each send the next request when they have an answer: answers, and latencies."""
    latencies: list[float] = []
    headers = {"content-type": "application/json"}
    limits = httpx.Limits(max_connections=clients)
    end = time.perf_counter() + seconds

    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as http:

        async def client(number: int) -> None:
            at = number
            while time.perf_counter() < end:
                began = time.perf_counter()
                body = requests[at % len(requests)]
                answer = await http.post(f"{address}/v1/embeddings", content=body, headers=headers)
                answer.raise_for_status()
                latencies.append(time.perf_counter() - began)
                at += clients

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return len(latencies), time.perf_counter() - began, latencies


def _generate(pipe: Any) -> None:
    """The process of the clients."""
    while (task := pipe.recv()) is not None:
        pipe.send(asyncio.run(_load(*task)))


@contextmanager
def generator() -> Iterator[Callable[..., tuple[int, float, list[float]]]]:
    """Load from another process."""
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_generate, args=(theirs,), daemon=True)
    process.start()

    def load(*task: Any) -> tuple[int, float, list[float]]:
        ours.send(task)
        answer: tuple[int, float, list[float]] = ours.recv()
        return answer

    yield load
    ours.send(None)
    process.join()


@contextmanager
def endpoint(folder: Path, batch: int, threads: int) -> Iterator[str]:
    """Ours."""
    tower = {"cpus": 0.1, "threads": threads, "batch": batch}
    settings = {
        "model": str(folder),
        "port": free_port(),
        "host": "0.0.0.0" if HA_PROXY else "127.0.0.1",
        "image": tower,
        "text": tower,
    }
    config = ServeFile.model_validate({"serve": settings})
    fewer_hops()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        start(config.serve)
        serve.run(build(config), name="rwkv-clip")
        yield f"http://127.0.0.1:{config.serve.port}"
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


@contextmanager
def plain_server(folder: Path, threads: int) -> Iterator[str]:
    """uvicorn around the same model, without batches."""
    port = free_port()
    command = [
        sys.executable, str(Path(__file__).with_name("_plain_server.py")), str(folder), str(port),
        str(threads),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{address}/healthz", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def bare(model: RWKVCLIP, tower: str, batch: int, seconds: float) -> float:
    """The model's items a second, of inputs that are there already, in batches."""
    if tower == "text":
        inputs = rwkv_clip.tokenize(texts(batch), model.config.context_length)
        encode: Callable[[torch.Tensor], torch.Tensor] = model.encode_text
    else:
        transform = rwkv_clip.image_transform(model.config)
        inputs = torch.stack([transform(file) for file in photographs(batch)])
        encode = model.encode_image
    with torch.inference_mode():
        encode(inputs)
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            encode(inputs)
            done += batch
        return done / (time.perf_counter() - began)


def bare_latency(model: RWKVCLIP, tower: str, repeats: int) -> float:
    """The median milliseconds of the model called by itself: what was sent to a vector."""
    transform = rwkv_clip.image_transform(model.config)
    times = []
    with torch.inference_mode():
        for text, file in zip(texts(repeats), photographs(repeats), strict=True):
            began = time.perf_counter()
            if tower == "text":
                model.encode_text(rwkv_clip.tokenize([text], model.config.context_length))
            else:
                model.encode_image(transform(file)[None])
            times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def verify(name: str, address: str, model: RWKVCLIP) -> None:
    """Compare a server's vectors with the model's, which also warms it up."""
    inputs = texts(5)
    files = photographs(3)
    uris = ["data:image/jpeg;base64," + base64.b64encode(file).decode() for file in files]
    asked = {"input": [*inputs, *uris], "encoding_format": "base64"}
    answer = httpx.post(f"{address}/v1/embeddings", json=asked, timeout=120, trust_env=False)
    answer.raise_for_status()
    vectors = [base64.b64decode(one["embedding"]) for one in answer.json()["data"]]
    found = torch.from_numpy(np.stack([np.frombuffer(one, np.float32) for one in vectors]))
    transform = rwkv_clip.image_transform(model.config)
    with torch.inference_mode():
        text = model.encode_text(rwkv_clip.tokenize(inputs, model.config.context_length))
        image = model.encode_image(torch.stack([transform(file) for file in files]))
    error = float((found - torch.cat([text, image])).abs().max())
    refuse_unless(f"{name}'s vectors against the model's", error, 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="RWKV-CLIP-B-32")
    parser.add_argument("--towers", nargs="+", choices=("text", "image"), default=["text", "image"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--items", type=int, nargs="+", default=[1, 8], help="in a request")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    print(
        f"{options.model}, batches of {options.batch}, "
        + ("HAProxy" if HA_PROXY else "Serve's proxy")
    )
    with tempfile.TemporaryDirectory() as name, generator() as load:
        folder = Path(name) / "model"
        torch.manual_seed(0)
        save_checkpoint(create_model(options.model), folder)
        model = load_checkpoint(folder).eval()
        with (
            endpoint(folder, options.batch, options.threads) as ours,
            plain_server(folder, options.threads) as plain,
        ):
            addresses = {OURS: ours, PLAIN: plain}
            for told, address in addresses.items():
                verify(told, address, model)
            measured = [
                measure(tower, model, ours, plain, load, options) for tower in options.towers
            ]
            # Its processes wake a hundred times a second, as all of Ray's: only where it is asked.
            serve.run(on_serve(str(folder), options.threads), name="plain", route_prefix="/plain")
            addresses[LEAST] = f"{ours}/plain"
            verify(LEAST, addresses[LEAST], model)
            alone = {tower: lone(tower, model, addresses, load) for tower in options.towers}
    print()
    header("", "items", "clients", "ours/s", "of the model", "ms", "plain server/s", "ms")
    for one in measured:
        for cells in one.rows:
            row(one.tower, *cells)
    print()
    header("", "target", "HAProxy" if HA_PROXY else "Serve's proxy")
    for one in measured:
        row(
            f"{one.tower}s at saturation",
            f"{100 * TARGETS[one.tower]:.0f} % of the model",
            one.saturation,
        )
    for tower, added in alone.items():
        more = added[OURS]
        met = f"{more:.1f}, {verdict(more <= LATENCY_MS)} ({LEAST} {added[LEAST]:.1f})"
        row(f"a lone {tower}", f"{LATENCY_MS:.0f} ms above the model", met)


@dataclass(frozen=True)
class Measured:
    """A tower's rows, and what became of its target."""

    tower: str
    rows: list[list[str]]
    saturation: str


def measure(
    tower: str,
    model: RWKVCLIP,
    ours: str,
    plain: str,
    load: Callable[..., tuple[int, float, list[float]]],
    options: argparse.Namespace,
) -> Measured:
    """Measure a tower."""
    cases = [(items, clients) for items in options.items for clients in options.clients]
    requests = {items: bodies(tower, items, 64) for items in options.items}
    alone: list[float] = []
    rates: dict[tuple[str, int, int], list[float]] = {}
    medians: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(options.rounds):
        alone.append(bare(model, tower, options.batch, options.seconds))
        for items, clients in cases:
            # Without batches a request of several items takes its items one by one.
            asked = {"ours": ours, "plain": plain} if items == 1 else {"ours": ours}
            for told, address in asked.items():
                count, took, times = load(address, requests[items], clients, options.seconds)
                rates.setdefault((told, items, clients), []).append(items * count / took)
                medians.setdefault((told, items, clients), []).append(statistics.median(times))
    base = statistics.median(alone)
    print(f"{tower}: the model alone {base:.1f}/s in batches", flush=True)
    best = 0.0
    rows = []
    for items, clients in cases:
        cells = [f"{items}", f"{clients}"]
        for told in ("ours", "plain"):
            case = (told, items, clients)
            if case not in rates:
                cells += ["", ""]
                continue
            rate = statistics.median(rates[case])
            cells.append(f"{rate:.1f}")
            if told == "ours":
                best = max(best, rate / base)
                cells.append(f"{100 * rate / base:.0f} %")
            cells.append(f"{1000 * statistics.median(medians[case]):.1f}")
        rows.append(cells)
    return Measured(tower, rows, f"{100 * best:.0f} %, {verdict(best >= TARGETS[tower])}")


def lone(
    tower: str,
    model: RWKVCLIP,
    addresses: Mapping[str, str],
    load: Callable[..., tuple[int, float, list[float]]],
) -> dict[str, float]:
    """The median milliseconds that each server adds to a call of the model.

    A shared machine's speed changes within seconds by more than what is looked for. So all are
    measured in turns of a second, and compared within each turn.
    """
    requests = bodies(tower, 1, 64)
    alone: list[float] = []
    more: dict[str, list[float]] = {name: [] for name in addresses}
    for _ in range(LONE_TURNS):
        alone.append(bare_latency(model, tower, LONE_CALLS))
        for name, address in addresses.items():
            _, _, times = load(address, requests, 1, LONE_SECONDS)
            more[name].append(1000 * statistics.median(times) - alone[-1])
    print(f"a lone {tower}: the model alone {statistics.median(alone):.1f} ms", flush=True)
    added = {}
    for name, values in more.items():
        lower, added[name], upper = statistics.quantiles(values, n=4)
        print(
            f"a lone {tower}: {name} adds {added[name]:.1f} ms (half of the turns {lower:.1f} to "
            f"{upper:.1f})",
            flush=True,
        )
    return added


if __name__ == "__main__":
    main()
