"""Score distillation: a frozen diffusion model pulls the target-view latent towards what it expects there.

Draw a timestep t and noise e, let the prior predict e_hat from the noisy latent with classifier-free guidance; then

    g = w(t) (e_hat - e)            without gradient          (DreamFusion, arXiv 2209.14988; Latent-NeRF, 2211.07600)
    loss = 0.5 || z - stop(z - g) ||^2                        whose gradient in z is g

The latent enters the U-Net as 2 z - 1; the gradient is applied to z itself (through that factor it would be twice as
large, a matter of the weight). The rendering is never supervised by the diffusion model: guidance is indirect, through
the latent. The prior is no ``nn.Module``, so no optimizer, checkpoint or data-parallel wrapper ever meets it.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.errors import InputError
from idnerf.models.latent import TargetLatent
from idnerf.priors.prior import Condition, Prior, PriorConfig, guided_noise, unet_latent
from idnerf.types import Views

Weighting = Literal["id-nerf", "dreamfusion", "clean", "uniform"]


@dataclass(frozen=True)
class GuidanceConfig:
    """Score distillation of the target-view latent. A weight of 0 turns it off, and no prior is loaded."""

    sds_weight: float = 0.0
    """Weight of the score distillation beside the colour losses."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The frozen diffusion model."""
    guidance_scale: float = 100.0
    """Classifier-free guidance: 1 is the conditional prediction; ID-NeRF takes 100."""
    weighting: Weighting = "id-nerf"
    """w(t): `id-nerf` sqrt(abar) (1 - abar); `dreamfusion` 1 - abar; `clean` sqrt((1 - abar) / abar), the step to the
    predicted clean latent; `uniform` 1."""
    timesteps: tuple[float, float] = (0.02, 0.98)
    """Smallest and largest timestep, as shares of the prior's."""
    last_max_timestep: float | None = None
    """Largest timestep at the end of the training; it moves there linearly from the start (annealing). None: it stays
    that of `--guidance.timesteps`."""
    warmup: float = 0.0
    """Share of the training over which the weight rises from 0."""

    def __post_init__(self) -> None:
        if not self.sds_weight >= 0:
            raise InputError(f"--guidance.sds-weight: expected 0 or more, got {self.sds_weight}")
        if not self.guidance_scale >= 0:
            raise InputError(f"--guidance.guidance-scale: expected 0 or more, got {self.guidance_scale}")
        low, high = self.timesteps
        if not 0 <= low <= high <= 1:
            raise InputError(f"--guidance.timesteps: expected 0 <= smallest <= largest <= 1, got {low} {high}")
        if self.last_max_timestep is not None and not low <= self.last_max_timestep <= 1:
            raise InputError(f"--guidance.last-max-timestep: expected {low} to 1, got {self.last_max_timestep}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"--guidance.warmup: expected a share in [0, 1], got {self.warmup}")


class ScoreDistillation:
    """The loss term of a training, with its frozen prior.

    Args:
        config: with ``sds_weight`` above 0.
        prior: the one that ``config`` names, on the latents' device.
    """

    def __init__(self, config: GuidanceConfig, prior: Prior) -> None:
        self.config, self.prior = config, prior

    def __call__(
        self, latent: TargetLatent, source: Views, progress: float, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Weighted score distillation of [batch] latents, mean over the batch; its gradient reaches the latent alone.

        Args:
            source: [batch view] photos, for the condition.
            progress: of the training, in [0, 1).
            generator: draws timesteps and noise.
        """
        z = latent.values
        number, device = len(z), generator.device
        low, high = timestep_bounds(self.config, progress, self.prior.num_timesteps)
        timestep = torch.randint(low, high + 1, (number,), generator=generator, device=device).to(z.device)
        noise = torch.randn(z.shape, generator=generator, device=device).to(z.device)
        condition = self.prior.condition(source, latent.cameras, latent.size)
        gradient = distillation_gradient(self.prior, z, noise, timestep, condition, self.config)
        return scheduled_weight(self.config, progress) * distillation_loss(z, gradient)


def distillation_loss(z: Float[Tensor, "batch *shape"], gradient: Float[Tensor, "batch *shape"]) -> Float[Tensor, ""]:
    """0.5 || z - stop(z - gradient) ||^2, mean over the batch: one scene's gradient in z is ``gradient``."""
    target = (z - gradient).detach()
    return 0.5 * (z - target).square().sum() / len(z)


@torch.no_grad()
def distillation_gradient(
    prior: Prior,
    z: Float[Tensor, "batch 4 height width"],
    noise: Float[Tensor, "batch 4 height width"],
    timestep: Int64[Tensor, "batch"],
    condition: Condition,
    config: GuidanceConfig,
) -> Float[Tensor, "batch 4 height width"]:
    """w(t) (e_hat - e), for the given noise e and timesteps."""
    z_t = prior.add_noise(unet_latent(z), noise, timestep)
    predicted = guided_noise(prior, z_t, timestep, condition, config.guidance_scale)
    weight = timestep_weight(config.weighting, prior.alphas_cumprod[timestep])
    return weight[:, None, None, None] * (predicted - noise)


def timestep_weight(weighting: Weighting, abar: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """w(t) as a function of abar_t."""
    if weighting == "id-nerf":
        return abar.sqrt() * (1 - abar)
    if weighting == "dreamfusion":
        return 1 - abar
    if weighting == "clean":
        return ((1 - abar) / abar).sqrt()
    return torch.ones_like(abar)


def timestep_bounds(config: GuidanceConfig, progress: float, num_timesteps: int) -> tuple[int, int]:
    """Smallest and largest timestep drawn at ``progress`` in [0, 1], both included."""
    low, high = config.timesteps
    if config.last_max_timestep is not None:
        high = high + (config.last_max_timestep - high) * progress
    last = num_timesteps - 1
    first = min(int(low * num_timesteps), last)
    return first, max(first, min(int(high * num_timesteps), last))


def scheduled_weight(config: GuidanceConfig, progress: float) -> float:
    """Weight of the loss at ``progress`` in [0, 1]: rises linearly over the warm-up."""
    return config.sds_weight * (min(1.0, progress / config.warmup) if config.warmup else 1.0)
