"""The `cascade` configuration, our default: coarse frustum volume, few samples, blended colours, refinement.

source images --FeaturePyramid--> PyramidFeatures                      once per set of source views
target tile   --FrustumVolume---> DepthDistribution at 1/4             once per tile
              --MiddleStage-----> the same at 1/2, sharper
              --FineSamples-----> weights along the ray                8 samples a ray
              --occlusion-------> which views see the surface found
              --ViewBlending----> blended colour
              --ImageRefinement-> colour, confidence
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.errors import InputError
from idnerf.geometry.cameras import crop, halve
from idnerf.models.activation import start_at_unit_gain
from idnerf.models.cross_view_mixing import CrossViewMixing
from idnerf.models.depth_range import fitted_path, fitted_range, photo_texture
from idnerf.models.feature_pyramid import FeaturePyramid, PyramidFeatures
from idnerf.models.fine_samples import FineOutput, FineSamples
from idnerf.models.frustum_volume import MIRRORED_AXES, DepthDistribution, FrustumVolume
from idnerf.models.image_refinement import ImageRefinement, confidence_of
from idnerf.models.latent import FrustumLatentInference, LatentQuery, TargetLatent, check_latent_options
from idnerf.models.middle_stage import MiddleOutput, MiddleStage
from idnerf.models.occlusion import without_occluded
from idnerf.models.view_blending import ViewBlending
from idnerf.models.view_refinement import PixelRefinement
from idnerf.types import Cameras, RenderOutput, Views

Quality = Literal["full", "fast"]


DEEPER_SCALES = 2
"""More of the image-space refinement do not fit tiles of ``Cascade.tile_stride``."""


def flag(field: str) -> str:
    """A field's name on the command line."""
    return field.replace("_", "-")


@dataclass(frozen=True)
class CascadeConfig:
    """Sizes of the cascade. Every N >= 2 of source views and every image size share one set of weights."""

    pyramid_widths: tuple[int, int, int, int, int] = (16, 32, 64, 96, 128)
    """Encoder channels at scales 1, 1/2, 1/4, 1/8, 1/16."""
    cross_view_layers: int = 0
    """Blocks of GMFlow's windowed attention among the views at 1/8; 0: every view is encoded by itself."""
    coarse_channels: int = 32
    """Matching features at 1/4."""
    coarse_groups: int = 8
    """Groups of the coarse group-wise similarity."""
    halvings: int = 2
    """The coarse volume matches the photos halved so often too: their cells know more of what surrounds them."""
    middle_channels: int = 16
    """Matching features at 1/2."""
    middle_groups: int = 4
    """Groups of the middle group-wise similarity."""
    fine_channels: int = 12
    """Matching features at full resolution (with the colour they fill 15 numbers, one cache line)."""
    fine_groups: int = 3
    """Groups of the fine group-wise similarity."""
    volume_widths: tuple[int, ...] = (16, 32, 48, 64)
    """3D U-Net channels at strides 1, 2, 4, 8 of the coarse volume."""
    volume_blocks: tuple[int, ...] = ()
    """Further residual blocks at strides 1, 2, 4, 8 of the coarse volume; none where there is no number."""
    voxel_channels: int = 8
    """Features that the coarse volume hands to the samples."""
    middle_widths: tuple[int, int] = (16, 32)
    """3D U-Net channels at 1/2 and 1/4 of the middle stage."""
    token_width: int = 32
    """Channels of a sample token."""
    blend_width: int = 16
    """Hidden channels of the per-view blending weights."""
    context_blending: bool = True
    """Blend once more with the context of the image-space refinement."""
    refinement_widths: tuple[int, int, int] = (32, 48, 64)
    """Image-space refinement channels at scales 1, 1/2, 1/4."""
    refinement_deeper: tuple[int, ...] = ()
    """Its channels at 1/8 and 1/16; without a number it has no such scale."""
    view_refinement: bool = False
    """Attention among the views' tokens (and the latent's) at every pixel, before blending."""
    view_width: int = 8
    """Width of these tokens."""
    view_heads: int = 2
    """Heads of that attention, each 4 wide."""
    latent_query: LatentQuery = "none"
    """How a pixel reads the target-view latent: `none` has no latent; `global` as one vector; `pixel` at its place."""
    latent_size: tuple[int, int] | None = None
    """Size of the latent (width, height) in cells, over the whole target; none: an eighth of the target. Training on
    tiles needs none."""
    latent_planes: int = 8
    """Inverse depths at which the latent looks the source views up."""
    half_size_share: float = 0.0
    """Depth is found at half the size of photos and target too, where plain surfaces are half as many cells wide, and
    so much of it, 0 to 1, is given to cells that are unsure at full size."""
    enlarge_up_to: int = 0
    """Source photos of at most so many pixels are enlarged to twice their width and height before they are encoded for
    rendering. It takes weights that were trained so, with a share of the steps (`--enlarged-share`)."""
    full_size_depth_up_to: int = 0
    """Targets of more pixels find depth at half their size; only the samples along rays, colours and refinement are at
    full size: what no window of training was as wide as, the network does not see in one piece. 0: none does."""
    occlusion_tolerance: float = 0.0
    """A source view does not count as seeing a pixel where another pixel's surface lies nearer to the view by more than
    this share of the range of inverse depth, and less and less from there to twice as much. 0: what lies inside its
    photo it sees."""
    planes: int = 48
    """Coarse inverse depths, quality `full`."""
    middle_hypotheses: int = 16
    """Depth hypotheses per half-resolution pixel, quality `full`; 0: no middle stage."""
    samples: int = 8
    """Samples per ray, quality `full`."""
    mirrorings: int = 1
    """Mirror images of the coarse volume, 1 to 4, over which its network's mean is taken in rendering, quality `full`:
    what it finds where photos say little is partly chance, and another chance in each. Training takes one."""
    planes_fast: int = 32
    """Coarse inverse depths, quality `fast`."""
    middle_hypotheses_fast: int = 8
    """Depth hypotheses per half-resolution pixel, quality `fast`."""
    samples_fast: int = 4
    """Samples per ray, quality `fast`."""
    mirrorings_fast: int = 1
    """Mirror images of the coarse volume, quality `fast`."""

    def __post_init__(self) -> None:
        check_latent_options(self.latent_query, self.view_refinement, self.latent_size, "model.cascade")
        if not 0 <= self.half_size_share <= 1:
            raise InputError(f"--model.cascade.half-size-share: expected a share in [0, 1], got {self.half_size_share}")
        if not 0 <= self.occlusion_tolerance <= 1:
            raise InputError(
                "--model.cascade.occlusion-tolerance: expected a share of the range of inverse depth in [0, 1], got "
                f"{self.occlusion_tolerance}"
            )
        others = ("view_refinement", "latent_query", "latent_size", "context_blending")
        others = (*others, "half_size_share", "occlusion_tolerance")
        for name, value in dataclasses.asdict(self).items():
            if name in others:
                continue
            if name in ("volume_blocks", "refinement_deeper"):
                most, least = (len(self.volume_widths), 0) if name == "volume_blocks" else (DEEPER_SCALES, 1)
                if len(value) > most or min(value, default=least) < least:
                    raise InputError(
                        f"--model.cascade.{flag(name)}: expected at most {most} numbers of {least} or more, got {value}"
                    )
                continue
            if name.startswith("mirrorings"):
                if not 1 <= value <= len(MIRRORED_AXES):
                    raise InputError(f"--model.cascade.{flag(name)}: expected 1 to {len(MIRRORED_AXES)}, got {value}")
                continue
            if name in ("cross_view_layers", "middle_hypotheses", "enlarge_up_to", "full_size_depth_up_to", "halvings"):
                if value < 0:
                    raise InputError(f"--model.cascade.{flag(name)}: expected 0 or more, got {value}")
                continue
            widths = value if isinstance(value, list | tuple) else [value]
            least = 2 if name == "token_width" else 1  # density comes from half of a token
            if not widths or min(widths) < least:
                raise InputError(f"--model.cascade.{flag(name)}: expected {least} or more, got {value}")
        if self.cross_view_layers and self.pyramid_widths[3] % 4:
            raise InputError(
                "--model.cascade.pyramid-widths: expected a multiple of 4 as the fourth number with "
                f"--model.cascade.cross-view-layers, got {self.pyramid_widths[3]}"
            )
        for part in ("coarse", "middle", "fine"):
            channels, groups = getattr(self, f"{part}_channels"), getattr(self, f"{part}_groups")
            if channels % groups:
                raise InputError(
                    f"--model.cascade.{part}-groups: expected a divisor of --model.cascade.{part}-channels {channels}, "
                    f"got {groups}"
                )


@dataclass(frozen=True)
class CascadeFeatures:
    """What is computed once per set of source views."""

    pyramid: PyramidFeatures
    cameras: Cameras
    latent_maps: Float[Tensor, "batch view height4 width4 channel"] | None = None
    """What the latent looks up; None without latent."""
    enlargement: int = 1
    """Of the photos before they were encoded; ``cameras`` are those of the enlarged ones."""

    @cached_property
    def texture(self) -> Float[Tensor, "image height4 width4"]:
        """Of the photos, for the range of depths that targets need: made for the first one."""
        return photo_texture(self.pyramid, self.enlargement)


@dataclass(frozen=True)
class CascadeOutput:
    """Every stage's result for a target tile, for the losses; ``render`` is what a user sees.

    ``coarse`` are the coarse distributions as found, at full size and, where wanted, at half; ``distribution`` is what
    the finer stages take from them.
    """

    render: RenderOutput
    blended: Float[Tensor, "batch 3 height width"]
    fine: FineOutput
    distribution: DepthDistribution
    coarse: tuple[DepthDistribution, ...]
    error_scale: Float[Tensor, "batch height width"]
    middle: MiddleOutput | None = None
    latent: TargetLatent | None = None


class Cascade(nn.Module):
    """Feed-forward view synthesis in the target camera's frustum."""

    tile_stride = 16
    """Tiles are computed at multiples of this size and cut back."""

    def __init__(self, config: CascadeConfig):
        super().__init__()
        self.config = config
        c = config
        self.encoder = FeaturePyramid(
            c.pyramid_widths, c.coarse_channels, c.coarse_groups, c.fine_channels, c.fine_groups
        )
        self.volume = FrustumVolume(c.coarse_channels, c.coarse_groups, c.volume_widths, c.voxel_channels)
        self.samples = FineSamples(c.fine_channels, c.fine_groups, c.voxel_channels, c.token_width)
        self.blending = ViewBlending(c.fine_channels, c.token_width, c.blend_width)
        self.refinement = ImageRefinement(c.token_width, c.refinement_widths)
        start_at_unit_gain(self)
        # last, so that at a given seed the parts above start alike with and without them
        self.middle: MiddleStage | None = None
        if c.middle_hypotheses:
            self.middle = MiddleStage(c.middle_channels, c.middle_groups, c.voxel_channels, c.middle_widths)
            self.encoder.add_middle(c.middle_channels, c.middle_groups)
            self.samples.add_middle(c.middle_widths[0])
            start_at_unit_gain(self.middle)
        if c.context_blending:
            self.refinement.add_context_blending(c.blend_width)
        self.volume.unet.add_blocks(c.volume_blocks)
        if c.refinement_deeper:
            self.refinement.add_scales(c.refinement_deeper)
        self.encoder.halvings = c.halvings + (c.half_size_share > 0)
        self.volume.add_halved(c.halvings)
        if c.cross_view_layers:
            self.encoder.mixing = CrossViewMixing(c.pyramid_widths[3], c.cross_view_layers)
        self.view_refinement = (
            PixelRefinement(
                c.fine_channels + 4,
                c.view_width,
                c.view_heads,
                c.latent_query,
                c.token_width,
                c.blend_width,
                c.refinement_widths[0],
            )
            if c.view_refinement
            else None
        )
        has_latent = c.latent_query != "none"
        self.latent = FrustumLatentInference(c.coarse_channels, c.latent_size, c.latent_planes) if has_latent else None

    def encode(self, source: Views) -> CascadeFeatures:
        """Args: source views [batch view]."""
        if source.cameras.shape[1] < 2:
            raise InputError(f"expected at least 2 source views, got {source.cameras.shape[1]}: give more photos")
        pyramid = self.encoder(source.images)
        latent_maps = None if self.latent is None else self.latent.view_maps(source.images, pyramid.coarse)
        return CascadeFeatures(pyramid, source.cameras, latent_maps)

    def infer_latent(self, features: CascadeFeatures, target: Cameras) -> TargetLatent | None:
        """The latent of [batch] targets; None where the configuration has none."""
        if self.latent is None or features.latent_maps is None:
            return None
        return self.latent(features.latent_maps, features.cameras, target)

    def fit_range(self, features: CascadeFeatures, target: Cameras, quality: Quality = "full") -> Cameras:
        """Whole targets [batch] with near and far moved apart where the sources show surfaces beyond them."""
        planes = self.config.planes if quality == "full" else self.config.planes_fast
        enlargement, texture = features.enlargement, features.texture
        return fitted_range(self.volume, features.pyramid, features.cameras, target, planes, enlargement, texture)

    def fit_path(self, features: CascadeFeatures, path: Cameras, quality: Quality = "full") -> Cameras:
        """The cameras [frame] of one path with near and far moved alike in all frames, where enough of them need it."""
        return fitted_path(lambda camera: self.fit_range(features, camera, quality), path)

    def has_half_size_depth(self, target: Cameras) -> bool:
        """Whether depth of a whole target is to be found at half its size."""
        return 0 < self.config.full_size_depth_up_to < target.width * target.height

    def _coarse_distributions(
        self, features: CascadeFeatures, tile: Cameras, planes: int, mirrorings: int
    ) -> tuple[DepthDistribution, ...]:
        """At 1/4 of the tile and, with ``half_size_share``, at 1/8 of it."""
        training = torch.is_grad_enabled()
        mirrorings = 1 if training else mirrorings
        found = self.volume(features.pyramid, features.cameras, tile, planes, mirrorings)
        if self.config.half_size_share == 0:
            return (found,)
        halved, cameras = features.pyramid.of_halved_photos(), halve(features.cameras)
        if not training:
            return found, self.volume(halved, cameras, halve(tile), planes, mirrorings)
        # training's tile is a window: as much around it as there is in the images that rendering sees
        width, height = tile.size
        around = crop(tile, -width // 2, -height // 2, (2 * width, 2 * height))
        return found, self.volume(halved, cameras, halve(around), planes).middle_half()

    def forward(
        self,
        features: CascadeFeatures,
        target: Cameras,
        *,
        quality: Quality = "full",
        latent: TargetLatent | None = None,
        generator: torch.Generator | None = None,
        half_size_depth: bool = False,
    ) -> CascadeOutput:
        """All stages for a target tile [batch]; ``generator`` jitters the samples (training).

        ``latent``: of the whole target that the tile was cut from; None infers it for the tile. ``half_size_depth``:
        coarse and middle stage see the tile at half its size.
        """
        c = self.config
        full = quality == "full"
        planes, samples = (c.planes, c.samples) if full else (c.planes_fast, c.samples_fast)
        width, height = target.size
        padded = (width + -width % self.tile_stride, height + -height % self.tile_stride)
        tile = crop(target, 0, 0, padded)
        depth_tile = halve(tile) if half_size_depth else tile
        coarse = self._coarse_distributions(features, depth_tile, planes, c.mirrorings if full else c.mirrorings_fast)
        distribution = coarse[0] if len(coarse) == 1 else coarse[0].mixed(coarse[1], c.half_size_share)
        latent = self.infer_latent(features, target) if latent is None else latent
        refine = self.view_refinement
        token = None if refine is None else refine.read(latent, tile)
        cue = None if refine is None else refine.ray_cue(token)
        middle = None
        if self.middle is not None:
            hypotheses = c.middle_hypotheses if full else c.middle_hypotheses_fast
            middle = self.middle(features.pyramid, features.cameras, depth_tile, distribution, hypotheses, generator)
        fine = self.samples(features.pyramid, features.cameras, tile, distribution, samples, generator, cue, middle)
        if c.occlusion_tolerance:
            fine = without_occluded(fine, features.cameras, tile, c.occlusion_tolerance)
        refined = None if refine is None else refine(fine, token)
        to_blending, to_image = (refined.to_blending, refined.to_image) if refined else (None, None)
        blend = self.blending(fine, features.cameras, tile, to_blending)
        rgb, scale = self.refinement(fine, blend, to_image)
        near, far = tile.near[:, None, None], tile.far[:, None, None]
        output = RenderOutput(
            rgb=rgb,
            depth=1 / (1 / near + fine.position * (1 / far - 1 / near)),
            opacity=fine.opacity,
            confidence=confidence_of(scale),
        )
        output = output.map(lambda x: x[..., :height, :width])
        return CascadeOutput(output, blend.rgb, fine, distribution, coarse, scale, middle, latent)

    def render_tile(
        self,
        features: CascadeFeatures,
        target: Cameras,
        *,
        quality: Quality = "full",
        latent: TargetLatent | None = None,
        half_size_depth: bool = False,
    ) -> RenderOutput:
        """Colour in [0, 1], depth, opacity and confidence of a target tile [batch]."""
        output = self(features, target, quality=quality, latent=latent, half_size_depth=half_size_depth).render
        return RenderOutput(output.rgb.clamp(0, 1), output.depth, output.opacity, output.confidence)
