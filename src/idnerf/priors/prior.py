"""The interface that every diffusion prior has: what score distillation needs of a diffusion model, and nothing else.

    prior = load_prior(PriorConfig(kind="small"))
    condition = prior.condition(source, target, latent_size)          once per batch
    z_t = prior.add_noise(unet_latent(z), noise, timestep)
    e_hat = guided_noise(prior, z_t, timestep, condition, guidance_scale)

**Latent convention.** A prior works on what its U-Net sees: latents of 4 channels with about unit variance, an eighth
of the picture's resolution (autoencoder mean, less ``shift_factor``, times ``scaling_factor``; ``encode`` and
``decode`` do this). The target-view latent z of ID-NeRF is another variable: it enters the U-Net as 2 z - 1
(``unet_latent``), so that z = 0.5 is the middle of the prior. Noise and noise predictions are in the U-Net's space.

A prior is frozen: every parameter has ``requires_grad = False`` and is in evaluation mode, and ``predict_noise``
computes no gradient. It is no ``nn.Module``, so that putting it into one neither trains nor saves it: priors exist
while training, never in our checkpoints, never for inference.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.types import Cameras, Views

LATENT_CHANNELS = 4
"""Channels of every latent here, as of Stable Diffusion's."""


@dataclass(frozen=True)
class Condition:
    """What the noise prediction is conditioned on.

    Attributes:
        tokens: for the U-Net's cross-attention; ``token_width`` is the prior's ``condition_width``.
        map: target-aligned channels beside the noisy latent, at its size; None for priors that take tokens only.
    """

    tokens: Float[Tensor, "batch token token_width"]
    map: Float[Tensor, "batch map_channel height width"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)


class Prior(ABC):
    """A frozen latent diffusion model (noise-prediction form, discrete timesteps).

    Attributes:
        condition_width: width of a condition token.
        latent_size: (width, height) of latents it was trained on, or None where any size will do. Other sizes work as
            well, since the networks are convolutional, as long as both sides are multiples of ``latent_multiple``.
        latent_multiple: see above.
        alphas_cumprod: abar_t of timesteps 0 .. T-1, float32, falling from about 1 to about 0.
    """

    condition_width: int
    latent_size: tuple[int, int] | None
    latent_multiple: int
    alphas_cumprod: Float[Tensor, "timestep"]

    @property
    def latent_channels(self) -> int:
        """4, for every prior."""
        return LATENT_CHANNELS

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def add_noise(
        self,
        z: Float[Tensor, "batch 4 height width"],
        noise: Float[Tensor, "batch 4 height width"],
        timestep: Int64[Tensor, "batch"],
    ) -> Float[Tensor, "batch 4 height width"]:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise (DDPM, arXiv 2006.11239, eq. 4); differentiable in z.

        Args:
            z: clean latents in the U-Net's space (``unet_latent`` of the target-view latent).
            noise: of unit variance.
            timestep: in [0, ``num_timesteps``).
        """
        signal, spread = self.signal_and_noise(timestep)
        return signal * z + spread * noise

    def signal_and_noise(
        self, timestep: Int64[Tensor, "batch"]
    ) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
        """sqrt(abar_t), sqrt(1 - abar_t)."""
        abar = self.alphas_cumprod[timestep][:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()

    @abstractmethod
    def predict_noise(
        self,
        z_t: Float[Tensor, "batch 4 height width"],
        timestep: Int64[Tensor, "batch"],
        condition: Condition,
    ) -> Float[Tensor, "batch 4 height width"]:
        """E[noise | z_t, condition], float32, without gradient; a network's v or clean latent is converted."""

    @abstractmethod
    def condition(self, source: Views, target: Cameras, latent_size: tuple[int, int]) -> Condition:
        """The condition of target views, computed once per batch, without gradient.

        Args:
            source: [batch view] photos, any number of views >= 1.
            target: [batch] cameras, any crop of the target image: rays and reprojection are taken from it.
            latent_size: (width, height) of the latents it will be used with; they span the target image.
        """

    @abstractmethod
    def unconditional(self, condition: Condition) -> Condition:
        """The counterpart for classifier-free guidance, of the same shapes."""

    @abstractmethod
    def to(self, device: torch.device | str) -> "Prior":
        """Move to a device, in place; returns itself."""

    def parameters(self) -> list[Tensor]:
        """Every weight, frozen: so that a test can show that none changes."""
        return []

    def encode(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 4 h w"]:
        """Pictures in [0, 1] to latents in the U-Net's space (the autoencoder's mean). Sides: multiples of 8.

        Raises:
            NotImplementedError: a prior without autoencoder.
        """
        raise NotImplementedError(f"{type(self).__name__} has no autoencoder")

    def decode(self, latents: Float[Tensor, "batch 4 h w"]) -> Float[Tensor, "batch 3 height width"]:
        """Latents in the U-Net's space to pictures, clamped to [0, 1].

        Raises:
            NotImplementedError: a prior without autoencoder.
        """
        raise NotImplementedError(f"{type(self).__name__} has no autoencoder")


def unet_latent(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The target-view latent as the U-Net takes it: 2 z - 1."""
    return 2 * z - 1


def guided_noise(
    prior: Prior,
    z_t: Float[Tensor, "batch 4 height width"],
    timestep: Int64[Tensor, "batch"],
    condition: Condition,
    guidance_scale: float,
) -> Float[Tensor, "batch 4 height width"]:
    """Classifier-free guidance (arXiv 2207.12598): e_u + scale (e_c - e_u), both from one pass of a doubled batch.

    Scale 1 is the conditional, scale 0 the unconditional prediction; each then costs one pass of a single batch.
    """
    if guidance_scale == 1:
        return prior.predict_noise(z_t, timestep, condition)
    without = prior.unconditional(condition)
    if guidance_scale == 0:
        return prior.predict_noise(z_t, timestep, without)
    both = concatenate_conditions(without, condition)
    e_u, e_c = prior.predict_noise(z_t.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
    return e_u + guidance_scale * (e_c - e_u)


def concatenate_conditions(first: Condition, second: Condition) -> Condition:
    """Along the batch axis."""
    maps = None if first.map is None or second.map is None else torch.cat([first.map, second.map])
    return Condition(torch.cat([first.tokens, second.tokens]), maps)


PriorKind = Literal["gaussian", "small", "stable-diffusion-1.5", "stable-diffusion-2.1", "image-variation"]


@dataclass(frozen=True)
class PriorConfig:
    """Which frozen diffusion model guides a training."""

    kind: PriorKind = "small"
    """`small`: our own, from `idnerf train-prior`; the Stable Diffusions need a download or a local copy;
    `gaussian`: unit normal latents, score in closed form, for tests and as the control that knows nothing."""
    path: str | None = None
    """Hub id or local folder in diffusers' format; none takes the kind's usual one."""
    adapter: Literal["auto", "native", "text", "paper"] = "auto"
    """How CLIP image embeddings become tokens of a Stable Diffusion U-Net (docs/priors.md); `auto`: `native` for
    image-variation, else `text`; `paper`: linearly stretched to the width, as the public code does."""
    image_encoder: str | None = None
    """Hub id or local folder of the CLIP model; none takes the one that fits the adapter."""
    ray_tokens: bool | None = None
    """Append CLIP embeddings of the source ray maps; none: only under the `paper` adapter."""
    view_aligned: bool = True
    """Condition the small prior on source features reprojected into the target view (SparseFusion's idea) as well as on
    source tokens; off: on the tokens alone."""
    attention_slicing: bool = True
    """Less memory for a little time in Stable Diffusion's attention."""


def load_prior(config: PriorConfig, device: torch.device | str = "cpu") -> Prior:
    """The prior of a config, frozen, on ``device`` (half precision there if it is a GPU).

    Raises:
        InputError: a missing extra, folder, or model that cannot be downloaded; the line says how to get it.
    """
    if config.kind == "gaussian":
        from idnerf.priors.gaussian import GaussianPrior

        return GaussianPrior().to(device)
    if config.kind == "small":
        from idnerf.priors.latent_diffusion import load_small_prior

        return load_small_prior(config.path, device, view_aligned=config.view_aligned)
    from idnerf.priors.stable_diffusion import load_stable_diffusion

    return load_stable_diffusion(config, device)
