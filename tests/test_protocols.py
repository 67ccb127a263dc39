"""Splits against the published tables, and the tasks that protocols make of scenes."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from idnerf.data.photo import PosedPhoto
from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.evaluation.protocols import (
    SPLIT_FILES,
    Task,
    evaluation_tasks,
    get_protocol,
    load_table,
    own_name,
    protocol_names,
)
from idnerf.types import Cameras


def line_of_cameras(
    name: str,
    scene_format: str,
    view_ids: tuple[int, ...],
    centers: dict[int, tuple[float, float, float]] | None = None,
    size: tuple[int, int] = (1008, 756),
) -> Scene:
    """A scene without pictures: view i sits at x = i unless ``centers`` puts it elsewhere."""
    c2w = torch.eye(4).repeat(len(view_ids), 1, 1)
    for row, view_id in enumerate(view_ids):
        c2w[row, :3, 3] = torch.tensor((centers or {}).get(view_id, (float(view_id), 0.0, 0.0)))
    K = torch.tensor([[800.0, 0, size[0] / 2], [0, 800.0, size[1] / 2], [0, 0, 1]]).repeat(len(view_ids), 1, 1)
    bounds = torch.ones(len(view_ids))
    photo = PosedPhoto(Path("none.png"), np.eye(4), np.eye(3), size)
    return Scene(
        name,
        scene_format,
        Path(),
        Cameras(c2w, K, size, bounds, 5 * bounds),
        tuple(f"{i}.png" for i in view_ids),
        view_ids,
        (photo,) * len(view_ids),
    )


def ids(scene: Scene, task: Task) -> tuple[int, list[int]]:
    return scene.view_ids[task.target], [scene.view_ids[i] for i in task.sources]


def rows_of_tables() -> list[tuple[str, str, dict[str, list[int]]]]:
    rows = []
    for name in SPLIT_FILES:
        table = load_table(name)
        scenes = {"any": table["any_scene"]} if "any_scene" in table else table["scenes"]
        rows += [(name, scene, views) for scene, views in scenes.items()]
    return rows


def test_a_table_is_read_once_and_scenes_are_not_kept():
    assert load_table("dtu") is load_table("dtu")
    scene = line_of_cameras("fern", "llff", (0, 1, 2))
    assert own_name(scene) == "fern"
    kept = weakref.ref(scene)
    del scene
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(("table", "scene", "views"), rows_of_tables())
def test_every_split_has_distinct_sources_and_four_other_targets(table, scene, views):
    sources, targets = views["sources"], views["targets"]
    assert len(sources) == len(set(sources)) == (12 if table == "tanks" else 16)
    assert len(targets) == len(set(targets)) == 4
    assert not set(sources) & set(targets)


def test_tables_are_complete():
    assert set(load_table("rff")["scenes"]) == {
        "fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex"
    }  # fmt: skip
    assert set(load_table("blender")["scenes"]) == {
        "chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship"
    }  # fmt: skip
    dtu = load_table("dtu")
    assert len(dtu["test_scans"]) == 16 and len(dtu["training_scans"]) == len(set(dtu["training_scans"])) == 88
    assert not set(dtu["test_scans"]) & set(dtu["training_scans"])
    assert set(dtu["depth_scans"]) <= set(dtu["test_scans"])
    blender = load_table("blender")["scenes"].values()
    assert all(0 <= i < 100 for views in blender for i in views["sources"] + views["targets"])


@pytest.mark.parametrize(("table", "total"), [("rff", 3251), ("blender", 7537), ("dtu", 579), ("tanks", 3037)])
def test_sums_of_the_published_indices(table, total):
    """A slip of one digit shows."""
    assert sum(sum(views["sources"] + views["targets"]) for t, _, views in rows_of_tables() if t == table) == total


def test_flower_tasks_written_out_by_hand():
    """On a line, view i at x = i: the nearest published sources of 20, 6, 22 and 5."""
    scene = line_of_cameras("flower", "llff", tuple(range(34)))
    tasks = [ids(scene, task) for task in evaluation_tasks(scene, get_protocol("mvsnerf"), 3)]
    assert tasks == [(20, [19, 21, 18]), (6, [4, 3, 10]), (22, [21, 19, 18]), (5, [4, 3, 10])]


def test_dtu_tasks_name_camera_ids_with_gaps():
    views = sorted([25, 21, 33, 22, 14, 15, 26, 30, 31, 35, 34, 43, 46, 29, 16, 36, 32, 24, 23, 44])
    scene = line_of_cameras("scan24", "dtu", tuple(views), size=(640, 512))
    tasks = evaluation_tasks(scene, get_protocol("mvsnerf"), 3)
    assert [ids(scene, task)[0] for task in tasks] == [32, 24, 23, 44]
    assert ids(scene, tasks[0])[1] == [31, 33, 30]
    assert ids(scene, tasks[2])[1] == [22, 21, 25]
    assert tasks[0].target == views.index(32)
    split = get_protocol("mvsnerf").split(scene)
    assert split.foreground_mask and split.crop == 1.0 and split.size == (640, 512)
    assert split.depth_unit_mm is None and "training scan" in split.notes[0]


def test_depth_errors_are_for_the_five_published_scans():
    protocol = get_protocol("mvsnerf")
    views = tuple(range(49))
    units = {
        scan: protocol.split(line_of_cameras(f"scan{scan}", "dtu", views, size=(640, 512))).depth_unit_mm
        for scan in (1, 8, 21, 103, 110, 30, 114)
    }
    assert units == {1: 200.0, 8: 200.0, 21: 200.0, 103: 200.0, 110: 200.0, 30: None, 114: None}


def test_blender_scene_is_cropped_and_unmasked():
    split = get_protocol("mvsnerf").split(line_of_cameras("lego", "blender", tuple(range(100)), size=(800, 800)))
    assert split.size == (800, 800) and split.crop == 0.8 and not split.foreground_mask and split.notes == ()


def test_tanks_scene_has_its_own_sources():
    scene = line_of_cameras("Truck", "colmap", tuple(range(251)), size=(1920, 1080))
    tasks = [ids(scene, task) for task in evaluation_tasks(scene, get_protocol("mvsnerf"), 2)]
    assert tasks == [(0, [1, 2]), (80, [79, 81]), (104, [103, 105]), (128, [127, 129])]


def test_distance_is_l1():
    """(0.7, 0.7) is nearer than (1.2, 0) by L2 and farther by L1."""
    scene = line_of_cameras("s", "colmap", (0, 1, 2, 3), {0: (0, 0, 0), 1: (0.7, 0.7, 0), 2: (1.2, 0, 0), 3: (9, 9, 9)})
    protocol = get_protocol("nearest")
    assert ids(scene, evaluation_tasks(scene, protocol, 2, (0,))[0]) == (0, [2, 1])
    assert ids(scene, evaluation_tasks(scene, replace(protocol, order=2), 2, (0,))[0]) == (0, [1, 2])


def test_small_photos_take_the_half_size_and_say_so():
    protocol = get_protocol("mvsnerf")
    small = protocol.split(line_of_cameras("horns", "llff", tuple(range(62)), size=(504, 378)))
    assert small.size == (480, 320) and "504x378" in small.notes[0]
    large = protocol.split(line_of_cameras("horns", "llff", tuple(range(62)), size=(4032, 3024)))
    assert large.size == (960, 640) and not large.notes
    asked = protocol.split(line_of_cameras("horns", "llff", tuple(range(62))), size=(240, 160), crop=1.0)
    assert asked.size == (240, 160) and asked.crop == 1.0 and not asked.notes


@pytest.mark.parametrize("num_sources", [2, 3, 5])
def test_nearest_makes_every_view_a_target_of_all_others(num_sources):
    scene = line_of_cameras("anything", "transforms", tuple(range(6)), size=(30, 20))
    protocol = get_protocol("nearest")
    tasks = evaluation_tasks(scene, protocol, num_sources)
    assert [task.target for task in tasks] == list(range(6))
    for task in tasks:
        assert task.target not in task.sources
        assert len(set(task.sources)) == num_sources
        distances = [abs(i - task.target) for i in task.sources]
        left_out = [abs(i - task.target) for i in range(6) if i not in (task.target, *task.sources)]
        assert distances == sorted(distances)
        assert not left_out or distances[-1] <= min(left_out)
    assert protocol.split(scene).size == (30, 20) and protocol.split(scene).crop == 1.0


def test_chosen_targets_are_protocol_ids_and_never_their_own_source():
    scene = line_of_cameras("flower", "llff", tuple(range(34)))
    (task,) = evaluation_tasks(scene, get_protocol("mvsnerf"), 3, targets=(12,))
    assert ids(scene, task) == (12, [11, 13, 10])


def test_bad_input_names_what_to_do():
    scene = line_of_cameras("fox", "transforms", tuple(range(5)))
    with pytest.raises(InputError, match=r"unknown --protocol 'nearst': choose one of nearest, mvsnerf"):
        get_protocol("nearst")
    with pytest.raises(InputError, match=r"no split for scene 'fox' \(transforms\).*fern flower.*--protocol nearest"):
        evaluation_tasks(scene, get_protocol("mvsnerf"), 3)
    for num_sources in (0, 1, 5):
        with pytest.raises(InputError, match=rf"between 2 and 4 for fox under protocol nearest, got {num_sources}"):
            evaluation_tasks(scene, get_protocol("nearest"), num_sources)
    with pytest.raises(InputError, match=r"--targets of fox must be among its views 0 1 2 3 4, got 7 9"):
        evaluation_tasks(scene, get_protocol("nearest"), 2, targets=(1, 7, 9))
    with pytest.raises(InputError, match="got none"):
        evaluation_tasks(scene, get_protocol("nearest"), 2, targets=())
    with pytest.raises(InputError, match="must not repeat"):
        evaluation_tasks(scene, get_protocol("nearest"), 2, targets=(1, 1))
    part = line_of_cameras("fern", "llff", tuple(range(15)))
    with pytest.raises(InputError, match=r"needs views 15 16 17 18 19, but the scene has 15 views \(0 to 14\)"):
        evaluation_tasks(part, get_protocol("mvsnerf"), 3)


@pytest.mark.parametrize("name", protocol_names())
def test_messages_are_one_line_and_protocols_say_their_choices(name):
    protocol = get_protocol(name)
    assert protocol.name == name and any("L1" in note for note in protocol.notes)
    assert any("near and far" in note for note in protocol.notes)
    assert all("\n" not in note for note in protocol.notes)
