"""Checkpoints come back as they were saved, and say what is wrong when they cannot."""

import contextlib
import dataclasses
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import rwkv_clip.model.checkpoint as checkpoint_module
from rwkv_clip.model import (
    CheckpointError,
    CLIPConfig,
    ImageConfig,
    TextConfig,
    create_model,
    load_checkpoint,
    save_checkpoint,
    save_published_checkpoint,
)

BFLOAT16 = {
    f"text_model.blocks.{i}.att.{name}" for i in range(2) for name in ("time_decay", "time_faaaa")
}


def _assert_same_state(model, state):
    got = model.state_dict()
    assert set(got) == set(state)
    for key, value in state.items():
        assert torch.equal(got[key], value.float()), key


def _refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    return str(caught.value)


def test_a_folder_brings_back_weights_and_configuration(tiny, tmp_path):
    save_checkpoint(tiny.train(), tmp_path / "new" / "folder")
    loaded = load_checkpoint(tmp_path / "new" / "folder")
    _assert_same_state(loaded, tiny.state_dict())
    assert loaded.config == tiny.config
    assert loaded.config.name == "tiny"
    assert not loaded.training


def test_the_weights_file_alone_finds_its_configuration(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    assert load_checkpoint(tmp_path / "model.safetensors").config == tiny.config


def test_saved_weights_are_float32_masters(tiny, tmp_path):
    save_checkpoint(tiny.bfloat16(), tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {
        torch.float32
    }


def test_saving_again_replaces_the_checkpoint_and_leaves_nothing_else(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    with torch.no_grad():
        tiny.logit_scale.fill_(1.5)
    save_checkpoint(tiny, tmp_path)
    assert load_checkpoint(tmp_path).logit_scale.item() == 1.5
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_files_have_the_permissions_of_any_other_new_file(tiny, tmp_path):
    (tmp_path / "other").touch()
    save_checkpoint(tiny, tmp_path)
    expected = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    for name in ("model.safetensors", "config.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == expected


def test_a_save_that_fails_keeps_the_checkpoint_before_it(tiny, tmp_path, monkeypatch):
    save_checkpoint(tiny, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fill_the_disk(state, file, metadata):
        file.write_bytes(b"half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tiny, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_a_compiled_model_is_saved_under_its_own_names(tiny, tmp_path):
    save_checkpoint(torch.compile(tiny), tmp_path)
    _assert_same_state(load_checkpoint(tmp_path), tiny.state_dict())


@pytest.fixture
def wrap(request):
    """A wrapper of models, by its name."""
    if request.param == "averaged":
        yield AveragedModel
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield {
        "replicated": DistributedDataParallel,
        "replicated, then compiled": lambda model: torch.compile(DistributedDataParallel(model)),
        "compiled, then replicated": lambda model: DistributedDataParallel(torch.compile(model)),
    }[request.param]
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    ["averaged", "replicated", "replicated, then compiled", "compiled, then replicated"],
    indirect=True,
)
def test_a_wrapped_model_is_saved_as_the_one_within(wrap, tiny, tmp_path):
    wrapped = wrap(tiny)
    save_checkpoint(wrapped, tmp_path / "folder")
    save_published_checkpoint(wrapped, tmp_path / "model.pt")
    _assert_same_state(load_checkpoint(tmp_path / "folder"), tiny.state_dict())
    assert load_checkpoint(tmp_path / "folder").config == tiny.config
    assert load_checkpoint(tmp_path / "model.pt").config.image == tiny.config.image


def test_what_is_no_model_is_refused_before_anything_is_written(tmp_path):
    for save in (save_checkpoint, save_published_checkpoint):
        for other in (nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))):
            with pytest.raises(TypeError, match=f"got a {type(other).__name__}"):
                save(other, tmp_path / "new" / "place")
    assert not list(tmp_path.iterdir())


def test_tied_weights_are_saved_twice(tiny, tmp_path):
    first, second = (block.att.key for block in tiny.text_model.blocks)
    second.weight = first.weight
    save_checkpoint(tiny, tmp_path)
    _assert_same_state(load_checkpoint(tmp_path), tiny.state_dict())


def test_weights_beside_the_configuration_of_others_are_refused(tiny, tmp_path, monkeypatch):
    save_checkpoint(tiny, tmp_path)
    replace = Path.replace

    def crash(self, target):
        if target.name == "config.json":
            raise KeyboardInterrupt
        return replace(self, target)

    image = dataclasses.replace(tiny.config.image, mean=(0.5, 0.5, 0.5))
    other = create_model(dataclasses.replace(tiny.config, image=image))
    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(other, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert "not the configuration that the weights beside it were saved with" in _refusal(path)
    _assert_same_state(load_checkpoint(tmp_path, config=other.config), other.state_dict())


def test_a_configuration_may_be_renamed_and_laid_out_anew(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    renamed = dict(reversed(written.items())) | {"name": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(renamed))
    assert load_checkpoint(tmp_path).config.name == "mine"


def test_weights_that_name_no_configuration_take_the_one_beside_them(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path).config == tiny.config


def test_the_published_file_has_the_published_keys_values_and_types(tiny_state, tiny, tmp_path):
    save_published_checkpoint(tiny, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    for key, value in tiny_state.items():
        written = state[f"module.{key}"]
        assert (
            written.dtype == value.dtype == (torch.bfloat16 if key in BFLOAT16 else torch.float32)
        )
        assert torch.equal(written, value), key
    assert len(state) == len(tiny_state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_published_files_are_read_whatever_wrapped_the_model(
    prefix, wrapper, tiny, tiny_state, tmp_path
):
    data = {prefix + key: value for key, value in tiny_state.items()}
    data = {wrapper: data, "epoch": 32} if wrapper else data
    torch.save(data, tmp_path / "weights.bin")
    loaded = load_checkpoint(tmp_path / "weights.bin", config=tiny.config)
    _assert_same_state(loaded, tiny_state)


def test_a_state_is_found_inside_several_wrappings(tiny, tiny_state, tmp_path):
    torch.save({"model": {"state_dict": tiny_state, "step": 9}, "epoch": 1}, tmp_path / "deep.pt")
    _assert_same_state(load_checkpoint(tmp_path / "deep.pt", config=tiny.config), tiny_state)


def test_a_block_of_absurd_number_is_unknown_and_not_built(tiny_state, tmp_path):
    state = tiny_state | {"image_model.layers.999999999.ln1.bias": torch.zeros(64)}
    torch.save(state, tmp_path / "model.pt")
    message = _refusal(tmp_path / "model.pt")
    assert "1 unknown: image_model.layers.999999999.ln1.bias" in message


def test_wrapped_parts_of_a_model_are_read_too(tiny, tiny_state, tmp_path):
    wrapped = {
        key.replace("image_model.", "module.image_model._orig_mod."): value
        for key, value in tiny_state.items()
    }
    torch.save(wrapped, tmp_path / "mixed.pt")
    _assert_same_state(load_checkpoint(tmp_path / "mixed.pt", config=tiny.config), tiny_state)


def test_the_old_format_of_torch_is_read(tiny, tiny_state, tmp_path):
    torch.save(tiny_state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    _assert_same_state(load_checkpoint(tmp_path / "old.pt", config=tiny.config), tiny_state)


def test_the_configuration_of_a_published_file_is_told_by_its_shapes(
    tiny, tiny_io, tmp_path, relative_error
):
    save_published_checkpoint(tiny, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert loaded.config.image == tiny.config.image
    assert loaded.config.text.heads == 4
    assert loaded.config.context_length == 77  # which no shape tells
    embedding = loaded.encode_image(tiny_io["image"], normalize=False)
    assert relative_error(embedding, tiny_io["image_embedding"]) < 1e-5


@pytest.mark.parametrize("name", ["RWKV-CLIP-B-32", "RWKV-CLIP-B-16", "RWKV-CLIP-Tiny"])
def test_known_models_are_told_by_their_shapes(name, tmp_path):
    state = create_model(name, device="meta").state_dict()
    assert checkpoint_module.infer_config(state, tmp_path).name == name


def test_the_class_token_is_told_by_its_key(tiny_config, tmp_path):
    config = tiny_config(class_token=True)
    save_published_checkpoint(create_model(config), tmp_path / "model.pt")
    assert load_checkpoint(tmp_path / "model.pt").config.image == config.image


def test_the_position_embedding_is_resized_on_request(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    larger = load_checkpoint(tmp_path, image_size=96)
    assert larger.config.image_size == 96
    pixels = torch.randn(2, 3, 96, 96)
    expected = tiny.encode_image(pixels)  # which resizes as it runs
    torch.testing.assert_close(larger.encode_image(pixels), expected)


def test_device_and_dtype_are_as_asked(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    loaded = load_checkpoint(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_are_float32_and_exact_whatever_pytorchs_default_type(dtype, tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    torch.set_default_dtype(dtype)
    try:
        loaded = load_checkpoint(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    _assert_same_state(loaded, tiny.state_dict())


def test_a_missing_path_is_named(tmp_path):
    assert _refusal(tmp_path / "none") == f"{tmp_path / 'none'} does not exist"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_says_which_and_what_it_has(name, tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / "notes.txt").touch()
    message = _refusal(tmp_path)
    assert f"lacks {name}" in message
    assert "notes.txt" in message


def test_a_given_configuration_spares_the_file(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    (tmp_path / "config.json").unlink()
    _assert_same_state(load_checkpoint(tmp_path, config=tiny.config), tiny.state_dict())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[]", "takes a mapping"),
        ('{"image": {"depths": 3}}', "missing text"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_a_bad_configuration_is_named_with_its_file(text, says, tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    (tmp_path / "config.json").write_text(text)
    message = _refusal(tmp_path)
    assert str(tmp_path / "config.json") in message
    assert says in message


def test_all_wrong_keys_are_told_at_once(tiny, tiny_state, tmp_path):
    state = dict(tiny_state)
    del state["logit_scale"]
    state["text_model.head.weight"] = torch.zeros(3)
    state["image_model.ln1.bias"] = torch.zeros(5)
    state["image_model.ln1.weight"] = torch.ones(64, dtype=torch.int64)
    state["text_model.ln_out.weight"] = torch.full((64,), torch.nan)
    state["text_model.ln_out.bias"] = torch.full((64,), torch.inf)
    torch.save(state, tmp_path / "model.pt")
    message = _refusal(tmp_path / "model.pt", config=tiny.config)
    assert "1 missing: logit_scale" in message
    assert "1 unknown: text_model.head.weight" in message
    assert "1 of another shape: image_model.ln1.bias (has [5], takes [64])" in message
    assert "1 not of floating type: image_model.ln1.weight (torch.int64)" in message
    assert "2 not finite: " in message
    assert "text_model.ln_out.weight" in message


def test_a_long_list_of_wrong_keys_is_cut(tiny, tmp_path):
    state = {f"layer.{i}": torch.zeros(1) for i in range(500)}
    torch.save(state, tmp_path / "model.pt")
    message = _refusal(tmp_path / "model.pt", config=tiny.config)
    assert "500 unknown" in message
    assert "and 492 more" in message
    assert len(message) < 2000


def test_another_image_size_is_told_with_the_mend(tiny, tiny_config, tiny_state, tmp_path):
    torch.save(tiny_state, tmp_path / "model.pt")
    config = tiny_config().with_image_size(96)
    message = _refusal(tmp_path / "model.pt", config=config)
    assert "image_model.pos_embed (has [1, 16, 64], takes [1, 36, 64])" in message
    assert "image_size=" in message


def test_a_key_that_comes_twice_is_refused(tiny, tiny_state, tmp_path):
    state = tiny_state | {"module.logit_scale": torch.zeros(())}
    torch.save(state, tmp_path / "model.pt")
    assert "more than once" in _refusal(tmp_path / "model.pt", config=tiny.config)


def test_weights_of_another_model_are_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    message = _refusal(tmp_path / "resnet.pt")
    assert "does not tell its model's configuration" in message
    assert "RWKV-CLIP-B-32" in message


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "plain.pkl"):
        assert "never run" in _refusal(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(50), b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "png", "lfs"],
)
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    assert "neither a safetensors nor a PyTorch file" in _refusal(tmp_path / "model.pt")


@pytest.mark.parametrize("kept", [0.5, 0.01])
def test_a_cut_file_is_refused(kept, tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    save_published_checkpoint(tiny, tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * kept)])
        assert "is damaged" in _refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.bin"])
def test_safetensors_that_begin_as_a_pickle_does_are_read(name, tmp_path):
    # The first byte is of the header's length: of one configuration in 32 it is a pickle's.
    config = CLIPConfig(ImageConfig(2, 2, 16, 64, 8, 32), TextConfig(2, 2, 16, 8, vocab_size=512))
    model = create_model(config)
    save_checkpoint(model, tmp_path)
    path = (tmp_path / "model.safetensors").rename(tmp_path / name)
    content = path.read_bytes()
    assert content.startswith(b"\x80")
    _assert_same_state(load_checkpoint(path), model.state_dict())
    for kept in (5, 9, 5000, len(content) - 1):
        path.write_bytes(content[:kept])
        _refusal(path)


def test_a_cut_file_of_the_old_format_is_refused(tiny_state, tmp_path):
    torch.save(tiny_state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    for kept in [*range(1, 600, 7), len(content) // 2, len(content) - 1]:
        (tmp_path / "cut.pt").write_bytes(content[:kept])
        _refusal(tmp_path / "cut.pt")


@pytest.mark.parametrize("data", [torch.zeros(3), [1, 2], {}, {"state_dict": {}}])
def test_what_is_no_state_dict_is_refused(data, tmp_path):
    torch.save(data, tmp_path / "model.pt")
    assert "takes a state dict" in _refusal(tmp_path / "model.pt")


def test_what_is_no_tensor_is_named(tiny_state, tmp_path):
    torch.save(tiny_state | {"epoch": 3}, tmp_path / "model.pt")
    assert "'epoch' (int)" in _refusal(tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch has its own view of such tensors
@pytest.mark.parametrize("config", [None, "tiny"])
@pytest.mark.parametrize("image_size", [None, 96])
def test_what_is_no_dense_tensor_is_named(config, image_size, tiny, tiny_state, tmp_path):
    odd = {
        "without data": tiny_state["image_model.pos_embed"].to("meta"),
        "torch.sparse_coo": tiny_state["image_model.pos_embed"].to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.zeros(1, 16, 64), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    }
    for kind, value in odd.items():
        torch.save(tiny_state | {"image_model.pos_embed": value}, tmp_path / "model.pt")
        given = tiny.config if config else None
        message = _refusal(tmp_path / "model.pt", config=given, image_size=image_size)
        assert "not a dense tensor" in message
        assert f"'image_model.pos_embed' ({kind})" in message


def test_a_dictionary_that_holds_itself_is_refused(tmp_path):
    data = {}
    data["model"] = data
    torch.save(data, tmp_path / "model.pt")
    assert "'model' (dict)" in _refusal(tmp_path / "model.pt")


def test_safetensors_without_a_configuration_are_told_by_their_shapes(tiny, tiny_state, tmp_path):
    save_file({key: value.float() for key, value in tiny_state.items()}, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").config.image == tiny.config.image


def test_an_unknown_name_of_a_model_lists_the_names(tmp_path):
    with pytest.raises(ValueError, match="no model is named 'B-32'; takes RWKV-CLIP-B-32"):
        load_checkpoint(tmp_path, config="B-32")


def test_the_configuration_file_is_plain_json(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == tiny.config.to_dict()


class Adapted(nn.Module):
    """A linear layer with a term of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.term = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.term(x)


@pytest.mark.parametrize("save", [save_checkpoint, save_published_checkpoint])
def test_what_would_not_load_again_is_not_saved_over_what_does(save, tiny, tmp_path):
    place = tmp_path / "model"
    save(tiny, place)
    expected = {key: value.clone() for key, value in tiny.state_dict().items()}
    att = tiny.image_model.layers[0].att
    att.key = Adapted(att.key)
    tiny.image_model.ln1.weight = nn.Parameter(torch.ones(5))
    tiny.image_model.ln1.bias.data[0] = torch.nan
    tiny.double().text_model.emb.weight.data[0] = 1e300
    with pytest.raises(CheckpointError) as caught:
        save(tiny, place)
    message = str(caught.value)
    assert "1 missing: image_model.layers.0.att.key.weight" in message
    assert "2 unknown: image_model.layers.0.att.key.base.weight" in message
    assert "1 of another shape: image_model.ln1.weight (has [5], takes [64])" in message
    assert "1 not finite: image_model.ln1.bias" in message
    assert "1 not finite as torch.float32: text_model.emb.weight" in message
    _assert_same_state(load_checkpoint(place), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_quantized_model_is_not_saved(tiny, tmp_path):
    quantized = torch.ao.quantization.quantize_dynamic(tiny, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CheckpointError, match=r"missing: .*att\.receptance\.weight"):
        save_checkpoint(quantized, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_sharded_model_is_not_saved_and_told_how_to_gather_it(tiny, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(tiny, ignored_params={tiny.logit_scale})
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tiny, tmp_path / "new")
    finally:
        dist.destroy_process_group()
    assert "text_model.emb.weight (DTensor)" in str(caught.value)
    assert "get_model_state_dict with full_state_dict=True" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_that_no_type_of_theirs_holds_are_refused(tiny, tmp_path):
    with torch.no_grad():
        tiny.text_model.emb.weight[0, 0] = 1e5
    save_checkpoint(tiny, tmp_path)
    assert load_checkpoint(tmp_path).text_model.emb.weight[0, 0] == 1e5
    message = _refusal(tmp_path, dtype=torch.float16)
    assert "1 not finite as torch.float16: text_model.emb.weight" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_weights_of_any_floating_type_are_read(dtype, tiny, tiny_state, tmp_path):
    state = {key: value.to(dtype) for key, value in tiny_state.items()}
    torch.save(state, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt", config=tiny.config)
    _assert_same_state(loaded, state)


def test_large_weights_of_float64_are_finite_though_their_sum_is_not(tiny, tiny_state, tmp_path):
    large = torch.full_like(tiny_state["text_model.emb.weight"], 1e308, dtype=torch.float64)
    torch.save(tiny_state | {"text_model.emb.weight": large}, tmp_path / "model.pt")
    message = _refusal(tmp_path / "model.pt")
    assert "1 not finite as torch.float32: text_model.emb.weight" in message
    loaded = load_checkpoint(tmp_path / "model.pt", config=tiny.config, dtype=torch.float64)
    assert loaded.text_model.emb.weight.isfinite().all()


def test_weights_alone_whose_shapes_do_not_tell_their_configuration_are_refused(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)  # of texts of 16 tokens, which no shape tells
    path = (tmp_path / "model.safetensors").rename(tmp_path / "alone.safetensors")
    (tmp_path / "config.json").unlink()
    message = _refusal(path)
    assert "was saved with another configuration than its shapes tell" in message
    assert "config=" in message
    _assert_same_state(load_checkpoint(path, config=tiny.config), tiny.state_dict())


def test_weights_alone_whose_shapes_tell_their_configuration_are_read(tmp_path):
    model = create_model("RWKV-CLIP-Tiny")
    save_checkpoint(model, tmp_path)
    (tmp_path / "config.json").unlink()
    assert load_checkpoint(tmp_path / "model.safetensors").config == model.config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_garbled_file_is_refused_whatever_pytorch_says(zipped, tiny_state, tmp_path):
    torch.save(tiny_state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    content = bytearray((tmp_path / "a.pt").read_bytes())
    for at in range(120, 420, 3):
        garbled = content[:at] + bytes([content[at] ^ 0x20]) + content[at + 1 :]
        (tmp_path / "a.pt").write_bytes(garbled)
        with contextlib.suppress(CheckpointError):  # some bytes change no more than a name
            load_checkpoint(tmp_path / "a.pt")


def test_memory_that_runs_out_is_no_damaged_file(tiny_state, tmp_path, monkeypatch):
    torch.save(tiny_state, tmp_path / "model.pt")

    def run_out(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", run_out)
    with pytest.raises(MemoryError):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("tower", "key", "size"),
    [
        ("image", "image_size", 10**12),
        ("image", "hidden_dim", 10**30),
        ("text", "vocab_size", 10**18),
        ("text", "depth", 10**6),
        ("text", "context_length", 1),
    ],
)
def test_a_configuration_of_absurd_size_is_refused_and_not_built(tower, key, size, tiny, tmp_path):
    save_checkpoint(tiny, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written[tower][key] = size
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert f"{tower}.{key}: got {size}, takes a whole number from" in _refusal(tmp_path)
