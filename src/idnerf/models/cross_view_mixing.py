"""Attention among any number of source views at 1/8, in GMFlow's windows (arXiv 2111.13680): an option of the cascade.

GMFlow's transformer sees pairs. Here every view attends to each of the others with the same weights, and the messages
are averaged: any number of views, in any order.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.models.cross_view_transformer import CrossViewBlock, window_positions
from idnerf.models.feature_pyramid import start_at_zero

SPLITS = 2
"""Windows along each side of the map, GMFlow's choice; every second block shifts them by half."""


class MixingBlock(CrossViewBlock):
    """Self-attention of every view, then the mean of its messages from the others, with a feed-forward network."""

    def among(
        self, maps: Float[Tensor, "batch view height width channel"], shifted: bool
    ) -> Float[Tensor, "batch view height width channel"]:
        """``shifted``: windows begin half a window later."""
        shape, view = maps.shape, maps.shape[1]
        flat = maps.flatten(0, 1)
        own, other = self.self_attention, self.cross_attention
        flat = flat + own(own.query(flat), own.key_value(flat), SPLITS, shifted)
        query, shown = other.query(flat), other.key_value(flat).unflatten(0, shape[:2])
        heard = torch.zeros_like(flat)
        for offset in range(1, view):  # view i hears view i + offset
            heard = heard + other(query, shown.roll(-offset, 1).flatten(0, 1), SPLITS, shifted)
        return (flat + self._fed_forward(torch.cat([flat, heard / (view - 1)], -1))).unflatten(0, shape[:2])


class CrossViewMixing(nn.Module):
    """Adds to the 1/8 features what the other views know. Starts silent: the features are unchanged then."""

    def __init__(self, channels: int, layers: int, expansion: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(MixingBlock(channels, expansion) for _ in range(layers))
        self.out = nn.Linear(channels, channels)
        start_at_zero(self.out)

    def forward(
        self, features: Float[Tensor, "batch view channel height8 width8"]
    ) -> Float[Tensor, "batch view channel height8 width8"]:
        """Sides are multiples of ``SPLITS``."""
        height, width = features.shape[-2:]
        maps = features.movedim(2, -1)
        code = window_positions(height // SPLITS, width // SPLITS, maps.shape[-1], maps.device)
        mixed = maps + code.repeat(SPLITS, SPLITS, 1)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, MixingBlock)
            mixed = block.among(mixed, shifted=index % 2 == 1)
        return features + self.out(mixed).movedim(-1, 2)
