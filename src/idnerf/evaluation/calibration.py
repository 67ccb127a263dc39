"""Does confidence predict error? Rank correlation, sparsification and reliability, as pure functions on pixels.

All take flat tensors over pixels; they sort, so millions of pixels are fine.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.errors import InputError

STEPS = 20
"""Points of a sparsification curve: 0, 5, ... 95 % of the pixels left out."""


@dataclass(frozen=True)
class ConfidenceBin:
    """Pixels of like confidence.

    Attributes:
        confidence: mean over the bin.
        error: mean absolute colour error.
        within: share of the pixels whose error is below the threshold that confidence claims to be about.
        hidden: share of the pixels that fewer than two sources see; None where that is not known.
        count: pixels.
    """

    confidence: float
    error: float
    within: float
    hidden: float | None
    count: int


def ranks(values: Float[Tensor, "pixel"]) -> Float[Tensor, "pixel"]:
    """Rank of every value, 0 the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[inverse]


def spearman(a: Float[Tensor, "pixel"], b: Float[Tensor, "pixel"]) -> float:
    """Spearman's rank correlation, the correlation of ranks: 1 where b grows with a, -1 where it falls.

    0 when either is constant.
    """
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = x.norm() * y.norm()
    return ((x * y).sum() / norm).item() if norm > 0 else 0.0


def confidence_bins(
    confidence: Float[Tensor, "pixel"],
    error: Float[Tensor, "pixel"],
    hidden: Bool[Tensor, "pixel"] | None = None,
    *,
    bins: int = 10,
    threshold: float = 0.1,
) -> list[ConfidenceBin]:
    """Bins with equally many pixels (quantiles), the least confident first.

    Args:
        error: mean absolute colour error of each pixel.
        hidden: fewer than two sources see the pixel's surface.
        threshold: confidence claims to be the probability that ``error`` is below it.

    Raises ``InputError`` for fewer pixels than bins.
    """
    if len(confidence) < bins:
        raise InputError(f"expected at least {bins} pixels for {bins} bins, got {len(confidence)}")
    found = []
    for part in torch.tensor_split(confidence.argsort(), bins):
        errors = error[part].double()
        found.append(
            ConfidenceBin(
                confidence=confidence[part].double().mean().item(),
                error=errors.mean().item(),
                within=(errors < threshold).double().mean().item(),
                hidden=None if hidden is None else hidden[part].double().mean().item(),
                count=len(part),
            )
        )
    return found


def expected_calibration_error(bins: list[ConfidenceBin]) -> float:
    """Mean over pixels of |claimed - observed| probability, bin by bin (Guo et al. 2017, arXiv 1706.04599)."""
    total = sum(b.count for b in bins)
    return sum(abs(b.confidence - b.within) * b.count for b in bins) / total


def sparsification(
    error: Float[Tensor, "pixel"], certainty: Float[Tensor, "pixel"], steps: int = STEPS
) -> Float[Tensor, "step"]:
    """Mean error of what is kept when a share 0, 1/steps, ... of the least certain pixels is left out.

    With ``certainty = -error`` it is the oracle: no ordering falls faster (Ilg et al. 2018, arXiv 1802.07095).
    """
    ordered = error[certainty.argsort(descending=True)].double()
    kept = (len(error) * (1 - torch.arange(steps) / steps)).round().long().clamp_min(1)
    return ordered.cumsum(0)[kept - 1] / kept


def area_above_oracle(error: Float[Tensor, "pixel"], certainty: Float[Tensor, "pixel"]) -> tuple[float, float]:
    """AUSE, and its share of what an ordering at random gives.

    AUSE is the mean gap between the sparsification curve and the oracle's, over the mean error of all pixels: 0 is
    perfect. The share is 0 for the oracle, 1 for an ordering that knows nothing, above 1 for one that misleads.
    """
    oracle = sparsification(error, -error)
    mean = error.double().mean()
    if mean == 0:
        return 0.0, 0.0
    gap = ((sparsification(error, certainty) - oracle) / mean).mean().item()
    random = (1 - oracle / mean).mean().item()
    return gap, gap / random if random > 0 else 0.0
