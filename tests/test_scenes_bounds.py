"""Inferred depth ranges: from 3D points, from pictures, and from the cameras alone."""

import json

import numpy as np
import pytest
import torch

from idnerf.data import bounds
from idnerf.data.load import load_scene
from idnerf.types import Cameras
from scene_writers import make_scene, photo, pixel_grid, plane_depth, scene_points, write_colmap, write_transforms

NO_PICTURES = {"size": (96, 72), "focal": (90.0, 90.0), "center": None}


def true_range(truth) -> tuple[float, float]:
    grid = (pixel_grid(truth.size) - truth.K[:2, 2]) / [truth.K[0, 0], truth.K[1, 1]]
    depths = np.stack([plane_depth(c2w, grid) for c2w in truth.c2w])
    return float(depths.min()), float(depths.max())


def test_colmap_range_is_the_quantiles_of_the_points_it_sees(tmp_path):
    truth = make_scene()
    write_colmap(tmp_path, truth, "PINHOLE", binary=True)
    cameras = load_scene(tmp_path).cameras
    for i, c2w in enumerate(truth.c2w):
        z = (scene_points(300) - c2w[:3, 3]) @ c2w[:3, 2]
        low, high = np.quantile(z, [bounds.LOW, bounds.HIGH])
        assert float(cameras.near[i]) == pytest.approx(0.8 * low, rel=1e-5)
        assert float(cameras.far[i]) == pytest.approx(1.2 * high, rel=1e-5)


def test_colmap_without_points_is_measured_from_the_pictures(tmp_path):
    truth = make_scene(**NO_PICTURES)
    write_colmap(tmp_path, truth, "PINHOLE", binary=True, points=0)
    near, far = true_range(truth)
    cameras = load_scene(tmp_path).cameras
    assert 0.6 * near < float(cameras.near.min()) < near
    assert far < float(cameras.far.max()) < 1.6 * far


def test_a_camera_that_sees_few_points_takes_the_range_of_the_others():
    depths = [torch.linspace(2, 4, 101), torch.linspace(3, 9, 101), torch.ones(3), None]
    near, far = bounds.bounds_from_depths(depths)
    assert near[2] == near[3] == near[:2].min() and far[2] == far[3] == far[:2].max()
    assert bounds.bounds_from_depths([None, torch.ones(3)]) is None


@pytest.mark.parametrize("views", [2, 3, 6])
def test_range_from_pictures_holds_the_scene_and_little_more(views, tmp_path):
    truth = make_scene(views=views, **NO_PICTURES)
    write_transforms(tmp_path, truth)
    near, far = true_range(truth)
    cameras = load_scene(tmp_path).cameras
    assert 0.6 * near < float(cameras.near.min()) < near
    assert far < float(cameras.far.max()) < 1.6 * far


def test_range_from_pictures_scales_with_the_scene():
    truth = make_scene(views=3, **NO_PICTURES)
    pictures = [torch.from_numpy(image).permute(2, 0, 1) / 255 for image in truth.images]

    def read(index, size):
        return torch.nn.functional.interpolate(pictures[index][None], size=size[::-1], mode="area")[0]

    ranges = []
    for scale in (1.0, 50.0):
        c2w = torch.from_numpy(truth.c2w).float()
        c2w[:, :3, 3] *= scale
        K = torch.from_numpy(truth.K).float().expand(3, 3, 3)
        cameras = Cameras(c2w, K, truth.size, torch.full((3,), torch.nan), torch.full((3,), torch.nan))
        ranges.append(torch.stack(bounds.bounds_from_images(cameras, read)))
    torch.testing.assert_close(ranges[1], 50 * ranges[0], rtol=0.02, atol=0)


def test_pictures_that_do_not_match_leave_it_to_the_cameras(tmp_path):
    truth = make_scene(views=3, **NO_PICTURES)
    noise = np.random.default_rng(0)
    for i in range(3):
        truth.images[i] = noise.integers(0, 256, truth.images[i].shape, dtype=np.uint8)
    write_transforms(tmp_path, truth)
    cameras = load_scene(tmp_path).cameras
    near, far = bounds.bounds_from_arrangement(cameras)
    assert cameras.near.equal(near) and cameras.far.equal(far)


def test_cameras_that_look_at_one_point_range_around_it():
    c2w = torch.eye(4).repeat(4, 1, 1)
    angles = torch.tensor([-0.6, -0.2, 0.3, 0.7])
    c2w[:, 0, 0] = c2w[:, 2, 2] = angles.cos()
    c2w[:, 0, 2], c2w[:, 2, 0] = angles.sin(), -angles.sin()
    c2w[:, :3, 3] = torch.tensor([1.0, 2.0, 3.0]) - 5 * c2w[:, :3, 2]  # the point is 5 in front of each
    cameras = Cameras(c2w, torch.eye(3).repeat(4, 1, 1), (8, 8), torch.ones(4), torch.ones(4))
    near, far = bounds.bounds_from_arrangement(cameras)
    torch.testing.assert_close(near, torch.full((4,), 1.25))
    torch.testing.assert_close(far, torch.full((4,), 20.0))


def test_parallel_cameras_range_by_their_spacing():
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[:, 0, 3] = torch.tensor([0.0, 0.1, 0.3])
    cameras = Cameras(c2w, torch.eye(3).repeat(3, 1, 1), (8, 8), torch.ones(3), torch.ones(3))
    near, far = bounds.bounds_from_arrangement(cameras)
    torch.testing.assert_close(near, torch.full((3,), 0.4))
    torch.testing.assert_close(far, torch.full((3,), 40.0))


def test_strips_are_measured_like_other_pictures(tmp_path):
    """30 times as wide as high: thumbnails no lower than the windows that are matched."""
    write_transforms(tmp_path, make_scene(size=(600, 20), focal=(500.0, 500.0), center=None))
    cameras = load_scene(tmp_path).cameras
    assert (cameras.near > 0).all() and (cameras.near < 3.5).all() and (cameras.far > 4.5).all()


def test_a_scene_too_far_for_the_second_sweep_takes_the_range_of_the_first():
    """Baselines of a 400th of the distance: little parallax, but the range has to hold the scene."""
    truth = make_scene(views=4, spacing=0.01, size=(480, 360), focal=(390.0, 390.0), center=None)
    for index, c2w in enumerate(truth.c2w):
        c2w[:3, :3], c2w[:3, 3] = np.eye(3), [0.01 * index, 0, 0]
    pictures = [torch.from_numpy(photo(c2w, truth.K, truth.size)).permute(2, 0, 1).float() for c2w in truth.c2w]

    def read(index, size):
        return torch.nn.functional.interpolate(pictures[index][None], size=size[::-1], mode="area")[0]

    cameras = Cameras(
        torch.from_numpy(truth.c2w).float(),
        torch.from_numpy(truth.K).float().expand(4, 3, 3),
        truth.size,
        torch.full((4,), torch.nan),
        torch.full((4,), torch.nan),
    )
    near, far = bounds.bounds_from_images(cameras, read)
    true_near, true_far = true_range(truth)
    assert 0.4 * true_near < float(near.min()) and float(near.max()) < true_near
    assert true_far < float(far.min())


def test_given_ranges_are_kept_and_only_lacking_ones_inferred(tmp_path):
    write_transforms(tmp_path, make_scene(views=3, **NO_PICTURES))
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][1].update(near=0.5, far=70.0)
    path.write_text(json.dumps(content))
    cameras = load_scene(tmp_path).cameras
    assert cameras.near[1] == 0.5 and cameras.far[1] == 70.0
    assert cameras.near[0] > 1 and cameras.far[2] < 20


def test_a_scene_with_ranges_never_decodes_a_picture(tmp_path, monkeypatch):
    write_transforms(tmp_path, make_scene(), near=1, far=9)

    def forbidden(*_arguments, **_options):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr("idnerf.data.photo.read_image", forbidden)
    load_scene(tmp_path)


def test_match_planes_peaks_at_the_true_plane(generator):
    """Parallel cameras, fronto-parallel texture: disparity = f b / z in closed form."""
    source = torch.rand(40, 60, generator=generator)
    disparity = 6
    target = torch.zeros(40, 60)
    target[:, :-disparity] = source[:, disparity:]
    inverse = torch.linspace(0, 2, 21)  # source pixel = target pixel + 6 at inverse depth 1
    score, inside = bounds.match_planes(target, source, torch.eye(3), torch.tensor([6.0, 0.0, 0.0]), inverse)
    peak = score[:, :, :-5].argmax(0)
    assert (inverse[peak] == 1).all()
    assert inside[10].bool().any() and not inside[10].bool().all()
