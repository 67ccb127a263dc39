"""Every scene format, written exactly by ``scene_writers`` and read back: cameras, pictures, depth,
ranges."""

import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import idnerf
from idnerf.data import distortion
from idnerf.data.load import distinct_names, find_scenes, load_scene
from idnerf.errors import InputError
from idnerf.evaluation.protocols import own_name
from idnerf.geometry.projection import bilinear_lookup, project
from idnerf.geometry.rays import unproject
from scene_writers import (
    fisheye_lens,
    make_scene,
    perspective_lens,
    photo,
    pixel_grid,
    plane_depth,
    project_exactly,
    scene_points,
    texture,
    write_blender,
    write_colmap,
    write_dtu,
    write_llff,
    write_pfm,
    write_procedural,
    write_transforms,
)

SQUARE = {
    "focal": (70.0, 70.0),
    "center": None,
}  # one focal length, centred: all that LLFF and Blender can say

PINHOLE_FORMATS = {
    "llff": (lambda root, scene: write_llff(root, scene), SQUARE),
    "blender": (write_blender, SQUARE),
    "transforms": (write_transforms, {}),
    "transforms, per frame": (lambda root, scene: write_transforms(root, scene, per_frame=True), {}),
    "procedural": (write_procedural, {}),
    "colmap binary": (lambda root, scene: write_colmap(root, scene, "PINHOLE", binary=True), {}),
    "colmap text": (lambda root, scene: write_colmap(root, scene, "PINHOLE", binary=False), {}),
    "colmap one focal length": (
        lambda root, scene: write_colmap(root, scene, "SIMPLE_PINHOLE", binary=True),
        {"focal": (70.0, 70.0)},
    ),
    "dtu": (write_dtu, {}),
}

BROWN = {"k1": -0.12, "k2": 0.03, "p1": 0.004, "p2": -0.003}
PINCUSHION = {"k1": 0.15, "k2": 0.02}
FISHEYE = {"k1": 0.05, "k2": -0.02, "k3": 0.004, "k4": -0.001}
LENS_FORMATS = {
    "transforms barrel": (lambda r, s: write_transforms(r, s, **BROWN), perspective_lens(**BROWN)),
    "transforms pincushion": (
        lambda r, s: write_transforms(r, s, camera_model="OPENCV", **PINCUSHION),
        perspective_lens(**PINCUSHION),
    ),
    "transforms fisheye": (
        lambda r, s: write_transforms(r, s, camera_model="OPENCV_FISHEYE", **FISHEYE),
        fisheye_lens(**FISHEYE),
    ),
    "colmap SIMPLE_RADIAL": (
        lambda r, s: write_colmap(r, s, "SIMPLE_RADIAL", (0.1,), binary=False),
        perspective_lens(k1=0.1),
    ),
    "colmap RADIAL": (
        lambda r, s: write_colmap(r, s, "RADIAL", (0.1, -0.02), binary=True),
        perspective_lens(k1=0.1, k2=-0.02),
    ),
    "colmap OPENCV": (
        lambda r, s: write_colmap(r, s, "OPENCV", tuple(BROWN.values()), binary=True),
        perspective_lens(**BROWN),
    ),
    "colmap OPENCV_FISHEYE": (
        lambda r, s: write_colmap(r, s, "OPENCV_FISHEYE", tuple(FISHEYE.values()), binary=False),
        fisheye_lens(**FISHEYE),
    ),
}


def projected(scene, points: np.ndarray) -> np.ndarray:
    world = torch.from_numpy(points).float().expand(len(scene), -1, -1)
    return project(world, scene.cameras)[0].numpy()


@pytest.mark.parametrize("name", PINHOLE_FORMATS)
def test_points_and_pictures_come_back(name, tmp_path):
    write, arguments = PINHOLE_FORMATS[name]
    truth = make_scene(**arguments)
    write(tmp_path, truth)
    scene = load_scene(tmp_path)
    assert scene.format == name.split()[0].strip(",")
    assert scene.cameras.size == truth.size and len(scene) == len(truth)
    exact = np.stack([project_exactly(scene_points(), c2w, truth.K) for c2w in truth.c2w])
    assert np.abs(projected(scene, scene_points()) - exact).max() < 1e-3
    views = scene.views(range(len(scene)))
    written = torch.from_numpy(np.stack(truth.images)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(views.images, written, atol=1e-6, rtol=0)
    assert (scene.cameras.near > 0).all() and (scene.cameras.near < scene.cameras.far).all()


@pytest.mark.parametrize("name", PINHOLE_FORMATS)
def test_a_pixel_of_one_view_lands_on_the_same_point_in_another(name, tmp_path):
    write, arguments = PINHOLE_FORMATS[name]
    truth = make_scene(**arguments)
    write(tmp_path, truth)
    cameras = load_scene(tmp_path).cameras
    normalised = (pixel_grid(truth.size) - truth.K[:2, 2]) / [truth.K[0, 0], truth.K[1, 1]]
    depth = torch.from_numpy(plane_depth(truth.c2w[0], normalised)).float()
    points = unproject(cameras[0], depth).reshape(-1, 3)
    pixels, _ = project(points, cameras[2])
    directions = np.concatenate([normalised, np.ones((*depth.shape, 1))], -1) * depth.numpy()[..., None]
    world = (directions @ truth.c2w[0, :3, :3].T + truth.c2w[0, :3, 3]).reshape(-1, 3)
    exact = project_exactly(world, truth.c2w[2], truth.K)
    assert np.abs(pixels.numpy() - exact).max() < 1e-3


@pytest.mark.parametrize("name", LENS_FORMATS)
def test_lens_distortion_is_undone(name, tmp_path):
    write, lens = LENS_FORMATS[name]
    focal = (110.0, 110.0) if "SIMPLE" in name or name.endswith(" RADIAL") else (110.0, 114.0)
    truth = make_scene(size=(160, 128), focal=focal, center=(82.0, 61.0), distort=lens)
    write(tmp_path, truth)
    scene = load_scene(tmp_path)
    K = scene.cameras.K[0].double().numpy()
    zoom = K[0, 0] / truth.K[0, 0]
    assert zoom >= 1 and K[1, 1] / truth.K[1, 1] == pytest.approx(zoom, rel=1e-6)
    np.testing.assert_allclose(K[:2, 2], truth.K[:2, 2], atol=1e-4)
    exact = np.stack([project_exactly(scene_points(), c2w, K) for c2w in truth.c2w])
    pixels = projected(scene, scene_points())
    assert np.abs(pixels - exact).max() < 1e-3
    for i in (0, 3):
        image = scene.image(i)
        pinhole = torch.from_numpy(photo(truth.c2w[i], K, truth.size)).permute(2, 0, 1).float()
        assert (image - pinhole).abs().max() < 0.03  # the outermost ring is extrapolated by half a pixel
        assert (image - pinhole).abs().mean() < 0.003
        # The colour at a reprojected point is the colour of the point: the same in every view.
        colour = bilinear_lookup(image.permute(1, 2, 0)[None].contiguous(), torch.from_numpy(pixels[i])[None])
        assert np.abs(colour[0].numpy() - texture(scene_points())).mean() < 0.01


def test_undistorted_border_comes_from_inside_the_photo(tmp_path):
    """White photo, pincushion lens: without the zoom the border would have to be invented."""
    truth = make_scene(distort=perspective_lens(**PINCUSHION))
    write_transforms(tmp_path, truth, near=1, far=9, **PINCUSHION)
    K = load_scene(tmp_path).cameras.K[0].double().numpy()
    lens = perspective_lens(**PINCUSHION)
    grid = (pixel_grid(truth.size) - K[:2, 2]) / [K[0, 0], K[1, 1]]
    x, y = lens(grid[..., 0], grid[..., 1])
    u, v = x * truth.K[0, 0] + truth.K[0, 2], y * truth.K[1, 1] + truth.K[1, 2]
    assert min(u.min(), v.min()) >= 0.499
    assert u.max() <= truth.size[0] - 0.499 and v.max() <= truth.size[1] - 0.499
    # ... and no more is cut off than needed: somewhere the border is reached.
    slack = min(u.min(), v.min(), truth.size[0] - u.max(), truth.size[1] - v.max())
    assert slack < 0.6


def test_resized_scales_focal_lengths_apart_and_keeps_points_in_place(tmp_path):
    truth = make_scene()
    write_transforms(tmp_path, truth, near=1, far=9)
    scene = load_scene(tmp_path)
    small = scene.resized((40, 16))
    np.testing.assert_allclose(
        projected(small, scene_points()), projected(scene, scene_points()) * [0.5, 0.25], atol=1e-4
    )
    assert small.image(0).shape == (3, 16, 40)
    assert load_scene(tmp_path, size=(40, 16)).cameras.K.equal(small.cameras.K)
    back = small.resized(scene.cameras.size)
    torch.testing.assert_close(back.cameras.K, scene.cameras.K)
    torch.testing.assert_close(back.image(1), scene.image(1), atol=0, rtol=0)


def test_resizing_a_distorted_scene_keeps_the_undistorted_camera(tmp_path):
    truth = make_scene(distort=perspective_lens(**BROWN))
    write_transforms(tmp_path, truth, near=1, far=9, **BROWN)
    scene = load_scene(tmp_path, size=(40, 32))
    full = load_scene(tmp_path)
    torch.testing.assert_close(scene.cameras.K[:, :2] * 2, full.cameras.K[:, :2])
    halved = torch.nn.functional.avg_pool2d(full.image(2), 2)
    assert (scene.image(2) - halved).abs().mean() < 0.02


def test_llff_takes_the_smallest_folder_that_serves_the_size(tmp_path):
    truth = make_scene(**SQUARE)
    write_llff(tmp_path, truth)
    for folder, size, colour in (("images_4", (40, 32), 0.25), ("images_8", (20, 16), 0.75)):
        (tmp_path / folder).mkdir()
        for i in range(len(truth)):
            Image.new("RGB", size, (round(255 * colour),) * 3).save(tmp_path / folder / f"{i}.png")
    assert load_scene(tmp_path).photos[0].path.parent.name == "images"
    served = {(80, 64): "images", (41, 32): "images", (40, 32): "images_4", (20, 16): "images_8"}
    for size, folder in served.items():
        scene = load_scene(tmp_path, size=size)
        assert scene.photos[0].path.parent.name == folder
        full = load_scene(tmp_path)
        torch.testing.assert_close(scene.cameras.K, full.resized(size).cameras.K)


def test_llff_bounds_of_any_sources_are_the_protocols(tmp_path):
    write_llff(tmp_path, make_scene(**SQUARE), bounds=(2.0, 10.0))
    scene = load_scene(tmp_path)
    near, far = scene.target_bounds(scene.cameras[[1, 3]])
    assert float(near) == pytest.approx(0.8 * 2.1)
    assert float(far) == pytest.approx(1.2 * 13.0)


def test_blender_composes_transparency_on_white_and_is_2_to_6(tmp_path):
    truth = make_scene(**SQUARE)
    truth.c2w[:, :3, 3] *= 4.0311 / np.linalg.norm(truth.c2w[:, :3, 3], axis=-1, keepdims=True)
    write_blender(tmp_path, truth)
    half = np.concatenate([truth.images[0], np.full((*truth.images[0].shape[:2], 1), 51, np.uint8)], -1)
    Image.fromarray(half).save(tmp_path / "train" / "r_0.png")
    scene = load_scene(tmp_path)
    expected = torch.from_numpy(truth.images[0]).permute(2, 0, 1) / 255 * 0.2 + 0.8
    torch.testing.assert_close(scene.image(0), expected, atol=1 / 255, rtol=0)
    assert set(scene.cameras.near.tolist()) == {2.0} and set(scene.cameras.far.tolist()) == {6.0}
    np.testing.assert_array_equal(scene.cameras.K[0].numpy(), truth.K.astype(np.float32))


def test_blender_of_another_scale_gets_its_own_range(tmp_path):
    truth = make_scene(**SQUARE)
    truth.c2w[:, :3, 3] *= 2
    write_blender(tmp_path, truth)
    cameras = load_scene(tmp_path).cameras
    assert (cameras.near != 2.0).all() and (cameras.far != 6.0).all()


@pytest.mark.parametrize(
    ("given", "expected"), [({"near": 1.5}, (1.5, 6.0)), ({"far": 9.0}, (2.0, 9.0)), ({"w": 64}, (2.0, 6.0))]
)
def test_blender_takes_what_is_not_given_from_the_published_range(given, expected, tmp_path):
    truth = make_scene(**SQUARE)
    truth.c2w[:, :3, 3] *= 4.03 / np.linalg.norm(truth.c2w[:, :3, 3], axis=-1, keepdims=True)
    write_blender(tmp_path, truth)
    path = tmp_path / "transforms_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | given))
    cameras = load_scene(tmp_path).cameras
    assert (cameras.near == expected[0]).all() and (cameras.far == expected[1]).all()


@pytest.mark.parametrize("per_frame", [False, True])
def test_a_split_with_the_keys_of_transforms_is_read_as_such(per_frame, tmp_path):
    truth = make_scene(distort=perspective_lens(**BROWN))
    write_transforms(tmp_path, truth, per_frame=per_frame, near=0.5, far=20.0, **BROWN)
    expected = load_scene(tmp_path)
    (tmp_path / "transforms.json").rename(tmp_path / "transforms_train.json")
    scene = load_scene(tmp_path)
    assert scene.format == "blender"
    assert scene.cameras.K.equal(expected.cameras.K) and scene.image(1).equal(expected.image(1))
    assert set(scene.cameras.near.tolist()) == {0.5} and set(scene.cameras.far.tolist()) == {20.0}


def test_procedural_depth_and_bounds(tmp_path):
    truth = make_scene()
    write_procedural(tmp_path, truth)
    scene = load_scene(tmp_path)
    depth = scene.depth(1)
    assert depth[0, 0] == 0
    points = unproject(scene.cameras[1], depth)[1:].reshape(-1, 3).double().numpy()
    normal = points @ np.array([0.15, -0.1, 1.0])
    np.testing.assert_allclose(normal, 4.0, atol=1e-4)
    torch.testing.assert_close(scene.cameras.near, torch.tensor([2.0, 2.1, 2.2, 2.3]))
    torch.testing.assert_close(scene.cameras.far, torch.tensor([8.0, 9.0, 10.0, 11.0]))
    torch.testing.assert_close(scene.resized((40, 32)).depth(1), depth[1::2, 1::2])


def test_formats_without_depth_say_none(tmp_path):
    write_llff(tmp_path, make_scene(**SQUARE))
    assert load_scene(tmp_path).depth(0) is None


def test_dtu_ids_bounds_scans_and_lights(tmp_path):
    write_dtu(tmp_path, make_scene(), scan="scan24", ids=(0, 2, 7, 11))
    write_dtu(tmp_path, make_scene(), scan="scan9", light=5, ids=(0, 2, 7, 11))
    scene = load_scene(tmp_path, scan="24")
    assert scene.name == "scan24" and scene.view_ids == (0, 2, 7, 11)
    assert scene.index_of(7) == 2
    assert scene.image_names[2] == "rect_008_3_r5000.png"
    torch.testing.assert_close(scene.cameras.near, torch.full((4,), 425 / 200))
    torch.testing.assert_close(scene.cameras.far, torch.full((4,), (425 + 192 * 2.5) / 200))
    with pytest.raises(InputError, match="no view 3; it has 0 2 7 11"):
        scene.index_of(3)
    with pytest.raises(InputError, match="name one with --scan"):
        load_scene(tmp_path)
    with pytest.raises(InputError, match="no scan1; its scans are scan9, scan24"):
        load_scene(tmp_path, scan="scan1")
    with pytest.raises(InputError, match="no pictures of light 3"):
        load_scene(tmp_path, scan="scan9")
    assert len(load_scene(tmp_path, scan="scan9", light=5)) == 4
    assert [spec.name for spec in find_scenes(tmp_path)] == ["scan9", "scan24"]
    assert load_scene(find_scenes(tmp_path, scan="scan24")[0]).view_ids == (0, 2, 7, 11)


def test_dtu_depth_is_every_second_pixel_cropped_and_scaled(tmp_path):
    write_dtu(tmp_path, make_scene(size=(640, 512), focal=(600.0, 600.0), center=None))
    rows, columns = np.meshgrid(np.arange(1200), np.arange(1600), indexing="ij")
    path = tmp_path / "Depths" / "scan24" / "depth_map_0007.pfm"
    write_pfm(path, rows * 2000 + columns)
    scene = load_scene(tmp_path)
    assert scene.depth(0) is None
    depth = scene.depth(scene.index_of(7))
    v, u = 100, 321
    assert float(depth[v, u]) == pytest.approx((2 * (44 + v) * 2000 + 2 * (80 + u)) / 200)
    assert depth.shape == (512, 640)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"depth_map_0007.pfm is truncated"):
        scene.depth(scene.index_of(7))


def test_whole_photos_of_dtu_have_their_own_camera_and_depth(tmp_path):
    """1600x1200 pixels, of which the training layout keeps a window at half the size."""
    truth = make_scene(size=(640, 512), focal=(600.0, 600.0), center=(310.0, 250.0))
    write_dtu(tmp_path, truth)
    rows, columns = np.meshgrid(np.arange(1200), np.arange(1600), indexing="ij")
    path = tmp_path / "Depths" / "scan24" / "depth_map_0007.pfm"
    write_pfm(path, rows * 2000 + columns)
    window = load_scene(tmp_path)
    for picture in (tmp_path / "Rectified" / "scan24_train").iterdir():
        Image.new("RGB", (1600, 1200)).save(picture)
    whole = load_scene(tmp_path)
    assert whole.cameras.size == (1600, 1200)
    K = whole.cameras.K[0].numpy()
    np.testing.assert_allclose(K, [[1200, 0, 2 * (310 + 80)], [0, 1200, 2 * (250 + 44)], [0, 0, 1]], rtol=1e-6)
    half = whole.resized((800, 600)).depth(2)
    assert half[44:556, 80:720].equal(window.depth(2))
    assert float(half[0, 799]) == pytest.approx(2 * 799 / 200)
    write_pfm(path, (window.depth(2) * 200).numpy())
    padded = whole.resized((800, 600)).depth(2)
    torch.testing.assert_close(padded[44:556, 80:720], window.depth(2))
    assert padded[:44].abs().max() == 0 and padded[:, :80].abs().max() == 0


def test_colmap_pictures_in_subfolders_and_smaller_copies(tmp_path):
    truth = make_scene()
    write_colmap(tmp_path, truth, "PINHOLE", binary=False)
    listing = tmp_path / "sparse" / "0" / "images.txt"
    text = listing.read_text()
    for i in range(4):
        folder = tmp_path / "images" / f"cam{i % 2}"
        folder.mkdir(exist_ok=True)
        (tmp_path / "images" / f"p{i}.png").rename(folder / f"p{i}.png")
        smaller = tmp_path / "images_2" / f"cam{i % 2}"
        smaller.mkdir(parents=True, exist_ok=True)
        Image.open(folder / f"p{i}.png").resize((40, 32)).save(smaller / f"p{i}.jpg")
        text = text.replace(f" p{i}.png", f" cam{i % 2}/p{i}.png")
    listing.write_text(text)
    scene = load_scene(tmp_path)
    assert [photo.path.parent.name for photo in scene.photos] == ["cam0", "cam0", "cam1", "cam1"]
    assert scene.photos[1].path == tmp_path / "images" / "cam0" / "p2.png"
    assert load_scene(tmp_path, size=(40, 32)).photos[1].path == tmp_path / "images_2" / "cam0" / "p2.jpg"


def test_variants_of_transforms_that_other_programs_read(tmp_path):
    """Backslashes, a null camera model, one angle, and the coefficients of a lens in one list."""
    truth = make_scene(distort=perspective_lens(**BROWN))
    write_transforms(tmp_path, truth, near=1, far=9, **BROWN)
    expected = load_scene(tmp_path)
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    together = [BROWN["k1"], BROWN["k2"], 0, 0, BROWN["p1"], BROWN["p2"]]
    for key in BROWN:
        del content[key]
    content["camera_model"] = None
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].replace("/", "\\")
    path.write_text(json.dumps(content | {"distortion_params": together}))
    scene = load_scene(tmp_path)
    assert scene.cameras.K.equal(expected.cameras.K) and scene.image(1).equal(expected.image(1))
    for frame in content["frames"]:
        frame["distortion_params"] = together
    path.write_text(json.dumps(content | {"distortion_params": [0] * 6}))
    assert load_scene(tmp_path).cameras.K.equal(expected.cameras.K)


def test_focal_length_from_the_vertical_angle_alone(tmp_path):
    write_transforms(tmp_path, make_scene(), near=1, far=9)
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    del content["fl_x"], content["fl_y"]
    path.write_text(json.dumps(content | {"camera_angle_y": 2 * np.arctan(32 / 74)}))
    K = load_scene(tmp_path).cameras.K[0]
    assert float(K[0, 0]) == pytest.approx(74) and float(K[1, 1]) == pytest.approx(74)


@pytest.mark.parametrize("distance", [1e5, 4e6])
def test_a_world_far_from_its_origin_is_moved_there(distance, tmp_path, capsys):
    near_by = make_scene()
    far_off = replace(near_by, c2w=near_by.c2w.copy())
    shift = np.array([distance, -distance / 3, 50.0])
    far_off.c2w[:, :3, 3] += shift
    write_transforms(tmp_path, far_off, near=2, far=8)
    scene = load_scene(tmp_path)
    mean = far_off.c2w[:, :3, 3].mean(0)
    assert scene.world_offset == tuple(mean)
    assert scene.select([2, 1]).resized((40, 32)).world_offset == tuple(mean)
    said = capsys.readouterr().err
    assert said.startswith("note: the cameras of") and said.count("\n") == 1 and f"({distance:.0f}, " in said
    exact = np.stack([project_exactly(scene_points(), c2w, near_by.K) for c2w in near_by.c2w])
    assert np.abs(projected(scene, scene_points() + shift - mean) - exact).max() < 2e-3


def test_a_world_at_ordinary_coordinates_stays_bit_for_bit(tmp_path, capsys):
    truth = make_scene()
    truth.c2w[:, :3, 3] += [30.0, -20.0, 10.0]
    write_transforms(tmp_path, truth, near=0.05, far=8)
    scene = load_scene(tmp_path)
    assert scene.world_offset == (0.0, 0.0, 0.0) and not capsys.readouterr().err
    np.testing.assert_array_equal(scene.cameras.centers.numpy(), truth.c2w[:, :3, 3].astype(np.float32))


def test_transforms_near_far_and_focal_from_the_angle(tmp_path):
    truth = make_scene(**SQUARE)
    write_transforms(tmp_path, truth, near=1.5, far=7.0)
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
        del content[key]
    content["camera_angle_x"] = 2 * np.arctan(40 / 70)
    content["frames"][1]["far"] = 8.0
    content["frames"][1]["file_path"] = content["frames"][1]["file_path"].removesuffix(".png")
    path.write_text(json.dumps(content))
    scene = load_scene(tmp_path)
    np.testing.assert_allclose(scene.cameras.K[0].numpy(), truth.K, rtol=1e-6)
    assert scene.cameras.far.tolist() == [7.0, 8.0, 7.0, 7.0]
    content |= {"fl_x": 70.0, "fl_y": 70.0, "camera_angle_x": 49}  # in degrees, but nobody asks
    path.write_text(json.dumps(content))
    np.testing.assert_allclose(load_scene(tmp_path).cameras.K[0].numpy(), truth.K, rtol=1e-6)
    assert scene.cameras.near.tolist() == [1.5] * 4


def test_order_of_views(tmp_path):
    """COLMAP's photos by name though the file lists them in reverse; a transforms.json in its own order."""
    write_colmap(tmp_path / "c", make_scene(), "PINHOLE", binary=True)
    assert load_scene(tmp_path / "c").image_names == ("p0.png", "p1.png", "p2.png", "p3.png")
    write_transforms(tmp_path / "t", make_scene(), near=1, far=9)
    path = tmp_path / "t" / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"].reverse()
    path.write_text(json.dumps(content))
    scene = load_scene(tmp_path / "t")
    assert scene.image_names[0] == "frame_00003.png" and scene.view_ids == (0, 1, 2, 3)


def test_select_keeps_views_together(tmp_path):
    write_dtu(tmp_path, make_scene())
    scene = load_scene(tmp_path)
    part = scene.select([3, 1])
    assert part.view_ids == (11, 2) and len(part) == 2
    assert part.cameras.c2w.equal(scene.cameras.c2w[[3, 1]])
    assert part.image(0).equal(scene.image(3))


def test_nearest_leaves_the_target_out_and_orders_by_distance(tmp_path):
    write_procedural(tmp_path, make_scene(views=6))
    scene = load_scene(tmp_path)
    target = scene.cameras[2]
    distances = (scene.cameras.centers - target.centers).abs().sum(-1)
    expected = [i for i in distances.argsort().tolist() if i != 2]
    assert scene.nearest_indices(target, 5) == expected
    assert scene.nearest_indices(target, 2, candidates=[0, 2, 5]) == [i for i in expected if i in (0, 5)]
    views = scene.nearest(target, n=3)
    assert views.images.equal(torch.stack([scene.image(i) for i in expected[:3]]))
    assert views.cameras.c2w.equal(scene.cameras.c2w[expected[:3]])
    with pytest.raises(InputError, match="6 source views asked for, 5 to choose from"):
        scene.nearest_indices(target, 6)
    with pytest.raises(InputError, match="view 9 does not exist"):
        scene.nearest_indices(target, 1, candidates=[9])


def test_l1_and_l2_can_disagree(tmp_path):
    write_procedural(tmp_path, make_scene(views=3))
    scene = load_scene(tmp_path)
    target = scene.cameras[0]
    c2w = scene.cameras.c2w.clone()
    c2w[1, :3, 3] = target.centers + torch.tensor([3.0, 0.0, 0.0])
    c2w[2, :3, 3] = target.centers + torch.tensor([2.0, 2.0, 0.0])
    moved = replace(scene, cameras=replace(scene.cameras, c2w=c2w))
    assert moved.nearest_indices(target, 1, order=1) == [1]
    assert moved.nearest_indices(target, 1, order=2) == [2]


def test_roots_of_several_scenes(tmp_path):
    write_llff(tmp_path / "b" / "fern", make_scene(**SQUARE))
    write_llff(tmp_path / "b" / "aloe", make_scene(**SQUARE))
    write_procedural(tmp_path / "a", make_scene())
    assert [spec.name for spec in find_scenes(tmp_path)] == ["a", "aloe", "fern"]
    assert [spec.path for spec in find_scenes(tmp_path / "a")] == [tmp_path / "a"]
    with pytest.raises(InputError, match="holds some: name one of them"):
        load_scene(tmp_path)


def test_a_search_passes_by_folders_that_may_not_be_read(tmp_path, monkeypatch):
    for name in ("fern", "lost+found"):
        write_llff(tmp_path / name, make_scene(**SQUARE))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found" and access(path, mode))
    assert [spec.name for spec in find_scenes(tmp_path)] == ["fern"]


def test_scenes_of_one_name_get_different_ones(tmp_path):
    for folder in ("a/fern", "b/fern", "b/aloe"):
        write_llff(tmp_path / folder, make_scene(**SQUARE))
    assert distinct_names(find_scenes(tmp_path)) == ["a/fern", "aloe", "b/fern"]
    assert distinct_names(find_scenes(tmp_path / "a")) == ["fern"]
    assert distinct_names(find_scenes(tmp_path / "b")) == ["aloe", "fern"]
    far = load_scene(tmp_path / "a" / "fern")
    assert own_name(replace(far, name="a/fern")) == own_name(far) == "fern"


def test_threads_make_one_map_of_a_lens(tmp_path, monkeypatch):
    write, lens = next(iter(LENS_FORMATS.values()))
    write(tmp_path, make_scene(size=(160, 128), focal=(110.0, 110.0), center=(82.0, 61.0), distort=lens))
    scene, made = load_scene(tmp_path), []
    distort = distortion.distort
    distortion._lookup_grid.cache_clear()
    monkeypatch.setattr(distortion, "distort", lambda *a: made.append(time.sleep(0.05)) or distort(*a))
    monkeypatch.setattr("idnerf.data.scene.decoders", lambda photos: photos)
    scene.views(range(len(scene)))
    assert len(made) == 1


def test_scene_survives_pickling(tmp_path):
    """Data loader workers get scenes that way."""
    write_procedural(tmp_path, make_scene())
    scene = pickle.loads(pickle.dumps(load_scene(tmp_path)))
    assert scene.image(0).shape == (3, 64, 80) and scene.depth(0) is not None


def test_package_names_are_lazy():
    assert idnerf.load_scene is load_scene
    assert "load_scene" in dir(idnerf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        idnerf.nothing  # noqa: B018
    code = "import sys, idnerf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
