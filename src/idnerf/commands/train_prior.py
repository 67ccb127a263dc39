"""`idnerf train-prior`: the small latent diffusion prior, from procedural scenes or any folder of scenes."""

import sys
from dataclasses import replace
from typing import Annotated

import tyro

from idnerf.commands.options import check_writable, choose_device
from idnerf.commands.parsing import parse
from idnerf.commands.train import flags_of, recorded_flags
from idnerf.training.prior_trainer import PriorTrainerConfig, train_small_prior
from idnerf.training.trainer import TrainingDivergedError

NAME = "train-prior"
"""What a training state calls this command, where that of `idnerf train` names its preset."""


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
    config = config if config.resume is None else resumed(config)
    run = config.resume or config.out
    check_writable(run, folder=True)
    try:
        train_small_prior(config, choose_device(device), {"preset": NAME, "flags": list(flags_of(config))})
    except TrainingDivergedError as error:
        print(f"idnerf: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{run}: prior/ (diffusers' format), reconstructions.png, samples.png, log.jsonl")


def resumed(config: PriorTrainerConfig) -> PriorTrainerConfig:
    """The options that the run was started with, changed by those given now; says which are not the usual ones."""
    recorded = recorded_flags(NAME, ["--resume", str(config.resume)])
    if not recorded:
        return config
    merged = parse(PriorTrainerConfig, [*recorded, *unusual_flags(config)], f"idnerf {NAME}")
    config = replace(merged, resume=config.resume, out=config.out, threads=config.threads)
    print(f"{config.resume} goes on with {' '.join(unusual_flags(config)) or 'the usual options'}", file=sys.stderr)
    return config


def unusual_flags(config: PriorTrainerConfig) -> list[str]:
    """The flags, with their values, that differ from the defaults."""
    usual = flags_with_values(PriorTrainerConfig())
    return [word for flag in flags_with_values(config) if flag not in usual for word in flag]


def flags_with_values(config: PriorTrainerConfig) -> list[tuple[str, ...]]:
    """(Flag, values ...) of every option that does not belong to a start."""
    flags: list[tuple[str, ...]] = []
    for word in flags_of(config):
        if word.startswith("--"):
            flags.append((word,))
        else:
            flags[-1] += (word,)
    return flags
