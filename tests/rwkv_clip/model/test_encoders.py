"""The encoders take what they say they take, in every mode they are run in."""

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from rwkv_clip.model import RWKVCLIP, create_model
from rwkv_clip.model.blocks import drop_path_scale, sample_noise


@pytest.mark.parametrize("size", [(64, 64), (65, 40), (7, 130), (16, 16), (1, 1)])
def test_any_size_of_image_is_embedded_as_if_filled_with_zeros(size, tiny):
    height, width = size
    pixels = torch.randn(2, 3, height, width)
    filled = F.pad(pixels, (0, -width % 16, 0, -height % 16))
    embeddings = tiny.encode_image(pixels)
    assert embeddings.shape == (2, 64)
    assert torch.equal(embeddings, tiny.encode_image(filled))


def test_positions_of_another_grid_are_interpolated(tiny):
    tiny.image_model.pos_embed.data = torch.ones_like(tiny.image_model.pos_embed)
    larger = tiny.image_model._positions(3, 7)
    torch.testing.assert_close(larger, torch.ones(1, 21, 64))


@pytest.mark.parametrize("T", [1, 2, 16, 33])
def test_any_length_of_text_is_embedded(T, tiny):
    embeddings = tiny.encode_text(torch.randint(512, (3, T)))
    assert embeddings.shape == (3, 64)
    assert embeddings.isfinite().all()


def test_embeddings_have_length_one_unless_asked_otherwise(tiny, tiny_io):
    for encode, inputs in ((tiny.encode_image, "image"), (tiny.encode_text, "text")):
        raw = encode(tiny_io[inputs], normalize=False)
        assert not torch.allclose(raw.norm(dim=-1), torch.ones(6))
        torch.testing.assert_close(encode(tiny_io[inputs]), F.normalize(raw, dim=-1))


def test_a_sample_s_embedding_does_not_depend_on_its_batch(tiny, tiny_io):
    for encode, inputs in ((tiny.encode_image, "image"), (tiny.encode_text, "text")):
        together = encode(tiny_io[inputs])
        alone = torch.cat([encode(sample[None]) for sample in tiny_io[inputs]])
        torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-4)


def test_an_empty_batch_gives_no_embeddings(tiny):
    assert tiny.encode_image(torch.zeros(0, 3, 64, 64)).shape == (0, 64)
    assert tiny.encode_text(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 64)


def test_the_class_token_is_the_embedding(tiny_config):
    model = create_model(tiny_config(class_token=True)).eval()
    assert model.image_model.cls_token.shape == (1, 1, 64)
    pixels = torch.randn(2, 3, 64, 48)
    seen = {}
    model.image_model.layers[-1].register_forward_hook(
        lambda module, args, output: seen.__setitem__("last", output)
    )
    embeddings = model.encode_image(pixels, normalize=False)
    assert seen["last"].shape == (2, 4 * 3 + 1, 64)
    torch.testing.assert_close(embeddings, model.image_model.ln1(seen["last"][:, -1]))
    embeddings[:, 0].sum().backward()
    assert model.image_model.cls_token.grad.abs().max() > 0


def test_a_seed_means_the_same_fresh_model():
    torch.manual_seed(7)
    first = create_model("RWKV-CLIP-Tiny")
    torch.manual_seed(7)
    second = create_model("RWKV-CLIP-Tiny")
    other = create_model("RWKV-CLIP-Tiny")
    assert first.training
    for (key, value), again in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert value.isfinite().all(), key
        assert torch.equal(value, again), key
    assert not torch.equal(first.text_model.emb.weight, other.text_model.emb.weight)


def test_a_fresh_model_goes_where_and_as_asked():
    assert create_model("RWKV-CLIP-Tiny", device="meta").logit_scale.device.type == "meta"
    model = create_model("RWKV-CLIP-Tiny", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fresh_model_is_float32_and_the_same_whatever_pytorchs_default_type(dtype, tiny_config):
    torch.manual_seed(7)
    expected = create_model(tiny_config()).state_dict()
    torch.manual_seed(7)
    torch.set_default_dtype(dtype)
    try:
        got = create_model(tiny_config()).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in expected.items():
        assert got[key].dtype == torch.float32
        assert torch.equal(got[key], value), key


def test_a_fresh_model_is_on_the_cpu_whatever_pytorchs_default_device(tiny_config):
    with torch.device("meta"):
        within = create_model(tiny_config())
    torch.set_default_device("meta")
    try:
        under = create_model(tiny_config())
    finally:
        torch.set_default_device(None)
    for model in (within, under):
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_encoders_of_one_block_can_be_made(tiny_config):
    config = tiny_config(depth=1)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, depth=1))
    model = create_model(config)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("pixels", "error", "says"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"images have shape \[3, 64, 64\]; takes \[B, 3, "),
        (torch.zeros(2, 64, 64, 3), ValueError, r"images have shape \[2, 64, 64, 3\]"),
        (torch.zeros(2, 3, 0, 64), ValueError, r"images have shape \[2, 3, 0, 64\]"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, "images are torch.uint8; takes"),
        (["a.jpg"], TypeError, r"images are a list; takes a tensor \[B, 3, height, width\]"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(pixels, error, says, tiny):
    with pytest.raises(error, match=says):
        tiny.encode_image(pixels)


@pytest.mark.parametrize(
    ("tokens", "error", "says"),
    [
        (
            torch.zeros(16, dtype=torch.int64),
            ValueError,
            r"texts have shape \[16\]; takes \[B, T\]",
        ),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, r"texts have shape \[2, 0\]"),
        (torch.zeros(2, 16), TypeError, "texts are torch.float32; takes int64 tokens"),
        (["a dog"], TypeError, r"texts are a list; takes int64 tokens \[B, T\], as tokenize"),
        (torch.full((2, 16), 512), ValueError, "tokens from 512 to 512; takes 0 to 511"),
        (torch.full((2, 16), -1), ValueError, "tokens from -1 to -1; takes 0 to 511"),
    ],
)
def test_what_is_no_batch_of_texts_is_refused(tokens, error, says, tiny):
    with pytest.raises(error, match=says):
        tiny.encode_text(tokens)


@pytest.mark.parametrize(
    ("seeds", "error", "says"),
    [
        (torch.arange(3), ValueError, r"seeds have shape \[3\]; takes \[B\]"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"seeds have shape \[2, 1\]"),
        (torch.zeros(2), TypeError, "seeds are torch.float32; takes an int64"),
        ([1, 2], TypeError, "seeds are a list; takes an int64"),
    ],
)
def test_seeds_that_are_not_one_for_each_image_are_refused(seeds, error, says, tiny):
    with pytest.raises(error, match=says):
        tiny.encode_image(torch.zeros(2, 3, 64, 64), seeds=seeds)


@pytest.mark.parametrize("trains", [False, True])
def test_forward_mode_differentiates_an_encoder(trains, tiny):
    model = tiny.requires_grad_(trains)
    pixels, along = torch.randn(2, 2, 3, 32, 32)
    step = 3e-3 * along
    with torch.no_grad():
        ahead, behind = model.encode_image(pixels + step), model.encode_image(pixels - step)
    expected = (ahead - behind) / 6e-3
    for grad in (False, True):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            y = model.encode_image(forward_ad.make_dual(pixels, along))
            tangents = [forward_ad.unpack_dual(y).tangent]
        with torch.set_grad_enabled(grad):
            tangents.append(torch.func.jvp(model.encode_image, (pixels,), (along,))[1])
        for tangent in tangents:
            assert (tangent - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("trains", [False, True])
def test_an_encoder_takes_the_transforms_of_torch_func(trains, tiny):
    model = tiny.requires_grad_(trains)
    pixels = torch.randn(2, 3, 32, 32)
    mapped = torch.vmap(lambda x: model.encode_image(x[None])[0])(pixels)
    torch.testing.assert_close(mapped, model.encode_image(pixels), rtol=1e-4, atol=2e-6)
    got = torch.func.grad(lambda x: model.encode_image(x)[:, 0].sum())(pixels)
    pixels.requires_grad_()
    (expected,) = torch.autograd.grad(model.encode_image(pixels)[:, 0].sum(), pixels)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_every_samples_gradients_come_of_one_vmap(tiny, tiny_io):
    parameters = {key: value.detach() for key, value in tiny.named_parameters()}
    image, text = tiny_io["image"][:2], tiny_io["text"][:2]

    def loss(parameters, pixels, tokens):
        batch = pixels[None], tokens[None]
        image_embedding, text_embedding, scale = torch.func.functional_call(tiny, parameters, batch)
        return scale * (image_embedding * text_embedding).sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, image, text)
    for at in range(2):
        value = loss(dict(tiny.named_parameters()), image[at], text[at])
        expected = torch.autograd.grad(value, list(tiny.parameters()))
        for key, gradient in zip(parameters, expected, strict=True):
            error = (got[key][at] - gradient).abs().max()
            assert error <= 1e-4 * gradient.abs().max() + 1e-5, key


def test_what_stands_in_for_the_channel_mix_s_key_may_keep_its_output(tiny, tiny_io):
    seen = []

    def keep(out):
        seen.append((out, out.clone()))
        return out

    expected = tiny.encode_image(tiny_io["image"])
    wrapped, patched = (layer.ffn for layer in tiny.image_model.layers[:2])
    wrapped.key.register_forward_hook(lambda module, args, out: keep(out))
    wrapped.key = nn.Sequential(wrapped.key)
    forward = patched.key.forward
    patched.key.forward = lambda x: keep(forward(x))
    with torch.no_grad():
        assert torch.equal(tiny.encode_image(tiny_io["image"]), expected)
    assert len(seen) == 2
    assert all(torch.equal(out, copy) for out, copy in seen)


def test_the_channel_mix_s_key_may_end_in_what_needs_its_output(tiny, tiny_io):
    key = tiny.image_model.layers[0].ffn.key
    tiny.image_model.layers[0].ffn.key = nn.Sequential(key, nn.Tanh())
    tiny.encode_image(tiny_io["image"]).sum().backward()
    assert key.weight.grad.abs().max() > 0


def test_what_a_hook_sees_of_the_channel_mix_stays(tiny, tiny_io):
    key = tiny.image_model.layers[0].ffn.key
    seen = []
    for register in (key.register_forward_hook, nn.modules.module.register_module_forward_hook):
        handle = register(lambda m, _, out: seen.append((out, out.clone())) if m is key else None)
        with torch.no_grad():
            tiny.encode_image(tiny_io["image"])
        handle.remove()
    assert len(seen) == 2
    assert all(torch.equal(out, copy) for out, copy in seen)


class _KeepProducts(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.kept = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (F.linear, torch.matmul, torch.Tensor.__matmul__, torch.Tensor.matmul):
            self.kept.append((out, out.clone()))
        return out


def test_what_a_mode_sees_of_any_product_stays(tiny, tiny_io):
    with torch.no_grad(), _KeepProducts() as mode:
        tiny.encode_image(tiny_io["image"])
        tiny.encode_text(tiny_io["text"])
    assert len(mode.kept) > 5 * 8
    assert all(torch.equal(out, copy) for out, copy in mode.kept)


def _by_hook(model):
    return model.text_model.blocks[0].ffn.key.register_forward_hook(lambda *_: None)


def _by_hook_on_all(model):
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


WATCHES = {
    "a mode of dispatch": lambda model: FlopCounterMode(display=False),
    "a mode of functions": lambda model: _KeepProducts(),
    "a hook": _by_hook,
    "a hook on every layer": _by_hook_on_all,
}


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_one_pass_alone_may_be_watched_under_activation_checkpointing(
    watch, watched, tiny, tiny_io
):
    text = tiny.train().text_model
    text(tiny_io["text"]).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in text.named_parameters()}
    tiny.set_activation_checkpointing(True)
    tiny.zero_grad()
    with WATCHES[watch](tiny) if watched == "forward" else nullcontext():
        loss = text(tiny_io["text"]).sum()
    with WATCHES[watch](tiny) if watched == "backward" else nullcontext():
        loss.backward()
    for name, parameter in text.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_gradients_of_an_encoder_come_as_one_batch(tiny, tiny_io):
    pixels = tiny_io["image"][:1]

    def embed(pixels):
        return tiny.encode_image(pixels)[:, :2]

    got = torch.autograd.functional.jacobian(embed, pixels, vectorize=True)
    expected = torch.autograd.functional.jacobian(embed, pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_channel_mix_takes_hooks_on_the_way_back(tiny, tiny_io):
    called = []
    key = tiny.image_model.layers[0].ffn.key
    key.register_full_backward_hook(lambda *_: called.append("after"))
    key.register_full_backward_pre_hook(lambda *_: called.append("before"))
    tiny.encode_image(tiny_io["image"]).sum().backward()
    assert called == ["before", "after"]


@pytest.mark.parametrize(
    "name", ["image_model.patch_embed.projection", "image_model.layers.0.att.ln_x"]
)
def test_every_layer_is_called_so_that_its_hooks_run(name, tiny, tiny_io):
    seen = []
    layer = tiny.get_submodule(name)
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(lambda *_: seen.append("back"))
    tiny.encode_image(tiny_io["image"]).sum().backward()
    assert seen == [(6, 64, 4, 4) if "projection" in name else (6, 16, 64), "back"]


def test_no_layer_with_weights_is_read_without_a_call(tiny, tiny_io):
    layers = [m for m in tiny.modules() if not list(m.children()) and list(m.parameters())]
    called = set()
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: called.add(module))
    tiny(tiny_io["image"], tiny_io["text"])
    assert called == set(layers)


def test_pruned_layers_train_on(tiny, tiny_io):
    projection = tiny.image_model.patch_embed.projection
    norm = tiny.image_model.layers[0].att.ln_x
    for layer in (projection, norm):
        prune.l1_unstructured(layer, "weight", amount=0.3)
    for _ in range(2):
        tiny.encode_image(tiny_io["image"])[:, 0].sum().backward()
        with torch.no_grad():
            for layer in (projection, norm):
                layer.weight_orig.mul_(2)
    with torch.no_grad():
        tiny.encode_image(tiny_io["image"])
    for layer in (projection, norm):
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


def test_patches_are_projected_as_by_the_convolution(tiny, tiny_io):
    projection = tiny.image_model.patch_embed.projection
    expected = F.conv2d(tiny_io["image"], projection.weight, projection.bias, stride=16)
    torch.testing.assert_close(projection(tiny_io["image"]), expected, rtol=1e-4, atol=1e-5)


KEPT = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)


def _keep_products(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def test_products_that_selective_checkpointing_keeps_are_not_written_over(tiny, tiny_io):
    model = tiny.train()
    expected = _gradients(model, tiny_io)
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)

    def kept(image, text):
        return checkpoint(model, image, text, use_reentrant=False, context_fn=contexts)

    got = _gradients(model, tiny_io, kept)
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, msg=key)


@pytest.mark.parametrize("name", ["time_decay", "time_decay_w1", "time_maa_w1"])
def test_models_that_differ_in_one_weight_run_as_one_batch(name, tiny, tiny_io):
    key = f"text_model.blocks.0.att.{name}"
    weight = tiny.get_parameter(key).detach().float()
    stack = torch.stack([weight, 0.5 * weight, 2 * weight])

    def embed(weight):
        with torch.no_grad():
            return torch.func.functional_call(
                tiny, {key: weight}, (tiny_io["image"][:1], tiny_io["text"][:1])
            )[1]

    one_by_one = torch.stack([embed(weight) for weight in stack])
    torch.testing.assert_close(torch.vmap(embed)(stack), one_by_one, rtol=1e-4, atol=2e-6)


def _gradients(model: RWKVCLIP, io, forward=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    image_embedding, text_embedding, scale = (forward or model)(io["image"], io["text"])
    (scale * (image_embedding * text_embedding).sum()).backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def test_activation_checkpointing_gives_the_same_gradients_dropped_branches_included(
    tiny_config, tiny_state, tiny_io
):
    model = create_model(tiny_config(drop_path=0.5)).train()
    model.load_state_dict(tiny_state)
    expected = _gradients(model, tiny_io)
    calls = []
    model.image_model.layers[1].register_forward_pre_hook(lambda *args: calls.append(1))
    model.set_activation_checkpointing(True)
    got = _gradients(model, tiny_io)
    assert len(calls) == 2  # the forward pass, and once more on the way back
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, msg=key)
    model.set_activation_checkpointing(False)
    _gradients(model, tiny_io)
    assert len(calls) == 3


def test_bfloat16_autocast_stays_close_and_trains_every_parameter(tiny, tiny_io, relative_error):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_embedding, text_embedding, scale = tiny(tiny_io["image"], tiny_io["text"])
    assert image_embedding.dtype == text_embedding.dtype == torch.float32
    assert relative_error(image_embedding, tiny_io["image_embedding"]) < 0.05
    assert relative_error(text_embedding, tiny_io["text_embedding"]) < 0.05
    (scale * (image_embedding * text_embedding).sum()).backward()
    for key, parameter in tiny.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types_take_the_same_pixels(dtype, tiny, tiny_io, relative_error):
    model = tiny.to(dtype)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-6
    image_embedding = model.encode_image(tiny_io["image"], normalize=False)
    text_embedding = model.encode_text(tiny_io["text"], normalize=False)
    assert image_embedding.dtype == text_embedding.dtype == dtype
    assert relative_error(image_embedding, tiny_io["image_embedding"]) < tolerance
    assert relative_error(text_embedding, tiny_io["text_embedding"]) < tolerance


@pytest.mark.parametrize("drawn", ["anew", "by seeds"])
def test_drop_path_drops_at_its_rate_and_keeps_the_expectation(drawn):
    x = torch.zeros(20_000, 1, 1)
    noise = None if drawn == "anew" else sample_noise(torch.arange(20_000), 1)[0]
    scale = drop_path_scale(x, 0.3, noise)
    assert scale.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (scale == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert scale.mean().item() == pytest.approx(1, abs=0.03)


def test_a_samples_noise_is_its_own():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(1 << 62, (4096,), generator=generator)
    noise = sample_noise(seeds, 6)
    assert noise.shape == (6, 4096)
    assert torch.equal(sample_noise(seeds[1000:1003], 6), noise[:, 1000:1003])
    assert 0 <= noise.min() < 0.001
    assert 0.999 < noise.max() < 1
    assert noise.mean(dim=1).tolist() == pytest.approx([0.5] * 6, abs=0.02)
    assert (torch.corrcoef(noise) - torch.eye(6)).abs().max() < 0.06


def test_splitmix_gives_its_published_numbers():
    # The reference implementation's first three for the seed 1234567, of which we use 24 bits.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = sample_noise(torch.tensor([1234567]), 3)[:, 0].tolist()
    assert found == [(number >> 40) * 2**-24 for number in published]


def test_an_image_drops_the_same_branches_in_any_batch(tiny_config):
    torch.manual_seed(0)
    model = create_model(tiny_config(drop_path=0.5)).train()
    pixels = torch.randn(6, 3, model.config.image_size, model.config.image_size)
    seeds = torch.arange(6)
    whole = model.encode_image(pixels, seeds=seeds)
    parts = [
        model.encode_image(pixels[at : at + 2], seeds=seeds[at : at + 2]) for at in range(0, 6, 2)
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)
    model.set_activation_checkpointing(True)
    assert torch.equal(model.encode_image(pixels, seeds=seeds), whole)
    assert not torch.allclose(model.encode_image(pixels, seeds=seeds + 6), whole)
    assert torch.equal(model.eval().encode_image(pixels), model.encode_image(pixels, seeds=seeds))


def test_drop_path_grows_linearly_with_depth(tiny_config):
    model = create_model(tiny_config(depth=5, drop_path=0.2), device="meta")
    rates = [block.drop_path for block in model.image_model.layers]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert {block.drop_path for block in model.text_model.blocks} == {0}


def test_regularisation_is_for_training_alone(tiny_config, tiny_state, tiny_io):
    config = tiny_config(drop_path=0.9)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, dropout=0.5))
    model = create_model(config)
    model.load_state_dict(tiny_state)
    for encode, inputs in ((model.encode_image, "image"), (model.encode_text, "text")):
        model.train()
        assert not torch.equal(encode(tiny_io[inputs]), encode(tiny_io[inputs]))
        model.eval()
        assert torch.equal(encode(tiny_io[inputs]), encode(tiny_io[inputs]))
