"""World to pixels, and looking up maps at pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from idnerf.geometry.cameras import invert_rigid
from idnerf.geometry.precision import full_precision
from idnerf.geometry.rays import inverse_intrinsics
from idnerf.types import Cameras

POINTS_PER_CHUNK = 8192
"""Points whose gradients are spread over a map at once."""


@full_precision
def project(
    points: Float[Tensor, "*batch point 3"], cameras: Cameras
) -> tuple[Float[Tensor, "*batch point 2"], Float[Tensor, "*batch point"]]:
    """Project world points into each camera.

    Returns pixels (u, v), centres at +0.5, and depth z. Where z <= 0 the pixel is meaningless: ask ``visible``.
    """
    w2c = invert_rigid(cameras.c2w)
    in_camera = points @ w2c[..., :3, :3].transpose(-1, -2) + w2c[..., None, :3, 3]
    homogeneous = in_camera @ cameras.K.transpose(-1, -2)
    depth = in_camera[..., 2]
    return homogeneous[..., :2] / safe_depth(depth)[..., None], depth


def safe_depth(depth: Float[Tensor, "..."], epsilon: float = 1e-6) -> Float[Tensor, "..."]:
    """Depth kept away from zero, sign kept, so that dividing by it stays finite."""
    return torch.where(depth >= 0, depth.clamp_min(epsilon), depth.clamp_max(-epsilon))


def visible(
    pixels: Float[Tensor, "*batch 2"], depth: Float[Tensor, "*batch"], size: tuple[int, int]
) -> Bool[Tensor, "*batch"]:
    """In front of the camera and inside its image (docs/conventions.md)."""
    u, v = pixels[..., 0], pixels[..., 1]
    return (depth > 0) & (u >= 0) & (u < size[0]) & (v >= 0) & (v < size[1])


def scaled(pixels: Float[Tensor, "*batch 2"], across: float, down: float) -> Float[Tensor, "*batch 2"]:
    """Each coordinate times a number of its own. A tensor of the two would be copied to a GPU at every call."""
    return torch.stack([pixels[..., 0] * across, pixels[..., 1] * down], -1)


def homography_rays(
    A: Float[Tensor, "*batch 3 3"], pixels: Float[Tensor, "pixel 2"]
) -> Float[Tensor, "*batch pixel 3"]:
    """A (p, 1) for every pixel. Elementwise, so that no precision set for matrix products touches the geometry."""
    columns = A[..., None, :, :]
    return columns[..., 0] * pixels[:, :1] + columns[..., 1] * pixels[:, 1:] + columns[..., 2]


@full_precision
def frustum_homography(
    target: Cameras, source: Cameras
) -> tuple[Float[Tensor, "*batch view 3 3"], Float[Tensor, "*batch view 3"]]:
    """(A, b) such that target pixel p at depth d lands in source view v at  A_v (p, 1) d + b_v  (homogeneous).

    A = K_s R_s^T R_t K_t^-1 and b = K_s R_s^T (c_t - c_s). One 3x3 product per pixel then serves all depths:
    this is what makes the target-frustum volume cheap.

    Args:
        target: [*batch] cameras.
        source: [*batch view] cameras.
    """
    w2s = invert_rigid(source.c2w)
    relative = w2s @ target.c2w[..., None, :, :]
    A = source.K @ relative[..., :3, :3] @ inverse_intrinsics(target.K)[..., None, :, :]
    b = (source.K @ relative[..., :3, 3:])[..., 0]
    return A, b


def bilinear_lookup(
    maps: Float[Tensor, "image height width channel"], positions: Float[Tensor, "image point 2"]
) -> Float[Tensor, "image point channel"]:
    """Sample channels-last maps bilinearly at positions in *map* pixels (centres at +0.5), border values outside.

    On the CPU this is a four-tap ``embedding_bag``: same numbers as ``grid_sample(padding_mode="border",
    align_corners=False)``, with a backward pass that is several times faster on many channels (benchmarks/NOTES.md).
    Gradients flow to ``maps`` only: sample positions come from known cameras and detached depths.
    """
    image, height, width, channel = maps.shape
    if maps.device.type != "cpu":
        u, v = positions.unbind(-1)
        grid = torch.stack([u * (2 / width) - 1, v * (2 / height) - 1], -1)[:, None].to(maps.dtype)
        sampled = F.grid_sample(
            maps.permute(0, 3, 1, 2), grid, mode="bilinear", padding_mode="border", align_corners=False
        )
        return sampled[:, :, 0].transpose(1, 2)
    u = (positions[..., 0].detach() - 0.5).clamp(0, width - 1)
    v = (positions[..., 1].detach() - 0.5).clamp(0, height - 1)
    u0, v0 = u.floor().clamp_max(max(width - 2, 0)), v.floor().clamp_max(max(height - 2, 0))
    fu, fv = u - u0, v - v0
    right, below = int(width > 1), width * int(height > 1)
    offset = torch.arange(image, device=maps.device)[:, None] * (height * width)
    top_left = offset + v0.long() * width + u0.long()
    taps = torch.stack([top_left, top_left + right, top_left + below, top_left + below + right], -1)
    weights = torch.stack([(1 - fu) * (1 - fv), fu * (1 - fv), (1 - fu) * fv, fu * fv], -1)
    points = positions.shape[1]
    sampled = _WeightedTaps.apply(maps.reshape(-1, channel), taps.reshape(-1, 4), weights.reshape(-1, 4))
    return sampled.reshape(image, points, channel)


class _WeightedTaps(torch.autograd.Function):
    """rows[taps] summed with weights. The backward pass of ``embedding_bag`` sorts all taps; adding row by row does not
    and takes half the time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "row channel"],
        taps: Int64[Tensor, "point tap"],
        weights: Float[Tensor, "point tap"],
    ) -> Float[Tensor, "point channel"]:
        ctx.save_for_backward(taps, weights)
        ctx.rows = len(rows)
        return F.embedding_bag(taps, rows, per_sample_weights=weights.to(rows.dtype), mode="sum")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        taps, weights = ctx.saved_tensors
        (gradient,) = gradients
        # a row gathers many points: a sum in half precision would stop growing
        dtype = torch.promote_types(gradient.dtype, weights.dtype)
        rows = gradient.new_zeros(ctx.rows, gradient.shape[1], dtype=dtype)
        parts = zip(*(x.split(POINTS_PER_CHUNK) for x in (gradient, taps, weights)), strict=True)
        for of_points, at, shares in parts:  # the products stay in the cache
            for tap, share in zip(at.unbind(1), shares.unbind(1), strict=True):
                rows.index_add_(0, tap, of_points * share[:, None])
        return rows.to(gradient.dtype), None, None


def trilinear_lookup(
    volumes: Float[Tensor, "volume plane height width channel"], positions: Float[Tensor, "volume point 3"]
) -> Float[Tensor, "volume point channel"]:
    """Sample channels-last volumes at (u, v, plane) positions in cells (centres at +0.5), border values outside.

    Two bilinear lookups (the planes below and above) of a volume whose planes are stacked into one tall image.
    Gradients flow to ``volumes`` only.
    """
    _, planes, height, _, _ = volumes.shape
    u, v, w = positions.detach().unbind(-1)
    v = v.clamp(0.5, height - 0.5)  # do not bleed into the neighbouring plane
    w = (w - 0.5).clamp(0, planes - 1)
    below = w.floor()
    above = (below + 1).clamp_max(planes - 1)
    fraction = (w - below)[..., None].to(volumes.dtype)
    stacked = volumes.flatten(1, 2)
    low = bilinear_lookup(stacked, torch.stack([u, v + below * height], -1))
    high = bilinear_lookup(stacked, torch.stack([u, v + above * height], -1))
    return low + fraction * (high - low)
