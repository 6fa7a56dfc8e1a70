"""What a model is made of, as plain frozen dataclasses: validated when made, JSON and back.

Only the standard library is used, so that a checkpoint's configuration can be read anywhere.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The operator's limits on the channels of one head.
_HEAD_SIZE_STEP = 8
_HEAD_SIZE_MAX = 128
# Far above any model: what a damaged file asks for is refused, and not made.
_MOST_BLOCKS = 1000
_LARGEST_SIZE = 1 << 20
_SHORTEST_CONTEXT = 3  # the two tokens around a text, and one of its own


@dataclass(frozen=True)
class ImageConfig:
    """The image encoder.

    Attributes:
        depth: blocks.
        heads: heads of the time mix; each has embed_dim / heads channels.
        embed_dim: channels of a token, and of the embedding.
        hidden_dim: channels inside the channel mix.
        patch_size: side of a token's square of pixels.
        image_size: side of the image that the position embedding is made for, in pixels.
        class_token: embed the image by one more, learned token; else by the mean of all tokens.
        drop_path: chance of dropping a branch in the last block; it grows linearly from zero.
        mean: of each colour channel in 0..1, taken from the pixels before the encoder.
        std: of each colour channel, by which they are then divided.
    """

    depth: int
    heads: int
    embed_dim: int
    hidden_dim: int
    patch_size: int
    image_size: int
    class_token: bool = False
    drop_path: float = 0.0
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        _check_count("image.depth", self.depth, most=_MOST_BLOCKS)
        for name in ("heads", "embed_dim", "hidden_dim", "patch_size", "image_size"):
            _check_count(f"image.{name}", getattr(self, name))
        _check_heads("image", self.heads, self.embed_dim)
        _check(
            "image.class_token",
            self.class_token,
            "true or false",
            isinstance(self.class_token, bool),
        )
        _check_rate("image.drop_path", self.drop_path)
        for name in ("mean", "std"):
            colours = _triple(f"image.{name}", getattr(self, name))
            object.__setattr__(self, name, colours)  # JSON has lists
        _check("image.std", self.std, "three numbers above zero", min(self.std) > 0)

    @property
    def head_size(self) -> int:
        """N, the channels of one head."""
        return self.embed_dim // self.heads

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return -(-self.image_size // self.patch_size)


@dataclass(frozen=True)
class TextConfig:
    """The text encoder.

    Attributes:
        depth: blocks.
        heads: heads of the time mix; each has embed_dim / heads channels.
        embed_dim: channels of a token, and of the embedding.
        hidden_dim: channels inside the channel mix.
        context_length: tokens of a text as tokenized; the encoder itself takes any length.
        vocab_size: distinct tokens.
        dropout: chance of zeroing a channel of the residual stream after each branch.
    """

    depth: int
    heads: int
    embed_dim: int
    hidden_dim: int
    context_length: int = 77
    vocab_size: int = 49408
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_count("text.depth", self.depth, most=_MOST_BLOCKS)
        _check_count("text.context_length", self.context_length, least=_SHORTEST_CONTEXT)
        for name in ("heads", "embed_dim", "hidden_dim", "vocab_size"):
            _check_count(f"text.{name}", getattr(self, name))
        _check_heads("text", self.heads, self.embed_dim)
        _check_rate("text.dropout", self.dropout)

    @property
    def head_size(self) -> int:
        """N, the channels of one head."""
        return self.embed_dim // self.heads


@dataclass(frozen=True)
class CLIPConfig:
    """Both encoders. They meet in one space without a projection, so their widths are equal.

    Raises:
        ValueError: naming the key, what it got and what it takes.
    """

    image: ImageConfig
    text: TextConfig
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        _check("image", self.image, "an ImageConfig", isinstance(self.image, ImageConfig))
        _check("text", self.text, "a TextConfig", isinstance(self.text, TextConfig))
        _check("name", self.name, "a string", isinstance(self.name, str))
        same = self.text.embed_dim == self.image.embed_dim
        takes = f"the image encoder's {self.image.embed_dim}"
        _check("text.embed_dim", self.text.embed_dim, takes, same)

    @property
    def image_size(self) -> int:
        return self.image.image_size

    @property
    def image_mean(self) -> tuple[float, float, float]:
        return self.image.mean

    @property
    def image_std(self) -> tuple[float, float, float]:
        return self.image.std

    @property
    def context_length(self) -> int:
        return self.text.context_length

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def embed_dim(self) -> int:
        """D, the channels of an embedding."""
        return self.image.embed_dim

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON knows it; `from_dict` reads it back."""
        return {
            "name": self.name,
            "image": _plain(self.image),
            "text": _plain(self.text),
        }

    @classmethod
    def from_dict(cls, data: object) -> "CLIPConfig":
        """Read what `to_dict` wrote; raises ValueError, unknown and missing keys included."""
        keys = _keys("", data, cls)
        image = ImageConfig(**_keys("image", keys["image"], ImageConfig))
        text = TextConfig(**_keys("text", keys["text"], TextConfig))
        return cls(image, text, keys.get("name", "custom"))

    def with_image_size(self, image_size: int) -> "CLIPConfig":
        """The same model for images of another size."""
        return dataclasses.replace(
            self, image=dataclasses.replace(self.image, image_size=image_size)
        )


def _check(key: str, value: object, takes: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{key}: got {value!r}, takes {takes}")


def _check_count(key: str, value: object, least: int = 1, most: int = _LARGEST_SIZE) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _check(key, value, f"a whole number from {least} to {most}", fits)


def _check_rate(key: str, value: object) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    _check(key, value, "a number from 0 to below 1", fits)


def _check_heads(tower: str, heads: int, embed_dim: int) -> None:
    takes = f"a divisor of {tower}.embed_dim, which is {embed_dim}"
    _check(f"{tower}.heads", heads, takes, embed_dim % heads == 0)
    head_size = embed_dim // heads
    fits = head_size % _HEAD_SIZE_STEP == 0 and head_size <= _HEAD_SIZE_MAX
    takes = (
        f"heads whose size, {embed_dim} / {heads} = {head_size}, is a multiple of "
        f"{_HEAD_SIZE_STEP} up to {_HEAD_SIZE_MAX}"
    )
    _check(f"{tower}.heads", heads, takes, fits)


def _triple(key: str, value: Any) -> tuple[float, float, float]:
    fits = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))
    _check(key, value, "three numbers", fits)
    red, green, blue = map(float, value)
    return red, green, blue


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value)


def _keys(path: str, data: object, cls: type[Any]) -> dict[str, Any]:
    """The keyword arguments of a configuration class, checked to be those it has."""
    where = path or "the configuration"
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: got {data!r}, takes a mapping of keys to values")
    fields = {each.name: each for each in dataclasses.fields(cls)}
    dotted = f"{path}." if path else ""
    unknown = [f"{dotted}{key}" for key in data if key not in fields]
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; {where} takes {', '.join(fields)}")
    missing = [
        f"{dotted}{name}"
        for name, each in fields.items()
        if name not in data and each.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return dict(data)


def _plain(config: ImageConfig | TextConfig) -> dict[str, Any]:
    """A dataclass as a dict in which tuples are lists, as JSON reads them back."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }


def _base(patch_size: int) -> CLIPConfig:
    """The paper's B models, with its rate of stochastic depth."""
    return CLIPConfig(
        ImageConfig(
            depth=12,
            heads=8,
            embed_dim=640,
            hidden_dim=3200,
            patch_size=patch_size,
            image_size=224,
            drop_path=0.3,
        ),
        TextConfig(depth=6, heads=10, embed_dim=640, hidden_dim=2240),
        name=f"RWKV-CLIP-B-{patch_size}",
    )


def _tiny() -> CLIPConfig:
    """Small enough to train on a CPU in minutes; the B models' proportions."""
    return CLIPConfig(
        ImageConfig(depth=4, heads=4, embed_dim=128, hidden_dim=640, patch_size=8, image_size=64),
        TextConfig(depth=3, heads=4, embed_dim=128, hidden_dim=448),
        name="RWKV-CLIP-Tiny",
    )


CONFIGS: Mapping[str, CLIPConfig] = {
    config.name: config for config in (_base(32), _base(16), _tiny())
}


def named_config(name: str) -> CLIPConfig:
    """The configuration of that name; raises ValueError with the names there are."""
    if name not in CONFIGS:
        raise ValueError(f"no model is named {name!r}; takes {', '.join(CONFIGS)}")
    return CONFIGS[name]
