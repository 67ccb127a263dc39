"""Compiled kernels on tensors: whether they may be used, and their points divided among PyTorch's threads.

The kernels compute what the functions beside which they are called compute with PyTorch, without gradients, in float32
on a CPU, up to the order of sums.
"""

import functools
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idnerf.processors import usable_processors

SWITCH = "IDNERF_COMPILED"
"""Environment variable: ``0`` keeps to PyTorch."""
POINTS_PER_THREAD = 2048
"""Fewer are not worth another thread."""


@functools.cache
def available() -> bool:
    """Whether numba is installed and not switched off. Imports it."""
    if os.environ.get(SWITCH) == "0" or importlib.util.find_spec("numba") is None:
        return False
    try:
        import idnerf.compiled.kernels  # noqa: F401
    except ImportError as error:  # numba wants another NumPy or Python
        warnings.warn(f"numba is installed, but cannot be used: {error}; rendering takes twice as long", stacklevel=2)
        return False
    return True


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 or bfloat16 on a CPU, and no gradient wanted."""
    on_cpu = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in tensors)
    return on_cpu and not torch.is_grad_enabled() and available()


def normalize_groups(
    features: Float[Tensor, "image height width channel"],
    groups: int,
    colours: Float[Tensor, "image height width 3"] | None = None,
) -> Float[Tensor, "image height width value"]:
    """What ``feature_pyramid.matching_map`` makes of these."""
    from idnerf.compiled.kernels import row_sum_kernel, unit_length_kernel

    images, height, width, channels = features.shape
    colour_count = 0 if colours is None else 3
    add_up, normalize = row_sum_kernel(channels), unit_length_kernel(channels, groups, colour_count)
    out = features.new_empty(images, height, width, channels + colour_count, dtype=torch.float32)
    for image in range(images):
        flat, sums = _flat(features[image]), torch.empty(height, channels)
        _in_threads(
            height, partial(_call, add_up, (flat, width), (_flat(sums),)), fewest=POINTS_PER_THREAD // width + 1
        )
        mean = (sums.double().sum(0) / (height * width)).float()
        inputs = (flat, _flat(mean), _flat(torch.empty(1) if colours is None else colours[image]))
        _in_threads(height * width, partial(_call, normalize, inputs, (_flat(out[image]),)))
    return out


def match(
    maps: Float[Tensor, "batch view map_height map_width value"],
    size: tuple[int, int],
    rays: Float[Tensor, "batch view pixel 3"],
    b: Float[Tensor, "batch view 3"],
    inverse_depths: Float[Tensor, "batch sample #pixel"],
    scale: int,
    channels: int,
    groups: int,
    *,
    only_similarity: bool = False,
    keep_values: bool = False,
) -> tuple[
    Float[Tensor, "batch point cue"],
    Float[Tensor, "batch point"],
    Bool[Tensor, "batch view point"],
    Float[Tensor, "batch view point value"] | None,
]:
    """Cues, agreement, visibility and values of ``view_matching.match_views``, whose arguments these are."""
    from idnerf.compiled.kernels import match_kernel

    batch, views, height, width, count = maps.shape
    pixels, samples = rays.shape[2], inverse_depths.shape[1]
    points, colours = samples * pixels, count - channels
    kernel = match_kernel(channels, groups, colours, only_similarity)
    cue_count = 2 * groups + (0 if only_similarity else count + (colours or groups + 2))
    cues, agreement = rays.new_empty(batch, points, cue_count), rays.new_empty(batch, points)
    seen = torch.empty(batch, views, points, dtype=torch.bool)
    values = rays.new_empty(batch, views, points, count) if keep_values else None
    for item in range(batch):
        inputs = (_flat(maps[item]), views, height, width, _flat(rays[item]), _flat(b[item]))
        depths = (_flat(inverse_depths[item]), pixels, inverse_depths.shape[2] > 1)
        sizes = (np.float32(size[0]), np.float32(size[1]), np.float32(scale), points)
        kept = _flat(rays.new_empty(1) if values is None else values[item])
        outputs = (_flat(cues[item]), _flat(agreement[item]), _flat(seen[item]), kept)
        _in_threads(points, partial(_call, kernel, (*inputs, *depths, *sizes), outputs))
    return cues, agreement, seen, values


def look_up_voxels(
    volumes: Float[Tensor, "batch plane height4 width4 channel"],
    cells: Float[Tensor, "pixel 2"],
    positions: Float[Tensor, "batch sample pixel"],
) -> Float[Tensor, "batch point channel"]:
    """What ``projection.trilinear_lookup`` finds at ``cells`` (u, v) and ``positions`` in [0, 1] over the planes."""
    from idnerf.compiled.kernels import voxel_kernel

    batch, planes, height, width, channels = volumes.shape
    pixels = len(cells)
    points = positions.shape[1] * pixels
    kernel = voxel_kernel(channels)
    out = volumes.new_empty(batch, points, channels)
    for item in range(batch):
        inputs = (_flat(volumes[item]), planes, height, width, _flat(cells), _flat(positions[item]), pixels)
        _in_threads(points, partial(_call, kernel, inputs, (_flat(out[item]),)))
    return out


@dataclass(frozen=True)
class RayNetwork:
    """The layers between a ray's tokens and its weights, as tensors."""

    heads: int
    norm: nn.LayerNorm
    to_qkv: nn.Linear
    out: nn.Linear
    hidden: nn.Linear
    density: nn.Linear
    gain: Float[Tensor, ""]
    slope: float


@dataclass(frozen=True)
class CompositedRays:
    """Weighted sums along the rays: of values and visibility per view, tokens, positions; opacity."""

    views: Float[Tensor, "batch view ray value_and_visibility"]
    tokens: Float[Tensor, "batch ray channel"]
    position: Float[Tensor, "batch ray"]
    spread: Float[Tensor, "batch ray"]
    opacity: Float[Tensor, "batch ray"]


def composite_rays(
    network: RayNetwork,
    tokens: Float[Tensor, "batch sample ray channel"],
    agreement: Float[Tensor, "batch sample ray"],
    positions: Float[Tensor, "batch sample ray"],
    values: Float[Tensor, "batch view point value"],
    seen: Bool[Tensor, "batch view point"],
) -> CompositedRays:
    """Attention along the rays, density and compositing, as ``FineSamples`` computes them."""
    from idnerf.compiled.kernels import ray_kernel

    batch, samples, rays, width = tokens.shape
    views, count = values.shape[1], values.shape[3]
    mixed = network.out.in_features
    hidden = network.hidden.out_features
    kernel = ray_kernel(width, network.heads, mixed // network.heads, hidden, samples, count, network.slope)
    n = network
    matrices = (n.norm.weight, n.norm.bias, n.to_qkv.weight.T, n.to_qkv.bias, n.out.weight.T, n.out.bias)
    matrices = (*matrices, n.hidden.weight.T, n.hidden.bias, n.density.weight)
    layers = tuple(_flat(matrix) for matrix in matrices)
    numbers = (np.float32(n.density.bias.item()), np.float32(n.gain.item()), np.float32(n.norm.eps))
    new = values.new_empty
    result = CompositedRays(
        new(batch, views, rays, count + 1),
        new(batch, rays, width),
        new(batch, rays),
        new(batch, rays),
        new(batch, rays),
    )
    for item in range(batch):
        points = (_flat(agreement[item]), _flat(positions[item]), _flat(values[item]), _flat(seen[item]), views)
        outputs = tuple(_flat(getattr(result, field.name)[item]) for field in fields(result))
        inputs = (_flat(tokens[item]), rays, *layers, *numbers, *points)
        _in_threads(rays, partial(_call, kernel, inputs, outputs))
    return result


def _flat(x: Tensor) -> np.ndarray:
    """All its numbers; bfloat16 as the bits of its numbers. Shares memory where the tensor is contiguous."""
    x = x.detach().reshape(-1)
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def _call(kernel: Callable[..., None], inputs: tuple, outputs: tuple, first: int, last: int) -> None:
    """Points [first, last) of them."""
    kernel(*inputs, first, last, *outputs)


def _in_threads(count: int, run: Callable[[int, int], None], fewest: int = POINTS_PER_THREAD) -> None:
    """``run(first, last)`` for runs of ``count``, one in each of as many threads as PyTorch would take here.

    ``fewest``: not worth another thread.
    """
    threads = max(1, min(torch.get_num_threads(), count // fewest))
    bounds = [count * number // threads for number in range(threads + 1)]
    others = [_pool().submit(run, first, last) for first, last in itertools.pairwise(bounds[1:])]
    run(bounds[0], bounds[1])
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads beside the caller's. Where several frames are rendered at once, they share it."""
    return ThreadPoolExecutor(max(1, usable_processors() - 1), "idnerf-compiled")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of these threads
