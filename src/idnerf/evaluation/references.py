"""Three reference rows that learn nothing, for every report: what a model has to beat.

Each is ``(source: Views [view], target: Cameras []) -> RenderOutput`` and sees what a model sees: the sources
and their depth bounds, never the truth. Planes are fronto-parallel in the *target* camera, evenly spaced in
inverse depth between the nearest ``near`` and the farthest ``far`` of the sources.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.geometry.cameras import view_distances
from idnerf.geometry.projection import frustum_homography, safe_depth
from idnerf.geometry.rays import pixel_centers
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras, RenderOutput, Views

PLANES = 64
"""Inverse depths tried by ``best_plane`` and ``plane_sweep``."""

Render = Callable[[Views, Cameras], RenderOutput]
"""(source [view], target []) -> the image at the target: a model or a reference."""


def copy_nearest(source: Views, target: Cameras) -> RenderOutput:
    """The photo of the source whose camera centre is nearest (L1), unchanged.

    Its depth is the middle of the range in inverse depth: a constant, for there is none.
    """
    nearest = int(view_distances(source.cameras, target).argmin())
    rgb = source.images[nearest]
    if source.cameras.size != target.size:
        rgb = F.interpolate(rgb[None], (target.height, target.width), mode="bilinear", antialias=True)[0]
    inverse = _inverse_depths(source, 1)
    depth = rgb.new_ones(target.height, target.width) / inverse
    return RenderOutput(rgb, depth, torch.ones_like(depth))


def best_plane(source: Views, target: Cameras) -> RenderOutput:
    """The mean of the sources over the one plane on which their colours differ least."""
    best = min(_sweep(source, target), key=_plane_cost)
    depth = torch.full_like(best.spread, best.depth)
    return RenderOutput(best.mean, depth, torch.ones_like(depth))


def plane_sweep(source: Views, target: Cameras, window: int = 7) -> RenderOutput:
    """Plane sweep (Collins 1996): each pixel takes the plane where the sources differ least around it.

    The colour difference is averaged over a box of ``window`` pixels, over what at least two sources see; the
    winner takes all; the colour is the mean of the sources that see the winner. A pixel that no two sources
    share on any plane takes what ``best_plane`` shows there, with confidence 0.
    """
    shape = (target.height, target.width)
    best_cost = source.images.new_full(shape, float("inf"))
    rgb = source.images.new_zeros(3, *shape)
    depth = source.images.new_zeros(shape)
    fill, fill_cost = None, torch.inf
    for slice_ in _sweep(source, target):
        if fill is None or _plane_cost(slice_) < fill_cost:
            fill, fill_cost = slice_, _plane_cost(slice_)
        shared = slice_.count >= 2
        cost = torch.where(shared, _box_mean(slice_.spread, shared, window), torch.inf)
        wins = cost < best_cost
        best_cost = torch.where(wins, cost, best_cost)
        rgb = torch.where(wins, slice_.mean, rgb)
        depth = torch.where(wins, slice_.depth, depth)
    unmatched = best_cost.isinf()
    assert fill is not None
    rgb = torch.where(unmatched, fill.mean, rgb)
    depth = torch.where(unmatched, fill.depth, depth)
    confidence = torch.where(unmatched, 0.0, torch.exp(-best_cost / 0.05))
    return RenderOutput(rgb, depth, torch.ones_like(depth), confidence)


REFERENCES: dict[str, Render] = {"copy": copy_nearest, "plane": best_plane, "sweep": plane_sweep}
"""The rows of a report's ``references``."""


@dataclass(frozen=True)
class _Slice:
    """The sources seen on one plane of the target's frustum.

    Attributes:
        depth: of the plane, z in the target camera.
        mean: mean colour of the sources that see the plane at each pixel; of all, border-extended, if none.
        spread: mean |colour - mean colour| over those sources and the channels, times sqrt(n / (n - 1)).
        count: how many they are.
    """

    depth: float
    mean: Float[Tensor, "3 height width"]
    spread: Float[Tensor, "height width"]
    count: Float[Tensor, "height width"]


def _plane_cost(slice_: _Slice) -> float:
    """Mean colour difference over what at least two sources see; infinite where they share nothing."""
    shared = slice_.count >= 2
    return slice_.spread[shared].mean().item() if shared.any() else float("inf")


def _inverse_depths(source: Views, count: int) -> Float[Tensor, "plane"]:
    return inverse_depth_planes(source.cameras.near.min(), source.cameras.far.max(), count)


def _sweep(source: Views, target: Cameras) -> Iterator[_Slice]:
    """The planes one at a time, nearest first: memory stays that of one plane."""
    A, b = frustum_homography(target, source.cameras)
    pixels = pixel_centers(target.size, target.device)
    pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)
    directions = torch.einsum("vij,hwj->vhwi", A, pixels)
    width, height = source.cameras.size
    to_grid = pixels.new_tensor([2 / width, 2 / height])
    for inverse in _inverse_depths(source, PLANES):
        homogeneous = directions / inverse + b[:, None, None]
        z = homogeneous[..., 2]
        grid = homogeneous[..., :2] / safe_depth(z)[..., None] * to_grid - 1
        colours = F.grid_sample(source.images, grid, padding_mode="border", align_corners=False)
        sees = ((grid >= -1) & (grid < 1)).all(-1) & (z > 0)
        yield _summarize(colours, sees, (1 / inverse).item())


def _summarize(
    colours: Float[Tensor, "view 3 height width"], sees: Bool[Tensor, "view height width"], depth: float
) -> _Slice:
    count = sees.sum(0).float()
    weights = torch.where(count > 0, sees, torch.ones_like(sees)).float()[:, None]
    weights = weights / weights.sum(0)
    mean = (weights * colours).sum(0)
    # As for a sample variance: without n / (n - 1), planes that fewer sources see would look better matched.
    unbiased = (count / (count - 1).clamp_min(1)).sqrt()
    spread = (weights * (colours - mean).abs()).sum(0).mean(0) * unbiased
    return _Slice(depth, mean, spread, count)


def _box_mean(
    values: Float[Tensor, "height width"], mask: Bool[Tensor, "height width"], window: int
) -> Float[Tensor, "height width"]:
    """Mean of the masked values in a box around each pixel (0 where the box holds none)."""
    weights = mask.to(values.dtype)
    stacked = torch.stack([values * weights, weights])[:, None]
    reach = window // 2
    along_rows = F.avg_pool2d(stacked, (1, window), stride=1, padding=(0, reach))
    total, share = F.avg_pool2d(along_rows, (window, 1), stride=1, padding=(reach, 0))[:, 0]
    return total / share.clamp_min(1e-6)
