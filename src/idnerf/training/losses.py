"""Loss values. Everything here is differentiable and calls no ``backward()``: only the trainer does."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Weights = Float[Tensor, "batch 1 height width"]
"""What each pixel's error is multiplied by; the mean is over the number of pixels all the same."""


def weighted_mean(errors: Float[Tensor, "*shape"], weights: Weights | None) -> Float[Tensor, ""]:
    """Mean over everything of the errors times ``weights`` (None: 1)."""
    return errors.mean() if weights is None else (errors * weights).mean()


def mean_squared_error(
    prediction: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"], weights: Weights | None = None
) -> Float[Tensor, ""]:
    """mean e^2."""
    return weighted_mean((prediction - truth).square(), weights)


def charbonnier(
    prediction: Float[Tensor, "*shape"],
    truth: Float[Tensor, "*shape"],
    weights: Weights | None = None,
    epsilon: float = 0.01,
) -> Float[Tensor, ""]:
    """mean sqrt(e^2 + epsilon^2) - epsilon: squared error below ``epsilon``, absolute error above."""
    return weighted_mean(((prediction - truth).square() + epsilon**2).sqrt() - epsilon, weights)


def ssim_loss(
    prediction: Float[Tensor, "batch 3 height width"],
    truth: Float[Tensor, "batch 3 height width"],
    weights: Weights | None = None,
) -> Float[Tensor, ""]:
    """(1 - SSIM) / 2 with a 7x7 box window and data range 1 (Wang et al. 2004), windows inside the image.

    A window has the mean of its pixels' ``weights``.
    """

    def blur(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 7, stride=1)

    mean_p, mean_t = blur(prediction), blur(truth)
    variance_p = blur(prediction.square()) - mean_p.square()
    variance_t = blur(truth.square()) - mean_t.square()
    covariance = blur(prediction * truth) - mean_p * mean_t
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_p * mean_t + c1) / (mean_p.square() + mean_t.square() + c1)
    structure = (2 * covariance + c2) / (variance_p + variance_t + c2)
    return weighted_mean(1 - luminance * structure, None if weights is None else blur(weights)) / 2


def inverse_depth_position(
    depth: Float[Tensor, "batch height width"], near: Float[Tensor, "batch"], far: Float[Tensor, "batch"]
) -> Float[Tensor, "batch height width"]:
    """Depth to position in [0, 1] of inverse depth between near (0) and far (1); meaningless where depth is 0."""
    near, far = near[:, None, None], far[:, None, None]
    inverse = 1 / torch.where(depth > 0, depth, near)
    return (inverse - 1 / near) / (1 / far - 1 / near)


def depth_histogram(
    depth: Float[Tensor, "batch height width"],
    near: Float[Tensor, "batch"],
    far: Float[Tensor, "batch"],
    planes: int,
    scale: int,
) -> tuple[Float[Tensor, "batch plane coarse_height coarse_width"], Float[Tensor, "batch coarse_height coarse_width"]]:
    """Exact depths of each ``scale`` x ``scale`` block as a histogram over inverse-depth planes.

    A block on a depth edge gets two peaks: that is what its distribution should say. Each depth is shared linearly
    between the two nearest planes. Also returns how much of the block is known, in [0, 1]. Height and width must be
    multiples of ``scale``.
    """
    position = inverse_depth_position(depth, near, far)
    known = (depth > 0).to(depth.dtype)
    bins = (position * planes - 0.5).clamp(0, planes - 1)
    low = bins.floor().clamp_max(planes - 2) if planes > 1 else bins.floor()
    fraction = bins - low
    histogram = depth.new_zeros(depth.shape[0], planes, depth.shape[1] // scale, depth.shape[2] // scale)

    def blocks(x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, scale)).unflatten(3, (-1, scale))
        return x.permute(0, 2, 4, 1, 3).flatten(1, 2)  # batch, pixel of block, rows, columns

    histogram.scatter_add_(1, blocks(low).long(), blocks((1 - fraction) * known))
    histogram.scatter_add_(1, (blocks(low).long() + 1).clamp_max(planes - 1), blocks(fraction * known))
    total = histogram.sum(1)
    return histogram / total.clamp_min(1e-6)[:, None], total / scale**2


def bin_cross_entropy(
    log_weights: Float[Tensor, "batch bin cell_height cell_width"],
    edges: Float[Tensor, "batch edge cell_height cell_width"],
    position: Float[Tensor, "batch height width"],
    weight: Float[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """-log of the probability of the bin that each pixel's position lies in, weighted mean over pixels.

    Every cell of pixels (2x2 at half resolution) has bins of its own, one more edge than bins, ascending; positions
    beyond the ends belong to the outermost bins. Height and width must be multiples of the cell's side.
    """
    scale = position.shape[-1] // log_weights.shape[-1]

    def blocks(x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, scale)).unflatten(3, (-1, scale))
        return x.permute(0, 2, 4, 1, 3).flatten(1, 2)  # batch, pixel of cell, rows, columns

    index = (blocks(position)[:, None] >= edges[:, 1:-1, None]).sum(1)
    of_pixels = blocks(weight)
    return -(of_pixels * log_weights.gather(1, index)).sum() / of_pixels.sum().clamp_min(1)


def laplace_negative_log_likelihood(
    error: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """mean of log(2b) + e / b for absolute errors e under a Laplace distribution of scale b."""
    return (torch.log(2 * scale) + error / scale).mean()


def psnr_of_mse(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, signal range 1."""
    return float(-10 * torch.log10(torch.tensor(max(mse, 1e-12))))
