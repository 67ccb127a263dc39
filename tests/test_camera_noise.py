"""Camera errors of the training: what they move, and what they leave."""

from dataclasses import replace

import pytest
import torch

from idnerf.data.procedural.config import ProceduralConfig
from idnerf.errors import InputError
from idnerf.geometry.projection import project
from idnerf.geometry.rays import image_rays, pixel_centers
from idnerf.training.camera_noise import CameraNoiseConfig, disturb, rotation, with_shifted_lens
from idnerf.training.examples import seeded
from idnerf.training.procedural_scenes import ProceduralScenes, ProceduralScenesConfig
from tiny_cases import cameras_on_a_wall


def displacement(exact, wrong, depth: float) -> torch.Tensor:
    """Pixels [view height width 2] by which the wrong cameras see the exact ones' points of a distance elsewhere."""
    rays = image_rays(exact)
    points = (rays.origins + depth * rays.directions).flatten(1, 2)
    moved = project(points, wrong)[0].unflatten(1, (exact.height, exact.width))
    return moved - pixel_centers(exact.size)


@pytest.mark.parametrize("depth", [2.0, 50.0])
def test_a_shifted_lens_leaves_the_middle_and_bends_the_edges(depth, generator):
    cameras = cameras_on_a_wall(3, (64, 48), generator)
    shift = torch.tensor([[0.5, 0.0], [0.0, 0.5], [0.0, 0.0]])
    moved = displacement(cameras, with_shifted_lens(cameras, shift), depth)
    here = (pixel_centers((64, 48)) - cameras.K[0, :2, 2]) / cameras.K[0, [0, 1], [0, 1]]
    x, y = here.unbind(-1)
    expected = torch.stack(
        [
            -0.5 * torch.stack([x * x, x * y], -1),
            -0.5 * torch.stack([x * y, y * y], -1),
            torch.zeros(48, 64, 2),
        ]
    )
    torch.testing.assert_close(moved, expected, atol=0.01, rtol=0.05)


def test_errors_have_the_size_that_is_asked_for(generator):
    cameras = cameras_on_a_wall(400, (64, 48), generator)
    spreads = []
    for _ in range(20):
        wrong = disturb(cameras, CameraNoiseConfig(1.0, 0.0, 0.01), generator)
        near = float(cameras.near[0])
        middle = displacement(cameras, wrong, near)[:, 24, 32]
        spreads.append(middle.std().item() / 64)
    # rotation and position each move it by 0.01 widths times a number drawn from [0, 1]
    assert max(spreads) == pytest.approx(0.01 * 2**0.5, rel=0.25)
    assert min(spreads) < 0.006


def test_most_of_the_camera_stays(generator):
    cameras = cameras_on_a_wall(3, (64, 48), generator)
    wrong = disturb(cameras, CameraNoiseConfig(share=1.0), generator)
    assert torch.equal(wrong.near, cameras.near) and wrong.size == cameras.size
    turned = wrong.c2w[:, :3, :3]
    torch.testing.assert_close(turned @ turned.transpose(1, 2), torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    assert not torch.equal(turned, cameras.c2w[:, :3, :3])


def test_a_share_of_the_examples_is_wrong_and_none_of_share_0(generator):
    cameras = cameras_on_a_wall(2, (64, 48), generator)
    state = generator.get_state()
    assert disturb(cameras, CameraNoiseConfig(), generator) is cameras
    assert torch.equal(generator.get_state(), state)  # the examples are those of before
    wrong = [disturb(cameras, CameraNoiseConfig(share=0.3), generator) is not cameras for _ in range(300)]
    assert sum(wrong) / 300 == pytest.approx(0.3, abs=0.09)


def test_examples_have_wrong_source_cameras_and_nothing_else_wrong(tmp_path):
    scene = ProceduralConfig(size=(48, 32), num_views=4, complexity=(0.0, 0.1), supersample=1)
    config = ProceduralScenesConfig(scene=scene, pool=tmp_path, start_scenes=1, max_scenes=1)
    exact, wrong = (
        ProceduralScenes(replace(config, camera_noise=CameraNoiseConfig(share=share))).example(0, 2, seeded(3))
        for share in (0.0, 1.0)
    )
    assert torch.equal(exact.source.images, wrong.source.images)
    assert torch.equal(exact.target.images, wrong.target.images)
    assert torch.equal(exact.target.cameras.c2w, wrong.target.cameras.c2w)
    assert torch.equal(exact.target.cameras.near, wrong.target.cameras.near)
    assert exact.depth is not None and exact.seen is not None and wrong.depth is not None and wrong.seen is not None
    assert torch.equal(exact.depth, wrong.depth) and torch.equal(exact.seen, wrong.seen)
    for part in ("K", "c2w"):
        a, b = (getattr(example.source.cameras, part) for example in (exact, wrong))
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.1 * float(a.abs().max()), rtol=0)


def test_rotation_is_about_the_vector_s_direction():
    matrix = rotation(torch.tensor([[0.0, 0.0, torch.pi / 2]]))[0]
    torch.testing.assert_close(matrix @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


def test_bad_numbers_are_named():
    with pytest.raises(InputError, match=r"camera-noise\.share: expected a share"):
        CameraNoiseConfig(share=2.0)
    with pytest.raises(InputError, match=r"camera-noise\.lens-shift: expected 0 to 0\.1"):
        CameraNoiseConfig(lens_shift=3.0)
