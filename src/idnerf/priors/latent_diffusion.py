"""Our own small latent diffusion model: autoencoder, U-Net and source tokens, in diffusers' folder format.

    source photos --autoencoder--> latents --+--> source tokens (with ray maps)  --cross-attention--+
                                             +--> plane sweep in the target view --+                +--> U-Net --> v
                                                     target ray map ---------------+--channels------+
    noisy latent of the target ----------------------------------------------------+

The folder holds ``unet``, ``vae``, ``scheduler`` as diffusers writes them, and ``source_tokens/model.safetensors``.
"""

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.checkpoint import parameters_from_half, read_tensors, write_tensors
from idnerf.errors import InputError
from idnerf.priors.diffusers_networks import (
    Schedule,
    build_autoencoder,
    build_scheduler,
    build_unet,
    load_autoencoder,
    load_schedule,
    load_unet,
    package_version,
    save_part,
    schedule_of,
)
from idnerf.priors.model_source import ModelSource
from idnerf.priors.network_prior import NetworkPrior, freeze
from idnerf.priors.prior import Condition
from idnerf.priors.ray_maps import relative_ray_maps, target_ray_map
from idnerf.priors.source_tokens import SourceTokens
from idnerf.priors.view_alignment import ALIGNED_CHANNELS, FINE, align_sources
from idnerf.types import Cameras, Views

FACTOR = 8
"""Pixels per latent along each side."""
MAP_CHANNELS = 2 + ALIGNED_CHANNELS
TOKENS_FILE = "source_tokens/model.safetensors"


@dataclass(frozen=True)
class SmallPriorConfig:
    """Sizes of the small latent diffusion model."""

    autoencoder_widths: tuple[int, ...] = (8, 32, 64, 96)
    """Channels of the autoencoder at 1, 1/2, 1/4, 1/8 of the picture."""
    unet_widths: tuple[int, ...] = (48, 96, 160)
    """Channels of the U-Net at 1, 1/2, 1/4 of the latents; attention from the second on."""
    token_width: int = 96
    """Width of a source token."""
    heads: int = 4
    """Attention heads."""
    planes: int = 24
    """Inverse depths of the plane sweep behind the view-aligned condition."""
    source_side: int = 288
    """Source photos are shrunk to this longer side (pixels) before they are encoded."""

    def __post_init__(self) -> None:
        if len(self.autoencoder_widths) != 4 or any(w % 8 or w < 8 for w in self.autoencoder_widths):
            raise InputError(f"--sizes.autoencoder-widths: expected 4 multiples of 8, got {self.autoencoder_widths}")
        if len(self.unet_widths) < 2 or any(w % 8 or w % self.heads or w < 8 for w in self.unet_widths):
            raise InputError(
                f"--sizes.unet-widths: expected 2 or more multiples of 8 and of the {self.heads} heads, got "
                f"{self.unet_widths}"
            )
        if self.token_width < 2 or self.token_width % 2:
            raise InputError(f"--sizes.token-width: expected an even number, got {self.token_width}")
        if self.planes < 1 or self.source_side < FACTOR:
            raise InputError(
                f"--sizes: expected planes >= 1 and source-side >= 8, got {self.planes}, {self.source_side}"
            )


@dataclass(frozen=True)
class EncodedSources:
    """Source views as the small prior sees them; ``cameras`` may have any size, the maps span their images.

    Attributes:
        latents: in the U-Net's space.
        thumbnails: pictures in [0, 1] at ``FINE`` times the latents' size.
    """

    latents: Float[Tensor, "*batch 4 h w"]
    thumbnails: Float[Tensor, "*batch 3 fine_h fine_w"]
    cameras: Cameras


class SmallNetworks(nn.Module):
    """The networks of the small prior: what `idnerf train-prior` trains."""

    def __init__(self, autoencoder: Any, unet: Any, tokens: SourceTokens):
        super().__init__()
        self.autoencoder, self.unet, self.tokens = autoencoder, unet, tokens


def new_networks(config: SmallPriorConfig) -> SmallNetworks:
    """Untrained, with PyTorch's global random state."""
    return SmallNetworks(
        build_autoencoder(config.autoencoder_widths),
        build_unet(config.unet_widths, MAP_CHANNELS, config.token_width, config.heads),
        SourceTokens(config.token_width),
    )


class SmallPrior(NetworkPrior):
    """The small latent diffusion model; freezes the networks it is given.

    Args:
        networks: trained.
        schedule: timesteps, and what the U-Net predicts.
        config: sizes.
        view_aligned: give the reprojected source features too; else they are left out, as in part of the training.
    """

    def __init__(
        self,
        networks: SmallNetworks,
        schedule: Schedule,
        config: SmallPriorConfig,
        *,
        view_aligned: bool = True,
        name: str = "small prior",
    ):
        super().__init__(networks.unet, schedule, lambda: networks.autoencoder, name)
        freeze(networks)
        self.tokens, self.config, self.view_aligned = networks.tokens, config, view_aligned
        self.latent_size = None  # trained on many sizes

    def encode_sources(self, source: Views) -> EncodedSources:
        """Encode photos [*batch], shrunk to the working size; their cameras stay as they are."""
        width, height = working_size(source.cameras.size, self.config.source_side)
        shape = source.images.shape[:-3]
        images = shrink(source.images.flatten(0, -4), (width, height))
        latents = self.encode(images)
        fine = shrink(images, (latents.shape[-1] * FINE, latents.shape[-2] * FINE))
        return EncodedSources(latents.unflatten(0, shape), fine.unflatten(0, shape), source.cameras)

    @torch.no_grad()
    def condition(self, source: Views, target: Cameras, latent_size: tuple[int, int]) -> Condition:
        return make_condition(
            self.tokens,
            self.encode_sources(source),
            target,
            latent_size,
            self.config.planes if self.view_aligned else 0,
        )

    def unconditional(self, condition: Condition) -> Condition:
        assert condition.map is not None, "a condition of the small prior has a map"
        return Condition(
            self.tokens.nothing(*condition.tokens.shape[:2]),
            torch.zeros_like(condition.map),
        )

    def to(self, device: torch.device | str) -> "SmallPrior":
        super().to(device)
        self.tokens.to(device)
        return self

    def parameters(self) -> list[Tensor]:
        return [*self.unet.parameters(), *self.autoencoder.parameters(), *self.tokens.parameters()]


def make_condition(
    tokens: SourceTokens,
    source: EncodedSources,
    target: Cameras,
    size: tuple[int, int],
    planes: int,
    aligned: Float[Tensor, "batch aligned_channel height width"] | None = None,
) -> Condition:
    """Tokens, and the map: target rays (2), then the aligned features (zeros if ``planes`` is 0).

    Differentiable in the weights of ``tokens``.

    Args:
        source: [batch view].
        target: [batch] cameras.
        size: (width, height) of the latents, which span the target image.
        aligned: the aligned features, where they are known already.
    """
    h, w = source.latents.shape[-2:]
    thumbnails = shrink(source.thumbnails.flatten(0, 1), (w, h)).unflatten(0, source.latents.shape[:2])
    rays = relative_ray_maps(source.cameras, target, (w, h))
    place = target_ray_map(target, size)
    if aligned is None and planes:
        aligned = align_sources(source.thumbnails, source.latents, source.cameras, target, size, planes)
    if aligned is None:
        aligned = place.new_zeros(len(place), ALIGNED_CHANNELS, *place.shape[2:])
    return Condition(tokens(source.latents, thumbnails, rays), torch.cat([place, aligned], 1))


def working_size(size: tuple[int, int], longer_side: int) -> tuple[int, int]:
    """(width, height) shrunk to at most ``longer_side``, both sides the nearest multiples of 8."""
    share = min(1.0, longer_side / max(size))
    width, height = (max(FACTOR, round(side * share / FACTOR) * FACTOR) for side in size)
    return width, height


def shrink(
    images: Float[Tensor, "image channel height width"], size: tuple[int, int]
) -> Float[Tensor, "image channel new_height new_width"]:
    """Resize to (width, height), antialiased."""
    if (images.shape[-1], images.shape[-2]) == size:
        return images
    return F.interpolate(images, size=(size[1], size[0]), mode="bilinear", antialias=True, align_corners=False)


def new_schedule() -> Schedule:
    """The schedule that the small prior is trained with."""
    return schedule_of(build_scheduler("v_prediction"), "the small prior")


def save_small_prior(networks: SmallNetworks, config: SmallPriorConfig, folder: Path) -> None:
    """Write a folder in diffusers' format, weights in half precision. It appears, or replaces the old one, as a whole.

    Raises:
        InputError: it cannot be written.
    """
    halves = copy.deepcopy(networks).half()
    fresh, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        fresh.mkdir(parents=True)
        save_part(halves.unet, fresh / "unet")
        save_part(halves.autoencoder, fresh / "vae")
        save_part(build_scheduler("v_prediction"), fresh / "scheduler")
        write_tensors(fresh / TOKENS_FILE, halves.tokens.state_dict(), {"small_prior": asdict(config)})
        (fresh / "model_index.json").write_text(json.dumps(model_index(), indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def model_index() -> dict[str, Any]:
    """The table of contents that diffusers keeps in a model's folder."""
    return {
        "_class_name": "SmallPrior",
        "_diffusers_version": package_version(),
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "source_tokens": ["idnerf.priors.source_tokens", "SourceTokens"],
    }


def load_networks(
    path: str | None = None, dtype: torch.dtype = torch.float32, flag: str = "guidance.prior.path"
) -> tuple[SmallNetworks, SmallPriorConfig, Schedule, str]:
    """Networks as they are in a folder that `idnerf train-prior` wrote, their sizes, the schedule, the folder's name.

    Args:
        path: the folder; None takes the one that comes with the package.
        flag: the option that named it, for error messages.

    Raises:
        InputError: no such folder, or not one of the small prior.
    """
    folder = Path(str(resources.files("idnerf") / "weights" / "prior")) if path is None else Path(path).expanduser()
    if not (folder / TOKENS_FILE).is_file():
        missing = (
            "the package holds no small prior" if path is None else f"{folder} holds no small prior ({TOKENS_FILE})"
        )
        raise InputError(f"{missing}: train one with `idnerf train-prior --out DIR` and give DIR/prior as --{flag}")
    tensors, metadata = read_tensors(folder / TOKENS_FILE, "source tokens")
    config = small_prior_config(metadata.get("small_prior"), folder)
    source = ModelSource(str(folder), folder, None)
    networks = SmallNetworks(
        load_autoencoder(source, dtype), load_unet(source, dtype), SourceTokens(config.token_width)
    )
    try:
        networks.tokens.load_state_dict(parameters_from_half(tensors))
    except RuntimeError as error:
        raise InputError(f"{folder / TOKENS_FILE} does not fit its own configuration; train the prior anew") from error
    return networks, config, load_schedule(source), str(folder)


def load_small_prior(
    path: str | None = None, device: torch.device | str = "cpu", *, view_aligned: bool = True
) -> SmallPrior:
    """The frozen prior of a folder (``load_networks``); half precision on a GPU."""
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    networks, config, schedule, name = load_networks(path, dtype)
    return SmallPrior(networks, schedule, config, view_aligned=view_aligned, name=name).to(device)


def small_prior_config(values: Any, folder: Path) -> SmallPriorConfig:
    """From the file's metadata; an unknown field means a newer version, and is named."""
    known = {field.name for field in fields(SmallPriorConfig)}
    if not isinstance(values, dict) or set(values) - known:
        raise InputError(f"{folder} was written by another version of idnerf; train the prior anew or update idnerf")
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return SmallPriorConfig(**sizes)
