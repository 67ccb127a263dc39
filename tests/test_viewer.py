"""The viewer without a browser: geometry, the order of work, cancellation, what a session asks for and shows."""

import contextlib
import math
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from idnerf import cli
from idnerf.data.load import load_scene
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.data.scene import Scene
from idnerf.data.view_selection import target_bounds
from idnerf.errors import InputError
from idnerf.geometry.cameras import shifted_range
from idnerf.geometry.projection import project
from idnerf.geometry.quaternions import quaternion_of, rotation_of
from idnerf.geometry.rays import image_rays, rays_at_pixels, unproject
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.types import Cameras, RenderOutput
from idnerf.viewer.panel import Choices
from idnerf.viewer.path import sample_path
from idnerf.viewer.picture import BACKGROUND, Picture, display, warning
from idnerf.viewer.render_queue import Cancelled, Level, RenderQueue
from idnerf.viewer.scene_renderer import SceneRenderer, Speed, ViewRequest
from idnerf.viewer.scheduler import RenderScheduler
from idnerf.viewer.server import check_address, is_any_address, is_loopback
from idnerf.viewer.session import Session, central_view
from idnerf.viewer.sources import Support, choose_sources, support
from idnerf.viewer.view_point import ViewPoint, field_inside_photo, pose_of
from idnerf.viewer.world_frame import FOCUS_DISTANCE, fit_world_frame
from tiny_cases import TINY_CASCADE, cameras_on_a_wall

SIZE = (64, 48)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    folder = tmp_path_factory.mktemp("scenes") / "garden"
    config = ProceduralConfig(size=SIZE, num_views=5, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), folder)
    return load_scene(folder)


@pytest.fixture(scope="module")
def model() -> IDNeRF:
    torch.manual_seed(0)
    return IDNeRF(ModelConfig(cascade=TINY_CASCADE)).eval()


def ring(count: int, radius: float = 4.0, tilt: float = 0.0) -> Cameras:
    """Cameras around the origin that look at it; world up is -y, image down is +y; lifted by ``tilt`` radians."""
    c2w = torch.eye(4).repeat(count, 1, 1)
    for pose, angle in zip(c2w, torch.arange(count) * (2 * math.pi / count), strict=True):
        center = torch.stack(
            [torch.sin(angle) * math.cos(tilt), torch.tensor(-math.sin(tilt)), -torch.cos(angle) * math.cos(tilt)]
        )
        forward = -center
        right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), forward), dim=0)
        pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], -1)
        pose[:3, 3] = center * radius
    K = torch.tensor([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]]).repeat(count, 1, 1)
    return Cameras(c2w, K, SIZE, torch.full((count,), radius / 2), torch.full((count,), radius * 2))


def random_rotation(generator: torch.Generator) -> np.ndarray:
    return rotation_of(torch.randn(4, generator=generator).double().numpy())


# Geometry ---------------------------------------------------------------------------------------------------------


def test_quaternions_and_rotations_are_inverse_also_for_half_turns(generator):
    rotations = [random_rotation(generator) for _ in range(20)]
    rotations += [np.diag(d).astype(float) for d in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1])]
    for rotation in rotations:
        wxyz = quaternion_of(rotation)
        np.testing.assert_allclose(rotation_of(wxyz), rotation, atol=1e-9)
        assert wxyz[0] >= 0 and np.linalg.norm(wxyz) == pytest.approx(1)


def test_poses_survive_the_way_to_the_browser_and_back(generator):
    cameras = cameras_on_a_wall(6, SIZE, generator, turn=0.3)
    frame = fit_world_frame(cameras)
    for i in range(6):
        np.testing.assert_allclose(
            frame.to_scene(*frame.to_viewer(pose_of(cameras[i]))), pose_of(cameras[i]), atol=1e-6
        )


@pytest.mark.parametrize("tilt", [0.0, 0.6])
def test_cameras_around_an_object_stand_upright_around_the_origin(tilt):
    cameras = ring(8, tilt=tilt)
    frame = fit_world_frame(cameras)
    np.testing.assert_allclose(frame.origin, 0, atol=1e-4)
    np.testing.assert_allclose(frame.rotation[2], [0, -1, 0], atol=1e-5)  # z up in the browser is -y in the scene
    assert np.linalg.det(frame.rotation) == pytest.approx(1)
    for i in range(8):
        assert np.linalg.norm(frame.to_viewer(pose_of(cameras[i]))[1]) == pytest.approx(FOCUS_DISTANCE, abs=1e-4)


def test_forward_facing_cameras_focus_ahead_of_them_within_their_range(generator):
    cameras = cameras_on_a_wall(5, SIZE, generator, turn=0.0)
    frame = fit_world_frame(cameras)
    assert 2 < frame.origin[2] < 8 and abs(frame.origin[0]) < 1
    np.testing.assert_allclose(frame.rotation @ [0, 0, 1.0], [0, 1, 0], atol=1e-6)


def test_the_browser_sees_the_same_whatever_world_the_scene_came_in(generator):
    cameras = ring(7, tilt=0.3)
    turn, shift, scale = random_rotation(generator), np.array([3.0, -2.0, 1.0]), 0.01
    moved = cameras.c2w.double().numpy().copy()
    moved[:, :3, :3] = turn @ moved[:, :3, :3]
    moved[:, :3, 3] = scale * moved[:, :3, 3] @ turn.T + shift
    other = Cameras(torch.from_numpy(moved).float(), cameras.K, cameras.size, cameras.near * scale, cameras.far * scale)
    first, second = fit_world_frame(cameras), fit_world_frame(other)
    ours = [first.to_viewer(pose_of(cameras[i])) for i in range(7)]
    theirs = [second.to_viewer(pose_of(other[i])) for i in range(7)]
    # Seven cameras in a ring have no mean direction: the heading may differ, distances and tilts may not.
    np.testing.assert_allclose(
        [[np.linalg.norm(a[1] - b[1]) for a in ours] for b in ours],
        [[np.linalg.norm(a[1] - b[1]) for a in theirs] for b in theirs],
        atol=1e-3,
    )
    np.testing.assert_allclose([a[1][2] for a in ours], [a[1][2] for a in theirs], atol=1e-3)


def look_at_pose(position: np.ndarray, look_at: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The pose that orbit controls make of these three (OpenCV axes)."""
    forward = (look_at - position) / np.linalg.norm(look_at - position)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(forward, right), forward], -1), position
    return pose


def test_orbit_controls_reach_the_exact_pose_with_the_least_lean(generator):
    cameras = ring(6, tilt=0.4)
    frame = fit_world_frame(cameras)
    upright = frame.to_viewer(pose_of(cameras[0]))
    for roll in (0.0, 0.2, -1.0, 2.5):
        pose = pose_of(cameras[0])
        c, s = math.cos(roll), math.sin(roll)
        pose[:3, :3] = pose[:3, :3] @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
        position, look_at, up = frame.orbit(pose)
        wxyz, expected = frame.to_viewer(pose)
        np.testing.assert_allclose(look_at_pose(position, look_at, up)[:3, :3], rotation_of(wxyz), atol=1e-6)
        np.testing.assert_allclose(position, expected)
        if roll == 0:
            np.testing.assert_allclose(up, [0, 0, 1], atol=1e-5)
            np.testing.assert_allclose(look_at, 0, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(upright[1]), FOCUS_DISTANCE, atol=1e-4)


@pytest.mark.parametrize("aspect", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("side", [97, 160])
def test_every_size_of_a_view_shows_its_field(aspect, side):
    view = ViewPoint(np.eye(4), math.radians(50), aspect)
    size = view.size(side)
    assert all(s % 2 == 0 for s in size) and abs(max(size) - side) <= 1
    camera = view.camera(size, 1.0, 2.0)
    middle_top, middle_left = [size[0] / 2, 0.0], [0.0, size[1] / 2]
    rays = rays_at_pixels(camera, torch.tensor([middle_top, middle_left]))
    top, left = rays.directions.double()
    assert math.atan2(-top[1], top[2]) == pytest.approx(math.radians(25), abs=1e-5)
    assert -left[0] / left[2] == pytest.approx(aspect * math.tan(math.radians(25)), rel=1e-5)


@pytest.mark.parametrize("aspect", [0.4, 4 / 3, 3.0])
def test_the_first_field_of_view_is_the_largest_inside_the_photo(aspect, generator):
    camera = cameras_on_a_wall(1, SIZE, generator)[0]
    view = ViewPoint(pose_of(camera), field_inside_photo(camera, aspect), aspect)
    window = view.camera(view.size(640), 1.0, 2.0)
    corners = torch.tensor([[0.0, 0.0], [window.width, 0.0], [0.0, window.height], [window.width, window.height]])
    rays = rays_at_pixels(window, corners)
    pixels, _ = project(rays.origins + rays.directions, camera)
    inside = torch.stack([pixels[:, 0], SIZE[0] - pixels[:, 0], pixels[:, 1], SIZE[1] - pixels[:, 1]])
    assert inside.min() == pytest.approx(0, abs=1e-2)  # touches an edge and crosses none


# Sources ----------------------------------------------------------------------------------------------------------


def test_sources_are_the_nearest_and_a_view_can_be_left_out():
    cameras = ring(12)
    target = cameras[3]
    assert set(choose_sources(cameras, target, 3)) == {2, 3, 4}
    assert choose_sources(cameras, target, 1) == (3,)
    assert set(choose_sources(cameras, target, 2, left_out=3)) == {2, 4}


def test_a_near_camera_that_looks_away_is_no_source():
    cameras = ring(12)
    c2w = cameras.c2w.clone()
    c2w[4, :3, :3] = c2w[4, :3, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    turned = Cameras(c2w, cameras.K, cameras.size, cameras.near, cameras.far)
    chosen = set(choose_sources(turned, cameras[3], 3))
    assert {2, 3} < chosen < {1, 2, 3, 5}
    assert len(choose_sources(turned, cameras[3], 12)) == 12  # when there are no others, it is taken


def test_sources_stay_until_others_are_clearly_nearer():
    cameras = ring(36)
    steps = np.linspace(0, 3, 61)
    changes, previous = 0, None
    for step in steps:
        share = step - math.floor(step)
        first = cameras[math.floor(step)].centers
        center = torch.lerp(first, cameras[min(math.floor(step) + 1, 35)].centers, share)
        c2w = cameras.c2w[round(step)].clone()
        c2w[:3, 3] = center
        target = Cameras(c2w, cameras.K[0], SIZE, cameras.near[0], cameras.far[0])
        chosen = choose_sources(cameras, target, 3, previous=previous)
        fresh = choose_sources(cameras, target, 3)
        distance = (cameras.centers - center).abs().sum(-1)
        assert distance[list(chosen)].sum() <= distance[list(fresh)].sum() / 0.85 + 1e-5
        changes += previous is not None and set(chosen) != set(previous)
        previous = chosen
    assert 2 <= changes <= 4
    assert set(choose_sources(cameras, cameras[20], 3, previous=previous)) == {19, 20, 21}


def test_depth_range_is_the_sources_and_shifts_as_the_camera_steps_back(generator):
    cameras = cameras_on_a_wall(4, SIZE, generator, turn=0.0)
    centers = cameras.c2w.clone()
    centers[:, 2, 3] = 0
    cameras = Cameras(centers, cameras.K, SIZE, torch.tensor([2.0, 2.5, 3, 2]), torch.tensor([6.0, 8, 7, 6]))
    c2w = torch.eye(4)
    assert shifted_range(cameras, c2w) == target_bounds(cameras)
    c2w[2, 3] = -1.5
    assert shifted_range(cameras, c2w) == (3.5, 9.5)
    for forward in (1.0, 2.0, 7.0, 50.0):
        c2w[2, 3] = forward
        near, far = shifted_range(cameras, c2w)
        assert 0 < near < far


def test_support_counts_photos_and_measures_angles_like_a_naive_reference(generator):
    cameras = ring(10)
    target = cameras[0]
    sources = cameras[[0, 1, 5]]
    depth = 3.5 + torch.rand(48, 64, generator=generator)
    known = support(target, depth, sources)
    points = unproject(target, depth)
    for row, column in [(0, 0), (24, 32), (47, 63), (10, 50)]:
        point = points[row, column]
        seen, angles = 0, [180.0]
        for i in range(3):
            pixel, z = project(point[None], sources[i])
            if z[0] > 0 and 0 <= pixel[0, 0] < 64 and 0 <= pixel[0, 1] < 48:
                seen += 1
                a, b = target.centers - point, sources.centers[i] - point
                cosine = float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
                angles.append(math.degrees(math.acos(min(1.0, cosine))))
        assert known.seen[row, column] == seen
        assert float(known.angle[row, column]) == pytest.approx(min(angles), abs=0.05)
    behind = support(target, torch.full((48, 64), 30.0), cameras[[5, 6]])  # behind both cameras across the ring
    assert (behind.seen == 0).all() and (behind.angle == 180).all()


# Pictures ---------------------------------------------------------------------------------------------------------


def picture(seen: float, angle: float, confidence: float | None = 1.0, full: bool = True) -> Picture:
    generator = torch.Generator().manual_seed(3)
    output = RenderOutput(
        torch.rand(3, 24, 32, generator=generator),
        2 + torch.rand(24, 32, generator=generator),
        torch.ones(24, 32),
        None if confidence is None else torch.full((24, 32), confidence),
    )
    camera = ViewPoint(np.eye(4), 0.8, 32 / 24).camera((32, 24), 1.0, 8.0)
    known = Support(torch.full((24, 32), seen), torch.full((24, 32), angle))
    return Picture(output, camera, known, (0, 1), full, 0.1)


def test_modes_show_different_things_and_colour_shows_the_rendering():
    good = picture(3.0, 1.0)
    colour = display(good, "Colour", fade=True)
    np.testing.assert_allclose(colour, good.output.rgb.permute(1, 2, 0).numpy() * 255, atol=0.51)
    assert not np.array_equal(colour, display(good, "Depth", fade=False))
    confidence = display(good, "Confidence", fade=False)
    assert (confidence == confidence[0, 0]).all()


@pytest.mark.parametrize(("seen", "angle", "confidence"), [(0.0, 180.0, 1.0), (3.0, 40.0, 1.0), (3.0, 1.0, 0.1)])
def test_what_is_not_supported_fades_to_grey_and_is_shown_on_request(seen, angle, confidence):
    bad = picture(seen, angle, confidence)
    assert (display(bad, "Colour", fade=True) == round(255 * BACKGROUND)).all()
    assert display(bad, "Colour", fade=False).std() > 10


def test_a_camera_out_of_range_is_told_why():
    assert warning(picture(3.0, 2.0)) is None
    assert "40 degrees away" in str(warning(picture(3.0, 40.0)))
    assert "nothing of most" in str(warning(picture(0.0, 180.0)))
    assert "fewer than two" in str(warning(picture(1.0, 2.0)))
    assert "Out of range" in str(warning(picture(0.0, 180.0)))
    half = picture(3.0, 2.0)
    half.support.seen[:, :16] = 0
    assert "Near the edge" in str(warning(half))


# Paths ------------------------------------------------------------------------------------------------------------


def random_views(count: int, generator: torch.Generator) -> list[ViewPoint]:
    views = []
    for _ in range(count):
        c2w = np.eye(4)
        c2w[:3, :3] = random_rotation(generator)
        c2w[:3, 3] = torch.randn(3, generator=generator).double().numpy()
        views.append(ViewPoint(c2w, 0.5 + float(torch.rand((), generator=generator)), 1.5))
    return views


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_path_passes_through_its_key_frames_smoothly(count, closed, generator):
    keys = random_views(count, generator)
    frames = sample_path(keys, 40, closed=closed)
    assert len(frames) == (count * 40 if closed else (count - 1) * 40 + 1)
    for i, key in enumerate(keys):
        np.testing.assert_allclose(frames[i * 40].c2w, key.c2w, atol=1e-9)
        assert frames[i * 40].fov == pytest.approx(key.fov)
    poses = np.array([f.c2w for f in [*frames, *frames[: 1 if closed else 0]]])
    products = poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1)
    np.testing.assert_allclose(products - np.eye(3), 0, atol=1e-9)
    steps = np.abs(np.diff(poses, axis=0)).max((1, 2))
    assert steps.max() < 0.35  # no jump anywhere, the loop's seam included
    if count > 2:  # the velocity does not jump either
        velocity = np.diff(poses[:, :3, 3], axis=0)
        assert np.linalg.norm(np.diff(velocity, axis=0), axis=1).max() < 0.25 * np.linalg.norm(velocity, axis=1).max()


def test_two_key_frames_make_a_straight_line(generator):
    keys = random_views(2, generator)
    centers = np.array([f.c2w[:3, 3] for f in sample_path(keys, 10)])
    np.testing.assert_allclose(centers, np.linspace(keys[0].c2w[:3, 3], keys[1].c2w[:3, 3], 11), atol=1e-9)


def test_a_path_needs_two_key_frames(generator):
    with pytest.raises(InputError, match="at least 2 key frames"):
        sample_path(random_views(1, generator), 10)
    with pytest.raises(InputError, match="at least 1 frame"):
        sample_path(random_views(2, generator), 0)


# The order of work ------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock) -> RenderQueue:
    queue = RenderQueue(rest_seconds=1.0, clock=clock)
    queue.add("a")
    queue.add("b")
    return queue


def test_the_latest_camera_wins_and_a_stale_coarse_picture_is_still_shown(queue):
    for place in range(5):
        queue.show("a", place)
    job = queue.take_interactive()
    assert job is not None and job.request == 4 and job.level is Level.COARSE
    queue.show("a", 5)
    assert queue.take_interactive() is None  # one at a time
    assert queue.finish(job, done=True)
    following = queue.take_interactive()
    assert following is not None and following.request == 5


def test_full_comes_after_rest_and_after_the_coarse_picture(queue, clock):
    queue.show("a", "view")
    clock.now = 2.0
    assert queue.take_patient() is None and queue.seconds_to_wait() is None  # coarse first
    coarse = queue.take_interactive()
    queue.finish(coarse, done=True)
    queue.show("a", "moved")
    queue.finish(queue.take_interactive(), done=True)
    assert queue.take_patient() is None and queue.seconds_to_wait() == pytest.approx(1.0)
    clock.now = 2.9
    assert queue.take_patient() is None
    clock.now = 3.0
    job = queue.take_patient()
    assert job is not None and job.request == "moved" and job.level is Level.FULL
    assert queue.finish(job, done=True)
    assert queue.take_patient() is None and queue.seconds_to_wait() is None and not queue.interactive_work()


def test_moving_cancels_the_full_picture_which_is_made_anew_after_rest(queue, clock):
    queue.show("a", 1)
    queue.finish(queue.take_interactive(), done=True)
    clock.now = 1.0
    job = queue.take_patient()
    queue.show("a", 2)
    assert job.cancelled.is_set() and not queue.finish(job, done=True)
    queue.finish(queue.take_interactive(), done=True)
    clock.now = 2.0
    assert queue.take_patient().request == 2


def test_another_browser_moving_does_not_cancel_mine(queue, clock):
    queue.show("a", 1)
    queue.finish(queue.take_interactive(), done=True)
    clock.now = 1.0
    job = queue.take_patient()
    queue.show("b", 1)
    assert not job.cancelled.is_set() and queue.interactive_work()


def test_browsers_take_turns(queue):
    served = []
    for turn in range(6):
        queue.show("a", turn)
        queue.show("b", turn)
        job = queue.take_interactive()
        served.append(job.client)
        queue.finish(job, done=True)
    assert sorted(served) == ["a"] * 3 + ["b"] * 3 and served[0] != served[1] != served[2]


def test_frames_to_save_wait_behind_pictures_to_see_and_take_turns(queue, clock):
    first, second = queue.submit("a", "frame 1"), queue.submit("a", "frame 2")
    queue.submit("b", "frame 3")
    queue.show("b", "view")
    queue.finish(queue.take_interactive(), done=True)
    clock.now = 1.0
    order = []
    while (job := queue.take_patient()) is not None:
        order.append(job.request)
        queue.finish(job, done=True)
    assert order[0] == "view" and order.index("frame 3") < order.index("frame 2")
    assert not first.done() and not second.done()  # the queue hands futures out, workers settle them


def test_a_lost_browser_frees_its_work(queue, clock):
    queue.show("a", 1)
    queue.finish(queue.take_interactive(), done=True)
    clock.now = 1.0
    running, waiting = queue.take_patient(), queue.submit("a", "frame")
    queue.remove("a")
    assert running.cancelled.is_set() and waiting.cancelled()
    assert not queue.finish(running, done=True)
    queue.show("a", 2)
    assert queue.submit("a", 3).cancelled()
    assert queue.take_interactive() is None and queue.take_patient() is None and queue.seconds_to_wait() is None


# Threads ----------------------------------------------------------------------------------------------------------


class Recorder:
    """A scheduler whose pictures are (client's request, level); ``hold`` requests run until they are cancelled."""

    def __init__(self) -> None:
        self.delivered: list[tuple[Any, ...]] = []
        self.failures: list[tuple[Any, str]] = []
        self.cancelled: list[object] = []
        self.events: list[str] = []
        self.scheduler = RenderScheduler(
            self.render,
            lambda client, result: self.delivered.append((client, *result)),
            lambda client, message: self.failures.append((client, message)),
            RenderQueue(rest_seconds=0.02),
        )

    def render(self, request, level, checkpoint):
        if request == "bad":
            raise InputError("cannot be rendered")
        if request == "hold" and level is not Level.COARSE:
            self.events.append("holding")
            try:
                for _ in range(2000):
                    checkpoint()
                    time.sleep(0.005)
            except Cancelled:
                self.cancelled.append(request)
                raise
        if request == "slow coarse" and level is Level.COARSE:
            self.events.append("coarse begins")
            time.sleep(0.2)
            self.events.append("coarse ends")
        if request == "steps" and level is Level.FULL:
            for _ in range(100):
                checkpoint()
                self.events.append("step")
                time.sleep(0.01)
        return request, level


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.005)


@pytest.fixture
def recorder():
    recorder = Recorder()
    recorder.scheduler.add("a")
    recorder.scheduler.add("b")
    yield recorder
    recorder.scheduler.close()


def test_a_browser_gets_a_coarse_and_then_a_full_picture(recorder):
    recorder.scheduler.show("a", "view")
    wait_until(lambda: len(recorder.delivered) == 2)
    assert recorder.delivered == [("a", "view", Level.COARSE), ("a", "view", Level.FULL)]


def test_work_stops_when_its_browser_moves_or_goes(recorder):
    recorder.scheduler.show("a", "hold")
    wait_until(lambda: recorder.events == ["holding"])
    recorder.scheduler.show("a", "view")
    wait_until(lambda: ("a", "view", Level.FULL) in recorder.delivered)
    assert recorder.cancelled == ["hold"] and ("a", "hold", Level.FULL) not in recorder.delivered
    frame = recorder.scheduler.submit("a", "hold")
    wait_until(lambda: len(recorder.events) == 2)
    recorder.scheduler.remove("a")
    with pytest.raises(CancelledError):
        frame.result(timeout=10)
    wait_until(lambda: len(recorder.cancelled) == 2)
    recorder.scheduler.show("b", "view")  # the worker is free again
    wait_until(lambda: ("b", "view", Level.FULL) in recorder.delivered)


def test_a_request_that_fails_is_reported_once_and_the_next_one_works(recorder, capsys):
    recorder.scheduler.show("a", "bad")
    wait_until(lambda: len(recorder.failures) == 2)  # coarse and full
    assert recorder.failures[0] == ("a", "cannot be rendered")
    with pytest.raises(InputError):
        recorder.scheduler.submit("a", "bad").result(timeout=10)
    time.sleep(0.1)
    assert len(recorder.failures) <= 3
    recorder.scheduler.show("a", "view")
    wait_until(lambda: ("a", "view", Level.FULL) in recorder.delivered)


def test_long_work_steps_aside_for_a_moving_browser(recorder):
    recorder.scheduler.show("a", "steps")
    wait_until(lambda: recorder.events.count("step") > 25)  # past the time it is granted at first
    recorder.scheduler.show("b", "slow coarse")
    wait_until(lambda: ("a", "steps", Level.FULL) in recorder.delivered)
    between = recorder.events[recorder.events.index("coarse begins") : recorder.events.index("coarse ends")]
    assert between.count("step") <= 2


def test_frames_to_save_arrive_in_their_futures(recorder):
    frames = [recorder.scheduler.submit("a", name) for name in "xyz"]
    assert [f.result(timeout=10) for f in frames] == [(name, Level.SAVE) for name in "xyz"]
    assert recorder.delivered == []


# The model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def renderer(model, scene):
    renderer = SceneRenderer(model, scene)
    yield renderer
    renderer.close()


def view_of(scene: Scene, index: int) -> ViewPoint:
    camera = scene.cameras[index]
    return ViewPoint(pose_of(camera), field_inside_photo(camera, 4 / 3), 4 / 3)


def test_pictures_equal_what_the_model_renders_for_that_camera(renderer, scene, model):
    got = renderer.render(ViewRequest(view_of(scene, 0), (1, 2, 3), 64), Level.FULL, lambda: None)
    assert got.camera.size == (64, 48) and got.full and got.sources == (1, 2, 3)
    expected = model.render(scene.views([1, 2, 3]), got.camera)
    torch.testing.assert_close(got.output.rgb, expected.rgb, atol=1e-5, rtol=1e-5)
    coarse = renderer.render(ViewRequest(view_of(scene, 0), (1, 2, 3)), Level.COARSE, lambda: None)
    assert not coarse.full and coarse.output.depth.shape == coarse.support.seen.shape


def test_sources_are_encoded_once(renderer, scene, model, monkeypatch):
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda views, **options: calls.append(1) or encode(views, **options))
    for index in (0, 1, 4):
        renderer.render(ViewRequest(view_of(scene, index), (1, 2, 3), 64), Level.FULL, lambda: None)
    assert len(calls) == 1
    renderer.render(ViewRequest(view_of(scene, 0), (1, 2), 64), Level.FULL, lambda: None)
    assert len(calls) == 2


def test_encodings_are_kept_up_to_a_size_and_the_last_one_always(renderer, scene, monkeypatch):
    monkeypatch.setattr("idnerf.viewer.scene_renderer.ENCODED_PIXELS_KEPT", 5 * 64 * 48)
    for sources in ((1, 2, 3), (0, 2), (0, 1)):
        renderer.render(ViewRequest(view_of(scene, 0), sources, 64), Level.FULL, lambda: None)
    assert [key[0] for key in renderer._features] == [(0, 2), (0, 1)]
    monkeypatch.setattr("idnerf.viewer.scene_renderer.ENCODED_PIXELS_KEPT", 1)
    renderer.render(ViewRequest(view_of(scene, 0), (1, 3), 64), Level.FULL, lambda: None)
    renderer.render(ViewRequest(view_of(scene, 0), (1, 3)), Level.COARSE, lambda: None)
    assert [key[0] for key in renderer._features] == [(1, 3), (1, 3)]  # coarse and full do not drive each other out


def test_rendering_can_be_given_up_within_the_network(renderer, scene):
    request = ViewRequest(view_of(scene, 0), (1, 2, 3), 64)
    counted = []
    renderer.render(request, Level.FULL, lambda: counted.append(1))
    assert len(counted) > 30
    left = [10]

    def give_up() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Cancelled

    with pytest.raises(Cancelled):
        renderer.render(request, Level.FULL, give_up)
    assert left[0] == 0
    assert renderer.render(request, Level.FULL, lambda: None).full  # and the next one is whole


def test_closing_leaves_the_model_as_it_was(model, scene):
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    renderer = SceneRenderer(model, scene)
    renderer.close()
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


def test_resolution_follows_the_measured_speed_and_does_not_flicker():
    sides = (160, 320, 640)
    speed = Speed()
    speed.record("full", 1000, 0.01)  # 1e-5 s a pixel: 640 square takes 4.1 s, 320 1.0 s
    assert speed.side("full", 4.2, 1.0, sides) == 640
    assert speed.side("full", 2.0, 1.0, (160, 320)) == 320
    speed.record("full", 1000, 0.014)  # 20 % slower: stays
    assert speed.side("full", 4.2, 1.0, sides) == 640
    for _ in range(5):
        speed.record("full", 1000, 0.2)
    assert speed.side("full", 4.2, 1.0, sides) == 160
    for _ in range(20):
        speed.record("full", 1000, 0.001)
    assert speed.side("full", 4.2, 1.0, sides) == 640
    assert Speed().side("fast", 1e-9, 1.0, sides) == 160  # never smaller than the smallest


# Sessions: viser's client handle, played by an object that keeps what it is told -------------------------------------


class Control(SimpleNamespace):
    def __init__(self, value=None, **props):
        super().__init__(value=value, content=value, callbacks=[], **props)

    def on_update(self, callback):
        self.callbacks.append(callback)

    on_click = on_update

    def by_user(self, value) -> None:
        self.value = value
        for callback in self.callbacks:
            callback(SimpleNamespace(client="browser"))


class Gui:
    def __init__(self) -> None:
        self.controls: dict[str, Control] = {}

    @contextlib.contextmanager
    def add_folder(self, label, **_):
        yield

    def _add(self, label, value=None, **props):
        return self.controls.setdefault(label, Control(value, **props))

    def add_markdown(self, content):
        return Control(content)

    def add_dropdown(self, label, options, initial_value=None, **_):
        return self._add(label, initial_value if initial_value is not None else options[0])

    def add_checkbox(self, label, value, **_):
        return self._add(label, value)

    def add_slider(self, label, low, high, step, value, **_):
        assert low <= value <= high
        return self._add(label, value, disabled=False)

    def add_text(self, label, value, **_):
        return self._add(label, value, disabled=False)

    def add_button(self, label, **props):
        return self._add(label, False, visible=True)

    def add_progress_bar(self, value, **_):
        return Control(value, visible=False)


class Node(SimpleNamespace):
    def __init__(self, **props):
        super().__init__(visible=True, removed=False, clicks=[], **props)

    def on_click(self, callback):
        self.clicks.append(callback)

    def remove(self):
        self.removed = True


class Browser:
    """A client handle: camera (orbit controls' state), GUI, 3D scene, downloads."""

    def __init__(self, aspect: float = 4 / 3):
        self.client_id = "browser"
        self.gui = Gui()
        self.nodes: dict[str, Node] = {}
        self.backgrounds: list[np.ndarray] = []
        self.downloads: dict[str, bytes] = {}
        self.scene = SimpleNamespace(
            add_camera_frustum=lambda name, **props: self.nodes.setdefault(name, Node(**props)),
            add_line_segments=lambda name, points, colors, **props: self.nodes.setdefault(name, Node(points=points)),
            set_background_image=lambda image, **_: self.backgrounds.append(image),
        )
        self.camera = OrbitCamera(aspect)

    def atomic(self):
        return contextlib.nullcontext()

    def send_file_download(self, name, content, **_):
        self.downloads[name] = content


class OrbitCamera:
    def __init__(self, aspect: float):
        self.position, self.look_at, self.up_direction = np.zeros(3), np.array([0.0, 1.0, 0.0]), np.array([0.0, 0, 1])
        self.fov, self.aspect = 1.0, aspect
        self.callbacks = []

    @property
    def wxyz(self) -> np.ndarray:
        return quaternion_of(look_at_pose(self.position, self.look_at, self.up_direction)[:3, :3])

    def on_update(self, callback):
        self.callbacks.append(callback)

    def by_user(self, position) -> None:
        self.position = np.asarray(position, dtype=float)
        for callback in self.callbacks:
            callback(self)


class FakeScheduler(RenderScheduler):
    """Starts no threads; keeps what it is told."""

    def __init__(self) -> None:
        self.shown, self.removed = [], []

    def show(self, client, request):
        self.shown.append(request)

    def remove(self, client):
        self.removed.append(client)


@pytest.fixture
def session(scene, renderer):
    start = central_view(scene)
    return Session(
        Browser(), scene, renderer, FakeScheduler(), fit_world_frame(scene.cameras), Choices(), start, list(range(5))
    )


def shown(session: Session) -> list[ViewRequest]:
    assert isinstance(session._scheduler, FakeScheduler)
    return session._scheduler.shown


def test_the_first_view_is_a_source_photos_own(session, scene):
    start = central_view(scene)
    request = shown(session)[-1]
    np.testing.assert_allclose(request.view.c2w, pose_of(scene.cameras[start]), atol=1e-5)
    assert request.view.fov == pytest.approx(field_inside_photo(scene.cameras[start], 4 / 3))
    assert start in request.sources and len(request.sources) == 3


def test_a_window_laid_out_later_still_shows_as_much_of_the_photo_as_fits(session, scene):
    start, camera = central_view(scene), session.client.camera
    first_field = camera.fov
    camera.aspect = 1.0
    camera.by_user(camera.position)
    camera.aspect, camera.fov = 0.8, first_field  # sent before the browser heard of the new field
    camera.by_user(camera.position)
    assert shown(session)[-1].view.fov == pytest.approx(field_inside_photo(scene.cameras[start], 0.8))
    camera.fov = 0.3  # the person's own choice: kept
    camera.by_user(camera.position)
    camera.aspect = 2.0
    camera.by_user(camera.position)
    assert shown(session)[-1].view.fov == 0.3


def test_a_moving_camera_asks_once_for_every_new_place(session):
    before = len(shown(session))
    camera = session.client.camera
    camera.by_user(camera.position)
    assert len(shown(session)) == before  # an echo of what is known
    camera.by_user(camera.position + 0.1)
    camera.by_user(camera.position + 0.1)
    assert len(shown(session)) == before + 2


def test_the_toggle_changes_the_picture_and_asks_for_nothing(session):
    session.show(picture(3.0, 1.0))
    before = len(shown(session))
    controls = session.client.gui.controls
    for mode in ("Depth", "Confidence", "Colour"):
        controls["Show"].by_user(mode)
    frames = session.client.backgrounds
    assert len(frames) == 4 and len(shown(session)) == before
    assert np.array_equal(frames[0], frames[3])
    assert not np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[1], frames[2])


def test_sources_can_be_numbered_chosen_and_left_out(session, scene):
    controls = session.client.gui.controls
    controls["Number"].by_user(2)
    assert len(shown(session)[-1].sources) == 2
    controls["Nearest"].by_user(False)
    controls["Views"].by_user("4, 0 2")
    assert shown(session)[-1].sources == (4, 0, 2)
    before = len(shown(session))
    for bad, message in [("4", "at least 2"), ("a b", "view numbers"), ("1, 99", "no view 99")]:
        controls["Views"].by_user(bad)
        assert message in session.panel.status.content and len(shown(session)) == before
    controls["Nearest"].by_user(True)
    start = central_view(scene)
    controls["Leave its photo out"].by_user(True)
    assert start not in shown(session)[-1].sources


def test_photos_around_the_eye_are_hidden_and_sources_are_marked(session, scene):
    start = central_view(scene)
    nodes = session.client.nodes
    assert not nodes[f"/photos/{start}"].visible
    session.client.camera.by_user(session.client.camera.position * 4)
    assert nodes[f"/photos/{start}"].visible
    session.show(picture(3.0, 1.0))  # from views 0 and 1
    colours = [nodes[f"/photos/{i}"].color for i in range(5)]
    assert colours[0] == colours[1] != colours[2] == colours[4]
    session.client.gui.controls["Show cameras"].by_user(False)
    assert not any(node.visible for node in nodes.values())


def test_a_click_on_a_photo_goes_to_its_view(session, scene):
    session.client.nodes["/photos/4"].clicks[0](None)
    np.testing.assert_allclose(shown(session)[-1].view.c2w, pose_of(scene.cameras[4]), atol=1e-5)
    assert session.client.gui.controls["View"].value == "4"


def test_a_path_is_saved_as_a_video_of_what_is_shown(session, scene, renderer, tmp_path):
    import av

    session._scheduler = RenderScheduler(renderer.render, lambda *_: None, lambda *_: None)
    session._scheduler.add("browser")
    controls = session.client.gui.controls
    controls["Resolution"].by_user("auto")
    try:
        controls["Save MP4"].by_user(True)
        assert "at least 2 key frames" in session.path.state.content
        controls["Seconds a leg"].value = 0.1
        for index in (0, 1):
            session.go_to_view(index)
            controls["Add key frame"].by_user(True)
        line = session.client.nodes["/path/line"]
        assert len(line.points) == 12 and not line.visible  # the eye is on it
        controls["Save MP4"].by_user(True)
        wait_until(lambda: session.client.downloads, 30)
    finally:
        session._scheduler.close()
    file = Path(tmp_path / "path.mp4")
    file.write_bytes(session.client.downloads["garden.mp4"])
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 3 and frames[0].shape[1] == 64


def test_closing_a_session_stops_its_path_and_its_work(session):
    session.path.keys.extend([session.view_point(), session.view_point()])
    session.path.start(session.path.play)
    session.close()
    assert session._scheduler.removed == ["browser"]
    session.path._busy.join(timeout=5)
    assert not session.path._busy.is_alive()


# Listening --------------------------------------------------------------------------------------------------------


def test_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "", "192.168.0.4", "example.org"]))
    assert is_any_address("0.0.0.0") and is_any_address("::") and not is_any_address("10.0.0.1")
    check_address("127.0.0.1", 0)
    with pytest.raises(InputError, match="--port"):
        check_address("127.0.0.1", 70000)
    with pytest.raises(InputError, match="--host"):
        check_address("203.0.113.7", 8080)  # a documentation address: not this machine's


def test_the_command_warns_before_it_listens_elsewhere(scene, model, monkeypatch, capsys, tmp_path):
    pytest.importorskip("viser")
    from idnerf.commands import view as command
    from idnerf.viewer import server

    warned = []

    class Listening:
        port, url = 8080, "http://localhost:8080"

        def __init__(self, *arguments):
            warned.append(capsys.readouterr().err)

        def wait(self):
            raise KeyboardInterrupt

        def close(self):
            warned.append("closed")

    monkeypatch.setattr(server, "Viewer", Listening)
    weights = tmp_path / "tiny.safetensors"
    model.save(weights)
    for host, expected in [("127.0.0.1", ""), ("0.0.0.0", "no password")]:
        warned.clear()
        with pytest.raises(KeyboardInterrupt):
            command.view(scene.root, host=host, weights=str(weights))
        assert (expected in warned[0] if expected else warned[0] == "") and warned[-1] == "closed"


def test_without_viser_the_command_says_what_to_install(scene, monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(InputError, match=r"pip install '\.\[viewer\]'"):
        cli.main(["view", str(scene.root)])


def test_rays_of_a_view_are_those_of_its_photo_when_the_window_is_the_photo(scene):
    camera = scene.cameras[0]
    view = view_of(scene, 0)
    ours = image_rays(view.camera(SIZE, 1.0, 2.0)).directions
    theirs = image_rays(camera).directions
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)  # the photo's principal point is near its middle


def test_threads_end_with_the_scheduler():
    recorder = Recorder()
    recorder.scheduler.add("a")
    recorder.scheduler.show("a", "hold")
    wait_until(lambda: recorder.events == ["holding"])
    recorder.scheduler.close()
    assert recorder.cancelled == ["hold"]
    assert not any(t.is_alive() for t in recorder.scheduler._workers)
