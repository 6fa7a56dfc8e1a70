"""The model on a GPU computes what it computes on a CPU."""

import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_embeddings_on_a_gpu_are_the_published(tiny, tiny_io, relative_error):
    image_embedding, text_embedding, _ = tiny.cuda()(
        tiny_io["image"].cuda(), tiny_io["text"].cuda()
    )
    assert relative_error(image_embedding.cpu(), tiny_io["image_embedding"]) < 1e-4
    assert relative_error(text_embedding.cpu(), tiny_io["text_embedding"]) < 1e-4


def test_gradients_under_autocast_point_where_the_cpu_s_do(tiny, tiny_io):
    def gradients(device):
        model = tiny.to(device)
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            embeddings = model(tiny_io["image"].to(device), tiny_io["text"].to(device))
        (embeddings[0] * embeddings[1]).sum().backward()
        return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])

    expected, got = gradients("cpu"), gradients("cuda")
    assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.99
