"""RWKV-CLIP: image and text encoders on a bidirectional WKV6 operator, in plain PyTorch.

Everything here is imported on first use, so `import rwkv_clip` costs nothing, and the operator
and the model work where the tokenizer's and the transforms' dependencies are not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rwkv_clip._version import __version__

if TYPE_CHECKING:
    from rwkv_clip import loss, ops
    from rwkv_clip.model import create_model, load_checkpoint, save_checkpoint
    from rwkv_clip.tokenizer import tokenize
    from rwkv_clip.transforms import image_transform

__all__ = [
    "__version__",
    "create_model",
    "image_transform",
    "load_checkpoint",
    "loss",
    "ops",
    "save_checkpoint",
    "tokenize",
]

_HOMES = {
    "create_model": "rwkv_clip.model",
    "image_transform": "rwkv_clip.transforms",
    "load_checkpoint": "rwkv_clip.model",
    "save_checkpoint": "rwkv_clip.model",
    "tokenize": "rwkv_clip.tokenizer",
}
_MODULES = frozenset({"loss", "ops"})


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"rwkv_clip.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'rwkv_clip' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
