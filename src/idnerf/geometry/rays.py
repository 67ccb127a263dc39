"""Pixels to rays."""

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.geometry.precision import full_precision
from idnerf.types import Cameras, Rays


def pixel_centers(size: tuple[int, int], device: torch.device | str = "cpu") -> Float[Tensor, "height width 2"]:
    """Pixel centres (u, v) of an image of ``size`` (width, height): (0.5, 0.5) at the top left."""
    u = torch.arange(size[0], device=device, dtype=torch.float32) + 0.5
    v = torch.arange(size[1], device=device, dtype=torch.float32) + 0.5
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def inverse_intrinsics(K: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Closed-form inverse of an upper-triangular K."""
    fx, fy, s, cx, cy = K[..., 0, 0], K[..., 1, 1], K[..., 0, 1], K[..., 0, 2], K[..., 1, 2]
    inverse = torch.zeros_like(K)
    inverse[..., 0, 0] = 1 / fx
    inverse[..., 1, 1] = 1 / fy
    inverse[..., 0, 1] = -s / (fx * fy)
    inverse[..., 0, 2] = (s * cy - cx * fy) / (fx * fy)
    inverse[..., 1, 2] = -cy / fy
    inverse[..., 2, 2] = 1
    return inverse


@full_precision
def rays_at_pixels(cameras: Cameras, pixels: Float[Tensor, "*batch ray 2"]) -> Rays:
    """Rays through pixel positions (u, v) of each camera; unit directions in the world.

    Args:
        cameras: [*batch] cameras.
        pixels: positions in pixels, centres at +0.5.
    """
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)
    in_camera = homogeneous @ inverse_intrinsics(cameras.K).transpose(-1, -2)
    norm = torch.linalg.vector_norm(in_camera, dim=-1, keepdim=True)
    directions = (in_camera / norm) @ cameras.c2w[..., :3, :3].transpose(-1, -2)
    origins = cameras.centers[..., None, :].expand_as(directions)
    return Rays(origins, directions, 1 / norm[..., 0])


def image_rays(cameras: Cameras) -> Rays:
    """Rays of every pixel of each camera, shape [*batch height width]."""
    pixels = pixel_centers(cameras.size, cameras.device).reshape(-1, 2)
    rays = rays_at_pixels(cameras, pixels.expand(*cameras.shape, -1, 2))
    shape = (*cameras.shape, cameras.height, cameras.width)
    return Rays(rays.origins.reshape(*shape, 3), rays.directions.reshape(*shape, 3), rays.cos.reshape(shape))


def unproject(cameras: Cameras, depth: Float[Tensor, "*batch height width"]) -> Float[Tensor, "*batch height width 3"]:
    """World points of a depth map (z) at the pixel centres."""
    rays = image_rays(cameras)
    return rays.origins + rays.directions * (depth / rays.cos)[..., None]
