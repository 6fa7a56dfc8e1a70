"""`/v1/classify`: probabilities by the model's own scale."""

import numpy as np
import pytest
import torch

from rwkv_clip import image_transform
from rwkv_clip.evaluation import zero_shot_classifier
from tests.serve.small import data_uri, picture

LABELS = ["dog", "red heart", "temple"]
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]


def test_probabilities_are_the_librarys(client, model):
    image = picture(1)
    body = {"image": data_uri(image), "labels": LABELS, "templates": TEMPLATES}
    answer = client.post("/v1/classify", json=body)
    assert answer.status_code == 200, answer.text
    with torch.inference_mode():
        classes = zero_shot_classifier(model, LABELS, TEMPLATES)
        pixels = image_transform(model.config, exif_orientation=True)(image)[None]
        logits = model.logit_scale.exp() * model.encode_image(pixels)[0] @ classes.T
    expected = logits.softmax(0).numpy()
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(np.argsort(-expected))
    for one in data:
        assert one["label"] == LABELS[one["index"]]
        assert one["probability"] == pytest.approx(expected[one["index"]], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"labels": []}, 400, "labels"),
        ({"labels": ["a"] * 10_000}, 413, "labels"),
        ({"labels": ["a", " "]}, 400, "labels.1"),
        ({"templates": ["no place"]}, 400, "templates.0"),
        ({"labels": ["a" * 90_000], "templates": ["{}" * 45_000]}, 413, "labels.0"),
        ({"labels": ["a" * 60_000] * 20, "templates": ["{}"] * 20}, 413, "labels.7"),
        ({"image": "????"}, 400, "image"),
        ({"image": data_uri(picture(1, (90, 90), "JPEG")[:900], "jpeg")}, 400, "image"),
    ],
)
def test_a_bad_request_is_told_by_its_key(client, changes, status, param):
    body = {"image": data_uri(picture(1)), "labels": LABELS, **changes}
    answer = client.post("/v1/classify", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
