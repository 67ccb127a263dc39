"""Which depths other views confirm: the geometric consistency check of multi-view stereo (MVSNet, arXiv 1804.02505)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.export.depth_views import DepthViews
from idnerf.geometry.projection import bilinear_lookup, project, visible
from idnerf.geometry.rays import pixel_centers, rays_at_pixels, unproject
from idnerf.types import Cameras


@dataclass(frozen=True)
class FilterConfig:
    """Which depths are believed."""

    min_confidence: float = 0.5
    """Smallest confidence of the rendering, in [0, 1]; 0 believes all."""
    min_views: int = 2
    """Depth maps that must agree on a point, the one that shows it included; 1 asks no other."""
    pixel_tolerance: float = 1.0
    """Two depth maps agree when going over and back lands within so many pixels ..."""
    depth_tolerance: float = 0.02
    """... and within this share of the depth."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"expected --min-confidence in [0, 1], got {self.min_confidence}")
        if self.min_views < 1:
            raise InputError(f"expected --min-views of at least 1, got {self.min_views}")
        for name in ("pixel_tolerance", "depth_tolerance"):
            if not getattr(self, name) > 0:
                raise InputError(f"expected --{name.replace('_', '-')} above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Agreement:
    """How another view's depth map answers to a view's own.

    Attributes:
        agrees: within both tolerances.
        depth: the other map's surface as depth (z) in this view; meaningful where it agrees.
        pixels: where the points fall in the other view.
    """

    agrees: Bool[Tensor, "height width"]
    depth: Float[Tensor, "height width"]
    pixels: Float[Tensor, "height width 2"]


def agreement(
    depth: Float[Tensor, "height width"],
    camera: Cameras,
    other_depth: Float[Tensor, "other_height other_width"],
    other: Cameras,
    config: FilterConfig,
) -> Agreement:
    """Over and back: a pixel's point is seen in the other view, whose own depth there sends it back to this view.

    Args:
        depth, other_depth: z, 0 where unknown (unknown never agrees).
        camera, other: one camera each.
    """
    shape = depth.shape
    points = unproject(camera, depth).reshape(-1, 3)
    pixels, z = project(points, other)
    known = bilinear_lookup((other_depth > 0).float()[None, ..., None], pixels[None])[0, :, 0] > 0.999
    found = bilinear_lookup(other_depth[None, ..., None], pixels[None])[0, :, 0]
    rays = rays_at_pixels(other, pixels)
    back, back_depth = project(rays.origins + rays.directions * (found / rays.cos)[:, None], camera)
    own_depth = depth.reshape(-1)
    shift = (back - pixel_centers(camera.size, depth.device).reshape(-1, 2)).norm(dim=-1)
    agrees = (own_depth > 0) & visible(pixels, z, other.size) & known
    agrees &= shift < config.pixel_tolerance
    agrees &= (back_depth - own_depth).abs() < config.depth_tolerance * own_depth
    return Agreement(agrees.reshape(shape), back_depth.reshape(shape), pixels.reshape(*shape, 2))


def believed(views: DepthViews, min_confidence: float) -> Float[Tensor, "view height width"]:
    """Depth maps with 0 where the confidence is too low."""
    return views.depth * (views.confidence >= min_confidence)


def filtered_depth(
    views: DepthViews, config: FilterConfig, progress: Callable[[int, int], None] | None = None
) -> Float[Tensor, "view height width"]:
    """Depth maps averaged with those that agree, and 0 where too few do or the confidence is too low.

    ``progress`` is told (done, total) maps.
    """
    depth = believed(views, config.min_confidence)
    needed = min(config.min_views, len(views))
    averaged = []
    for i in range(len(views)):
        total, count = depth[i].clone(), (depth[i] > 0).float()
        for j in range(len(views)):
            if j == i:
                continue
            answer = agreement(depth[i], views.cameras[i], depth[j], views.cameras[j], config)
            total += torch.where(answer.agrees, answer.depth, torch.zeros_like(total))
            count += answer.agrees
        averaged.append(torch.where(count >= needed, total / count.clamp_min(1), torch.zeros_like(total)))
        if progress is not None:
            progress(i + 1, len(views))
    return torch.stack(averaged)
