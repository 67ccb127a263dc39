"""Which photos a free camera is rendered from, at which depths, and how much of its picture they see."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.data.view_selection import nearest_first
from idnerf.geometry.cameras import facing, view_distances
from idnerf.geometry.projection import project, visible
from idnerf.geometry.rays import unproject
from idnerf.types import Cameras

STICKY = 0.85
"""A new choice must be this much nearer (sum of distances) than the one in use: each change costs an encoding."""


def choose_sources(
    cameras: Cameras,
    target: Cameras,
    count: int,
    *,
    left_out: int | None = None,
    previous: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Indices of the ``count`` nearest cameras (centres, L1) that look the target's way, nearest first.

    Views that look elsewhere are taken only when too few do not. The previous choice stays while it is nearly as near.

    Args:
        cameras: [view] the scene's cameras.
        target: one camera, no batch axis.
        left_out: a view that is never chosen.
        previous: the choice in use.
    """
    distances, alike = view_distances(cameras, target), facing(cameras, target)
    allowed = [i for i in nearest_first(cameras, target, elsewhere_last=True) if i != left_out]
    best = tuple(allowed[:count])
    if previous is not None and len(previous) == len(best) and set(previous) <= set(allowed):
        same_facing = int(alike[list(previous)].sum()) == int(alike[list(best)].sum())
        ratio = float(distances[list(best)].sum()) / max(float(distances[list(previous)].sum()), 1e-12)
        if set(previous) == set(best) or (same_facing and ratio > STICKY):
            return tuple(previous)
    return best


@dataclass(frozen=True)
class Support:
    """What the sources know of each rendered surface point; occlusion is not considered.

    Attributes:
        seen: how many sources have it in front of them and inside their photo.
        angle: degrees between the ray of the picture and the nearest one of a source that sees it; 180 where none does.
    """

    seen: Float[Tensor, "height width"]
    angle: Float[Tensor, "height width"]


def support(target: Cameras, depth: Float[Tensor, "height width"], sources: Cameras) -> Support:
    """How well the sources (cameras [view]) see the surface that was rendered for the target (no batch axis)."""
    points = unproject(target, depth).reshape(-1, 3)
    pixels, z = project(points.expand(len(sources), -1, -1), sources)
    inside = visible(pixels, z, sources.size)
    to_target = F.normalize(target.centers - points, dim=-1)
    to_sources = F.normalize(sources.centers[:, None] - points, dim=-1)
    # from the chord between unit vectors: the arc cosine is coarse near 0
    angle = torch.rad2deg(2 * torch.asin((to_sources - to_target).norm(dim=-1).clamp_max(2) / 2))
    angle = torch.where(inside, angle, torch.full_like(angle, 180.0)).amin(0)
    return Support(inside.float().sum(0).reshape(depth.shape), angle.reshape(depth.shape))
