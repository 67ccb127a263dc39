"""Colours and visibility of a point in N views to one vector that conditions the radiance field.

Two ways: ``ConcatenatedViews`` is MatchNeRF's (its width, and so the weights, belong to one number of views,
and the order of the views matters); ``SymmetricViews`` serves any number of views, in any order.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idnerf.compiled import dispatch


class ConcatenatedViews(nn.Module):
    """All colours, then all visibilities, in the order of the views. No parameters."""

    def __init__(self, views: int) -> None:
        super().__init__()
        self.width = 4 * views

    def forward(
        self,
        colours: Float[Tensor, "batch view point 3"],
        visible: Bool[Tensor, "batch view point"],
    ) -> Float[Tensor, "batch point width"]:
        in_order = colours.transpose(1, 2).flatten(2)
        return torch.cat([in_order, visible.transpose(1, 2).to(colours.dtype)], -1)


class SymmetricViews(nn.Module):
    """Mean and variance of the colours over the views that see the point, the share of these, and a code.

    The code is the mean of a small network's outputs for each view, whose inputs are the view's colour, how
    it differs from the mean, and how the view's ray turns from the target's: so views that look from near the
    target's direction can count more (after IBRNet, arXiv 2102.13090, section 3.2).
    """

    def __init__(self, code: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.width = 7 + code
        self.encode_view = nn.Sequential(nn.Linear(10, hidden), nn.ReLU(), nn.Linear(hidden, code), nn.ReLU())

    def along_rays(
        self,
        colours: Float[Tensor, "batch view point 3"],
        visible: Bool[Tensor, "batch view point"],
        points: Float[Tensor, "batch point 3"],
        centers: Float[Tensor, "batch view 3"],
        directions: Float[Tensor, "batch ray 3"],
        world_to_target: Float[Tensor, "batch 3 3"],
    ) -> Float[Tensor, "batch point width"]:
        """The vectors at ``points``, equally many on each ray, one ray after the other; others: see ``ray_turns``.

        Without gradients, on a CPU and with numba installed, point by point in compiled code.
        """
        if dispatch.usable(colours, points):
            hidden, code = (layer for layer in self.encode_view if isinstance(layer, nn.Linear))
            return dispatch.aggregate_views(
                hidden, code, colours, visible, points, centers, directions, world_to_target
            )
        along = directions.repeat_interleave(points.shape[1] // directions.shape[1], 1)
        return self(colours, visible, ray_turns(points, centers, along, world_to_target))

    def forward(
        self,
        colours: Float[Tensor, "batch view point 3"],
        visible: Bool[Tensor, "batch view point"],
        turns: Float[Tensor, "batch view point 4"],
    ) -> Float[Tensor, "batch point width"]:
        """``turns``: for every view, see ``ray_turns``."""
        seen = visible.to(colours.dtype)[..., None]
        share = seen.mean(1)
        weights = seen / seen.sum(1, keepdim=True).clamp_min(1)
        mean = (weights * colours).sum(1)
        offsets = colours - mean[:, None]
        variance = (weights * offsets * offsets).sum(1)
        codes = self.encode_view(torch.cat([colours, offsets, turns], -1))
        return torch.cat([mean, variance, share, (weights * codes).sum(1)], -1)


def ray_turns(
    points: Float[Tensor, "batch point 3"],
    centers: Float[Tensor, "batch view 3"],
    directions: Float[Tensor, "batch point 3"],
    world_to_target: Float[Tensor, "batch 3 3"],
) -> Float[Tensor, "batch view point 4"]:
    """How the ray of every source view to a point turns from the target's.

    Difference of the unit directions in the target camera's axes, and their cosine.

    Args:
        centers: camera centres of the source views.
        directions: unit direction of the target ray through each point.
        world_to_target: rotation part of the target's w2c.
    """
    of_views = torch.nn.functional.normalize(points[:, None] - centers[:, :, None], dim=-1)
    difference = (of_views - directions[:, None]) @ world_to_target[:, None].transpose(-1, -2)
    cosine = (of_views * directions[:, None]).sum(-1, keepdim=True)
    return torch.cat([difference, cosine], -1)
