"""The rows that learn nothing: exact on a textured plane, blind to the truth, and choosing what they say."""

import pytest
import torch

from idnerf.evaluation.references import REFERENCES, best_plane, copy_nearest, plane_sweep
from idnerf.geometry.rays import image_rays
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras, Views

SIZE = (72, 48)
FOCAL = 60.0
NEAR, FAR = 1.0, 4.0
PLANE = 40
"""Index of the sweep's plane on which the textured plane lies."""


def plane_depth(index: int = PLANE) -> float:
    return 1 / inverse_depth_planes(torch.tensor(NEAR), torch.tensor(FAR), 64)[index].item()


def cameras_at(shifts: list[float], depth: float) -> Cameras:
    """Fronto-parallel cameras, moved right so that a point at ``depth`` moves by ``shifts`` pixels."""
    c2w = torch.eye(4).repeat(len(shifts), 1, 1)
    c2w[:, 0, 3] = torch.tensor(shifts) * depth / FOCAL
    K = torch.tensor([[FOCAL, 0, SIZE[0] / 2], [0, FOCAL, SIZE[1] / 2], [0, 0, 1.0]]).repeat(len(shifts), 1, 1)
    bounds = torch.ones(len(shifts))
    return Cameras(c2w, K, SIZE, NEAR * bounds, FAR * bounds)


def texture(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Colours of a plane: waves of incommensurable lengths, so that no shift repeats the picture."""
    return torch.stack(
        [
            0.5 + 0.4 * torch.sin(11 * x + 3) * torch.cos(7 * y),
            0.5 + 0.4 * torch.sin(5.3 * x * y + 4 * x + 1),
            0.5 + 0.25 * torch.cos(17 * x - 5 * y) + 0.2 * torch.sin(2.3 * x + 9.1 * y),
        ],
        -3,
    )


def photograph(cameras: Cameras, depth: float) -> Views:
    """Exact photos of the textured plane z = ``depth``, by ray-plane intersection."""
    rays = image_rays(cameras)
    points = rays.origins + rays.directions * ((depth - rays.origins[..., 2]) / rays.directions[..., 2])[..., None]
    return Views(texture(points[..., 0], points[..., 1]), cameras)


@pytest.fixture
def plane_scene() -> tuple[Views, Views]:
    """Two sources to the left and right of a target; whole-pixel shifts make bilinear lookup exact."""
    views = photograph(cameras_at([-6.0, 5.0, 0.0], plane_depth()), plane_depth())
    return views[:2], views[2]


def test_best_plane_is_exact_on_a_textured_plane(plane_scene):
    source, target = plane_scene
    out = best_plane(source, target.cameras)
    torch.testing.assert_close(out.depth, torch.full_like(out.depth, plane_depth()))
    torch.testing.assert_close(out.rgb, target.images, atol=2e-3, rtol=0)


def test_plane_sweep_is_exact_on_a_textured_plane(plane_scene):
    source, target = plane_scene
    out = plane_sweep(source, target.cameras)
    interior = (..., slice(8, -8))
    torch.testing.assert_close(out.depth[interior], torch.full_like(out.depth, plane_depth())[interior])
    torch.testing.assert_close(out.rgb[interior], target.images[interior], atol=2e-3, rtol=0)


def test_plane_sweep_separates_two_depths_where_one_plane_cannot():
    """Two half images at two depths: the sweep finds both, a single plane blurs one of them."""
    near_depth, far_depth = plane_depth(20), plane_depth(60)
    shifts = torch.tensor([-3.0, 4.0, 0.0]) * near_depth
    near_views = photograph(cameras_at(list(shifts / near_depth), near_depth), near_depth)
    far_views = photograph(cameras_at(list(shifts / near_depth), near_depth), far_depth)
    rows = torch.arange(SIZE[1])[:, None] < SIZE[1] // 2
    views = Views(torch.where(rows, near_views.images, far_views.images), near_views.cameras)
    sweep = plane_sweep(views[:2], views.cameras[2])
    assert sweep.depth[6:18, 16:-16].median() == pytest.approx(near_depth, rel=0.02)
    assert sweep.depth[30:42, 16:-16].median() == pytest.approx(far_depth, rel=0.05)
    error = [(out.rgb - views.images[2]).abs().mean() for out in (sweep, best_plane(views[:2], views.cameras[2]))]
    assert error[0] < 0.5 * error[1]


def test_copy_returns_the_nearest_photo_untouched():
    views = photograph(cameras_at([9.0, -4.0, 7.0, 0.0], 2.0), 2.0)
    out = copy_nearest(views[:3], views.cameras[3])
    assert torch.equal(out.rgb, views.images[1])


def test_copy_resizes_to_the_target(plane_scene):
    source, target = plane_scene
    small = Cameras(target.cameras.c2w, target.cameras.K, (36, 24), target.cameras.near, target.cameras.far)
    assert copy_nearest(source, small).rgb.shape == (3, 24, 36)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_read_the_sources_bounds_and_not_the_targets(name, plane_scene):
    source, target = plane_scene
    other = target.cameras.with_bounds(torch.tensor(0.01), torch.tensor(0.02))
    expected, got = REFERENCES[name](source, target.cameras), REFERENCES[name](source, other)
    assert torch.equal(expected.rgb, got.rgb) and torch.equal(expected.depth, got.depth)


@pytest.mark.parametrize("name", ["plane", "sweep"])
def test_order_of_sources_does_not_matter(name, plane_scene):
    views = photograph(cameras_at([-6.0, 5.0, 2.5, 0.0], plane_depth()), plane_depth())
    expected = REFERENCES[name](views[[0, 1, 2]], views.cameras[3])
    got = REFERENCES[name](views[[2, 0, 1]], views.cameras[3])
    torch.testing.assert_close(expected.rgb, got.rgb, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REFERENCES)
def test_sources_that_see_nothing_still_give_finite_pictures(name):
    """Cameras that look the other way share no pixel with the target."""
    cameras = cameras_at([0.0, 1.0, 0.0], 2.0)
    c2w = cameras.c2w.clone()
    c2w[:2, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    views = photograph(cameras_at([0.0, 1.0, 0.0], 2.0), 2.0)
    source = Views(views.images[:2], Cameras(c2w, cameras.K, SIZE, cameras.near, cameras.far)[:2])
    out = REFERENCES[name](source, cameras[2])
    for tensor in (out.rgb, out.depth, out.opacity):
        assert tensor.isfinite().all()
    assert (out.depth > 0).all()
