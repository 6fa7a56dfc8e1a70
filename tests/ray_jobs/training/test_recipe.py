"""The recipe: what decays, and how the rate moves."""

import pytest

from ray_jobs.training.recipe import RecipeConfig, create_optimizer, decays, learning_rate
from rwkv_clip.model import create_model


def test_weight_decay_is_for_matrices_alone():
    model = create_model("RWKV-CLIP-Tiny", device="meta")
    spared = {name for name, value in model.named_parameters() if not decays(name, value)}
    assert {"logit_scale", "image_model.pos_embed", "text_model.emb.weight"} <= spared
    for name, value in model.named_parameters():
        vector = value.numel() == max(value.shape, default=1)
        assert (name in spared) or not vector, name
        kinds = ("ln", "time_decay", "time_faaaa", "bias", "maa_x", "maa_k", "spatial_mix")
        last = name.rpartition(".")[2]
        if any(kind in last for kind in kinds) and not last.endswith(("_w1", "_w2")):
            assert name in spared, name
    assert "image_model.layers.0.att.key.weight" not in spared
    assert "text_model.blocks.0.att.time_maa_w2" not in spared


def test_every_parameter_is_in_one_group():
    model = create_model("RWKV-CLIP-Tiny")
    groups = create_optimizer(model, RecipeConfig()).param_groups
    ids = [id(value) for group in groups for value in group["params"]]
    assert sorted(ids) == sorted(id(value) for value in model.parameters())
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


def test_the_rate_rises_to_its_peak_and_falls_to_almost_nothing():
    config = RecipeConfig(learning_rate=1e-3)
    rates = [learning_rate(step, 1000, config) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == 100
    assert rates[:101] == sorted(rates[:101])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 / 250_000)


def test_runs_of_a_step_or_two_have_rates_too():
    assert learning_rate(0, 1, RecipeConfig()) > 0
    assert learning_rate(1, 2, RecipeConfig()) > 0
