"""8. Your own training data: anything with `example(item, num_sources, generator)` can be trained on."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import idnerf
from idnerf.training.examples import Example, bounds_from_sources, draw_int
from idnerf.training.objectives import LossConfig
from idnerf.training.trainer import TrainerConfig, train


@dataclass(frozen=True)
class FolderOfScenes:
    """Posed scenes; a step takes one of their photos as the target, and the nearest others as sources."""

    scenes: list[idnerf.Scene]

    def example(self, item: int, num_sources: int, generator: torch.Generator) -> Example:
        """Everything random comes from the generator, which depends on the step: a resumed training goes on alike."""
        scene = self.scenes[draw_int(0, len(self.scenes) - 1, generator)]
        target = draw_int(0, len(scene) - 1, generator)
        source = scene.nearest(scene.cameras[target], n=num_sources)
        camera = bounds_from_sources(scene.cameras[target], source.cameras)  # the target's own range stays unknown
        photo = idnerf.Views(scene.image(target), camera)
        return Example(source, photo, depth=scene.depth(target), seen=None, scene=scene.name)


def main(
    scenes: tuple[Path, ...] = (), out: Path = Path("out/examples/own"), steps: int = 10, width: int = 128
) -> None:
    """Go on from the default weights with photos.

    Args:
        scenes: folders of posed photos; the bundled scene by default.
        out: run folder; it must not hold a training already.
        steps: training steps.
        width: photos are worked on at this width, in pixels; all scenes need one shape.
    """
    loaded = [idnerf.load_scene(folder) for folder in scenes or (idnerf.demo_folder(),)]
    height = round(width * loaded[0].cameras.height / loaded[0].cameras.width)
    config = TrainerConfig(
        loss=LossConfig(mse=5.0, charbonnier=1.0, ssim=0.4),  # colours alone: photos come without exact depth
        init="default",
        out=out,
        steps=steps,
        source_views=(2, 3),
        tile=(64, 48),
        workers=0,
        log_every=max(1, steps // 2),
        validate_every=0,
        save_every=steps,
    )
    run = train(config, FolderOfScenes([scene.resized((width, height)) for scene in loaded]), held_out=[])
    print(f"{run}: weights.safetensors, for `idnerf render SCENE --weights {run}`")


if __name__ == "__main__":
    tyro.cli(main)
