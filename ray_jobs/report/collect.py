"""What the report shows, gathered from the storage after the stages are done."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ray_jobs.beside import DESCRIPTIONS, Beside, lay_over, written
from ray_jobs.caption import CaptionResult
from ray_jobs.evaluate import EvaluationResult, OpenedSets
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.report.texts import TextStatistics, text_statistics
from ray_jobs.storage import Storage
from ray_jobs.synthesize import SynthesisResult
from ray_jobs.train import TrainResult

_STATISTICS_ROWS = 50_000
_KEPT_SAMPLES, _REFUSED_SAMPLES = 8, 6
_PICTURE = 160  # pixels: twice what is shown, for fine screens
_TEXTS = ["id", "web_text", "caption", "tags", "description"]
_WRITTEN = [
    "description_source",
    "attempts",
    "guard_reason",
    "guard_unsupported",
    "refused_text",
]


@dataclass(frozen=True)
class StageTime:
    """How long a stage took, and how much it did.

    Attributes:
        name: the stage's.
        seconds: of work, in all runs together.
        count: of what it did.
        unit: what was counted.
    """

    name: str
    seconds: float
    count: int
    unit: str


@dataclass(frozen=True)
class Sample:
    """A pair with what was written for it."""

    image: str
    sources: Mapping[str, Any]
    written: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A query and the pictures that were found for it.

    Attributes:
        text: what was asked.
        wanted: the query's own picture, as a data URI.
        found: the nearest pictures with their similarity, and whether it is the wanted one.
        rank: of the wanted one among all; None where an older release did not note it.
    """

    text: str
    wanted: str
    found: Sequence[tuple[str, float, bool]]
    rank: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        peak_memory: of all processes together, in bytes; 0 where nobody looked.
        read: how many pairs, the first ones, statistics and samples are of.
    """

    title: str
    configuration: Mapping[str, Any]
    versions: Mapping[str, str]
    data: Sequence[Manifest]
    train: TrainResult
    stages: Sequence[StageTime]
    captioning: CaptionResult | None = None
    synthesis: SynthesisResult | None = None
    evaluation: EvaluationResult | None = None
    baseline: EvaluationResult | None = None
    baseline_train: TrainResult | None = None
    baseline_texts: str = ""
    registered: str = ""
    peak_memory: int = 0
    read: int = 0
    statistics: Sequence[TextStatistics] = ()
    samples: Sequence[Sample] = ()
    examples: Sequence[Example] = field(default_factory=tuple)


def collect(storage: Storage, train_data: Manifest, synthesized: bool) -> dict[str, Any]:
    """Statistics and samples of the training data; `Report`'s fields of those names."""
    texts = _texts(storage, train_data, synthesized)
    statistics = [
        found
        for kind in ("web_text", "caption", "description")
        if (found := text_statistics(kind, texts[kind].to_pylist()))
    ]
    samples = _samples(storage, train_data, texts) if synthesized else []
    return {"read": len(texts), "statistics": statistics, "samples": samples}


def examples(
    storage: Storage, test: Manifest | None, sets: OpenedSets, evaluation: EvaluationResult
) -> list[Example]:
    """The evaluation's queries, with pictures: of the pairs, or of the first captioned set."""
    wanted = {
        one for example in evaluation.examples for one in (example["id"], *example["nearest"])
    }
    pictures: dict[str, str] = {}
    if test is not None:
        pictures = _pictures(storage, test, sorted(wanted))
    elif wanted:
        (_, images), *_ = sets.captioned
        there = images.images_of(wanted)
        pictures = {one: data_uri(there.get(one, b"")) for one in wanted}
    return [
        Example(
            text=example["text"],
            wanted=pictures[example["id"]],
            found=[
                (pictures[one], similarity, one == example["id"])
                for one, similarity in zip(example["nearest"], example["similarity"], strict=True)
            ],
            rank=example.get("rank"),
        )
        for example in evaluation.examples
    ]


def _texts(storage: Storage, manifest: Manifest, synthesized: bool) -> pa.Table:
    """The first pairs' texts, with what synthesis wrote."""
    tables, rows = [], 0
    beside = written(storage, manifest.name)
    for part in manifest.parts:
        table = storage.read_table(part.path, columns=_TEXTS)
        table = lay_over(storage, table, beside, part.name, 0, _TEXTS)
        if synthesized:
            file = Beside(DESCRIPTIONS, manifest.name).part_file(part.name)
            described = storage.read_table(file, columns=_WRITTEN)
            for name in _WRITTEN:
                table = table.append_column(name, described[name])
        tables.append(table)
        rows += len(table)
        if rows >= _STATISTICS_ROWS:
            break
    return pa.concat_tables(tables)


def _samples(storage: Storage, manifest: Manifest, texts: pa.Table) -> list[Sample]:
    """Pairs spread evenly over those that were kept and over those that fell back."""
    kept = np.asarray(pc.equal(texts["description_source"], "llm").fill_null(False))
    chosen = [
        *_spread(np.flatnonzero(kept), _KEPT_SAMPLES),
        *_spread(np.flatnonzero(~kept), _REFUSED_SAMPLES),
    ]
    rows = texts.take(pa.array(chosen, pa.int64())).to_pylist()
    pictures = _pictures(storage, manifest, [row["id"] for row in rows])
    return [
        Sample(
            pictures[row["id"]],
            {name: row[name] for name in ("web_text", "caption", "tags")},
            {name: row[name] for name in ("description", *_WRITTEN)},
        )
        for row in rows
    ]


def _spread(positions: Any, count: int) -> list[int]:
    if not len(positions):
        return []
    at = np.linspace(0, len(positions) - 1, min(count, len(positions))).round().astype(int)
    return [int(positions[one]) for one in at]


def _pictures(storage: Storage, manifest: Manifest, ids: Sequence[str]) -> dict[str, str]:
    """Small pictures of these pairs, as data URIs."""
    wanted = pa.array(ids, pa.string())
    found: dict[str, str] = {}
    for part in manifest.parts:
        if len(found) == len(set(ids)):
            break
        with storage.parquet(part.path) as file:
            there = np.flatnonzero(pc.is_in(file.read(["id"])["id"], wanted))
            groups = np.searchsorted(np.cumsum(part.row_groups), there, side="right")
            for group in np.unique(groups):  # of which one is in memory
                rows = file.read_row_group(group, ["id", "image"])
                rows = rows.filter(pc.is_in(rows["id"], wanted))
                found |= {row["id"]: data_uri(row["image"]) for row in rows.to_pylist()}
    return found


def data_uri(image: bytes) -> str:
    """An encoded image as a small WebP in a data URI; an empty square if it cannot be decoded."""
    try:
        with Image.open(BytesIO(image)) as opened:
            opened.draft("RGB", (_PICTURE, _PICTURE))
            small = opened.convert("RGBA")
    except Exception:
        # Whatever a decoder raises: where ingest looked at headers only, nobody has met it before.
        small = Image.new("RGBA", (_PICTURE, _PICTURE))
    small.thumbnail((_PICTURE, _PICTURE))
    out = BytesIO()
    small.save(out, "WEBP")
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
