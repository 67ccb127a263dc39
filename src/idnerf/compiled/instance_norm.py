"""Instance norm with what follows it, on channels-last maps in compiled code, with a compiled backward pass.

Of the map nothing is kept for the backward pass but itself and, with a residual, the result, which the next layer keeps
anyway.
"""

from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from idnerf.compiled.dispatch import POINTS_PER_THREAD, call, flat, in_threads

LastStep = Literal["none", "relu", "residual"]
EPSILON = 1e-5
"""Added to variances, as by ``torch.nn.functional.instance_norm``."""


def instance_norm(
    maps: Float[Tensor, "image channel height width"],
    last_step: LastStep,
    other: Float[Tensor, "image channel height width"] | None = None,
) -> Float[Tensor, "image channel height width"]:
    """``F.instance_norm``, then the last step: nothing, ReLU, or ReLU, the sum with ``other``, and ReLU again.

    Maps are float32 on the CPU, the result is channels last.
    """
    return _InstanceNorm.apply(maps, other, last_step)


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, other: Tensor | None, last_step: LastStep) -> Tensor:
        from idnerf.compiled.instance_norm_kernels import normalize_kernel

        maps = _channels_last(maps)
        residual = maps if other is None else _channels_last(other)
        images, height, width, channels = maps.shape
        kernel, result = normalize_kernel(channels, last_step), torch.empty_like(maps)
        mean, inverse_spread = (torch.empty(images, channels) for _ in range(2))
        for image in range(images):
            mean[image], inverse_spread[image] = _moments(maps[image])
            inputs = (flat(maps[image]), flat(mean[image]), flat(inverse_spread[image]), flat(residual[image]))
            in_threads(height * width, partial(call, kernel, inputs, (flat(result[image]),)))
        ctx.save_for_backward(maps, mean, inverse_spread, result if last_step == "residual" else None)
        ctx.last_step = last_step
        return result.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        from idnerf.compiled.instance_norm_kernels import gradient_sums_kernel, norm_gradient_kernel

        maps, mean, inverse_spread, result = ctx.saved_tensors
        gradient = _channels_last(gradients[0])
        images, height, width, channels = maps.shape
        add_up, spread = (make(channels, ctx.last_step) for make in (gradient_sums_kernel, norm_gradient_kernel))
        of_maps = torch.empty_like(maps)
        of_other = None if result is None else torch.empty_like(maps)
        sums, products, none = torch.empty(height, channels), torch.empty(height, channels), torch.empty(1)
        for image in range(images):
            inputs = (flat(maps[image]), flat(mean[image]), flat(inverse_spread[image]))
            inputs = (*inputs, flat(none if result is None else result[image]), flat(gradient[image]))
            outputs = (flat(sums), flat(products), flat(none if of_other is None else of_other[image]))
            _over_rows(height, width, partial(call, add_up, (*inputs, width), outputs))
            means = [(x.double().sum(0) / (height * width)).float() for x in (sums, products)]
            run = partial(call, spread, (*inputs, *map(flat, means)), (flat(of_maps[image]),))
            in_threads(height * width, run)
        return of_maps.permute(0, 3, 1, 2), None if of_other is None else of_other.permute(0, 3, 1, 2), None


def _channels_last(maps: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image height width channel"]:
    return maps.permute(0, 2, 3, 1).contiguous()


def _over_rows(height: int, width: int, run: Any) -> None:
    in_threads(height, run, fewest=POINTS_PER_THREAD // width + 1)


def _moments(features: Float[Tensor, "height width channel"]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of every channel, rows put together in double precision."""
    from idnerf.compiled.instance_norm_kernels import row_moments_kernel

    height, width, channels = features.shape
    sums, squares = torch.empty(height, channels), torch.empty(height, channels)
    run = partial(call, row_moments_kernel(channels), (flat(features), width), (flat(sums), flat(squares)))
    _over_rows(height, width, run)
    of_rows = sums.double() / width
    mean = of_rows.mean(0)
    variance = squares.double().sum(0) / (height * width) + (of_rows - mean).square().mean(0)
    return mean.float(), (variance + EPSILON).rsqrt().float()
