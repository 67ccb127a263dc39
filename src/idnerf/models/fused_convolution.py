"""Convolutions with what follows them, leaky ReLU or a sum, written in one pass: rendering on CPUs with oneDNN.

In bfloat16 a pass over the result costs up to a third of the convolution itself (benchmarks/NOTES.md).
"""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.models.activation import SLOPE, activate
from idnerf.models.plane_conv import onednn_takes, working_type


def residual(
    x: Float[Tensor, "batch channel *size"], first: nn.Conv2d | nn.Conv3d, second: nn.Conv2d | nn.Conv3d
) -> Float[Tensor, "batch channel *size"]:
    """x + second(act(first(act(x)))) for convolutions that keep channels and size."""
    return _with_sum(second, _activated(first, activate(x)), x)


def _activated(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    given = _given(layer, x)
    if given is None:
        return activate(layer(x))
    return torch.ops.mkldnn._convolution_pointwise(*given, "leaky_relu", [SLOPE], "")


def _with_sum(layer: nn.Conv2d | nn.Conv3d, x: Tensor, other: Tensor) -> Tensor:
    given = _given(layer, x)
    if given is None or other.dtype != given[0].dtype or other.stride() != given[0].stride():
        return other + layer(x)  # where the other is float32, so is the sum
    fused = torch.ops.mkldnn._convolution_pointwise.binary
    return fused(given[0], other, *given[1:], "add", 1.0, None, [], None)


def _given(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> tuple[Any, ...] | None:
    """What the fused operation asks for; None where it does not take these."""
    dtype = working_type(x)
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if not _fuses(x, dtype) or not x.is_contiguous(memory_format=layout):
        return None
    weight = layer.weight.to(dtype).contiguous(memory_format=layout)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return x.to(dtype), weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups


def _fuses(x: Tensor, dtype: torch.dtype) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and onednn_takes(dtype) and _there()


@functools.cache
def _there() -> bool:
    """Whether PyTorch has the operation, which its compiler uses and documents for itself alone."""
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise")
