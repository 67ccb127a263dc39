"""Image and depth metrics as pure functions on tensors; PSNR and SSIM agree with scikit-image to 1e-5.

Images are ``3 height width`` in [0, 1]. All sums run in float64: single precision loses SSIM's fifth digit in
flat regions, where variances are differences of nearly equal numbers.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.errors import InputError

SSIM_WINDOW = 7
"""Side of SSIM's uniform window in pixels (scikit-image's default)."""


def psnr(
    prediction: Float[Tensor, "channel height width"],
    truth: Float[Tensor, "channel height width"],
    mask: Bool[Tensor, "height width"] | None = None,
) -> float:
    """Peak signal-to-noise ratio in dB, -10 log10(mean squared error), for a peak of 1.

    Args:
        mask: pixels to score; None scores all.

    Returns ``inf`` for equal images. Raises ``InputError`` when the mask is empty.
    """
    squared = (prediction.double() - truth.double()).square()
    if mask is not None:
        if not mask.any():
            raise InputError("PSNR needs at least one pixel, the mask has none: score the whole image instead")
        squared = squared[:, mask]
    error = squared.mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(
    prediction: Float[Tensor, "channel height width"],
    truth: Float[Tensor, "channel height width"],
    data_range: float = 1.0,
) -> float:
    """Mean structural similarity (Wang et al. 2004): uniform 7x7 window, sample covariance, channel mean.

    What ``skimage.metrics.structural_similarity(..., channel_axis=0, data_range=...)`` computes: windows that
    leave the image are not counted.

    Args:
        data_range: 1 is right for images in [0, 1]; 2 is what the MVSNeRF line reports (docs/evaluation.md).

    Raises ``InputError`` when the image is smaller than the window.
    """
    return ssim_map(prediction, truth, data_range).mean().item()


def ssim_map(
    prediction: Float[Tensor, "channel height width"],
    truth: Float[Tensor, "channel height width"],
    data_range: float = 1.0,
) -> Float[Tensor, "window_rows window_columns"]:
    """``ssim`` of every window, channel mean; a window's centre is half a window from its first row and column."""
    height, width = truth.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {width}x{height}: "
            "ask for a larger --size"
        )
    x, y = prediction.double(), truth.double()
    moments = F.avg_pool2d(torch.stack([x, y, x * x, y * y, x * y]), SSIM_WINDOW, stride=1)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    variance_x = sample * (mean_xx - mean_x * mean_x)
    variance_y = sample * (mean_yy - mean_y * mean_y)
    covariance = sample * (mean_xy - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(0)


def depth_errors(
    prediction: Float[Tensor, "height width"], truth: Float[Tensor, "height width"], unit_mm: float
) -> dict[str, float]:
    """Depth accuracy on the pixels whose true depth is known (truth > 0).

    Args:
        prediction, truth: depth (z) in scene units.
        unit_mm: millimetres per scene unit (DTU in this package: 200).

    Returns ``depth_error_mm`` (mean |error|) and ``depth_within_2mm``, ``depth_within_10mm`` (shares of 1).
    """
    error = (prediction - truth)[_known(truth)].double().abs() * unit_mm
    return {
        "depth_error_mm": error.mean().item(),
        "depth_within_2mm": (error < 2).double().mean().item(),
        "depth_within_10mm": (error < 10).double().mean().item(),
    }


def depth_median_relative_error(
    prediction: Float[Tensor, "height width"], truth: Float[Tensor, "height width"]
) -> float:
    """Median of |prediction - truth| / truth over the pixels whose true depth is known (truth > 0)."""
    known = _known(truth)
    return ((prediction[known] - truth[known]).abs() / truth[known]).double().median().item()


def _known(truth: Float[Tensor, "height width"]) -> Bool[Tensor, "height width"]:
    known = truth > 0
    if not known.any():
        raise InputError("depth errors need at least one pixel of known depth (> 0), the depth map has none")
    return known
