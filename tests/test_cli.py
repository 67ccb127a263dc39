"""The command line: every command once on a small scene, and one clear line with exit code 2 for bad input."""

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from idnerf import cli
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.models.idnerf import IDNeRF, ModelConfig
from matchnerf_cases import published_gmflow, published_matchnerf
from tiny_cases import TINY_CASCADE


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "garden"
    config = ProceduralConfig(size=(64, 48), num_views=5, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    IDNeRF(ModelConfig(cascade=TINY_CASCADE)).save(path)
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``idnerf ARGUMENTS``."""
    arguments_before = sys.argv
    sys.argv = ["idnerf", *map(str, arguments)]
    try:
        cli.entry_point()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = arguments_before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_names_every_command_and_each_has_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(command in out for command in cli.COMMANDS)
    for command in cli.COMMANDS:
        code, out, _ = run(capsys, command, "--help")
        assert code == 0 and "usage: idnerf " + command in out


def test_version(capsys):
    assert run(capsys, "--version")[1].startswith("idnerf 0.")


def test_render_a_held_out_view_with_depth_beside_it(capsys, scene, weights, tmp_path):
    out = tmp_path / "view.png"
    code, text, _ = run(capsys, "render", scene, "--out", out, "--target", 1, "--weights", weights, "--depth")
    assert code == 0 and "1 view of garden" in text
    picture = np.asarray(Image.open(out))
    assert picture.shape == (48, 128, 3) and picture[:, :64].std() > 1


@pytest.mark.parametrize(("name", "path"), [("a.mp4", "spiral"), ("b.gif", "orbit")])
def test_render_a_video(capsys, scene, weights, tmp_path, name, path):
    out = tmp_path / name
    code, _, error = run(
        capsys, "render", scene, "--out", out, "--path", path, "--frames", 5, "--weights", weights, "--quality", "fast"
    )  # fmt: skip
    assert code == 0, error
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (48, 64, 3)
    assert list(tmp_path.iterdir()) == [out]


def test_render_a_folder_of_frames_with_metric_depth(capsys, scene, weights, tmp_path):
    out = tmp_path / "frames"
    code, _, _ = run(
        capsys, "render", scene, "--out", out, "--sources", "0,2", "--frames", 2, "--size", "32x24",
        "--weights", weights, "--depth",
    )  # fmt: skip
    assert code == 0
    names = sorted(p.name for p in out.iterdir())
    assert names == [f"{kind}_000{i}.{end}" for kind, end in
                     (("depth", "png"), ("depth_z", "npy"), ("rgb", "png")) for i in (0, 1)]  # fmt: skip
    depth = np.load(out / "depth_z_0000.npy")
    assert depth.shape == (24, 32) and (depth > 0).all()


def test_evaluate_writes_the_report(capsys, scene, weights, tmp_path):
    report_path = tmp_path / "report.json"
    code, out, _ = run(
        capsys, "evaluate", scene, "--json", report_path, "--targets", "0,3", "--weights", weights,
        "--save", tmp_path / "pictures",
    )  # fmt: skip
    assert code == 0 and "PSNR" in out
    report = json.loads(report_path.read_text())
    assert [view["target"] for view in report["views"]] == [0, 3]
    assert set(report["references"]) == {"copy", "plane", "sweep"}
    assert report["num_sources"] == 3 and report["size"] == [64, 48]
    assert (tmp_path / "pictures" / "garden" / "000_prediction.png").is_file()


def test_scenes_writes_scenes_that_load(capsys, tmp_path):
    code, _, _ = run(
        capsys, "scenes", "--out", tmp_path, "--count", 2, "--size", 32, 24, "--num-views", 3, "--supersample", 1
    )
    assert code == 0
    from idnerf import load_scene

    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2 and all(len(load_scene(folder)) == 3 for folder in folders)


def test_converted_matchnerf_weights_render_from_their_number_of_views(capsys, scene, tmp_path):
    checkpoint, converted = tmp_path / "matchnerf_3v.pth", tmp_path / "matchnerf.safetensors"
    torch.save({"model": published_matchnerf(3)}, checkpoint)
    code, out, error = run(capsys, "convert", checkpoint, "--out", converted)
    assert code == 0 and "matchnerf" in out, error
    view = tmp_path / "view.png"
    arguments = ["render", scene, "--out", view, "--target", 1, "--size", "24x16", "--weights", converted]
    code, _, error = run(capsys, *arguments)
    assert code == 0, error
    assert Image.open(view).size == (24, 16)
    code, _, error = run(capsys, *arguments, "--num-sources", 2)
    assert code == 2 and "expect 3" in error


def test_converted_gmflow_weights_are_no_model_and_say_so(capsys, scene, tmp_path):
    checkpoint, converted = tmp_path / "gmflow.pth", tmp_path / "gmflow.safetensors"
    torch.save(published_gmflow(), checkpoint)
    assert run(capsys, "convert", checkpoint, "--out", converted)[0] == 0
    code, _, error = run(capsys, "render", scene, "--out", tmp_path / "a.png", "--target", 1, "--weights", converted)
    assert code == 2 and "no model configuration" in error


def test_demo_on_the_bundled_scene(capsys, weights, tmp_path):
    code, out, _ = run(capsys, "demo", "--out", tmp_path, "--frames", 2, "--weights", weights)
    assert code == 0 and "PSNR" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison.png", "depth.png", "video.mp4"]


BAD = {
    "no command": ([], "usage"),
    "unknown command": (["paint"], "unknown command 'paint'"),
    "unknown preset": (["train", "everything"], "unknown preset"),
    "no such scene": (["render", "/nowhere", "--out", "a.png"], "does not exist"),
    "not a scene": (["render", "{empty}", "--out", "a.png"], "is no scene"),
    "target and path": (["render", "{scene}", "--out", "a.png", "--target", "0", "--path", "orbit"], "not both"),
    "unknown target": (["render", "{scene}", "--out", "a.png", "--target", "9"], "no view 9"),
    "target among sources": (["render", "{scene}", "--out", "a.png", "--target", "1", "--sources", "1,2"], "--target"),
    "one source": (["render", "{scene}", "--out", "a.png", "--target", "1", "--sources", "2"], "at least 2"),
    "too many sources": (["render", "{scene}", "--out", "a.mp4", "--num-sources", "9"], "--num-sources"),
    "sources that are no numbers": (["render", "{scene}", "--out", "a.png", "--sources", "a,b"], "--sources"),
    "size of zero": (["render", "{scene}", "--out", "a.png", "--size", "0x0"], "--size"),
    "size in words": (["render", "{scene}", "--out", "a.png", "--size", "big"], "--size"),
    "unknown path": (["render", "{scene}", "--out", "a.mp4", "--path", "zigzag"], "interpolate, spiral or orbit"),
    "no frames": (["render", "{scene}", "--out", "a.mp4", "--path", "orbit", "--frames", "0"], "--frames"),
    "unknown ending": (["render", "{scene}", "--out", "a.jpeg2"], "--out"),
    "unknown quality": (["render", "{scene}", "--out", "a.png", "--quality", "best"], "--quality"),
    "unknown device": (["render", "{scene}", "--out", "a.png", "--device", "tpu"], "--device"),
    "scan of a scene that has none": (["render", "{scene}", "--out", "a.png", "--scan", "scan1"], "DTU"),
    "missing weights": (["render", "{scene}", "--out", "a.png", "--weights", "none.safetensors"], "--weights"),
    "weights that are text": (["render", "{scene}", "--out", "a.png", "--weights", "{text}"], "not a readable"),
    "out below a file": (["render", "{scene}", "--out", "{text}/a.png"], "not a folder"),
    "unknown protocol": (["evaluate", "{scene}", "--protocol", "mine"], "unknown --protocol"),
    "no split for the scene": (["evaluate", "{scene}", "--protocol", "mvsnerf"], "has no split"),
    "crop of zero": (["evaluate", "{scene}", "--crop", "0"], "--crop"),
    "one source to evaluate": (["evaluate", "{scene}", "--num-sources", "1"], "--num-sources"),
    "no such checkpoint": (["convert", "/nowhere.pth", "--out", "a.safetensors"], "nowhere.pth"),
    "text as a checkpoint": (["convert", "{text}", "--out", "a.safetensors"], "notes.txt"),
    "no scenes": (["scenes", "--out", "{empty}", "--count", "0"], "--count"),
    "too few steps": (["train", "cascade-procedural", "--steps", "0"], "--steps"),
    "no DTU there": (["train", "matchnerf-dtu", "--root", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, case, scene, weights, tmp_path):
    arguments, expected = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not weights")
    places = {"{scene}": scene, "{empty}": tmp_path / "empty", "{text}": tmp_path / "notes.txt"}
    filled = []
    for argument in arguments:
        for name, place in places.items():
            argument = argument.replace(name, str(place))
        filled.append(argument)
    if filled and filled[0] in ("render", "evaluate") and "--weights" not in filled:
        filled += ["--weights", str(weights)]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, error = run(capsys, *filled)
    assert code == 2
    if arguments:
        assert expected in error and len(error.strip().splitlines()) == 1, error
        assert error.startswith("idnerf: ")
    else:
        assert expected in out
    assert sorted(tmp_path.rglob("*")) == before
