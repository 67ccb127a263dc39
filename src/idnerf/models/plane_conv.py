"""3D convolution of size 3 on the CPU, where PyTorch's own choice of kernels is slow for one small volume.

Without gradients it calls oneDNN directly: PyTorch would, but only for batches or volumes that it holds to be large.
With gradients it is a 2D convolution over each plane joined with its two neighbours along the channels, whose backward
pass is fast too. The numbers are the same (benchmarks/NOTES.md).
"""

import platform

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PlaneConv(nn.Conv3d):
    """3x3x3 convolution with padding 1 and stride 1 or 2; parameters are those of ``nn.Conv3d``."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(
        self, input: Float[Tensor, "batch channel plane height width"]
    ) -> Float[Tensor, "batch out_channel out_plane out_height out_width"]:
        if input.device.type != "cpu":
            return super().forward(input)
        if torch.is_grad_enabled() or not onednn_takes(working_type(input)):
            return conv3d_by_planes(input, self.weight, self.bias, self.stride[0])
        return conv3d_by_onednn(input, self.weight, self.bias, self.stride[0])


def working_type(x: Tensor) -> torch.dtype:
    """What a convolution of ``x`` is computed in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and this CPU has instructions for the type. Elsewhere than on x86 it was not measured."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    if not torch._C._get_mkldnn_enabled():  # switched off, as by ``torch.backends.mkldnn.flags``
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def conv3d_by_onednn(
    x: Float[Tensor, "batch channel plane height width"],
    weight: Float[Tensor, "out channel 3 3 3"],
    bias: Float[Tensor, "out"] | None,
    stride: int,
) -> Float[Tensor, "batch out out_plane out_height out_width"]:
    """``F.conv3d(x, weight, bias, stride, padding=1)`` without gradient; memory is channels-last throughout."""
    dtype, layout = working_type(x), torch.channels_last_3d
    x, weight = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, weight))
    bias = None if bias is None else bias.to(dtype)
    return torch.mkldnn_convolution(x, weight, bias, [1] * 3, [stride] * 3, [1] * 3, 1)


def conv3d_by_planes(
    x: Float[Tensor, "batch channel plane height width"],
    weight: Float[Tensor, "out channel 3 3 3"],
    bias: Float[Tensor, "out"] | None,
    stride: int,
) -> Float[Tensor, "batch out out_plane out_height out_width"]:
    """``F.conv3d(x, weight, bias, stride, padding=1)``; memory is channels-last throughout."""
    batch, _, planes, _, _ = x.shape
    padded = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 0, 0, 0, 0, 1, 1))
    neighbours = torch.cat([padded[:, k : k + planes : stride] for k in range(3)], -1)
    kernel = weight.permute(0, 2, 1, 3, 4).flatten(1, 2)
    y = F.conv2d(neighbours.flatten(0, 1).permute(0, 3, 1, 2), kernel, bias, stride=stride, padding=1)
    return y.permute(0, 2, 3, 1).unflatten(0, (batch, -1)).permute(0, 4, 1, 2, 3)
