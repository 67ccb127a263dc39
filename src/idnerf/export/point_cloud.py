"""A coloured point cloud from several depth maps: each surface point once, with the mean of those who see it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.errors import InputError
from idnerf.export.consistency import Agreement, FilterConfig, agreement, believed
from idnerf.export.depth_views import DepthViews
from idnerf.geometry.rays import unproject
from idnerf.types import Cameras


@dataclass(frozen=True)
class PointCloud:
    """Points in the world.

    Attributes:
        points: scene units.
        colors: RGB in [0, 1].
        normals: unit vectors towards the camera that saw the point.
    """

    points: Float[Tensor, "point 3"]
    colors: Float[Tensor, "point 3"]
    normals: Float[Tensor, "point 3"]

    def __len__(self) -> int:
        return len(self.points)


def fuse_points(
    views: DepthViews, config: FilterConfig, progress: Callable[[int, int], None] | None = None
) -> PointCloud:
    """Fuse depth maps view by view.

    A point is kept when at least ``config.min_views`` maps agree on it (all of them, where there are fewer). Position
    and colour are the mean over these, and the pixels that agreed give no second point. ``progress`` is told (done,
    total) maps.
    """
    depth = believed(views, config.min_confidence)
    needed = min(config.min_views, len(views))
    free = depth > 0
    clouds = []
    for i in range(len(views)):
        count = (depth[i] > 0).float()
        total_depth, total_color = depth[i].clone(), views.images[i].clone()
        answers: dict[int, Agreement] = {}
        for j in range(len(views)):
            if j == i:
                continue
            answer = agreement(depth[i], views.cameras[i], depth[j], views.cameras[j], config)
            answers[j] = answer
            columns, rows = nearest_pixels(answer, views.cameras)
            total_depth += torch.where(answer.agrees, answer.depth, torch.zeros_like(total_depth))
            total_color += views.images[j][:, rows, columns] * answer.agrees
            count += answer.agrees
        mean_depth = total_depth / count.clamp_min(1)
        kept = free[i] & (count >= needed)
        for j, answer in answers.items():
            columns, rows = nearest_pixels(answer, views.cameras)
            used = answer.agrees & kept
            free[j, rows[used], columns[used]] = False
        points = unproject(views.cameras[i], mean_depth)
        normals = depth_normals(points, mean_depth, views.cameras[i])
        clouds.append((points[kept], (total_color / count.clamp_min(1))[:, kept].T, normals[kept]))
        if progress is not None:
            progress(i + 1, len(views))
    points, colors, normals = (torch.cat(parts) for parts in zip(*clouds, strict=True))
    return PointCloud(points, colors.clamp(0, 1), normals)


def nearest_pixels(
    answer: Agreement, cameras: Cameras
) -> tuple[Int64[Tensor, "height width"], Int64[Tensor, "height width"]]:
    """(columns, rows) of the other view that the points fall on, kept inside the image."""
    columns = answer.pixels[..., 0].floor().clamp(0, cameras.width - 1).long()
    rows = answer.pixels[..., 1].floor().clamp(0, cameras.height - 1).long()
    return columns, rows


def depth_normals(
    points: Float[Tensor, "height width 3"], depth: Float[Tensor, "height width"], camera: Cameras
) -> Float[Tensor, "height width 3"]:
    """Unit normals of a depth map's surface, towards the camera.

    Along each axis the neighbour nearer in depth is used: a difference across a depth edge is no tangent. The view
    direction stands in where neither neighbour is known.
    """
    right = _tangent(points, depth, 1)
    down = _tangent(points, depth, 0)
    towards = F.normalize(camera.centers - points, dim=-1)
    normals = F.normalize(torch.linalg.cross(right, down), dim=-1)
    normals = torch.where((normals * towards).sum(-1, keepdim=True) < 0, -normals, normals)
    flat = normals.norm(dim=-1, keepdim=True) < 0.5
    return torch.where(flat, towards, normals)


def _tangent(points: Tensor, depth: Tensor, axis: int) -> Tensor:
    """Difference to the neighbour along an axis, the one with the smaller depth step; 0 where both are unknown."""
    step = points.diff(dim=axis)
    jump = depth.diff(dim=axis).abs()
    both = (depth.narrow(axis, 0, jump.shape[axis]) > 0) & (depth.narrow(axis, 1, jump.shape[axis]) > 0)
    jump = torch.where(both, jump, torch.full_like(jump, torch.inf))
    nothing = torch.full_like(jump.narrow(axis, 0, 1), torch.inf)
    still = torch.zeros_like(step.narrow(axis, 0, 1))
    before_jump, after_jump = torch.cat([nothing, jump], axis), torch.cat([jump, nothing], axis)
    before, after = torch.cat([still, step], axis), torch.cat([step, still], axis)
    chosen = torch.where((after_jump <= before_jump)[..., None], after, before)
    known = torch.minimum(before_jump, after_jump) < torch.inf
    return torch.where(known[..., None], chosen, torch.zeros_like(chosen))


def voxel_downsample(cloud: PointCloud, size: float) -> PointCloud:
    """One point per cube of edge ``size`` (scene units) of a grid at the origin: the mean of those in it.

    Raises:
        InputError: a size that is not above 0, or so small that the cubes cannot be numbered.
    """
    if not size > 0:
        raise InputError(f"expected --voxel above 0, got {size}")
    if len(cloud) == 0:
        return cloud
    cells = (cloud.points.double() / size).floor()
    if float(cells.abs().max()) >= 2**20:
        raise InputError(f"--voxel {size} gives more than a million cubes along an axis: give a larger one")
    cells = cells.long() + 2**20
    key = (cells[:, 0] << 42) | (cells[:, 1] << 21) | cells[:, 2]
    _, index, count = torch.unique(key, return_inverse=True, return_counts=True)

    def mean(values: Float[Tensor, "point 3"]) -> Float[Tensor, "cube 3"]:
        total = torch.zeros(len(count), 3, dtype=torch.float64).index_add_(0, index, values.double())
        return (total / count[:, None]).float()

    return PointCloud(mean(cloud.points), mean(cloud.colors), F.normalize(mean(cloud.normals), dim=-1))
