"""Do the source views agree about a point? Group-wise similarity over view pairs, symmetric in the views.

Group-wise correlation: Guo et al., GwcNet (arXiv 1903.04025); pair averages over views: MatchNeRF (arXiv 2304.12294).
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.compiled import gradients
from idnerf.geometry.projection import bilinear_lookup, safe_depth, visible


@dataclass(frozen=True)
class Matching:
    """What the source views say about points.

    Attributes:
        cues: for a linear layer: pair similarity (mean, maximum); unless it is all that was asked for, the views' mean
            of everything looked up and how far apart they are (with colours the colours' variance times 4; without them
            the features' by group, the share of views that see the point, and whether two do).
        agreement: mean pair similarity over the groups.
        seen: whether a view sees the point.
        values: everything looked up, view by view; None unless it was asked for.
    """

    cues: Float[Tensor, "batch point cue"]
    agreement: Float[Tensor, "batch point"]
    seen: Bool[Tensor, "batch view point"]
    values: Float[Tensor, "batch view point value"] | None = None

    @property
    def share(self) -> Float[Tensor, "batch point 1"]:
        """Of the views, those that see the point."""
        return self.seen.to(self.cues.dtype).mean(1)[..., None]


def match_views(
    maps: Float[Tensor, "batch view map_height map_width value"],
    size: tuple[int, int],
    rays: Float[Tensor, "batch view pixel 3"],
    b: Float[Tensor, "batch view 3"],
    inverse_depths: Float[Tensor, "batch sample #pixel"],
    scale: int,
    channels: int,
    groups: int,
    *,
    only_similarity: bool = False,
    keep_values: bool = False,
) -> Matching:
    """Look points up in every view (``look_up_views``) and compare what is found.

    On a CPU and with numba installed, point by point in compiled code.

    Args:
        maps: ``channels`` features in ``groups`` of unit length, then the colour or nothing.
    """
    compiled = gradients.chosen(maps, rays, b, inverse_depths)
    if compiled is not None:
        found = compiled.match(
            maps,
            size,
            rays,
            b,
            inverse_depths,
            scale,
            channels,
            groups,
            only_similarity=only_similarity,
            keep_values=keep_values,
        )
        return Matching(*found)
    values, seen = look_up_views(maps, size, rays, b, inverse_depths, scale)
    features = values[..., :channels]
    similarity = pair_similarity(features, seen, groups)
    cues = [similarity]
    if not only_similarity and maps.shape[-1] > channels:
        # photos take no gradient: cut off here, nothing of the size of all samples flows back through colours
        colours, visibility = values[..., channels:].detach(), seen.to(values.dtype)[..., None]
        mean_colour = masked_mean(colours, visibility)
        variance = masked_mean(colours.square(), visibility) - mean_colour.square()
        cues += [masked_mean(features, visibility), mean_colour, variance * 4]
    elif not only_similarity:
        mean, variance = masked_mean_and_variance(features, seen)
        spread = variance.unflatten(-1, (groups, -1)).sum(-1)
        count = seen.sum(1, dtype=mean.dtype)[..., None]
        cues += [mean, spread, count / seen.shape[1], (count >= 2).to(mean.dtype)]
    agreement = similarity[..., :groups].mean(-1)
    return Matching(torch.cat(cues, -1), agreement, seen, values if keep_values else None)


def look_up_views(
    maps: Float[Tensor, "batch view map_height map_width channel"],
    size: tuple[int, int],
    rays: Float[Tensor, "batch view pixel 3"],
    b: Float[Tensor, "batch view 3"],
    inverse_depths: Float[Tensor, "batch sample #pixel"],
    scale: int,
) -> tuple[Float[Tensor, "batch view point channel"], Bool[Tensor, "batch view point"]]:
    """What every source view's map shows at samples along target rays, and whether the view sees them.

    A pixel's point at depth d lands at (A p) d + b (``frustum_homography``), here divided by d. Points are sample by
    sample, pixel by pixel.

    Args:
        maps: channels-last, at 1/``scale`` of the photos, whose right and lower ends may be padded.
        size: (width, height) of the source photos.
        rays, b: A p of every target pixel, and b, for every view.
    """
    moved = (rays[:, :, None] + b[:, :, None, None] * inverse_depths[:, None, ..., None]).flatten(2, 3)
    pixels = moved[..., :2] / safe_depth(moved[..., 2:])
    seen = visible(pixels, moved[..., 2], size)
    looked_up = bilinear_lookup(maps.flatten(0, 1), pixels.flatten(0, 1) / scale)
    return looked_up.unflatten(0, maps.shape[:2]), seen


def pair_similarity(
    features: Float[Tensor, "batch view point channel"],
    visible: Bool[Tensor, "batch view point"],
    groups: int,
) -> Float[Tensor, "batch point twice_groups"]:
    """Mean and maximum, over pairs of views that both see the point, of group-wise cosines.

    The maximum keeps the evidence of one good pair where a third view is occluded. Points that fewer than two views
    see get zeros. ``features`` hold groups of unit length (or shorter, between pixels).
    """
    similarities, valid = [], []
    views = list(zip(features.unbind(1), visible.unbind(1), strict=True))  # unbind: one gradient for all, not one each
    for (feature, seen), (other_feature, other_seen) in itertools.combinations(views, 2):
        both = (seen & other_seen)[..., None]
        product = (feature * other_feature).unflatten(-1, (groups, -1)).sum(-1)
        similarities.append(torch.where(both, product, 0.0))
        valid.append(both)
    count = torch.stack(valid).sum(0)
    mean = torch.stack(similarities).sum(0) / count.clamp_min(1)
    best = torch.where(valid[0], similarities[0], -torch.inf)
    for similarity, both in zip(similarities[1:], valid[1:], strict=True):
        best = torch.where(both, torch.maximum(best, similarity), best)
    return torch.cat([mean, torch.where(count > 0, best, 0.0)], -1)


def masked_mean(
    values: Float[Tensor, "batch view point channel"], mask: Float[Tensor, "batch view point 1"]
) -> Float[Tensor, "batch point channel"]:
    """Mean over the views that see the point (mask 1), over all views where none does."""
    count = mask.sum(1, keepdim=True)
    weight = torch.where(count > 0, mask / count.clamp_min(1), 1 / mask.shape[1])
    return _weighted_sum(weight, values)


def _weighted_sum(
    weight: Float[Tensor, "batch view point 1"], values: Float[Tensor, "batch view point channel"]
) -> Float[Tensor, "batch point channel"]:
    """One pass per view: no product of the size of all views is stored."""
    weights, parts = weight.unbind(1), values.unbind(1)
    total = weights[0] * parts[0]
    for one, part in zip(weights[1:], parts[1:], strict=True):
        total = torch.addcmul(total, one, part)
    return total


def masked_mean_and_variance(
    values: Float[Tensor, "batch view point channel"], visible: Bool[Tensor, "batch view point"]
) -> tuple[Float[Tensor, "batch point channel"], Float[Tensor, "batch point channel"]]:
    """Mean and variance over the views that see the point (over all views where none does)."""
    mask = visible[..., None].to(values.dtype)
    mask = torch.where(mask.sum(1, keepdim=True) > 0, mask, torch.ones_like(mask))
    weight = mask / mask.sum(1, keepdim=True)
    mean = _weighted_sum(weight, values)
    deviations = torch.stack([(part - mean).square() for part in values.unbind(1)], 1)
    return mean, _weighted_sum(weight, deviations)
