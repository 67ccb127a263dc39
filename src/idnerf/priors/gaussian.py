"""A prior whose latents are independent normals: its noise prediction, hence its score, is known in closed form.

Its condition token is one number c: 1 under a condition, 0 without. The mean is m_0 + c (m_1 - m_0), so that
classifier-free guidance has a closed form too: the mean becomes m_0 + scale (m_1 - m_0).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.priors.prior import Condition, Prior
from idnerf.types import Cameras, Views


class GaussianPrior(Prior):
    """z ~ N(mean, variance) for every latent number apart; cosine schedule (arXiv 2102.09672).

    Args:
        mean: under a condition; broadcast to the latent. None: 0.
        variance: > 0, likewise. None: 1.
        unconditional_mean: None: the same as ``mean``.
        num_timesteps: T.
    """

    condition_width = 1
    latent_size = None
    latent_multiple = 1

    def __init__(
        self,
        mean: Float[Tensor, "4 #height #width"] | None = None,
        variance: Float[Tensor, "4 #height #width"] | None = None,
        unconditional_mean: Float[Tensor, "4 #height #width"] | None = None,
        num_timesteps: int = 1000,
    ):
        self.mean = torch.zeros(4, 1, 1) if mean is None else mean.detach()
        self.variance = torch.ones(4, 1, 1) if variance is None else variance.detach()
        self.unconditional_mean = self.mean if unconditional_mean is None else unconditional_mean.detach()
        step = torch.arange(num_timesteps, dtype=torch.float64) + 1
        alphas_cumprod = torch.cos((step / num_timesteps + 0.008) / 1.008 * (torch.pi / 2)).square()
        self.alphas_cumprod = alphas_cumprod.clamp(1e-5, 1 - 1e-5).float()

    @torch.no_grad()
    def predict_noise(
        self,
        z_t: Float[Tensor, "batch 4 height width"],
        timestep: Int64[Tensor, "batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch 4 height width"]:
        """E[e | z_t] = sqrt(1 - abar) (z_t - sqrt(abar) mean) / (abar variance + 1 - abar)."""
        signal, spread = self.signal_and_noise(timestep)
        share = condition.tokens.mean(1)[:, :, None, None]
        mean = self.unconditional_mean + share * (self.mean - self.unconditional_mean)
        return spread * (z_t - signal * mean) / (signal.square() * self.variance + spread.square())

    def condition(self, source: Views, target: Cameras, latent_size: tuple[int, int]) -> Condition:
        """One token per batch item, the number 1: this prior looks at nothing."""
        return Condition(torch.ones(len(target), 1, 1, device=self.device))

    def unconditional(self, condition: Condition) -> Condition:
        return Condition(torch.zeros_like(condition.tokens))

    def to(self, device: torch.device | str) -> "GaussianPrior":
        self.mean, self.variance = self.mean.to(device), self.variance.to(device)
        self.unconditional_mean = self.unconditional_mean.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self
