"""PSNR and SSIM against scikit-image, masks, depth errors, colour maps, the optional LPIPS."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from idnerf.errors import InputError
from idnerf.evaluation import lpips
from idnerf.evaluation.metrics import depth_errors, depth_median_relative_error, psnr, ssim
from idnerf.rendering.colormap import colorize, colorize_depth, colorize_error


def noisy_pair(size, seed, noise=0.1):
    """A smooth picture and a noisy copy of it: SSIM is neither near 0 nor near 1."""
    generator = torch.Generator().manual_seed(seed)
    width, height = size
    u, v = torch.arange(width) / width, torch.arange(height) / height
    phase = torch.rand(3, 1, 1, generator=generator) * 6
    truth = 0.5 + 0.4 * torch.sin(9 * u + phase) * torch.cos(7 * v[:, None] + phase)
    return (truth + noise * torch.randn(3, height, width, generator=generator)).clamp(0, 1), truth


@pytest.mark.parametrize(("size", "seed"), [((7, 7), 0), ((33, 20), 1), ((64, 48), 2), ((101, 7), 3)])
@pytest.mark.parametrize("noise", [0.003, 0.1, 0.5])
def test_psnr_and_both_ssims_agree_with_scikit_image(size, seed, noise):
    prediction, truth = noisy_pair(size, seed, noise)
    p, t = prediction.double().numpy(), truth.double().numpy()
    assert psnr(prediction, truth) == pytest.approx(peak_signal_noise_ratio(t, p, data_range=1), abs=1e-5)
    for data_range in (1.0, 2.0):
        expected = structural_similarity(t, p, channel_axis=0, data_range=data_range)
        assert ssim(prediction, truth, data_range) == pytest.approx(expected, abs=1e-5)


def test_ssim_agrees_with_scikit_image_in_single_precision_on_flat_regions():
    prediction, truth = noisy_pair((40, 40), 4)
    prediction[:, 10:], truth[:, 10:] = 0.9, 0.9
    expected = structural_similarity(truth.numpy(), prediction.numpy(), channel_axis=0, data_range=1.0)
    assert ssim(prediction, truth) == pytest.approx(float(expected), abs=1e-5)


def test_range_2_flatters():
    prediction, truth = noisy_pair((64, 48), 0)
    assert ssim(prediction, truth) + 0.02 < ssim(prediction, truth, data_range=2.0) < 1


def test_equal_images_are_perfect():
    _, truth = noisy_pair((20, 20), 0)
    assert psnr(truth, truth) == math.inf
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-12)


def test_psnr_of_a_constant_error_is_analytic():
    truth = torch.zeros(3, 10, 12)
    assert psnr(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-5)


def test_masked_psnr_is_the_psnr_of_the_masked_pixels_alone():
    prediction, truth = noisy_pair((30, 24), 5)
    mask = torch.zeros(24, 30, dtype=torch.bool)
    mask[3:15, 4:20] = True
    expected = psnr(prediction[:, 3:15, 4:20], truth[:, 3:15, 4:20])
    prediction[:, ~mask] = 0
    assert psnr(prediction, truth, mask) == pytest.approx(expected, abs=1e-9)
    assert psnr(prediction, truth) < expected - 3


def test_metrics_refuse_what_they_cannot_measure():
    _, truth = noisy_pair((20, 6), 0)
    with pytest.raises(InputError, match=r"at least 7x7 pixels, got 20x6"):
        ssim(truth, truth)
    with pytest.raises(InputError, match="at least one pixel"):
        psnr(truth, truth, torch.zeros(6, 20, dtype=torch.bool))
    with pytest.raises(InputError, match="known depth"):
        depth_errors(torch.ones(2, 2), torch.zeros(2, 2), 1.0)


def test_depth_errors_count_known_pixels_in_millimetres():
    truth = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    error_mm = torch.tensor([[1.0, -1.9, 5.0, -9.0], [99.0, 99.0, 20.0, 100.0]])
    errors = depth_errors(truth + error_mm / 200, truth, unit_mm=200.0)
    assert errors["depth_error_mm"] == pytest.approx((1 + 1.9 + 5 + 9 + 20 + 100) / 6, abs=1e-3)
    assert errors["depth_within_2mm"] == pytest.approx(2 / 6)
    assert errors["depth_within_10mm"] == pytest.approx(4 / 6)


def test_median_relative_depth_error_ignores_scale_and_unknown_pixels():
    truth = torch.tensor([[2.0, 4.0, 8.0, 0.0]])
    prediction = torch.tensor([[2.2, 4.4, 80.0, 5.0]])
    for scale in (1.0, 50.0):
        error = depth_median_relative_error(prediction * scale, truth * scale)
        assert error == pytest.approx(0.1, abs=1e-5)


def test_colours_run_from_blue_to_red_and_unknown_depth_is_black():
    red, _, blue = colorize(torch.tensor([[0.1, 0.9]]))[:, 0]
    assert blue[0] > red[0] and red[1] > blue[1]
    ramp = colorize(torch.linspace(-0.5, 1.5, 101)[None])
    assert ramp.min() >= 0 and ramp.max() <= 1
    assert (ramp.diff(dim=-1).abs().amax(0) < 0.12).all()
    depth = colorize_depth(torch.tensor([[1.0, 4.0, 0.0]]), near=1.0, far=4.0)
    torch.testing.assert_close(depth[..., 0], colorize(torch.ones(1, 1))[..., 0])
    torch.testing.assert_close(depth[..., 1], colorize(torch.zeros(1, 1))[..., 0])
    assert (depth[..., 2] == 0).all()
    error = colorize_error(torch.full((3, 1, 1), 0.8), torch.full((3, 1, 1), 0.5))
    torch.testing.assert_close(error, colorize(torch.ones(1, 1)))


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5), (2, 3, 4, 5)])
def test_colour_maps_take_any_batch(shape):
    values = torch.rand(shape)
    coloured = colorize(values)
    assert coloured.shape == (*shape[:-2], 3, 4, 5)
    torch.testing.assert_close(coloured.reshape(-1, 3, 4, 5)[-1], colorize(values.reshape(-1, 4, 5)[-1]))


def test_lpips_without_its_extra_is_none(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(lpips.importlib, "import_module", missing)
    measure, reason = lpips.load_lpips()
    assert measure is None and ".[metrics]" in reason


def test_lpips_without_its_backbone_is_none_and_says_so(monkeypatch):
    class Package:
        @staticmethod
        def LPIPS(net, verbose):
            raise OSError("no network")

    monkeypatch.setattr(lpips.importlib, "import_module", lambda name: Package)
    measure, reason = lpips.load_lpips()
    assert measure is None and "backbone could not be loaded (no network)" in reason and "install" not in reason


def test_lpips_gets_its_inputs_in_minus_one_to_one(monkeypatch):
    received = []

    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            received.append(net)

        def forward(self, x, y):
            received.append((x.min().item(), x.max().item(), tuple(x.shape)))
            return (x - y).abs().mean().reshape(1, 1, 1, 1)

    class Package:
        LPIPS = Network

    monkeypatch.setattr(lpips.importlib, "import_module", lambda name: Package)
    measure, _ = lpips.load_lpips()
    assert measure is not None
    image = torch.zeros(3, 8, 8)
    image[:, 4:] = 1
    assert measure(image, torch.zeros(3, 8, 8)) == pytest.approx(1.0)
    assert received == ["vgg", (-1.0, 1.0, (1, 3, 8, 8))]


def test_scores_are_plain_floats():
    """A report serialises them without conversion."""
    prediction, truth = noisy_pair((20, 20), 0)
    assert type(psnr(prediction, truth)) is float and type(ssim(prediction, truth)) is float
