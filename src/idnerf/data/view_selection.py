"""Which source views to use for a target, and the depth range they imply."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.geometry.cameras import facing, view_distances
from idnerf.types import Cameras

SAME_POSE = 1e-6


USUAL_SOURCES = 3
"""Source views of a target where nobody says how many."""


def usual_sources(available: int) -> int:
    """How many of the available source views are used where nobody says how many."""
    return min(USUAL_SOURCES, available)


def nearest_first(cameras: Cameras, target: Cameras, order: int = 1, *, elsewhere_last: bool = False) -> list[int]:
    """Indices of all cameras by the distance of their centres from the target's (``view_distances``); ties go to the
    lower index.

    Args:
        elsewhere_last: cameras that do not look the target's way (``facing``) come after all others.
    """
    last = ~facing(cameras, target) if elsewhere_last else [False] * len(cameras)
    distances = view_distances(cameras, target, order)
    return sorted(range(len(cameras)), key=lambda i: (bool(last[i]), float(distances[i]), i))


def nearest_indices(
    cameras: Cameras,
    target: Cameras,
    n: int,
    candidates: Sequence[int] | None = None,
    order: int = 1,
    *,
    elsewhere_last: bool = False,
) -> list[int]:
    """Indices of the ``n`` cameras nearest to the target, nearest first.

    The distance is between camera centres, L1 (``order=1``, the MVSNeRF family's choice) or L2; ties go to
    the lower index. A camera with the target's own pose is never a source of it.

    Args:
        cameras: [view] cameras to choose from.
        target: one camera (no batch axis).
        candidates: choose among these indices only; None for all.
        elsewhere_last: cameras that do not look the target's way (``facing``) only where too few do, as on a rig or
            in crops of panoramas. Published protocols do not ask.

    Raises:
        InputError: fewer than ``n`` views to choose from, or a candidate that does not exist.
    """
    indices = range(len(cameras)) if candidates is None else [int(i) for i in candidates]
    unknown = [i for i in indices if not 0 <= i < len(cameras)]
    if unknown:
        raise InputError(f"view {unknown[0]} does not exist: the scene has views 0 to {len(cameras) - 1}")
    same = (cameras.c2w - target.c2w).abs().amax(dim=(-2, -1)) <= SAME_POSE
    allowed = {i for i in indices if not same[i]}
    others = [i for i in nearest_first(cameras, target, order, elsewhere_last=elsewhere_last) if i in allowed]
    if n < 1 or n > len(others):
        raise InputError(f"{n} source views asked for, {len(others)} to choose from besides the target: ask for fewer")
    return others[:n]


def target_bounds(sources: Cameras) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Depth range of a target from its sources alone: their smallest near, their largest far.

    Reading the target's own range instead, as published codes do, leaks a little of the answer.

    Args:
        sources: [*batch view] cameras.
    """
    return sources.near.amin(-1), sources.far.amax(-1)


def spread_indices(centers: Float[Tensor, "view 3"], count: int) -> list[int]:
    """Up to ``count`` views spread over the scene: farthest-point sampling of the centres from the most
    central."""
    chosen = [int((centers - centers.mean(0)).norm(dim=-1).argmin())]
    distances = (centers - centers[chosen[0]]).norm(dim=-1)
    while len(chosen) < min(count, len(centers)):
        chosen.append(int(torch.argmax(distances)))
        distances = torch.minimum(distances, (centers - centers[chosen[-1]]).norm(dim=-1))
    return chosen
