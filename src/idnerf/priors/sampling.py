"""Drawing latents from a prior: to look at what it knows. Score distillation does not need this."""

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.priors.prior import Condition, Prior, guided_noise


@torch.no_grad()
def ddim_sample(
    prior: Prior,
    condition: Condition,
    noise: Float[Tensor, "batch 4 height width"],
    *,
    steps: int = 25,
    guidance_scale: float = 1.0,
) -> Float[Tensor, "batch 4 height width"]:
    """Deterministic DDIM (arXiv 2010.02502, eq. 12, eta 0) from ``noise`` to clean latents.

    The timesteps are evenly spaced, the last one of the schedule included; the last step gives the clean estimate.
    """
    timesteps = torch.linspace(prior.num_timesteps - 1, 0, steps + 1).round().long()[:-1]
    z = noise
    for number, timestep in enumerate(timesteps.tolist()):
        t = torch.full((len(z),), timestep, device=z.device)
        e = guided_noise(prior, z, t, condition, guidance_scale)
        signal, spread = prior.signal_and_noise(t)
        clean = (z - spread * e) / signal
        if number + 1 == len(timesteps):
            return clean
        z = prior.add_noise(clean, e, torch.full_like(t, int(timesteps[number + 1])))
    return z
