"""View refinement: at every point, attention among one token per source view and one of the target latent.

tokens [batch token point width]: the token axis holds the views, then the latent if there is one. Views have no
position code, so that permuting them permutes the result; a view that does not see the point is not listened to.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idnerf.geometry.precision import full_precision
from idnerf.geometry.rays import pixel_centers
from idnerf.models.feature_pyramid import start_at_zero
from idnerf.models.fine_samples import FineOutput
from idnerf.models.gmflow import PairMaps, view_pairs
from idnerf.models.latent import LatentQuery, LatentToken, TargetLatent
from idnerf.types import Cameras


class TokenAttention(nn.Module):
    """One layer of multi-head attention among a few tokens per point, residual, layer norm.

    With so few tokens, sums over whole batches of points are faster than tiny matrix products.
    """

    def __init__(self, width: int = 8, heads: int = 4, head_width: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.merge = nn.Linear(heads * head_width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, tokens: Float[Tensor, "batch token point width"], answering: Bool[Tensor, "batch token point"]
    ) -> Float[Tensor, "batch token point width"]:
        """Tokens outside ``answering`` are ignored by all; at a point where none answers, all do."""
        # Points last: every sum over a head's few channels then runs along whole batches of points.
        qkv = self.to_qkv.weight @ tokens.transpose(-1, -2)
        q, k, v = (part.unflatten(2, (self.heads, -1)) for part in qkv.chunk(3, 2))
        q = q * q.shape[3] ** -0.5
        silence = torch.where(answering, 0.0, -1e4).to(tokens.dtype)[:, :, None]
        count = tokens.shape[1]
        scores = torch.stack([(q * k[:, s : s + 1]).sum(3) + silence[:, s : s + 1] for s in range(count)])
        attention = (scores - scores.amax(0).detach()).exp()
        attention = attention / attention.sum(0)
        mixed = attention[0, ..., None, :] * v[:, :1]
        for s in range(1, count):
            mixed = torch.addcmul(mixed, attention[s, ..., None, :], v[:, s : s + 1])
        merged = (self.merge.weight @ mixed.flatten(2, 3)).transpose(-1, -2)
        return self.norm(tokens + merged)


def attend_with_latent(
    attention: TokenAttention,
    views: Float[Tensor, "batch view point width"],
    seen: Bool[Tensor, "batch view point"],
    latent: Float[Tensor, "batch point width"] | None,
) -> tuple[Float[Tensor, "batch view point width"], Float[Tensor, "batch point width"] | None]:
    """Refined tokens of the views and of the latent (None without one); the latent always answers."""
    if latent is None:
        return attention(views, seen), None
    tokens = torch.cat([views, latent[:, None]], 1)
    refined = attention(tokens, torch.cat([seen, torch.ones_like(seen[:, :1])], 1))
    return refined[:, :-1], refined[:, -1]


class MapTokens(nn.Module):
    """View tokens of the `paper` configuration: a linear map of a view's features, colour and visibility, then ReLU.

    A view has features for each partner in matching; their mean over the partners makes the token's inputs independent
    of the number of views. A linear map and a bilinear lookup may change places: mapping the feature maps to the
    token's few channels first, once per set of views, makes the lookup at millions of points 16 times cheaper.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.of_coarse = nn.Linear(channels, width, bias=False)
        self.of_fine = nn.Linear(channels, width, bias=False)
        self.of_colour = nn.Linear(4, width)
        for linear in (self.of_coarse, self.of_fine, self.of_colour):
            # kaiming's bound for all inputs of the token together
            nn.init.normal_(linear.weight, std=(2 / (2 * channels + 4)) ** 0.5)

    @full_precision
    def maps(
        self, maps: PairMaps
    ) -> tuple[Float[Tensor, "batch view h w width"], Float[Tensor, "batch view h4 w4 width"]]:
        """The linear part of the features, at both scales."""
        linears = (self.of_coarse, self.of_fine)
        coarse, fine = (linear(mean_over_partners(scale)) for linear, scale in zip(linears, maps.scales, strict=True))
        return coarse, fine

    def forward(
        self,
        features: Float[Tensor, "batch view point width"],
        colours: Float[Tensor, "batch view point 3"],
        seen: Bool[Tensor, "batch view point"],
    ) -> Float[Tensor, "batch view point width"]:
        """``features``: the sum of both ``maps`` looked up at the points; ``colours`` in [0, 1]."""
        return F.relu(features + self.of_colour(torch.cat([colours, seen[..., None].to(colours.dtype)], -1)))


VISIBLE_SHARE = 0.01
"""A view is listened to at a pixel if at least so much of the ray's weight lies in front of it and inside its image."""


@dataclass(frozen=True)
class RefinedPixels:
    """What refinement adds to the blending's hidden channels of each view, and to the image refinement's."""

    to_blending: Float[Tensor, "batch view blend height width"]
    to_image: Float[Tensor, "batch channel height width"]


class PixelRefinement(nn.Module):
    """View refinement of the `cascade` configuration: once per pixel, where the views are composited but still apart.

    The latent's token is also told to every sample of its pixel's ray (``ray_cue``), before attention along the ray.
    All outputs start at zero: weights trained without refinement give what they gave.

    Args:
        values: channels of what a view shows, visibility included.
        width, heads: of the tokens and their attention.
        query: how the latent is read.
        sample_width, blend_width, image_width: channels that the three outputs are added to.
    """

    def __init__(
        self,
        values: int,
        width: int,
        heads: int,
        query: LatentQuery,
        sample_width: int,
        blend_width: int,
        image_width: int,
    ) -> None:
        super().__init__()
        self.view_token = nn.Linear(values, width)
        self.attention = TokenAttention(width, heads)
        self.latent_token = None if query == "none" else LatentToken(query, width)
        self.to_blending = nn.Linear(width, blend_width)
        self.to_image = nn.Linear(width if query == "none" else 3 * width, image_width)
        self.to_samples = None if query == "none" else nn.Linear(width, sample_width)
        for output in (self.to_blending, self.to_image, self.to_samples):
            if output is not None:
                start_at_zero(output)

    def read(self, latent: TargetLatent | None, target: Cameras) -> Float[Tensor, "batch height width token"] | None:
        """The latent's token at every pixel of [batch] ``target`` cameras; None where there is none."""
        if self.latent_token is None or latent is None:
            return None
        pixels = pixel_centers(target.size, target.device).flatten(0, 1).expand(len(target), -1, 2)
        return self.latent_token(latent, target, pixels).unflatten(1, (target.height, target.width))

    def ray_cue(
        self, token: Float[Tensor, "batch height width token"] | None
    ) -> Float[Tensor, "batch height width channel"] | None:
        """What is added to the token of every sample of a pixel's ray."""
        return None if token is None or self.to_samples is None else self.to_samples(token)

    def forward(
        self, fine: FineOutput, latent_token: Float[Tensor, "batch height width token"] | None
    ) -> RefinedPixels:
        size = fine.views.shape[-2:]
        tokens = F.relu(self.view_token(fine.views.flatten(3).transpose(2, 3)))  # batch view point token
        seen = fine.visibility.flatten(2) > VISIBLE_SHARE
        latent = None if latent_token is None else latent_token.flatten(1, 2)
        views, refined = attend_with_latent(self.attention, tokens, seen, latent)
        weight = fine.visibility.flatten(2)[..., None] + VISIBLE_SHARE
        summary = [(weight * views).sum(1) / weight.sum(1)]
        if latent is not None and refined is not None:
            summary += [latent, refined]
        to_image = self.to_image(torch.cat(summary, -1)).transpose(1, 2).unflatten(2, size)
        return RefinedPixels(self.to_blending(views).transpose(2, 3).unflatten(3, size), to_image)


def mean_over_partners(
    maps: Float[Tensor, "batch pair member height width channel"],
) -> Float[Tensor, "batch view height width channel"]:
    """Each view's maps, averaged over the pairs that it is a member of."""
    pairs, views = maps.shape[1], 2
    while views * (views - 1) // 2 < pairs:
        views += 1
    own: list[list[Tensor]] = [[] for _ in range(views)]
    each = iter(maps.flatten(1, 2).unbind(1))  # the gradient of an indexed map would be as large as all of them
    for members in view_pairs(views):
        for view in members:
            own[view].append(next(each))
    return torch.stack([torch.stack(of_view).mean(0) for of_view in own], 1)
