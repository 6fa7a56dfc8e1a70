"""Encoded images, Pillow images or arrays in; normalised float32 pixels [3, S, S] out.

Evaluation equals the published transform (torchvision's on Pillow): shorter side to S, bicubic with
antialias, centre crop, RGB, normalise. Training crops a random box, resizes it, may flip it, and
changes its colours where that is asked for (jitter.py). Choices:
- Pixels stay uint8 to the last step, a table of 256 normalised values per channel.
- Training crops and resizes by a triangle filter with antialias: half the cost of the bicubic one,
  and who learns from random crops does not see the difference. PyTorch's resize of eight-bit RGB is
  vectorised, Pillow's is not: a quarter of the time, and the same pixels to one level. Pillow
  resizes the other modes.
- Evaluation resizes as published, rows first, and RGB by a kernel of ours that makes the same
  pixels and only those that the crop keeps (resize.py). Pillow resizes the other modes, and all of
  them where the library was not built: the whole image, but images longer than 4:1 are cropped
  first, which bounds the memory they take.
- Large JPEGs are decoded at 1/2, 1/4 or 1/8 scale, which the format allows at a fraction of the
  cost, as long as twice the wanted resolution remains. A training crop then begins and ends at the
  nearest pixel that was decoded. `draft=False` decodes in full.
- JPEGs in colour are decoded through simplejpeg, by the same library and so to the same pixels as
  through Pillow, in two thirds of the time. Pillow reads every header, and decodes what simplejpeg
  does not take (CMYK, greys) or complains of: limits, errors and what is tolerated are Pillow's.
- EXIF orientation is ignored, as the published code does; `exif_orientation=True` applies it, to
  what was decoded at the scale that is needed. A TIFF is always turned, by Pillow.
- Modes L, LA, RGB, RGBA and CMYK are resized as they are and then converted, as published. Pillow
  has no bicubic filter for palettes and bitmaps (it takes the nearest pixel without a word), so P
  and 1 are converted first. 16-bit greys keep their upper eight bits; greys of 32 bits, whose files
  do not say what is white, are scaled by their largest value (images.eight_bits). Transparency is
  dropped, as published: a transparent pixel shows the colour it is stored with.
- An animation gives its first frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from rwkv_clip.images import Encoded, ImageDecodeError, eight_bits, open_named
from rwkv_clip.jitter import ColourJitter
from rwkv_clip.resize import Box, Pixels, planes_of, resize_bicubic, resize_by_pillow

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 64_000_000
CROP_AREA = (0.7, 1.0)
CROP_ASPECT = (0.8, 1.25)

ImageInput = Encoded | Image.Image | Pixels


class _Turn(NamedTuple):
    """How an image is turned before it is cropped."""

    how: Image.Transpose
    aside: bool  # width and height change places
    mirrored: tuple[bool, bool]  # whether x, and y, then begin at what was an end


_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: _Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, (True, False)),
    3: _Turn(Image.Transpose.ROTATE_180, False, (True, True)),
    4: _Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, (False, True)),
    5: _Turn(Image.Transpose.TRANSPOSE, True, (False, False)),
    6: _Turn(Image.Transpose.ROTATE_270, True, (True, False)),
    7: _Turn(Image.Transpose.TRANSVERSE, True, (True, True)),
    8: _Turn(Image.Transpose.ROTATE_90, True, (False, True)),
}


class _Crop(NamedTuple):
    """Turn the source, resize its box to size, cut the output at offset, and perhaps mirror it."""

    box: Box  # left, upper, right, lower; in pixels of the turned source
    size: tuple[int, int]  # width, height
    offset: tuple[int, int]  # left, upper
    flip: bool = False
    turn: _Turn | None = None


class ImageSettings(Protocol):
    """What a transform reads from a model's configuration."""

    @property
    def image_size(self) -> int: ...
    @property
    def image_mean(self) -> tuple[float, ...]: ...
    @property
    def image_std(self) -> tuple[float, ...]: ...


class TransformedBatch(NamedTuple):
    """The usable images of a batch, where they stood in it, and an error for each other one."""

    pixels: Tensor  # float32 [n, 3, S, S]
    indices: list[int]  # n positions in the input
    errors: list[ImageDecodeError]


class ImageTransform:
    """Turns one image into pixels; immutable, and safe to share between threads and processes.

    Args:
        image_size: S, in pixels.
        mean, std: of the three channels, for pixels in 0..1.
        train: random crop and flip instead of the centre crop.
        jitter: of the colours, in training.
        draft: let the JPEG decoder skip resolution that the output cannot show.
        exif_orientation: turn the image as its EXIF tag says (the published code does not); a
            TIFF is turned either way.
        max_pixels: larger images are refused before they are decoded; so are encoded ones above
            twice PIL.Image.MAX_IMAGE_PIXELS, 179 million, unless that is raised as well.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        train: bool = False,
        jitter: ColourJitter | None = None,
        draft: bool = True,
        exif_orientation: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not isinstance(image_size, int | np.integer) or image_size < 1:
            raise ValueError(f"image_size is {image_size!r}; it must be a whole number, at least 1")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} must be three numbers each, std positive")
        if jitter is not None and not train:
            raise ValueError("jitter is for training, and this transform is for evaluation")
        self.image_size = int(image_size)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.train = train
        self.jitter = jitter
        self.draft = draft
        self.exif_orientation = exif_orientation
        self.max_pixels = max_pixels
        levels = np.arange(256, dtype=np.float32) / np.float32(255)
        self._levels = (levels - np.array(self.mean, np.float32)[:, None]) / np.array(
            self.std, np.float32
        )[:, None]

    def __call__(
        self,
        image: ImageInput,
        rng: np.random.Generator | int | None = None,
        *,
        name: object = None,
    ) -> Tensor:
        """Normalised pixels, float32 [3, S, S].

        Args:
            image: an encoded file's bytes, a Pillow image, or uint8 [H, W], [H, W, 1] or [H, W, 3].
            rng: generator or seed of the crop, flip and colours; needed when training, unused
                otherwise. No global state is read.
            name: what errors call this input.

        Raises:
            ImageDecodeError: the input is truncated, no image, empty, or above max_pixels.
            TypeError: the input is of none of these types.
            ValueError: training without rng.
        """
        return torch.from_numpy(self._normalise(self.planes(image, rng, name=name)))

    def batch(
        self,
        images: Iterable[ImageInput],
        rng: np.random.Generator | int | None = None,
        *,
        names: Sequence[object] | None = None,
    ) -> TransformedBatch:
        """Transforms what can be; sets the others aside, each with an error that names it.

        Those are broken images, and what is none, as None or a path.

        Args:
            names: what errors call the inputs; their indices if None.
        """
        generator = np.random.default_rng(rng) if rng is not None else None
        pixels: list[Tensor] = []
        indices: list[int] = []
        errors: list[ImageDecodeError] = []
        for index, image in enumerate(images):
            name = index if names is None else names[index]
            # One draw an image, so that a broken one does not move the crops of those behind it.
            seed = None if generator is None else int(generator.integers(1 << 63))
            if not _is_input(image):
                errors.append(ImageDecodeError(_none_of_the_types(image), name))
                continue
            try:
                pixels.append(self(image, seed, name=name))
                indices.append(index)
            except ImageDecodeError as error:
                errors.append(error)
        if not pixels:
            nothing = np.empty((0, 3, self.image_size, self.image_size), np.float32)
            return TransformedBatch(torch.from_numpy(nothing), indices, errors)
        return TransformedBatch(torch.stack(pixels), indices, errors)

    def uint8(
        self,
        image: ImageInput,
        rng: np.random.Generator | int | None = None,
        *,
        name: object = None,
    ) -> Pixels:
        """The same before normalisation, as pictures are usually held: uint8 [S, S, 3] in RGB."""
        return self.planes(image, rng, name=name).transpose(1, 2, 0)

    def planes(
        self,
        image: ImageInput,
        rng: np.random.Generator | int | None = None,
        *,
        name: object = None,
    ) -> Pixels:
        """The same before normalisation, as models take it: uint8 [3, S, S], red, green, blue."""
        if self.train and rng is None:
            raise ValueError("a training transform needs rng: a numpy Generator or a seed")
        generator = np.random.default_rng(rng) if self.train else None
        opened = self._open(image, name)
        size, turn = opened.size, None
        if self.exif_orientation:
            turn = _turn(opened, name)
            size = size[::-1] if turn and turn.aside else size
        crop = self._choose(size, generator)._replace(turn=turn)
        try:
            pixels = self._resize(opened, image if isinstance(image, Encoded) else None, crop)
        except MemoryError:  # which is not the file's fault
            raise
        except Exception as error:  # Pillow's decoders raise whatever a broken file leads them to
            raise ImageDecodeError(f"cannot be decoded ({error})", name) from error
        if crop.flip:  # copied, because PyTorch takes no array that runs backwards
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        return self.jitter(pixels, generator) if self.jitter and generator else pixels

    def _open(self, image: ImageInput, name: object) -> Image.Image:
        """The image with its header read and its size checked, its pixels not yet decoded."""
        opened = _open(image, name)
        width, height = opened.size
        if width == 0 or height == 0:
            raise ImageDecodeError(f"is empty ({width}x{height} pixels)", name)
        if width * height > self.max_pixels:
            raise ImageDecodeError(
                f"has {width}x{height} pixels, more than max_pixels={self.max_pixels:,}", name
            )
        return opened

    def _choose(self, size: tuple[int, int], generator: np.random.Generator | None) -> _Crop:
        if generator is None:
            return _centre(size, self.image_size)
        box = random_box(size, generator)
        return _Crop(box, (self.image_size,) * 2, (0, 0), flip=bool(generator.random() < 0.5))

    def _resize(self, image: Image.Image, encoded: Encoded | None, crop: _Crop) -> Pixels:
        """The crop in RGB, [3, S, S]; decodes no more of a JPEG than that needs.

        Args:
            image: opened, not yet decoded.
            encoded: the file that it was opened from, if it was one.
            crop: what is wanted of it.
        """
        side, pixels, scale = self.image_size, None, 1
        whole = image.size
        if encoded is not None and image.format == "JPEG":
            scale = _draft(image, crop) if self.draft else 1
            pixels = _decode_jpeg(image, encoded, scale)
        crop = crop._replace(box=_scaled(crop, whole, image.size, scale))
        if pixels is None:
            decoded = eight_bits(image)
            return self._resize_decoded(
                decoded.transpose(crop.turn.how) if crop.turn else decoded, crop
            )
        if crop.turn:
            pixels = np.array(Image.fromarray(pixels).transpose(crop.turn.how))
        if not self.train:
            return resize_bicubic(pixels, crop.box, crop.size, crop.offset, side)
        left, top, right, bottom = _whole(crop.box)
        return _shrink(pixels[top:bottom, left:right], side)

    def _resize_decoded(self, image: Image.Image, crop: _Crop) -> Pixels:
        """The same of an image that Pillow has decoded, and that has been turned."""
        side = self.image_size
        if self.train:
            cut = image.crop(_whole(crop.box))
            if cut.mode == "RGB":
                return _shrink(np.array(cut), side)
            return planes_of(cut.resize((side, side), Image.Resampling.BILINEAR))
        if image.mode == "RGB":
            return resize_bicubic(np.array(image), crop.box, crop.size, crop.offset, side)
        return planes_of(resize_by_pillow(image, crop.box, crop.size, crop.offset, side))

    def _normalise(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        out = np.empty(pixels.shape, np.float32)
        for channel in range(3):
            np.take(self._levels[channel], pixels[channel], out=out[channel], mode="clip")
        return out


def image_transform(config: ImageSettings, train: bool = False, **options: Any) -> ImageTransform:
    """The transform a model was (or is to be) trained with.

    Args:
        config: a model's configuration: image_size, image_mean, image_std.
        train: random crop and flip; such a transform is called with a generator or a seed.
        options: jitter, draft, exif_orientation, max_pixels of `ImageTransform`.
    """
    return ImageTransform(
        config.image_size, config.image_mean, config.image_std, train=train, **options
    )


def _centre(size: tuple[int, int], side: int) -> _Crop:
    """Shorter side to `side`, then the centre square, of a (width, height) image.

    With the roundings of torchvision: the longer side is cut to whole pixels after the resize, and
    so is the crop's offset.
    """
    shorter = min(size)
    width, height = (side * length // shorter for length in size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return _Crop((0, 0, *size), (width, height), (left, top))


def random_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """A box of 0.7 to 1 of the area and an aspect of 0.8 to 1.25, uniform in its logarithm.

    If ten draws do not fit into the image, its largest centred box of a permitted aspect.
    """
    width, height = size
    log_low, log_high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(log_low, log_high))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left = int(rng.integers(width - across + 1))
            top = int(rng.integers(height - down + 1))
            return (left, top, left + across, top + down)
    aspect = min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1])
    across, down = min(width, round(height * aspect)), min(height, round(width / aspect))
    across, down = max(across, 1), max(down, 1)
    left, top = (width - across) // 2, (height - down) // 2
    return (left, top, left + across, top + down)


def _draft(image: Image.Image, crop: _Crop) -> int:
    """Lets the decoder of a JPEG skip resolution; gives by how much: 1, 2, 4 or 8."""
    box, width = crop.box, image.width
    shrink = 2 * max(crop.size[0] / (box[2] - box[0]), crop.size[1] / (box[3] - box[1]))
    # The decoder keeps both sides at or above the size it is asked for.
    image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
    return round(width / image.width)


def _scaled(crop: _Crop, size: tuple[int, int], drafted: tuple[int, int], scale: int) -> Box:
    """The crop's box in a source that was decoded at 1/scale, to that size.

    The last pixel of a row or column may stand for fewer than `scale` pixels of the source, and is
    the first one where the axis is mirrored.
    """
    left, top, right, bottom = (edge / scale for edge in crop.box)
    if crop.turn is not None:
        beyond = [length - of / scale for length, of in zip(drafted, size, strict=True)]
        x, y = beyond[::-1] if crop.turn.aside else beyond
        left, right = (edge + x * crop.turn.mirrored[0] for edge in (left, right))
        top, bottom = (edge + y * crop.turn.mirrored[1] for edge in (top, bottom))
    return left, top, right, bottom


def _decode_jpeg(image: Image.Image, encoded: Encoded, scale: int) -> Pixels | None:
    """The file's pixels [H, W, 3] at 1/scale; None if Pillow has to decode it.

    Args:
        image: what Pillow found in the header, drafted to that scale.
    """
    if image.mode != "RGB":
        return None
    width, height = image.size
    least = {"min_width": width, "min_height": height} if scale > 1 else {}
    try:
        # Into memory of the size that was checked, whatever the decoder makes of the header.
        buffer = np.empty(3 * width * height, np.uint8)
        pixels: Pixels = simplejpeg.decode_jpeg(encoded, buffer=buffer, **least)
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


def _whole(box: Box) -> tuple[int, int, int, int]:
    """A box to the nearest whole pixel, and never empty."""
    left, top = round(box[0]), round(box[1])
    return left, top, max(round(box[2]), left + 1), max(round(box[3]), top + 1)


def _shrink(pixels: Pixels, side: int) -> Pixels:
    """[H, W, 3], which may be a part of a larger image, to [3, side, side]."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(planes, (side, side), mode="bilinear", antialias=True)[0].numpy()


def _turn(image: Image.Image, name: object) -> _Turn | None:
    """What puts the image upright, by its EXIF tag."""
    if image.format == "TIFF":  # Pillow turns these itself, when it decodes them
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise whatever a broken header leads them to
        raise ImageDecodeError(f"cannot be decoded ({error})", name) from error


def _open(image: ImageInput, name: object) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if not isinstance(image, Encoded):
        raise TypeError(_none_of_the_types(image))
    return open_named(image, name)


def _is_input(image: object) -> bool:
    return isinstance(image, Encoded | Image.Image | np.ndarray)


def _none_of_the_types(image: object) -> str:
    kind = type(image).__name__
    return f"an image is encoded bytes, a Pillow image or a uint8 array, not {kind}"


def _from_array(array: Pixels, name: object) -> Image.Image:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] == 3)):
        raise ImageDecodeError(
            f"is an array of {array.dtype} {list(array.shape)}; it must be uint8 [H, W], [H, W, 1] "
            "or [H, W, 3]",
            name,
        )
    if array.size == 0:
        raise ImageDecodeError(f"is empty ({array.shape[1]}x{array.shape[0]} pixels)", name)
    return Image.fromarray(array.reshape(array.shape[:2]) if grey else array)
