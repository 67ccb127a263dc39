"""Large targets tile by tile: memory does not depend on the image's size.

A tile is nothing but a camera with a shifted principal point, so any model that renders a camera renders a tile.
Tiles overlap by a margin that is cut away, so that convolutions see what lies beyond the seam.
"""

import itertools
import math
from collections.abc import Callable

import torch

from idnerf.geometry.cameras import crop
from idnerf.types import Cameras, RenderOutput

TILE_PIXELS = 330_000
"""Largest target rendered in one piece (640x512 is)."""
TILE_MARGIN = 32
"""Pixels around a tile that are rendered and cut away."""
STEP = 32
"""Tiles begin at multiples of this: the cascade's coarsest cells, 32 pixels wide, then lie alike in every tile; in
its mirror images but for tiles at the right and lower end, whose size is what is left."""


def render_in_tiles(
    render_tile: Callable[[Cameras], RenderOutput],
    target: Cameras,
    *,
    tile_pixels: int = TILE_PIXELS,
    margin: int = TILE_MARGIN,
    step: int = STEP,
) -> RenderOutput:
    """Render ``target`` [batch] with a function that renders one (cropped) target.

    A target of at most ``tile_pixels`` is rendered in one piece. Otherwise the grid of tiles is chosen so that
    each, with its margin, has at most that many (as long as that is at least (3 margin)^2 pixels).
    """
    width, height = target.size
    if width * height <= tile_pixels:
        return render_tile(target)
    columns, rows = grid_of_tiles(width, height, tile_pixels, margin, step)
    bands = []
    for top, bottom in spans(height, rows, step):
        tiles = []
        for left, right in spans(width, columns, step):
            x0, x1 = max(0, left - margin), min(width, right + margin)
            y0, y1 = max(0, top - margin), min(height, bottom + margin)
            output = render_tile(crop(target, x0, y0, (x1 - x0, y1 - y0)))
            window = (..., slice(top - y0, bottom - y0), slice(left - x0, right - x0))
            tiles.append(output.map(lambda x, window=window: x[window].clone()))
        bands.append(concatenate(tiles, dim=-1))
    return concatenate(bands, dim=-2)


def grid_of_tiles(width: int, height: int, tile_pixels: int, margin: int, step: int = STEP) -> tuple[int, int]:
    """Fewest (columns, rows) of nearly square tiles that have, with their margins, at most ``tile_pixels``.

    A tile is never narrower than its margin, or it would be mostly margin.
    """
    side = max(math.isqrt(tile_pixels) - 2 * margin, margin, step)
    side -= side % step  # ``spans`` begin at multiples of it: a run could otherwise round up beyond the side
    return math.ceil(width / side), math.ceil(height / side)


def spans(length: int, count: int, step: int = STEP) -> list[tuple[int, int]]:
    """Split ``length`` into ``count`` nearly equal runs, each starting at a multiple of ``step``.

    None is longer than length / count rounded up to such a multiple.
    """
    cells = math.ceil(length / step)
    edges = [cells * i // count * step for i in range(count)] + [length]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def concatenate(outputs: list[RenderOutput], dim: int) -> RenderOutput:
    """Join render outputs side by side (``dim=-1``) or on top of each other (``dim=-2``)."""

    confidences = [output.confidence for output in outputs if output.confidence is not None]
    return RenderOutput(
        rgb=torch.cat([output.rgb for output in outputs], dim),
        depth=torch.cat([output.depth for output in outputs], dim),
        opacity=torch.cat([output.opacity for output in outputs], dim),
        confidence=torch.cat(confidences, dim) if confidences else None,
    )
