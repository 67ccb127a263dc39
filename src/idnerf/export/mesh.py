"""A coloured triangle mesh from depth maps: signed distances, marching cubes, the photos' colours."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.errors import InputError
from idnerf.export.consistency import FilterConfig, filtered_depth
from idnerf.export.depth_views import DepthViews
from idnerf.export.grid import fit_grid
from idnerf.export.marching_cubes import marching_cubes
from idnerf.export.tsdf import fuse_tsdf
from idnerf.geometry.projection import bilinear_lookup, project, visible
from idnerf.geometry.rays import unproject


@dataclass(frozen=True)
class MeshConfig:
    """How a surface is made of depth maps."""

    resolution: int = 256
    """The volume has about the cube of this many cells."""
    truncation: float = 4.0
    """Depth maps are believed within so many cells of their surface."""
    smallest_part: float = 0.002
    """Connected parts with a smaller share of the triangles are dropped; 0 keeps all."""

    def __post_init__(self) -> None:
        if not 8 <= self.resolution <= 1024:
            raise InputError(f"expected --resolution from 8 to 1024, got {self.resolution}")
        if not self.truncation >= 1:
            raise InputError(f"expected --truncation of at least 1 cell, got {self.truncation}")
        if not 0 <= self.smallest_part < 1:
            raise InputError(f"expected --smallest-part in [0, 1), got {self.smallest_part}")


@dataclass(frozen=True)
class Mesh:
    """Triangles in the world, counter-clockwise seen from outside.

    Attributes:
        points: vertices, scene units.
        colors: RGB in [0, 1], one per vertex.
        faces: vertex numbers.
    """

    points: Float[Tensor, "vertex 3"]
    colors: Float[Tensor, "vertex 3"]
    faces: Int64[Tensor, "face 3"]


def fuse_mesh(
    views: DepthViews,
    filters: FilterConfig,
    config: MeshConfig,
    progress: Callable[[int, int], None] | None = None,
) -> Mesh:
    """Fuse filtered depth maps into one surface.

    Raises:
        InputError: nothing is left to make a surface of, or scikit-image is missing.
    """
    depth = filtered_depth(views, filters)
    grid = fit_grid(unproject(views.cameras, depth)[depth > 0], views.cameras, config.resolution)
    distances, votes = fuse_tsdf(grid, depth, views.confidence, views.cameras, config.truncation, progress)
    corners, faces = marching_cubes(distances, votes)
    faces = drop_small_parts(faces, len(corners), config.smallest_part)
    used, faces = torch.unique(faces, return_inverse=True)
    corners = corners[used]
    points = grid.world(corners)
    return Mesh(points, surface_colors(points, config.truncation * grid.edges(corners), views, depth), faces)


def drop_small_parts(faces: Int64[Tensor, "face 3"], vertices: int, share: float) -> Int64[Tensor, "kept 3"]:
    """The triangles of connected parts that have at least ``share`` of all triangles."""
    if share == 0:
        return faces
    part = connected_parts(faces, vertices)[faces[:, 0]]
    _, index, count = torch.unique(part, return_inverse=True, return_counts=True)
    return faces[count[index] >= share * len(faces)]


def connected_parts(faces: Int64[Tensor, "face 3"], vertices: int) -> Int64[Tensor, "vertex"]:
    """For every vertex the smallest vertex number of its connected part (labels passed on until they rest)."""
    labels = torch.arange(vertices)
    while True:
        smallest = labels[faces].amin(-1)
        passed = labels.scatter_reduce(0, faces.reshape(-1), smallest.repeat_interleave(3), "amin")
        # a label is itself a vertex: its own label is as good, and twice as far
        passed = passed[passed]
        if torch.equal(passed, labels):
            return labels
        labels = passed


def surface_colors(
    points: Float[Tensor, "vertex 3"],
    tolerance: Float[Tensor, "vertex"],
    views: DepthViews,
    depth: Float[Tensor, "view height width"],
) -> Float[Tensor, "vertex 3"]:
    """Mean colour over the views that see each point, near ones weighing more; mid grey where none does.

    A view sees a point when its depth map there lies within ``tolerance`` (scene units) of the point.
    """
    total, weights = torch.zeros(len(points), 3), torch.zeros(len(points))
    for i in range(len(views)):
        pixels, z = project(points, views.cameras[i])
        maps = torch.cat([views.images[i].movedim(0, -1), depth[i][..., None]], -1)
        found = bilinear_lookup(maps[None], pixels[None])[0]
        seen = visible(pixels, z, views.cameras.size) & ((found[:, 3] - z).abs() < tolerance)
        weight = seen / z.clamp_min(1e-6).square()
        total += weight[:, None] * found[:, :3]
        weights += weight
    grey = torch.full_like(total, 0.5)
    return torch.where(weights[:, None] > 0, total / weights.clamp_min(1e-30)[:, None], grey)
