"""Which source view is kept from seeing a pixel's surface by another surface: a depth buffer in every view.

expected positions of a target tile --project--> nearest surface in every cell of a view --look up--> hidden shares

That a point lies inside a photo does not mean that the photo shows it. Beside a near object a target sees what some
source views see the object in front of; where two of three do, both show the object, agree, and outvote the third. So
the surfaces found for the target are drawn into each view, and a view in which something else lies nearer is taken not
to see the pixel (soft visibility from depth: NeuRay, arXiv 2107.13421; theirs comes from depth maps of the sources).
"""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.geometry.precision import full_precision
from idnerf.geometry.projection import frustum_homography, homography_rays, safe_depth, visible
from idnerf.geometry.rays import pixel_centers
from idnerf.models.fine_samples import FineOutput
from idnerf.types import Cameras

BUFFER_SIDES = 2
"""Width and height of a view's depth buffer over the tile's: a tile that is seen stretched still lies in it."""
PIXEL_REACH = 0.25
"""Of a pixel's surface to either side of its centre, in cells: surfaces that are stretched 1.5 times have no holes."""


def without_occluded(fine: FineOutput, source: Cameras, target: Cameras, tolerance: float) -> FineOutput:
    """The same picture with visibility only where a view is not kept from seeing the pixel (``hidden_shares``).

    Without gradients ``fine`` itself is changed.
    """
    seen = 1 - hidden_shares(fine.position, source, target, tolerance)[:, :, None].to(fine.views.dtype)
    if not torch.is_grad_enabled():
        fine.views[:, :, -1:] *= seen  # the rest would be copied too
        return fine
    return dataclasses.replace(fine, views=torch.cat([fine.views[:, :, :-1], fine.views[:, :, -1:] * seen], 2))


@torch.no_grad()
@full_precision
def hidden_shares(
    position: Float[Tensor, "batch height width"], source: Cameras, target: Cameras, tolerance: float
) -> Float[Tensor, "batch view height width"]:
    """How far each pixel's surface is hidden from each view by the surfaces of other pixels, 0 (not) to 1.

    Args:
        position: of the surfaces, in [0, 1] of inverse depth (0 at near).
        source: [batch view] cameras.
        target: [batch] cameras of the tile.
        tolerance: of a view's inverse depth, as a share of the target's range of inverse depth: a surface is not
            hidden by one that is less than so much nearer, and wholly by one that is twice so much.
    """
    position = position.float()
    near, far = target.near[:, None, None], target.far[:, None, None]
    inverse_depth = (1 / near + position * (1 / far - 1 / near)).flatten(1)
    A, b = frustum_homography(target, source)
    rays = homography_rays(A, pixel_centers(target.size, target.device).flatten(0, 1))  # batch view pixel 3
    moved = rays + b[:, :, None] * inverse_depth[:, None, :, None]
    pixels, depth = moved[..., :2] / safe_depth(moved[..., 2:]), moved[..., 2]
    seen = visible(pixels, depth, source.size)
    # of the view: inverse depth in units of the target's range
    closeness = inverse_depth[:, None] / safe_depth(depth) / (1 / near - 1 / far)
    # cells about as wide as a target pixel is in the view, from the tile's corner there on
    count = seen.sum(-1).clamp_min(1)
    magnification = torch.where(seen, depth, 0.0).sum(-1) / count
    of_target, of_source = (camera.K.diagonal(dim1=-2, dim2=-1)[..., :2] for camera in (target, source))
    cells = pixels * (of_target[:, None] / of_source * magnification[..., None])[:, :, None]
    corner = torch.where(seen[..., None], cells, torch.inf).amin(2).floor()
    cells = cells - torch.where(corner.isfinite(), corner, 0.0)[:, :, None]
    width, height = (BUFFER_SIDES * side for side in target.size)
    seen = visible(cells, torch.where(seen, 1.0, 0.0), (width, height))
    nearest = nearest_in_cells(cells, closeness, seen, (width, height))
    hidden = ((nearest - closeness) / tolerance - 1).clamp(0, 1)
    return torch.where(seen, hidden, 0.0).unflatten(-1, (target.height, target.width))


def nearest_in_cells(
    cells: Float[Tensor, "batch view pixel 2"],
    closeness: Float[Tensor, "batch view pixel"],
    seen: Bool[Tensor, "batch view pixel"],
    size: tuple[int, int],
) -> Float[Tensor, "batch view pixel"]:
    """Largest closeness in each pixel's cell of a view's buffer of ``size`` (width, height).

    A pixel that is ``seen`` fills all cells that it reaches: stretched surfaces would have holes otherwise.
    """
    width, height = size
    drawn = torch.where(seen, closeness, 0.0)
    # a border of one cell takes what overlaps the end
    buffer = drawn.new_zeros(*drawn.shape[:2], (height + 2) * (width + 2))
    inside = torch.where(seen[..., None], cells, 0.0)
    (left, top), (right, bottom) = ((inside + 1 + side * PIXEL_REACH).floor().unbind(-1) for side in (-1, 1))
    for column in (left, right):
        for row in (top, bottom):
            buffer.scatter_reduce_(2, (row * (width + 2) + column).long(), drawn, "amax")
    own = inside.floor() + 1
    return buffer.gather(2, (own[..., 1] * (width + 2) + own[..., 0]).long())
