"""Initial weights of an ``AutoencoderKL`` that already reconstruct the mean colour of every 8x8 block.

From random weights an autoencoder with group normalisation learns brightness first and colours very late: after 500
small steps it still drew in grey, 2 dB below plain block means. So colours get a path of their own from the start:

* every colour is carried by two channels, +x and -x, for silu(x) - silu(-x) = x: the activation is undone exactly;
* two constant channels +-``CONSTANT`` outweigh the colours in the one normalisation on the way, which so divides every
  picture by nearly the same number; and all pairs together have mean 0;
* residual branches end in zeros, as they may add what the path lacks.

Three latents are the block's colour in opponent axes (brightness, red-blue, green-purple); the fourth is free.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.rendering.opponent_axes import OPPONENT_AXES

CARRIED = 8
"""Channels of the path: +-R, +-G, +-B, +-constant. The narrowest level has as many."""
CONSTANT = 4.0
COLOUR_POWER = 1.0
"""Usual mean of R^2 + G^2 + B^2 of colours in [-1, 1]."""
SIGNS = torch.tensor([1.0, -1.0]).repeat(3)


@torch.no_grad()
def start_at_block_means(autoencoder: Any) -> None:
    """Change the weights in place. Every width is at least ``CARRIED``, and the normalisation has one group."""
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    for part in (encoder, decoder):
        for module in part.modules():
            if hasattr(module, "conv_shortcut"):  # a residual block
                nn.init.zeros_(module.conv2.weight)
                nn.init.zeros_(module.conv2.bias)
                if module.conv_shortcut is not None:
                    carry(module.conv_shortcut, torch.eye(CARRIED), 1)
        pass_through(part.conv_norm_out)
    for block in encoder.down_blocks:
        for sampler in block.downsamplers or ():
            carry(sampler.conv, torch.eye(CARRIED) / 4, 2)  # rows and columns 0 and 1 of 3: exactly the 2x2 block
    for block in decoder.up_blocks:
        for sampler in block.upsamplers or ():
            carry(sampler.conv, torch.eye(CARRIED), 1)
    pairs = torch.repeat_interleave(torch.eye(3), 2, dim=0) * SIGNS[:, None]  # from colours to +-colours
    enter(encoder.conv_in, pairs)
    enter(decoder.conv_in, torch.cat([pairs @ OPPONENT_AXES.T, torch.zeros(6, 1)], 1))
    leave(encoder.conv_out, OPPONENT_AXES @ pairs.T)
    leave(decoder.conv_out, pairs.T)
    for conv in (autoencoder.quant_conv, autoencoder.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)


def carry(conv: nn.Conv2d, matrix: Float[Tensor, "carried carried"], taps: int) -> None:
    """The path's channels go through ``matrix`` at ``taps`` x ``taps`` taps, apart from all others."""
    conv.weight[:CARRIED] = 0
    conv.weight[:, :CARRIED] = 0
    corner = (conv.kernel_size[0] - 1) // 2 if taps == 1 else 0
    conv.weight[:CARRIED, :CARRIED, corner : corner + taps, corner : corner + taps] = matrix[:, :, None, None]
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def enter(conv: nn.Conv2d, matrix: Float[Tensor, "6 inputs"]) -> None:
    """Where the path begins: signed colours and constants; the other channels read what they were drawn to."""
    conv.weight[:CARRIED] = 0
    conv.weight[:6, :, 1, 1] = matrix
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    conv.bias[6], conv.bias[7] = CONSTANT, -CONSTANT


def leave(conv: nn.Conv2d, matrix: Float[Tensor, "3 6"]) -> None:
    """Where it ends; the first three outputs read it, all outputs read the other channels as they were drawn."""
    conv.weight[:, :CARRIED] = 0
    conv.weight[:3, :6, 1, 1] = matrix
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)


def pass_through(norm: nn.GroupNorm) -> None:
    """Undo the division by the deviation that the constants dictate."""
    deviation = math.sqrt(2 * (COLOUR_POWER + CONSTANT**2) / norm.num_channels)
    norm.weight[:CARRIED] = deviation
