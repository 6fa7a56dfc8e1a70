"""Changed colours are those of Pillow's enhancers, and repeat by their seed."""

import re

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from rwkv_clip.jitter import ColourJitter
from rwkv_clip.resize import Pixels
from rwkv_clip.transforms import ImageTransform


@pytest.fixture(scope="module")
def planes() -> Pixels:
    """Colours of all kinds, none so bright or dark that an enhancer would cut it off."""
    return np.random.default_rng(0).integers(60, 150, (3, 24, 16), dtype=np.uint8)


def image(planes: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


def apart(ours: Pixels, theirs: Image.Image) -> int:
    expected = np.asarray(theirs.convert("RGB")).transpose(2, 0, 1)
    return int(np.abs(ours.astype(int) - expected).max())


def test_no_reach_changes_nothing(planes: Pixels) -> None:
    assert np.array_equal(ColourJitter()(planes, np.random.default_rng(1)), planes)


@pytest.mark.parametrize(
    ("name", "draw", "enhance"),
    [
        ("brightness", 0, ImageEnhance.Brightness),
        ("contrast", 1, ImageEnhance.Contrast),
        ("saturation", 2, ImageEnhance.Color),
    ],
)
def test_each_change_is_that_of_pillow(planes: Pixels, name, draw, enhance) -> None:
    jitter = ColourJitter(**{name: 0.5})
    for seed in range(8):
        factor = 0.5 + np.random.default_rng(seed).random(3)[draw]
        changed = jitter(planes, np.random.default_rng(seed))
        # Pillow rounds the greys that it mixes with, and cuts its results off.
        assert apart(changed, enhance(image(planes)).enhance(factor)) <= 1


def test_an_image_without_colour_has_the_greys_of_pillow(planes: Pixels) -> None:
    changed = ColourJitter(grey=1)(planes, np.random.default_rng(0))
    assert apart(changed, image(planes).convert("L")) <= 1
    assert (changed == changed[:1]).all()


def test_a_share_of_the_images_loses_its_colour(planes: Pixels) -> None:
    rng, jitter = np.random.default_rng(0), ColourJitter(grey=0.2)
    changed = [jitter(planes, rng) for _ in range(500)]
    assert 70 <= sum(bool((one == one[:1]).all()) for one in changed) <= 130


def test_what_is_too_bright_is_white_and_not_dark() -> None:
    bright = np.full((3, 8, 8), 250, np.uint8)
    bright[:, 0, 0] = 3
    jitter = ColourJitter(brightness=1, contrast=1)
    changed = [jitter(bright, np.random.default_rng(seed)) for seed in range(50)]
    assert max(int(one.max()) for one in changed) == 255
    assert all((one[:, 4, 4] >= one[:, 0, 0]).all() for one in changed)


def test_a_transform_changes_colours_in_training_and_nothing_else(planes: Pixels) -> None:
    picture = image(planes)
    plain = ImageTransform(16, train=True)
    jittered = ImageTransform(16, train=True, jitter=ColourJitter(saturation=0.5, grey=0.2))
    assert np.array_equal(jittered.planes(picture, 5), jittered.planes(picture, 5))
    assert not np.array_equal(jittered.planes(picture, 5), jittered.planes(picture, 6))
    crop, rng = plain.planes(picture, 5), np.random.default_rng(5)
    plain.planes(picture, rng)
    assert jittered.jitter is not None
    assert np.array_equal(jittered.planes(picture, 5), jittered.jitter(crop, rng))
    with pytest.raises(ValueError, match="jitter is for training"):
        ImageTransform(16, jitter=ColourJitter())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "grey"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_reach_beyond_what_there_is_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}: got {value}, takes")):
        ColourJitter(**{name: value})
