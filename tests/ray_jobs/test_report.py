"""The report's page, with every section that a run can fill."""

import io
import re
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from ray_jobs.caption import CaptionResult
from ray_jobs.classification import ClassificationScore
from ray_jobs.evaluate import EvaluationResult
from ray_jobs.ingest import Manifest, Part
from ray_jobs.pairs import pair_table
from ray_jobs.report import Report, StageTime, collect, examples, render
from ray_jobs.report.collect import data_uri
from ray_jobs.retrieval import RetrievalScore
from ray_jobs.storage import Storage
from ray_jobs.synthesis.describer import Describing
from ray_jobs.synthesize import SynthesisResult
from ray_jobs.train import TrainResult

WEB = "buy <b>now</b> & save"
INCIDENT = {"kind": "engine_died", "chunk": "chunk-00000", "detail": "out of memory"}
RECALLS = {
    f"{direction}_{score}": value
    for direction in ("text_to_image", "image_to_text")
    for score, value in {
        "recall_at_1": 0.125,
        "recall_at_5": 0.25,
        "recall_at_10": 0.375,
        "median_rank": 21.0,
    }.items()
}


def picture(red: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (red, 30, 30)).save(out, "JPEG")
    return out.getvalue()


def written(number: int, **changes: Any) -> dict[str, Any]:
    """A row of descriptions; kept at the first attempt unless changed."""
    empty = dict.fromkeys(Describing.schema.names)
    row = {"id": f"p{number}", "description": f"a red square, number {number}"}
    return {**empty, **row, "description_source": "llm", "attempts": 1, **changes}


@pytest.fixture
def storage(tmp_path: Any) -> Storage:
    """Four pairs with descriptions: kept, kept at the second attempt, refused, without sources."""
    storage = Storage.at(tmp_path)
    pairs = [
        {"id": f"p{at}", "image": picture(50 * at), "web_text": WEB, "caption": "a square"}
        for at in range(3)
    ]
    pairs.append({"id": "p3", "image": picture(150), "web_text": WEB, "tags": ["red", "square"]})
    storage.write_table("pairs/train/part-00000.parquet", pair_table(pairs))
    rows = [
        written(0),
        written(1, attempts=2),
        written(
            2,
            description="a square",
            description_source="fallback: unsupported",
            attempts=2,
            guard_reason="unsupported",
            guard_unsupported=["bicycle"],
            refused_text="a red bicycle",
        ),
        written(3, description="red, square", description_source="none: empty", attempts=0),
    ]
    table = pa.Table.from_pylist(rows, schema=Describing.schema)
    storage.write_table("descriptions/train/part-00000.parquet", table)
    storage.write_json("descriptions/train/manifest.json", {})
    return storage


@pytest.fixture
def manifest() -> Manifest:
    part = Part("part-00000", "pairs/train/part-00000.parquet", 4, (4,), 1000, "0")
    duplicates = {"id": 0, "image": 2, "text": 3}
    return Manifest("train", (part,), {"no_text": 7, "unreadable": 1}, duplicates, "0", "0")


def evaluation() -> EvaluationResult:
    shot = ClassificationScore(
        "cifar10", "zero_shot", 100, 2, 10, 0.5, 0.875, 0.625, "top1", False, {}
    )
    probe = ClassificationScore(
        "pets", "linear_probe", 90, 0, 37, 0.5, 0.9, 0.7, "mean_per_class", None, {}
    )
    found = RetrievalScore("flickr30k", 1000, 1, 5000, RECALLS, {})
    query = {"id": "p1", "text": WEB, "nearest": ["p0", "p1"], "similarity": [0.5, 0.4]}
    return EvaluationResult(
        {"pairs": 4, **RECALLS},
        0.0025,
        [query],
        "train/step-000000002",
        "0",
        {},
        [asdict(shot), asdict(probe)],
        [asdict(found)],
    )


def training() -> TrainResult:
    record = {"loss": 2.5, "logit_scale": 14.3, "pairs_per_second": 10.0}
    history = [
        {**record, "step": step, "seconds": 3.0, "data_wait_share": 0.25} for step in (1.0, 2.0)
    ]
    validations = [
        {"step": record["step"], **{f"validation_{name}": value for name, value in RECALLS.items()}}
        for record in history
    ]
    last = "train/step-000000002"
    return TrainResult(last, 2, 3, 6.0, history, validations, last)


def whole_report(storage: Storage, manifest: Manifest) -> Report:
    found = evaluation()
    return Report(
        title="a run & its report",
        configuration={"train": {"batch": 32}},
        versions={"torch": "2"},
        data=[manifest],
        train=training(),
        stages=[StageTime("train", 6.0, 64, "pairs")],
        captioning=CaptionResult(
            4, {"vlm": 3, "none: image": 1}, [INCIDENT], 2.0, "a-vision-model"
        ),
        synthesis=SynthesisResult(
            rows=4,
            sources={"llm": 2, "fallback: unsupported": 1, "none: empty": 1},
            refusals={"unsupported": 1},
            retried=2,
            alternatives=0,
            incidents=[INCIDENT],
            seconds=5.0,
            model="a-language-model",
            prompt="3",
        ),
        evaluation=found,
        baseline=found,
        baseline_train=training(),
        baseline_texts="with web text alone",
        registered="models:/rwkv-clip/1: the first one",
        peak_memory=7_300_000_000,
        examples=examples(storage, manifest, found),
        **collect(storage, manifest, synthesized=True),
    )


@pytest.fixture
def page(storage: Storage, manifest: Manifest) -> str:
    return render(whole_report(storage, manifest))


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_samples_show_their_sources_and_what_the_guard_said(page):
    assert page.count('class="sample"') == 4
    seen = text_of(page)
    assert "✓ kept a red square, number 0" in seen
    assert "✓ kept at attempt 2 a red square, number 1" in seen
    assert "✗ refused: unsupported (bicycle) a square" in seen
    assert "refused a red bicycle web text buy" in seen
    assert "✗ refused: none: empty red, square" in seen
    assert "tags red, square" in seen
    assert "caption none" in seen


def test_web_texts_are_shown_as_they_are_and_never_as_markup(page):
    assert "<b>now" not in page
    assert page.count("buy &lt;b&gt;now&lt;/b&gt; &amp; save") >= 5  # four samples and a query


def test_what_the_models_wrote_is_counted(page):
    seen = text_of(page)
    assert "a-language-model, prompt 3: 50.0 % of 4 descriptions passed the guard" in seen
    assert "fallback: unsupported 1 25.0 %" in seen
    assert "a-vision-model captioned 4 pairs" in seen
    assert "none: image 1 25.0 %" in seen
    assert seen.count("engine died: out of memory") == 2


def test_scores_are_shown_for_each_set_and_task(page):
    seen = text_of(page)
    assert "Text to image 12.5 % 25.0 % 37.5 % 21 with web text alone 12.5 %" in seen
    assert "margin +0.0 points" in seen
    assert "flickr30k image to text 1,000, 1 left out 5,000 12.5 % 25.0 % 37.5 % 21" in seen
    assert "cifar10 zero shot 100, 2 left out 10 50.0 % 87.5 % 62.5 %" in seen
    assert "pets linear probe 90 37 50.0 % 90.0 % 70.0 %" in seen
    assert seen.count("class names are not those of the published numbers") == 1


def test_training_its_validation_and_its_cost_are_shown(page):
    seen = text_of(page)
    assert "2 steps of 32 pairs in 6.0 s; loss 2.500" in seen
    assert "25.0 % of the time was spent waiting for data; 3 samples could not be decoded" in seen
    assert "the one registered is train/step-000000002" in seen
    assert page.count("<svg") == 2
    assert "train 6.0 s 10.7 pairs/s" in seen
    assert "at most 7.3 GB of memory" in seen
    assert "train 4 2 3 7 no text, 1 unreadable" in seen


def test_texts_are_compared_before_and_after(page):
    seen = text_of(page)
    assert re.search(r"web text 4 \d\.\d", seen)
    assert re.search(r"caption 3 2\.0", seen)
    assert re.search(r"description 4 \d\.\d", seen)


def test_search_examples_are_pictures_and_mark_the_right_one(page):
    assert page.count('class="query"') == 1
    assert re.findall(r"[✓✗] ?(?:right )?0\.\d\d", text_of(page)) == ["✗ 0.50", "✓ right 0.40"]
    pictures = re.findall(r'src="data:image/png;base64,[^"]+"', page)
    assert len(pictures) == 4 + 1 + 2


def test_an_image_that_cannot_be_decoded_is_an_empty_square():
    noise = io.BytesIO()
    Image.effect_noise((256, 256), 90).save(noise, "JPEG")
    for data in (noise.getvalue()[:4000], b"no image"):
        assert data_uri(data).startswith("data:image/png;base64,")


def test_a_run_without_anything_but_training_has_a_page_too(storage, manifest):
    plain = Report("a run", {"train": {"batch": 32}}, {}, [manifest], training(), [])
    seen = text_of(render(plain))
    assert "2 steps of 32 pairs" in seen
    for absent in ("Retrieval", "Classification", "Descriptions", "Captions", "GB of memory"):
        assert absent not in seen
