"""The model computes what the published code computes, forwards and backwards."""

import json
import zlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rwkv_clip.model import blocks, create_model


def _clip_loss(image_embedding, text_embedding, scale):
    logits = scale * F.normalize(image_embedding, dim=-1) @ F.normalize(text_embedding, dim=-1).T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def test_tiny_embeddings_are_the_published(tiny, tiny_io, relative_error):
    image_embedding, text_embedding, scale = tiny(tiny_io["image"], tiny_io["text"])
    assert relative_error(image_embedding, tiny_io["image_embedding"]) < 1e-5
    assert relative_error(text_embedding, tiny_io["text_embedding"]) < 1e-5
    assert relative_error(scale, tiny_io["logit_scale_exp"]) < 1e-6


def test_every_gradient_of_the_tiny_model_is_the_published(tiny, tiny_io, relative_error):
    loss = _clip_loss(*tiny(tiny_io["image"], tiny_io["text"]))
    loss.backward()
    assert loss.item() == pytest.approx(tiny_io["loss"].item(), abs=1e-5)
    errors = {
        key: relative_error(parameter.grad, tiny_io[f"grad/{key}"])
        for key, parameter in tiny.named_parameters()
    }
    assert {key: error for key, error in errors.items() if error > 1e-4} == {}


def test_activations_of_the_tiny_model_are_the_published(tiny, tiny_io, relative_error):
    outputs = {}
    modules = dict(tiny.named_modules())
    for name in (key.removeprefix("act/") for key in tiny_io if key.startswith("act/")):
        modules[name].register_forward_hook(
            lambda module, args, output, name=name: outputs.__setitem__(name, output)
        )
    with torch.no_grad():
        tiny(tiny_io["image"], tiny_io["text"])
    errors = {}
    for name, output in outputs.items():
        if name.endswith("ffn"):  # gated where the block adds it
            r, v = output
            output = torch.sigmoid(r) * v
        if name.endswith("patch_embed"):
            output = output.flatten(2).transpose(1, 2)
        errors[name] = relative_error(output, tiny_io[f"act/{name}"])
    assert len(errors) == 12
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


def test_dropped_branches_are_scaled_as_published(
    golden, tiny_config, tiny_state, tiny_io, relative_error, monkeypatch
):
    expected = load_file(golden("tiny_droppath.safetensors"))
    model = create_model(tiny_config(drop_path=0.5)).train()
    model.load_state_dict(tiny_state)
    kept = iter(expected["masks"])
    monkeypatch.setattr(blocks, "drop_path_scale", lambda x, rate, _: next(kept) / (1 - rate))
    embedding = model.encode_image(tiny_io["image"], normalize=False)
    assert relative_error(embedding, expected["image_embedding"]) < 1e-5
    assert next(kept, None) is None


def test_b32_has_the_published_keys_and_shapes(b32_facts):
    model = create_model("RWKV-CLIP-B-32", device="meta")
    published = {entry["key"]: entry["shape"] for entry in b32_facts["state_dict"]}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert list(model.buffers()) == []


@pytest.mark.parametrize(
    ("name", "count"), [("RWKV-CLIP-B-32", 149_561_601), ("RWKV-CLIP-B-16", 148_181_121)]
)
def test_b_models_have_the_published_number_of_parameters(name, count):
    model = create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_the_recipe_makes_the_published_weights(b32_facts, recipe):
    entries = [entry for entry in b32_facts["state_dict"] if entry["numel"] < 1e5]
    for entry in entries:
        values = recipe.fill(entry["key"], entry["shape"], entry["dtype"])
        check = b32_facts["fill_checks"][entry["key"]]
        assert zlib.crc32(values.tobytes()) == check["crc32_of_float32_little_endian_bytes"]


def test_b32_embeddings_are_the_published(golden, b32_facts, recipe, relative_error):
    model = create_model("RWKV-CLIP-B-32", device="meta").to_empty(device="cpu").eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in b32_facts["state_dict"]:
            values = recipe.fill(entry["key"], entry["shape"], entry["dtype"])
            parameters[entry["key"]].copy_(torch.from_numpy(values))
        expected = load_file(golden("b32.safetensors"))
        image_embedding, text_embedding, scale = model(expected["image"], expected["text"])
    assert relative_error(image_embedding, expected["image_embedding"]) < 1e-5
    assert relative_error(text_embedding, expected["text_embedding"]) < 1e-5
    assert scale.item() == pytest.approx(b32_facts["logit_scale_exp"], rel=1e-6)


def test_fresh_weights_have_the_published_statistics(golden):
    torch.manual_seed(0)
    state = create_model("RWKV-CLIP-B-32").state_dict()
    published = json.loads(golden("b32_init.json").read_text())["params"]
    assert set(state) == set(published)
    wrong = {}
    for key, value in state.items():
        told = published[key]
        # Published text weights went through bfloat16, which keeps 8 bits.
        rounding = 2**-8 * max(abs(told["min"]), abs(told["max"])) + 1e-9
        sampling = 0 if told["deterministic"] else 6 / value.numel() ** 0.5
        tolerance = rounding + sampling * told["std"]
        got = {"mean": value.mean().item(), "std": value.std(correction=0).item()}
        if told["deterministic"]:
            got |= {"min": value.min().item(), "max": value.max().item()}
        for name, number in got.items():
            if abs(number - told[name]) > tolerance:
                wrong[key, name] = number, told[name], tolerance
    assert wrong == {}
