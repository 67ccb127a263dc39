"""Compositing and sampling against analytic cases and limits; tiles against the whole picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idnerf.rendering.compositing import (
    alphas_without_intervals,
    composite,
    compositing_weights,
)
from idnerf.rendering.renderer import STEP, grid_of_tiles, render_in_tiles, spans
from idnerf.rendering.sampling import depths_linear, inverse_depth_planes, sample_bins, sample_histogram
from idnerf.types import Cameras, RenderOutput


def camera(size: tuple[int, int], batch: int = 1) -> Cameras:
    K = torch.tensor([[50.0, 0, size[0] / 2], [0, 55.0, size[1] / 2], [0, 0, 1]])
    bounds = torch.ones(batch)
    return Cameras(torch.eye(4).expand(batch, 4, 4), K.expand(batch, 3, 3), size, bounds, bounds * 5)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_weights_equal_the_naive_product_and_sum_to_the_opacity(shape, generator):
    alphas = torch.rand(*shape, generator=generator)
    weights = compositing_weights(alphas)
    transmittance = torch.ones(shape[:-1])
    for i in range(shape[-1]):
        torch.testing.assert_close(weights[..., i], transmittance * alphas[..., i])
        transmittance = transmittance * (1 - alphas[..., i])
    torch.testing.assert_close(weights.sum(-1), 1 - transmittance)


def test_homogeneous_medium_follows_beer_and_lambert():
    sigma, length, samples = 0.7, 3.0, 1000
    alphas = alphas_without_intervals(torch.full((samples,), sigma * length / samples))
    opacity = compositing_weights(alphas).sum()
    torch.testing.assert_close(opacity, 1 - torch.exp(torch.tensor(-sigma * length)), atol=1e-4, rtol=0)


def test_alphas_of_tiny_density_keep_their_digits():
    sigmas = torch.tensor([1e-12, 1e-7])
    torch.testing.assert_close(alphas_without_intervals(sigmas), sigmas, rtol=1e-6, atol=0)


def test_empty_ray_is_empty_and_a_wall_hides_what_is_behind():
    assert compositing_weights(alphas_without_intervals(torch.zeros(5))).abs().max() == 0
    weights = compositing_weights(alphas_without_intervals(torch.tensor([0.0, 0.0, 1e8, 3.0, 1e8])))
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
    colours = torch.arange(15.0).reshape(5, 3)
    torch.testing.assert_close(composite(weights, colours), colours[2])


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1.0, 20.0, 100.0, 1e4, 1e30])
def test_gradients_are_finite_at_extreme_densities(sigma):
    sigmas = torch.full((2, 6), sigma, requires_grad=True)
    values = torch.arange(12.0).reshape(2, 6, 1)
    composite(compositing_weights(alphas_without_intervals(sigmas)), values).sum().backward()
    assert sigmas.grad is not None and torch.isfinite(sigmas.grad).all()


def test_inverse_depth_planes_are_bin_centres_nearest_first():
    planes = inverse_depth_planes(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), 3)
    torch.testing.assert_close(planes, torch.tensor([[0.875, 0.625, 0.375], [0.4375, 0.3125, 0.1875]]))


def test_linear_depths_include_both_ends():
    depths = depths_linear(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), 4)
    torch.testing.assert_close(depths, torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]]))


def test_uniform_histogram_returns_the_quantiles():
    quantiles = torch.linspace(0, 1, 9).expand(2, -1)
    torch.testing.assert_close(sample_histogram(torch.ones(2, 5), quantiles), quantiles, atol=1e-6, rtol=0)


def test_all_samples_of_a_single_full_bin_fall_into_it():
    probabilities = torch.zeros(1, 10)
    probabilities[0, 6] = 1
    positions = sample_histogram(probabilities, (torch.arange(8.0)[None] + 0.5) / 8)
    torch.testing.assert_close(positions, 0.6 + 0.1 * (torch.arange(8.0)[None] + 0.5) / 8, atol=1e-3, rtol=0)


def test_an_empty_histogram_counts_as_uniform():
    quantiles = torch.tensor([[0.1, 0.5, 0.9]])
    torch.testing.assert_close(sample_histogram(torch.zeros(1, 4), quantiles), quantiles, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(bins=st.integers(1, 40), rays=st.sampled_from([(), (3,), (2, 3)]), seed=st.integers(0, 1000))
def test_sampling_inverts_the_cumulative_distribution(bins, rays, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(*rays, bins, generator=generator) ** 3 + 1e-2
    quantiles = torch.rand(*rays, 17, generator=generator).sort(-1).values
    positions = sample_histogram(probabilities, quantiles)
    assert (positions.diff(dim=-1) >= -1e-6).all()
    # The cumulative distribution at the positions, by linear interpolation of its values at the bin edges.
    cdf = torch.cumsum(probabilities / probabilities.sum(-1, keepdim=True), -1)
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf], -1)
    bin_of = (positions * bins).floor().clamp(0, bins - 1).long()
    low, high = cdf.gather(-1, bin_of), cdf.gather(-1, bin_of + 1)
    torch.testing.assert_close(low + (positions * bins - bin_of) * (high - low), quantiles, atol=2e-3, rtol=0)


def test_bins_of_any_width_hold_their_weights(generator):
    edges = torch.tensor([0.0, 0.1, 0.15, 0.7, 1.0]).expand(3, -1)
    weights = torch.rand(3, 4, generator=generator) + 0.05
    quantiles = ((torch.arange(2000.0) + 0.5) / 2000).expand(3, -1)
    positions, index = sample_bins(edges, weights, quantiles)
    inside = (positions >= edges.gather(1, index)) & (positions <= edges.gather(1, index + 1))
    assert inside.all() and (positions.diff(dim=1) >= 0).all()
    shares = torch.stack([(index == k).float().mean(1) for k in range(4)], 1)
    torch.testing.assert_close(shares, weights / weights.sum(1, keepdim=True), atol=2e-3, rtol=0)
    even, _ = sample_bins(torch.linspace(0, 1, 5).expand(3, -1), weights, quantiles)
    torch.testing.assert_close(even, sample_histogram(weights, quantiles))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_positions_exist_also_for_a_histogram_that_is_not_finite(bad):
    positions = sample_histogram(torch.tensor([[0.5, bad, 0.5]]), torch.tensor([[0.2, 0.8]]))
    assert (positions >= 0).all() and (positions <= 1).all()


def test_samples_follow_the_histogram():
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]])
    positions = sample_histogram(probabilities, (torch.arange(1000.0)[None] + 0.5) / 1000)
    share = torch.histc(positions, 4, 0, 1) / 1000
    torch.testing.assert_close(share, probabilities[0], atol=2e-3, rtol=0)


def ray_colours(calls: list[tuple[int, int]]):
    """A render function that looks at each pixel's own ray only, and notes the sizes it is asked for."""

    def render(target: Cameras) -> RenderOutput:
        calls.append(target.size)
        u = torch.arange(target.width) + 0.5 - target.K[:, 0, 2, None]
        v = torch.arange(target.height) + 0.5 - target.K[:, 1, 2, None]
        x = (u / target.K[:, 0, 0, None])[:, None, :].expand(-1, target.height, -1)
        y = (v / target.K[:, 1, 1, None])[:, :, None].expand(-1, -1, target.width)
        return RenderOutput(torch.stack([x, y, x * y], 1), x + 2 * y, x - y, y)

    return render


@pytest.mark.parametrize(
    ("size", "tile_pixels", "margin"), [((97, 61), 2000, 8), ((201, 20), 1000, 4), ((50, 50), 1100, 0)]
)
def test_tiles_joined_equal_the_whole(size, tile_pixels, margin):
    target = camera(size, batch=2)
    whole = ray_colours([])(target)
    calls: list[tuple[int, int]] = []
    tiled = render_in_tiles(ray_colours(calls), target, tile_pixels=tile_pixels, margin=margin)
    assert len(calls) > 1
    assert max(width * height for width, height in calls) <= tile_pixels
    assert tiled.confidence is not None and whole.confidence is not None
    for ours, expected in [
        (tiled.rgb, whole.rgb),
        (tiled.depth, whole.depth),
        (tiled.opacity, whole.opacity),
        (tiled.confidence, whole.confidence),
    ]:
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_small_target_is_one_tile_and_missing_confidence_stays_missing():
    calls: list[tuple[int, int]] = []
    render = ray_colours(calls)

    def without_confidence(target: Cameras) -> RenderOutput:
        output = render(target)
        return RenderOutput(output.rgb, output.depth, output.opacity)

    render_in_tiles(without_confidence, camera((30, 20)), tile_pixels=600)
    assert calls == [(30, 20)]
    assert render_in_tiles(without_confidence, camera((30, 20)), tile_pixels=300, margin=4).confidence is None


@settings(deadline=None, max_examples=200)
@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    margin=st.integers(0, 40),
    surplus=st.integers(0, 300_000),
    step=st.sampled_from([STEP, 2 * STEP]),
)
def test_no_tile_exceeds_its_pixels_and_tiles_cover_the_image(width, height, margin, surplus, step):
    tile_pixels = max(9 * margin**2, (2 * margin + step) ** 2) + surplus
    columns, rows = grid_of_tiles(width, height, tile_pixels, margin, step)
    longest = []
    for length, count in [(width, columns), (height, rows)]:
        runs = spans(length, count, step)
        assert [run[0] for run in runs] == [0] + [run[1] for run in runs[:-1]]
        assert runs[-1][1] == length
        assert all(start % step == 0 and end > start for start, end in runs)
        longest.append(max(min(length, end + margin) - max(0, start - margin) for start, end in runs))
    assert longest[0] * longest[1] <= tile_pixels
