"""Rays as images, in the target camera's frame and free of the scene's unit. Pure functions."""

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.geometry.cameras import resize
from idnerf.geometry.rays import image_rays, inverse_intrinsics, pixel_centers
from idnerf.types import Cameras


def length_unit(target: Cameras) -> Float[Tensor, "*batch"]:
    """The depth in the middle of the inverse depth range: lengths are given in this unit."""
    return 2 / (1 / target.near + 1 / target.far)


def relative_ray_maps(
    source: Cameras, target: Cameras, size: tuple[int, int]
) -> Float[Tensor, "batch view 6 height width"]:
    """Origin (3, in ``length_unit`` of the target) and unit direction (3) of the source rays, in the target's frame.

    Args:
        source: [batch view] cameras.
        target: [batch] cameras.
        size: (width, height) of the maps, which span the source images.
    """
    rays = image_rays(resize(source, size))
    rotation = target.c2w[:, None, :3, :3]  # rows of vectors times R_t: world to target axes
    shape = rays.directions.shape
    directions = rays.directions.flatten(2, 3) @ rotation
    centers = (source.centers - target.centers[:, None])[:, :, None] @ rotation
    origins = (centers / length_unit(target)[:, None, None, None]).expand_as(directions)
    return torch.cat([origins, directions], -1).unflatten(2, shape[2:4]).movedim(-1, 2)


def target_ray_map(target: Cameras, size: tuple[int, int]) -> Float[Tensor, "batch 2 height width"]:
    """x/z and y/z of the target's rays in its own frame: where in the view a latent lies, whatever the crop."""
    resized = resize(target, size)
    pixels = pixel_centers(size, target.device).reshape(-1, 2)
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], -1)
    in_camera = homogeneous @ inverse_intrinsics(resized.K).transpose(-1, -2)
    return in_camera[..., :2].transpose(-1, -2).unflatten(-1, (size[1], size[0]))
