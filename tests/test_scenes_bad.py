"""Bad scenes: each gets its own one-line message that names the file and what is wrong."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from idnerf.data.load import find_scenes, load_scene
from idnerf.errors import InputError
from scene_writers import (
    make_scene,
    perspective_lens,
    write_blender,
    write_colmap,
    write_dtu,
    write_llff,
    write_procedural,
    write_transforms,
)

SQUARE = make_scene(focal=(70.0, 70.0), center=None)


def message(path, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        scene = load_scene(path, **arguments)
        scene.views(range(len(scene)))
        scene.depth(0)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path, keep: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def test_no_scene_at_all(tmp_path):
    assert "does not exist" in message(tmp_path / "nowhere")
    text = message(tmp_path)
    for wanted in (
        "poses_bounds.npy",
        "transforms.json",
        "transforms_train.json",
        "sparse/0",
        "Cameras/train",
    ):
        assert wanted in text
    (tmp_path / "file").write_text("x")
    assert "is a file" in message(tmp_path / "file")
    with pytest.raises(InputError, match="found none of"):
        find_scenes(tmp_path)


def test_photos_without_poses(tmp_path):
    write_llff(tmp_path, SQUARE)
    (tmp_path / "poses_bounds.npy").unlink()
    text = message(tmp_path)
    assert "COLMAP" in text and "4 pictures without poses: `idnerf poses` finds them" in text


def test_half_a_dtu(tmp_path):
    write_dtu(tmp_path, make_scene())
    (tmp_path / "Rectified").rename(tmp_path / "Other")
    assert "looks like DTU but has no Rectified" in message(tmp_path)


def test_size_of_zero_and_scan_of_another_format(tmp_path):
    write_llff(tmp_path, SQUARE)
    assert "at least 1 pixel" in message(tmp_path, size=(0, 10))
    assert "only DTU roots have scans" in message(tmp_path, scan="scan1")


def test_pose_count_unlike_image_count(tmp_path):
    write_llff(tmp_path, SQUARE)
    (tmp_path / "images" / "image002.png").unlink()
    text = message(tmp_path)
    assert "has 4 poses" in text and "has 3 images" in text


def test_poses_without_pictures(tmp_path):
    write_llff(tmp_path, SQUARE)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    assert "has poses but no pictures" in message(tmp_path)


@pytest.mark.parametrize("write", [write_llff, write_blender, write_procedural])
def test_truncated_and_unreadable_pictures(write, tmp_path):
    write(tmp_path, SQUARE)
    picture = sorted(tmp_path.rglob("*.png"))[1]
    truncate(picture)
    text = message(tmp_path)
    assert picture.name in text and "truncated" in text
    picture.write_bytes(b"not a picture")
    text = message(tmp_path)
    assert picture.name in text and "unreadable" in text


def test_truncated_jpeg(tmp_path):
    write_transforms(tmp_path, SQUARE, near=1, far=9)
    picture = tmp_path / "images" / "frame_00001.png"
    Image.open(picture).save(picture.with_suffix(".jpg"), quality=95)
    edit(tmp_path / "transforms.json", lambda c: c["frames"][1].update(file_path="images/frame_00001.jpg"))
    truncate(picture.with_suffix(".jpg"))
    text = message(tmp_path)
    assert "frame_00001.jpg" in text and "truncated" in text


def test_pictures_of_two_sizes(tmp_path):
    write_transforms(tmp_path, SQUARE)
    Image.new("RGB", (40, 32)).save(tmp_path / "images" / "frame_00002.png")
    text = message(tmp_path)
    assert "two sizes" in text and "80x64" in text and "frame_00002.png is 40x32" in text


def test_portrait_pictures_under_a_landscape_calibration(tmp_path):
    write_llff(tmp_path, SQUARE)
    for path in (tmp_path / "images").iterdir():
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    assert "upright" in message(tmp_path)


def test_nan_poses_in_every_format(tmp_path):
    write_llff(tmp_path / "llff", SQUARE)
    rows = np.load(tmp_path / "llff" / "poses_bounds.npy")
    rows[2, 3] = np.nan
    np.save(tmp_path / "llff" / "poses_bounds.npy", rows)
    assert "pose of image002.png" in message(tmp_path / "llff")

    write_transforms(tmp_path / "t", SQUARE)
    edit(
        tmp_path / "t" / "transforms.json",
        lambda c: c["frames"][1]["transform_matrix"][0].__setitem__(3, np.nan),
    )
    assert "pose of images/frame_00001.png" in message(tmp_path / "t")

    write_colmap(tmp_path / "c", make_scene(), "PINHOLE", binary=False)
    path = tmp_path / "c" / "sparse" / "0" / "images.txt"
    lines = path.read_text().splitlines()
    lines[1] = " ".join(["4", "nan", *lines[1].split()[2:]])
    path.write_text("\n".join(lines))
    assert "pose of p3.png" in message(tmp_path / "c")

    write_dtu(tmp_path / "d", make_scene())
    path = tmp_path / "d" / "Cameras" / "train" / "00000002_cam.txt"
    lines = path.read_text().splitlines()
    lines[1] = "nan 0 0 0"
    path.write_text("\n".join(lines))
    assert "00000002_cam.txt" in message(tmp_path / "d")


def test_mirrored_and_squashed_poses(tmp_path):
    write_transforms(tmp_path, SQUARE)
    path = tmp_path / "transforms.json"
    original = path.read_text()

    def mirror(content):
        for row in content["frames"][0]["transform_matrix"][:3]:
            row[0] = -row[0]

    def squash(content):
        for row in content["frames"][0]["transform_matrix"][:3]:
            row[0] = 0.5 * row[0]

    edit(path, mirror)
    assert "mirror" in message(tmp_path)
    path.write_text(original)
    edit(path, squash)
    assert "no rotation" in message(tmp_path)


def test_bad_llff_rows(tmp_path):
    write_llff(tmp_path, SQUARE)
    path = tmp_path / "poses_bounds.npy"
    rows = np.load(path)
    np.save(path, rows[:, :15])
    assert "expected N x 17" in message(tmp_path)
    bad = rows.copy()
    bad[0, 15:] = [3, 2]
    np.save(path, bad)
    assert "0 < near < far" in message(tmp_path)
    bad = rows.copy()
    bad[:, 4] = 0.3  # the height, of which a pixel is left at least
    np.save(path, bad)
    assert "expected at least 1x1" in message(tmp_path)
    np.save(path, rows)
    truncate(path)
    assert "truncated" in message(tmp_path)
    path.write_bytes(b"junk")
    assert "unreadable" in message(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("frames"), "has no 'frames'"),
        (lambda c: c.update(frames=[]), "has no 'frames'"),
        (lambda c: c.update(frames=c["frames"][:1]), "1 posed photo; expected at least 2"),
        (lambda c: c["frames"][3].pop("transform_matrix"), "frame 3 .* lacks 'transform_matrix'"),
        (lambda c: [f.update(file_path="images/gone.png") for f in c["frames"][1:]], "lists images/gone.png, but"),
        (lambda c: c["frames"][0].update(transform_matrix=[[1, 2], [3, 4]]), "expected 4x4"),
        (lambda c: c["frames"][0].update(transform_matrix="abc"), "not a matrix of numbers"),
        (lambda c: c.pop("fl_x"), "gives no focal length"),
        (lambda c: c.update(fl_x="70"), "'fl_x' in .* is '70'; expected a number"),
        (lambda c: c.update(fl_x=-70), "expected positive pixels"),
        (lambda c: c.update(fl_x=10**400), "'fl_x' in .* expected a number"),
        (lambda c: c.update(fl_x=None, camera_angle_x=0), "'camera_angle_x' in .* is 0; expected radians"),
        (lambda c: c.update(fl_x=None, camera_angle_x=3.2), "'camera_angle_x' in .* is 3.2; expected radians"),
        (lambda c: c.update(fl_x=None, fl_y=None, camera_angle_x=1, camera_angle_y=0), "'camera_angle_y' in .* is 0"),
        (lambda c: c.update(w=0), "'w', 'h' in .* are 0, "),
        (lambda c: c.update(h=0.2), "at least 1"),
        (lambda c: c.update(w=-320), "'w', 'h' in .* are -320, "),
        (lambda c: c.update(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR .* not supported"),
        (lambda c: c.update(near=5, far=2), "0 < near < far"),
        (lambda c: c.update(near=5), "or neither"),
        (lambda c: c.update(k1=-3.0), "folds the image"),
        (lambda c: c.update(distortion_params=[0.1, 0.2]), "'distortion_params' in .* expected 6 numbers"),
        (lambda c: c.update(distortion_params=[0.1, 0, 0, 0, 0, "a"]), "'p2' in .* expected a number"),
        (lambda c: c.update(fl_x=1e200), "focal lengths of inf, 70 pixels .* no camera is like that"),
        (lambda c: c.update(fl_x=1e-300, fl_y=1e-300), "focal lengths of 0, 0 pixels .* no camera is like that"),
        (lambda c: c.update(w=1e30), "no camera is like that"),
        (lambda c: c.update(cx=1e300), "no camera is like that"),
        (lambda c: c.update(near=1, far=1e300), "are 1, inf in single precision"),
        (lambda c: c.update(near=1e-320, far=9), "are 0, 9 in single precision"),
        (lambda c: c["frames"][1]["transform_matrix"][0].__setitem__(3, 1e300), "too far from the origin"),
    ],
)
def test_bad_transforms(change, expected, tmp_path):
    write_transforms(tmp_path, SQUARE)
    edit(tmp_path / "transforms.json", change)
    with pytest.raises(InputError, match=expected):
        load_scene(tmp_path)


def test_json_that_is_none(tmp_path):
    write_transforms(tmp_path, SQUARE)
    truncate(tmp_path / "transforms.json")
    assert "not readable JSON" in message(tmp_path)
    (tmp_path / "transforms.json").write_text("[]")
    assert "expected an object" in message(tmp_path)
    (tmp_path / "transforms.json").write_text("[" * 100_000)
    assert "nested too deeply" in message(tmp_path)


def test_a_missing_picture_is_named_and_nothing_is_left_out_as_views_are_numbered(tmp_path):
    write_transforms(tmp_path / "t", SQUARE, near=1, far=9)
    (tmp_path / "t" / "images" / "frame_00001.png").unlink()
    assert "lists images/frame_00001.png, but it does not exist" in message(tmp_path / "t")
    (tmp_path / "t" / "images" / "frame_00002.png").unlink()
    assert "2 of its 4 pictures are missing" in message(tmp_path / "t")
    write_colmap(tmp_path / "c", SQUARE, "PINHOLE", binary=True)
    (tmp_path / "c" / "images" / "p0.png").unlink()
    assert "lists p0.png, but it does not exist" in message(tmp_path / "c")
    write_blender(tmp_path / "b", SQUARE)
    (tmp_path / "b" / "train" / "r_1.png").unlink()
    assert "lists ./train/r_1, but" in message(tmp_path / "b")


def test_blender_with_near_zero_is_refused_not_taken_for_absent(tmp_path):
    write_blender(tmp_path, SQUARE)
    path = next(tmp_path.glob("transforms*.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "near": 0}))
    assert "expected 0 < near < far" in message(tmp_path)


def test_blender_without_angle(tmp_path):
    write_blender(tmp_path, SQUARE)
    edit(tmp_path / "transforms_train.json", lambda c: c.pop("camera_angle_x"))
    assert "camera_angle_x" in message(tmp_path)


def test_procedural_with_a_damaged_depth_map(tmp_path):
    write_procedural(tmp_path, make_scene())
    truncate(tmp_path / "depth" / "0.npy")
    assert "0.npy is missing, unreadable or truncated" in message(tmp_path)
    edit(tmp_path / "transforms.json", lambda c: c["frames"][0].update(depth_file_path=3))
    assert "'depth_file_path' in" in message(tmp_path)


@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
def test_truncated_and_missing_colmap_files(part, tmp_path):
    write_colmap(tmp_path, make_scene(), "PINHOLE", binary=True)
    path = tmp_path / "sparse" / "0" / f"{part}.bin"
    truncate(path)
    assert f"{part} is truncated" in message(tmp_path)
    if part != "points3D":
        path.unlink()
        assert f"has no {part}.bin" in message(tmp_path)


def test_other_colmap_trouble(tmp_path):
    write_colmap(tmp_path, make_scene(), "PINHOLE", binary=True)
    path = tmp_path / "sparse" / "0" / "cameras.bin"
    data = path.read_bytes()
    path.write_bytes(data[:12] + struct.pack("<i", 6) + data[16:])
    assert "model number 6 is not supported" in message(tmp_path)
    path.write_bytes(data)
    for number in (1, 2, 3):
        (tmp_path / "images" / f"p{number}.png").unlink()
    assert "lists p1.png" in message(tmp_path)
    (tmp_path / "images" / "p0.png").rename(tmp_path / "images" / "other.png")
    assert "no pictures such as p0.png" in message(tmp_path)


@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
def test_colmap_files_with_absurd_counts(part, tmp_path):
    """Counts of 2^40 and 2^63: more than memory, and than an index, holds."""
    write_colmap(tmp_path, make_scene(), "PINHOLE", binary=True)
    path = tmp_path / "sparse" / "0" / f"{part}.bin"
    data = path.read_bytes()
    name = data.find(b"p3.png\0") + 7
    for count in (2**40, 2**63):
        path.write_bytes(struct.pack("<Q", count) + data[8:])
        assert f"{part} is truncated" in message(tmp_path)
        if part == "images":
            path.write_bytes(data[:name] + struct.pack("<Q", count) + data[name + 8 :])
            assert "images is truncated" in message(tmp_path)


def test_colmap_points_that_are_not_finite(tmp_path):
    write_colmap(tmp_path, make_scene(), "PINHOLE", binary=True)
    path = tmp_path / "sparse" / "0" / "points3D.bin"
    data = path.read_bytes()
    path.write_bytes(data[:16] + struct.pack("<d", float("nan")) + data[24:])
    assert "3D points that are not finite" in message(tmp_path)


def test_dtu_camera_files(tmp_path):
    write_dtu(tmp_path, make_scene())
    path = tmp_path / "Cameras" / "train" / "00000007_cam.txt"
    truncate(path)
    assert "00000007_cam.txt is malformed" in message(tmp_path)
    path.unlink()
    assert "00000007_cam.txt is missing" in message(tmp_path)


def test_dtu_pictures_of_another_shape(tmp_path):
    write_dtu(tmp_path, make_scene())
    for path in (tmp_path / "Rectified" / "scan24_train").iterdir():
        Image.new("RGB", (800, 450)).save(path)
    assert "is 800x450; expected 640x512" in message(tmp_path)


def test_views_that_do_not_exist(tmp_path):
    write_procedural(tmp_path, make_scene(distort=perspective_lens()))
    scene = load_scene(tmp_path)
    for call in (scene.image, scene.depth, lambda i: scene.views([i]), lambda i: scene.select([i])):
        with pytest.raises(InputError, match=r"view 4 does not exist: .* has views 0 to 3"):
            call(4)
