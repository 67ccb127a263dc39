"""What every prior made of a diffusers U-Net and autoencoder shares: noise prediction, latents, freezing."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from idnerf.errors import InputError
from idnerf.priors.diffusers_networks import Schedule
from idnerf.priors.prior import LATENT_CHANNELS, Condition, Prior


def freeze(network: nn.Module) -> nn.Module:
    """Evaluation mode, and no gradient for any weight."""
    return network.eval().requires_grad_(False)


def to_noise(
    prediction: Float[Tensor, "batch 4 height width"],
    prediction_type: str,
    z_t: Float[Tensor, "batch 4 height width"],
    signal: Float[Tensor, "batch 1 1 1"],
    spread: Float[Tensor, "batch 1 1 1"],
) -> Float[Tensor, "batch 4 height width"]:
    """Noise from what a U-Net predicts: the noise, v = signal e - spread z (arXiv 2202.00512), or the clean latent z.

    Args:
        signal, spread: sqrt(abar_t), sqrt(1 - abar_t).
    """
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return signal * prediction + spread * z_t
    return (z_t - signal * prediction) / spread.clamp_min(1e-4)


class NetworkPrior(Prior):
    """A prior of a U-Net, a schedule, and an autoencoder that is loaded when it is first asked for.

    Args:
        unet: ``UNet2DConditionModel``.
        schedule: timesteps, and what the U-Net predicts.
        load_autoencoder: gives the ``AutoencoderKL``, in the U-Net's precision.
        name: for messages.
    """

    def __init__(self, unet: Any, schedule: Schedule, load_autoencoder: Callable[[], Any], name: str):
        self.unet: Any = freeze(unet)
        self.alphas_cumprod = schedule.alphas_cumprod
        self.prediction_type = schedule.prediction_type
        self.name = name
        self.condition_width = int(unet.config.cross_attention_dim)
        self.latent_multiple = 1  # diffusers' U-Nets upsample to the skip's size
        side = unet.config.sample_size
        self.latent_size = (side, side) if isinstance(side, int) else None
        self._load_autoencoder = load_autoencoder
        self._autoencoder: Any = None
        if unet.config.out_channels != LATENT_CHANNELS:
            raise InputError(
                f"{name}: its U-Net predicts {unet.config.out_channels} channels, expected {LATENT_CHANNELS}; give a "
                "latent diffusion model of Stable Diffusion's latent shape"
            )

    @property
    def autoencoder(self) -> Any:
        """Frozen, beside the U-Net."""
        if self._autoencoder is None:
            self._autoencoder = freeze(self._load_autoencoder()).to(self.device)
        return self._autoencoder

    @torch.no_grad()
    def predict_noise(
        self,
        z_t: Float[Tensor, "batch 4 height width"],
        timestep: Int64[Tensor, "batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch 4 height width"]:
        dtype = self.unet.dtype
        sample = z_t if condition.map is None else torch.cat([z_t, condition.map], 1)
        prediction = self.unet(
            sample.to(dtype), timestep, encoder_hidden_states=condition.tokens.to(dtype), return_dict=False
        )[0]
        return to_noise(prediction.float(), self.prediction_type, z_t, *self.signal_and_noise(timestep))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 4 h w"]:
        network: Any = self.autoencoder
        mean = network.encode((2 * images - 1).to(network.dtype)).latent_dist.mean.float()
        return (mean - (network.config.shift_factor or 0.0)) * network.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch 4 h w"]) -> Float[Tensor, "batch 3 height width"]:
        network = self.autoencoder
        z = latents / network.config.scaling_factor + (network.config.shift_factor or 0.0)
        images = network.decode(z.to(network.dtype), return_dict=False)[0].float()
        return ((images + 1) / 2).clamp(0, 1)

    def to(self, device: torch.device | str) -> "NetworkPrior":
        self.unet.to(device)
        if self._autoencoder is not None:
            self._autoencoder.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    def parameters(self) -> list[Tensor]:
        return [*self.unet.parameters(), *(self._autoencoder.parameters() if self._autoencoder is not None else ())]
