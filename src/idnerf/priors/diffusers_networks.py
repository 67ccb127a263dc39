"""The one file that talks to the diffusers package: building, loading and saving U-Nets, autoencoders, schedules."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.errors import InputError
from idnerf.priors.autoencoder_start import start_at_block_means
from idnerf.priors.model_source import ModelSource, hub_error

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """Noise schedule and what the U-Net was trained to predict (one of ``PREDICTION_TYPES``)."""

    alphas_cumprod: Float[Tensor, "timestep"]
    prediction_type: str


def diffusers() -> Any:
    """The package. Raises InputError when the extra is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise InputError(
            f"this prior needs the diffusers package ({error}): `pip install '.[prior]'` in a checkout"
        ) from error


def build_autoencoder(widths: tuple[int, ...]) -> nn.Module:
    """An untrained ``AutoencoderKL``: 4 latent channels, one halving per width but the last (four widths make /8).

    It starts at block means (``autoencoder_start``), for which its normalisation has one group. Its latents start with
    little noise (standard deviation exp(-2.5)), or it would first have to learn that.
    """
    network = diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    start_at_block_means(network)
    with torch.no_grad():
        network.quant_conv.bias[4:] -= 5.0
    return network


def build_unet(widths: tuple[int, ...], map_channels: int, token_width: int, heads: int) -> nn.Module:
    """An untrained ``UNet2DConditionModel``: cross-attention at all levels but the finest."""
    deeper = len(widths) - 1
    return diffusers().UNet2DConditionModel(
        sample_size=32,
        in_channels=4 + map_channels,
        out_channels=4,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
        up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        cross_attention_dim=token_width,
        attention_head_dim=heads,  # the package's name for the number of heads
        norm_num_groups=8,
    )


def build_scheduler(prediction_type: str) -> Any:
    """Stable Diffusion's schedule: 1000 steps, square roots of beta rising linearly."""
    return diffusers().DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )


def load_unet(source: ModelSource, dtype: torch.dtype) -> Any:
    """The folder's ``unet``. Raises InputError where it cannot be had."""
    return _load("UNet2DConditionModel", source, "unet", torch_dtype=dtype)


def load_autoencoder(source: ModelSource, dtype: torch.dtype) -> Any:
    """The folder's ``vae``. Raises InputError where it cannot be had."""
    return _load("AutoencoderKL", source, "vae", torch_dtype=dtype)


def load_schedule(source: ModelSource) -> Schedule:
    """The folder's ``scheduler``, whatever sampler it names: all share the schedule's fields.

    Raises:
        InputError: it cannot be had, or predicts something unknown.
    """
    scheduler = _load("DDPMScheduler", source, "scheduler")
    return schedule_of(scheduler, source.text)


def schedule_of(scheduler: Any, name: str) -> Schedule:
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"{name}: its scheduler predicts {prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}"
        )
    return Schedule(scheduler.alphas_cumprod.float().clone(), prediction_type)


def save_part(part: Any, folder: Path) -> None:
    """Write a network (safetensors, the precision it has) or a scheduler as diffusers does."""
    part.save_pretrained(str(folder))
    for path in folder.iterdir():  # the package makes private files
        path.chmod(0o644)


def package_version() -> str:
    return diffusers().__version__


def _load(kind: str, source: ModelSource, subfolder: str, **options: Any) -> Any:
    classes = diffusers()
    if source.folder is not None and not (source.folder / subfolder).is_dir():
        raise InputError(
            f"--guidance.prior.path: {source.folder} is no model in diffusers' format, it has no folder {subfolder!r}; "
            "give the folder that holds model_index.json"
        )
    try:
        return getattr(classes, kind).from_pretrained(
            source.location, subfolder=subfolder, revision=source.revision, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise hub_error(source, subfolder, error) from error
