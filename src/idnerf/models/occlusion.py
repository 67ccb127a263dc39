"""Which source views another surface keeps from seeing what the target sees: a depth buffer in every view.

expected positions of a target tile --project--> nearest surface in every cell of a view --look up--> occluded shares

That a point lies inside a photo does not mean that the photo shows it. Beside a near object a target sees what some
source views see the object in front of; where two of three do, both show the object, agree, and outvote the third. So
the surfaces found for the target are drawn into each view, and a view in which something else lies nearer is taken not
to see the pixel. Shadow mapping (Williams 1978), the views in the place of the lights; soft visibility from depth:
NeuRay (arXiv 2107.13421), whose depth is that of the source views.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.compiled import dispatch
from idnerf.geometry.precision import full_precision
from idnerf.geometry.projection import frustum_homography, homography_rays, safe_depth, visible
from idnerf.geometry.rays import pixel_centers
from idnerf.models.fine_samples import FineOutput
from idnerf.types import Cameras

BUFFER_SIDES = 2
"""Sides of a view's depth buffer over the tile's longer one: a tile that is seen stretched or turned lies in it."""
SPLAT_RADIUS, LARGEST_SPLAT_RADIUS = 0.25, 1.0
"""Of a pixel, in cells; at most, where it is stretched: beyond half its width, or slanted surfaces would have holes."""


def without_occluded(fine: FineOutput, source: Cameras, target: Cameras, tolerance: float) -> FineOutput:
    """The same picture with visibility only where no other surface keeps a view from seeing the pixel
    (``occluded_shares``).

    Without gradients ``fine`` itself is changed.
    """
    seen = 1 - occluded_shares(fine.position, source, target, tolerance)[:, :, None].to(fine.views.dtype)
    if not torch.is_grad_enabled():
        fine.views[:, :, -1:] *= seen  # the rest would be copied too
        return fine
    return dataclasses.replace(fine, views=torch.cat([fine.views[:, :, :-1], fine.views[:, :, -1:] * seen], 2))


@torch.no_grad()
@full_precision
def occluded_shares(
    position: Float[Tensor, "batch height width"], source: Cameras, target: Cameras, tolerance: float
) -> Float[Tensor, "batch view height width"]:
    """How far each pixel's surface is hidden from each view by the surfaces of other pixels, 0 (not) to 1.

    Only by what the tile sees: what lies beyond its frame may hide a surface, too.

    Args:
        position: of the surfaces, in [0, 1] of inverse depth (0 at near).
        source: [batch view] cameras.
        target: [batch] cameras of the tile.
        tolerance: as a share of the target's range of inverse depth, or in a view that is nearer to the surface, in
            which an error of its depth counts more, so much more of it. A surface is not occluded by one that is less
            than that nearer in inverse depth, and wholly by one that is twice that nearer.
    """
    near, far = target.near[:, None], target.far[:, None]
    inverse_depth = 1 / near + position.float().flatten(1) * (1 / far - 1 / near)
    A, b = frustum_homography(target, source)
    of_target, of_source = (camera.K.diagonal(dim1=-2, dim2=-1)[..., :2] for camera in (target, source))
    zoom = of_target[:, None] / of_source
    slack = (tolerance * (1 / near - 1 / far)).clamp_min(1e-12)
    side = BUFFER_SIDES * max(target.size)
    if dispatch.usable(inverse_depth, A, b):
        radii = (SPLAT_RADIUS, LARGEST_SPLAT_RADIUS)
        found = dispatch.occluded_shares(inverse_depth, target.size, A, b, zoom, source.size, slack, side, radii)
        return found.unflatten(-1, (target.height, target.width))
    pixels = pixel_centers(target.size, target.device).flatten(0, 1)
    shares = []
    for view in range(source.shape[1]):  # one by one: a buffer and what leads to it stay small
        moved = homography_rays(A[:, view], pixels) + b[:, view, None] * inverse_depth[..., None]
        ratio = moved[..., 2]  # of the surface's depth in the view to its depth in the target
        inside = visible(at := moved[..., :2] / safe_depth(ratio)[..., None], ratio, source.size)
        mean_ratio = torch.where(inside, ratio, 0.0).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp_min(1)
        # cells about as wide as a target pixel is in the view, from the tile's corner there on
        cells = at * (zoom[:, view] * mean_ratio)[:, None]
        corner = torch.where(inside[..., None], cells, torch.inf).amin(1, keepdim=True).floor()
        cells = cells - torch.where(corner.isfinite(), corner, 0.0)
        inside = visible(cells, torch.where(inside, 1.0, 0.0), (side, side))
        stretch = mean_ratio / safe_depth(ratio)
        radius = (0.5 * stretch - 0.5 + SPLAT_RADIUS).clamp(SPLAT_RADIUS, LARGEST_SPLAT_RADIUS)
        found = inverse_depth / safe_depth(ratio)
        nearer = nearest_in_cells(cells, found, radius, inside, side) - found
        allowed = slack * safe_depth(ratio).square().reciprocal().clamp_min(1)
        shares.append(torch.where(inside, (nearer / allowed - 1).clamp(0, 1), 0.0))
    return torch.stack(shares, 1).unflatten(-1, (target.height, target.width))


def nearest_in_cells(
    cells: Float[Tensor, "batch pixel 2"],
    inverse_depth: Float[Tensor, "batch pixel"],
    radius: Float[Tensor, "batch pixel"],
    inside: Bool[Tensor, "batch pixel"],
    side: int,
) -> Float[Tensor, "batch pixel"]:
    """Largest inverse depth in each pixel's cell of a square depth buffer of ``side`` cells.

    A pixel that is ``inside`` is drawn into all cells that it reaches within its ``radius``, at most 1.
    """
    width = side + 2  # a border takes what reaches beyond
    drawn = torch.where(inside, inverse_depth, 0.0)
    buffer = drawn.new_zeros(len(drawn), width * width)
    at, radius = torch.where(inside[..., None], cells, 0.0) + 1, torch.where(inside, radius, 0.0)
    columns, rows = (  # the largest number below ``side`` may round up to it
        [(coordinate + sign * radius).long().clamp_max(side + 1) for sign in (-1, 0, 1)] for coordinate in at.unbind(-1)
    )
    for row in rows:
        for column in columns:
            buffer.scatter_reduce_(1, row * width + column, drawn, "amax")
    return buffer.gather(1, rows[1] * width + columns[1])
