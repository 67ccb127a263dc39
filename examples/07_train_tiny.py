"""7. Training: a small network of your own from nothing, on procedural scenes, for a few steps."""

from pathlib import Path

import torch
import tyro

import idnerf
from idnerf.data.image_io import write_png
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.models.cascade import CascadeConfig
from idnerf.models.idnerf import ModelConfig
from idnerf.training.objectives import LossConfig
from idnerf.training.procedural_scenes import ProceduralScenes, ProceduralScenesConfig
from idnerf.training.trainer import TrainerConfig, train

SMALL = CascadeConfig(
    pyramid_widths=(8, 8, 16, 16, 16),
    coarse_channels=16,
    coarse_groups=4,
    volume_widths=(8, 8, 16),
    voxel_channels=4,
    token_width=16,
    blend_width=8,
    refinement_widths=(8, 8, 16),
    planes=16,
    planes_fast=16,
)
"""A twenty-fifth of the default network."""


def main(out: Path = Path("out/examples/tiny"), steps: int = 60, scenes: int = 4, width: int = 96) -> None:
    """Train, load the weights as anyone would, render the bundled scene.

    Args:
        out: run folder: weights, training state, log, TensorBoard files; it must not hold a training already.
        steps: training steps. These few show how it goes; `idnerf train cascade-procedural` takes thousands.
        scenes: procedural scenes to learn from.
        width: of their pictures, in pixels.
    """
    size = (width, width * 3 // 4)
    data = ProceduralScenes(
        ProceduralScenesConfig(
            scene=ProceduralConfig(size=size, num_views=4, complexity=(0.0, 0.2), supersample=1),
            pool=out / "pool",  # each scene is made once
            start_scenes=scenes,
            max_scenes=scenes,
        )
    )
    config = TrainerConfig(
        model=ModelConfig(cascade=SMALL),
        loss=LossConfig(mse=5.0, charbonnier=1.0, ssim=0.4, blend=0.5, depth_distribution=0.2, depth=1.0),
        out=out,
        steps=steps,
        source_views=(3, 3),
        tile=(64, 48),
        workers=0,
        log_every=max(1, steps // 4),
        validate_every=0,
        save_every=steps,
    )
    run = train(config, data, held_out=[])

    model = idnerf.IDNeRF.from_pretrained(run)
    scene = idnerf.load_scene(idnerf.demo_folder()).resized((160, 120))
    output = model.render(scene.nearest(scene.cameras[0], n=3), scene.cameras[0])
    write_png(run / "after.png", torch.cat([output.rgb, scene.image(0)], dim=-1))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{run}: {count:,} parameters, {steps} steps; log.jsonl has the loss, after.png a rendering beside the truth")


if __name__ == "__main__":
    tyro.cli(main)
