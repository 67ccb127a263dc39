"""Rays, projection and lookup: round trips, an analytic case, parity with a naive reference."""

import pytest
import torch
import torch.nn.functional as F

from idnerf.geometry.cameras import crop, invert_rigid, resize
from idnerf.geometry.precision import full_precision
from idnerf.geometry.projection import bilinear_lookup, frustum_homography, homography_rays, project, visible
from idnerf.geometry.rays import image_rays, pixel_centers, rays_at_pixels, unproject
from idnerf.types import Cameras


def random_cameras(shape: tuple[int, ...], generator: torch.Generator, size: tuple[int, int] = (40, 30)) -> Cameras:
    quaternion = torch.randn(*shape, 4, generator=generator) * torch.tensor([1.0, 0.1, 0.1, 0.1]) + torch.tensor(
        [3.0, 0, 0, 0]
    )
    w, x, y, z = F.normalize(quaternion, dim=-1).unbind(-1)
    rotation = torch.stack(
        [
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
        ],
        -1,
    ).reshape(*shape, 3, 3)  # fmt: skip
    c2w = torch.eye(4).repeat(*shape, 1, 1)
    c2w[..., :3, :3] = rotation
    c2w[..., :3, 3] = torch.randn(*shape, 3, generator=generator) * 0.2
    K = torch.tensor([[35.0, 0, 19.0], [0, 36.0, 16.0], [0, 0, 1]]).repeat(*shape, 1, 1)
    return Cameras(c2w, K, size, torch.full(shape, 1.0), torch.full(shape, 5.0))


def test_gradients_of_a_map_in_half_precision_are_summed_in_float32(generator):
    """Three thousand equal parts: in bfloat16 the sum would stop growing at 256 of them."""
    maps = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16, requires_grad=True)
    bilinear_lookup(maps, torch.full((1, 3000, 2), 0.5)).float().sum().backward()
    assert maps.grad.dtype == torch.bfloat16
    torch.testing.assert_close(maps.grad.float(), torch.full((1, 1, 1, 2), 3000.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_unproject_then_project_returns_the_pixel(shape, generator):
    cameras = random_cameras(shape, generator)
    depth = 1 + 3 * torch.rand(*shape, 30, 40, generator=generator)
    points = unproject(cameras, depth)
    pixels, z = project(points.reshape(*shape, -1, 3), cameras)
    torch.testing.assert_close(pixels, pixel_centers((40, 30)).reshape(-1, 2).expand(*shape, -1, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(z, depth.reshape(*shape, -1), atol=1e-4, rtol=1e-4)
    assert visible(pixels, z, cameras.size).all()


def test_ray_starts_at_the_camera_centre_and_the_principal_ray_is_the_optical_axis(generator):
    camera = random_cameras((), generator)
    rays = rays_at_pixels(camera, camera.K[:2, 2][None])
    torch.testing.assert_close(rays.origins[0], camera.c2w[:3, 3])
    torch.testing.assert_close(rays.directions[0], camera.c2w[:3, 2], atol=1e-5, rtol=0)
    assert rays.cos[0] == pytest.approx(1.0, abs=1e-5)


def test_point_behind_the_camera_is_not_visible(generator):
    camera = random_cameras((), generator)
    behind = camera.centers - camera.c2w[:3, 2]
    pixels, depth = project(behind[None], camera)
    assert torch.isfinite(pixels).all()
    assert not visible(pixels, depth, camera.size).any()


def test_invert_rigid_is_the_matrix_inverse(generator):
    cameras = random_cameras((2, 3), generator)
    torch.testing.assert_close(invert_rigid(cameras.c2w), torch.linalg.inv(cameras.c2w), atol=1e-5, rtol=1e-5)


def test_resized_and_cropped_cameras_see_the_same_rays(generator):
    camera = random_cameras((), generator)
    whole = image_rays(camera).directions
    window = image_rays(crop(camera, 7, 5, (10, 8))).directions
    torch.testing.assert_close(window, whole[5:13, 7:17], atol=1e-6, rtol=0)
    half = image_rays(resize(camera, (20, 15)))
    corners = rays_at_pixels(camera, pixel_centers((20, 15)).reshape(-1, 2) * 2).directions.reshape(15, 20, 3)
    torch.testing.assert_close(half.directions, corners, atol=1e-6, rtol=0)


def test_frustum_homography_equals_unproject_and_project(generator):
    target, source = random_cameras((2,), generator), random_cameras((2, 3), generator)
    depth = 1 + 3 * torch.rand(2, 30, 40, generator=generator)
    points = unproject(target, depth).reshape(2, 1, -1, 3).expand(-1, 3, -1, -1)
    expected, expected_depth = project(points, source)
    A, b = frustum_homography(target, source)
    p = pixel_centers((40, 30)).reshape(-1, 2)
    p = torch.cat([p, torch.ones(len(p), 1)], -1)
    homogeneous = (p @ A.transpose(-1, -2)) * depth.reshape(2, 1, -1, 1) + b[..., None, :]
    torch.testing.assert_close(homogeneous[..., 2], expected_depth, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(homogeneous[..., :2] / homogeneous[..., 2:], expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("size", [(9, 7), (1, 5), (6, 1)])
def test_bilinear_lookup_equals_grid_sample_values_and_gradients(size, generator):
    width, height = size
    maps = torch.randn(2, height, width, 5, generator=generator, requires_grad=True)
    positions = torch.rand(2, 50, 2, generator=generator) * torch.tensor([width + 4.0, height + 4.0]) - 2
    ours = bilinear_lookup(maps, positions)
    grid = (positions * torch.tensor([2 / width, 2 / height]) - 1)[:, None]
    theirs = F.grid_sample(maps.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)
    theirs = theirs[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(ours.shape, generator=generator)
    (ours_grad,) = torch.autograd.grad(ours, maps, upstream, retain_graph=True)
    (theirs_grad,) = torch.autograd.grad(theirs, maps, upstream)
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-5, rtol=1e-5)


def test_homography_rays_are_the_matrix_products(generator):
    A = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64)
    pixels = torch.rand(7, 2, generator=generator, dtype=torch.float64) * 100
    expected = F.pad(pixels, (0, 1), value=1.0) @ A.transpose(-1, -2)
    torch.testing.assert_close(homography_rays(A, pixels), expected)


def test_mixed_precision_leaves_the_geometry_alone(generator):
    """Under autocast a plain matrix product is rounded to 8 bits; what is marked is the same to the last bit."""
    points = torch.randn(50, 3, generator=generator) + torch.tensor([0.0, 0.0, 6.0])
    K = torch.tensor([[500.0, 0.0, 320.0], [0.0, 500.0, 256.0], [0.0, 0.0, 1.0]])
    c2w = torch.eye(4)
    c2w[:3, 3] = torch.tensor([0.1, -0.2, 0.3])
    bounds = torch.tensor(1.0), torch.tensor(9.0)
    camera = Cameras(c2w, K, (640, 512), *bounds)
    other = Cameras(torch.eye(4)[None], K[None], (640, 512), bounds[0][None], bounds[1][None])
    expected = [project(points, camera)[0], *frustum_homography(camera, other), unproject_centre(camera)]
    with torch.autocast("cpu", torch.bfloat16):
        assert (points @ K).dtype == torch.bfloat16
        assert full_precision(torch.matmul)(points, K).dtype == torch.float32
        found = [project(points, camera)[0], *frustum_homography(camera, other), unproject_centre(camera)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def unproject_centre(camera: Cameras) -> torch.Tensor:
    return rays_at_pixels(camera, torch.tensor([[320.5, 100.5]])).directions
