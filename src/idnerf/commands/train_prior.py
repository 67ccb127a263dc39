"""`idnerf train-prior`: the small latent diffusion prior, from procedural scenes or any folder of scenes."""

import sys
from typing import Annotated

import tyro

from idnerf.commands.options import check_writable, choose_device
from idnerf.training.prior_trainer import PriorTrainerConfig, train_small_prior
from idnerf.training.trainer import TrainingDivergedError


def train_prior(
    config: Annotated[PriorTrainerConfig, tyro.conf.arg(name="")] = PriorTrainerConfig(),  # noqa: B008
    device: str = "auto",
) -> None:
    """Train the small latent diffusion prior: an autoencoder (4 channels, /8), then a U-Net conditioned on sources.

    Writes RUN/prior in diffusers' format, RUN/reconstructions.png and RUN/samples.png, a log, and what --resume needs.

    Args:
        config: the training.
        device: auto, cpu or cuda.
    """
    run = config.resume or config.out
    check_writable(run, folder=True)
    try:
        train_small_prior(config, choose_device(device))
    except TrainingDivergedError as error:
        print(f"idnerf: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{run}: prior/ (diffusers' format), reconstructions.png, samples.png, log.jsonl")
