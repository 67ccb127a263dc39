"""Where the cells of a volume lie in the world: an even box, or a frustum whose cells grow with distance."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.geometry.trajectories import mean_camera
from idnerf.types import Cameras

EVEN_RANGE = 3.0
"""Farthest over nearest depth up to which an even box serves views that all look the same way."""
WIDEST_SLOPE = 1.5
"""Largest |x / z| of a frustum (56 degrees off its axis)."""
OUTLIERS = 0.01
"""Share of the points left out at either end of each axis: a few strays would make every cell large."""


@dataclass(frozen=True)
class Grid:
    """Cubic cells. Corner i lies at ``origin + i * cell`` in the grid's own coordinates.

    Without ``camera`` these are world coordinates. With it they are (x / z, y / z, log z) in that camera: a cell at
    depth z is then z * ``cell`` wide along all three axes, which is how the certainty of depth falls off.

    Attributes:
        origin: the first corner.
        cell: edge of a cell, scene units, or a share of the depth.
        shape: number of corners along the three axes.
        camera: camera-to-world of the frustum.
    """

    origin: Float[Tensor, "3"]
    cell: float
    shape: tuple[int, int, int]
    camera: Float[Tensor, "4 4"] | None = None

    def world(self, corners: Float[Tensor, "point 3"]) -> Float[Tensor, "point 3"]:
        """World points of (fractional) corner numbers."""
        places = self.origin + corners * self.cell
        if self.camera is None:
            return places
        z = places[:, 2:].exp()
        return torch.cat([places[:, :2] * z, z], -1) @ self.camera[:3, :3].T + self.camera[:3, 3]

    def edges(self, corners: Float[Tensor, "point 3"]) -> Float[Tensor, "point"]:
        """Edge of the cell there, scene units."""
        if self.camera is None:
            return torch.full_like(corners[:, 0], self.cell)
        return (self.origin[2] + corners[:, 2] * self.cell).exp() * self.cell


def fit_grid(points: Float[Tensor, "point 3"], cameras: Cameras, resolution: int, margin: int = 4) -> Grid:
    """A grid around the points with about ``resolution``^3 cells, ``margin`` of them beyond the points on each side.

    A frustum where all cameras look the same way over a long range of depth (forward-facing scenes); else a box.

    Raises:
        InputError: no points, or points all in one place.
    """
    if len(points) == 0:
        raise InputError("no depth is left to make a surface of: lower --min-confidence or --min-views")
    frustum = _frustum_coordinates(points, cameras)
    camera = None if frustum is None else frustum[0]
    places = points if frustum is None else frustum[1]
    ordered = places.sort(0).values
    first, last = int(OUTLIERS * (len(places) - 1)), int((1 - OUTLIERS) * (len(places) - 1))
    low, extent = ordered[first], ordered[last] - ordered[first]
    if not float(extent.max()) > 0:
        raise InputError("the depth that is left shows a single point: lower --min-confidence or --min-views")
    # a flat surface still gets a few cells across: no axis counts for less than a hundredth of the longest
    extent = torch.maximum(extent, extent.max() / 100)
    cell = float(extent.double().prod() ** (1 / 3)) / resolution
    shape = [int((length / cell).ceil()) + 2 * margin + 1 for length in extent]
    return Grid(low - margin * cell, cell, (shape[0], shape[1], shape[2]), camera)


def _frustum_coordinates(points: Tensor, cameras: Cameras) -> tuple[Tensor, Tensor] | None:
    """(camera-to-world, points as x/z, y/z, log z) of a frustum that holds the points; None where none fits."""
    if float(cameras.c2w[:, :3, 2].mean(0).norm()) < 0.7:
        return None
    camera = torch.eye(4)
    camera[:3, :3], camera[:3, 3] = mean_camera(cameras), cameras.centers.mean(0)
    in_camera = (points - camera[:3, 3]) @ camera[:3, :3]
    z = in_camera[:, 2]
    ordered = z.sort().values
    near, far = float(ordered[int(OUTLIERS * (len(z) - 1))]), float(ordered[int((1 - OUTLIERS) * (len(z) - 1))])
    if near <= 0 or far < EVEN_RANGE * near:
        return None
    in_front = in_camera[z >= 0.5 * near]
    slopes = in_front[:, :2] / in_front[:, 2:]
    if float(slopes.abs().amax(-1).sort().values[int(0.98 * (len(slopes) - 1))]) > WIDEST_SLOPE:
        return None
    return camera, torch.cat([slopes, in_front[:, 2:].log()], -1)
