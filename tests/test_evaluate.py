"""`idnerf evaluate` on roots of several scenes, with few photos, and where something fails late."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command_line import run
from idnerf import cli, load_scene
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.evaluation.protocols import evaluation_tasks, get_protocol
from idnerf.models.idnerf import IDNeRF
from idnerf.types import RenderOutput
from tiny_cases import TINY_MODELS

NEAREST = get_protocol("nearest")


@pytest.fixture(scope="module")
def three_photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "three"
    config = ProceduralConfig(size=(48, 32), num_views=3, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(6, config), folder)
    return folder


@pytest.fixture
def root(scene, three_photos, tmp_path) -> Path:
    """Two scenes, of five photos and of three."""
    place = tmp_path / "root"
    shutil.copytree(scene, place / "garden")
    shutil.copytree(three_photos, place / "three")
    return place


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grey(_, target) -> RenderOutput:
    ones = torch.ones(target.height, target.width)
    return RenderOutput(torch.full((3, target.height, target.width), 0.5), 2 * ones, ones)


COMMON = ["--quality", "fast", "--no-references"]


def test_scenes_of_few_photos_need_no_number_of_sources(capsys, root, weights, tmp_path):
    report_path = tmp_path / "report.json"
    arguments = ["evaluate", root, "--json", report_path, "--weights", weights, "--targets", "0,1", *COMMON]
    code, _, error = run(capsys, *arguments)
    assert code == 0, error
    report = json.loads(report_path.read_text())
    assert [len(view["sources"]) for view in report["views"]] == [3, 3, 2, 2]
    assert report["num_sources"] == 3
    assert "three: 2 sources, all there are beside a target" in report["notes"]
    assert not any("garden: " in note for note in report["notes"])
    code, _, error = run(capsys, *arguments, "--num-sources", 3)
    assert code == 2 and "--num-sources must be between 2 and 2 for three" in error
    code, _, error = run(capsys, *arguments, "--num-sources", 2)
    report = json.loads(report_path.read_text())
    assert code == 0 and report["num_sources"] == 2 and not any("all there are" in note for note in report["notes"])


def test_two_photos_are_too_few_and_photos_of_one_pose_count_once(three_photos):
    loaded = load_scene(three_photos)
    assert [len(task.sources) for task in evaluation_tasks(loaded, NEAREST, None)] == [2, 2, 2]
    with pytest.raises(InputError, match=r"at least 2 source views beside each target of three .*, got 1: give more"):
        evaluation_tasks(loaded.select([0, 1]), NEAREST, None)
    twice = replace(loaded.select([0, 0, 1, 2]), view_ids=(0, 1, 2, 3))
    assert {len(task.sources) for task in evaluation_tasks(twice, NEAREST, None)} == {2}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--targets", "3"], "--targets of three must be among its views 0 1 2, got 3"),
        (["--crop", "0.15"], "three: SSIM needs at least 7x7 pixels, and 8x6 are scored"),
        (["--num-sources", "3"], "between 2 and 2 for three"),
    ],
)
def test_every_scene_is_checked_before_weights_are_loaded(capsys, monkeypatch, root, extra, expected):
    def never(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("idnerf.commands.evaluate.load_model", never)
    code, _, error = run(capsys, "evaluate", root, *extra)
    assert code == 2 and expected in error and error.count("\n") == 1, error


@pytest.mark.parametrize("damaged", ["garden", "three"])
def test_a_scene_that_fails_late_is_named_and_the_others_are_reported(capsys, root, weights, tmp_path, damaged):
    cut(root / damaged / "images" / "001.png")
    report_path, other = tmp_path / "report.json", ({"garden", "three"} - {damaged}).pop()
    code, out, error = run(capsys, "evaluate", root, "--json", report_path, "--weights", weights, *COMMON)
    assert code == 2 and error.startswith(f"idnerf: 1 of 2 scenes failed ({damaged}): image "), error
    assert "001.png is damaged or truncated" in error and error.count("\n") == 1
    report = json.loads(report_path.read_text())
    assert set(report["scenes"]) == {other} and other in out
    assert report["notes"][0].startswith(f"{damaged} was left out: image ")


def test_nothing_is_written_where_every_scene_fails(capsys, root, weights, tmp_path):
    for name in ("garden", "three"):
        cut(root / name / "images" / "001.png")
    code, _, error = run(capsys, "evaluate", root, "--json", tmp_path / "r.json", "--weights", weights, *COMMON)
    assert code == 2 and error.startswith("idnerf: image ") and not (tmp_path / "r.json").exists()


def test_the_report_is_written_before_anything_is_printed(monkeypatch, three_photos, weights, tmp_path):
    """Standard output may be closed (`| true`) or full."""

    def closed(_):
        raise BrokenPipeError

    monkeypatch.setattr("idnerf.commands.evaluate.print_table", closed)
    path = tmp_path / "report.json"
    with pytest.raises(BrokenPipeError):
        cli.main(["evaluate", str(three_photos), "--json", str(path), "--weights", str(weights), *COMMON])
    assert len(json.loads(path.read_text())["views"]) == 3


def test_a_report_into_a_pipe_is_refused_before_any_work(capsys, three_photos, weights, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, error = run(capsys, "evaluate", three_photos, "--json", tmp_path / "pipe", "--weights", tmp_path / "none")
    assert code == 2 and "expected a regular file or nothing there, found a device, pipe or socket" in error


def test_quality_and_precision_are_those_that_were_used(capsys, three_photos, weights, tmp_path):
    paper, path = tmp_path / "paper.safetensors", tmp_path / "report.json"
    IDNeRF(TINY_MODELS["paper"]).save(paper)
    reports = {}
    for name, file in (("paper", paper), ("cascade", weights)):
        code, _, error = run(
            capsys, "evaluate", three_photos, "--targets", 0, "--json", path, "--weights", file, "--precision", "bf16",
            *COMMON,
        )  # fmt: skip
        assert code == 0, error
        reports[name] = json.loads(path.read_text())
    assert reports["paper"]["quality"] == "full" and reports["cascade"]["quality"] == "fast"
    notes = {name: "\n".join(report["notes"]) for name, report in reports.items()}
    assert "these weights know no fast quality: rendered in full" in notes["paper"] and "bfloat16" not in notes["paper"]
    assert "bfloat16" in notes["cascade"] and "no fast quality" not in notes["cascade"]
