"""Compiled kernels on tensors: whether they may be used, and their points divided among PyTorch's threads.

The kernels compute what the functions beside which they are called compute with PyTorch, without gradients, on a CPU,
up to the order of sums; in float32, also where PyTorch under autocast would compute in bfloat16.
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
_FEATURE_TYPES = (torch.float32, torch.bfloat16)


@functools.cache
def available() -> bool:
    """Whether numba is installed and not switched off. Imports it."""
    if os.environ.get(SWITCH) == "0" or importlib.util.find_spec("numba") is None:
        return False
    try:
        import idnerf.compiled.kernels  # noqa: F401
    except (ImportError, OSError, AttributeError) as error:  # numba wants another NumPy, LLVM's library does not load
        warnings.warn(
            f"numba is installed, but cannot be used: {error}; rendering and training take up to twice as long",
            stacklevel=2,
        )
        return False
    return True


def usable(*tensors: Tensor, features: Tensor | None = None) -> bool:
    """Whether the kernels take these: float32 on a CPU (``features``: or bfloat16), and no gradient wanted."""
    return not torch.is_grad_enabled() and fitting(*tensors, features=features) and available()


def fitting(*tensors: Tensor, features: Tensor | None = None) -> bool:
    """Whether all is float32 on a CPU (``features``: or bfloat16)."""
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in tensors):
        return False
    return features is None or (features.device.type == "cpu" and features.dtype in _FEATURE_TYPES)


def normalize_groups(
    features: Float[Tensor, "image height width channel"],
    groups: int,
    colours: Float[Tensor, "image height width 3"] | None = None,
) -> Float[Tensor, "image height width value"]:
    """What ``feature_pyramid.matching_map`` makes of these."""
    from idnerf.compiled.kernels import unit_length_kernel

    images, height, width, channels = features.shape
    colour_count = 0 if colours is None else 3
    normalize = unit_length_kernel(channels, groups, colour_count, features.dtype == torch.bfloat16)
    out = features.new_empty(images, height, width, channels + colour_count, dtype=torch.float32)
    for image in range(images):
        mean = channel_means(features[image])
        inputs = (flat(features[image]), flat(mean), flat(torch.empty(1) if colours is None else colours[image]))
        in_threads(height * width, partial(call, normalize, inputs, (flat(out[image]),)))
    return out


def channel_means(features: Float[Tensor, "height width channel"]) -> Float[Tensor, "channel"]:
    """Over the pixels, added up in double precision."""
    from idnerf.compiled.kernels import row_sum_kernel

    height, width, channels = features.shape
    add_up, sums = row_sum_kernel(channels, features.dtype == torch.bfloat16), torch.empty(height, channels)
    run = partial(call, add_up, (flat(features), width), (flat(sums),))
    in_threads(height, run, fewest=POINTS_PER_THREAD // width + 1)
    return (sums.double().sum(0) / (height * width)).float()


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
        inputs = (flat(maps[item]), views, height, width, flat(rays[item]), flat(b[item]))
        depths = (flat(inverse_depths[item]), pixels, inverse_depths.shape[2] > 1)
        sizes = (np.float32(size[0]), np.float32(size[1]), np.float32(scale), points)
        kept = flat(rays.new_empty(1) if values is None else values[item])
        outputs = (flat(cues[item]), flat(agreement[item]), flat(seen[item]), kept)
        in_threads(points, partial(call, kernel, (*inputs, *depths, *sizes), outputs))
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
        inputs = (flat(volumes[item]), planes, height, width, flat(cells), flat(positions[item]), pixels)
        in_threads(points, partial(call, kernel, inputs, (flat(out[item]),)))
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
    sizes = (width, network.heads, mixed // network.heads, hidden, samples, count)
    kernel = ray_kernel(*sizes, network.slope, tokens.dtype == torch.bfloat16)
    n = network
    matrices = (n.norm.weight, n.norm.bias, n.to_qkv.weight.T, n.to_qkv.bias, n.out.weight.T, n.out.bias)
    matrices = (*matrices, n.hidden.weight.T, n.hidden.bias, n.density.weight)
    layers = tuple(flat(matrix) for matrix in matrices)
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
        points = (flat(agreement[item]), flat(positions[item]), flat(values[item]), flat(seen[item]), views)
        outputs = tuple(flat(getattr(result, field.name)[item]) for field in fields(result))
        inputs = (flat(tokens[item]), rays, *layers, *numbers, *points)
        in_threads(rays, partial(call, kernel, inputs, outputs))
    return result


def match_pairs(
    maps: Float[Tensor, "batch pair member height width channel"],
    positions: Float[Tensor, "batch view point 2"],
    weights: Float[Tensor, "batch pair point"],
    groups: int,
) -> Float[Tensor, "batch point group"]:
    """``matching.pair_similarities`` at ``positions`` in cells of one scale, times ``weights`` and added up."""
    from idnerf.compiled.kernels import pair_kernel

    height, width, channels = maps.shape[3:]
    batch, views, points, _ = positions.shape
    kernel = pair_kernel(channels, groups)
    cues = positions.new_empty(batch, points, groups)
    for item in range(batch):
        inputs = (flat(maps[item]), views, height, width, flat(positions[item]), flat(weights[item]), points)
        in_threads(points, partial(call, kernel, inputs, (flat(cues[item]),)))
    return cues


def look_up(
    maps: Float[Tensor, "image height width channel"], positions: Float[Tensor, "image point 2"]
) -> Float[Tensor, "image point channel"]:
    """What ``projection.bilinear_lookup`` finds."""
    from idnerf.compiled.kernels import lookup_kernel

    images, height, width, channels = maps.shape
    points = positions.shape[1]
    kernel = lookup_kernel(channels)
    out = maps.new_empty(images, points, channels)
    for image in range(images):
        inputs = (flat(maps[image]), height, width, flat(positions[image]))
        in_threads(points, partial(call, kernel, inputs, (flat(out[image]),)))
    return out


def aggregate_views(
    hidden: nn.Linear,
    code: nn.Linear,
    colours: Float[Tensor, "batch view point 3"],
    seen: Bool[Tensor, "batch view point"],
    points: Float[Tensor, "batch point 3"],
    centers: Float[Tensor, "batch view 3"],
    directions: Float[Tensor, "batch ray 3"],
    world_to_target: Float[Tensor, "batch 3 3"],
) -> Float[Tensor, "batch point width"]:
    """What ``view_aggregation.SymmetricViews`` makes of views at points along rays; its two layers come first."""
    from idnerf.compiled.kernels import view_code_kernel

    batch, views, count, _ = colours.shape
    kernel = view_code_kernel(hidden.out_features, code.out_features)
    layers = tuple(flat(matrix) for matrix in (hidden.weight.T, hidden.bias, code.weight.T, code.bias))
    out = colours.new_empty(batch, count, 7 + code.out_features)
    samples = count // directions.shape[1]
    for item in range(batch):
        places = (flat(points[item]), flat(centers[item]), flat(directions[item]), samples)
        inputs = (flat(colours[item]), flat(seen[item]), *places, flat(world_to_target[item]))
        in_threads(count, partial(call, kernel, (*inputs, *layers, views, count), (flat(out[item]),)))
    return out


@dataclass(frozen=True)
class TokenNetwork:
    """The layers between looked-up token maps and refined tokens; ``symmetric``: see ``paper.Refinement``."""

    of_colour: nn.Linear
    to_qkv: nn.Linear
    heads: int
    merge: nn.Linear
    norm: nn.LayerNorm
    symmetric: bool


def refine_views(
    network: TokenNetwork,
    maps: tuple[Float[Tensor, "batch view h w token"], Float[Tensor, "batch view h4 w4 token"]],
    positions: tuple[Float[Tensor, "batch view point 2"], Float[Tensor, "batch view point 2"]],
    colours: Float[Tensor, "batch view point 3"],
    seen: Bool[Tensor, "batch view point"],
    latent: Float[Tensor, "batch ray token"] | None,
) -> Float[Tensor, "batch point width"]:
    """What ``paper.Refinement`` makes of its token ``maps`` at ``positions`` in their cells, point by point of rays."""
    from idnerf.compiled.kernels import token_kernel

    n = network
    batch, views, count, _ = colours.shape
    width, mixed = n.norm.normalized_shape[0], n.merge.in_features
    kernel = token_kernel(width, n.heads, mixed // n.heads, n.symmetric, latent is not None)
    matrices = (n.of_colour.weight.T, n.of_colour.bias, n.to_qkv.weight.T, n.merge.weight.T, n.norm.weight, n.norm.bias)
    layers = (*map(flat, matrices), np.float32(n.norm.eps))
    out = colours.new_empty(batch, count, ((2 if n.symmetric else views) + (latent is not None)) * width)
    samples = 1 if latent is None else count // latent.shape[1]
    for item in range(batch):
        inputs = ()
        for table, at in zip(maps, positions, strict=True):
            inputs = (*inputs, flat(table[item]), *table.shape[2:4], flat(at[item]))
        of_latent = flat(colours.new_empty(1) if latent is None else latent[item])
        inputs = (*inputs, flat(colours[item]), flat(seen[item]), of_latent, samples)
        in_threads(count, partial(call, kernel, (*inputs, *layers, views, count), (flat(out[item]),)))
    return out


def encode_positions(positions: Float[Tensor, "point 3"], frequencies: int) -> Float[Tensor, "point width"]:
    """What ``radiance_field.fourier_features`` makes of them."""
    from idnerf.compiled.kernels import fourier_kernel

    out = positions.new_empty(len(positions), 3 + 6 * frequencies)
    in_threads(len(positions), partial(call, fourier_kernel(frequencies), (flat(positions),), (flat(out),)))
    return out


@dataclass(frozen=True)
class DensityNetwork:
    """The ray transformer's layers, and the two behind it, a ReLU between them."""

    heads: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    merge: nn.Linear
    norm: nn.LayerNorm
    hidden: nn.Linear
    density: nn.Linear


def ray_densities(
    network: DensityNetwork,
    tokens: Float[Tensor, "channel ray sample"],
    asking: Bool[Tensor, "ray sample"] | None,
    answering: Bool[Tensor, "ray sample"] | None,
) -> Float[Tensor, "ray sample"]:
    """Raw densities of ``radiance_field.RadianceField`` from the ray transformer's ``tokens`` before their ReLU."""
    from idnerf.compiled.kernels import ray_density_kernel

    width, rays, samples = tokens.shape
    n = network
    kernel = ray_density_kernel(width, n.heads, samples)
    matrices = (n.query.weight, n.key.weight, n.value.weight, n.merge.weight, n.norm.weight, n.norm.bias)
    layers = (*map(flat, matrices), np.float32(n.norm.eps), flat(n.hidden.weight), flat(n.hidden.bias))
    layers = (*layers, flat(n.density.weight), np.float32(n.density.bias.item()))
    all_do = torch.ones(1, dtype=torch.bool)
    masks = tuple(flat(all_do if mask is None else mask) for mask in (asking, answering))
    raw = tokens.new_empty(rays, samples)
    run = partial(call, kernel, (flat(tokens), rays, *layers, *masks), (flat(raw),))
    in_threads(rays, run, fewest=POINTS_PER_THREAD // (4 * samples) + 1)  # a sample takes longer than a point
    return raw


def occluded_shares(
    inverse_depth: Float[Tensor, "batch pixel"],
    size: tuple[int, int],
    A: Float[Tensor, "batch view 3 3"],
    b: Float[Tensor, "batch view 3"],
    zoom: Float[Tensor, "batch view 2"],
    photo_size: tuple[int, int],
    slack: Float[Tensor, "batch 1"],
    side: int,
    radii: tuple[float, float],
) -> Float[Tensor, "batch view pixel"]:
    """What ``occlusion.occluded_shares`` finds for a tile of ``size``."""
    from idnerf.compiled.kernels import occlusion_kernel

    batch, views = A.shape[:2]
    kernel = occlusion_kernel(*radii)
    out = inverse_depth.new_empty(batch, views, inverse_depth.shape[1])
    for item in range(batch):
        cameras = (flat(A[item]), flat(b[item]), flat(zoom[item]), *map(np.float32, photo_size))
        inputs = (flat(inverse_depth[item]), *size, *cameras, np.float32(slack[item].item()), side)
        outputs = (flat(inverse_depth.new_zeros(views, side + 2, side + 2)), flat(out[item]))
        in_threads(views, partial(call, kernel, inputs, outputs), fewest=1)
    return out


def flat(x: Tensor) -> np.ndarray:
    """All its numbers; bfloat16 as the bits of its numbers. Shares memory where the tensor is contiguous."""
    x = x.detach().contiguous().view(-1)  # ``reshape`` leaves expanded numbers as they are
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def call(kernel: Callable[..., None], inputs: tuple, outputs: tuple, first: int, last: int) -> None:
    """Points [first, last) of them."""
    kernel(*inputs, first, last, *outputs)


def in_threads(count: int, run: Callable[[int, int], None], fewest: int | None = None) -> None:
    """``run(first, last)`` for runs of ``count``, one in each of as many threads as PyTorch would take here.

    ``fewest``: not worth another thread.
    """
    threads = max(1, min(torch.get_num_threads(), count // (fewest or POINTS_PER_THREAD)))
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
