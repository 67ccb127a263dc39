"""Weights in the published layouts, small models and scenes for the tests of ``paper``."""

import json
import math
import zlib
from pathlib import Path

import torch

from idnerf.models.paper import PaperConfig
from idnerf.types import Cameras, Views

DATA = Path(__file__).parent / "data"

SMALL = PaperConfig(
    samples_per_ray=12,
    channels=16,
    transformer_layers=2,
    groups=(2, 4),
    hidden=16,
    frequencies=4,
    ray_width=8,
)


def random_weight(name: str, shape: list[int]) -> torch.Tensor:
    """A tensor that depends on its name alone: the recipe of the golden numbers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return x / math.sqrt(x[0].numel())
    return 1 + 0.1 * x if name.endswith("weight") else 0.1 * x


def published_matchnerf(views: int) -> dict[str, torch.Tensor]:
    """Random weights with MatchNeRF's published names and shapes, for ``views`` source views."""
    shapes = json.loads((DATA / "golden_matchnerf_shapes.json").read_text())
    shapes["nerf_dec.pts_bias.weight"] = [128, 10 + 4 * views]
    return {name: random_weight(name, shape) for name, shape in shapes.items()}


def published_gmflow() -> dict[str, torch.Tensor]:
    """Random weights laid out as GMFlow's single-scale checkpoint: encoder, flow attention and upsampler."""
    tensors = {
        name.removeprefix("feat_enc."): tensor
        for name, tensor in published_matchnerf(3).items()
        if name.startswith("feat_enc.") and "featup_net" not in name
    }
    flow_head = {f"feature_flow_attn.{p}_proj.{leaf}": shape for p in "qk" for leaf, shape in
                 (("weight", [128, 128]), ("bias", [128]))}  # fmt: skip
    flow_head |= {"upsampler.0.weight": [256, 130, 3, 3], "upsampler.0.bias": [256]}
    flow_head |= {"upsampler.2.weight": [576, 256, 1, 1], "upsampler.2.bias": [576]}
    return tensors | {name: random_weight(name, shape) for name, shape in flow_head.items()}


def looking_at_the_middle(angles: torch.Tensor, size: tuple[int, int], distance: float = 4.0) -> Cameras:
    """Cameras on a circle around the world's origin, turned by ``angles`` (radians) and looking at it."""
    sin, cos, zero, one = angles.sin(), angles.cos(), torch.zeros_like(angles), torch.ones_like(angles)
    rotation = torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], -1).unflatten(-1, (3, 3))
    c2w = torch.eye(4).repeat(*angles.shape, 1, 1)
    c2w[..., :3, :3] = rotation
    c2w[..., :3, 3] = -distance * rotation[..., 2]
    K = torch.tensor([[1.1 * size[0], 0, size[0] / 2], [0, 1.1 * size[0], size[1] / 2], [0, 0, 1]])
    near, far = torch.full(angles.shape, 2.5), torch.full(angles.shape, 6.0)
    return Cameras(c2w, K.repeat(*angles.shape, 1, 1), size, near, far)


def random_scene(
    batch: int, views: int, generator: torch.Generator, size: tuple[int, int] = (48, 32)
) -> tuple[Views, Cameras]:
    """Source views of noise around a target camera: (sources [batch view], targets [batch])."""
    angles = 0.25 * torch.rand(batch, views + 1, generator=generator) - 0.12
    cameras = looking_at_the_middle(angles, size)
    images = torch.rand(batch, views, 3, size[1], size[0], generator=generator)
    return Views(images, cameras[:, :views]), cameras[:, views]
