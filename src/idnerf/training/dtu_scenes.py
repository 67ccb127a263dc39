"""Examples from DTU's training scans, drawn as the MVSNeRF family does: sources from the view pair list, any light."""

from pathlib import Path

import torch

from idnerf.data.dtu import scan_pictures, scans
from idnerf.data.load import load_scene
from idnerf.errors import InputError
from idnerf.evaluation.protocols import evaluation_tasks, get_protocol, load_table
from idnerf.training.examples import Example, bounds_from_sources, draw_int
from idnerf.types import Views

LIGHTS = 7
SOURCES_DRAWN_FROM = 5
"""Published: 3 sources drawn of the best 5 of pair.txt."""


def read_pairs(path: Path) -> dict[int, list[int]]:
    """``Cameras/pair.txt``: for every view id, the other views from best to worst.

    Raises:
        InputError: missing or malformed.
    """
    try:
        numbers = [float(word) for word in path.read_text(encoding="utf-8").split()]
        pairs, at = {}, 1
        for _ in range(int(numbers[0])):
            view, count = int(numbers[at]), int(numbers[at + 1])
            entries = numbers[at + 2 : at + 2 + 2 * count]
            if len(entries) < 2 * count:
                raise ValueError("cut off")
            pairs[view] = [int(other) for other in entries[::2]]
            at += 2 + 2 * count
    except OSError:
        raise InputError(f"expected DTU's view pairs at {path}, found none: copy Cameras/pair.txt there") from None
    except (ValueError, IndexError):
        raise InputError(
            f"{path} is malformed: expected the number of views, then for each its id, a count, and (id, score) pairs"
        ) from None
    return pairs


class DTUScenes:
    """Scene provider of a training on DTU: every training scan that is there, any light, any view as target."""

    def __init__(self, root: Path, size: tuple[int, int]):
        training = {f"scan{number}" for number in load_table("dtu")["training_scans"]}
        self.root, self.size = root, size
        if not (root / "Rectified").is_dir():
            raise InputError(f"expected a DTU root with Cameras/train and Rectified at {root}; give another --root")
        self.scans = [scan for scan in scans(root) if scan in training]
        if not self.scans:
            raise InputError(f"{root} holds none of DTU's training scans; expected Rectified/scan3_train and so on")
        self.pairs = read_pairs(root / "Cameras" / "pair.txt")

    def example(self, item: int, num_sources: int, generator: torch.Generator) -> Example:
        """A scan, a light and a target drawn at random; sources drawn of the best five of the pair list."""
        scan = self.scans[draw_int(0, len(self.scans) - 1, generator)]
        photographed = {light for _, light in scan_pictures(self.root, scan)}
        lights = [light for light in range(LIGHTS) if light in photographed]
        if not lights:
            raise InputError(f"{self.root} has no pictures of {scan}: expected rect_001_0_r5000.png and so on")
        light = lights[draw_int(0, len(lights) - 1, generator)]
        scene = load_scene(self.root, scan=scan, light=light, size=self.size)
        targets = [i for i in scene.view_ids if len(self._partners(scene.view_ids, i)) >= num_sources]
        if not targets:
            raise InputError(f"{scan}: no view has {num_sources} partners of Cameras/pair.txt among its photos")
        view = targets[draw_int(0, len(targets) - 1, generator)]
        partners = self._partners(scene.view_ids, view)[: max(SOURCES_DRAWN_FROM, num_sources)]
        chosen = [partners[i] for i in torch.randperm(len(partners), generator=generator)[:num_sources].tolist()]
        target = scene.index_of(view)
        source = scene.views([scene.index_of(i) for i in chosen])
        camera = bounds_from_sources(scene.cameras[target], source.cameras)
        name = f"{scan}, light {light}, view {view}"
        return Example(source, Views(scene.image(target), camera), scene.depth(target), None, name)

    def _partners(self, present: tuple[int, ...], view: int) -> list[int]:
        return [other for other in self.pairs.get(view, []) if other in present]


def dtu_held_out(root: Path, size: tuple[int, int], count: int) -> list[Example]:
    """Up to ``count`` views of the test scans that are under ``root``, by the published split; none where none is."""
    test = {f"scan{number}" for number in load_table("dtu")["test_scans"]}
    examples: list[Example] = []
    for scan in scans(root):
        if scan not in test or len(examples) >= count:
            continue
        scene = load_scene(root, scan=scan, size=size)
        for task in evaluation_tasks(scene, get_protocol("mvsnerf"), num_sources=3)[: count - len(examples)]:
            source = scene.views(list(task.sources))
            camera = bounds_from_sources(scene.cameras[task.target], source.cameras)
            target = Views(scene.image(task.target), camera)
            examples.append(Example(source, target, scene.depth(task.target), None, scan))
    return examples
