"""The image encoder: patches of any size of image, and their mean or a class token.

Shapes: B batch, P patches, T = P (+ 1 with a class token) tokens, D channels, p patch side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_clip.model.blocks import (
    LAYER_NORM_EPS,
    Block,
    ImageChannelMix,
    TimeMix,
    run_blocks,
    sample_noise,
)
from rwkv_clip.model.config import ImageConfig
from rwkv_clip.ops.fused import TokenShift

HEAD_NORM_EPS = 1e-5


class PatchProjection(nn.Conv2d):
    """The convolution whose published weight this keeps, of squares that do not overlap.

    Which makes it one matrix product; as that it is a fifth faster on a CPU, and leaves tokens
    contiguous.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, rows * p, columns * p] -> [B, D, rows, columns]."""
        B, _, height, width = pixels.shape
        side = self.stride[0]
        rows, columns = height // side, width // side
        squares = pixels.reshape(B, 3, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        squares = squares.reshape(B, rows, columns, 3 * side * side)
        weight = self.weight.flatten(1)
        return F.linear(squares.to(weight.dtype), weight, self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Cut an image into squares and project each to a token."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.side = side = config.patch_size
        self.projection = PatchProjection(3, config.embed_dim, kernel_size=side, stride=side)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, height, width] -> [B, D, rows, columns]; zeros fill the last row and column."""
        below, right = -pixels.shape[-2] % self.side, -pixels.shape[-1] % self.side
        if _is_open(below) or _is_open(right) or below or right:
            pixels = F.pad(pixels, (0, right, 0, below))
        patches: Tensor = self.projection(pixels)
        return patches


class ImageEncoder(nn.Module):
    """From pixels to an embedding, not normalised."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        D = config.embed_dim
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid**2, D))
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        self.patch_embed = PatchEmbed(config)
        last = max(config.depth - 1, 1)
        self.layers = nn.ModuleList(
            Block(
                TimeMix(D, config.heads, HEAD_NORM_EPS),
                ImageChannelMix(D, config.hidden_dim),
                first=i == 0,
                drop_path=config.drop_path * i / last,
            )
            for i in range(config.depth)
        )
        self.ln1 = nn.LayerNorm(D, eps=LAYER_NORM_EPS)

    def forward(self, pixels: Tensor, seeds: Tensor | None = None) -> Tensor:
        """[B, 3, height, width] of any height and width -> [B, D].

        Args:
            pixels: [B, 3, height, width].
            seeds: int64 [B], by which branches are dropped in training; PyTorch's generator if
                absent.
        """
        patches = self.patch_embed(pixels)
        rows, columns = patches.shape[-2:]
        x = patches.flatten(2).transpose(1, 2) + self._positions(rows, columns)
        has_class_token = self.config.class_token
        if has_class_token:  # last, and without a position
            x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], dim=1)
        shift = TokenShift(self.config.head_size, (rows, columns), has_class_token)
        recompute = self.recompute and self.training
        noise = None
        if seeds is not None and self.training and self.config.drop_path:
            noise = sample_noise(seeds, 2 * len(self.layers))
        x = run_blocks(self.layers, x, shift, recompute=recompute, noise=noise)
        if has_class_token:
            x = x[:, -1:]
        embedding: Tensor = self.ln1(x).mean(dim=1)
        return embedding

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The position embedding of a grid: [1, rows * columns, D]."""
        is_open = _is_open(rows) or _is_open(columns)
        if not is_open and rows == columns == self.config.grid:
            return self.pos_embed
        return resize_positions(self.pos_embed, rows, columns)


def _is_open(size: int) -> bool:
    """Whether a program is exported for every such size: to ask after it would bind the program."""
    return torch.compiler.is_exporting() and isinstance(size, torch.SymInt)


def resize_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Interpolate the position embedding of a square grid: [1, P, D] -> [1, rows * columns, D]."""
    _, P, D = positions.shape
    side = round(P**0.5)
    square = positions.transpose(1, 2).view(1, D, side, side)
    resized = F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)
