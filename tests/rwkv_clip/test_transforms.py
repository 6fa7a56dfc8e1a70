"""The transforms give the published pixels, repeat their random crops, and name broken inputs."""

import contextlib
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from safetensors.torch import load_file

from rwkv_clip.images import ImageDecodeError, small_picture
from rwkv_clip.ops import _library, build_info
from rwkv_clip.resize import resize_bicubic, resize_bicubic_statement
from rwkv_clip.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    ImageTransform,
    image_transform,
    random_box,
)

Golden = Callable[[str], Path]


@dataclass(frozen=True)
class Config:
    image_size: int = 32
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD


EVALUATE = image_transform(Config())
TRAIN = image_transform(Config(), train=True)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth shapes with some texture, as photographs have."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [
        np.sin(x / (9 + c)) * np.cos(y / (7 + 2 * c)) + x / width - y / height for c in (0, 1, 2)
    ]
    noise = np.random.default_rng(0).normal(0, 0.03, (height, width, 3))
    scaled = (np.stack(waves, 2) + noise) * 60 + 128
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def published(image: Image.Image, side: int) -> np.ndarray:
    """torchvision's Resize, CenterCrop and RGB, written out on Pillow.

    With a call for each pass: from 13 on, Pillow resizes the columns of tall images first.
    """
    width, height = image.size
    if width <= height:
        size = (side, int(side * height / width))
    else:
        size = (int(side * width / height), side)
    mode = image.mode
    for step in ((size[0], height), size):
        premultiplied = image.convert({"RGBA": "RGBa", "LA": "La"}.get(mode, mode))
        image = premultiplied.resize(step, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    image = image.convert(mode).crop((left, top, left + side, top + side))
    return np.asarray(image.convert("RGB"))


def cropped(image: Image.Image, seed: int, whole: int = 1) -> np.ndarray:
    """A training crop, whose edges are multiples of whole, resized and perhaps mirrored."""
    rng = np.random.default_rng(seed)
    side = 32 if whole == 1 else 64
    box = [round(edge / whole) * whole for edge in random_box(image.size, rng)]
    pixels = image.crop(box).resize((side, side), Image.Resampling.BILINEAR).convert("RGB")
    return np.asarray(pixels)[:, :: -1 if rng.random() < 0.5 else 1]


def levels_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def test_evaluation_equals_the_golden_pixels(golden: Golden) -> None:
    tensors = load_file(golden("preprocess.safetensors"))
    transform = ImageTransform(224)
    std = torch.tensor(CLIP_STD)[:, None, None]
    for case in json.loads(golden("preprocess.json").read_text())["cases"]:
        array = tensors[case["name"] + "/in"].numpy()
        out = tensors[case["name"] + "/out"]
        for given_as in (array, encoded(Image.fromarray(array.squeeze()))):
            apart = ((transform(given_as) - out) * std).abs().max()
            assert apart <= 1 / 255 + 1e-6, case["name"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 150), st.sampled_from(["RGB", "L", "RGBA", "CMYK", "LA"])
)
def test_evaluation_equals_resize_then_crop(width: int, height: int, mode: str) -> None:
    image = picture(width, height, mode)
    # Very long images that Pillow has to resize are cropped first, to a fraction of a pixel.
    ours = mode == "RGB" and build_info()["library"]
    whole = ours or max(width, height) <= 4 * min(width, height)
    apart = levels_apart(EVALUATE.uint8(image), published(image, 32)).max()
    assert apart <= (0 if whole else 2)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_every_kernel_resizes_as_pillow_does(
    isa: str, width: int, height: int, side: int, seed: int
) -> None:
    if not build_info()["library"]:
        pytest.skip("the library was not built")
    rng = np.random.default_rng(seed)
    values = np.array([0, 255] if seed % 2 else range(256), np.uint8)  # edges, or all there is
    pixels = rng.choice(values, (height, width, 3))
    box = (0, 0, width, height)
    if seed % 3:
        low, high = rng.uniform(0, 0.4, 2), rng.uniform(0.6, 1, 2)
        box = (low[0] * width, low[1] * height, high[0] * width, high[1] * height)
    size = (side + int(rng.integers(9)), side + int(rng.integers(9)))
    offset = (int(rng.integers(size[0] - side + 1)), int(rng.integers(size[1] - side + 1)))
    with mock.patch.dict(os.environ, RWKV_CLIP_ISA=isa):
        got = resize_bicubic(pixels, box, size, offset, side)
    assert np.array_equal(got, resize_bicubic_statement(pixels, box, size, offset, side))


@pytest.mark.parametrize(
    ("box", "size", "offset", "told"),
    [
        ((0, 0, 9, 4), (8, 8), (0, 0), "not inside of 8 pixels"),
        ((0, -1, 8, 4), (8, 8), (0, 0), "not inside of 6 pixels"),
        ((3, 0, 3, 4), (8, 8), (0, 0), "not inside"),
        ((0, 0, 8, 6), (8, 7), (0, 0), "pixels 0 to 8 are not among 7"),
        ((0, 0, 8, 6), (8, 8), (0, -1), "not among"),
    ],
)
def test_what_does_not_lie_in_an_image_is_refused(
    box: tuple[float, ...], size: tuple[int, int], offset: tuple[int, int], told: str
) -> None:
    if not build_info()["library"]:
        pytest.skip("the library was not built")
    pixels = torch.zeros(6, 8, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=told):
        torch.ops.rwkv_clip.resize_bicubic(pixels, *map(float, box), *size, *offset, 8)
    with pytest.raises(RuntimeError, match="must be uint8"):
        torch.ops.rwkv_clip.resize_bicubic(pixels.float(), 0.0, 0.0, 8.0, 6.0, 8, 8, 0, 0, 8)


def test_a_photograph_that_lies_on_its_side_is_turned_and_still_drafted() -> None:
    upright = Image.fromarray(np.asarray(picture(1203, 901)))
    expected = ImageTransform(64).uint8(encoded(upright, "JPEG", quality=95))
    for orientation, transpose in (
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(upright.transpose(transpose), "JPEG", quality=95, exif=exif)
        with mock.patch.object(
            ImageFile.ImageFile, "load", side_effect=AssertionError("decoded in full")
        ):
            got = ImageTransform(64, exif_orientation=True).uint8(data)
        apart = levels_apart(got, expected)
        assert apart.mean() < 2
        assert apart.max() <= 24


def test_normalisation_is_the_published_arithmetic() -> None:
    pixels = torch.from_numpy(EVALUATE.uint8(picture(40, 50)).copy()).permute(2, 0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    result = EVALUATE(picture(40, 50))
    assert torch.equal(result, (pixels.float() / 255 - mean) / std)
    assert result.is_contiguous()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_draft_decoding_stays_close_to_full_decoding(options: dict[str, int]) -> None:
    image = picture(1203, 901)
    data = encoded(image, "JPEG", quality=90, **options)
    for seed in range(4):
        expected = cropped(Image.open(io.BytesIO(data)), seed, whole=4)
        apart = levels_apart(ImageTransform(64, train=True).uint8(data, seed), expected)
        assert apart.mean() < 0.6
        assert apart.max() <= 6
    full = ImageTransform(64, draft=False).uint8(data)
    apart = levels_apart(ImageTransform(64).uint8(data), full)
    assert apart.mean() < 0.6
    assert apart.max() <= 6


@pytest.mark.parametrize(
    ("mode", "options", "fast"),
    [
        ("RGB", {}, True),
        ("RGB", {"progressive": True}, True),
        ("RGB", {"subsampling": "4:2:2"}, True),
        ("RGB", {"subsampling": "4:4:4"}, True),
        ("RGB", {"keep_rgb": True}, True),
        ("CMYK", {}, False),
        ("L", {}, False),
    ],
)
def test_a_jpeg_gives_pillows_pixels_whoever_decodes_it(
    mode: str, options: dict[str, object], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(picture(333, 257, mode), "JPEG", **options)
    kinds = [(side, train) for side in (20, 40, 90, 200) for train in (False, True)]
    transforms = [ImageTransform(side, train=train) for side, train in kinds]

    def all_pixels() -> list[np.ndarray]:
        return [one.uint8(given, 5) for one in transforms for given in (data, memoryview(data))]

    pixels = all_pixels()
    refused = 0

    def refuse(*_: object, **__: object) -> None:
        nonlocal refused
        refused += 1
        raise ValueError("not today")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    for ours, pillows in zip(pixels, all_pixels(), strict=True):
        assert np.array_equal(ours, pillows)
    assert refused == (len(pixels) if fast else 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("size", [(300, 200), (20, 45)])
def test_training_pixels_are_a_box_that_pillow_resizes(mode: str, size: tuple[int, int]) -> None:
    image = picture(*size, mode)
    plain = image.convert("RGB") if mode == "P" else image
    for seed in range(4):
        expected = cropped(plain, seed)
        assert levels_apart(TRAIN.uint8(image, seed), expected).max() <= 1


def test_a_small_jpeg_is_decoded_in_full() -> None:
    data = encoded(picture(120, 90), "JPEG")
    assert np.array_equal(EVALUATE.uint8(data), published(Image.open(io.BytesIO(data)), 32))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_common_format_gives_pixels(kind: str) -> None:
    apart = levels_apart(
        EVALUATE.uint8(encoded(picture(60, 50), kind)), EVALUATE.uint8(picture(60, 50))
    )
    assert apart.mean() < 12


@pytest.mark.parametrize("mode", ["P", "1", "F"])
def test_modes_without_a_bicubic_filter_are_converted_first(mode: str) -> None:
    image = picture(60, 50, "L").convert(mode) if mode == "F" else picture(60, 50, mode)
    assert np.array_equal(EVALUATE.uint8(image), EVALUATE.uint8(image.convert("RGB")))


def test_sixteen_bit_greys_keep_their_upper_eight_bits() -> None:
    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    expected = EVALUATE.uint8((grey >> 8).astype(np.uint8))
    assert np.array_equal(EVALUATE.uint8(encoded(Image.fromarray(grey))), expected)


@pytest.mark.parametrize(
    ("scale", "kind"),
    [(1, np.float32), (255, np.float32), (65535, np.float32), (255, np.int32), (65535, np.int32)],
)
def test_greys_of_32_bits_are_scaled_by_their_largest_value(scale: int, kind: type) -> None:
    levels = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    grey = Image.fromarray((levels * scale).astype(kind))
    expected = EVALUATE.uint8(np.rint(levels * 255).astype(np.uint8))
    for image in (grey, encoded(grey, "TIFF")):
        assert levels_apart(EVALUATE.uint8(image), expected).max() <= 1


def test_what_is_no_number_is_black() -> None:
    grey = np.full((40, 40), np.nan, np.float32)
    assert EVALUATE.uint8(Image.fromarray(grey)).max() == 0


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert EVALUATE.uint8(data)[16, 16].tolist() == [255, 0, 0]


def test_orientation_is_ignored_unless_asked_for() -> None:
    image = picture(80, 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "PNG", exif=exif)
    assert np.array_equal(EVALUATE.uint8(data), EVALUATE.uint8(image))
    turned = ImageTransform(32, exif_orientation=True).uint8(data)
    assert np.array_equal(turned, EVALUATE.uint8(image.transpose(Image.Transpose.ROTATE_270)))


def test_a_tiff_is_turned_once_whoever_asks() -> None:
    image = picture(96, 64)
    turn = ImageTransform(32, exif_orientation=True)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        expected = turn.uint8(encoded(image, "PNG", exif=exif))
        for transform in (turn, EVALUATE):
            assert np.array_equal(transform.uint8(encoded(image, "TIFF", exif=exif)), expected)


def test_a_seed_fixes_the_crop_whatever_the_global_state() -> None:
    image = picture(90, 70)
    first = TRAIN(image, 7)
    np.random.seed(1)  # noqa: NPY002 (the global state must not matter)
    torch.manual_seed(1)
    assert torch.equal(TRAIN(image, 7), first)
    assert torch.equal(TRAIN(image, np.random.default_rng(7)), first)
    assert not torch.equal(TRAIN(image, 8), first)


def test_half_of_the_training_images_are_mirrored() -> None:
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    mirrored = 0
    for seed in range(400):
        row = TRAIN.uint8(image, seed)[16, :, 0].astype(int)
        mirrored += row[0] > row[-1]
    assert 160 <= mirrored <= 240


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 1 << 32))
def test_a_crop_lies_inside_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = random_box((width, height), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_areas_and_aspects_of_the_recipe() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box((1000, 1000), rng) for _ in range(4000)])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = across * down / 1e6, across / down
    assert 0.698 <= area.min() < 0.705
    assert area.max() <= 1
    assert 0.795 <= aspect.min() < 0.81
    assert 1.24 < aspect.max() <= 1.255
    assert abs(np.log(aspect).mean()) < 0.01


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("size", [(2_000_000, 1), (2, 400_000), (3, 13)])
@pytest.mark.parametrize("library", [True, False])
def test_a_very_long_image_takes_no_more_memory_than_its_crop_needs(
    mode: str, size: tuple[int, int], library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library:
        monkeypatch.setattr(_library, "is_loaded", lambda: False)
    resized: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, to: tuple[int, int], *options: Any) -> Image.Image:
        resized.append(to[0] * to[1])
        return resize(image, to, *options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    red = EVALUATE.uint8(Image.new(mode, size, "red"))
    assert (red == np.asarray(Image.new(mode, (1, 1), "red").convert("RGB"))).all()
    assert max(resized, default=0) <= 32 * 32 * 4


def test_what_is_cropped_before_pillow_resizes_it_looks_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_library, "is_loaded", lambda: False)
    for size in ((7, 90), (90, 7), (60, 700), (700, 60)):
        image = picture(*size)
        assert levels_apart(EVALUATE.uint8(image), published(image, 32)).max() <= 2
    image = picture(60, 200)
    assert np.array_equal(EVALUATE.uint8(image), published(image, 32))


GOOD = encoded(picture(60, 50), "JPEG")
LARGE = encoded(picture(600, 500), "JPEG")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (LARGE[: len(LARGE) // 2], "cannot be decoded .*truncated"),
        (encoded(picture(60, 50))[:-200], "cannot be decoded"),
        (b"<html>not found</html>", "not a known image format"),
        (b"", "empty"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((5, 5, 3), np.float32), "must be uint8"),
    ],
)
def test_a_broken_input_is_named_with_the_reason(broken: bytes, reason: str) -> None:
    with pytest.raises(ImageDecodeError, match=f"image 'row-7': .*{reason}") as caught:
        EVALUATE(broken, name="row-7")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name, again.reason) == (str(caught.value), "row-7", again.reason)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    data = encoded(Image.new("1", (3000, 3000)))
    with pytest.raises(ImageDecodeError, match="3000x3000 pixels, more than max_pixels=1,000,000"):
        ImageTransform(32, max_pixels=1_000_000)(data[:200])


def test_planes_are_the_same_pixels_channel_by_channel() -> None:
    for transform, seed in ((EVALUATE, 0), *((TRAIN, seed) for seed in range(6))):
        planes, pixels = transform.planes(GOOD, seed), transform.uint8(GOOD, seed)
        assert planes.shape == (3, 32, 32)
        # Mirrored or not, PyTorch takes both.
        assert torch.equal(torch.from_numpy(planes), torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_batch_sets_broken_inputs_aside() -> None:
    result = TRAIN.batch([GOOD, b"junk", GOOD, GOOD[:300]], 3)
    assert result.pixels.shape == (2, 3, 32, 32)
    assert result.indices == [0, 2]
    assert [error.name for error in result.errors] == [1, 3]
    whole = TRAIN.batch([GOOD, GOOD, GOOD], 3)
    assert torch.equal(result.pixels[1], whole.pixels[2])


@pytest.mark.parametrize("other", [None, Path("photo.jpg"), "photo.jpg"])
def test_a_batch_sets_aside_what_is_no_image_at_all(other: Any) -> None:
    result = EVALUATE.batch([GOOD, other], names=["a", "b"])
    assert result.indices == [0]
    kind = type(other).__name__
    reason = f"an image is encoded bytes, a Pillow image or a uint8 array, not {kind}"
    assert [str(error) for error in result.errors] == [f"image 'b': {reason}"]


def test_pixels_are_float32_on_the_cpu_whatever_pytorchs_defaults() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            batches = [EVALUATE.batch(images).pixels for images in ([], [GOOD])]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [tuple(pixels.shape) for pixels in batches] == [(0, 3, 32, 32), (1, 3, 32, 32)]
    assert {(pixels.dtype, pixels.device.type) for pixels in batches} == {(torch.float32, "cpu")}


@pytest.mark.parametrize(
    ("runs_out", "use"),
    [
        ((Image, "open"), EVALUATE),
        ((ImageFile.ImageFile, "load"), EVALUATE),
        ((Image.Image, "getexif"), ImageTransform(32, exif_orientation=True)),
        ((ImageFile.ImageFile, "load"), lambda data: small_picture(data, 16)),
    ],
)
def test_memory_that_runs_out_is_no_broken_image(
    runs_out: tuple[Any, str], use: Callable[[bytes], object]
) -> None:
    data = encoded(picture(60, 50))
    with mock.patch.object(*runs_out, side_effect=MemoryError), pytest.raises(MemoryError):
        use(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_but_the_decode_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]))
    damaged = bytearray(encoded(picture(24, 20), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    with contextlib.suppress(ImageDecodeError):
        EVALUATE(bytes(damaged[:cut] if data.draw(st.booleans()) else damaged))


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="needs rng"):
        TRAIN(GOOD)
    with pytest.raises(TypeError, match="not str"):
        EVALUATE("photo.jpg")  # type: ignore[arg-type]
    for size in (0, 32.0, "32"):
        with pytest.raises(ValueError, match=f"image_size is {size!r}; it must be a whole number"):
            ImageTransform(size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="three numbers"):
        ImageTransform(8, (0.5,), (0.5,))
