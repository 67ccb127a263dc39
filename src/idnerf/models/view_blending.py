"""Blending: the target's colour as a mixture of what the source views show at each pixel (IBRNet, arXiv 2102.13090).

views composited along the rays + tokens --3x3 convolutions, shared by the views--> logits --softmax--> shares

The image-space refinement, which sees further, may correct the logits (``ContextBlending``).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.geometry.precision import full_precision
from idnerf.geometry.rays import inverse_intrinsics, pixel_centers
from idnerf.models.activation import activate
from idnerf.models.feature_pyramid import start_at_zero
from idnerf.models.fine_samples import FineOutput, softmax_of_few
from idnerf.types import Cameras

LEAST_VISIBLE = 1e-3
"""A view that does not see a pixel at all keeps this much weight, so that a pixel that no view sees has a colour."""


@dataclass(frozen=True)
class Blend:
    """A target tile blended from the source views.

    Attributes:
        rgb: the mixture of the views' colours.
        deviation: standard deviation of what was mixed (over views and channels).
        hidden: what each view's logit was made of.
        logits: unnormalised logarithms of the shares.
    """

    rgb: Float[Tensor, "batch 3 height width"]
    deviation: Float[Tensor, "batch height width"]
    hidden: Float[Tensor, "batch view blend height width"]
    logits: Float[Tensor, "batch view height width"]


class ViewBlending(nn.Module):
    """Shares of the source views at every pixel. Any number of views, in any order."""

    def __init__(self, fine_channels: int, token_width: int, width: int):
        super().__init__()
        # features and colour as differences from the views' mean, visibility, angle between the rays, and how much
        # larger it is than the nearest view's: with many views, the near ones should outweigh the many
        self.from_view = nn.Conv2d(fine_channels + 6, width, 3, padding=1)
        self.from_tokens = nn.Conv2d(token_width, width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(
        self,
        fine: FineOutput,
        source: Cameras,
        target: Cameras,
        added: Float[Tensor, "batch view blend height width"] | None = None,
    ) -> Blend:
        """``added``: from view refinement, to each view's hidden channels."""
        batch, view = source.shape
        values, visibility = fine.views[:, :, :-1], fine.visibility[:, :, None]
        weight = visibility + LEAST_VISIBLE
        mean = (weight * values).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        near, far = target.near[:, None, None], target.far[:, None, None]
        angle = ray_angles(source, target, 1 / near + fine.position * (1 / far - 1 / near))
        angles = torch.stack([angle, angle - angle.amin(1, keepdim=True)], 2)
        cues = torch.cat([values - mean, visibility, angles], 2).flatten(0, 1)
        hidden = self.from_view(cues.contiguous(memory_format=torch.channels_last)).unflatten(0, (batch, view))
        hidden = hidden + self.from_tokens(fine.tokens)[:, None]
        hidden = activate(hidden if added is None else hidden + added).flatten(0, 1)
        hidden = activate(self.mix(hidden))
        logits = self.head(hidden).float().unflatten(0, (batch, view)) + weight.log()
        shares = softmax_of_few(logits, 1)
        rgb = (shares * fine.colours).sum(1)
        deviation = (shares * (fine.colours - rgb[:, None]).square()).sum((1, 2))
        return Blend(rgb, (deviation + 1e-6).sqrt(), hidden.unflatten(0, (batch, view)), logits[:, :, 0])


class ContextBlending(nn.Module):
    """The shares once more, with the image-space refinement's context: surroundings tell which view is occluded.

    Starts as no change.
    """

    def __init__(self, context_channels: int, width: int):
        super().__init__()
        self.from_context = nn.Conv2d(context_channels, width, 1)
        self.from_hidden = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)
        start_at_zero(self.head)

    def forward(
        self, blend: Blend, colours: Float[Tensor, "batch view 3 height width"], context: Tensor
    ) -> Float[Tensor, "batch 3 height width"]:
        """Args: what ``ViewBlending`` returned, the views' colours, ``context`` [batch channel height width]."""
        batch, view = blend.logits.shape[:2]
        hidden = self.from_hidden(blend.hidden.flatten(0, 1)).unflatten(0, (batch, view))
        hidden = activate(hidden + self.from_context(context)[:, None]).flatten(0, 1)
        change = self.head(hidden).float().unflatten(0, (batch, view))
        shares = softmax_of_few(blend.logits[:, :, None] + change, 1)
        return (shares * colours).sum(1)


@full_precision
def ray_angles(
    source: Cameras, target: Cameras, inverse_depth: Float[Tensor, "batch height width"]
) -> Float[Tensor, "batch view height width"]:
    """Angle (radians, times 4) at which each source view and the target see a pixel's point."""
    pixels = F.pad(pixel_centers(target.size, target.device), (0, 1), value=1.0)  # height width 3
    to_world = target.c2w[:, :3, :3] @ inverse_intrinsics(target.K)
    directions = pixels.flatten(0, 1) @ to_world.transpose(-1, -2)  # batch ray 3
    baseline = source.centers - target.centers[:, None]
    # direction to the point, divided by its depth: from the target d, from a source d - (c_s - c_t) / depth
    from_source = directions[:, None] - baseline[:, :, None] * inverse_depth.flatten(1)[:, None, :, None]
    cosine = F.cosine_similarity(from_source, directions[:, None], dim=-1)
    return (2 - 2 * cosine).clamp_min(1e-8).sqrt().mul(4).unflatten(-1, (target.height, target.width))
