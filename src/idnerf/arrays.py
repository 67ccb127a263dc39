"""Arrays in, arrays out: for those who have cameras of their own and want none of our types."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF
from idnerf.types import Cameras, RenderOutput, Views

SLACK = 0.15
"""How far colours may leave their range: resampling filters overshoot at edges."""


def render(
    images: Any,
    K: Any,
    c2w: Any,
    target_K: Any,
    target_c2w: Any,
    near: float,
    far: float,
    *,
    size: tuple[int, int] | None = None,
    model: IDNeRF | str | Path = "default",
    quality: str = "full",
) -> RenderOutput:
    """Render one new view from source photos given as arrays (anything ``torch.as_tensor`` takes).

    Args:
        images: [view, 3, height, width] or [view, height, width, 3], RGB; floats in [0, 1] or whole numbers
            from 0 to 255.
        K: [view, 3, 3] or [3, 3], pixels, centres at +0.5.
        c2w: [view, 4, 4] camera-to-world, OpenCV axes.
        target_K, target_c2w: [3, 3] and [4, 4] of the view to render.
        near, far: depth range (z) of the scene, in the units of ``c2w``.
        size: (width, height) to render; the sources' size by default.
        model: an ``IDNeRF`` (load it once for several calls), or what ``IDNeRF.from_pretrained`` takes.
        quality: ``full`` or ``fast``.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, near and far that are no range, an unknown
            quality.
    """
    images, K, c2w = torch.as_tensor(images), torch.as_tensor(K), torch.as_tensor(c2w)
    target_K, target_c2w = torch.as_tensor(target_K).float(), torch.as_tensor(target_c2w).float()
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
    if not 0 < near < far < math.inf:
        raise InputError(f"expected 0 < near < far, both finite, got near {near} and far {far}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise InputError(f"expected size as (width, height) of at least 1 pixel each, got {tuple(size)}")
    if quality not in ("full", "fast"):
        raise InputError(f"expected quality 'full' or 'fast', got {quality!r}")
    bounds = torch.tensor([float(near), float(far)])
    source = Cameras(c2w.float(), K.float(), (width, height), bounds[0].expand(count), bounds[1].expand(count))
    target = Cameras(target_c2w, target_K, size or (width, height), bounds[0], bounds[1])
    network = model if isinstance(model, IDNeRF) else IDNeRF.from_pretrained(model)
    return network.render(Views(images, source).to(network.device), target.to(network.device), quality=quality)  # type: ignore[arg-type]


def unit_range(images: torch.Tensor) -> torch.Tensor:
    """Images as floats in [0, 1], from whole numbers of 0 to 255 or from such floats."""
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
