"""The command line: every command once on a small scene (wrong input: test_bad_input.py)."""

import json
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from command_line import run
from idnerf import cli
from idnerf.commands.render import choose_views
from idnerf.data.load import load_scene
from idnerf.errors import InputError
from idnerf.types import Cameras
from matchnerf_cases import published_gmflow, published_matchnerf


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


def test_scenes_of_two_and_three_photos_need_no_number_of_sources(scene):
    photos = load_scene(scene)
    assert choose_views(photos.select([0, 2]), None, None, None)[1] in ([0, 1], [1, 0])
    assert sorted(choose_views(photos.select([0, 1, 2]), 1, None, None)[1]) == [0, 2]
    assert len(choose_views(photos, 1, None, None)[1]) == len(choose_views(photos, None, None, None)[1]) == 3
    with pytest.raises(InputError, match="at least 2 source views, the scene has 1"):
        choose_views(photos.select([0, 1]), 0, None, None)
    with pytest.raises(InputError, match="from 2 to the 2 source views there are, got 3"):
        choose_views(photos.select([0, 1, 2]), 0, None, 3)


def test_a_path_through_photos_of_one_pose_takes_them_all(scene):
    photos = load_scene(scene)
    assert sorted(choose_views(photos.select([0, 0, 1]), None, None, None)[1]) == [0, 1, 2]


def test_views_that_look_elsewhere_are_sources_only_where_too_few_do_not(scene):
    """As on a rig, or in crops of panoramas: three views at every place, two of them turned away by 90 degrees."""
    photos = load_scene(scene).select([0, 1, 2])
    quarter = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1]])
    turned = [photos.cameras.c2w @ turn for turn in (torch.eye(4), quarter, quarter.T)]
    c = photos.cameras
    cameras = Cameras(torch.cat(turned), c.K.repeat(3, 1, 1), c.size, c.near.repeat(3), c.far.repeat(3))
    rig = replace(photos.select([0, 1, 2] * 3), cameras=cameras, view_ids=tuple(range(9)))
    assert sorted(choose_views(rig, 0, None, 2)[1]) == [1, 2]
    assert sorted(choose_views(rig, None, None, 3)[1]) in ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    assert set(choose_views(rig, 0, None, 4)[1]) > {1, 2}
    assert set(rig.nearest_indices(cameras[0], 2)) == {3, 6}  # protocols count distance alone


def test_a_source_named_twice_counts_once(capsys, scene, weights, tmp_path):
    pictures = []
    for sources in ("0,3", "0,0,3"):
        out = tmp_path / f"{sources}.png"
        code, text, error = run(
            capsys, "render", scene, "--out", out, "--target", 1, "--sources", sources, "--weights", weights,
            "--quality", "fast",
        )  # fmt: skip
        assert code == 0 and "from views 0, 3;" in text, error
        pictures.append(np.asarray(Image.open(out)))
    assert (pictures[0] == pictures[1]).all()


def test_evaluate_writes_the_report(capsys, monkeypatch, scene, weights, tmp_path):
    report_path = tmp_path / "report.json"
    monkeypatch.setattr("idnerf.commands.evaluate.load_lpips", lambda _: (None, "no network"))
    code, out, _ = run(
        capsys, "evaluate", scene, "--json", report_path, "--targets", "0,3", "--weights", weights,
        "--save", tmp_path / "pictures",
    )  # fmt: skip
    assert code == 0 and "PSNR" in out
    report = json.loads(report_path.read_text())
    assert [view["target"] for view in report["views"]] == [0, 3]
    assert set(report["references"]) == {"copy", "plane", "sweep"}
    assert report["num_sources"] == 3 and report["size"] == [64, 48]
    assert "lpips was left out: no network" in report["notes"]
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


@pytest.mark.parametrize("command", ["view", "export", "finetune"])
def test_photos_without_poses_are_posed_first(capsys, monkeypatch, command, scene, weights, tmp_path):
    pytest.importorskip("viser")
    photos = tmp_path / "photos"
    shutil.copytree(scene / "images", photos)
    asked, shown = [], []

    class Viewer:
        port, url = 8080, "http://127.0.0.1:8080"

        def __init__(self, _model, loaded, *_):
            shown.append(loaded.name)

        def wait(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr(
        "idnerf.poses.kept.posed_scene", lambda folder, update: (asked.append(folder), (scene, None))[1]
    )
    monkeypatch.setattr("idnerf.viewer.server.Viewer", Viewer)
    rest = {
        "view": [],
        "export": ["--out", tmp_path / "depth.npy", "--targets", 0, "--quality", "fast"],
        "finetune": ["--out", tmp_path / "w.safetensors", "--steps", 1, "--tile", 16, 16],
    }
    code, out, error = run(capsys, command, photos, "--weights", weights, *rest[command])
    assert code == 0 and asked == [photos] and f"kept in {scene}" in out, error
    assert command != "view" or shown == [scene.name]
