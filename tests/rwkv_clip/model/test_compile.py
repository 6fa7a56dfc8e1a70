"""Both encoders trace whole: compiled, with dynamic batches, exported, and ahead of time."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("inputs", ["image", "text"])
def test_encoders_compile_whole_and_give_the_same_embeddings(inputs, tiny, tiny_io):
    encode = getattr(tiny, f"encode_{inputs}")
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tiny_io[inputs]), encode(tiny_io[inputs]))


def test_training_compiles_whole_and_gives_the_same_gradients(tiny, tiny_io):
    def loss(model):
        image_embedding, text_embedding, scale = model(tiny_io["image"], tiny_io["text"])
        return scale * (image_embedding * text_embedding).sum()

    expected = torch.autograd.grad(loss(tiny.train()), list(tiny.parameters()))
    compiled = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(loss(compiled), list(tiny.parameters()))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_compiled_step_keeps_the_hidden_channels_once(tiny, tiny_io):
    kept = []

    def note(graph, _):
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        kept.extend(tuple(one.meta["val"].shape) for one in outputs if one is not None)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    blocks = tiny.train().text_model.blocks
    encode = torch.compile(tiny.text_model, fullgraph=True, backend=backend)
    encode(tiny_io["text"]).sum().backward()

    hidden = blocks[0].ffn.key.out_features
    tokens = tiny_io["text"].numel()
    assert sum(
        shape in {(*tiny_io["text"].shape, hidden), (tokens, hidden)} for shape in kept
    ) == len(blocks)


def test_activations_computed_again_compile_too(tiny, tiny_io):
    tiny.train().set_activation_checkpointing(True)
    text = tiny_io["text"]
    expected = torch.autograd.grad(tiny.text_model(text).sum(), list(tiny.text_model.parameters()))
    compiled = torch.compile(tiny.text_model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(text).sum(), list(tiny.text_model.parameters()))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_default_compiler_takes_an_encoder(tiny, tiny_io):
    encoder = tiny.text_model
    encoder.blocks = encoder.blocks[:1]  # C++ takes its time to compile
    with torch.no_grad():
        expected = encoder(tiny_io["text"])
        got = torch.compile(encoder, fullgraph=True)(tiny_io["text"])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("tower", "inputs"), [("image_model", "image"), ("text_model", "text")])
def test_encoders_export_with_a_dynamic_batch(tower, inputs, tiny, tiny_io, tmp_path):
    encoder = getattr(tiny, tower)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(encoder, (tiny_io[inputs],), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for rows in (1, 2, 3):
        x = tiny_io[inputs][:rows]
        torch.testing.assert_close(loaded(x), encoder(x))


def test_the_text_encoder_exports_for_every_length(tiny):
    encoder = tiny.text_model
    tokens = torch.randint(1, 500, (3, 9))
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(encoder, (tokens,), dynamic_shapes=(sizes,)).module()
    for T in (1, 2, 3, 9):
        torch.testing.assert_close(program(tokens[:2, :T]), encoder(tokens[:2, :T]))


@pytest.mark.parametrize("size", [(64, 64), (60, 33)])
def test_the_image_encoder_exports_for_every_grid(size, tiny):
    encoder = tiny.image_model
    sizes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(encoder, (torch.randn(2, 3, *size),), dynamic_shapes=(sizes,))
    for other in ((64, 64), (32, 96), (33, 47)):
        pixels = torch.randn(2, 3, *other)
        torch.testing.assert_close(program.module()(pixels), encoder(pixels))


def test_a_compiled_encoder_differentiates_forwards(tiny):
    pixels, along = torch.randn(2, 2, 3, 32, 32)
    encode = tiny.requires_grad_(False).encode_image
    compiled = torch.compile(encode, fullgraph=True, backend="eager")

    def tangent(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(pixels, along))).tangent

    compiled(pixels)
    torch.testing.assert_close(tangent(compiled), tangent(encode), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tower", "inputs"), [("image_model", "image"), ("text_model", "text")])
def test_another_batch_is_not_compiled_again(tower, inputs, tiny, tiny_io):
    encoder = getattr(tiny, tower)
    graphs = CompileCounter()
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=graphs)
    x = tiny_io[inputs]
    for rows in (4, 2, 3, 7):
        batch = x[torch.arange(rows) % len(x)]
        torch.testing.assert_close(compiled(batch), encoder(batch))
    assert graphs.frame_count == 1


# C++ takes its time to compile.
@pytest.mark.chaos
@pytest.mark.parametrize(("tower", "inputs"), [("image_model", "image"), ("text_model", "text")])
def test_encoders_compile_ahead_of_time(tower, inputs, tiny, tiny_io, tmp_path):
    encoder = getattr(tiny, tower)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(encoder, (tiny_io[inputs],), dynamic_shapes=({0: batch},))
        path = str(tmp_path / "encoder.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        compiled = torch._inductor.aoti_load_package(path)
        for rows in (1, 2, 3):
            x = tiny_io[inputs][:rows]
            torch.testing.assert_close(compiled(x), encoder(x), atol=1e-5, rtol=1e-4)


def test_the_whole_model_exports(tiny, tiny_io):
    program = torch.export.export(tiny, (tiny_io["image"], tiny_io["text"]))
    got = program.module()(tiny_io["image"], tiny_io["text"])
    torch.testing.assert_close(got, tiny(tiny_io["image"], tiny_io["text"]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
def test_a_trace_of_torchscript_computes_the_same_and_its_gradients(tiny, tiny_io):
    image, text = tiny_io["image"], tiny_io["text"]
    traced = torch.jit.trace(tiny, (image, text))
    for got, true in zip(traced(image[:2], text[:2]), tiny(image[:2], text[:2]), strict=True):
        torch.testing.assert_close(got, true)
    traced(image, text)[0].sum().backward()
    assert tiny.image_model.pos_embed.grad.abs().max() > 0
