"""Colours for scalar maps (depth, error), without a plotting library."""

import torch
from jaxtyping import Float
from torch import Tensor

_STOPS = (
    (0.19, 0.07, 0.23),
    (0.26, 0.32, 0.82),
    (0.23, 0.61, 0.97),
    (0.11, 0.86, 0.77),
    (0.45, 0.97, 0.40),
    (0.80, 0.92, 0.22),
    (0.99, 0.66, 0.20),
    (0.92, 0.34, 0.07),
    (0.71, 0.11, 0.01),
    (0.45, 0.02, 0.01),
)
"""A smooth rainbow in the manner of the Turbo map: dark blue, blue, green, yellow, red, dark red."""


def colorize(values: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """Colour of every value in [0, 1] (clamped): 0 dark blue, 1 dark red; linear between ten stops."""
    stops = torch.tensor(_STOPS, device=values.device)
    position = values.float().clamp(0, 1) * (len(stops) - 1)
    lower = position.floor().clamp_max(len(stops) - 2)
    fraction = (position - lower)[..., None]
    index = lower.long()
    return torch.lerp(stops[index], stops[index + 1], fraction).movedim(-1, -3)


def colorize_depth(
    depth: Float[Tensor, "*batch height width"], near: float, far: float
) -> Float[Tensor, "*batch 3 height width"]:
    """Depth (z) as colour, even in inverse depth: ``near`` red, ``far`` blue; black where unknown (0).

    Args:
        near, far: the range shown, scene units, 0 < near < far.
    """
    known = depth > 0
    inverse = 1 / torch.where(known, depth, torch.full_like(depth, far))
    colours = colorize((inverse - 1 / far) / (1 / near - 1 / far))
    return colours * known.unsqueeze(-3)


def colorize_error(
    prediction: Float[Tensor, "*batch 3 height width"],
    truth: Float[Tensor, "*batch 3 height width"],
    largest: float = 0.3,
) -> Float[Tensor, "*batch 3 height width"]:
    """Mean |error| over the channels as colour; errors of ``largest`` and above take the last colour."""
    return colorize((prediction - truth).abs().mean(-3) / largest)
