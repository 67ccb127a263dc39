"""Which views are targets, which are sources, at what size and under which mask: protocols by name.

``nearest`` suits any scene: each view in turn is the target, its sources the nearest of all the others.
``mvsnerf`` is the split of the MVSNeRF family (MVSNeRF, MatchNeRF, ENeRF, ...): fixed candidates and targets
per scene, kept as JSON in ``splits/`` (docs/evaluation.md lists them).
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from idnerf.data.scene import Scene
from idnerf.data.view_selection import SAME_POSE, usual_sources
from idnerf.errors import InputError

SPLIT_FILES = ("rff", "blender", "dtu", "tanks")


@dataclass(frozen=True)
class Task:
    """One image to render, as positions in the scene (not protocol ids): sources nearest first."""

    target: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """What a protocol says of one scene.

    Attributes:
        candidates: protocol ids that may be sources.
        targets: protocol ids to render.
        sizes: (width, height) to evaluate at, largest first; one once the scene's photos have decided.
        crop: share of width and height that is scored, around the centre; 1 scores all.
        foreground_mask: score the foreground only (where the true depth is known).
        depth_unit_mm: millimetres per scene unit where depth errors are reported; None reports none.
        notes: choices and departures, for the report.
    """

    candidates: tuple[int, ...]
    targets: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    crop: float
    foreground_mask: bool
    depth_unit_mm: float | None
    notes: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) to evaluate at."""
        return self.sizes[0]


@dataclass(frozen=True)
class Protocol:
    """How scenes are evaluated.

    Attributes:
        name: as ``--protocol`` takes it.
        order: distance between camera centres by which sources are chosen: 1 (L1) or 2 (L2).
        tables: the parsed split files; empty means every view is a target and all others are candidates.
        notes: choices that hold for every scene, for the report.
    """

    name: str
    order: int
    tables: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def split(self, scene: Scene, size: tuple[int, int] | None = None, crop: float | None = None) -> Split:
        """What this protocol says of ``scene``, with ``size`` and ``crop`` in place of its own where given.

        Raises ``InputError`` when it has no split for the scene.
        """
        split = self._split(scene)
        if size is None:
            size, note = _size_that_fits(scene, split.sizes)
            split = replace(split, notes=(*split.notes, *note))
        return replace(split, sizes=(size,), crop=split.crop if crop is None else crop)

    def _split(self, scene: Scene) -> Split:
        if not self.tables:
            return _every_view(scene)
        name = own_name(scene).lower()
        for table in self.tables:
            views = table.get("any_scene") or table["scenes"].get(name)
            if scene.format in table["formats"] and views:
                return _from_table(table, views, scene)
        known = {
            table["dataset"]: "any scan" if "any_scene" in table else " ".join(table["scenes"]) for table in self.tables
        }
        raise InputError(
            f"protocol {self.name} has no split for scene {scene.name!r} ({scene.format}); it knows "
            + "; ".join(f"{dataset}: {scenes}" for dataset, scenes in known.items())
            + "; use --protocol nearest for other scenes"
        )


def _every_view(scene: Scene) -> Split:
    return Split(
        candidates=tuple(scene.view_ids),
        targets=tuple(scene.view_ids),
        sizes=(scene.cameras.size,),
        crop=1.0,
        foreground_mask=scene.format == "dtu",
        depth_unit_mm=DTU_UNIT_MM if scene.format == "dtu" else None,
        notes=(),
    )


DTU_UNIT_MM = 200.0
"""The DTU reader divides lengths, in millimetres, by 200."""


def _from_table(table: dict[str, Any], views: dict[str, list[int]], scene: Scene) -> Split:
    candidates, targets = tuple(views["sources"]), tuple(views["targets"])
    missing = sorted({*candidates, *targets} - set(scene.view_ids))
    if missing:
        raise InputError(
            f"the {table['dataset']} split of {scene.name} needs views {_ids(missing)}, but the scene has "
            f"{len(scene.view_ids)} views ({min(scene.view_ids)} to {max(scene.view_ids)}): is it complete?"
        )
    notes: list[str] = []
    unit_mm = None
    if "test_scans" in table:
        number = own_name(scene).removeprefix("scan")
        scan = int(number) if number.isdigit() else None
        unit_mm = table["unit_mm"] if scan in table["depth_scans"] else None
        if scan not in table["test_scans"]:
            kind = "a training scan" if scan in table["training_scans"] else "not a test scan"
            notes.append(f"{scene.name} is {kind} of DTU: not part of the published average")
    sizes = tuple((width, height) for width, height in table["sizes"])
    return Split(candidates, targets, sizes, table["crop"], table["foreground_mask"], unit_mm, tuple(notes))


def _size_that_fits(scene: Scene, sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], tuple[str, ...]]:
    """The largest of a protocol's sizes that the photos fill, else the smallest; a note if not the first."""
    width, height = scene.cameras.size
    size = next((s for s in sizes if s[0] <= width and s[1] <= height), sizes[-1])
    if size == sizes[0]:
        return size, ()
    note = (
        f"{scene.name}: photos of {width}x{height} are smaller than the protocol's "
        f"{sizes[0][0]}x{sizes[0][1]}: evaluated at {size[0]}x{size[1]}"
    )
    return size, (note,)


def evaluation_tasks(
    scene: Scene, protocol: Protocol, num_sources: int | None, targets: tuple[int, ...] | None = None
) -> list[Task]:
    """The images to render.

    Args:
        num_sources: sources per target, at least 2; None takes the usual number, or all that every target has where
            they are fewer.
        targets: protocol ids of the views to render instead of the protocol's own; candidates stay its own.

    Raises ``InputError`` for too few candidates, unknown or repeated targets.
    """
    split = protocol.split(scene)
    chosen = split.targets if targets is None else targets
    unknown = sorted(set(chosen) - set(scene.view_ids))
    if unknown or not chosen:
        raise InputError(
            f"--targets of {scene.name} must be among its views {_ids(scene.view_ids)}, got {_ids(unknown) or 'none'}"
        )
    if len(set(chosen)) < len(chosen):
        raise InputError(f"--targets must not repeat a view, got {_ids(chosen)}")
    candidates = {scene.view_ids.index(target): _candidates(scene, split, target) for target in chosen}
    fewest = min(map(len, candidates.values()))
    count = usual_sources(fewest) if num_sources is None else num_sources
    if fewest < 2:
        raise InputError(
            f"expected at least 2 source views beside each target of {scene.name} under protocol {protocol.name}, got "
            f"{fewest}: give more photos"
        )
    if not 2 <= count <= fewest:
        raise InputError(
            f"--num-sources must be between 2 and {fewest} for {scene.name} under protocol {protocol.name}, got {count}"
        )
    tasks = []
    for target, others in candidates.items():
        sources = scene.nearest_indices(scene.cameras[target], count, candidates=others, order=protocol.order)
        tasks.append(Task(target, tuple(sources)))
    return tasks


def _candidates(scene: Scene, split: Split, target: int) -> list[int]:
    """Positions of the views that may be sources of a target (a protocol id): none that shares its pose."""
    own = scene.cameras.c2w[scene.view_ids.index(target)]
    same = (scene.cameras.c2w - own).abs().amax((-2, -1)) <= SAME_POSE
    positions = {view_id: index for index, view_id in enumerate(scene.view_ids)}
    return [positions[i] for i in split.candidates if i != target and not same[positions[i]]]


def _ids(view_ids: Any, limit: int = 12) -> str:
    """View ids for a message, cut short where there are many."""
    words = [str(i) for i in view_ids]
    return " ".join(words[:limit]) + (f" ... ({len(words)} in all)" if len(words) > limit else "")


def own_name(scene: Scene) -> str:
    """What splits call the scene: its name without the folders that tell it from others of that name."""
    return scene.name.rpartition("/")[2]


@cache
def load_table(name: str) -> dict[str, Any]:
    """The parsed split file ``splits/{name}.json`` of the package."""
    return json.loads(resources.files("idnerf.evaluation").joinpath(f"splits/{name}.json").read_text("utf-8"))


_COMMON_NOTES = (
    "near and far of a target: the nearest near and farthest far of its sources; its own are not read",
    "sources: the nearest candidates by L1 distance of camera centres",
)


def protocol_names() -> tuple[str, ...]:
    """Names that ``get_protocol`` knows."""
    return ("nearest", "mvsnerf")


def get_protocol(name: str) -> Protocol:
    """The protocol called ``name``; ``InputError`` lists the known ones."""
    if name == "nearest":
        return Protocol(name, 1, (), _COMMON_NOTES)
    if name == "mvsnerf":
        return Protocol(name, 1, tuple(load_table(table) for table in SPLIT_FILES), _COMMON_NOTES)
    raise InputError(f"unknown --protocol {name!r}: choose one of {', '.join(protocol_names())}")
