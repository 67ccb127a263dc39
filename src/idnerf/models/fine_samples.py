"""The fine stage: a few samples per ray, drawn from the coarse depth distribution, become weights along the ray.

distribution --quantiles--> samples --project--> features, colours of every view
  --matching + coarse voxel features--> tokens --3x3 over the tile, attention along the ray--> sigmas
  --compositing--> what each view shows at the pixel, for the blending

Views are composited one by one and blended per pixel, not per sample: the weights along a ray are peaked, so this is
the same picture for an eighth of the blending's cost, and the blending may then look at neighbouring pixels.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from idnerf.compiled import dispatch
from idnerf.compiled.dispatch import CompositedRays, RayNetwork
from idnerf.geometry.cameras import crop
from idnerf.geometry.projection import frustum_homography, homography_rays
from idnerf.geometry.rays import pixel_centers
from idnerf.models.activation import SLOPE, Activation
from idnerf.models.feature_pyramid import PyramidFeatures, start_at_zero
from idnerf.models.frustum_volume import DepthDistribution, VoxelLookup
from idnerf.models.fused_convolution import residual
from idnerf.models.middle_stage import MiddleOutput
from idnerf.models.view_matching import Matching, match_views
from idnerf.rendering.compositing import alphas_without_intervals, compositing_weights
from idnerf.rendering.sampling import sample_histogram
from idnerf.types import Cameras

POINTS_PER_BAND = 196608
"""Samples computed at once when no gradient is wanted (benchmarks/NOTES.md)."""
MANY_SAMPLES = 16
"""Samples per ray from which attention along the ray goes through the fused kernel."""
MOST_RAYS = 65535
"""Rays that the fused kernel takes at once: CUDA's launches no larger batch."""
REACH = 2
"""Rows that the two 3x3 convolutions over the tile reach to either side."""


@dataclass(frozen=True)
class FineOutput:
    """The fine stage's picture of a target tile.

    Attributes:
        views: what each source view shows, composited: matching features, colour, and the weight of what it sees.
        tokens: composited sample tokens.
        position: expected position along the ray in [0, 1] of inverse depth (0 at near).
        spread: standard deviation of that position.
        opacity: before the last sample closes the ray.
    """

    views: Float[Tensor, "batch view value height width"]
    tokens: Float[Tensor, "batch channel height width"]
    position: Float[Tensor, "batch height width"]
    spread: Float[Tensor, "batch height width"]
    opacity: Float[Tensor, "batch height width"]

    @property
    def colours(self) -> Float[Tensor, "batch view 3 height width"]:
        """The target tile as each source view alone would colour it."""
        return self.views[:, :, -4:-1]

    @property
    def visibility(self) -> Float[Tensor, "batch view height width"]:
        """Share of a pixel's weight that lies in front of and inside each source view, in [0, 1]; once
        ``occlusion.without_occluded`` has seen to it, and that nothing else hides from the view."""
        return self.views[:, :, -1]


def softmax_of_few(logits: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """Softmax along a short axis that is not the last, elementwise over all others.

    PyTorch's CPU kernel works row by row and took a fifth of the fine stage for rows of 3 and 8 (benchmarks/NOTES.md).
    """
    exponentials = (logits - logits.amax(dim, keepdim=True).detach()).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


class SampleAttention(nn.Module):
    """Self-attention among the few samples of a ray (the ray transformer of IBRNet, arXiv 2102.13090, at S = 8).

    With so few tokens the S x S products are cheaper as elementwise sums over whole tiles, rays last in memory, than
    as tiny matrix products. From ``MANY_SAMPLES`` on a fused kernel keeps these products out of memory.
    """

    def __init__(self, width: int, heads: int = 2, head_width: int = 4):
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * heads * head_width)
        self.out = nn.Linear(heads * head_width, width)
        start_at_zero(self.out)

    def forward(self, x: Float[Tensor, "batch sample ray channel"]) -> Float[Tensor, "batch sample ray channel"]:
        samples = x.shape[1]
        qkv = self.to_qkv.weight @ self.norm(x).flatten(1, 2).transpose(1, 2) + self.to_qkv.bias[:, None]
        if samples >= MANY_SAMPLES:
            return x + self.out(self.attend_many(qkv, samples)).unflatten(1, (samples, -1))
        q, k, v = qkv.unflatten(1, (3, self.heads, self.head_width)).unflatten(-1, (samples, -1)).unbind(1)
        # unbind, not indexing: its gradient is one stack instead of one full-size sum per sample
        scores = torch.stack([(q * key[..., None, :]).sum(2) for key in k.unbind(-2)], 3)  # batch head asks answers ray
        attention = softmax_of_few(scores * self.head_width**-0.5, 3).unbind(3)
        values = v.unbind(-2)
        mixed = attention[0][:, :, None] * values[0][..., None, :]
        for share, value in zip(attention[1:], values[1:], strict=True):
            mixed = torch.addcmul(mixed, share[:, :, None], value[..., None, :])
        return x + self.out(mixed.flatten(1, 2).flatten(2).transpose(1, 2)).unflatten(1, (samples, -1))

    def attend_many(
        self, qkv: Float[Tensor, "batch channel sample_ray"], samples: int
    ) -> Float[Tensor, "batch sample_ray mixed"]:
        """Mixed values of all heads, by scaled dot-product attention."""
        batch = len(qkv)
        split = qkv.unflatten(1, (3, self.heads, self.head_width)).unflatten(-1, (samples, -1))
        rays = split.permute(1, 0, 5, 2, 4, 3).flatten(1, 2).contiguous()  # part batch*ray head sample channel
        pieces = [
            F.scaled_dot_product_attention(piece[0], piece[1], piece[2]) for piece in rays.split(MOST_RAYS, dim=1)
        ]
        mixed = torch.cat(pieces).unflatten(0, (batch, -1))
        return mixed.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)


class FineSamples(nn.Module):
    """Matching, tokens and density at a few samples per ray of a whole target tile; composites what the views show."""

    def __init__(self, fine_channels: int, fine_groups: int, voxel_channels: int, width: int):
        super().__init__()
        self.fine_channels, self.groups = fine_channels, fine_groups
        # pair similarity (mean, max), mean of features and colour, spread of colour, voxel features, log-probability,
        # share of views that see the sample, position, order
        self.embed = nn.Linear(2 * fine_groups + fine_channels + 6 + voxel_channels + 4, width)
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.spatial_out = nn.Conv2d(width, width, 3, padding=1)
        start_at_zero(self.spatial_out)
        self.attention = SampleAttention(width)
        self.density = nn.Sequential(nn.Linear(width, width // 2), Activation(), nn.Linear(width // 2, 1))
        self.similarity_gain = nn.Parameter(torch.tensor(2.0))
        self.from_middle: nn.Linear | None = None

    def add_middle(self, channels: int) -> None:
        """Let the tokens hear the middle stage's, of so many channels, and its log-weight."""
        self.from_middle = nn.Linear(channels + 1, self.embed.out_features, bias=False)
        start_at_zero(self.from_middle)

    def forward(
        self,
        features: PyramidFeatures,
        source: Cameras,
        target: Cameras,
        distribution: DepthDistribution,
        samples: int,
        generator: torch.Generator | None = None,
        ray_cue: Float[Tensor, "batch height width channel"] | None = None,
        middle: MiddleOutput | None = None,
    ) -> FineOutput:
        """Args: ``source`` [batch view], ``target`` [batch]; ``generator`` jitters the quantiles (training).

        ``ray_cue``: from the target-view latent, added to the tokens of a pixel's samples. ``middle``: what the samples
        are drawn from; without it, the coarse ``distribution``.

        Without gradients the tile is computed in bands of rows, each with the few extra rows that the 3x3 convolutions
        reach: the same numbers in buffers that stay in the cache.
        """
        size = (target.height, target.width)
        positions, rows_at = self._draw(distribution, middle, size, samples, generator)
        table = None if middle is None else middle.rows()
        voxels = VoxelLookup(distribution, target.height)
        if torch.is_grad_enabled():
            middle_cues = None if table is None else table.index_select(0, rows_at.flatten())
            return self._shade(features, source, target, voxels, positions, 0, ray_cue, middle_cues)
        rows = max(4, POINTS_PER_BAND // (samples * target.width))
        bands = []
        for top in range(0, target.height, rows):
            bottom = min(top + rows, target.height)
            first, last = max(0, top - REACH), min(target.height, bottom + REACH)
            band = crop(target, 0, first, (target.width, last - first))
            cue = None if ray_cue is None else ray_cue[:, first:last]
            middle_cues = None if table is None else table[rows_at[:, :, first:last].flatten()]
            output = self._shade(features, source, band, voxels, positions[:, :, first:last], first, cue, middle_cues)
            bands.append([getattr(output, f.name)[..., top - first : bottom - first, :] for f in fields(output)])
        return FineOutput(*(torch.cat(parts, -2) for parts in zip(*bands, strict=True)))

    def _shade(
        self,
        features: PyramidFeatures,
        source: Cameras,
        target: Cameras,
        voxels: VoxelLookup,
        positions: Float[Tensor, "batch sample height width"],
        top: int,
        ray_cue: Float[Tensor, "batch height width channel"] | None,
        middle_cues: Float[Tensor, "point middle"] | None,
    ) -> FineOutput:
        """Everything after the draw, for a band of rows that begins at row ``top`` of the distribution's tile."""
        size = (target.height, target.width)
        samples = positions.shape[1]
        u, v = pixel_centers(target.size, positions.device).unbind(-1)
        pixels = torch.stack([u, v + top], -1)
        of_voxels = voxels.at(pixels, positions)
        positions = positions.flatten(2)  # batch sample ray
        near, far = target.near[:, None, None], target.far[:, None, None]
        found = self._match(features, source, target, 1 / near + positions * (1 / far - 1 / near))
        order = torch.arange(samples, device=positions.device, dtype=positions.dtype).add(0.5).div(samples)
        order = order[None, :, None].expand_as(positions).reshape(len(positions), -1, 1)
        cues = torch.cat([found.cues, of_voxels, found.share, positions.flatten(1)[..., None], order], -1)
        tokens = self.embed(cues).unflatten(1, (samples, -1))
        if middle_cues is not None:
            assert self.from_middle is not None
            tokens = tokens + self.from_middle(middle_cues).view_as(tokens)
        if ray_cue is not None:
            tokens = tokens + ray_cue.flatten(1, 2)[:, None]
        tokens = self._mix_over_tile(tokens, size)
        rays = self._composite(tokens, found, positions)

        def as_image(values: Tensor) -> Tensor:
            """[... ray channel] to an image, channels last in memory."""
            return values.unflatten(-2, size).movedim(-1, -3)

        return FineOutput(
            views=as_image(rays.views),
            tokens=as_image(rays.tokens),
            position=rays.position.unflatten(1, size),
            spread=rays.spread.unflatten(1, size),
            opacity=rays.opacity.unflatten(1, size),
        )

    def _composite(
        self,
        tokens: Float[Tensor, "batch sample ray channel"],
        found: Matching,
        positions: Float[Tensor, "batch sample ray"],
    ) -> CompositedRays:
        """Attention along every ray, density, and the weighted sums over its samples."""
        assert found.values is not None
        samples = tokens.shape[1]
        agreement = found.agreement.unflatten(1, (samples, -1))
        if dispatch.usable(positions, found.values, features=tokens) and samples < MANY_SAMPLES:
            return dispatch.composite_rays(self._ray_network(), tokens, agreement, positions, found.values, found.seen)
        tokens = self.attention(tokens)
        sigmas = F.softplus(self.density(tokens)[..., 0].float() + self.similarity_gain * agreement)
        weights, opacity = closed_ray_weights(sigmas.transpose(1, 2))  # batch ray sample
        weights = weights.transpose(1, 2)
        position = (weights * positions).sum(1)
        variance = (weights * (positions - position[:, None]).square()).sum(1)
        # photos take no gradient: cut off here, nothing of the size of all samples flows back through colours
        features, colours = found.values[..., : self.fine_channels], found.values[..., self.fine_channels :].detach()
        parts = (features, colours, found.seen.to(features.dtype)[..., None])
        views = [composite_along_ray(weights[:, None], part.unflatten(2, (samples, -1))) for part in parts]
        return CompositedRays(
            torch.cat(views, -1),
            composite_along_ray(weights, tokens),
            position,
            (variance + 1e-8).sqrt(),
            opacity,
        )

    def _ray_network(self) -> RayNetwork:
        """What a ray's tokens go through."""
        attention, (hidden, _, density) = self.attention, self.density
        assert isinstance(hidden, nn.Linear) and isinstance(density, nn.Linear)
        layers = (attention.norm, attention.to_qkv, attention.out, hidden, density)
        return RayNetwork(attention.heads, *layers, self.similarity_gain, SLOPE)

    def _draw(
        self,
        distribution: DepthDistribution,
        middle: MiddleOutput | None,
        size: tuple[int, int],
        samples: int,
        generator: torch.Generator | None,
    ) -> tuple[Float[Tensor, "batch sample height width"], Int64[Tensor, "batch sample height width"]]:
        """Quantiles of the distribution, as positions in [0, 1] of inverse depth; for each, its row of the middle
        stage's tokens."""
        with torch.no_grad():
            probabilities = distribution.log_probabilities
            batch, rays = probabilities.shape[0], size[0] * size[1]
            quantiles = torch.arange(samples, device=probabilities.device).add(0.5).expand(batch, rays, -1)
            if generator is not None:
                jitter = torch.rand(quantiles.shape, generator=generator, device=probabilities.device)
                quantiles = quantiles + jitter - 0.5
            quantiles = quantiles / samples
            if middle is not None:
                return middle.draw(size, quantiles)
            upsampled = F.interpolate(probabilities.exp(), size=size, mode="bilinear", align_corners=False)
            positions = sample_histogram(upsampled.flatten(2).transpose(1, 2), quantiles)
            positions = positions.transpose(1, 2).unflatten(-1, size)
            return positions, torch.zeros_like(positions, dtype=torch.long)

    def _match(
        self,
        features: PyramidFeatures,
        source: Cameras,
        target: Cameras,
        inverse_depth: Float[Tensor, "batch sample ray"],
    ) -> Matching:
        """Features and colours in every view, compared."""
        A, b = frustum_homography(target, source)
        rays = homography_rays(A, pixel_centers(target.size, target.device).reshape(-1, 2))
        channels, groups = self.fine_channels, self.groups
        return match_views(features.fine, source.size, rays, b, inverse_depth, 1, channels, groups, keep_values=True)

    def _mix_over_tile(
        self, tokens: Float[Tensor, "batch sample ray channel"], size: tuple[int, int]
    ) -> Float[Tensor, "batch sample ray channel"]:
        """Residual 3x3 convolutions over the tile, sample by sample (the i-th quantiles form a smooth sheet)."""
        image = tokens.flatten(0, 1).unflatten(1, size).permute(0, 3, 1, 2)  # channels last in memory
        image = residual(image, self.spatial, self.spatial_out)
        return image.permute(0, 2, 3, 1).reshape(tokens.shape)


class _CompositeAlongRay(torch.autograd.Function):
    """sum_s weights[s] values[s], sample by sample in both directions: nothing of the size of all samples is stored."""

    @staticmethod
    def forward(ctx: Any, weights: Float[Tensor, "... sample ray"], values: Float[Tensor, "... sample ray channel"]):
        ctx.save_for_backward(weights, values)
        total = weights[..., 0, :, None] * values[..., 0, :, :]
        for s in range(1, values.shape[-3]):
            total.addcmul_(weights[..., s, :, None], values[..., s, :, :].to(total.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        weights, values = ctx.saved_tensors
        (gradient,) = gradients
        of_weights = torch.empty_like(values[..., 0], dtype=weights.dtype)
        of_values = torch.empty_like(values) if ctx.needs_input_grad[1] else None
        for s in range(values.shape[-3]):
            of_weights[..., s, :] = (gradient * values[..., s, :, :]).sum(-1)
            if of_values is not None:
                of_values[..., s, :, :] = gradient * weights[..., s, :, None]
        return of_weights.sum_to_size(weights.shape), of_values


def composite_along_ray(
    weights: Float[Tensor, "*#batch sample ray"], values: Float[Tensor, "*batch sample ray channel"]
) -> Float[Tensor, "*batch ray channel"]:
    """Weighted sum over the samples of a ray (NeRF, arXiv 2003.08934, eq. 3, the weights given)."""
    return _CompositeAlongRay.apply(weights, values)


def closed_ray_weights(
    sigmas: Float[Tensor, "*ray sample"],
) -> tuple[Float[Tensor, "*ray sample"], Float[Tensor, "*ray"]]:
    """Compositing weights of a ray that ends at its last sample: they sum to 1. Also the opacity without that end.

    Samples are drawn where the surface is believed to be, so a ray that passed them all has nowhere else to go.
    """
    alphas = alphas_without_intervals(sigmas)
    opacity = 1 - torch.prod(1 - alphas, dim=-1)
    closed = torch.cat([alphas[..., :-1], torch.ones_like(alphas[..., :1])], -1)
    return compositing_weights(closed), opacity
