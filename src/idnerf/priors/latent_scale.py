"""Latents of zero mean and unit variance in every channel, made part of the autoencoder's own weights.

Stable Diffusion divides its latents by one number. Here each channel is shifted and scaled apart, folded into the 1x1
convolutions that an ``AutoencoderKL`` has on either side of its latents; ``scaling_factor`` then is 1.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def fold_scale(
    autoencoder: Any, mean: Float[Tensor, "channel"], deviation: Float[Tensor, "channel"], floor: float = 1e-3
) -> None:
    """Change the weights in place: new latent = (latent - mean) / deviation, reconstructions as before.

    The encoder's convolution also gives log variances; they fall by 2 log deviation. A deviation below ``floor`` (a
    channel that carries nothing) counts as ``floor``.
    """
    channels = len(mean)
    deviation = deviation.clamp_min(floor)
    into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= deviation[:, None, None]


def latent_statistics(
    latents: Float[Tensor, "image channel h w"],
) -> tuple[Float[Tensor, "channel"], Float[Tensor, "channel"]]:
    """Mean and standard deviation of every channel."""
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))
