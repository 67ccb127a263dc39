"""Finding poses: the parts against exact values, and whole runs on photos of a painted room whose cameras are known."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from command_line import run
from idnerf.data.colmap import _w2c
from idnerf.data.load import load_scene
from idnerf.errors import InputError
from idnerf.geometry.projection import project
from idnerf.geometry.quaternions import quaternion_of
from idnerf.poses import kept, structure_from_motion
from idnerf.poses.config import PosesConfig
from idnerf.poses.estimate import REPORT_FILE, estimate_poses
from idnerf.poses.parallax import turning_residual
from idnerf.poses.photos import find_photos
from idnerf.poses.scene_files import undistorted_xy, write_scene
from idnerf.poses.sparse_model import SparseModel
from idnerf.poses.structure_from_motion import Attempt, attempts, plausible
from room_photos import FOCAL_RATIO, WALK, Room, pose, save_photos

SIZE = (320, 240)


def exact_model(k1: float = 0.0, count: int = 60) -> SparseModel:
    """Points in front of the three cameras of ``WALK``, each seen by all, without error."""
    points = np.random.default_rng(0).uniform([-1, -1, 3], [1, 1, 6], (count, 3))
    w2c = np.linalg.inv(np.stack(WALK))
    view, point = np.repeat(np.arange(3), count), np.tile(np.arange(count), 3)
    in_camera = np.einsum("nij,nj->ni", w2c[view, :3, :3], points[point]) + w2c[view, :3, 3]
    ideal = in_camera[:, :2] / in_camera[:, 2:]
    xy = 250 * ideal * (1 + k1 * (ideal**2).sum(1, keepdims=True)) + np.array(SIZE) / 2
    colors = np.full((count, 3), 128, dtype=np.uint8)
    return SparseModel(np.arange(3), w2c, SIZE, 250.0, k1, points, colors, view, point, xy)


class TestSparseModel:
    @pytest.mark.parametrize("k1", [0.0, -0.1])
    def test_an_exact_model_has_no_error_and_full_support(self, k1):
        model = exact_model(k1)
        assert model.errors().max() < 1e-9
        assert model.support() == pytest.approx(len(model.xy))

    def test_errors_scale_with_the_picture(self):
        model = exact_model()
        model.xy[:] += [0.3, 0.4]
        assert np.allclose(model.errors(), 0.5)
        assert np.allclose(model.scaled((960, 720)).errors(), 1.5)

    def test_support_prefers_many_good_observations_over_few_better_ones(self):
        model = exact_model()
        model.xy[:] += [0.6, 0.0]
        few = exact_model(count=20)
        assert few.errors().mean() < model.errors().mean() and model.support() > few.support()

    def test_a_point_behind_the_camera_counts_for_nothing(self):
        model = exact_model()
        model.points[0] = [0, 0, -5]
        assert np.isinf(model.errors()[model.point == 0]).all()
        assert model.support() == pytest.approx(len(model.xy) - 3)

    def test_parallax_is_the_widest_angle(self):
        model = exact_model()
        for row in (0, 17):
            rays = model.points[row] - model.c2w[:, :3, 3]
            rays /= np.linalg.norm(rays, axis=1, keepdims=True)
            widest = np.degrees(np.arccos((rays @ rays.T).min()))
            assert model.parallax_degrees()[row] == pytest.approx(widest, rel=1e-6)

    def test_normalising_changes_the_frame_and_no_picture(self):
        model = exact_model()
        same = model.normalised(2.0)
        assert same.errors().max() < 1e-9
        assert np.allclose(same.in_camera(), model.in_camera() / 2)
        assert np.allclose(same.c2w[:, :3, 3].mean(0), 0) and np.allclose(
            same.parallax_degrees(), model.parallax_degrees()
        )
        U, _, Vt = np.linalg.svd(same.c2w[:, :3, :3].sum(0))
        assert np.allclose(U @ Vt, np.eye(3))

    def test_outliers_go_and_so_do_points_seen_only_once_then(self):
        model = exact_model()
        model.xy[(model.point == 3) & (model.view == 0)] += 50
        model.xy[(model.point == 5) & (model.view < 2)] += 50
        clean = model.without_outliers(2.0)
        assert len(clean.points) == len(model.points) - 1 and len(clean.xy) == len(model.xy) - 4
        assert clean.errors().max() < 1e-9


class TestTurning:
    @staticmethod
    def seen(c2w: np.ndarray, points: np.ndarray, focal: float) -> np.ndarray:
        in_camera = (points - c2w[:3, 3]) @ c2w[:3, :3]
        return in_camera[:, :2] / in_camera[:, 2:] * focal + np.array(SIZE) / 2

    @staticmethod
    def bent(xy: np.ndarray, focal: float, k1: float) -> np.ndarray:
        ideal = (xy - np.array(SIZE) / 2) / focal
        return focal * ideal * (1 + k1 * (ideal**2).sum(1, keepdims=True)) + np.array(SIZE) / 2

    @pytest.mark.parametrize(("focal", "k1"), [(200.0, 0.0), (400.0, 0.0), (260.0, -0.06), (260.0, 0.08)])
    def test_turning_explains_itself_even_with_wrong_matches_and_a_lens(self, focal, k1):
        points = np.random.default_rng(1).uniform([-2, -2, 3], [2, 2, 30], (200, 3))
        first, second = (self.seen(pose((0.0, 0.0, 0.0), yaw, yaw / 2), points, focal) for yaw in (0.0, 12.0))
        first, second = (self.bent(xy, focal, k1) for xy in (first, second))
        second[:15] += 60
        assert turning_residual(first, second, SIZE) < 1.0

    def test_a_step_sideways_is_not_turning_not_even_before_a_wall(self):
        generator = np.random.default_rng(2)
        across = generator.uniform(-2, 2, (200, 2))
        for depths in (generator.uniform(3, 12, 200), 4 + 0.5 * across[:, 0]):  # a room; a wall at a slant
            points = np.c_[across, depths]
            first, second = self.seen(np.eye(4), points, 250), self.seen(pose((0.8, 0.0, 0.0)), points, 250)
            assert turning_residual(first, second, SIZE) > 2.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: sum(v * v for v in q) > 0.01))
def test_quaternion_is_the_inverse_of_the_colmap_reader(values):
    rotation = _w2c(np.array(values), np.zeros(3))[:3, :3]
    assert np.allclose(_w2c(quaternion_of(rotation), np.zeros(3))[:3, :3], rotation, atol=1e-9)


@pytest.mark.parametrize("angle_axis", np.eye(3).tolist())
def test_quaternion_of_half_a_turn(angle_axis):
    rotation = 2 * np.outer(angle_axis, angle_axis) - np.eye(3)
    assert np.allclose(np.abs(quaternion_of(rotation)), [0, *angle_axis])


@pytest.mark.parametrize("k1", [0.0, 0.08, -0.12])
def test_the_written_scene_reads_back_in_both_formats(tmp_path, k1):
    model, photos = exact_model(k1), find_photos(save_photos(tmp_path / "photos", WALK, SIZE))
    scene = tmp_path / "scene"
    scene.mkdir()
    write_scene(photos, model, scene, lambda: None)
    read = load_scene(scene)
    assert read.format == "transforms"
    (scene / "transforms.json").unlink()
    for loaded in (read, load_scene(scene)):
        assert torch.allclose(loaded.cameras.c2w.double(), torch.from_numpy(model.c2w), atol=1e-6)
        for view in range(3):
            pixels, depth = project(torch.from_numpy(model.points).float(), loaded.cameras[view])
            seen = undistorted_xy(model)[model.view == view]
            assert np.abs(pixels.numpy() - seen).max() < 1e-2
            assert loaded.cameras.near[view] < depth.min() and depth.max() < loaded.cameras.far[view]
    assert loaded.format == "colmap"
    assert torch.allclose(loaded.cameras.near, read.cameras.near, rtol=1e-4)
    # Undistorting moves pixels, except in the middle; without a lens nothing is touched at all.
    before = np.asarray(Image.open(photos.paths[0]))
    after = np.asarray(Image.open(scene / "images" / "photo_0.png"))
    assert before.shape == after.shape and (np.array_equal(before, after) == (k1 == 0))


class TestPhotos:
    def test_focal_length_comes_from_exif_when_all_photos_agree(self, tmp_path):
        tags = Image.Exif()
        tags.get_ifd(0x8769)[0xA405] = 26
        for name in ("a", "b"):
            Image.new("RGB", (400, 300)).save(tmp_path / f"{name}.jpg", exif=tags)
        photos = find_photos(tmp_path)
        assert photos.focal_source == "EXIF" and photos.focal == pytest.approx(26 / 43.2666 * 500, rel=1e-4)
        Image.new("RGB", (400, 300)).save(tmp_path / "c.jpg")
        assert find_photos(tmp_path).focal_source == "guessed"
        assert find_photos(tmp_path, focal=321.0).focal == 321

    def test_resolutions_may_differ_shapes_may_not(self, tmp_path):
        for name, size in (("a", (400, 300)), ("b", (200, 150))):
            Image.new("RGB", size).save(tmp_path / f"{name}.png")
        assert find_photos(tmp_path).size == (200, 150)
        Image.new("RGB", (150, 200)).save(tmp_path / "a_portrait.png")
        with pytest.raises(InputError, match=r"different shapes.*a_portrait\.png"):
            find_photos(tmp_path)


def test_two_photos_keep_the_focal_length_they_start_from():
    assert not any(attempt.refine_focal for attempt in attempts(2, 300.0, False, SIZE))
    three = attempts(3, 300.0, False, SIZE)
    assert three[0].refine_focal and not three[0].refine_distortion
    assert len({attempt.focal for attempt in three}) == 3
    assert {attempt.focal for attempt in attempts(3, 300.0, True, SIZE)} == {300.0}
    six = attempts(6, 300.0, False, SIZE)
    assert six[0].refine_distortion and not six[1].refine_distortion and six[0].focal == six[1].focal


def test_a_focal_length_far_from_the_known_one_is_refused():
    model, attempt = exact_model(), Attempt(250.0, True, False, 2.0, 50)
    assert plausible(model, attempt, 240.0, True) and not plausible(model, attempt, 160.0, True)
    assert plausible(model, attempt, 160.0, False)
    assert not plausible(exact_model(k1=0.5), attempt, 250.0, False)


def test_without_pycolmap_one_line_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    save_photos(tmp_path / "photos", WALK[:2], (32, 24))
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    code, _, error = run(capsys, "poses", tmp_path / "photos", "--out", tmp_path / "scene")
    assert code == 2 and "pip install '.[poses]'" in error and len(error.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Three photos of the room; the last one is stored lying on its side, with the EXIF orientation that rights it."""
    folder = save_photos(tmp_path_factory.mktemp("own") / "room", WALK, SIZE)
    upright = Image.open(folder / "photo_2.png")
    tags = Image.Exif()
    tags[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "photo_2.jpg", exif=tags, quality=98, subsampling=0)
    (folder / "photo_2.png").unlink()
    return folder


@pytest.fixture(scope="module")
def posed(photos, tmp_path_factory) -> Path:
    pytest.importorskip("pycolmap")
    out = tmp_path_factory.mktemp("posed") / "scene"
    estimate_poses(photos, out, PosesConfig(threads=1))
    return out


class TestThreePhotos:
    def test_poses_and_focal_length_are_found(self, posed):
        scene = load_scene(posed)
        found, truth = scene.cameras.c2w.double().numpy(), np.stack(WALK)
        assert scene.cameras.size == SIZE
        assert float(scene.cameras.K[0, 0, 0]) == pytest.approx(FOCAL_RATIO * SIZE[0], rel=0.02)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            turn = found[i, :3, :3].T @ found[j, :3, :3] @ (truth[i, :3, :3].T @ truth[j, :3, :3]).T
            assert np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))) < 0.2
        # In camera 0's frame the centres differ by one scale only.
        ours, theirs = (((c[1:, :3, 3] - c[0, :3, 3]) @ c[0, :3, :3]) for c in (found, truth))
        scale = (ours * theirs).sum() / (ours * ours).sum()
        assert np.abs(scale * ours - theirs).max() < 0.01

    def test_the_depth_range_holds_the_room(self, posed):
        scene = load_scene(posed)
        found, truth = scene.cameras.c2w.double().numpy(), np.stack(WALK)
        scale = np.linalg.norm(truth[2, :3, 3] - truth[0, :3, 3]) / np.linalg.norm(found[2, :3, 3] - found[0, :3, 3])
        near, far = float(scene.cameras.near.min()) * scale, float(scene.cameras.far.max()) * scale
        assert 1.5 < near < 3.0 and 4.5 < far < 8.0

    def test_the_report_says_what_was_found(self, posed):
        report = json.loads((posed / REPORT_FILE).read_text())
        assert report["registered"] == ["photo_0.png", "photo_1.png", "photo_2.jpg"] and not report["unregistered"]
        assert 0 < report["reprojection_error_px"] < 0.5 and report["points"] > 100
        assert report["focal_start"] == "guessed" and 0 < report["near"] < report["far"]

    def test_the_turned_photo_is_written_upright(self, posed):
        with Image.open(posed / "images" / "photo_2.jpg") as picture:
            assert picture.size == SIZE and picture.getexif().get(0x0112, 1) == 1
            assert np.abs(np.asarray(picture).astype(float) - Room().photo(WALK[2], SIZE)).mean() < 4


def test_two_photos_with_a_known_focal_length(capsys, photos, tmp_path):
    pytest.importorskip("pycolmap")
    for name in ("photo_0.png", "photo_1.png"):
        shutil.copy(photos / name, tmp_path)
    scene = tmp_path / "scene"
    code, out, error = run(capsys, "poses", tmp_path, "--out", scene, "--focal", FOCAL_RATIO * SIZE[0], "--threads", 1)
    assert code == 0 and "registered 2 of 2" in out, error
    found = load_scene(scene).cameras.c2w.double().numpy()
    direction = found[0, :3, :3].T @ (found[1, :3, 3] - found[0, :3, 3])
    truth = WALK[0][:3, :3].T @ (WALK[1][:3, 3] - WALK[0][:3, 3])
    cosine = direction @ truth / np.linalg.norm(direction) / np.linalg.norm(truth)
    assert cosine > np.cos(np.radians(3))


def test_a_photo_of_another_place_is_left_out_and_named(capsys, tmp_path):
    pytest.importorskip("pycolmap")
    size = (240, 180)
    folder = save_photos(tmp_path / "photos", WALK[:2], size)
    Image.fromarray(Room(seed=1).photo(WALK[1], size)).save(folder / "elsewhere.png")
    code, out, error = run(capsys, "poses", folder, "--out", tmp_path / "scene", "--threads", 1)
    assert code == 0 and "registered 2 of 3" in out and "left out: elsewhere.png" in out, error
    assert load_scene(tmp_path / "scene").image_names == ("photo_0.png", "photo_1.png")


def test_render_poses_plain_photos_once(capsys, photos, posed, tmp_path, monkeypatch):
    folder = tmp_path / "room"
    shutil.copytree(photos, folder)
    monkeypatch.setattr(
        kept, "estimate_poses", lambda photos, out, config, update: shutil.copytree(posed, out) and None
    )
    arguments = ["render", folder, "--size", "32x24", "--quality", "fast", "--out"]
    code, _, error = run(capsys, *arguments, tmp_path / "a.png")
    assert code == 0 and (folder / ".idnerf" / "room" / "transforms.json").is_file(), error

    def fail(*_):
        raise AssertionError("posed again")

    monkeypatch.setattr(kept, "estimate_poses", fail)
    code, out, error = run(capsys, *arguments, tmp_path / "b.png")
    assert code == 0 and "kept in" in out, error
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    (folder / "photo_1.png").unlink()
    with pytest.raises(AssertionError, match="posed again"):
        kept.posed_scene(folder)


def test_photos_that_cannot_be_written_beside_are_kept_in_the_cache(photos, posed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept.os, "access", lambda *_: False)
    monkeypatch.setattr(
        kept, "estimate_poses", lambda photos, out, config, update: shutil.copytree(posed, out) and None
    )
    folder, _ = kept.posed_scene(photos)
    assert folder.is_relative_to(tmp_path / "cache") and folder.name == photos.name
    assert not (photos / ".idnerf").exists()


def bad_photos(kind: str, folder: Path) -> Path:
    if kind == "nowhere":
        return folder / "nowhere"
    if kind == "turned only":
        return save_photos(folder, [pose((0.0, 0.0, 0.0), yaw) for yaw in (-8.0, 0.0, 8.0)], SIZE)
    if kind == "two rooms":
        save_photos(folder, WALK[:1], SIZE)
        Image.fromarray(Room(seed=1).photo(WALK[1], SIZE)).save(folder / "other.png")
        return folder
    if kind == "HEIC":
        folder.mkdir()
        (folder / "IMG_1.HEIC").write_bytes(b"ftypheic")
        return folder
    if kind == "grey":
        folder.mkdir()
        for name in "abc":
            Image.new("RGB", SIZE, (90, 90, 90)).save(folder / f"{name}.png")
        return folder
    save_photos(folder, WALK[: {"one": 1, "none": 0}.get(kind, 3)], SIZE)
    if kind == "cut off":
        whole = (folder / "photo_1.png").read_bytes()
        (folder / "photo_1.png").write_bytes(whole[: len(whole) // 2])
    elif kind == "no picture":
        (folder / "photo_1.png").write_text("not a picture")
    return folder


BAD = {
    "nowhere": "does not exist",
    "none": "holds no photos",
    "HEIC": "JPEG",
    "one": "one photo",
    "cut off": "photo_1.png",
    "no picture": "photo_1.png",
    "turned only": "no parallax",
    "two rooms": "too few matches",
    "grey": "too few matches",
}


@pytest.mark.parametrize("kind", BAD)
def test_photos_that_cannot_be_posed_are_one_line_that_says_why(capsys, tmp_path, kind):
    pytest.importorskip("pycolmap")
    folder = bad_photos(kind, tmp_path / "photos")
    code, out, error = run(capsys, "poses", folder, "--out", tmp_path / "scene", "--threads", 1)
    assert code == 2 and not out
    assert error.startswith("idnerf: ") and len(error.strip().splitlines()) == 1 and BAD[kind] in error, error
    assert not (tmp_path / "scene").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--longer-side", 50], "--longer-side"),
        (["--max-features", 3], "--max-features"),
        (["--focal", -1], "--focal"),
        (["--threads", -2], "--threads"),
    ],
)
def test_bad_options_name_their_flag(capsys, photos, tmp_path, flags, expected):
    code, _, error = run(capsys, "poses", photos, "--out", tmp_path / "scene", *flags)
    assert code == 2 and expected in error and len(error.strip().splitlines()) == 1


def test_a_folder_with_something_in_it_is_not_overwritten(capsys, photos, tmp_path):
    pytest.importorskip("pycolmap")
    (tmp_path / "precious.txt").write_text("keep")
    code, _, error = run(capsys, "poses", photos, "--out", tmp_path)
    assert code == 2 and "--out" in error and (tmp_path / "precious.txt").read_text() == "keep"


def test_a_terminated_run_ends_as_before():
    pytest.importorskip("pycolmap")
    before = signal.getsignal(signal.SIGTERM)
    structure_from_motion.load_pycolmap()
    assert signal.getsignal(signal.SIGTERM) == before
    code = (
        "import os, signal; from idnerf.poses.structure_from_motion import load_pycolmap;"
        "load_pycolmap(); os.kill(os.getpid(), signal.SIGTERM)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM and not ended.stderr
