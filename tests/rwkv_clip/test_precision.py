"""What a model gives where its products are of another type."""

import pytest
import torch
from torch import nn

from rwkv_clip.config import Precision
from rwkv_clip.model import RWKVCLIP, create_model
from rwkv_clip.precision import products_in, round_weights

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 49408, (3, 77), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model() -> RWKVCLIP:
    torch.manual_seed(0)
    made = create_model("RWKV-CLIP-Tiny").eval()
    for parameter in made.parameters():  # fresh layers give zeros, whatever is asked of them
        nn.init.normal_(parameter, std=0.05)
    return made


@torch.inference_mode()
def embed(model: RWKVCLIP, precision: Precision) -> list[torch.Tensor]:
    with products_in(precision, CPU):
        return [model.encode_image(PIXELS), model.encode_text(TOKENS)]


def test_embeddings_are_float32_of_length_one_and_near_the_exact_ones(model: RWKVCLIP) -> None:
    for exact, found in zip(embed(model, "float32"), embed(model, "bfloat16"), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
        assert 0 < (found - exact).norm(dim=-1).max() < 0.02


def test_weights_rounded_once_give_what_those_rounded_in_every_call_give(model: RWKVCLIP) -> None:
    before = embed(model, "bfloat16")
    round_weights(model, "bfloat16")
    for one, other in zip(before, embed(model, "bfloat16"), strict=True):
        assert torch.equal(one, other)
    products = [one.weight for one in model.modules() if type(one) is nn.Linear]
    rounded = [one for one in model.parameters() if one.dtype == torch.bfloat16]
    assert {*map(id, rounded)} == {*map(id, products)}


def test_float32_leaves_all_as_it_is(model: RWKVCLIP) -> None:
    before = embed(model, "float32")
    round_weights(model, "float32")
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    for one, other in zip(before, embed(model, "float32"), strict=True):
        assert torch.equal(one, other)
