"""From alphas along a ray to colour, depth and opacity (Max 1995; NeRF, arXiv 2003.08934, eq. 3).

transmittance_i = prod_{j<i} (1 - alpha_j)        weights_i = transmittance_i * alpha_i
"""

import torch
from jaxtyping import Float
from torch import Tensor


def alphas_without_intervals(sigmas: Float[Tensor, "*ray sample"]) -> Float[Tensor, "*ray sample"]:
    """alpha = 1 - exp(-sigma): density without interval lengths (IBRNet), so any scene scale behaves alike."""
    return -torch.expm1(-sigmas)


def compositing_weights(alphas: Float[Tensor, "*ray sample"]) -> Float[Tensor, "*ray sample"]:
    """Weights of samples ordered near to far; they sum to the opacity, at most 1."""
    transparent = torch.cumprod(1 - alphas, dim=-1)
    transmittance = torch.cat([torch.ones_like(alphas[..., :1]), transparent[..., :-1]], -1)
    return transmittance * alphas


def composite(
    weights: Float[Tensor, "*ray sample"], values: Float[Tensor, "*ray sample channel"]
) -> Float[Tensor, "*ray channel"]:
    """Weighted sum along the ray."""
    return (weights[..., None] * values).sum(-2)
