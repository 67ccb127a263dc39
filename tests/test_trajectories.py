"""Camera paths: rotations stay rotations, ends meet the sources, orbits keep their distance, paths loop."""

import math

import pytest
import torch

from idnerf.errors import InputError
from idnerf.geometry.cameras import shifted_range
from idnerf.geometry.projection import project
from idnerf.geometry.trajectories import camera_path, focus_point, look_at, rotate_between
from idnerf.types import Cameras
from test_geometry import random_cameras


def ring(angles: list[float], radius: float = 4.0) -> Cameras:
    """Cameras on a circle around the origin, looking at it, y down."""
    angle = torch.tensor(angles)
    centers = radius * torch.stack([torch.sin(angle), torch.zeros_like(angle), -torch.cos(angle)], -1)
    rotations = look_at(centers, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    c2w = torch.eye(4).repeat(len(angles), 1, 1)
    c2w[:, :3, :3], c2w[:, :3, 3] = rotations, centers
    K = torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]).repeat(len(angles), 1, 1)
    return Cameras(c2w, K, (64, 48), torch.full((len(angles),), 2.0), torch.full((len(angles),), 6.0))


@pytest.mark.parametrize("kind", ["interpolate", "spiral", "orbit"])
@pytest.mark.parametrize("frames", [1, 7])
def test_paths_give_rotations_and_what_the_sources_know_of_the_depth_range(kind, frames, generator):
    source = random_cameras((3,), generator)
    path = camera_path(kind, source, frames)
    assert path.shape == (frames,) and path.size == source.size
    rotation = path.c2w[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(frames, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(frames), atol=1e-5, rtol=0)
    for frame in (path[i] for i in range(frames)):
        near, far = shifted_range(source, frame.c2w)
        assert frame.near == near and frame.far == far


def test_depth_range_in_the_plane_of_the_sources_is_theirs_and_moves_with_the_camera():
    source = ring([0.0, 0.0, 0.0])
    source.c2w[:, 0, 3] = torch.tensor([-0.2, 0.0, 0.2])
    path = camera_path("interpolate", source, 5)
    assert (path.near == 2).all() and (path.far == 6).all()
    c2w = source.c2w[1].repeat(3, 1, 1)
    c2w[:, 2, 3] += torch.tensor([-1.0, 1.0, 3.0])
    near, far = shifted_range(source, c2w)
    torch.testing.assert_close(near, torch.tensor([3.0, 1.0, 0.5]))  # of the sources' near at least a quarter
    torch.testing.assert_close(far, torch.tensor([7.0, 5.0, 3.0]))


def test_interpolation_begins_and_ends_at_sources_and_passes_the_middle_one(generator):
    source = random_cameras((3,), generator)
    path = camera_path("interpolate", source, 9)
    for frame, view in ((0, 0), (4, 1), (8, 2)):
        torch.testing.assert_close(path.c2w[frame], source.c2w[view], atol=1e-5, rtol=0)


def test_half_way_between_two_rotations_is_equally_far_from_both(generator):
    source = random_cameras((2,), generator)
    a, b = source.c2w[:1, :3, :3], source.c2w[1:, :3, :3]
    half = rotate_between(a, b, torch.tensor([0.5]))
    torch.testing.assert_close(a.mT @ half, half.mT @ b, atol=1e-5, rtol=0)


def test_cameras_on_a_ring_focus_on_its_centre_and_orbit_at_its_radius():
    source = ring([-0.3, 0.0, 0.3])
    torch.testing.assert_close(focus_point(source), torch.zeros(3), atol=1e-4, rtol=0)
    path = camera_path("orbit", source, 12)
    distances = path.centers.norm(dim=-1)
    torch.testing.assert_close(distances, distances[:1].expand(12), atol=1e-4, rtol=0)
    angles = torch.atan2(path.centers[:, 0], -path.centers[:, 2])
    assert angles.abs().max() == pytest.approx(0.3, abs=0.03)
    pixels, depth = project(torch.zeros(12, 1, 3), path)
    torch.testing.assert_close(pixels[:, 0], torch.tensor([32.0, 24.0]).expand(12, 2), atol=1e-3, rtol=0)
    assert (depth > 0).all()


@pytest.mark.parametrize("reach", [0.8, 1.1])
def test_orbits_of_wide_rings_keep_to_the_ring(reach):
    source = ring([-reach, 0.0, reach])
    torch.testing.assert_close(focus_point(source), torch.zeros(3), atol=1e-4, rtol=0)
    path = camera_path("orbit", source, 16)
    torch.testing.assert_close(path.centers.norm(dim=-1), torch.full((16,), 4.0), atol=1e-3, rtol=0)
    pixels, _ = project(torch.zeros(16, 1, 3), path)
    torch.testing.assert_close(pixels[:, 0], torch.tensor([32.0, 24.0]).expand(16, 2), atol=1e-2, rtol=0)


@pytest.mark.parametrize("elevation", [0.3, 0.8])
def test_orbits_of_cameras_above_an_object_stay_level(elevation):
    angle = torch.tensor([-0.9, 0.1, 0.7])
    height = torch.full_like(angle, -math.sin(elevation))
    flat = math.cos(elevation)
    centers = 4 * torch.stack([flat * torch.sin(angle), height, -flat * torch.cos(angle)], -1)
    source = ring(angle.tolist())
    source.c2w[:, :3, :3] = look_at(centers, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))
    source.c2w[:, :3, 3] = centers
    path = camera_path("orbit", source, 16)
    assert path.c2w[:, 1, 0].abs().max() < 0.05  # right axes without tilt
    torch.testing.assert_close(path.centers[:, 1], 4 * height[:1].expand(16), atol=0.15, rtol=0)
    torch.testing.assert_close(path.centers.norm(dim=-1), torch.full((16,), 4.0), atol=1e-3, rtol=0)


def test_orbits_of_cameras_right_above_something_are_paths_too():
    source = ring([0.0, 0.0, 0.0])
    centers = torch.tensor([[-0.5, -4.0, 0.0], [0.5, -4, 0.1], [0.0, -4, 0.5]])
    for i, ahead in enumerate(([1.0, 0, 0], [0.0, 0, 1], [-1.0, 0, 0])):
        source.c2w[i, :3, :3] = look_at(
            centers[i : i + 1], centers[i] + torch.tensor([0.0, 4, 0]), -torch.tensor(ahead)
        )[0]
    source.c2w[:, :3, 3] = centers
    path = camera_path("orbit", source, 9)
    assert torch.isfinite(path.c2w).all() and (path.centers[:, 1] < -3).all()


@pytest.mark.parametrize("kind", ["interpolate", "spiral", "orbit"])
def test_cameras_all_around_an_object_get_paths_too(kind):
    path = camera_path(kind, ring([0.0, math.pi / 2, math.pi, -math.pi / 2]), 9)
    rotation = path.c2w[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(9, -1, -1), atol=1e-5, rtol=0)
    assert torch.isfinite(path.centers).all() and (path.near > 0).all() and (path.far > path.near).all()


def test_parallel_cameras_focus_inside_the_depth_range():
    source = ring([0.0, 0.0, 0.0])
    source.c2w[:, 0, 3] = torch.tensor([-0.2, 0.0, 0.2])
    depth = (focus_point(source) - source.centers.mean(0)) @ source.c2w[0, :3, 2]
    assert 2.0 < depth < 6.0


@pytest.mark.parametrize("kind", ["spiral", "orbit"])
def test_closed_paths_step_evenly_across_their_seam(kind):
    path = camera_path(kind, ring([-0.2, 0.1, 0.25]), 40)
    steps = (path.centers - path.centers.roll(1, 0)).norm(dim=-1)
    assert steps[0] <= 1.1 * steps.max()


def test_unknown_path_and_no_frames_are_named(generator):
    with pytest.raises(InputError, match="interpolate, spiral or orbit"):
        camera_path("zigzag", random_cameras((2,), generator), 3)
    with pytest.raises(InputError, match="--frames"):
        camera_path("orbit", random_cameras((2,), generator), 0)
