"""What was rendered for a browser, and how it is shown."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from idnerf.rendering.colormap import colorize, colorize_depth
from idnerf.types import Cameras, RenderOutput
from idnerf.viewer.sources import Support

Mode = Literal["Colour", "Depth", "Confidence"]
MODES: tuple[Mode, ...] = ("Colour", "Depth", "Confidence")

BACKGROUND = 0.12
"""Grey that uncertain pixels fade to."""

FADE_FROM, FADE_TO = 0.1, 0.35
"""Confidence at which a pixel has faded away, and above which it is shown as it is."""

CLOSE, FAR = 12.0, 25.0
"""Degrees from the nearest source's ray up to which a picture is as good as it gets, and from which it is a guess."""

POOR, LOST = 0.6, 0.05
"""Shares of supported pixels below which a picture is near the edge, and out of range."""


@dataclass(frozen=True)
class Picture:
    """A rendered view, on the CPU, without batch axis.

    Attributes:
        output: colour, depth (z, scene units), opacity, confidence.
        camera: what it was rendered through.
        support: how well the sources see each surface point.
        sources: indices of the views it was rendered from.
        full: rendered at the chosen size and quality, or a coarse one for a moving camera.
        seconds: time it took, encoding included.
    """

    output: RenderOutput
    camera: Cameras
    support: Support
    sources: tuple[int, ...]
    full: bool
    seconds: float

    @property
    def supported(self) -> float:
        """Share of the picture that at least two sources see (one alone cannot be matched) from not too far away."""
        close = self.support.angle < (CLOSE + FAR) / 2
        return float((close & (self.support.seen >= 2)).float().mean())

    @property
    def allowed(self) -> Float[Tensor, "height width"]:
        """What the sources allow, in [0, 1]: all where two see the surface, half where one does; less when they see it
        from another side."""
        from_here = ((FAR - self.support.angle) / (FAR - CLOSE)).clamp(0, 1)
        return self.support.seen.clamp_max(2) / 2 * from_here

    @property
    def certainty(self) -> Float[Tensor, "height width"]:
        """The model's confidence, as far as the sources allow it."""
        return self.allowed if self.output.confidence is None else self.output.confidence * self.allowed

    @property
    def kept(self) -> Float[Tensor, "height width"]:
        """What fading leaves of every pixel, in [0, 1]."""
        kept = self.allowed
        if self.output.confidence is not None:
            kept = kept * ((self.output.confidence - FADE_FROM) / (FADE_TO - FADE_FROM)).clamp(0, 1)
        return F.avg_pool2d(kept[None, None], 3, stride=1, padding=1, count_include_pad=False)[0, 0]


def display(picture: Picture, mode: Mode, *, fade: bool) -> UInt8[np.ndarray, "height width 3"]:
    """The picture as 8-bit RGB: colour, depth (near red, far blue) or confidence (high red).

    Args:
        fade: grey out what is uncertain (not in mode ``Confidence``).
    """
    if mode == "Confidence":
        shown = colorize(picture.certainty)
    elif mode == "Depth":
        near, far = shown_range(picture)
        shown = colorize_depth(picture.output.depth, near, far)
    else:
        shown = picture.output.rgb
    if fade and mode != "Confidence":
        shown = torch.lerp(torch.full_like(shown, BACKGROUND), shown, picture.kept)
    return (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def shown_range(picture: Picture) -> tuple[float, float]:
    """Depths that the colours span: the picture's own, without its outermost hundredths, within the camera's range.

    A bounds file may reach ten times as far as anything in view, and all of the picture would have one colour.
    """
    depth = picture.output.depth.flatten()
    depth = depth[:: max(1, len(depth) // 50_000)]
    low, high = (float(x) for x in torch.quantile(depth, torch.tensor([0.01, 0.99])))
    near, far = float(picture.camera.near), float(picture.camera.far)
    low, high = max(low, near), min(high, far)
    return (low, high) if high > 1.02 * low else (near, far)


def warning(picture: Picture) -> str | None:
    """What to tell about a camera that the sources do not reach, in a sentence; None when all is well."""
    if picture.supported >= POOR:
        return None
    angle = float(picture.support.angle.median())
    if angle >= 180:
        reason = "the photos in use show nothing of most of this view"
    elif angle > (CLOSE + FAR) / 2:
        reason = f"the photos in use were taken {angle:.0f} degrees away from here"
    else:
        reason = (
            f"fewer than two of the photos in use see {100 * float((picture.support.seen < 2).float().mean()):.0f} %"
        )
    if picture.supported < LOST:
        return f"Out of range: {reason}. What is rendered is a guess: go back towards the photos."
    return f"Near the edge: {reason}. What they do not support is a guess."
