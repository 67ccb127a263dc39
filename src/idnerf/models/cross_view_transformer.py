"""Cross-view transformer of GMFlow (arXiv 2111.13680, section 3.2): Swin-style windows, one head, no bias.

Everything works on channels-last maps ``[sequence height width channel]``. A *sequence* is one member of a
pair of views; its partner is the other member.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MASKED_SCORE = -100.0
"""Added to the score of two cells that share a window only because the map was rolled (as published)."""

FEED_FORWARD_ELEMENTS = 4 * 1024 * 1024
"""Largest hidden activation of the feed-forward network, in numbers: larger buffers are slow on a CPU."""


def split_windows(
    maps: Float[Tensor, "sequence height width channel"], splits: int
) -> Float[Tensor, "sequence window cell channel"]:
    """Cut every map, its sides multiples of ``splits``, into ``splits`` x ``splits`` windows row by row."""
    count, height, width, channel = maps.shape
    windows = maps.reshape(count, splits, height // splits, splits, width // splits, channel)
    return windows.transpose(2, 3).reshape(count, splits * splits, -1, channel)


def merge_windows(
    windows: Float[Tensor, "sequence window cell channel"], splits: int, height: int, width: int
) -> Float[Tensor, "sequence height width channel"]:
    """Inverse of ``split_windows``."""
    count, _, _, channel = windows.shape
    grid = windows.reshape(count, splits, splits, height // splits, width // splits, channel)
    return grid.transpose(2, 3).reshape(count, height, width, channel)


def window_positions(height: int, width: int, channels: int, device: torch.device) -> Float[Tensor, "height width c"]:
    """Sine position code of a window (DETR, arXiv 2005.12872).

    The first half of the channels codes rows, the second columns. Positions run from 1/size to 1, times
    2 pi; wavelengths are geometric up to 10000.
    """
    count = channels // 2
    exponents = 2 * torch.div(torch.arange(count, device=device), 2, rounding_mode="floor") / count
    wavelengths = 10000.0**exponents

    def code(size: int) -> Float[Tensor, "size half"]:
        position = torch.arange(1, size + 1, device=device, dtype=torch.float32) / (size + 1e-6) * (2 * math.pi)
        angles = position[:, None] / wavelengths
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], -1).flatten(1)

    rows, columns = code(height)[:, None], code(width)[None]
    return torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], -1)


def shifted_window_scores(
    height: int, width: int, splits: int, device: torch.device
) -> Float[Tensor, "window cell cell"]:
    """What is added to scores in rolled windows: ``MASKED_SCORE`` between cells that were apart, else 0."""

    def regions(size: int) -> Float[Tensor, "size"]:
        window = size // splits
        position = torch.arange(size, device=device)
        return ((position >= size - window).float() + (position >= size - window // 2)).float()

    labels = 3 * regions(height)[:, None] + regions(width)[None]
    labels = split_windows(labels[None, :, :, None], splits)[0, :, :, 0]
    return MASKED_SCORE * (labels[:, :, None] != labels[:, None, :]).float()


class WindowAttention(nn.Module):
    """Attention of a map to another inside windows: the message, normalised, without the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self,
        maps: Float[Tensor, "sequence height width channel"],
        attended: Float[Tensor, "sequence height width channel"],
        splits: int,
        scores: Float[Tensor, "window cell cell"] | None,
    ) -> Float[Tensor, "sequence height width channel"]:
        """``scores`` given: windows are shifted by half a window, and these scores are added."""
        height, width = maps.shape[1:3]
        shift = (height // splits // 2, width // splits // 2)
        if scores is not None:
            back = (-shift[0], -shift[1])
            same = attended is maps
            maps = torch.roll(maps, back, dims=(1, 2))
            attended = maps if same else torch.roll(attended, back, dims=(1, 2))
        queries, keys = split_windows(maps, splits), split_windows(attended, splits)
        # Windows take the place of heads: one call, and the mask is shared by all sequences.
        message = F.scaled_dot_product_attention(
            self.query(queries), self.key(keys), self.value(keys), attn_mask=scores
        )
        message = merge_windows(self.norm(self.merge(message)), splits, height, width)
        return message if scores is None else torch.roll(message, shift, dims=(1, 2))


class CrossViewBlock(nn.Module):
    """Self-attention, then attention to the partner map with a feed-forward network; both residual."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.hidden = 2 * channels * expansion
        self.self_attention = WindowAttention(channels)
        self.cross_attention = WindowAttention(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(2 * channels, self.hidden, bias=False),
            nn.GELU(),
            nn.Linear(self.hidden, channels, bias=False),
        )
        self.norm = nn.LayerNorm(channels)

    def forward(
        self,
        maps: Float[Tensor, "sequence height width channel"],
        partners: Float[Tensor, "sequence height width channel"],
        splits: int,
        scores: Float[Tensor, "window cell cell"] | None,
    ) -> Float[Tensor, "sequence height width channel"]:
        maps = maps + self.self_attention(maps, maps, splits, scores)
        message = self.cross_attention(maps, partners, splits, scores)
        return maps + self._fed_forward(torch.cat([maps, message], -1))

    def _fed_forward(self, maps: Float[Tensor, "sequence height width twice"]) -> Tensor:
        rows = maps.reshape(-1, maps.shape[-1])
        size = max(1, FEED_FORWARD_ELEMENTS // self.hidden)
        parts = [self.norm(self.feed_forward(part)) for part in rows.split(size)]
        return torch.cat(parts).reshape(*maps.shape[:-1], -1)


class CrossViewTransformer(nn.Module):
    """A stack of blocks, every second with shifted windows. Both members of every pair pass side by side."""

    def __init__(self, channels: int = 128, layers: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([CrossViewBlock(channels) for _ in range(layers)])
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, pairs: Float[Tensor, "member pair height width channel"], splits: int
    ) -> Float[Tensor, "member pair height width channel"]:
        """Position code, then the blocks. Sides are multiples of ``splits``; there are two members."""
        _, _, height, width, channel = pairs.shape
        code = window_positions(height // splits, width // splits, channel, pairs.device)
        maps = (pairs + code.repeat(splits, splits, 1)).flatten(0, 1)
        scores = shifted_window_scores(height, width, splits, pairs.device) if splits > 1 else None
        for index, block in enumerate(self.blocks):
            partners = maps.unflatten(0, pairs.shape[:2]).flip(0).flatten(0, 1)
            maps = block(maps, partners, splits, scores if index % 2 else None)
        return maps.unflatten(0, pairs.shape[:2])
