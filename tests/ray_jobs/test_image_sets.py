"""Labelled images in folders and Parquet files, classified as the library classifies them."""

import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import rwkv_clip
from ray_jobs.classification import (
    ClassificationConfig,
    LabelledConfig,
    class_names_of,
    labelled,
    open_sets,
)
from ray_jobs.evaluate import Evaluation, EvaluationConfig, EvaluationResult, _add_search
from ray_jobs.image_sets import ImageSet, embed_set
from ray_jobs.retrieval import CaptionedConfig, RetrievalScore, captioned
from ray_jobs.sources import SourceError
from ray_jobs.sources.base import Unit
from ray_jobs.sources.files import open_file
from ray_jobs.storage import S3Config, Storage
from ray_jobs.training.config import ModelConfig
from rwkv_clip.evaluation import (
    classify,
    retrieval,
    retrieval_ranks,
    top_k,
    zero_shot_classifier,
)
from rwkv_clip.model import create_model, load_checkpoint, save_checkpoint
from tests.ray_jobs.small import TRAIN

COLOURS = {"blue_square": (20, 30, 230), "green_square": (30, 220, 40), "red_square": (230, 30, 20)}
EACH = 8


def picture(colour: tuple[int, int, int], seed: int) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 12, (32, 32, 3))
    pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def pictures(split: int) -> list[tuple[str, bytes]]:
    """Labels and images."""
    return [
        (name, picture(colour, 1000 * split + 100 * at + seed))
        for at, (name, colour) in enumerate(COLOURS.items())
        for seed in range(EACH)
    ]


def write_folder(root: Path, split: int) -> Path:
    for at, (label, image) in enumerate(pictures(split)):
        (root / label).mkdir(parents=True, exist_ok=True)
        (root / label / f"{at:03d}.png").write_bytes(image)
    return root


@pytest.fixture(scope="module")
def storage(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A storage with a checkpoint of a small model."""
    made = Storage.at(tmp_path_factory.mktemp("classification"))
    torch.manual_seed(0)
    model = create_model(ModelConfig.model_validate(TRAIN["model"]).clip_config())
    save_checkpoint(model, made.path("model"))
    return made


def evaluation(storage: Storage, folder: str, *sets: dict[str, Any]) -> Evaluation:
    settings = {"cpus_per_worker": 0.2, "batch": 5, "classification": sets}
    return Evaluation(EvaluationConfig.model_validate(settings), storage, "model", None, folder)


def test_folders_are_classified_as_the_library_does(storage, tmp_path, monkeypatch):
    test = write_folder(tmp_path / "test", 0)
    (test / "red_square" / "broken.png").write_bytes(picture((1, 2, 3), 0)[:50])
    train = write_folder(tmp_path / "train", 1)
    templates = ["a photo of a {}.", "the colour of a {}", "{}"]
    named = {
        "name": "squares",
        "test": {"path": str(test), "unit_rows": 7},
        "templates": templates,
    }
    # This process has neither the time nor the memory for them.
    for work in ("fetch_checkpoint", "linear_probe"):
        monkeypatch.setattr(f"ray_jobs.classification.{work}", None)
    result = evaluation(storage, "folders", {**named, "train": {"path": str(train)}}).run()
    zero_shot, probe = result.classification
    assert (zero_shot["images"], zero_shot["left_out"], zero_shot["classes"]) == (24, 1, 3)
    model = load_checkpoint(storage.path("model")).eval()
    transform = rwkv_clip.image_transform(model.config)
    with torch.inference_mode():
        pixels = transform.batch([image for _, image in pictures(0)]).pixels
        names = [name.replace("_", " ") for name in COLOURS]
        classes = zero_shot_classifier(model, names, templates)
        labels = np.repeat(np.arange(3), EACH)
        expected = classify(model.encode_image(pixels), classes, labels)
    assert zero_shot["top1"] == expected.top1
    assert zero_shot["mean_per_class"] == expected.mean_per_class
    assert (probe["task"], probe["top1"]) == ("linear_probe", 1.0)
    assert result.metrics["squares_linear_probe_top1"] == 1.0
    assert set(result.tested) == set(result.metrics)
    (one,) = {told["test_set"] for told in result.tested.values()}
    assert one == "squares"
    assert result.metrics["zero_shot_average"] == expected.top1
    written = storage.read_json("folders/sets/clip_benchmark/squares-zero_shot.json")
    assert written["task"] == "zeroshot_classification"
    assert written["metrics"]["acc1"] == expected.top1
    again = evaluation(storage, "folders", {**named, "train": {"path": str(train)}})
    assert again.held == again.run() == result


def write_parquet(path: Path, struct: bool = False, names: bool = False) -> Path:
    labels = [list(COLOURS).index(name) for name, _ in pictures(0)]
    images: list[Any] = [image for _, image in pictures(0)]
    if struct:
        images = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"image": images, "label": labels})
    if names:
        features = {"label": {"names": list(COLOURS), "_type": "ClassLabel"}}
        told = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": told})
    pq.write_table(table, path, row_group_size=10)
    return path


def test_parquet_files_carry_names_or_are_given_them(storage, tmp_path):
    plain = write_parquet(tmp_path / "plain.parquet")
    named = write_parquet(tmp_path / "named.parquet", struct=True, names=True)
    sets = [
        {"name": "given", "test": {"path": str(plain)}, "class_names": list(COLOURS)},
        {"name": "carried", "test": {"path": str(named)}},
    ]
    listed = tmp_path / "names.json"
    names = {str(at): name for at, name in enumerate(COLOURS)}
    listed.write_text(json.dumps(names))
    sets.append({"name": "listed", "test": {"path": str(plain)}, "class_names": str(listed)})
    given, carried, read = evaluation(storage, "parquet", *sets).run().classification
    assert given["images"] == carried["images"] == 24
    assert given["top1"] == carried["top1"] == read["top1"]

    # Names that are corrected in their file are asked for anew.
    asked = storage.read_json("parquet/sets/result.json")["run"]["config"]["classification"]
    assert asked[2]["class_names"] == names
    assert evaluation(storage, "parquet", *sets).held is not None
    listed.write_text(json.dumps([f"a {name}" for name in COLOURS]))
    assert evaluation(storage, "parquet", *sets).held is None


@pytest.mark.parametrize(
    ("section", "names", "told"),
    [
        ("classification", ["twice", "twice"], "two sets are called 'twice'"),
        ("retrieval", ["test"], "two sets are called 'test'"),
        ("retrieval", ["Flickr30k (karpathy)"], "should match pattern"),
    ],
)
def test_names_by_which_results_cannot_be_told_apart_are_refused(section, names, told):
    sets = [{"name": name, "test": {"path": "/images"}} for name in names]
    with pytest.raises(ValidationError, match=told):
        EvaluationConfig.model_validate({section: sets})


NAMELESS = [
    (None, r"class_names: the labels are numbers"),
    (["only", "two"], r"class_names: has no name for the label '2'; 2 are named"),
    ({"0": "zero", "1": "one"}, r"class_names: has no name for the label '2'"),
]


def nameless(tmp_path: Path, class_names: object) -> dict[str, Any]:
    path = write_parquet(tmp_path / "plain.parquet")
    return {"name": "squares", "test": {"path": str(path)}, "class_names": class_names}


@pytest.mark.parametrize(("class_names", "told"), NAMELESS)
def test_labels_without_names_are_told(tmp_path, class_names, told):
    config = ClassificationConfig.model_validate(nameless(tmp_path, class_names))
    ((opened, test, _),) = open_sets([config])
    with pytest.raises(SourceError, match=told):
        class_names_of(opened, {"0", "1", "2"}, test)


@pytest.mark.parametrize(
    ("found", "named"),
    [
        ({"1", "2", "3"}, {"1": "cat", "2": "dog", "3": "fox"}),
        ({"001", "010", "002"}, {"001": "cat", "002": "dog", "010": "fox"}),
        ({"00", "02"}, {"00": "cat", "1": "dog", "02": "fox"}),
        ({"0", "1"}, {"0": "cat", "1": "dog", "2": "fox"}),
    ],
)
def test_numbered_folders_have_the_names_in_order(tmp_path, found, named):
    for label in found:
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.png").write_bytes(picture((1, 2, 3), 0))
    settings = {"name": "squares", "test": {"path": str(tmp_path)}}
    names = ["cat", "dog", "fox"]
    for given, refused in ((names, False), (None, True)):
        config = ClassificationConfig.model_validate({**settings, "class_names": given})
        ((opened, test, _),) = open_sets([config])
        if refused:
            with pytest.raises(SourceError, match="the labels are numbers"):
                class_names_of(opened, found, test)
        else:
            assert class_names_of(opened, found, test) == named


def test_an_evaluation_without_names_ends_with_what_is_missing(storage, tmp_path):
    class_names, told = NAMELESS[1]
    with pytest.raises(SourceError, match=told):
        evaluation(storage, "nameless", nameless(tmp_path, class_names)).run()


def test_a_file_of_names_that_is_not_there_is_told(storage, tmp_path):
    told = r"class_names: no-such-file.json cannot be read"
    with pytest.raises(SourceError, match=told):
        evaluation(storage, "nameless", nameless(tmp_path, "no-such-file.json"))


def test_images_outside_of_class_folders_are_told(tmp_path):
    (tmp_path / "loose.png").write_bytes(picture((1, 2, 3), 0))
    with pytest.raises(SourceError, match=r"loose.png is in no folder of a class"):
        labelled(LabelledConfig(path=str(tmp_path)), "evaluation.classification.0.test")


def test_files_of_a_set_may_end_in_either_case_and_begin_with_an_underscore(tmp_path):
    path = tmp_path / "parquet" / "_TEST.PARQUET"
    path.parent.mkdir()
    pq.write_table(pa.table({"image": [picture((1, 2, 3), 0)], "caption": ["a"]}), path)
    for where in (path, path.parent):
        assert captioned(CaptionedConfig(path=str(where)), "set").rows == 1
    for name in ("cat/1.PNG", "cat/_2.png", "_dog/_3.JPG", "cat/._1.png"):
        (tmp_path / "classes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "classes" / name).write_bytes(picture((1, 2, 3), 0))
    images = labelled(LabelledConfig(path=str(tmp_path / "classes")), "set")
    labels = [values for units in images.units for _, values, _ in images.read(units)]
    assert labels == [["_dog"], ["cat"], ["cat"]]


def test_a_broken_file_is_told_by_the_set_s_own_key(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    key = "evaluation.classification.0.test"
    with pytest.raises(SourceError, match=rf"^{key}\.path: .* leave it out of {key}\.path"):
        labelled(LabelledConfig(path=str(tmp_path)), key)


def test_a_missing_column_is_told(tmp_path):
    path = write_parquet(tmp_path / "plain.parquet")
    with pytest.raises(SourceError, match=r"test\.label: .* has no column 'class'"):
        labelled(LabelledConfig(path=str(path), label="class"), "evaluation.classification.0.test")


@pytest.mark.parametrize(
    ("values", "label", "captions"),
    [
        (pa.array([1, 2]), True, False),
        (pa.array(["a", "b"]).dictionary_encode(), True, True),
        (pa.array(["a", None], pa.large_string()), True, True),
        (pa.array([["a"], ["b", "c"]]), False, True),
        (pa.array([b"a", b"b"]), False, False),
        (pa.array([1.5, 2.5]), False, False),
        (pa.array([{"raw": "a"}, {"raw": "b"}]), False, False),
        (pa.array([[{"raw": "a"}], []]), False, False),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else str(value),
)
def test_columns_of_other_types_are_told(tmp_path, values, label, captions):
    path = tmp_path / "set.parquet"
    pq.write_table(pa.table({"image": [picture((1, 2, 3), 0)] * 2, "it": values}), path)
    as_label, as_captions = (
        (lambda: labelled(LabelledConfig(path=str(path), label="it"), "set")),
        (lambda: captioned(CaptionedConfig(path=str(path), captions="it"), "set")),
    )
    for opened, good in ((as_label, label), (as_captions, captions)):
        if good:
            assert opened().rows == 2
        else:
            with pytest.raises(SourceError, match=r"'it' of .* is of type .*; each row takes"):
                opened()


def test_captions_of_no_image_are_told(storage, tmp_path):
    path = tmp_path / "captioned.parquet"
    captions = pa.array([[], [None], None], pa.list_(pa.string()))
    pq.write_table(pa.table({"image": [picture((1, 2, 3), 0)] * 3, "caption": captions}), path)
    one = {"name": "mute", "test": {"path": str(path)}}
    config = EvaluationConfig.model_validate({"cpus_per_worker": 0.2, "retrieval": [one]})
    with pytest.raises(
        SourceError, match=r"test\.captions: column 'caption' has no caption of any"
    ):
        Evaluation(config, storage, "model", None, "mute").run()


def test_published_data_sets_have_their_prompts():
    def config(name: str, **changes: Any) -> ClassificationConfig:
        return ClassificationConfig.model_validate({"name": name, "test": {"path": "x"}, **changes})

    assert len(config("cifar10").prompts()) == 18
    assert config("own").prompts() == ("a photo of a {}.",)
    with pytest.raises(ValidationError, match="the class name goes there"):
        config("own", templates=["a photo"])


def test_captions_of_any_number_are_searched_as_the_library_does(storage, tmp_path):
    images = [image for _, image in pictures(0)]
    captions = [[f"caption {at} {n}" for n in range(1 + at % 3)] for at in range(len(images))]
    images.insert(3, b"no image")
    captions[5].append(" ")
    captions.insert(3, ["a caption of nothing"])
    path = tmp_path / "captioned.parquet"
    pq.write_table(pa.table({"image": images, "caption": captions}), path, row_group_size=7)
    own = {"name": "own", "test": {"path": str(path)}, "template": "a photo of {}."}
    settings = {"cpus_per_worker": 0.2, "batch": 5, "retrieval": [own]}
    config = EvaluationConfig.model_validate(settings)
    result = Evaluation(config, storage, "model", None, "captioned").run()
    (score,) = result.retrieval
    del images[3], captions[3]
    captions[5].pop()
    assert (score["images"], score["left_out"]) == (len(images), 1)
    model = load_checkpoint(storage.path("model")).eval()
    texts = [f"a photo of {text}." for some in captions for text in some]
    owner = np.repeat(np.arange(len(images)), [len(some) for some in captions])
    with torch.inference_mode():
        transform = rwkv_clip.image_transform(model.config)
        image_emb = model.encode_image(transform.batch(images).pixels)
        text_emb = model.encode_text(rwkv_clip.tokenize(texts, model.config.context_length))
        expected = retrieval(image_emb, text_emb, owner).metrics()
    assert score["captions"] == len(texts) == len(owner)
    assert score["found"] == pytest.approx(expected)
    assert result.metrics["own_text_to_image_recall_at_10"] == pytest.approx(
        expected["text_to_image_recall_at_10"]
    )
    written = storage.read_json("captioned/sets/clip_benchmark/own-retrieval.json")
    assert written["task"] == "zeroshot_retrieval"
    check_examples(result, image_emb, text_emb, owner, captions)


def check_examples(
    result: EvaluationResult,
    image_emb: torch.Tensor,
    text_emb: torch.Tensor,
    owner: np.ndarray[Any, Any],
    captions: list[list[str]],
) -> None:
    """The queries, of a file whose fourth row holds no image, are evenly spread and right."""
    texts = [text for some in captions for text in some]
    asked = np.linspace(0, len(texts) - 1, 12).round().astype(int).tolist()
    names = [f"captioned.parquet:{row}" for row in range(len(captions) + 1) if row != 3]
    ranks = retrieval_ranks(image_emb, text_emb, owner).text_to_image
    nearest = top_k(text_emb, image_emb, 5).indices
    assert [(one["text"], one["id"], one["rank"], one["nearest"]) for one in result.examples] == [
        (
            texts[at],
            names[owner[at]],
            int(ranks[at]),
            [names[found] for found in nearest[at].tolist()],
        )
        for at in asked
    ]


def test_examples_are_of_the_first_set_and_of_pairs_before_all():
    result = EvaluationResult({}, 0.0, [], "model", "0", {})
    for name in ("first", "second"):
        score = RetrievalScore(name, 1, 0, 1, {}, {}, [{"id": name}])
        _add_search(result, score, "0")
    assert result.examples == [{"id": "first"}]
    assert all("examples" not in one for one in result.retrieval)


def test_blank_captions_are_none(tmp_path):
    path = tmp_path / "captioned.parquet"
    captions = [["a", "", None], [" \n"], None]
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "caption": captions}), path)
    images = captioned(CaptionedConfig(path=str(path)), "set")
    (units,) = images.units
    assert [values for _, values, _ in images.read(units)] == [["a"], [], []]


def test_of_a_few_images_only_the_units_are_read(tmp_path, monkeypatch):
    folder = labelled(LabelledConfig(path=str(write_folder(tmp_path / "set", 0))), "set")
    file = write_parquet(tmp_path / "set.parquet")
    parquet = labelled(LabelledConfig(path=str(file), unit_rows=5), "set")
    images = [image for _, image in pictures(0)]
    read: list[Unit] = []
    original = ImageSet.read

    def spied(self: ImageSet, units: Sequence[Unit]) -> Iterator[tuple[str, list[str], bytes]]:
        read.extend(units)
        return original(self, units)

    monkeypatch.setattr(ImageSet, "read", spied)
    found = folder.images_of({"blue_square/003.png", "red_square/017.png", "no/such.png"})
    assert found == {"blue_square/003.png": images[3], "red_square/017.png": images[17]}
    assert len(read) == 2
    read.clear()
    found = parquet.images_of({"set.parquet:3", "set.parquet:12", "set.parquet:99"})
    assert found == {"set.parquet:3": images[3], "set.parquet:12": images[12]}
    assert [unit.first for unit in read] == [0, 10]


def test_an_image_that_cannot_be_had_is_left_out(tmp_path, monkeypatch, caplog):
    images = labelled(LabelledConfig(path=str(write_folder(tmp_path, 0)), unit_rows=99), "test")
    (tmp_path / "blue_square" / "003.png").unlink()
    refusals = {
        "004.png": "AWS Error ACCESS_DENIED during GetObject operation: No response body.",
        "005.png": "AWS Error UNKNOWN (HTTP status 403) during GetObject operation: Unable to "
        "parse ExceptionName: InvalidObjectState Message: The operation is not valid for the "
        "object's storage class",
    }

    def refusing(uri: str, s3: S3Config) -> Any:
        if (name := Path(uri).name) in refusals:
            raise OSError(refusals[name])
        return open_file(uri, s3)

    monkeypatch.setattr("ray_jobs.image_sets.open_file", refusing)
    (units,) = images.units
    expected = [
        (f"{label}/{at:03d}.png", [label], image) for at, (label, image) in enumerate(pictures(0))
    ]
    assert list(images.read(units)) == expected[:3] + expected[6:]
    told = {record.message.partition(".png")[0] for record in caplog.records}
    assert told == {f"left out: blue_square/00{at}" for at in (3, 4, 5)}
    refusals["006.png"] = "AWS Error SLOW_DOWN during GetObject operation: Reduce your requests."
    with pytest.raises(SourceError, match=r"^test\.path: \S+/006\.png cannot be read: AWS Error S"):
        list(images.read(units))


def test_a_server_that_is_away_ends_an_evaluation_with_the_file(storage, tmp_path):
    folder = write_folder(tmp_path / "set", 0)
    gone = folder / "blue_square" / "003.png"
    images = labelled(LabelledConfig(path=str(folder)), "set")
    gone.unlink()
    gone.mkdir()  # which Arrow cannot open either, and which is no file that is missing
    config = EvaluationConfig(cpus_per_worker=0.2)
    with pytest.raises(SourceError, match=r"^set\.path: \S+/003\.png cannot be read: [^\n]+$"):
        embed_set("classify", images, config, storage, "model")
