"""What the small prior is trained on: groups of neighbouring views of one scene and one size, by number."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from idnerf.data.load import find_scenes, load_scene
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.generate import generate_scene
from idnerf.data.scene import Scene
from idnerf.data.view_selection import nearest_indices
from idnerf.errors import InputError
from idnerf.training.procedural_scenes import HELD_OUT_SEED, ProceduralScenes, ProceduralScenesConfig, shrunk_scene
from idnerf.types import Views

GROUP_VIEWS = 6
"""Views of a group at most."""


@runtime_checkable  # so that the tests can check it
class ViewGroups(Protocol):
    """Groups of views; ``group(i)`` is the same at every call."""

    def __len__(self) -> int: ...

    def group(self, index: int) -> Views:
        """[view] neighbouring views of one scene."""
        ...


@dataclass(frozen=True)
class ProceduralGroups:
    """The views of procedural scenes, from a pool folder where they are there, else generated (and kept there)."""

    scenes: ProceduralScenes

    def __len__(self) -> int:
        return self.scenes.config.max_scenes

    def group(self, index: int) -> Views:
        return self.scenes.scene(index).views


@dataclass(frozen=True)
class HeldOutProcedural:
    """Procedural scenes of seeds that are never trained on, complexity spread evenly over its range."""

    config: ProceduralConfig
    count: int
    shrink: int = 1

    def __len__(self) -> int:
        return self.count

    def group(self, index: int) -> Views:
        level = (index + 0.5) / self.count
        config = ProceduralConfig(
            size=self.config.size, num_views=self.config.num_views, rig=self.config.rig, complexity=(level, level)
        )
        return shrunk_scene(generate_scene(HELD_OUT_SEED + index, config), self.shrink).views


@dataclass(frozen=True)
class PhotoGroups:
    """Every view of real scenes with its nearest neighbours."""

    members: tuple[tuple[Scene, int], ...]

    def __len__(self) -> int:
        return len(self.members)

    def group(self, index: int) -> Views:
        scene, view = self.members[index]
        others = nearest_indices(scene.cameras, scene.cameras[view], min(GROUP_VIEWS, len(scene)) - 1)
        return scene.views([view, *others])


def procedural_groups(
    size: tuple[int, int], pool: Path | None, count: int, held_out: int, shrink: int = 1
) -> tuple[ProceduralGroups, HeldOutProcedural]:
    """Procedural scenes of ``size`` to train on and to measure on, rendered ``shrink`` times as large."""
    scene = ProceduralConfig(size=(size[0] * shrink, size[1] * shrink), num_views=GROUP_VIEWS)
    config = ProceduralScenesConfig(scene=scene, pool=pool, start_scenes=count, max_scenes=count, shrink=shrink)
    return ProceduralGroups(ProceduralScenes(config)), HeldOutProcedural(scene, held_out, shrink)


def photo_groups(root: Path, size: tuple[int, int], fewest: int, held_out: int) -> tuple[PhotoGroups, PhotoGroups]:
    """Views of the scenes under ``root`` to train on and to measure on, photos resized straight to ``size``.

    The last scene is held out; of a single scene every eighth view as a target (its photo still is a source of others).

    Args:
        fewest: views that a scene must have to be used.

    Raises:
        InputError: no scene, or none with enough views.
    """
    scenes = [load_scene(spec, size=size) for spec in find_scenes(root)]
    members = [[(scene, view) for view in range(len(scene))] for scene in scenes if len(scene) >= fewest]
    if not members:
        raise InputError(
            f"{root}: expected a scene of at least {fewest} views, the largest has {max(map(len, scenes))}"
        )
    if len(members) > 1:
        training, measured = [m for scene in members[:-1] for m in scene], members[-1]
    else:
        training = [m for number, m in enumerate(members[0]) if number % 8]
        measured = members[0][::8]
    step = max(1, len(measured) // held_out)
    return PhotoGroups(tuple(training)), PhotoGroups(tuple(measured[::step][:held_out]))
