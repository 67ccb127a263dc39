"""Source latents reprojected into the target view: the view-aligned condition of a prior.

SparseFusion (arXiv 2212.00792) conditions its diffusion model on features rendered at the target view by an epipolar
transformer. Here nothing is learnt: a plane sweep over inverse depths in the target's frustum weighs planes by how well
the sources' colours agree there, and blends their latents with these weights.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.geometry.cameras import resize
from idnerf.geometry.projection import bilinear_lookup, frustum_homography, safe_depth, visible
from idnerf.geometry.rays import pixel_centers
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras

ALIGNED_CHANNELS = 7
"""Blended latent (4), disagreement of colours, share of views that see it, position in inverse depth."""
FINE = 2
"""Colours are compared at this many times the latents' resolution along each side."""
UNMATCHED_COST = 0.02
"""Colour variance assumed where fewer than two sources look: worse than a match, no worse than a usual mismatch."""
TEMPERATURE = 0.001
"""Colour variance (sum over RGB) by which one plane outweighs another e-fold; photo noise is about a tenth of it."""


def align_sources(
    images: Float[Tensor, "batch view 3 image_height image_width"],
    latents: Float[Tensor, "batch view 4 h w"],
    source: Cameras,
    target: Cameras,
    size: tuple[int, int],
    planes: int,
) -> Float[Tensor, "batch channel height width"]:
    """The ``ALIGNED_CHANNELS`` described above, as seen by the target at ``size`` (width, height).

    Args:
        images: source pictures in [0, 1], about ``FINE`` times as large as their latents, whole images.
        latents: of the source pictures.
        source: [batch view] cameras of any size; images and latents span it.
        target: [batch] cameras; the result spans their image.
        size: of the result.
        planes: number of inverse depths.
    """
    inverse_depths = inverse_depth_planes(target.near, target.far, planes)
    colours, seen = reproject(images, source, target, (size[0] * FINE, size[1] * FINE), inverse_depths)
    variance, count = variance_over_views(colours, seen)
    cost = torch.where(count >= 2, variance, UNMATCHED_COST)
    cost = F.avg_pool2d(F.pad(cost, (1, 1, 1, 1), mode="replicate"), FINE + 2, stride=FINE)
    values, seen = reproject(latents, source, target, size, inverse_depths)
    count = seen.sum(1).to(cost.dtype)  # batch plane height width
    mean = (values * seen[:, :, :, None]).sum(1) / count.clamp_min(1)[:, :, None]
    # planes that no view sees say nothing
    weights = torch.softmax(-cost / TEMPERATURE + torch.where(count > 0, 0.0, -100.0), 1)
    blended = (weights[:, :, None] * mean).sum(1)
    position = (torch.arange(planes, device=cost.device) + 0.5) / planes
    return torch.cat(
        [
            blended,
            (weights * cost).sum(1, keepdim=True).sqrt(),
            (weights * count).sum(1, keepdim=True) / seen.shape[1],
            (weights * position[:, None, None]).sum(1, keepdim=True),
        ],
        1,
    )


def reproject(
    maps: Float[Tensor, "batch view channel map_height map_width"],
    source: Cameras,
    target: Cameras,
    size: tuple[int, int],
    inverse_depths: Float[Tensor, "batch plane"],
) -> tuple[Float[Tensor, "batch view plane channel height width"], Bool[Tensor, "batch view plane height width"]]:
    """Source maps looked up where each target pixel at each inverse depth falls, and whether that is in the source."""
    batch, view, _, map_height, map_width = maps.shape
    width, height = size
    pixels = pixel_centers(size, target.device).reshape(-1, 2)
    resized = resize(source, (map_width, map_height))
    A, b = frustum_homography(resize(target, size), resized)
    rays = F.pad(pixels, (0, 1), value=1.0) @ A.transpose(-1, -2)
    # (A p) d + b up to the positive factor d, which leaves the pixel and the sign of the depth as they are
    moved = rays[:, :, None] + b[:, :, None, None, :] * inverse_depths[:, None, :, None, None]
    moved = moved.flatten(2, 3)
    positions = moved[..., :2] / safe_depth(moved[..., 2:])
    seen = visible(positions, moved[..., 2], resized.size)
    flat = maps.flatten(0, 1).permute(0, 2, 3, 1).contiguous()
    values = bilinear_lookup(flat, positions.flatten(0, 1))
    values = values.unflatten(0, (batch, view)).unflatten(2, (-1, height, width)).movedim(-1, 3)
    return values, seen.unflatten(2, (-1, height, width))


def variance_over_views(
    values: Float[Tensor, "batch view plane channel height width"], seen: Bool[Tensor, "batch view plane height width"]
) -> tuple[Float[Tensor, "batch plane height width"], Float[Tensor, "batch plane height width"]]:
    """Variance over the views that see it, summed over channels; and their number."""
    weights = seen[:, :, :, None].to(values.dtype)
    count = weights.sum(1)
    mean = (values * weights).sum(1) / count.clamp_min(1)
    squares = (weights * (values - mean[:, None]).square()).sum(1) / count.clamp_min(1)
    return squares.sum(2), count[:, :, 0]
