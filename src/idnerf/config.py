"""Presets: named trainings. Each is a frozen dataclass whose every field is a flag of `idnerf train PRESET`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from idnerf.errors import InputError
from idnerf.models.cascade import CascadeConfig
from idnerf.models.idnerf import ModelConfig
from idnerf.models.paper import PaperConfig
from idnerf.priors.prior import PriorConfig
from idnerf.training.objectives import LossConfig
from idnerf.training.optimizer import OptimizerConfig
from idnerf.training.procedural_scenes import ProceduralScenesConfig
from idnerf.training.score_distillation import GuidanceConfig
from idnerf.training.trainer import TrainerConfig


@dataclass(frozen=True)
class ProceduralTraining:
    """Train on procedural scenes: no data set needed."""

    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = field(default_factory=TrainerConfig)
    """The training."""
    scenes: ProceduralScenesConfig = field(default_factory=ProceduralScenesConfig)
    """The scenes."""
    held_out: int = 8
    """Number of held-out scenes for validation."""

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        most, views = self.trainer.source_views[1], self.scenes.scene.num_views
        if most >= views:
            raise InputError(
                f"--source-views: expected fewer than a scene's {views} views (--scenes.scene.num-views), got {most}"
            )


@dataclass(frozen=True)
class DTUTraining:
    """Train on DTU in the layout that the MVSNeRF family uses (docs/data.md)."""

    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = field(default_factory=TrainerConfig)
    """The training."""
    root: Path = Path("data/DTU")
    """DTU root: Cameras/train, Cameras/pair.txt, Rectified, Depths."""
    size: tuple[int, int] = (640, 512)
    """Image size (width, height)."""
    held_out: int = 8
    """Number of held-out views (of the test scans, where they are there) for validation."""

    def __post_init__(self) -> None:
        check_held_out(self.held_out)
        if min(self.size) < 16:
            raise InputError(f"--size: expected at least 16x16 pixels, got {self.size[0]}x{self.size[1]}")


def check_held_out(count: int) -> None:
    if count < 0:
        raise InputError(f"--held-out: expected 0 or more, got {count}")


CASCADE_LOSS = LossConfig(
    mse=5.0, charbonnier=1.0, ssim=0.4, blend=0.5, depth_distribution=0.2, depth=1.0, confidence=0.01
)
SMALL_PHOTO = 1_000_000
"""Pixels of a photo up to which enlarging it for rendering gained, and of a target above which depth at half its size
did (docs/cascade.md)."""
PAPER_OPTIMIZER = OptimizerConfig(encoder_lr=5e-5, decoder_lr=5e-5, beta2=0.999, ema_decay=0.0)
ID_NERF = ModelConfig(configuration="paper", paper=PaperConfig(view_refinement=True, latent_query="pixel"))
"""The paper's network; ``latent_query="global"`` is the public code's reading of its latent."""

PRESETS: dict[str, ProceduralTraining | DTUTraining] = {
    "cascade-procedural": ProceduralTraining(
        TrainerConfig(
            model=ModelConfig(
                cascade=CascadeConfig(
                    enlarge_up_to=SMALL_PHOTO,
                    full_size_depth_up_to=SMALL_PHOTO,
                    occlusion_tolerance=0.03,
                    mirrorings=4,
                    mirrorings_fast=2,
                )
            ),
            loss=CASCADE_LOSS,
            optimizer=OptimizerConfig(),
            enlarged_share=0.5,
            out=Path("runs/cascade-procedural"),
        )
    ),
    "matchnerf-procedural": ProceduralTraining(
        TrainerConfig(
            model=ModelConfig(configuration="paper"),
            optimizer=replace(PAPER_OPTIMIZER, encoder_lr=2e-4, decoder_lr=5e-4, ema_decay=0.999),
            out=Path("runs/matchnerf-procedural"),
        )
    ),
    "idnerf-procedural": ProceduralTraining(
        TrainerConfig(
            # our small prior knows pictures at 8 pixels a cell, whatever their size
            model=replace(ID_NERF, paper=replace(ID_NERF.paper, latent_size=None)),
            # the timesteps at which the small prior was measured to know more than a linear guess (docs/guidance.md)
            guidance=GuidanceConfig(sds_weight=1.0, guidance_scale=1.0, weighting="clean", timesteps=(0.5, 0.98)),
            optimizer=replace(PAPER_OPTIMIZER, encoder_lr=2e-4, decoder_lr=5e-4, ema_decay=0.999),
            out=Path("runs/idnerf-procedural"),
        )
    ),
    "idnerf-dtu": DTUTraining(
        TrainerConfig(
            model=ID_NERF,
            guidance=GuidanceConfig(sds_weight=1.0, guidance_scale=100.0, prior=PriorConfig(kind="image-variation")),
            optimizer=replace(PAPER_OPTIMIZER, latent_lr=1e-3, clip="encoder"),
            steps=25 * 88 * 49,
            source_views=(3, 3),
            augment=False,
            out=Path("runs/idnerf-dtu"),
        )
    ),
    "matchnerf-dtu": DTUTraining(
        TrainerConfig(
            model=ModelConfig(configuration="paper"),
            optimizer=PAPER_OPTIMIZER,
            steps=25 * 88 * 49,
            source_views=(3, 3),
            augment=False,
            out=Path("runs/matchnerf-dtu"),
        )
    ),
}


def run_training(config: Any, options: Mapping[str, Any] | None = None) -> Path:
    """Run a preset's training; returns its run folder. ``options`` are kept with its training state."""
    from idnerf.training.trainer import train

    if isinstance(config, DTUTraining):
        from idnerf.training.dtu_scenes import DTUScenes, dtu_held_out

        data = f"DTU, the MVSNeRF family's training scans, at {config.size[0]}x{config.size[1]}"
        held_out = partial(dtu_held_out, config.root, config.size, config.held_out)
        return train(config.trainer, DTUScenes(config.root, config.size), held_out, data, options)
    from idnerf.training.procedural_scenes import ProceduralScenes, held_out_examples

    width, height = config.scenes.scene.size
    data = f"procedural scenes of idnerf at {width}x{height}, generated; no photo"
    held_out = partial(held_out_examples, config.scenes.scene, config.held_out)
    return train(config.trainer, ProceduralScenes(config.scenes), held_out, data, options)
