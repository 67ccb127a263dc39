"""Reading, resizing and writing pictures; lens formulas."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from idnerf.data.distortion import Lens, distort, pinhole_intrinsics, undistort
from idnerf.data.image_io import image_size, list_images, read_image, resize, write_png
from idnerf.data.load import load_scene
from idnerf.data.photo import checked_c2w
from idnerf.data.view_selection import spread_indices
from idnerf.errors import InputError
from scene_writers import (
    fisheye_lens,
    invert_lens,
    make_scene,
    perspective_lens,
    write_transforms,
)


def test_png_round_trip_is_exact_to_eight_bits(tmp_path, generator):
    image = torch.rand(3, 7, 9, generator=generator)
    write_png(tmp_path / "new" / "a.png", image)
    torch.testing.assert_close(read_image(tmp_path / "new" / "a.png"), image, atol=0.5 / 255 + 1e-6, rtol=0)
    write_png(tmp_path / "grey.png", image[0])
    assert (read_image(tmp_path / "grey.png").std(0) == 0).all()
    assert [p.name for p in list_images(tmp_path)] == ["grey.png"]


def test_write_png_clamps_and_leaves_no_temporary_file(tmp_path):
    write_png(tmp_path / "a.png", torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(3, 2, 2))
    assert read_image(tmp_path / "a.png")[:, 0, 0].tolist() == pytest.approx([0, 128 / 255, 1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_png(tmp_path / "file" / "b.png", torch.zeros(3, 2, 2))


def test_other_pixel_formats_become_rgb(tmp_path):
    grey = Image.fromarray(np.full((4, 5), 51, np.uint8))
    grey.save(tmp_path / "l.png")
    Image.fromarray(np.full((4, 5), 51 * 257, np.uint16)).save(tmp_path / "i16.png")
    grey.convert("P").save(tmp_path / "p.png")
    Image.merge("LA", (grey, grey)).save(tmp_path / "la.png")
    for name, value in (("l", 0.2), ("i16", 0.2), ("p", 0.2), ("la", 0.2 * 0.2 + 0.8)):
        image = read_image(tmp_path / f"{name}.png")
        assert image.shape == (3, 4, 5)
        torch.testing.assert_close(image, torch.full((3, 4, 5), value), atol=1 / 255, rtol=0)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    array = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(array).save(path, exif=exif, lossless=True)
    # Where the standard says the stored row 0 and column 0 go, as array operations.
    shown = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array),
    }[orientation]
    expected = torch.from_numpy(shown.copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(read_image(path), expected)
    assert image_size(path) == (expected.shape[2], expected.shape[1])
    assert image_size(path, orient=False) == (6, 4)
    torch.testing.assert_close(read_image(path, orient=False), torch.from_numpy(array).permute(2, 0, 1) / 255)


def write_oriented(root, truth, orientation: int) -> None:
    write_transforms(root, truth, near=1, far=9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in (root / "images").iterdir():
        Image.open(path).save(path, exif=exif)


@pytest.mark.parametrize("size", [(80, 64), (64, 64)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_calibration_made_on_the_stored_pixels_keeps_them(orientation, size, tmp_path):
    """Structure-from-motion programs ignore EXIF: so where the calibrated size fits those pixels, they were seen."""
    truth = make_scene(size=size)
    write_oriented(tmp_path, truth, orientation)
    scene = load_scene(tmp_path)
    assert scene.cameras.size == size
    torch.testing.assert_close(scene.image(0), torch.from_numpy(truth.images[0]).permute(2, 0, 1) / 255)


def test_a_calibration_that_fits_the_turned_pixels_alone_turns_them(tmp_path):
    truth = make_scene()
    write_oriented(tmp_path, truth, 6)
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"w": 64, "h": 80}))
    scene = load_scene(tmp_path)
    assert scene.cameras.size == (64, 80)
    shown = np.rot90(truth.images[0], -1).copy()
    torch.testing.assert_close(scene.image(0), torch.from_numpy(shown).permute(2, 0, 1) / 255)


def test_float_pictures_are_grey_from_0_to_1_or_refused(tmp_path):
    grey = np.linspace(-0.02, 1, 20, dtype=np.float32).reshape(4, 5)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    expected = torch.from_numpy(grey).clamp(0, 1).expand(3, 4, 5)
    torch.testing.assert_close(read_image(tmp_path / "a.tif"), expected, atol=0.51 / 255, rtol=0)
    for scale in (255, float("nan")):
        Image.fromarray(grey * np.float32(scale)).save(tmp_path / "b.tif")
        with pytest.raises(InputError, match=r"b\.tif holds floating-point values from .*; expected 0 to 1"):
            read_image(tmp_path / "b.tif")


def test_resize_keeps_constants_ramps_and_range(generator):
    assert resize(torch.full((3, 9, 12), 0.25), (5, 4)).sub(0.25).abs().max() < 1e-6
    ramp = ((torch.arange(64) + 0.5) / 64).expand(3, 8, 64)
    small = resize(ramp, (16, 8))
    expected = ((torch.arange(16) + 0.5) / 16).expand(3, 8, 16)
    assert (small - expected)[..., 2:-2].abs().max() < 1e-3  # pixel centres at +0.5: no shift
    noise = resize(torch.rand(3, 20, 20, generator=generator).round(), (33, 33))
    assert noise.min() >= 0 and noise.max() <= 1


def test_resize_is_antialiased():
    stripes = (torch.arange(64) % 2).float().expand(3, 64, 64)
    assert (resize(stripes, (16, 16)) - 0.5).abs().max() < 0.05


def test_reading_at_a_size_resizes_with_the_same_filter(tmp_path, generator):
    write_png(tmp_path / "a.png", torch.rand(3, 30, 40, generator=generator))
    expected = resize(read_image(tmp_path / "a.png"), (17, 11))
    torch.testing.assert_close(read_image(tmp_path / "a.png", (17, 11)), expected, atol=3 / 255, rtol=0)


def test_missing_picture(tmp_path):
    with pytest.raises(InputError, match=r"a\.png does not exist"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("lens", "reference"),
    [
        (Lens("perspective", (-0.1, 0.02), (0.003, -0.002)), perspective_lens(-0.1, 0.02, 0.003, -0.002)),
        (Lens("perspective", (0.3,)), perspective_lens(0.3)),
        (Lens("fisheye", (0.03, -0.01, 0.002, -0.001)), fisheye_lens(0.03, -0.01, 0.002, -0.001)),
    ],
)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_distort_equals_the_formula_and_inverts(lens, reference, shape, generator):
    points = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) - 0.5
    ours = distort(points, lens)
    x, y = reference(points[..., 0].numpy(), points[..., 1].numpy())
    np.testing.assert_allclose(ours.numpy(), np.stack([x, y], -1), atol=1e-12)
    np.testing.assert_allclose(invert_lens(ours.numpy(), reference), points.numpy(), atol=1e-9)


def test_fisheye_without_coefficients_is_equidistant():
    """A ray 45 degrees off the axis lands at radius pi / 4, and the centre stays put."""
    lens = Lens("fisheye")
    assert distort(torch.tensor([1.0, 0.0]), lens).tolist() == pytest.approx([math.pi / 4, 0])
    assert distort(torch.zeros(2), lens).tolist() == [0, 0]
    assert not lens.is_pinhole and Lens("perspective", (0.0, 0.0)).is_pinhole


def test_a_lens_that_changes_nothing_returns_the_picture(generator):
    image = torch.rand(3, 12, 16, generator=generator)
    K = torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]])
    lens = Lens("perspective", (0.0,))
    assert pinhole_intrinsics(lens, K, (16, 12)).equal(K)
    torch.testing.assert_close(undistort(image, lens, K, K), image, atol=1e-5, rtol=0)


def test_checked_c2w_mends_rounding_and_uniform_scale():
    exact = make_scene(views=3).c2w[2]
    for matrix in (exact.round(3), exact @ np.diag([2.0, 2, 2, 1]), exact[:3]):
        mended = checked_c2w(matrix, "view")
        np.testing.assert_allclose(mended[:3, :3] @ mended[:3, :3].T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(mended, exact, atol=2e-3)
    assert checked_c2w(exact, "view") == pytest.approx(exact, abs=1e-12)


def test_spread_indices_are_distinct_and_reach_the_ends():
    centers = torch.zeros(11, 3)
    centers[:, 0] = torch.arange(11)
    chosen = spread_indices(centers, 3)
    assert chosen[0] == 5 and set(chosen[1:]) == {0, 10}
    assert sorted(spread_indices(centers, 50)) == list(range(11))
