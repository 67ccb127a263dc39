"""Truncated signed distance fusion of depth maps (Curless and Levoy, SIGGRAPH 1996), vectorised."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.export.grid import Grid
from idnerf.geometry.projection import bilinear_lookup, project, visible
from idnerf.types import Cameras

CORNERS_AT_ONCE = 262_144
"""Corners integrated at once: keeps buffers to a few megabytes."""


def fuse_tsdf(
    grid: Grid,
    depth: Float[Tensor, "view height width"],
    weights: Float[Tensor, "view height width"],
    cameras: Cameras,
    truncation: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Float[Tensor, "x y z"], Float[Tensor, "x y z"]]:
    """Weighted mean over views of the distance (along z) to the surface, in front positive.

    Args:
        depth: z, 0 where unknown (no vote there).
        weights: of each pixel's vote, such as its confidence.
        cameras: [view].
        truncation: distances are cut at so many cells; farther behind a surface a view says nothing.

    Returns:
        Distances in units of the truncation, in [-1, 1], and the summed weights: 0 where no view votes, the distance
        there is 1.
    """
    total_corners = grid.shape[0] * grid.shape[1] * grid.shape[2]
    distances, votes = torch.ones(total_corners), torch.zeros(total_corners)
    maps = torch.stack([depth, weights, (depth > 0).float()], -1)
    for start in range(0, total_corners, CORNERS_AT_ONCE):
        numbers = torch.arange(start, min(start + CORNERS_AT_ONCE, total_corners))
        corners = corner_places(numbers, grid.shape)
        points, reach = grid.world(corners), truncation * grid.edges(corners)
        total, count = torch.zeros(len(numbers)), torch.zeros(len(numbers))
        for i in range(len(cameras)):
            pixels, z = project(points, cameras[i])
            inside = visible(pixels, z, cameras.size).nonzero()[:, 0]
            if len(inside) == 0:
                continue
            found = bilinear_lookup(maps[i : i + 1], pixels[None, inside])[0]
            distance = (found[:, 0] - z[inside]) / reach[inside]
            weight = found[:, 1] * ((found[:, 2] > 0.999) & (distance > -1))
            total.index_add_(0, inside, weight * distance.clamp_max(1))
            count.index_add_(0, inside, weight)
        part = slice(start, start + len(numbers))
        distances[part] = torch.where(count > 0, total / count.clamp_min(1e-9), torch.ones_like(total))
        votes[part] = count
        if progress is not None:
            progress(start + len(numbers), total_corners)
    return distances.reshape(grid.shape), votes.reshape(grid.shape)


def corner_places(numbers: Tensor, shape: tuple[int, int, int]) -> Float[Tensor, "point 3"]:
    """(x, y, z) of corners numbered in the order of memory."""
    z = numbers % shape[2]
    y = torch.div(numbers, shape[2], rounding_mode="floor") % shape[1]
    x = torch.div(numbers, shape[1] * shape[2], rounding_mode="floor")
    return torch.stack([x, y, z], -1).float()
