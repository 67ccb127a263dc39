"""How many source views see the surface at each target pixel, from exact depth maps."""

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.geometry.projection import project, visible
from idnerf.geometry.rays import unproject
from idnerf.types import Cameras


def count_seen(
    source: Cameras,
    source_depth: Float[Tensor, "*batch view height width"],
    target: Cameras,
    target_depth: Float[Tensor, "*batch target_height target_width"],
    tolerance: float = 0.02,
) -> Float[Tensor, "*batch target_height target_width"]:
    """Reproject the target's depth map into every source and compare depths.

    A source sees a surface point that is in front of it, inside its image, and not hidden: the point's depth
    there is within the source's depths at the four pixels around its projection, widened by the relative
    ``tolerance``. (Asking for agreement with one interpolated depth would make edges and slanted surfaces
    flicker.)

    Args:
        source: [*batch view] cameras; ``source_depth`` their depth maps (z), scene units, 0 where unknown.
        target: [*batch] cameras; ``target_depth`` likewise.
        tolerance: relative difference of depth that still counts as the same surface.

    Returns:
        Number of sources per target pixel; 0 where the target's depth is unknown.
    """
    shape, views = target_depth.shape, source_depth.shape[-3]
    height, width = source_depth.shape[-2:]
    points = unproject(target, target_depth).reshape(*shape[:-2], 1, -1, 3)
    pixels, depth = project(points.expand(*shape[:-2], views, -1, 3), source)
    inside = visible(pixels, depth, source.size)
    pixels = torch.where(inside[..., None], pixels, 0.0)  # also where depth, and so the pixel, is not a number
    column = (pixels[..., 0] - 0.5).clamp(0, width - 1)
    row = (pixels[..., 1] - 0.5).clamp(0, height - 1)
    left, top = column.floor().long(), row.floor().long()
    right, bottom = (left + 1).clamp_max(width - 1), (top + 1).clamp_max(height - 1)
    flat = source_depth.flatten(-2)
    taps = torch.stack([flat.gather(-1, y * width + x) for y in (top, bottom) for x in (left, right)])
    known = (taps > 0).all(0)
    agrees = (depth >= taps.amin(0) * (1 - tolerance)) & (depth <= taps.amax(0) * (1 + tolerance))
    seen = (inside & known & agrees).sum(-2).reshape(shape)
    return (seen * (target_depth > 0)).to(target_depth.dtype)
