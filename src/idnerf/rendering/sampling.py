"""Where along a ray to sample: even spacing in depth or inverse depth, and drawing from a histogram."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def inverse_depth_planes(
    near: Float[Tensor, "*batch"], far: Float[Tensor, "*batch"], count: int
) -> Float[Tensor, "*batch plane"]:
    """Centres of ``count`` equal bins of inverse depth in [1/far, 1/near], nearest first. In inverse scene units."""
    fraction = (torch.arange(count, device=near.device) + 0.5) / count
    return 1 / near[..., None] + fraction * (1 / far - 1 / near)[..., None]


def depths_linear(
    near: Float[Tensor, "*batch"], far: Float[Tensor, "*batch"], count: int
) -> Float[Tensor, "*batch sample"]:
    """``count`` depths from near to far, both included, evenly spaced (the published codes' test-time choice)."""
    return near[..., None] + torch.linspace(0, 1, count, device=near.device) * (far - near)[..., None]


def sample_histogram(
    probabilities: Float[Tensor, "*ray bin"], quantiles: Float[Tensor, "*ray sample"]
) -> Float[Tensor, "*ray sample"]:
    """Invert the cumulative distribution of a histogram over [0, 1] with equal bins.

    Piecewise linear inside a bin. Args: ``probabilities`` >= 0 (normalised here), ``quantiles`` in [0, 1] ascending.
    Returns positions in [0, 1], ascending like the quantiles; also where probabilities are not finite, so that what is
    looked up there exists: a network that diverges then shows in its loss, not in an index error.
    """
    index, inside = _invert(probabilities, quantiles)
    return (index + inside) / probabilities.shape[-1]


def sample_bins(
    edges: Float[Tensor, "*ray edge"], weights: Float[Tensor, "*ray bin"], quantiles: Float[Tensor, "*ray sample"]
) -> tuple[Float[Tensor, "*ray sample"], Int64[Tensor, "*ray sample"]]:
    """Invert the cumulative distribution of a histogram over bins of any width; ``sample_histogram`` is the even case.

    Args: ``edges`` ascending, one more than bins; ``weights`` >= 0 (normalised here); ``quantiles`` in [0, 1].
    Returns positions between the first and the last edge, and the bin that each lies in.
    """
    index, inside = _invert(weights, quantiles)
    start = edges.gather(-1, index)
    return start + inside * (edges.gather(-1, index + 1) - start), index


def _invert(
    weights: Float[Tensor, "*ray bin"], quantiles: Float[Tensor, "*ray sample"]
) -> tuple[Int64[Tensor, "*ray sample"], Float[Tensor, "*ray sample"]]:
    """The bin that each quantile falls into, and how far into it, in [0, 1]."""
    weights = weights + 1e-5
    cdf = torch.cumsum(weights / weights.sum(-1, keepdim=True), -1)
    index = torch.searchsorted(cdf.contiguous(), quantiles.contiguous(), right=True).clamp_max(weights.shape[-1] - 1)
    upper = cdf.gather(-1, index)
    lower = torch.where(index > 0, cdf.gather(-1, (index - 1).clamp_min(0)), torch.zeros_like(upper))
    inside = (quantiles - lower) / (upper - lower).clamp_min(1e-8)
    inside = torch.fmin(torch.fmax(inside, torch.zeros_like(inside)), torch.ones_like(inside))  # a clamp keeps NaN
    return index, inside
