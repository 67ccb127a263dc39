"""The compiled kernels give what PyTorch gives, wherever they are used in its place."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from idnerf.compiled import dispatch
from idnerf.models.feature_pyramid import matching_map
from idnerf.models.fine_samples import FineSamples
from idnerf.models.frustum_volume import DepthDistribution, VoxelLookup
from idnerf.models.idnerf import IDNeRF
from idnerf.models.view_matching import Matching, match_views
from tiny_cases import TINY_MODELS, plane_views, waken

pytest.importorskip("numba")


@pytest.fixture
def both(monkeypatch):
    """Calls a function without and with the kernels."""

    def run(function):
        results = []
        for switched_on in (False, True):
            monkeypatch.setattr(dispatch, "available", lambda on=switched_on: on)
            with torch.no_grad():
                results.append(function())
        return results

    return run


def points(views: int, channels: int, colours: int, samples: int, pixels: int, per_pixel: bool, batch: int = 1):
    """Maps of 12x9 of photos of 24x18, and points of which some lie outside, behind or on the border."""
    generator = torch.Generator().manual_seed(views + channels)
    maps = torch.randn(batch, views, 9, 12, channels + colours, generator=generator)
    at = torch.rand(batch, views, pixels, 2, generator=generator) * torch.tensor([30.0, 22.0]) - 3
    depth = torch.rand(batch, views, pixels, 1, generator=generator) + 0.5
    depth[..., ::9, :] *= -1
    rays = torch.cat([at * depth, depth], -1)
    b = torch.randn(batch, views, 3, generator=generator) * 0.2
    inverse_depths = torch.rand(batch, samples, pixels if per_pixel else 1, generator=generator)
    return maps, (24, 18), rays, b, inverse_depths, 2


def assert_same_matching(ours: Matching, expected: Matching):
    assert torch.equal(ours.seen, expected.seen)
    for name in ("cues", "agreement", "share"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert (ours.values is None) == (expected.values is None)
    if ours.values is not None and expected.values is not None:
        torch.testing.assert_close(ours.values, expected.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize(
    ("channels", "groups", "colours", "per_pixel", "options"),
    [
        (8, 2, 0, False, {}),
        (32, 8, 0, False, {"only_similarity": True}),
        (16, 4, 3, True, {}),
        (12, 3, 3, True, {"keep_values": True}),
    ],
)
def test_matching_is_the_same(both, views, channels, groups, colours, per_pixel, options):
    inputs = points(views, channels, colours, 4, 50, per_pixel, batch=2)
    expected, ours = both(lambda: match_views(*inputs, channels, groups, **options))
    counts = expected.seen.sum(1)
    assert set(counts.unique().tolist()) == set(range(views + 1))  # every case is there
    assert_same_matching(ours, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_maps_of_one_row_or_column(both, size):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 2, *size, 4, generator=generator)
    rays = torch.rand(1, 2, 40, 3, generator=generator) * torch.tensor([12.0, 12.0, 1.0])
    inputs = (maps, (2 * size[1], 2 * size[0]), rays, torch.zeros(1, 2, 3), torch.ones(1, 1, 1), 2)
    expected, ours = both(lambda: match_views(*inputs, 4, 2, keep_values=True))
    assert_same_matching(ours, expected)


def test_points_that_are_no_numbers_stay_inside_the_maps(both):
    """A diverged network must not make a kernel read elsewhere."""
    maps, size, rays, b, inverse_depths, scale = points(2, 4, 0, 3, 20, True)
    inverse_depths[0, 0] = torch.nan
    inverse_depths[0, 1] = torch.inf
    ours = both(lambda: dispatch.match(maps, size, rays, b, inverse_depths, scale, 4, 2, keep_values=True))[1]
    assert not ours[2][0, :, :20].any()
    values = ours[3]
    assert values is not None and values.isfinite().all() and values.abs().max() <= maps.abs().max() + 1e-5


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(dispatch, "POINTS_PER_THREAD", 7)
    inputs = points(3, 12, 3, 4, 50, True)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.no_grad():
            found.append(dispatch.match(*inputs, 12, 3, keep_values=True))
            found.append((dispatch.normalize_groups(torch.linspace(0, 1, 600).sin().view(1, 10, 15, 4), 2),))
    for one, three in zip((*found[0], *found[1]), (*found[2], *found[3]), strict=True):
        assert one is not None and three is not None and torch.equal(one, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("colours", [False, True])
def test_matching_maps_are_the_same(both, dtype, colours, generator):
    features = (torch.randn(2, 12, 7, 9, generator=generator) + 3).to(dtype)
    images = torch.rand(2, 3, 7, 9, generator=generator) if colours else None
    expected, ours = both(lambda: matching_map(features, 3, images))
    assert ours.shape == (2, 7, 9, 15 if colours else 12)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("planes", "height4", "width4"), [(5, 3, 4), (1, 3, 4), (4, 1, 1)])
def test_voxels_are_the_same(both, planes, height4, width4, generator):
    logits = torch.randn(2, planes, height4, width4, generator=generator)
    features = torch.randn(2, 8, planes, height4, width4, generator=generator)
    lookup = VoxelLookup(DepthDistribution(F.log_softmax(logits, 1), features))
    size = (4 * height4, 4 * width4)
    pixels = torch.rand(*size, 2, generator=generator) * 1.2 * torch.tensor([size[1], size[0]])
    positions = torch.rand(2, 3, *size, generator=generator)
    positions[:, 0] = 0
    positions[:, 1] = 1
    expected, ours = both(lambda: lookup.at(pixels, positions))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def fine_stage(gain: float) -> FineSamples:
    torch.manual_seed(0)
    stage = FineSamples(4, 2, 8, 16)
    for parameter in stage.parameters():  # some of them start at zero
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.constant_(stage.similarity_gain, gain)
    return stage


@pytest.mark.parametrize("samples", [1, 4, 8, 12])
@pytest.mark.parametrize("gain", [2.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_composited_rays_are_the_same(both, samples, gain, dtype, generator):
    """Also with densities so large or small that exponentials leave float32."""
    stage, rays = fine_stage(gain), 30
    tokens = torch.randn(2, samples, rays, 16, generator=generator).to(dtype)
    seen = torch.rand(2, 3, samples * rays, generator=generator) > 0.3
    agreement = torch.rand(2, samples * rays, generator=generator) * 2 - 1
    values = torch.randn(2, 3, samples * rays, 7, generator=generator)
    found = Matching(torch.empty(2, samples * rays, 1), agreement, seen, values)
    positions = torch.rand(2, samples, rays, generator=generator).sort(1).values

    def composite():
        # PyTorch computes in the tokens' own precision; the kernel reads bfloat16 and computes in float32
        return stage._composite(tokens if dispatch.available() else tokens.float(), found, positions)

    expected, ours = both(composite)
    for field in fields(expected):
        result = getattr(ours, field.name)
        assert result.isfinite().all()
        torch.testing.assert_close(result, getattr(expected, field.name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("quality", ["full", "fast"])
def test_a_view_is_the_same(both, sources, quality):
    model = waken(IDNeRF(TINY_MODELS["cascade"])).eval()
    views = plane_views(sources + 1)
    target = views.cameras[:1]
    expected, ours = both(lambda: model.render_target(model.encode(views[1:][None]), target, quality=quality))
    for field in fields(expected):
        torch.testing.assert_close(getattr(ours, field.name), getattr(expected, field.name), rtol=1e-3, atol=1e-3)


def test_kernels_are_for_cpus_without_gradients():
    x = torch.zeros(3)
    assert not dispatch.usable(x)  # gradients are on
    with torch.no_grad():
        assert dispatch.usable(x)
        assert dispatch.usable(x.bfloat16())
        assert not dispatch.usable(x.double())
        assert not dispatch.usable(x, x.to("meta"))


@pytest.mark.parametrize(("value", "expected"), [("0", "False"), ("1", "True")])
def test_the_environment_switches_them_off(value, expected):
    code = "from idnerf.compiled import dispatch; print(dispatch.available())"
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, dispatch.SWITCH: value},
    )
    assert process.stdout.strip() == expected


def test_a_numba_that_cannot_be_imported_is_done_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "idnerf.compiled.kernels", None)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    with pytest.warns(UserWarning, match="cannot be used"):
        assert dispatch.available.__wrapped__() is False
