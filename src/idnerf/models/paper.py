"""The ``paper`` configuration: ID-NeRF's computation, many samples on every ray, colours regressed.

Views(source) -> encode -> PaperFeatures                                     once per set of source views
PaperFeatures, Cameras(target) -> infer_latent -> TargetLatent               once per target view
PaperFeatures, Cameras(target), pixels -> render_pixels -> PixelOutput       per chunk of rays
    rays -> samples -> reprojection -> matching cue, colours, visibility -> radiance field -> compositing
                            '-> view tokens, latent token -> attention --'

Without view refinement, and so without latent, it is MatchNeRF.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from idnerf.compiled import dispatch, gradients
from idnerf.errors import InputError
from idnerf.geometry.cameras import invert_rigid
from idnerf.geometry.precision import full_precision
from idnerf.geometry.rays import pixel_centers, rays_at_pixels
from idnerf.models import matching
from idnerf.models.behaviour import Behaviour, PublishedBehaviour
from idnerf.models.gmflow import GMFlowEncoder, PairMaps, view_pairs
from idnerf.models.latent import (
    ImageLatentInference,
    LatentQuery,
    LatentToken,
    TargetLatent,
    check_latent_options,
)
from idnerf.models.matching import (
    Reprojection,
    corner_products,
    lookup_colours,
    lookup_views,
    matching_cue,
    reproject,
    with_taps,
)
from idnerf.models.radiance_field import RadianceField
from idnerf.models.view_aggregation import ConcatenatedViews, SymmetricViews
from idnerf.models.view_matching import masked_mean_and_variance
from idnerf.models.view_refinement import MapTokens, TokenAttention, attend_with_latent
from idnerf.rendering.compositing import alphas_without_intervals, composite, compositing_weights
from idnerf.types import Cameras, Rays, RenderOutput, Views

LOOKUPS_PER_CHUNK = 6 * 16384
"""Feature lookups of one scale made at once when rendering images: 16,384 points for the 6 maps of 3 views."""
LOOKUPS_PER_CHUNK_ON_GPU = 32 * LOOKUPS_PER_CHUNK
"""The same on a GPU, which has no such cache to stay in and is slow to be told of small pieces: 1.6 GB of features."""
LOOKUPS_PER_TRAINING_CHUNK = 6 * 8192
"""The same in a training step on the CPU, where every chunk is computed again in the backward pass, so that no more
than its samples (some 20 kB each) are kept, and of all samples what the views show there (0.1 to 0.4 kB each)."""
COUNTS = (
    "samples_per_ray",
    "channels",
    "transformer_layers",
    "attention_splits",
    "hidden",
    "field_layers",
    "frequencies",
    "ray_width",
    "ray_heads",
    "view_width",
    "view_heads",
)
"""Options of the `paper` configuration of which there must be one at least."""


def flag(field: str) -> str:
    """A field of ``PaperConfig`` on the command line."""
    return f"--model.paper.{field.replace('_', '-')}"


@dataclass(frozen=True)
class PaperConfig:
    """Numbers of the ``paper`` configuration; the defaults are MatchNeRF's; the presets `idnerf-*` have ID-NeRF's."""

    samples_per_ray: int = 128
    """Samples on every ray, between near and far of the target camera."""
    channels: int = 128
    """Width of the feature maps."""
    transformer_layers: int = 6
    """Cross-view transformer blocks of the encoder."""
    attention_splits: int = 2
    """Windows per side of the 1/8 map in the encoder's attention."""
    groups: tuple[int, int] = (2, 8)
    """Groups of channels in the similarity of the 1/8 and of the 1/4 maps."""
    hidden: int = 128
    """Width of the radiance field."""
    field_layers: int = 6
    """Layers of the radiance field."""
    field_skip: int = 4
    """The position comes in again after the layer of this index."""
    frequencies: int = 10
    """Octaves of the position encoding."""
    ray_width: int = 16
    """Width of the ray transformer."""
    ray_heads: int = 4
    """Heads of the ray transformer."""
    view_aggregation: Literal["symmetric", "concatenate"] = "symmetric"
    """How the views' colours are joined: any number of views in any order, or MatchNeRF's fixed layout."""
    num_views: int = 3
    """Number of source views of the fixed layout; only read with ``view_aggregation=concatenate``."""
    view_refinement: bool = False
    """Attention among the views' tokens (and the latent's) at every sample; without it this is MatchNeRF."""
    view_width: int = 8
    """Width of these tokens."""
    view_heads: int = 4
    """Heads of that attention, each 4 wide."""
    latent_query: LatentQuery = "none"
    """How a sample reads the target-view latent: `none` has no latent; `global` as one vector; `pixel` at its ray."""
    latent_size: tuple[int, int] | None = (64, 64)
    """Size of the latent (width, height) in cells, over the whole target; none: an eighth of the target."""
    published_behaviour: bool = False
    """Follow the conventions the released weights were trained with instead of ours (docs/matchnerf.md)."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)}: expected 1 or more, got {getattr(self, name)}")
        if self.hidden < 2:
            raise InputError(f"{flag('hidden')}: expected 2 or more, got {self.hidden}; colour comes from half of it")
        if self.num_views < 2:
            raise InputError(f"{flag('num_views')}: expected 2 or more, got {self.num_views}; matching needs two views")
        if self.published_behaviour and self.view_aggregation != "concatenate":
            raise InputError(
                f"{flag('published_behaviour')}: expected {flag('view_aggregation')} concatenate with it, got "
                f"{self.view_aggregation}; only the published layout has published weights"
            )
        if self.channels % 4 or any(count < 1 or self.channels % count for count in self.groups):
            raise InputError(
                f"{flag('groups')}: expected divisors of {flag('channels')} {self.channels} (a multiple of 4), got "
                f"{self.groups[0]} {self.groups[1]}; change either"
            )
        if not 0 <= self.field_skip < self.field_layers - 1:
            raise InputError(
                f"{flag('field_skip')}: expected 0 or more, and {flag('field_layers')} at least 2 more than it; got "
                f"{self.field_skip} and {self.field_layers}"
            )
        if self.ray_width % self.ray_heads:
            raise InputError(
                f"{flag('ray_heads')}: expected a divisor of {flag('ray_width')} {self.ray_width}, got "
                f"{self.ray_heads}; change either"
            )
        check_latent_options(self.latent_query, self.view_refinement, self.latent_size, "model.paper")


@dataclass(frozen=True)
class PaperFeatures:
    """What is known of a set of source views.

    Attributes:
        maps: feature maps of every pair of views.
        images: source images, channels last.
        cameras: [batch view] source cameras, as the weights see them.
        token_maps: what the view tokens take from ``maps``, at 1/8 and 1/4; None without view refinement.
    """

    maps: PairMaps
    images: Float[Tensor, "batch view height width 3"]
    cameras: Cameras
    token_maps: tuple[Float[Tensor, "batch view h8 w8 token"], Float[Tensor, "batch view h4 w4 token"]] | None = None


@dataclass(frozen=True)
class SeenSamples:
    """What the source views show at the samples of rays, one ray after the other.

    Attributes:
        reprojection: where they land.
        colours: of the views there, meaningless where not visible.
        cue: how much pairs of views agree.
        tokens: what the token maps hold there, both scales together; None without view refinement, and where compiled
            kernels look them up later.
    """

    reprojection: Reprojection
    colours: Float[Tensor, "batch view point 3"]
    cue: Float[Tensor, "batch point group"]
    tokens: Float[Tensor, "batch view point token"] | None

    def split(self, size: int) -> "list[SeenSamples]":
        """Pieces of ``size`` points."""
        where = self.reprojection
        pixels, visible, colours = (x.split(size, 2) for x in (where.pixels, where.visible, self.colours))
        cues = self.cue.split(size, 1)
        tokens = [None] * len(cues) if self.tokens is None else self.tokens.split(size, 2)
        pieces = zip(pixels, visible, colours, cues, tokens, strict=True)
        return [SeenSamples(Reprojection(at, seen), rgb, cue, token) for at, seen, rgb, cue, token in pieces]


@dataclass(frozen=True)
class PixelOutput:
    """Rendered rays: colour in [0, 1], expected depth (z), opacity in [0, 1]."""

    rgb: Float[Tensor, "batch ray 3"]
    depth: Float[Tensor, "batch ray"]
    opacity: Float[Tensor, "batch ray"]


class PaperModel(nn.Module):
    """MatchNeRF and ID-NeRF for any number of source views from 2 up, any batch and any image size."""

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        self.config = config
        self.behaviour: Behaviour = PublishedBehaviour() if config.published_behaviour else Behaviour()
        self.encoder = GMFlowEncoder(config.channels, config.transformer_layers, config.attention_splits)
        self.aggregation = (
            SymmetricViews() if config.view_aggregation == "symmetric" else ConcatenatedViews(config.num_views)
        )
        self.latent = None if config.latent_query == "none" else ImageLatentInference(config.latent_size)
        self.refinement = Refinement(config) if config.view_refinement else None
        self.field = RadianceField(
            sum(config.groups) + self.aggregation.width + (self.refinement.width if self.refinement else 0),
            hidden=config.hidden,
            layers=config.field_layers,
            skip=config.field_skip,
            frequencies=config.frequencies,
            ray_width=config.ray_width,
            ray_heads=config.ray_heads,
        )

    def encode(self, source: Views) -> PaperFeatures:
        """Features of source views [batch view], once per set of views.

        Raises:
            InputError: fewer than 2 views, or another number than the weights' fixed layout has.
        """
        views = source.cameras.shape[1]
        if views < 2:
            raise InputError(f"source views: expected 2 or more, got {views}; matching needs a pair of views.")
        if self.config.view_aggregation == "concatenate" and views != self.config.num_views:
            raise InputError(
                f"source views: these weights expect {self.config.num_views}, got {views}; "
                f"give {self.config.num_views} views, or weights with symmetric view aggregation."
            )
        maps = self.encoder(source.images)
        compiled = dispatch.usable(*maps.scales)  # computes lengths where it looks features up
        if maps.coarse.device.type == "cpu" and not torch.is_grad_enabled() and not compiled:
            coarse, fine = (corner_products(m, g) for m, g in zip(maps.scales, self.config.groups, strict=True))
            maps = replace(maps, products=(coarse, fine))
        return PaperFeatures(
            maps,
            source.images.permute(0, 1, 3, 4, 2).contiguous(),
            self.behaviour.cameras(source.cameras),
            self.refinement.tokens.maps(maps) if self.refinement else None,
        )

    @full_precision
    def infer_latent(self, features: PaperFeatures, target: Cameras) -> TargetLatent | None:
        """The latent of whole [batch] targets, not of a crop; None where the configuration has none (MatchNeRF)."""
        if self.latent is None:
            return None
        return self.latent(features.images.permute(0, 1, 4, 2, 3), features.cameras, self.behaviour.cameras(target))

    @full_precision
    def render_pixels(
        self,
        features: PaperFeatures,
        target: Cameras,
        pixels: Float[Tensor, "batch ray 2"],
        *,
        latent: TargetLatent | None = None,
        generator: torch.Generator | None = None,
    ) -> PixelOutput:
        """Render the rays through ``pixels`` (centres at +0.5) of each [batch] target camera; differentiable.

        Memory grows with rays x samples x pairs of views. ``generator`` given: samples are drawn at random in
        their bins, as in training. ``latent``: of the target or of what it was cropped from; None infers it.
        """
        latent = self.infer_latent(features, target) if latent is None else latent
        target = self.behaviour.cameras(target)
        latent_token = None if latent is None or not self.refinement else self.refinement.read(latent, target, pixels)
        rays = rays_at_pixels(target, pixels)
        count = self.config.samples_per_ray
        depths = self.behaviour.sample_depths(target, pixels.shape[1], count, generator)
        parts, seen = [(rays, depths, latent_token)], [None]
        if torch.is_grad_enabled() and pixels.device.type == "cpu":
            batch, view = features.cameras.shape
            size = self._rays_per_chunk(batch, view, LOOKUPS_PER_TRAINING_CHUNK)
            parts = [
                _some_rays(rays, depths, latent_token, slice(i, i + size)) for i in range(0, pixels.shape[1], size)
            ]
            if gradients.chosen(*features.maps.scales) is None:
                seen *= len(parts)
            else:  # compiled lookups keep little for the backward pass: once for all rays
                seen = self._look_up(features, samples_of(rays, depths).flatten(1, 2)).split(size * count)
        outputs = [
            self._composited(features, target, *part, shown, again=len(parts) > 1)
            for part, shown in zip(parts, seen, strict=True)
        ]
        if len(outputs) == 1:
            return outputs[0]
        return PixelOutput(
            torch.cat([output.rgb for output in outputs], 1),
            torch.cat([output.depth for output in outputs], 1),
            torch.cat([output.opacity for output in outputs], 1),
        )

    def render_tile(
        self, features: PaperFeatures, target: Cameras, *, latent: TargetLatent | None = None
    ) -> RenderOutput:
        """Render all pixels of [batch] (cropped) target cameras, in chunks of rays of bounded memory."""
        batch, views = features.cameras.shape
        latent = self.infer_latent(features, target) if latent is None else latent
        pixels = pixel_centers(target.size, target.device).reshape(1, -1, 2).expand(batch, -1, -1)
        chunks = pixels.split(self._rays_per_chunk(batch, views, lookups_per_chunk(target.device)), dim=1)
        parts = [self.render_pixels(features, target, chunk, latent=latent) for chunk in chunks]
        image = (target.height, target.width)
        return RenderOutput(
            torch.cat([part.rgb for part in parts], 1).transpose(1, 2).unflatten(-1, image),
            torch.cat([part.depth for part in parts], 1).unflatten(-1, image),
            torch.cat([part.opacity for part in parts], 1).unflatten(-1, image),
        )

    def _rays_per_chunk(self, batch: int, views: int, lookups: int) -> int:
        return max(1, lookups // (batch * 2 * len(view_pairs(views)) * self.config.samples_per_ray))

    def _composited(
        self,
        features: PaperFeatures,
        target: Cameras,
        rays: Rays,
        depths: Float[Tensor, "batch ray sample"],
        latent_token: Float[Tensor, "batch ray token"] | None,
        seen: SeenSamples | None,
        *,
        again: bool,
    ) -> PixelOutput:
        """Colour, depth and opacity of rays.

        Args:
            seen: what the views show at the samples; None looks it up.
            again: nothing is kept for the backward pass, which starts afresh.
        """
        if again:
            return checkpoint(
                lambda: self._composited(features, target, rays, depths, latent_token, seen, again=False),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        points = samples_of(rays, depths)
        seen = self._look_up(features, points.flatten(1, 2)) if seen is None else seen
        colours, raw = self._query_field(features, target, points, rays.directions, latent_token, seen)
        weights = compositing_weights(alphas_without_intervals(self.behaviour.sigmas(raw)))
        depth = self.behaviour.expected_depth(weights, depths)
        return PixelOutput(composite(weights, colours), depth, weights.sum(-1))

    def _look_up(self, features: PaperFeatures, points: Float[Tensor, "batch point 3"]) -> SeenSamples:
        reprojection = with_taps(reproject(points, features.cameras, self.behaviour), features.maps, self.behaviour)
        return SeenSamples(
            reprojection,
            lookup_colours(features.images, reprojection.pixels),
            matching_cue(features.maps, reprojection, self.config.groups, self.behaviour),
            None if self.refinement is None else self.refinement.look_up(features, reprojection, self.behaviour),
        )

    def _query_field(
        self,
        features: PaperFeatures,
        target: Cameras,
        points: Float[Tensor, "batch ray sample 3"],
        directions: Float[Tensor, "batch ray 3"],
        latent_token: Float[Tensor, "batch ray token"] | None,
        seen: SeenSamples,
    ) -> tuple[Float[Tensor, "batch ray sample 3"], Float[Tensor, "batch ray sample"]]:
        """Colours and raw densities at the samples of rays with unit directions in the world."""
        batch, rays, samples, _ = points.shape
        flat, visible = points.flatten(1, 2), seen.reprojection.visible
        if isinstance(self.aggregation, SymmetricViews):
            world_to_target = invert_rigid(target.c2w)[:, :3, :3]
            of_views = self.aggregation.along_rays(
                seen.colours, visible, flat, features.cameras.centers, directions, world_to_target
            )
        else:
            of_views = self.aggregation(seen.colours, visible)
        condition = [seen.cue, of_views]
        if self.refinement:
            condition.append(self.refinement(features, seen, latent_token, self.behaviour))
        # Views in any order need a frame free of the order; MatchNeRF's is the first source's.
        frame = target if self.config.view_aggregation == "symmetric" else features.cameras[:, 0]
        positions = self.behaviour.frame_coordinates(flat, frame)
        seen_by = visible.sum(1).float().reshape(batch * rays, samples)
        colours, raw = self._field_in_pieces(
            positions.reshape(batch * rays, samples, 3),
            (directions @ frame.c2w[:, :3, :3]).flatten(0, 1),
            torch.cat(condition, -1).reshape(batch * rays, samples, -1),
            *self.behaviour.attention_masks(seen_by),
        )
        return colours.unflatten(0, (batch, rays)), raw.unflatten(0, (batch, rays))

    def _field_in_pieces(
        self, positions: Float[Tensor, "ray sample 3"], *others: Tensor | None
    ) -> tuple[Float[Tensor, "ray sample 3"], Float[Tensor, "ray sample"]]:
        """The field at rays; on the CPU, without gradient, a few rays at a time, which stay in the cache."""
        if positions.device.type != "cpu" or torch.is_grad_enabled():
            return self.field(positions, *others)
        size = max(1, matching.CACHED_POINTS // positions.shape[1])
        pieces = [
            self.field(*(None if x is None else x[i : i + size] for x in (positions, *others)))
            for i in range(0, len(positions), size)
        ]
        colours, raw = zip(*pieces, strict=True)
        return torch.cat(colours), torch.cat(raw)


def lookups_per_chunk(device: torch.device) -> int:
    """Feature lookups of one scale made at once when rendering images."""
    return LOOKUPS_PER_CHUNK if device.type == "cpu" else LOOKUPS_PER_CHUNK_ON_GPU


def samples_of(rays: Rays, depths: Float[Tensor, "batch ray sample"]) -> Float[Tensor, "batch ray sample 3"]:
    """The points of rays at depths (z) of the target camera."""
    return rays.origins[:, :, None] + rays.directions[:, :, None] * (depths / rays.cos[..., None])[..., None]


def _some_rays(
    rays: Rays,
    depths: Float[Tensor, "batch ray sample"],
    latent_token: Float[Tensor, "batch ray token"] | None,
    some: slice,
) -> tuple[Rays, Float[Tensor, "batch some sample"], Float[Tensor, "batch some token"] | None]:
    part = Rays(rays.origins[:, some], rays.directions[:, some], rays.cos[:, some])
    return part, depths[:, some], None if latent_token is None else latent_token[:, some]


class Refinement(nn.Module):
    """Tokens of the views and of the latent, attention among them, and what the radiance field is told of the result.

    Symmetric views: mean and variance of the refined tokens of the views that see the point; else all of them in order.
    The latent's refined token follows.
    """

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        self.symmetric = config.view_aggregation == "symmetric"
        self.tokens = MapTokens(config.channels, config.view_width)
        self.latent_token = (
            None if config.latent_query == "none" else LatentToken(config.latent_query, config.view_width)
        )
        self.attention = TokenAttention(config.view_width, config.view_heads)
        of_views = 2 if self.symmetric else config.num_views
        self.width = config.view_width * (of_views + (self.latent_token is not None))

    def read(
        self, latent: TargetLatent, target: Cameras, pixels: Float[Tensor, "batch ray 2"]
    ) -> Float[Tensor, "batch ray token"] | None:
        """The latent's token for each ray; None where the configuration reads none."""
        return None if self.latent_token is None else self.latent_token(latent, target, pixels)

    def look_up(
        self, features: PaperFeatures, reprojection: Reprojection, behaviour: Behaviour
    ) -> Float[Tensor, "batch view point token"] | None:
        """What the token maps hold, both scales together; None where ``forward`` looks them up in compiled code."""
        assert features.token_maps is not None
        if dispatch.usable(*features.token_maps, reprojection.pixels):
            return None
        coarse, fine = (
            lookup_views(maps, reprojection, level, features.maps.padded_size, behaviour)
            for level, maps in enumerate(features.token_maps)
        )
        return coarse + fine

    def forward(
        self,
        features: PaperFeatures,
        seen: SeenSamples,
        latent_token: Float[Tensor, "batch ray token"] | None,
        behaviour: Behaviour,
    ) -> Float[Tensor, "batch point width"]:
        """Args: ``seen`` at points, equally many on each ray, and ``latent_token`` of the rays.

        Without gradients, on a CPU and with numba installed, point by point in compiled code.
        """
        visible, colours = seen.reprojection.visible, seen.colours
        if seen.tokens is None:
            assert features.token_maps is not None
            coarse, fine = (
                behaviour.map_positions(seen.reprojection.pixels, features.maps.padded_size, (m.shape[3], m.shape[2]))
                for m in features.token_maps
            )
            a = self.attention
            network = dispatch.TokenNetwork(self.tokens.of_colour, a.to_qkv, a.heads, a.merge, a.norm, self.symmetric)
            return dispatch.refine_views(network, features.token_maps, (coarse, fine), colours, visible, latent_token)
        if latent_token is not None:
            latent_token = latent_token.repeat_interleave(colours.shape[2] // latent_token.shape[1], 1)
        tokens = self.tokens(seen.tokens, colours, visible)
        views, latent = attend_with_latent(self.attention, tokens, visible, latent_token)
        in_order = views.transpose(1, 2).flatten(2)
        parts = masked_mean_and_variance(views, visible) if self.symmetric else (in_order,)
        return torch.cat(parts if latent is None else (*parts, latent), -1)
