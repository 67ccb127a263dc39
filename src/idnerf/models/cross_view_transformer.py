"""Cross-view transformer of GMFlow (arXiv 2111.13680, section 3.2): Swin-style windows, one head, no bias.

Everything works on channels-last maps ``[sequence height width channel]``. A *sequence* is one member of a
pair of views; its partner is the other member.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEED_FORWARD_ELEMENTS = 4 * 1024 * 1024
"""Largest hidden activation of the feed-forward network, in numbers: larger buffers are slow on a CPU."""


def window_edges(size: int, splits: int, shifted: bool) -> list[int]:
    """Where windows begin, and ``size``, along a side that is a multiple of ``splits``.

    Shifted windows begin half a window later; what is left at both ends are windows of their own. (Published: the map
    is rolled, so that the ends share a window, and 100 is taken from the scores across; e^-100 is 0 in float32.)
    """
    window = size // splits
    starts = range(window // 2, size, window) if shifted else range(0, size, window)
    return [0, *(start for start in starts if start), size]


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


class WindowAttention(nn.Module):
    """Attention of a map to another inside windows: the message, normalised, without the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)

    def key_value(self, maps: Float[Tensor, "*n channel"]) -> Float[Tensor, "*n twice"]:
        """Keys beside values."""
        return F.linear(maps, torch.cat([self.key.weight, self.value.weight]))

    def forward(
        self,
        queries: Float[Tensor, "sequence height width channel"],
        keys_values: Float[Tensor, "sequence height width twice"],
        splits: int,
        shifted: bool,
    ) -> Float[Tensor, "sequence height width channel"]:
        """Args: what the layers of these names make of the maps, keys beside values; ``shifted``: windows begin half a
        window later, see ``window_edges``."""
        heights, widths = ([b - a for a, b in pairwise(window_edges(n, splits, shifted))] for n in queries.shape[1:3])
        bands = []
        # ``split``, not indices: the gradient of each would be as large as the map
        for rows in zip(queries.split(heights, 1), keys_values.split(heights, 1), strict=True):
            windows = []
            for query, key_value in zip(*(x.split(widths, 2) for x in rows), strict=True):
                size = query.shape[1:3]
                query, key_value = (x.flatten(1, 2)[:, None] for x in (query, key_value))
                message = F.scaled_dot_product_attention(query, *key_value.chunk(2, -1))
                windows.append(message[:, 0].unflatten(1, size))
            bands.append(torch.cat(windows, 2))
        return self.norm(self.merge(torch.cat(bands, 1)))


class CrossViewBlock(nn.Module):
    """Self-attention, then attention to the partner map with a feed-forward network; both residual."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.channels, self.hidden = channels, 2 * channels * expansion
        self.self_attention = WindowAttention(channels)
        self.cross_attention = WindowAttention(channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(2 * channels, self.hidden, bias=False),
            nn.GELU(),
            nn.Linear(self.hidden, channels, bias=False),
        )
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, maps: Float[Tensor, "sequence height width channel"], splits: int, shifted: bool
    ) -> Float[Tensor, "sequence height width channel"]:
        """``maps``: the first members of all pairs, then the second ones in the same order."""
        own, partner = self.self_attention, self.cross_attention
        # one product for all that is read from these maps; what the partner reads changes places
        layers = (own.query, own.key, own.value, partner.key, partner.value)
        projected = F.linear(maps, torch.cat([layer.weight for layer in layers]))
        query, key_value, shown = projected.split([self.channels, 2 * self.channels, 2 * self.channels], -1)
        maps = maps + own(query, key_value, splits, shifted)
        narrow = maps.to(projected.dtype)
        message = partner(partner.query(narrow), torch.cat(shown.chunk(2)[::-1]), splits, shifted)
        return maps + self._fed_forward(torch.cat([narrow, message.to(narrow.dtype)], -1))

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
        for index, block in enumerate(self.blocks):
            shifted = splits > 1 and index % 2 == 1
            if torch.is_grad_enabled() and maps.device.type == "cpu":
                # made again in the backward pass: a block would keep 0.5 GB for three photos of 640x512
                maps = checkpoint(block, maps, splits, shifted, use_reentrant=False, preserve_rng_state=False)
            else:
                maps = block(maps, splits, shifted)
        return maps.unflatten(0, pairs.shape[:2])
