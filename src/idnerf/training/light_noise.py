"""Light that changes from photo to photo, as gloss, clouds, flashes and automatic exposure make it.

Two factors, drawn anew for every source photo and applied to its colours; the target keeps its own:

* exposure: one factor for the photo.
* light: a factor that varies smoothly over the photo (a grid of 4x3 values, bicubic between them). It stands for what
  the shading of the procedural scenes has too little of: broad sheen that moves over a surface with the camera. A
  network that has not seen it takes a surface whose brightness differs between its sources for no surface at all.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError

GRID = (3, 4)
"""Rows and columns of the values between which the light is interpolated."""


@dataclass(frozen=True)
class LightNoiseConfig:
    """Differences in light between the source photos."""

    share: float = 0.0
    """Share of the examples whose source photos differ in light; how much is drawn evenly up to the following."""
    exposure: float = 0.03
    """Standard deviation of the logarithm of a photo's own factor."""
    light: float = 0.12
    """Standard deviation of the logarithm of the factor that varies over the photo."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"--scenes.light-noise.share: expected a share in [0, 1], got {self.share}")
        for name in ("exposure", "light"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--scenes.light-noise.{name}: expected 0 to 1, got {getattr(self, name)}")


def relight(
    images: Float[Tensor, "view 3 height width"], config: LightNoiseConfig, generator: torch.Generator
) -> Float[Tensor, "view 3 height width"]:
    """Photos (RGB in [0, 1], as displayed) under light that differs between them as ``config`` says."""
    if config.share == 0 or float(torch.rand((), generator=generator)) >= config.share:
        return images
    strength = float(torch.rand((), generator=generator))
    number, size = len(images), images.shape[-2:]
    exposure = config.exposure * torch.randn(number, 1, 1, 1, generator=generator)
    grid = config.light * torch.randn(number, 1, *GRID, generator=generator)
    light = F.interpolate(grid, size=size, mode="bicubic", align_corners=True)
    return (images * torch.exp(strength * (exposure + light))).clamp(0, 1)
