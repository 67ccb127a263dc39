"""Camera algebra: inverting, resizing, cropping, distances. Pure functions.

Numbers go into tensors as Python scalars, never by ``new_tensor``: on a GPU that waits for all that is queued there.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.geometry.precision import full_precision
from idnerf.types import Cameras

FACING = 0.5
"""Cosine of the 60 degrees within which optical axes point the same way."""

NEAREST_SHARE = 0.25
"""A camera that has moved forward keeps at least this share of the sources' near."""


@full_precision
def invert_rigid(matrix: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Inverse of a rigid motion [R | t]: [R^T | -R^T t]. Swaps c2w and w2c."""
    rotation_t = matrix[..., :3, :3].transpose(-1, -2)
    translation = -rotation_t @ matrix[..., :3, 3:]
    bottom = torch.zeros_like(matrix[..., :1, :])
    bottom[..., 3] = 1.0
    return torch.cat([torch.cat([rotation_t, translation], -1), bottom], -2)


def resize(cameras: Cameras, size: tuple[int, int]) -> Cameras:
    """The same cameras seen through images resized to ``size`` (width, height); fx and fy scale apart.

    With pixel centres at +0.5 an image spans [0, width], so K scales without offset.
    """
    K = cameras.K.clone()
    K[..., 0, :] *= size[0] / cameras.width
    K[..., 1, :] *= size[1] / cameras.height
    return replace(cameras, K=K, size=size)


def halve(cameras: Cameras) -> Cameras:
    """The same cameras seen through images of half the size, as means of 2x2 pixels are; odd sides are rounded up."""
    K = cameras.K.clone()
    K[..., :2, :] *= 0.5
    return replace(cameras, K=K, size=(-(-cameras.width // 2), -(-cameras.height // 2)))


def crop(
    cameras: Cameras, left: int | Float[Tensor, "*batch"], top: int | Float[Tensor, "*batch"], size: tuple[int, int]
) -> Cameras:
    """Cameras of the window of ``size`` whose top-left corner is (left, top); it may leave the image."""
    K = cameras.K.clone()
    K[..., 0, 2] -= left
    K[..., 1, 2] -= top
    return replace(cameras, K=K, size=size)


def view_distances(cameras: Cameras, target: Cameras, order: int = 1) -> Float[Tensor, "view"]:
    """Distance of every camera's centre from the target's: L1 (``order=1``, MVSNeRF's choice) or L2."""
    return torch.linalg.vector_norm(cameras.centers - target.centers, ord=order, dim=-1)


def facing(cameras: Cameras, target: Cameras) -> Bool[Tensor, "view"]:
    """Which cameras look the target's way, within 60 degrees between the optical axes."""
    return cameras.c2w[:, :3, 2] @ target.c2w[:3, 2] > FACING


def shifted_range(
    sources: Cameras, c2w: Float[Tensor, "*frame 4 4"]
) -> tuple[Float[Tensor, "*frame"], Float[Tensor, "*frame"]]:
    """near, far (z, scene units) of free cameras: their sources' range, shifted by how far they stand behind each.

    A camera that steps back d from its sources has everything d further away. In the plane of the sources this is
    their smallest near and largest far. Moved forward it keeps a share of near, ``NEAREST_SHARE``.

    Args:
        sources: [view] cameras.
    """
    behind = ((sources.centers - c2w[..., None, :3, 3]) * c2w[..., None, :3, 2]).sum(-1)
    near = torch.maximum(sources.near + behind, NEAREST_SHARE * sources.near).amin(-1)
    far = (sources.far + behind).amax(-1)
    return near, torch.maximum(far, 2 * near)
