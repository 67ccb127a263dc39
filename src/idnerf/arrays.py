"""Arrays in, arrays out: for those who have cameras of their own and want none of our types."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from idnerf.data.view_selection import target_bounds
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF
from idnerf.types import Cameras, RenderOutput, Views

SLACK = 0.15
"""How far colours may leave their range: resampling filters overshoot at edges."""
FAR_FROM_ORIGIN = 1000.0
"""Times the spread of the camera centres: beyond it, as in geographic coordinates, float32 loses their differences."""


def render(
    images: Any,
    K: Any,
    c2w: Any,
    target_K: Any,
    target_c2w: Any,
    near: Any,
    far: Any,
    *,
    size: Any = None,
    model: IDNeRF | str | Path = "default",
    quality: str = "full",
) -> RenderOutput:
    """Render one new view from source photos given as arrays (anything ``torch.as_tensor`` takes).

    Args:
        images: [view, 3, height, width] or [view, height, width, 3], RGB; floats in [0, 1] or whole numbers
            from 0 to 255.
        K: [view, 3, 3] or [3, 3], pixels, centres at +0.5.
        c2w: [view, 4, 4] camera-to-world, OpenCV axes. Give float64 where the cameras are far from the origin: all are
            moved there together before they become float32.
        target_K, target_c2w: [3, 3] and [4, 4] of the view to render.
        near, far: depth range (z), in the units of ``c2w``: of the scene, or [view] of each source; the target then
            has the smallest near and the largest far.
        size: (width, height) to render, whole numbers; the sources' size by default.
        model: an ``IDNeRF`` (load it once for several calls), or what ``IDNeRF.from_pretrained`` takes.
        quality: ``full`` or ``fast``.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, near and far that are no range, an unknown
            quality.
    """
    images, K, c2w = torch.as_tensor(images), torch.as_tensor(K), torch.as_tensor(c2w)
    target_K, target_c2w = torch.as_tensor(target_K), torch.as_tensor(target_c2w)
    if images.dim() != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise InputError(f"expected images [view, 3, height, width] or [view, height, width, 3], got {shape(images)}")
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    images = unit_range(images)
    count, _, height, width = images.shape
    K = K.expand(count, 3, 3) if K.shape == (3, 3) else K
    for name, value, expected in (
        ("K", K, (count, 3, 3)),
        ("c2w", c2w, (count, 4, 4)),
        ("target_K", target_K, (3, 3)),
        ("target_c2w", target_c2w, (4, 4)),
    ):
        if tuple(value.shape) != expected:
            raise InputError(f"expected {name} of shape {list(expected)} for {count} images, got {shape(value)}")
        if not torch.isfinite(value).all():
            raise InputError(f"{name} holds numbers that are not finite: check the poses")
    nears, fars = depth_ranges(near, far, count)
    if quality not in ("full", "fast"):
        raise InputError(f"expected quality 'full' or 'fast', got {quality!r}")
    c2w, target_c2w = near_origin(c2w, target_c2w)
    wanted = (width, height) if size is None else whole_size(size)
    source = Cameras(c2w, K.float(), (width, height), nears, fars)
    target = Cameras(target_c2w, target_K.float(), wanted, *target_bounds(source))
    network = model if isinstance(model, IDNeRF) else IDNeRF.from_pretrained(model)
    return network.render(Views(images, source).to(network.device), target.to(network.device), quality=quality)  # type: ignore[arg-type]


def depth_ranges(near: Any, far: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """near and far of each of ``count`` sources, from one number for all or one for each."""
    try:
        bounds = [torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in (near, far)]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"expected near and far as numbers, or [{count}] of each source; got {near!r} and {far!r}"
        ) from None
    bounds = [value.reshape(()) if value.numel() == 1 else value for value in bounds]
    for name, value in zip(("near", "far"), bounds, strict=True):
        if tuple(value.shape) not in ((), (count,)):
            raise InputError(
                f"expected {name} as one number, or of shape [{count}] for {count} images, got {shape(value)}"
            )
    nears, fars = (value.expand(count).float() for value in bounds)
    for low, high in zip(nears.tolist(), fars.tolist(), strict=True):
        if not 0 < low < high < math.inf:
            raise InputError(f"expected 0 < near < far, both finite, got near {low:g} and far {high:g}")
    return nears, fars


def near_origin(c2w: torch.Tensor, target_c2w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources [view] and target in float32, moved together where their centres are far from the origin.

    Then the sources' mean centre comes to lie there. What is rendered does not depend on where the origin is.
    """
    poses = torch.cat([c2w.double().cpu(), target_c2w[None].double().cpu()])
    centers = poses[:, :3, 3]
    middle = centers[:-1].mean(0)
    if middle.norm() > FAR_FROM_ORIGIN * (centers - middle).norm(dim=-1).max():
        poses[:, :3, 3] = centers - middle
    return poses[:-1].float(), poses[-1].float()


def whole_size(size: Any) -> tuple[int, int]:
    """(width, height) as whole numbers; 480.0 is one, 480.5 is not."""
    try:
        width, height = (int(side) for side in size)
        if (width, height) == tuple(size) and min(width, height) >= 1:
            return width, height
    except (TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"expected size as (width, height) in whole numbers of at least 1 pixel each, got {size}")


def unit_range(images: torch.Tensor) -> torch.Tensor:
    """Images as floats in [0, 1], from whole numbers of 0 to 255 or from such floats."""
    if images.dtype == torch.bool:
        raise InputError("expected images as floats in [0, 1] or whole numbers in [0, 255], got booleans")
    if not torch.isfinite(images).all():
        raise InputError("images hold numbers that are not finite: replace those pixels")
    most = 1.0 if images.is_floating_point() else 255.0
    images = images.float() / most
    if images.numel() and (images.min() < -SLACK or images.max() > 1 + SLACK):
        low, high = float(images.min()) * most, float(images.max()) * most
        raise InputError(f"expected images as floats in [0, 1] or whole numbers in [0, 255], got {low:g} to {high:g}")
    return images


def shape(value: torch.Tensor | Sequence) -> list[int]:
    return list(value.shape) if isinstance(value, torch.Tensor) else [len(value)]
