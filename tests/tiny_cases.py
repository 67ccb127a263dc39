"""Tiny networks and exact scenes of one textured plane: what the tests of the model and of the training share."""

from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.geometry.rays import image_rays
from idnerf.models.cascade import CascadeConfig
from idnerf.models.idnerf import ModelConfig
from idnerf.models.paper import PaperConfig
from idnerf.training.examples import Example
from idnerf.types import Cameras, Views

TINY_CASCADE = CascadeConfig(
    pyramid_widths=(4, 8, 8, 8, 8),
    coarse_channels=8,
    coarse_groups=2,
    middle_channels=6,
    middle_groups=2,
    middle_widths=(6, 8),
    fine_channels=4,
    fine_groups=2,
    volume_widths=(4, 8, 8),
    voxel_channels=3,
    token_width=8,
    blend_width=6,
    refinement_widths=(6, 8, 8),
    planes=8,
    middle_hypotheses=5,
    samples=4,
    planes_fast=6,
    middle_hypotheses_fast=3,
    samples_fast=2,
)
TINY_PAPER = PaperConfig(
    samples_per_ray=8,
    channels=16,
    transformer_layers=1,
    hidden=16,
    field_layers=3,
    field_skip=1,
    frequencies=2,
    latent_size=(6, 6),
)
TINY_MODELS = {
    "cascade": ModelConfig(configuration="cascade", cascade=TINY_CASCADE),
    "paper": ModelConfig(configuration="paper", paper=TINY_PAPER),
}


def with_latent(configuration: str, query: str) -> ModelConfig:
    """The tiny model with view refinement, and a latent unless ``query`` is none."""
    tiny = TINY_MODELS[configuration]
    own = replace(getattr(tiny, configuration), view_refinement=True, latent_query=query)
    return replace(tiny, **{configuration: own})


Module = TypeVar("Module", bound=nn.Module)


def waken(module: Module, seed: int = 0) -> Module:
    """Add noise to every parameter: branches that start at zero would hide whatever goes wrong inside them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 16
            parameter += torch.randn(parameter.shape, generator=generator) * 0.5 / fan_in**0.5
    return module


def rotation(tilt: float, pan: float) -> Float[Tensor, "3 3"]:
    """About the camera's x axis, then about its y axis."""
    angles = torch.tensor([tilt, pan])
    (ct, cp), (s_t, sp) = angles.cos().tolist(), angles.sin().tolist()
    about_x = torch.tensor([[1, 0, 0], [0, ct, -s_t], [0, s_t, ct]])
    about_y = torch.tensor([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    return about_y @ about_x


def cameras_on_a_wall(count: int, size: tuple[int, int], generator: torch.Generator, *, turn: float = 0.05) -> Cameras:
    """Cameras around the origin that look along +z, each turned by up to about ``turn`` radians; near 2, far 8."""
    c2w = torch.eye(4).repeat(count, 1, 1)
    for pose in c2w:
        tilt, pan = (torch.randn(2, generator=generator) * turn).tolist()
        pose[:3, :3] = rotation(tilt, pan)
        pose[:3, 3] = torch.randn(3, generator=generator) * torch.tensor([0.3, 0.2, 0.05])
    focal = 1.1 * max(size)
    K = torch.tensor([[focal, 0, size[0] / 2 + 0.7], [0, focal * 1.03, size[1] / 2 - 0.4], [0, 0, 1]])
    bounds = torch.ones(count)
    return Cameras(c2w, K.repeat(count, 1, 1), size, bounds * 2, bounds * 8)


def photograph_plane(
    cameras: Cameras, generator: torch.Generator, *, depth: float = 4.0, detail: float = 4.0
) -> tuple[Views, Float[Tensor, "*batch height width"]]:
    """Photos of the plane z = ``depth`` with a texture of waves of up to ``detail`` radians a unit; exact depth."""
    rays = image_rays(cameras)
    t = (depth - rays.origins[..., 2]) / rays.directions[..., 2]
    points = rays.origins + t[..., None] * rays.directions
    waves = (torch.rand(2, 3, 4, generator=generator) * 2 - 1) * detail
    phases = torch.rand(3, 4, generator=generator) * 6.28
    colours = 0.5 + 0.12 * (torch.einsum("...i,ick->...ck", points[..., :2], waves) + phases).sin().sum(-1)
    return Views(colours.movedim(-1, -3).contiguous(), cameras), t * rays.cos


def plane_views(count: int, size: tuple[int, int] = (32, 24), seed: int = 0) -> Views:
    """``count`` photos of one plane."""
    generator = torch.Generator().manual_seed(seed)
    return photograph_plane(cameras_on_a_wall(count, size, generator), generator)[0]


class PlaneScenes:
    """Scene provider of a training: every item is another plane. ``bad_item`` gets pixels that are not finite."""

    def __init__(self, size: tuple[int, int] = (32, 24), bad_item: int | None = None):
        self.size, self.bad_item = size, bad_item

    def example(self, item: int, num_sources: int, generator: torch.Generator) -> Example:
        cameras = cameras_on_a_wall(num_sources + 1, self.size, generator)
        distance = 3 + 2 * float(torch.rand((), generator=generator))
        views, depth = photograph_plane(cameras, generator, depth=distance)
        if item == self.bad_item:
            views = Views(views.images * float("nan"), cameras)
        seen = torch.full_like(depth[0], float(num_sources))
        return Example(views[1:], views[0], depth[0], seen, f"plane {item}")


def tiny_example(seed: int = 0, num_sources: int = 3, size: tuple[int, int] = (32, 24)) -> Example:
    """One example of ``PlaneScenes``."""
    return PlaneScenes(size).example(0, num_sources, torch.Generator().manual_seed(seed))
