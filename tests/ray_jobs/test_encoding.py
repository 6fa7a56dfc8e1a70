"""Where encoders compute, and what they fetch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray.train import Checkpoint

from ray_jobs.classification import PromptEncoder
from ray_jobs.embed import EmbedConfig, PartEncoder
from ray_jobs.encoding import (
    EncoderConfig,
    ImageEncoder,
    TextsError,
    check_texts,
    fetch_checkpoint,
)
from ray_jobs.evaluate import Encoder, EvaluationConfig
from ray_jobs.image_sets import SetEncoder
from ray_jobs.storage import S3Config, Storage, StorageConfig
from ray_jobs.training.batches import PairFiles
from ray_jobs.training.config import ValidationConfig
from ray_jobs.training.validation import Validator
from rwkv_clip.model import CheckpointError, create_model, save_checkpoint
from tests.serve.small import drawn_model, picture, small_config

NOTHING: Any = None  # to encode


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_was_given_no_gpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a node with GPUs, which Ray does not hide from tasks that hold none.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = create_model(small_config())
    encoder = ImageEncoder(model, EncoderConfig(), gpus_key="embed.gpus_per_worker")
    assert encoder.device.type == "cpu"


@pytest.mark.usefixtures("ray_cluster")
def test_a_compiled_model_embeds_batches_of_any_size_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The default backend takes a minute to write its programs, for the same graphs.
    compiler = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    plain, compiled = (
        ImageEncoder(
            drawn_model(), EncoderConfig(precision="bfloat16", compile=compiled), gpus_key="none"
        )
        for compiled in (False, True)
    )
    images = [picture(seed) for seed in range(3)]
    for many in (3, 1, 2):
        one, other = (each.encode_images(images[:many], range(many)) for each in (plain, compiled))
        assert one[1] == other[1] == [*range(many)]
        torch.testing.assert_close(one[0], other[0], atol=2e-3, rtol=0)
        texts = ["a heart", "two dogs", ""][:many]
        torch.testing.assert_close(
            plain.encode_texts(texts), compiled.encode_texts(texts), atol=2e-3, rtol=0
        )


def test_what_validates_is_of_the_pairs_that_are_searched(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    texts = {"web_text": ["a", "b", "c"], "caption": [None, None, "a heart"]}
    table = pa.table({**texts, "description": [None] * 3, "tags": [None] * 3})
    storage.write_table("pairs/test/part-0.parquet", table)
    files = PairFiles(storage, ("pairs/test/part-0.parquet",), ((3,),))
    check_texts(files, "caption", "train.validation.text", 3)
    check_texts(files, "caption", "evaluation.text")
    with pytest.raises(TextsError, match=r"train\.validation\.text: none of the first 2 pairs"):
        check_texts(files, "caption", "train.validation.text", 2)


def validate(storage: Storage) -> None:
    task = Validator(ValidationConfig(gpus=1), NOTHING, "train")
    task(Checkpoint.from_directory(storage.path("model")), step=1)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("encode", "key"),
    [
        (validate, "train.validation.gpus"),
        (lambda held: PartEncoder(held, "model", EmbedConfig()), "embed.gpus_per_worker"),
        (
            lambda held: Encoder(held, "model", NOTHING, EvaluationConfig()),
            "evaluation.gpus_per_worker",
        ),
        (
            lambda held: SetEncoder(held, "model", NOTHING, EvaluationConfig(), template=None),
            "evaluation.gpus_per_worker",
        ),
        (lambda held: PromptEncoder(held, "model", EncoderConfig()), "evaluation.gpus_per_worker"),
    ],
    ids=["validation", "embed", "pairs", "sets", "prompts"],
)
def test_a_gpu_that_pytorch_does_not_see_is_told_by_the_key_that_asked_for_it(
    encode: Callable[[Storage], object], key: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage.at(tmp_path)
    save_checkpoint(create_model(small_config()), tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
    with pytest.raises(RuntimeError, match=rf"^{key}: PyTorch sees no GPU on this node"):
        encode(storage)


def test_of_a_checkpoint_elsewhere_the_model_alone_is_fetched(s3, tmp_path):
    made = create_model(small_config())
    save_checkpoint(made, tmp_path)
    storage = Storage(StorageConfig(uri="s3://runs/x", s3=S3Config(endpoint=s3.endpoint)))
    for file in tmp_path.iterdir():
        storage.write_bytes(f"train/step-1/{file.name}", file.read_bytes())
    storage.write_bytes("train/step-1/optimizer.safetensors", b"gigabytes")
    s3.refuses = lambda _, path: "optimizer" in path
    fetched = fetch_checkpoint(storage, "train/step-1").state_dict()
    assert all(torch.equal(fetched[key], value) for key, value in made.state_dict().items())
    assert not s3.refused
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors and config\.json"):
        fetch_checkpoint(storage, "train/step-2")
