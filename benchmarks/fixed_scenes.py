"""The 64 fixed procedural test scenes on disk: rendered once, so that more weights cost inference only."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.procedural import generate_scene
from idnerf.data.procedural.config import ProceduralScene
from idnerf.data.procedural.pool import pack_scene, unpack_scene
from idnerf.data.procedural.test_set import named_configs
from idnerf.data.scene import Scene
from idnerf.data.seen import count_seen
from idnerf.data.view_selection import nearest_indices
from idnerf.errors import InputError
from idnerf.types import Cameras, Views


@dataclass(frozen=True)
class FixedTask:
    """One procedural view to render, with what is known exactly of it.

    Attributes:
        name: of the scene, such as ``forward-easy-3``.
        source: [view] nearest views; ``target`` carries their depth range.
        seen: number of sources that see the surface of each pixel.
    """

    name: str
    source: Views
    target: Cameras
    image: Float[Tensor, "3 height width"]
    depth: Float[Tensor, "height width"]
    seen: Float[Tensor, "height width"]


def generator_version() -> str:
    """Hash of the generator's sources: pictures of different versions do not compare."""
    folder = resources.files("idnerf.data.procedural")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def kept_generator(folder: Path) -> str:
    """Version of the generator whose pictures ``folder`` keeps; a new folder begins with the present one."""
    marker = Path(folder) / "generator.txt"
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(generator_version() + "\n")
    return marker.read_text().strip()


def fixed_scenes(folder: Path, limit: int | None = None) -> Iterator[tuple[str, ProceduralScene]]:
    """The first ``limit`` test scenes by name, from ``folder`` where they are, else generated into it.

    All pictures of a folder are of one generator, so that scores compare: what another version left unfinished is
    refused, and a line on standard error says when the generator has changed since.

    Raises:
        InputError: a scene is missing and the folder is of another version of the generator.
    """
    folder = Path(folder)
    begun_with, version = kept_generator(folder), generator_version()
    if begun_with != version:
        print(f"{folder} holds scenes of generator {begun_with}, now {version}: take another to renew", file=sys.stderr)
    for name, seed, config in islice(named_configs(), limit):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            if begun_with != version:
                raise InputError(f"{folder} lacks {name} and is of generator {begun_with}, not {version}: empty it")
            pack_scene(generate_scene(seed, config), path)
        yield name, unpack_scene(path)


def central_view(cameras: Cameras) -> int:
    """The view whose centre has the smallest sum of distances to the others: new views lie between photos."""
    return int(torch.cdist(cameras.centers, cameras.centers).sum(-1).argmin())


def fixed_task(name: str, scene: ProceduralScene, num_sources: int) -> FixedTask:
    """The most central view as the target, its ``num_sources`` nearest as the sources (L1 of camera centres)."""
    cameras = scene.views.cameras
    index = central_view(cameras)
    others = [i for i in range(len(cameras)) if i != index]
    sources = nearest_indices(cameras, cameras[index], num_sources, others)
    seen = count_seen(cameras[sources], scene.depth[sources], cameras[index], scene.depth[index])
    target = cameras[index].with_bounds(*Scene.target_bounds(cameras[sources]))
    return FixedTask(name, scene.views[sources], target, scene.views.images[index], scene.depth[index], seen)
