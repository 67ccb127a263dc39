"""Blending: the target's colour as a mixture of what the source views show at each pixel (IBRNet, arXiv 2102.13090).

views composited along the rays + tokens --3x3 convolutions, shared by the views--> logits --softmax--> shares
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.geometry.precision import full_precision
from idnerf.geometry.rays import inverse_intrinsics, pixel_centers
from idnerf.models.activation import activate
from idnerf.models.fine_samples import FineOutput, softmax_of_few
from idnerf.types import Cameras

LEAST_VISIBLE = 1e-3
"""A view that does not see a pixel at all keeps this much weight, so that a pixel that no view sees has a colour."""


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
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch height width"]]:
        """Blended colour, and the standard deviation of what was blended (over views and channels).

        ``added``: from view refinement, to each view's hidden channels.
        """
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
        logits = self.head(activate(self.mix(hidden))).float().unflatten(0, (batch, view))
        shares = softmax_of_few(logits + weight.log(), 1)
        rgb = (shares * fine.colours).sum(1)
        deviation = (shares * (fine.colours - rgb[:, None]).square()).sum((1, 2))
        return rgb, (deviation + 1e-6).sqrt()


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
