"""The cascade's activation and the initialisation that belongs to it.

A leaky ReLU, because plain ones die here: with one scene per step and no normalisation layers, a ReLU network ended
with 3 to 10 % of its deep units active and its image refinement silent altogether (benchmarks/NOTES.md).
"""

import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.1
"""Slope below zero."""


def activate(x: Tensor) -> Tensor:
    """max(x, SLOPE x)."""
    return F.leaky_relu(x, SLOPE)


class Activation(nn.Module):
    """``activate`` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return activate(x)


def start_at_unit_gain(part: nn.Module) -> None:
    """Weights that keep the signal's variance from layer to layer (He et al., arXiv 1502.01852), biases zero.

    PyTorch's default lets it fall by 0.4 a layer, until deep layers carry little but their biases. Layers that were
    set to zero stay at zero.
    """
    for module in part.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear) and module.weight.any():
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
