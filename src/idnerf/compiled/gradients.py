"""Compiled kernels where gradients are wanted: forward as in ``dispatch``, backward by ``gradient_kernels``.

For training on CPUs. Gradients flow to feature maps and volumes; cameras, depths and colours are known and take none.
"""

import sys
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from idnerf.compiled import dispatch
from idnerf.compiled.dispatch import call, flat, in_threads

POINTS_PER_CHUNK = 8192
"""Points whose gradients are spread over the maps at once: what lies between stays in the cache."""


def chosen(*tensors: Tensor, features: Tensor | None = None) -> ModuleType | None:
    """Whose kernels take these: this module's where gradients are wanted, else ``dispatch``; None where none do.

    They take float32 on a CPU (``features``: or bfloat16).
    """
    if not (dispatch.fitting(*tensors, features=features) and dispatch.available()):
        return None
    return sys.modules[__name__] if torch.is_grad_enabled() else dispatch


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
    """``dispatch.match`` with a gradient of the maps' features; their colours take none."""
    options = (size, scale, channels, groups, only_similarity, keep_values)
    return _Match.apply(maps, rays, b, inverse_depths, options)


class _Match(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, rays: Tensor, b: Tensor, inverse_depths: Tensor, options: tuple) -> tuple:
        size, scale, channels, groups, only_similarity, keep_values = options
        found = dispatch.match(
            maps, size, rays, b, inverse_depths, scale, channels, groups,
            only_similarity=only_similarity, keep_values=keep_values,
        )  # fmt: skip
        ctx.save_for_backward(maps, rays, b, inverse_depths)
        ctx.options = options
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_cues: Tensor, of_agreement: Tensor, _: Any, of_values: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        from idnerf.compiled.gradient_kernels import match_gradient_kernel, spread_kernel

        maps, rays, b, inverse_depths = ctx.saved_tensors
        size, scale, channels, groups, only_similarity, _ = ctx.options
        batch, views, height, width, count = maps.shape
        pixels, samples = rays.shape[2], inverse_depths.shape[1]
        points = samples * pixels
        by_value = match_gradient_kernel(channels, groups, count - channels, only_similarity)
        by_map = spread_kernel(channels, count)
        out, none = torch.zeros_like(maps, memory_format=torch.contiguous_format), maps.new_empty(1)
        of_found = maps.new_empty(views * min(POINTS_PER_CHUNK, points) * channels)
        for item in range(batch):
            depths = (flat(inverse_depths[item]), pixels, inverse_depths.shape[2] > 1)
            sizes = (np.float32(size[0]), np.float32(size[1]), np.float32(scale))
            where = (flat(rays[item]), flat(b[item]), *depths, *sizes)
            given = (
                flat(of_cues[item]),
                flat(of_agreement[item]),
                flat(none if of_values is None else of_values[item]),
            )
            for start in range(0, points, POINTS_PER_CHUNK):
                some = min(POINTS_PER_CHUNK, points - start)
                inputs = (flat(maps[item]), views, height, width, *where, points, *given, start, some)
                in_threads(some, partial(call, by_value, inputs, (flat(of_found),)))
                inputs = (flat(of_found), height, width, *where, start, some)
                in_threads(views, partial(call, by_map, inputs, (flat(out[item]),)), fewest=1)
        return out, None, None, None, None


def look_up_voxels(
    volumes: Float[Tensor, "batch plane height4 width4 channel"],
    cells: Float[Tensor, "pixel 2"],
    positions: Float[Tensor, "batch sample pixel"],
) -> Float[Tensor, "batch point channel"]:
    """``dispatch.look_up_voxels`` with a gradient of the volumes."""
    return _LookUpVoxels.apply(volumes, cells, positions)


class _LookUpVoxels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volumes: Tensor, cells: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(cells, positions)
        ctx.shape = volumes.shape
        return dispatch.look_up_voxels(volumes, cells, positions)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from idnerf.compiled.gradient_kernels import voxel_gradient_kernel

        (gradient,) = gradients
        cells, positions = ctx.saved_tensors
        batch, planes, height, width, channels = ctx.shape
        kernel, points = voxel_gradient_kernel(channels), gradient.shape[1]
        out = gradient.new_zeros(ctx.shape)
        for item in range(batch):  # one thread: points share cells
            inputs = (flat(gradient[item]), planes, height, width, flat(cells), flat(positions[item]), len(cells))
            call(kernel, inputs, (flat(out[item]),), 0, points)
        return out, None, None


def match_pairs(
    maps: Float[Tensor, "batch pair member height width channel"],
    positions: Float[Tensor, "batch view point 2"],
    weights: Float[Tensor, "batch pair point"],
    groups: int,
) -> Float[Tensor, "batch point group"]:
    """``dispatch.match_pairs`` with a gradient of the maps."""
    return _MatchPairs.apply(maps, positions, weights, groups)


class _MatchPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, positions: Tensor, weights: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(maps, positions, weights)
        ctx.groups = groups
        return dispatch.match_pairs(maps, positions, weights, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        from idnerf.compiled.gradient_kernels import pair_gradient_kernel

        maps, positions, weights = ctx.saved_tensors
        batch, pairs, _, height, width, channels = maps.shape
        kernel, (views, points) = pair_gradient_kernel(channels, ctx.groups), positions.shape[1:3]
        out = torch.zeros_like(maps, memory_format=torch.contiguous_format)
        for item in range(batch):
            where = (flat(maps[item]), views, height, width, flat(positions[item]), flat(weights[item]), points)
            run = partial(call, kernel, (*where, flat(gradients[0][item])), (flat(out[item]),))
            in_threads(pairs, run, fewest=1)
        return out, None, None, None


def normalize_groups(
    features: Float[Tensor, "image height width channel"],
    groups: int,
    colours: Float[Tensor, "image height width 3"] | None = None,
) -> Float[Tensor, "image height width value"]:
    """``dispatch.normalize_groups`` with a gradient of the features."""
    return _NormalizeGroups.apply(features, groups, colours)


class _NormalizeGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, groups: int, colours: Tensor | None) -> Tensor:
        ctx.save_for_backward(features)
        ctx.groups = groups
        return dispatch.normalize_groups(features, groups, colours)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from idnerf.compiled.gradient_kernels import unit_length_gradient_kernel

        (features,) = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        images, height, width, channels = features.shape
        halves = features.dtype == torch.bfloat16
        kernel = unit_length_gradient_kernel(channels, ctx.groups, gradient.shape[-1] - channels, halves)
        out = features.new_empty(features.shape)
        centred = features.new_empty(features.shape[1:], dtype=torch.float32)
        for image in range(images):
            inputs = (flat(features[image]), flat(dispatch.channel_means(features[image])), flat(gradient[image]))
            in_threads(height * width, partial(call, kernel, inputs, (flat(centred),)))
            torch.sub(centred, dispatch.channel_means(centred), out=centred)
            out[image].copy_(centred)
        return out, None, None
