"""What a model gives where its products are of another type."""

import torch
from torch import nn

from rwkv_clip.config import Precision
from rwkv_clip.model import RWKVCLIP
from rwkv_clip.precision import products_in, round_weights

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 512, (3, 16), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def embed(model: RWKVCLIP, precision: Precision) -> list[torch.Tensor]:
    with products_in(precision, CPU):
        return [model.encode_image(PIXELS), model.encode_text(TOKENS)]


def test_embeddings_are_float32_of_length_one_and_near_the_exact_ones(tiny: RWKVCLIP) -> None:
    for exact, found in zip(embed(tiny, "float32"), embed(tiny, "bfloat16"), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
        assert 0 < (found - exact).norm(dim=-1).max() < 0.02


def test_weights_rounded_once_give_what_those_rounded_in_every_call_give(tiny: RWKVCLIP) -> None:
    before = embed(tiny, "bfloat16")
    round_weights(tiny, "bfloat16")
    for one, other in zip(before, embed(tiny, "bfloat16"), strict=True):
        assert torch.equal(one, other)
    products = [one.weight for one in tiny.modules() if type(one) is nn.Linear]
    rounded = [one for one in tiny.parameters() if one.dtype == torch.bfloat16]
    assert {*map(id, rounded)} == {*map(id, products)}


def test_float32_leaves_all_as_it_is(tiny: RWKVCLIP) -> None:
    before = embed(tiny, "float32")
    round_weights(tiny, "float32")
    assert {one.dtype for one in tiny.parameters()} == {torch.float32}
    for one, other in zip(before, embed(tiny, "float32"), strict=True):
        assert torch.equal(one, other)
