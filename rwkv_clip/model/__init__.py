"""The RWKV-CLIP model: its configuration, its encoders, its first weights and its checkpoints."""

from rwkv_clip.model.checkpoint import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    save_published_checkpoint,
)
from rwkv_clip.model.clip import RWKVCLIP, create_model
from rwkv_clip.model.config import CONFIGS, CLIPConfig, ImageConfig, TextConfig, named_config

__all__ = [
    "CONFIGS",
    "RWKVCLIP",
    "CLIPConfig",
    "CheckpointError",
    "ImageConfig",
    "TextConfig",
    "create_model",
    "load_checkpoint",
    "named_config",
    "save_checkpoint",
    "save_published_checkpoint",
]
