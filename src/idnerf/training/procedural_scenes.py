"""Examples from procedural scenes: made on the fly, kept in a pool folder for reuse, easy scenes first.

python -m idnerf.training.procedural_scenes --pool POOL --count 2000      fills the pool ahead of a training
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.generate import generate_scene
from idnerf.data.procedural.pool import pack_scene, scene_path, unpack_scene
from idnerf.data.seen import count_seen
from idnerf.errors import InputError
from idnerf.geometry.cameras import resize, view_distances
from idnerf.training.camera_noise import CameraNoiseConfig, disturb
from idnerf.training.examples import Example, bounds_from_sources, draw_int
from idnerf.training.light_noise import LightNoiseConfig, relight
from idnerf.types import Cameras, Views

HELD_OUT_SEED = 1_000_000_000
"""Seeds from here on are never trained on."""


@dataclass(frozen=True)
class ProceduralScenesConfig:
    """Which procedural scenes a training sees, and when."""

    scene: ProceduralConfig = field(default_factory=lambda: ProceduralConfig(size=(288, 208)))
    """What each scene is drawn from; the curriculum lowers the upper end of its complexity at first."""
    pool: Path | None = None
    """Folder that keeps generated scenes (about 1.8 MB each); none generates every scene anew."""
    first_seed: int = 0
    """Seed of the first scene. Held-out scenes have seeds from 1,000,000,000 on."""
    reuse: float = 4.0
    """Examples drawn per scene on average: a new scene joins every so many examples."""
    start_scenes: int = 64
    """Scenes known at the first step."""
    max_scenes: int = 1_000_000
    """No more scenes than this are made."""
    ramp_scenes: int = 400
    """Number of scenes over which complexity rises from the easy third to its full range."""
    camera_noise: CameraNoiseConfig = field(default_factory=CameraNoiseConfig)
    """Errors of the source cameras; depth and visibility are those of the exact ones."""
    light_noise: LightNoiseConfig = field(default_factory=LightNoiseConfig)
    """Differences in light between the source photos."""
    shrink: int = 1
    """Scenes are shrunk by this factor along each side once they are read: trials at half size, from the same pool."""

    def __post_init__(self) -> None:
        for name in ("start_scenes", "max_scenes", "shrink"):
            if getattr(self, name) < 1:
                raise InputError(f"--scenes.{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if self.ramp_scenes < 0:
            raise InputError(f"--scenes.ramp-scenes: expected 0 or more, got {self.ramp_scenes}")
        if self.pool is not None and self.pool.exists() and not self.pool.is_dir():
            raise InputError(f"--scenes.pool: expected a folder, {self.pool} is a file; give another")
        if not self.reuse > 0:
            raise InputError(f"--scenes.reuse: expected a number above 0, got {self.reuse}")
        if any(side % self.shrink for side in self.scene.size):
            raise InputError(f"--scenes.shrink: expected a divisor of {self.scene.size}, got {self.shrink}")
        if not 0 <= self.first_seed <= HELD_OUT_SEED - self.max_scenes:
            raise InputError(
                f"--scenes.first-seed: expected 0 to {HELD_OUT_SEED - self.max_scenes} with {self.max_scenes} scenes "
                f"(held-out scenes come after), got {self.first_seed}"
            )


class ProceduralScenes:
    """Scene provider of a training on procedural scenes."""

    def __init__(self, config: ProceduralScenesConfig):
        self.config = config

    def scene_config(self, index: int) -> ProceduralConfig:
        """Configuration of scene number ``index``: from easy to hard."""
        low, high = self.config.scene.complexity
        progress = min(1.0, 1 / 3 + index / max(1, self.config.ramp_scenes))
        return replace(self.config.scene, complexity=(low, low + (high - low) * progress))

    def scene(self, index: int) -> ProceduralScene:
        """Scene number ``index``, from the pool where it is there; else generated, and kept there."""
        seed = self.config.first_seed + index
        if self.config.pool is None:
            return shrunk_scene(generate_scene(seed, self.scene_config(index)), self.config.shrink)
        path = scene_path(self.config.pool, seed)
        if not path.is_file():
            pack_scene(generate_scene(seed, self.scene_config(index)), path)
        scene, wanted = unpack_scene(path), self.config.scene
        if (scene.views.cameras.size, len(scene.views)) != (wanted.size, wanted.num_views):
            width, height = scene.views.cameras.size
            raise InputError(
                f"--scenes.pool: {path} has {len(scene.views)} views of {width}x{height}, the training asks for "
                f"{wanted.num_views} of {wanted.size[0]}x{wanted.size[1]}; give another folder"
            )
        return shrunk_scene(scene, self.config.shrink)

    def example(self, item: int, num_sources: int, generator: torch.Generator) -> Example:
        """A target view and ``num_sources`` of its nearest views; scenes join one by one as items go on.

        Half of the examples come from the newest quarter of the scenes known at that item.
        """
        c = self.config
        known = min(c.max_scenes, c.start_scenes + int(item / c.reuse))
        first = 0 if torch.rand((), generator=generator) < 0.5 else known * 3 // 4
        scene = self.scene(draw_int(first, known - 1, generator))
        example = draw_example(scene, num_sources, generator)
        cameras = disturb(example.source.cameras, c.camera_noise, generator)
        images = relight(example.source.images, c.light_noise, generator)
        return replace(example, source=Views(images, cameras))


def shrunk_scene(scene: ProceduralScene, factor: int) -> ProceduralScene:
    """The scene at 1/``factor`` of its size along each side, a divisor of both.

    Colours are means. Depths at edges must not be, so they are those half a fine pixel from the new centres.
    """
    if factor == 1:
        return scene
    images, middle = F.avg_pool2d(scene.views.images, factor), factor // 2
    cameras = resize(scene.views.cameras, (images.shape[-1], images.shape[-2]))
    return replace(scene, views=Views(images, cameras), depth=scene.depth[:, middle::factor, middle::factor])


def draw_example(scene: ProceduralScene, num_sources: int, generator: torch.Generator) -> Example:
    """A random target and sources drawn from its ``num_sources + 1`` nearest views."""
    cameras = scene.views.cameras
    target = draw_int(0, len(cameras) - 1, generator)
    order = nearest_others(cameras, target, num_sources)[: num_sources + 1]
    chosen = order[torch.randperm(len(order), generator=generator)[:num_sources]]
    return make_example(scene, target, chosen)


def nearest_others(cameras: Cameras, target: int, fewest: int) -> Int64[Tensor, "other"]:
    """Numbers of the views other than ``target``, nearest first. Raises InputError for less than ``fewest``."""
    if len(cameras) <= fewest:
        raise InputError(
            f"--scenes.scene.num-views: expected at least {fewest + 1} for {fewest} source views, got {len(cameras)}"
        )
    order = view_distances(cameras, cameras[target]).argsort()
    return order[order != target]


def make_example(scene: ProceduralScene, target: int, sources: torch.Tensor) -> Example:
    """The example of given view numbers; pixels deeper or nearer than the sources' bounds count as unknown depth."""
    source = scene.views[sources]
    cameras = bounds_from_sources(scene.views.cameras[target], source.cameras)
    depth = scene.depth[target]
    seen = count_seen(source.cameras, scene.depth[sources], cameras, depth)
    known = (depth >= cameras.near) & (depth <= cameras.far)
    views = type(source)(scene.views.images[target], cameras)
    return Example(source, views, torch.where(known, depth, 0.0), seen, scene.name)


def held_out_examples(config: ProceduralConfig, count: int, num_sources: int = 3) -> list[Example]:
    """``count`` held-out scenes, complexity spread evenly over its range, view 0 from its nearest other views."""
    examples = []
    low, high = config.complexity
    for number in range(count):
        level = low + (high - low) * (number + 0.5) / count
        scene = generate_scene(HELD_OUT_SEED + number, replace(config, complexity=(level, level)))
        sources = nearest_others(scene.views.cameras, 0, num_sources)[:num_sources]
        examples.append(make_example(scene, 0, sources))
    return examples


def fill(pool: Path, start: int = 0, count: int = 1000, nice: int = 5, interiors: float = 0.0) -> None:
    """Generate scenes ``start`` to ``start + count`` of the default training into a pool folder.

    ``interiors``: as the training will have it (``--scenes.scene.interiors``).
    """
    os.nice(nice)
    torch.set_num_threads(1)
    default = ProceduralScenesConfig(pool=pool)
    scenes = ProceduralScenes(replace(default, scene=replace(default.scene, interiors=interiors)))
    for index in range(start, start + count):
        scenes.scene(index)


if __name__ == "__main__":
    import tyro

    tyro.cli(fill)
