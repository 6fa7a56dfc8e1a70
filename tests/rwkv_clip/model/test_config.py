"""Configurations are checked when made, and come back from JSON."""

import json
import re

import pytest

from rwkv_clip.model import CONFIGS, CLIPConfig, create_model, named_config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_comes_back_from_json(name):
    config = named_config(name)
    read = CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert read == config
    assert read.name == name
    assert hash(read) == hash(config)


def test_what_transforms_and_tokenizers_read_is_at_hand():
    config = named_config("RWKV-CLIP-B-16")
    assert config.image_size == 224
    assert config.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.image_std == (0.26862954, 0.26130258, 0.27577711)
    assert (config.context_length, config.vocab_size, config.embed_dim) == (77, 49408, 640)
    assert config.image.grid == 14
    assert named_config("RWKV-CLIP-Tiny").image_size == 64


@pytest.mark.parametrize(
    ("tower", "key", "value", "says"),
    [
        ("image", "depth", 0, "image.depth: got 0, takes a whole number from 1 to 1000"),
        ("image", "depth", 2.5, "image.depth: got 2.5, takes a whole number from 1 to 1000"),
        ("image", "depth", True, "image.depth: got True, takes a whole number from 1 to 1000"),
        ("image", "patch_size", "32", "image.patch_size: got '32', takes a whole number"),
        ("image", "heads", 7, "image.heads: got 7, takes a divisor of image.embed_dim"),
        ("image", "heads", 128, "image.heads: got 128, takes heads whose size, 640 / 128 = 5"),
        ("text", "heads", 4, "text.heads: got 4, takes heads whose size, 640 / 4 = 160"),
        ("image", "drop_path", 1.0, "image.drop_path: got 1.0, takes a number from 0 to below 1"),
        ("image", "drop_path", float("nan"), "image.drop_path: got nan"),
        ("text", "dropout", -0.1, "text.dropout: got -0.1, takes a number from 0 to below 1"),
        ("image", "class_token", "yes", "image.class_token: got 'yes', takes true or false"),
        ("image", "mean", [0.5], "image.mean: got [0.5], takes three numbers"),
        ("image", "std", [1, 1, 0], "image.std: got (1.0, 1.0, 0.0), takes three numbers above"),
        ("text", "embed_dim", 320, "text.embed_dim: got 320, takes the image encoder's 640"),
        ("text", "layers", 3, "unknown text.layers; text takes depth, heads"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_it_takes(tower, key, value, says):
    data = named_config("RWKV-CLIP-B-32").to_dict()
    data[tower] |= {key: value}
    with pytest.raises(ValueError, match=re.escape(says)):
        CLIPConfig.from_dict(data)


def test_missing_keys_are_all_told():
    data = named_config("RWKV-CLIP-Tiny").to_dict()
    del data["image"]["heads"], data["image"]["depth"]
    with pytest.raises(ValueError, match=r"missing image\.depth, image\.heads"):
        CLIPConfig.from_dict(data)


def test_unknown_keys_at_the_top_are_refused():
    data = named_config("RWKV-CLIP-Tiny").to_dict() | {"optimizer": "adam"}
    with pytest.raises(ValueError, match="unknown optimizer; the configuration takes image, text"):
        CLIPConfig.from_dict(data)


def test_an_unknown_model_lists_those_there_are():
    with pytest.raises(ValueError, match="no model is named 'ViT-B-32'; takes RWKV-CLIP-B-32, "):
        create_model("ViT-B-32")
