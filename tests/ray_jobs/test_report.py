"""The report's page, with every section that a run can fill."""

import html
import io
import re
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_jobs.caption import CaptionResult
from ray_jobs.classification import ClassificationScore
from ray_jobs.evaluate import EvaluationResult, OpenedSets
from ray_jobs.ingestion.manifest import Manifest, Part
from ray_jobs.pairs import pair_table
from ray_jobs.report import Report, StageTime, collect, examples, render
from ray_jobs.report.collect import data_uri
from ray_jobs.report.figures import loss_figure, rate_figure, validation_figure
from ray_jobs.retrieval import CaptionedConfig, RetrievalConfig, RetrievalScore, captioned
from ray_jobs.stages import _draw
from ray_jobs.storage import Storage, _Local
from ray_jobs.summary import scores
from ray_jobs.synthesis.describer import Describing
from ray_jobs.synthesize import SynthesisResult
from ray_jobs.tracking.runs import StageRun
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


NO_SETS = OpenedSets([], [])


def picture(red: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (red, 30, 30)).save(out, "JPEG")
    return out.getvalue()


def written(number: int, **changes: Any) -> dict[str, Any]:
    """A row of descriptions; kept at the first attempt unless changed."""
    empty = dict.fromkeys(Describing.schema.names)
    row = {"id": f"p{number}", "description": f"a red square, number {number}"}
    return {**empty, **row, "description_source": "llm", "attempts": 1, **changes}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Four pairs with descriptions: kept, kept at the second attempt, refused, without sources."""
    storage = Storage.at(tmp_path_factory.mktemp("report"))
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


@pytest.fixture(scope="module")
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
    found = asdict(RetrievalScore("flickr30k", 1000, 1, 5000, RECALLS, {}, []))
    query = {"id": "p1", "text": WEB, "nearest": ["p0", "p1"], "similarity": [0.5, 0.4]}
    return EvaluationResult(
        {"pairs": 4, **RECALLS},
        0.0025,
        [query],
        "train/step-000000002",
        "0",
        {},
        [asdict(shot), asdict(probe)],
        [found],
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
    return TrainResult(last, 2, 3, 6.0, history, validations, last, 1, 2)


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
            incidents=[INCIDENT, INCIDENT],
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
        examples=examples(storage, manifest, NO_SETS, found),
        **collect(storage, manifest, synthesized=True),
    )


@pytest.fixture(scope="module")
def page(storage: Storage, manifest: Manifest) -> str:
    return render(whole_report(storage, manifest))


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_samples_show_their_sources_and_what_the_guard_said(page):
    assert page.count('class="sample"') == 4
    seen = text_of(page)
    assert "✓ kept description a red square, number 0" in seen
    assert "✓ kept at attempt 2 description a red square, number 1" in seen
    refused = "✗ refused: unsupported (bicycle) refused a red bicycle in its place a square"
    assert f"{refused} web text buy" in seen
    assert "✗ refused: none: empty in its place red, square" in seen
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
    anew = "An engine was started anew; the work in hand was done again: engine died: out of memory"
    assert seen.count(anew) == 1
    twice = (
        "Engines were started anew 2 times; the work in hand was done again: engine died: out of"
    )
    assert twice in seen


def test_scores_are_shown_for_each_set_and_task(page):
    seen = text_of(page)
    assert "by chance it is among the first ten in 0.25 % of the queries" in seen
    assert "text to image 12.5 % 25.0 % 37.5 % 21 with web text alone 12.5 %" in seen
    assert "margin, points +0.0 +0.0 +0.0" in seen
    flickr = "flickr30k 5,000 captions of 1,000 images (1 left out); R@1 by chance 0.10 %"
    assert f"{flickr} text to image 12.5 % 25.0 % 37.5 % 21" in seen
    cifar = "cifar10 100 images (2 left out) of 10 classes; by chance 10.00 %"
    unpublished = "the class names are not those of the published numbers"
    assert f"{cifar}; {unpublished} zero shot 50.0 % 87.5 % 62.5 %" in seen
    pets = "pets 90 images of 37 classes; by chance 2.70 %"
    assert f"{pets} linear probe 50.0 % 90.0 % 70.0 %" in seen
    assert re.findall(r'class="big">([\d.]+)', page) == "37.5 37.5 12.5 12.5 50.0 70.0".split()
    assert seen.count("R@1, R@5 and R@10 are the shares of queries") == 1


def test_the_first_lines_tell_the_main_score(storage, manifest):
    report = whole_report(storage, manifest)
    found = replace(evaluation(), metrics={}, chance=0.0)
    by = "with web text alone"

    def page_of(evaluated: EvaluationResult | None) -> str:
        return text_of(render(replace(report, evaluation=evaluated, examples=())))

    learnt = "A model learnt from 4 pairs of image and text in 6.0 s."
    for evaluated, told in (
        (evaluation(), f"ten results in 37.5 % of the queries (by chance 0.25 %; {by} 37.5 %)."),
        (found, f"at the first place in 12.5 % of the queries (by chance 0.10 %; {by} 12.5 %)."),
        (
            replace(found, retrieval=[]),
            f"cifar10, it finds the class of 50.0 % (by chance 10.00 %; {by} 50.0 %).",
        ),
    ):
        assert re.search(rf"{learnt} (In|Of) [\w ,]* {re.escape(told)} models:", page_of(evaluated))
    assert f"{learnt} models:" in page_of(None)


def surpassed() -> EvaluationResult:
    """A baseline without pairs: of the sets, a twentieth behind `evaluation`, and pets' absent."""
    found = evaluation()
    (flickr,), (cifar, _) = found.retrieval, found.classification
    behind = {name: value - 0.05 for name, value in flickr["found"].items()}
    cifar |= {name: cifar[name] - 0.05 for name in ("top1", "top5", "mean_per_class")}
    return replace(
        found, retrieval=[{**flickr, "found": behind}], classification=[cifar], chance=0.0
    )


def test_sets_have_the_margin_over_the_baseline_where_no_pairs_are_searched(storage, manifest):
    report = whole_report(storage, manifest)
    alone = replace(evaluation(), metrics={}, chance=0.0)
    seen = text_of(render(replace(report, evaluation=alone, baseline=surpassed(), examples=())))
    by = "with web text alone"
    margin = "margin, points +5.0 +5.0 +5.0"
    for direction in ("text to image", "image to text"):
        recalls = f"{direction} 12.5 % 25.0 % 37.5 % 21"
        assert f"{recalls} {by} 7.5 % 20.0 % 32.5 % {margin}" in seen
    classified = "zero shot 50.0 % 87.5 % 62.5 %"
    assert f"{classified} {by} 45.0 % 82.5 % 57.5 % {margin}" in seen
    assert seen.count("margin") == 3, "the baseline has no linear probe of pets"
    assert seen.count("R@1, R@5 and R@10 are the shares of queries") == 1


def test_the_terminal_has_all_scores_with_the_margin_over_the_baseline():
    (first, *_, chance) = lines = scores(evaluation(), surpassed())
    assert first.split() == "text to image R@1 12.5 % R@5 25.0 % R@10 37.5 %".split()
    assert chance.split() == "by chance R@10 0.2 %".split()
    at = next(at for at, line in enumerate(lines) if line.startswith("flickr30k text to image"))
    told = [" ".join(line.split()) for line in lines]
    assert told[at + 1 : at + 3] == [
        "flickr30k text to image (baseline) R@1 7.5 % R@5 20.0 % R@10 32.5 %",
        "flickr30k text to image (margin) R@1 +5.0 R@5 +5.0 R@10 +5.0",
    ]
    assert "cifar10 zero shot (margin) top-1 +5.0 top-5 +5.0 per class +5.0" in told
    assert not any(line.startswith(("pets linear probe (", "text to image (")) for line in told)
    assert len({line.index("@1 ") for line in lines if "@1 " in line}) == 1, "columns stand aligned"


def test_training_its_validation_and_its_cost_are_shown(page):
    seen = text_of(page)
    guessing = "where guessing gives 3.466"  # the logarithm of 32
    assert f"2 steps of 32 pairs in 6.0 s. The loss ends at 2.500, {guessing}" in seen
    waiting = "25.0 % of the time was spent waiting for data"
    left_out = "3 samples without a readable image or a text to train on were left out"
    skipped = "and 1 steps that had no others were skipped"
    assert f"{waiting}; {left_out}, {skipped}. 2 checkpoints were not validated" in seen
    assert "the one registered is train/step-000000002" in seen
    assert page.count("<svg") == 3
    assert "train 6.0 s 10.7 pairs/s together 6.0 s" in seen
    assert "at most 7.3 GB of memory" in seen
    assert "train 4 2 3 7 no text, 1 unreadable" in seen


def test_numbers_stay_whole_and_five_pictures_in_a_row_on_a_narrow_page(page):
    assert "37.5\N{NO-BREAK SPACE}%" in page
    assert not re.search(r"\d %", page)
    assert ".found { display: grid; grid-template-columns: repeat(5, " in page
    assert page.count('<div class="found">') == 1


def test_the_curves_take_the_colour_of_the_page_for_what_is_black(page):
    curves = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for curve in curves:
        # Texts have no style of their own: they are filled as the whole is.
        assert curve.startswith('<svg fill="currentColor" role="img" aria-label="')
        assert not re.search(r"#000000|black", curve)
        assert "stroke: var(--line-1)" in curve
    assert len(curves) == 3
    for colour in ("--line-1", "--line-2"):
        assert len(re.findall(f"{colour}: #", page)) == 2, "of a light page, and of a dark one"


@pytest.mark.parametrize("figure", [loss_figure, rate_figure, validation_figure])
def test_a_single_record_can_be_seen_at_a_whole_step(figure):
    made = training()
    records = made.validations if figure is validation_figure else made.history
    drawn = figure([{**records[1], "step": 240.0}])
    (axes,) = drawn.axes
    assert all(line.get_marker() == "o" for line in axes.lines)
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [240]
    many = [{**records[0], "step": step} for step in range(100)]
    (axes,) = figure(many).axes
    assert all(line.get_marker() == "" for line in axes.lines)


def test_the_curves_of_the_report_are_left_with_the_run_too():
    class Run(StageRun):
        def __init__(self) -> None:
            super().__init__(None, None)
            self.left: dict[str, str] = {}

        def figure(self, name: str, figure: Any) -> None:
            self.left[name] = figure.axes[0].get_ylabel()

    run, unvalidated = Run(), Run()
    _draw(run, training())
    _draw(unvalidated, replace(training(), validations=[]))
    curves = {"loss.png": "contrastive loss", "rate.png": "pairs per second"}
    assert run.left == {**curves, "validation.png": "validation R@10, %"}
    assert unvalidated.left == curves


def test_texts_are_compared_before_and_after(page):
    seen = text_of(page)
    assert re.search(r"web text 4 \d\.\d", seen)
    assert re.search(r"caption 3 2\.0", seen)
    assert re.search(r"description 4 \d\.\d", seen)
    assert "Texts before and after synthesis Of all 4 pairs." in seen


def test_texts_that_were_not_all_read_are_told(storage, manifest):
    report = whole_report(storage, manifest)
    (part,) = manifest.parts
    large = replace(manifest, parts=(part, replace(part, name="part-00001", rows=100_000)))
    seen = text_of(render(replace(report, data=[large], synthesis=None)))
    assert "Texts Of the first 4 pairs." in seen


def test_search_examples_are_pictures_and_mark_the_right_one(page):
    assert page.count('class="query"') == 1
    assert re.findall(r"[✓✗] 0\.\d\d", text_of(page)) == ["✗ 0.50", "✓ 0.40"]
    assert page.count("the right one") == 1
    pictures = re.findall(r'src="data:image/webp;base64,[^"]+"', page)
    assert len(pictures) == 4 + 1 + 2


def test_without_pairs_the_queries_are_of_the_first_captioned_set(storage, manifest, tmp_path):
    images = [picture(red) for red in (0, 50, 100, 150)]
    columns = {"image": images, "caption": ["a", "b", "c", "d"]}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet", row_group_size=2)
    test = CaptionedConfig(path=str(tmp_path / "set.parquet"))
    config = RetrievalConfig(name="flickr30k", test=test)
    sets = OpenedSets([], [(config, captioned(test, "set"))])
    query = {"id": "set.parquet:1", "text": "b", "similarity": [0.5, 0.4, 0.3], "rank": 2}
    query["nearest"] = ["set.parquet:3", "set.parquet:1", "set.parquet:9"]
    found = replace(evaluation(), metrics={}, chance=0.0, examples=[query])
    (shown,) = shown_queries = examples(storage, None, sets, found)
    assert shown.wanted == data_uri(images[1])
    gone = data_uri(b"")
    assert shown.found == [
        (data_uri(images[3]), 0.5, False),
        (data_uri(images[1]), 0.4, True),
        (gone, 0.3, False),
    ]
    report = whole_report(storage, manifest)
    page = render(replace(report, evaluation=found, examples=shown_queries))
    assert "Queries taken evenly from flickr30k, not chosen" in text_of(page)
    assert page.count("the right one") == 1
    assert examples(storage, None, sets, replace(found, examples=[])) == []


def test_a_part_is_opened_once_for_all_of_its_pictures(tmp_path, monkeypatch):
    storage, opened = Storage.at(tmp_path), list[str]()

    def open_input_file(filesystem: Any, path: str) -> Any:
        opened.append(path)
        return super(_Local, filesystem).open_input_file(path)

    pairs = [{"id": f"p{at}", "image": picture(9 * at), "web_text": WEB} for at in range(20)]
    parts = []
    for at, groups in ((0, (4, 4, 2)), (10, (4, 4, 2)), (20, ())):
        part = Part(f"part-{at}", f"pairs/train/{at}.parquet", sum(groups), groups, 1, "0")
        storage.write_table(part.path, pair_table(pairs[at : at + 10]), row_group_size=4)
        parts.append(part)
    monkeypatch.setattr(_Local, "open_input_file", open_input_file, raising=False)
    shown = (0, 3, 9, 14, 18)
    query = {"id": "p0", "text": WEB, "similarity": [0.5] * len(shown)}
    query["nearest"] = [f"p{at}" for at in shown]
    manifest = Manifest("train", tuple(parts), {}, {}, "0", "0")
    found = replace(evaluation(), examples=[query])
    (example,) = examples(storage, manifest, NO_SETS, found)
    assert [told for told, _, _ in example.found] == [data_uri(pairs[at]["image"]) for at in shown]
    assert opened == [storage.path(part.path) for part in parts[:2]]


def test_a_query_that_was_missed_tells_the_place_of_its_picture(storage, manifest):
    told = "its image is at place 1,234"

    def page_of(**changes: Any) -> str:
        found = evaluation()
        found.examples[0].update(changes)
        report = whole_report(storage, manifest)
        return text_of(
            render(replace(report, examples=examples(storage, manifest, NO_SETS, found)))
        )

    missed = {"id": "p2", "rank": 1234}
    assert told in page_of(**missed)
    assert "its image is" not in page_of(rank=2)
    assert "its image is" not in page_of(id="p2")  # which an older release did not note


def test_an_image_that_cannot_be_decoded_is_an_empty_square():
    noise = io.BytesIO()
    Image.effect_noise((256, 256), 90).save(noise, "JPEG")
    for data in (noise.getvalue()[:4000], b"no image"):
        assert data_uri(data).startswith("data:image/webp;base64,")


def test_a_run_without_anything_but_training_has_a_page_too(storage, manifest):
    plain = Report("a run", {"train": {"batch": 32}}, {}, [manifest], training(), [])
    seen = text_of(render(plain))
    assert "2 steps of 32 pairs" in seen
    for absent in ("Retrieval", "Classification", "Descriptions", "Captions", "GB of memory"):
        assert absent not in seen
