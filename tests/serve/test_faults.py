"""What goes wrong costs those alone who sent it, and the endpoint answers the next one."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import pack
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
import torch
from openai import OpenAI
from PIL import Image

from rwkv_clip import tokenize
from tests.ray_jobs.killing import wait_until
from tests.serve.small import data_uri, picture

KIND = {"Content-Type": "application/json"}


def bomb(side: int) -> bytes:
    """A PNG of a few kB whose pixels would take `side` squared bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    header = pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def animated() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def turned() -> tuple[bytes, bytes]:
    """A photograph that its tag turns, and the same as it is to be seen."""
    upright = Image.open(io.BytesIO(picture(5, (40, 30))))
    tag = Image.Exif()
    tag[0x0112] = 6
    files = []
    for image, exif in ((upright.rotate(90, expand=True), tag), (upright, Image.Exif())):
        out = io.BytesIO()
        image.save(out, "PNG", exif=exif)
        files.append(out.getvalue())
    return files[0], files[1]


@pytest.fixture(autouse=True)
def the_next_good_request_succeeds(client: httpx.Client):
    yield
    answer = client.post("/v1/embeddings", json={"input": ["a heart", data_uri(picture(0))]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("side", [9_000, 30_000])
def test_a_bomb_is_never_decoded(client, side):
    answer = client.post("/v1/embeddings", json={"input": data_uri(bomb(side))})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")


def test_bombs_that_are_too_many_together_are_told_so(client):
    """Each is of less than may be sent, and a whole one of a few kB takes a second."""
    items = [data_uri(bomb(6_300))] * 18
    answer = client.post("/v1/embeddings", json={"input": items})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (413, "too_many_pixels")
    assert (error["param"], error["index"]) == ("input.16", 16)
    answer = client.post("/v1/embeddings", json={"input": items, "on_error": "item"})
    assert answer.status_code == 200, answer.text
    codes = [one["error"]["code"] for one in answer.json()["data"]]
    assert codes == ["broken_image"] * 16 + ["too_many_pixels"] * 2


def test_unusual_images_are_embedded(client):
    sideways, upright = turned()
    files = [picture(0, (1, 1)), animated(), picture(1, (300, 2)), sideways, upright]
    answer = client.post("/v1/embeddings", json={"input": [data_uri(file) for file in files]})
    assert answer.status_code == 200, answer.text
    vectors = np.array([one["embedding"] for one in answer.json()["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[3], vectors[4], atol=1e-5)


def test_five_bad_items_of_two_hundred(client, model):
    bad = {
        3: "  ",
        50: data_uri(b"<svg/>", "svg+xml"),
        77: data_uri(picture(1, (50, 50), "JPEG")[:800], "jpeg"),
        120: data_uri(bomb(9_000)),
        199: {"type": "video"},
    }
    items = [bad.get(at, f"text {at}") for at in range(200)]
    whole = client.post("/v1/embeddings", json={"input": items})
    assert (whole.status_code, whole.json()["error"]["param"]) == (400, "input.3")
    answer = client.post("/v1/embeddings", json={"input": items, "on_error": "item"})
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert [at for at, one in enumerate(data) if one["object"] == "error"] == sorted(bad)
    good = [at for at in range(200) if at not in bad]
    texts = tokenize([items[at] for at in good], model.config.context_length)
    with torch.inference_mode():
        expected = model.encode_text(texts).numpy()
    found = np.array([data[at]["embedding"] for at in good])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sent", [0.0, 0.5, 1.0])
def test_a_client_that_goes_away(endpoint, sent):
    place = urlsplit(endpoint)
    body = b'{"input": "' + b"word " * 2000 + b'"}'
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {place.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(5):
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode() + body[: int(len(body) * sent)])


class Load:
    """Clients that ask for the same text again and again, each answer compared."""

    def __init__(self, endpoint: str, expected: np.ndarray) -> None:
        self.client = OpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=20)
        self.expected = expected
        self.stop = threading.Event()
        self.answered: Counter[int] = Counter()

    def run(self, number: int) -> None:
        while not self.stop.is_set():
            told = self.client.embeddings.create(model="small", input="a red heart")
            np.testing.assert_allclose(told.data[0].embedding, self.expected, atol=1e-5)
            self.answered[number] += 1

    def wait_for_more(self, clients: int) -> None:
        enough = self.answered.total() + 5 * clients
        wait_until(lambda: self.answered.total() >= enough, "more answers")


def replicas(deployment: str) -> list[psutil.Process]:
    title = f"ServeReplica:rwkv-clip:{deployment}"
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if title in " ".join(process.cmdline())
    ]


def answered(client: httpx.Client) -> dict[str, float]:
    """How many requests each status has answered, once all that were answered are counted."""
    own = r'ray_rwkv_clip_requests_total\{[^}]*route="/metrics"[^}]*\} .*'
    text = ""
    seen: set[str] = set()

    def told() -> int:
        nonlocal text
        text = client.get("/metrics").text
        seen.update(re.findall(own, text))
        return len(seen)

    wait_until(lambda: told() >= 3, "numbers that were told after what they count")
    counted: Counter[str] = Counter()
    pattern = r'ray_rwkv_clip_requests_total\{[^}]*route="/v1/embeddings"[^}]*\} (.*)'
    for sample in re.finditer(pattern, text):
        status = re.search(r'status="(\d+)"', sample[0])
        assert status is not None
        counted[status[1]] += float(sample[1])
    return counted


def test_a_killed_replica_costs_no_request(endpoint, client, model):
    with torch.inference_mode():
        expected = model.encode_text(tokenize(["a red heart"], model.config.context_length))[0]
    before = answered(client)
    clients = 4
    load = Load(endpoint, expected.numpy())
    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(load.run, number) for number in range(clients)]
        try:
            load.wait_for_more(clients)
            (replica,) = replicas("text")
            os.kill(replica.pid, signal.SIGKILL)
            load.wait_for_more(clients)
            (another,) = replicas("text")
            assert another.pid != replica.pid
        finally:
            load.stop.set()
        for one in running:
            one.result()
    after = answered(client)
    assert after["200"] - before["200"] == load.answered.total()
    assert after["500"] == before["500"]


def test_too_much_at_once_is_told_so_and_memory_stays_bounded(endpoint):
    # Little to read and much to do, so that it is the tower that falls behind.
    quick = {"input": [data_uri(picture(0))] * 100}
    # And much to hold; 1.7 MB each.
    large = {"input": [data_uri(picture(seed, (380, 380))) for seed in range(3)]}
    processes = [*replicas("image"), *replicas("ingress")]

    def storm(body: dict[str, Any], requests: int) -> set[int]:
        """What was answered to more than can be taken."""
        content = json.dumps(body)
        # One client for all threads: to make one takes longer than many a request.
        many = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=None))
        with many as client, ThreadPoolExecutor(60) as threads:
            answers = list(
                threads.map(
                    lambda _: client.post(
                        f"{endpoint}/v1/embeddings", content=content, headers=KIND
                    ),
                    range(requests),
                )
            )
        for answer in answers:
            if answer.status_code == 429:
                assert answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["code"] == "overloaded"
        return {answer.status_code for answer in answers}

    def held() -> int:
        return sum(process.memory_full_info().uss for process in processes)

    assert storm(large, 120) in ({200}, {200, 429})
    first = held()
    assert storm(quick, 60) == {200, 429}
    assert storm(large, 120) in ({200}, {200, 429})
    wait_until(lambda: held() < first + 150e6, "what was held to be given back")


def test_no_request_that_the_schema_allows_makes_the_server_fail(endpoint, tmp_path):
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{endpoint}/openapi.json",
        "--checks", "not_a_server_error", "--max-examples", "25", "--seed", "1",
        "--exclude-path", "/metrics", "--generation-database", "none",
    ]  # fmt: skip
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
