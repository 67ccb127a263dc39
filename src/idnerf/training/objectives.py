"""What a configuration is trained for: a batch in, named loss terms and a few measures out.

The cascade renders a whole tile (so SSIM applies) and is told the exact depth where the data knows it; the paper
configuration renders scattered rays and is told colours only.
"""

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.models.cascade import Cascade, CascadeFeatures, Quality
from idnerf.models.enlargement import enlarged
from idnerf.models.frustum_volume import FrustumVolume
from idnerf.models.idnerf import IDNeRF
from idnerf.models.latent import TargetLatent
from idnerf.models.paper import PaperModel
from idnerf.training.examples import TileBatch
from idnerf.training.losses import (
    Weights,
    bin_cross_entropy,
    charbonnier,
    depth_histogram,
    inverse_depth_position,
    laplace_negative_log_likelihood,
    mean_squared_error,
    ssim_loss,
)
from idnerf.types import Batch


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms (a weight of 0 leaves the term out), and a factor on some pixels."""

    mse: float = 1.0
    """Mean squared error of the final colour."""
    charbonnier: float = 0.0
    """Charbonnier (smooth L1) error of the final colour."""
    ssim: float = 0.0
    """(1 - SSIM) / 2 of the final colour; tiles only."""
    blend: float = 0.0
    """Charbonnier error of the blended colour before the image-space refinement; cascade only."""
    depth_distribution: float = 0.0
    """Cross-entropy of the coarse depth distributions, and of the middle stage's, against exact depth; cascade only."""
    depth: float = 0.0
    """Absolute error of the expected position in inverse depth, in units of near-to-far; cascade only."""
    confidence: float = 0.0
    """Negative log-likelihood of the error that the model predicts for its own colour; cascade only."""
    unseen: float = 1.0
    """Factor on the colour errors of pixels that fewer than two sources see, where the data knows them (procedural
    scenes): nothing can render most of them right, and they hold most of the squared error; cascade only."""

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:
                raise InputError(f"--loss.{name.replace('_', '-')}: expected 0 or more, got {weight}")
        if self.unseen > 1:
            raise InputError(f"--loss.unseen: expected a factor from 0 to 1, got {self.unseen}")


@dataclass(frozen=True)
class Objective:
    """``terms`` are weighted and sum to the loss; ``latent`` is the target-view latent, for score distillation."""

    terms: dict[str, Float[Tensor, ""]]
    mse: Float[Tensor, ""]
    rays: int
    latent: TargetLatent | None = None

    @property
    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.terms.values())).sum()


def objective(
    model: IDNeRF,
    batch: Batch,
    config: LossConfig,
    generator: torch.Generator,
    *,
    rays_per_step: int,
    fast_share: float,
    enlarged_share: float = 0.0,
) -> Objective:
    """Loss of one batch. ``generator`` draws quality, enlargement of the sources and sample jitter, or the pixels of
    the paper configuration."""
    if isinstance(model.core, Cascade):
        fast = float(torch.rand((), generator=generator, device=generator.device)) < fast_share
        if enlarged_share and float(torch.rand((), generator=generator, device=generator.device)) < enlarged_share:
            batch = replace(batch, source=enlarged(batch.source))
        return cascade_objective(model.core, batch, config, generator, "fast" if fast else "full")
    return paper_objective(model.core, batch, config, generator, rays_per_step)


def cascade_objective(
    core: Cascade, batch: Batch, config: LossConfig, generator: torch.Generator, quality: Quality = "full"
) -> Objective:
    """Every target pixel of the tile; exact depth on the coarse distribution and on the expected position."""
    target = batch.target.cameras
    features = core.encode(batch.source)
    latent = latent_of_whole(core, features, batch)
    output = core(features, target, quality=quality, latent=latent, generator=generator)
    truth, rgb = batch.target.images, output.render.rgb
    height, width = target.height, target.width
    mse = mean_squared_error(rgb, truth)
    weights = colour_weights(batch, config)
    terms = {"mse": config.mse * mean_squared_error(rgb, truth, weights)}
    if config.charbonnier:
        terms["charbonnier"] = config.charbonnier * charbonnier(rgb, truth, weights)
    if config.ssim:
        terms["ssim"] = config.ssim * ssim_loss(rgb, truth, weights)
    if config.blend:
        terms["blend"] = config.blend * charbonnier(output.blended[..., :height, :width], truth, weights)
    if batch.depth is not None:
        weight = (batch.depth > 0).to(rgb.dtype)
        if batch.seen is not None:  # depth that no source shows is a guess: ask less firmly for it
            weight = weight * (0.1 + 0.9 * (batch.seen >= 1).to(rgb.dtype))
        if config.depth_distribution:
            padded = output.fine.position.shape[1:]
            padding = (0, padded[1] - width, 0, padded[0] - height)
            depth, padded_weight = F.pad(batch.depth, padding), F.pad(weight, padding)
            for halvings, distribution in enumerate(output.coarse):
                log_probabilities, scale = distribution.log_probabilities, FrustumVolume.scale * 2**halvings
                histogram, known = depth_histogram(depth, target.near, target.far, log_probabilities.shape[1], scale)
                known = known * F.avg_pool2d(padded_weight, scale)
                cross_entropy = -(histogram * log_probabilities).sum(1)
                name = "half_size_distribution" if halvings else "depth_distribution"
                terms[name] = config.depth_distribution * (known * cross_entropy).sum() / known.sum().clamp_min(1)
            if output.middle is not None:
                position = inverse_depth_position(depth, target.near, target.far)
                terms["middle_distribution"] = config.depth_distribution * bin_cross_entropy(
                    output.middle.log_weights, output.middle.edges, position, padded_weight
                )
        if config.depth:
            position = inverse_depth_position(batch.depth, target.near, target.far)
            error = (output.fine.position[:, :height, :width] - position).abs()
            terms["depth"] = config.depth * (weight * error).sum() / weight.sum().clamp_min(1)
    if config.confidence:
        error = (rgb - truth).abs().mean(1).detach()
        scale_map = output.error_scale[:, :height, :width]
        terms["confidence"] = config.confidence * laplace_negative_log_likelihood(error, scale_map)
    return Objective(terms, mse.detach(), rays=rgb.shape[0] * height * width, latent=output.latent)


def latent_of_whole(core: Cascade, features: CascadeFeatures, batch: Batch) -> TargetLatent | None:
    """The latent of the target that the batch's tile was cut from, where all of it is read, as rendering reads it.

    None where the tile has its own: at a pixel it is the same, and cheaper.
    """
    if core.config.latent_query != "global" or not isinstance(batch, TileBatch):
        return None
    return core.infer_latent(features, batch.whole)


def colour_weights(batch: Batch, config: LossConfig) -> Weights | None:
    """Factors on the target pixels' colour errors; None where that is not known, or all are alike."""
    if batch.seen is None or config.unseen == 1:
        return None
    return torch.where(batch.seen >= 2, 1.0, config.unseen)[:, None].to(batch.target.images.dtype)


def paper_objective(
    core: PaperModel, batch: Batch, config: LossConfig, generator: torch.Generator, rays_per_step: int
) -> Objective:
    """Random pixels of the target: mean squared error of their colours (MatchNeRF, ID-NeRF)."""
    images = batch.target.images
    scenes, _, height, width = images.shape
    number = min(rays_per_step, height * width)
    index = torch.stack(
        [torch.randperm(height * width, generator=generator, device=generator.device)[:number] for _ in range(scenes)]
    ).to(images.device)
    pixels = torch.stack([index % width, index // width], -1).to(images.dtype) + 0.5
    truth = images.flatten(2).gather(2, index[:, None].expand(-1, 3, -1)).transpose(1, 2)
    features = core.encode(batch.source)
    latent = core.infer_latent(features, batch.target.cameras)
    output = core.render_pixels(features, batch.target.cameras, pixels, latent=latent, generator=generator)
    mse = (output.rgb - truth).square().mean()
    terms = {"mse": config.mse * mse}
    if config.charbonnier:
        terms["charbonnier"] = config.charbonnier * charbonnier(output.rgb, truth)
    return Objective(terms, mse.detach(), rays=scenes * number, latent=latent)
