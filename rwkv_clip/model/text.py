"""The text encoder: tokens of any length, and the mean of their directions.

Shapes: B batch, T tokens, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_clip.model.blocks import LAYER_NORM_EPS, Block, TextChannelMix, TimeMix, run_blocks
from rwkv_clip.model.config import TextConfig
from rwkv_clip.ops.fused import TokenShift

HEAD_NORM_EPS = 6.4e-4


class TextEncoder(nn.Module):
    """From tokens to an embedding, not normalised. Order is told by the time mix alone."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        D = config.embed_dim
        # Weights are given, because PyTorch would draw some otherwise; on the meta device, where
        # models are made, it imports its compiler for that, which takes more than a second.
        weights = torch.empty(config.vocab_size, D)
        self.emb = nn.Embedding(config.vocab_size, D, _weight=weights)
        self.blocks = nn.ModuleList(
            Block(
                TimeMix(D, config.heads, HEAD_NORM_EPS),
                TextChannelMix(D, config.hidden_dim),
                first=i == 0,
                dropout=config.dropout,
            )
            for i in range(config.depth)
        )
        self.ln_out = nn.LayerNorm(D, eps=LAYER_NORM_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] of any length -> [B, D]. Padding counts, as it did in the published training."""
        shift = TokenShift(self.config.head_size)
        recompute = self.recompute and self.training
        x = run_blocks(self.blocks, self.emb(tokens), shift, recompute=recompute)
        return F.normalize(self.ln_out(x), dim=-1).mean(dim=1)
