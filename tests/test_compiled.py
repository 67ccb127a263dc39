"""The compiled kernels give what PyTorch gives, wherever they are used in its place."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from idnerf.compiled import dispatch, gradients
from idnerf.compiled.instance_norm import LastStep, instance_norm
from idnerf.models import gmflow
from idnerf.models.behaviour import Behaviour, PublishedBehaviour
from idnerf.models.feature_pyramid import matching_map
from idnerf.models.fine_samples import FineSamples
from idnerf.models.frustum_volume import DepthDistribution, VoxelLookup
from idnerf.models.gmflow import Backbone, PairMaps
from idnerf.models.idnerf import IDNeRF
from idnerf.models.matching import Reprojection, corner_products, lookup_colours, matching_cue, with_taps
from idnerf.models.paper import PaperConfig, PaperFeatures, Refinement, SeenSamples
from idnerf.models.radiance_field import RadianceField, fourier_features
from idnerf.models.view_aggregation import SymmetricViews
from idnerf.models.view_matching import Matching, match_views
from idnerf.training.examples import stack_examples
from idnerf.training.objectives import LossConfig, cascade_objective, paper_objective
from tiny_cases import TINY_MODELS, plane_views, rotation, tiny_example, waken, with_latent

pytest.importorskip("numba")

MATCHING = pytest.mark.parametrize(
    ("channels", "groups", "colours", "per_pixel", "options"),
    [
        (8, 2, 0, False, {}),
        (32, 8, 0, False, {"only_similarity": True}),
        (16, 4, 3, True, {}),
        (12, 3, 3, True, {"keep_values": True}),
    ],
)


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


@pytest.fixture
def taken(monkeypatch):
    """Names of the functions of ``gradients`` that were called."""
    names = set()
    for name in ("match", "match_pairs", "look_up_voxels", "normalize_groups"):

        def recording(function, name, *inputs, **options):
            names.add(name)
            return function(*inputs, **options)

        monkeypatch.setattr(gradients, name, partial(recording, getattr(gradients, name), name))
    return names


@pytest.fixture
def both_gradients(monkeypatch, taken):
    """Calls a function of one tensor without and with the kernels: (what it returns, the gradient of the tensor) each.

    The function returns tensors; their entries weigh at random.
    """

    def run(function, tensor):
        results = []
        for switched_on in (False, True):
            assert not taken
            monkeypatch.setattr(dispatch, "available", lambda on=switched_on: on)
            variable = tensor.clone().requires_grad_()
            found = function(variable)
            generator = torch.Generator().manual_seed(7)
            total = sum((x.double() * torch.randn(x.shape, generator=generator)).sum() for x in found)
            total.backward()
            results.append(([x.detach() for x in found], variable.grad))
        assert len(taken) == 1
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
@MATCHING
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


def test_threads_change_nothing_but_rounding(monkeypatch):
    shared, call = set(), dispatch.call

    def recording(kernel, inputs, outputs, first, last):
        if first:
            shared.add(kernel.__qualname__.split("_kernel")[0])
        call(kernel, inputs, outputs, first, last)

    monkeypatch.setattr(dispatch, "POINTS_PER_THREAD", 7)
    monkeypatch.setattr(dispatch, "call", recording)
    views, found = plane_views(4), []
    models = [waken(IDNeRF(config)).eval() for config in (TINY_MODELS["cascade"], with_latent("paper", "pixel"))]
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for model in models:
            with torch.no_grad():
                found.append(model.render_target(model.encode(views[1:][None]), views.cameras[:1]))
    names = {"row_sum", "unit_length", "match", "voxel", "ray", "pair", "lookup", "view_code", "token", "fourier"}
    assert shared == names | {"ray_density"}
    for one, three in ((found[0], found[2]), (found[1], found[3])):
        for field in fields(one):
            torch.testing.assert_close(getattr(three, field.name), getattr(one, field.name), rtol=1e-5, atol=1e-5)


def test_every_kernel_has_a_file_of_its_own_in_the_cache():
    """Numba keeps several in one index without a lock: two processes could be handed each other's kernel."""
    from idnerf.compiled import kernels

    sizes = [(3,), (8,)]
    made = [kernels.lookup_kernel(*size) for size in sizes] + [kernels.row_sum_kernel(4, halves) for halves in (0, 1)]
    assert len({kernel.__qualname__ for kernel in made}) == 4
    assert kernels.lookup_kernel(3) is made[0]


def test_a_cache_that_cannot_be_used_is_done_without(monkeypatch):
    from idnerf.compiled import kernels

    def full(*arguments):
        raise OSError("no space left on device")

    class Kept:
        class stats:
            cache_path = "somewhere"

        __call__ = full

    def compiling(cache=False, **options):
        return (lambda function: Kept()) if cache else (lambda function: function)

    def kernel(number, out):
        out.append(number)

    monkeypatch.setattr(kernels, "njit", compiling)
    call, out = kernels._kept(kernel), []
    with pytest.warns(UserWarning, match="somewhere is not usable: no space left"):
        call(1, out)
    call(2, out)
    assert out == [1, 2]


def test_what_is_no_number_stays_none():
    """A diverged network must show, in the cascade and in the paper's field."""
    stage = fine_stage(1.0)
    field = waken(RadianceField(7, hidden=16, layers=3, skip=1, ray_width=8, ray_heads=2))
    with torch.no_grad():
        stage.density[0].weight[0, 0] = torch.nan
        field.density[0].weight[0, 0] = torch.nan
        tokens, seen = torch.zeros(1, 4, 5, 16), torch.ones(1, 2, 20, dtype=torch.bool)
        found = Matching(torch.empty(1, 20, 1), torch.zeros(1, 20), seen, torch.zeros(1, 2, 20, 7))
        rays = stage._composite(tokens, found, torch.rand(1, 4, 5))
        raw = field(torch.zeros(2, 4, 3), torch.zeros(2, 3), torch.zeros(2, 4, 7))
    assert rays.tokens.isnan().all()
    assert any(part.isnan().any() for part in raw)


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
    size = (4 * height4, 4 * width4)
    lookup = VoxelLookup(DepthDistribution(F.log_softmax(logits, 1), features), size[0])
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


def reprojected(views: int, published: bool, batch: int = 2, count: int = 60) -> tuple[Behaviour, Reprojection]:
    """Points in views of 48x32, of which some lie outside, behind or on the border."""
    generator = torch.Generator().manual_seed(views)
    behaviour = PublishedBehaviour() if published else Behaviour()
    pixels = torch.rand(batch, views, count, 2, generator=generator) * torch.tensor([60.0, 42.0]) - 6
    pixels[:, :, ::7] = pixels[:, :, ::7].round()
    pixels[:, :, -1] = torch.tensor([1e6, -1e6])
    depth = torch.rand(batch, views, count, generator=generator) - 0.2
    return behaviour, Reprojection(pixels, behaviour.visible(pixels, depth, (48, 32)))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("views", "channels", "groups"), [(2, 16, (2, 4)), (3, 24, (3, 1)), (5, 32, (1, 16))])
def test_similarities_of_pairs_are_the_same(both, views, channels, groups, published, generator):
    behaviour, reprojection = reprojected(views, published)
    pairs = views * (views - 1) // 2
    coarse = torch.randn(2, pairs, 2, 4, 6, channels, generator=generator)
    coarse[:, :, :, :2, :3, : channels // 2] = 0  # whole groups are zero
    fine = torch.randn(2, pairs, 2, 8, 12, channels, generator=generator)
    maps = PairMaps(coarse, fine, (48, 32))
    expected, ours = both(lambda: matching_cue(maps, reprojection, groups, behaviour))
    assert set(reprojection.visible.sum(1).unique().tolist()) == set(range(views + 1))  # every case is there
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    coarse_products, fine_products = map(corner_products, maps.scales, groups)
    maps = replace(maps, products=(coarse_products, fine_products))
    by_products = both(lambda: matching_cue(maps, reprojection, groups, behaviour))[0]
    torch.testing.assert_close(ours, by_products, rtol=1e-3, atol=1e-3)  # lengths from products of cells cancel


def test_pairs_at_points_that_are_no_numbers_stay_inside_the_maps(generator):
    maps = torch.randn(1, 1, 2, 4, 6, 8, generator=generator)
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3.0])
    positions = torch.cartesian_prod(numbers, numbers).expand(1, 2, -1, -1)
    with torch.no_grad():
        ours = dispatch.match_pairs(maps, positions, torch.ones(1, 1, 36), 2)
        colours = dispatch.look_up(torch.rand(2, 4, 6, 3, generator=generator), positions[0])
    assert ours.isfinite().all() and ours.abs().max() <= 1 + 1e-5
    assert colours.isfinite().all() and colours.min() >= 0 and colours.max() <= 1 + 1e-6


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 1), (1, 4), (6, 4)])
def test_colours_and_pairs_in_maps_of_any_size(both, width, height, generator):
    images = torch.rand(2, 2, height, width, 3, generator=generator)
    pixels = torch.rand(2, 2, 40, 2, generator=generator) * torch.tensor([width + 2.0, height + 2.0]) - 1
    expected, ours = both(lambda: lookup_colours(images, pixels))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    maps = torch.randn(2, 1, 2, height, width, 8, generator=generator)
    maps = PairMaps(maps, maps, (8 * width, 8 * height))
    found = Reprojection(pixels * 8, torch.ones(2, 2, 40, dtype=torch.bool))
    expected, ours = both(lambda: matching_cue(maps, found, (2, 4), Behaviour()))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", [2, 3, 5])
def test_aggregated_views_are_the_same(both, views, generator):
    aggregation = waken(SymmetricViews())
    _, reprojection = reprojected(views, published=False)
    colours = torch.rand(2, views, 60, 3, generator=generator)
    points, centers = torch.randn(2, 60, 3, generator=generator), torch.randn(2, views, 3, generator=generator)
    directions = F.normalize(torch.randn(2, 15, 3, generator=generator), dim=-1)  # of four samples each
    turned = torch.stack([rotation(0.3, 0.2), rotation(-0.1, 2.0)])
    inputs = (colours, reprojection.visible, points, centers, directions, turned)
    expected, ours = both(lambda: aggregation.along_rays(*inputs))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", [2, 3, 5])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("query", ["none", "pixel"])
def test_refined_views_are_the_same(both, views, published, query, generator):
    aggregation = "concatenate" if published else "symmetric"
    config = PaperConfig(view_refinement=True, latent_query=query, view_aggregation=aggregation, num_views=views)
    refinement = waken(Refinement(config))
    behaviour, reprojection = reprojected(views, published)
    coarse, fine = (torch.randn(2, views, *size, 8, generator=generator) for size in ((4, 6), (8, 12)))
    maps = PairMaps(torch.zeros(2, 1, 2, 4, 6, 8), torch.zeros(2, 1, 2, 8, 12, 8), (48, 32))
    features = PaperFeatures(maps, torch.empty(2, views, 32, 48, 3), plane_views(1).cameras, (coarse, fine))
    colours = torch.rand(2, views, 60, 3, generator=generator)
    latent = None if query == "none" else torch.randn(2, 15, 8, generator=generator)

    def refine():
        where = with_taps(reprojection, maps, behaviour)
        tokens = refinement.look_up(features, where, behaviour)
        return refinement(features, SeenSamples(where, colours, torch.empty(2, 60, 0), tokens), latent, behaviour)

    expected, ours = both(refine)
    assert ours.shape == (2, 60, refinement.width)
    # where no view sees the point and no latent answers, PyTorch rounds scores to 1e-3
    tolerance = 1e-3 if query == "none" else 1e-4
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("samples", [1, 12, 16])
@pytest.mark.parametrize("masked", ["asking", "answering", "neither"])
def test_a_field_is_the_same(both, samples, masked, generator):
    """Also far from the origin, where sines take angles as PyTorch does, and for rays that nothing answers on."""
    field = waken(RadianceField(7, hidden=16, layers=3, skip=1, ray_width=8, ray_heads=2))
    positions = torch.randn(9, samples, 3, generator=generator)
    positions[0] *= 1e4
    directions = F.normalize(torch.randn(9, 3, generator=generator), dim=-1)
    condition = torch.randn(9, samples, 7, generator=generator)
    mask = torch.rand(9, samples, generator=generator) > 0.4
    mask[3], mask[4] = False, True
    masks = {"asking": (mask, None), "answering": (None, mask), "neither": (None, None)}[masked]
    expected, ours = both(lambda: field(positions, directions, condition, *masks))
    for result, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 15.9, 16.1, 1e3, 1e6])
def test_encoded_positions_are_the_same(both, size, generator):
    positions = torch.cat([torch.rand(400, 3, generator=generator) * 2 - 1, torch.ones(1, 3)]) * size
    expected, ours = both(lambda: fourier_features(positions, 10))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("query", ["none", "global", "pixel"])
def test_a_view_of_the_paper_configuration_is_the_same(both, sources, query, published):
    config = with_latent("paper", query)
    if published:
        paper = replace(config.paper, view_aggregation="concatenate", num_views=sources, published_behaviour=True)
        config = replace(config, paper=paper)
    model = waken(IDNeRF(config)).eval()
    views = plane_views(sources + 1)
    target = views.cameras[:1]
    expected, ours = both(lambda: model.render_target(model.encode(views[1:][None]), target))
    for field in fields(expected):
        torch.testing.assert_close(getattr(ours, field.name), getattr(expected, field.name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("quality", ["full", "fast"])
def test_a_view_is_the_same(both, sources, quality):
    model = waken(IDNeRF(TINY_MODELS["cascade"])).eval()
    views = plane_views(sources + 1)
    target = views.cameras[:1]
    expected, ours = both(lambda: model.render_target(model.encode(views[1:][None]), target, quality=quality))
    for field in fields(expected):
        torch.testing.assert_close(getattr(ours, field.name), getattr(expected, field.name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("views", [2, 3, 5])
@MATCHING
def test_gradients_of_matching_are_the_same(both_gradients, views, channels, groups, colours, per_pixel, options):
    maps, *where = points(views, channels, colours, 4, 50, per_pixel, batch=2)

    def match(maps):
        found = match_views(maps, *where, channels, groups, **options)
        return [found.cues, found.agreement] + ([] if found.values is None else [found.values[..., :channels]])

    (expected, of_maps), (ours, of_our_maps) = both_gradients(match, maps)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert of_maps.abs().max() > 1 and not of_our_maps[..., channels:].any()
    torch.testing.assert_close(of_our_maps, of_maps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_gradients_of_maps_of_one_row_or_column(both_gradients, size):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 2, *size, 4, generator=generator)
    rays = torch.rand(1, 2, 40, 3, generator=generator) * torch.tensor([12.0, 12.0, 1.0])
    where = ((2 * size[1], 2 * size[0]), rays, torch.zeros(1, 2, 3), torch.ones(1, 1, 1), 2)
    (_, expected), (_, ours) = both_gradients(lambda maps: [match_views(maps, *where, 4, 2).cues], maps)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradients_at_points_that_are_no_numbers_stay_inside_the_maps():
    maps, size, rays, b, inverse_depths, scale = points(2, 4, 0, 3, 20, True)
    inverse_depths[0, 0] = torch.nan
    inverse_depths[0, 1] = torch.inf
    maps.requires_grad_()
    found = gradients.match(maps, size, rays, b, inverse_depths, scale, 4, 2, keep_values=True)
    (found[0].sum() + found[3].sum()).backward()
    assert maps.grad is not None and maps.grad.isfinite().all()


def test_equally_similar_pairs_share_the_gradient_of_the_best(generator):
    maps = torch.randn(1, 1, 1, 1, 4, generator=generator).expand(1, 3, 1, 1, 4).clone().requires_grad_()
    rays, origins = torch.ones(1, 3, 1, 3), torch.zeros(1, 3, 3)
    found = match_views(maps, (4, 4), rays, origins, torch.ones(1, 1, 1), 4, 4, 1)
    assert found.seen.all()
    found.cues[..., 1].sum().backward()  # as the mean's, which pairs share too
    torch.testing.assert_close(maps.grad, 2 / 3 * maps.detach())


def test_gradients_in_chunks_and_threads_are_the_same(monkeypatch):
    """Bit for bit: no two threads add to one cell."""
    maps, *where = points(3, 8, 0, 4, 50, False)
    found = []
    for chunk, threads in ((10**6, 1), (70, 1), (70, 3)):
        monkeypatch.setattr(gradients, "POINTS_PER_CHUNK", chunk)
        monkeypatch.setattr(dispatch, "POINTS_PER_THREAD", 7)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        variable = maps.clone().requires_grad_()
        gradients.match(variable, *where, 8, 2)[0].square().sum().backward()
        found.append(variable.grad)
    assert found[0].any() and all(torch.equal(x, found[0]) for x in found[1:])


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("views", "channels", "groups"), [(2, 16, 4), (3, 24, 1), (5, 32, 16)])
def test_gradients_of_pairs_are_the_same(both_gradients, views, channels, groups, published, generator):
    behaviour, reprojection = reprojected(views, published)
    maps = torch.randn(2, views * (views - 1) // 2, 2, 8, 12, channels, generator=generator)
    maps[:, 0, :, :3, :4, : channels // groups] = 0  # a group is zero in both views at some points

    def match(maps):
        return [matching_cue(PairMaps(maps, maps, (48, 32)), reprojection, (groups, groups), behaviour)]

    ((expected,), of_maps), ((ours,), of_our_maps) = both_gradients(match, maps)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert of_maps.abs().max() > 0.1
    torch.testing.assert_close(of_our_maps, of_maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_gradients_of_pairs_in_maps_of_one_row_or_column(both_gradients, size, generator):
    maps = torch.randn(1, 1, 2, *size, 8, generator=generator)
    pixels = torch.rand(1, 2, 40, 2, generator=generator) * 60 - 10
    found = Reprojection(pixels, torch.ones(1, 2, 40, dtype=torch.bool))
    padded = (8 * size[1], 8 * size[0])
    (_, expected), (_, ours) = both_gradients(
        lambda maps: [matching_cue(PairMaps(maps, maps, padded), found, (2, 4), Behaviour())], maps
    )
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_gradients_of_pairs_that_are_no_numbers_show_and_stay_inside_the_maps(monkeypatch, generator):
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3.0])
    positions = torch.cartesian_prod(numbers, numbers).expand(1, 3, -1, -1).contiguous()
    maps = torch.randn(1, 3, 2, 4, 6, 8, generator=generator)
    found = []
    for threads in (1, 3):  # pairs are divided among them
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        variable = maps.clone().requires_grad_()
        gradients.match_pairs(variable, positions, torch.ones(1, 3, 36), 2).square().sum().backward()
        found.append(variable.grad)
    assert found[0].isfinite().all() and found[0].any() and torch.equal(*found)
    maps[0, 1, 0, 0, 0, 0] = torch.nan
    variable = maps.requires_grad_()
    gradients.match_pairs(variable, positions, torch.ones(1, 3, 36), 2).sum().backward()
    assert variable.grad is not None and variable.grad.isnan().any() and variable.grad[0, 0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("colours", [False, True])
def test_gradients_of_matching_maps_are_the_same(both_gradients, dtype, colours, generator):
    features = (torch.randn(2, 12, 7, 9, generator=generator) + 3).to(dtype)
    images = torch.rand(2, 3, 7, 9, generator=generator) if colours else None
    (_, expected), (_, ours) = both_gradients(lambda x: [matching_map(x, 3, images)], features)
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("planes", "height4", "width4"), [(5, 3, 4), (1, 3, 4), (4, 1, 1)])
def test_gradients_of_voxels_are_the_same(both_gradients, planes, height4, width4, generator):
    features = torch.randn(2, 8, planes, height4, width4, generator=generator)
    logits = torch.randn(2, planes, height4, width4, generator=generator)
    size = (4 * height4, 4 * width4)
    pixels = torch.rand(*size, 2, generator=generator) * 1.2 * torch.tensor([size[1], size[0]])
    positions = torch.rand(2, 3, *size, generator=generator)
    positions[:, 0] = 0
    positions[:, 1] = 1

    def look_up(features):
        return [VoxelLookup(DepthDistribution(F.log_softmax(logits, 1), features), size[0]).at(pixels, positions)]

    (_, expected), (_, ours) = both_gradients(look_up, features)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quality", "halves"), [("full", False), ("fast", False), ("full", True)])
def test_a_training_step_has_the_same_gradients(monkeypatch, taken, quality, halves):
    found = []
    for switched_on in (False, True):
        assert not taken
        monkeypatch.setattr(dispatch, "available", lambda on=switched_on: on)
        torch.manual_seed(0)
        model = waken(IDNeRF(TINY_MODELS["cascade"]))
        generator = torch.Generator().manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            result = cascade_objective(model.core, stack_examples([tiny_example()]), LossConfig(), generator, quality)
        result.loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, ours = found
    assert expected.keys() == ours.keys() and len(taken) == 3
    if halves:  # features round differently, and samples move with them: alike in direction
        ours, expected = (torch.cat([g.flatten() for g in of.values()]) for of in (ours, expected))
        assert F.cosine_similarity(ours, expected, dim=0) > 0.99
        return
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", ["matchnerf", "idnerf"])
def test_a_training_step_of_the_paper_configuration_has_the_same_gradients(monkeypatch, taken, name, published):
    config = TINY_MODELS["paper"] if name == "matchnerf" else with_latent("paper", "pixel")
    aggregation = "concatenate" if published else "symmetric"
    paper = replace(config.paper, published_behaviour=published, view_aggregation=aggregation, num_views=3)
    example = stack_examples([tiny_example()])
    found = []
    for switched_on in (False, True):
        assert not taken
        monkeypatch.setattr(dispatch, "available", lambda on=switched_on: on)
        torch.manual_seed(0)
        model = waken(IDNeRF(replace(config, paper=paper)))
        generator = torch.Generator().manual_seed(3)
        paper_objective(model.core, example, LossConfig(), generator, 64).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, ours = found
    assert expected.keys() == ours.keys() and taken == {"match_pairs"}
    # sums of convolutions in another layout, normalised again and again
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * largest)


def test_kernels_are_for_cpus():
    x = torch.zeros(3)
    assert not dispatch.usable(x)  # gradients are on
    assert gradients.chosen(x) is gradients.chosen(x, features=x.bfloat16()) is gradients
    for unfit in (x.double(), x.bfloat16(), x.to("meta")):
        assert gradients.chosen(x, unfit) is None
    assert gradients.chosen(x, features=x.to("meta")) is gradients.chosen(x, features=x.double()) is None
    with torch.no_grad():
        assert gradients.chosen(x) is dispatch and gradients.chosen(x.double()) is None
        assert dispatch.usable(x)
        assert not dispatch.usable(x.bfloat16())
        assert dispatch.usable(x, features=x.bfloat16()) and not dispatch.usable(x, features=x.double())
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


def published_norm(maps: torch.Tensor, last_step: LastStep, other: torch.Tensor) -> torch.Tensor:
    maps = F.instance_norm(maps)
    if last_step == "none":
        return maps
    return F.relu(maps) if last_step == "relu" else F.relu(other + F.relu(maps))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [(2, 16, 90, 101), (1, 3, 1, 5), (3, 7, 6, 1)])
@pytest.mark.parametrize("last_step", ["none", "relu", "residual"])
def test_instance_norm_and_its_gradients_are_those_of_float64(last_step, size, threads, monkeypatch, generator):
    """Also for channels whose mean is 1,000 times their spread, and for one that is even."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    maps, other, weights = torch.randn(3, *size, generator=generator)
    maps[:, 0] += 1000
    maps[:, 1] = 3
    results = []
    for dtype, function in ((torch.float64, published_norm), (torch.float32, instance_norm)):
        inputs = [x.to(dtype).requires_grad_() for x in (maps, other)]
        found = function(inputs[0], last_step, inputs[1] if last_step == "residual" or dtype == torch.float64 else None)
        found.backward(weights.to(dtype))
        results.append([found.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)])
    for name, expected, ours in zip(("value", "maps", "other"), *results, strict=True):
        far = (ours.double()[:, :1] - expected[:, :1]).abs() > 2e-3 * max(1.0, float(expected.abs().max()))
        assert far.double().mean() < 1e-3, name  # 1,000 has steps of 6e-5: here and there on ReLU's other side
        rest = (ours[:, 2:].double(), expected[:, 2:])
        torch.testing.assert_close(*rest, atol=2e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    even = results[1][0][:, 1]
    torch.testing.assert_close(even, F.relu(other[:, 1]) if last_step == "residual" else torch.zeros_like(even))


def test_instance_norm_shows_what_is_no_number(generator):
    maps, other = torch.randn(2, 1, 4, 6, 8, generator=generator)
    maps[0, 2, 3, 3] = torch.nan
    other[0, 1, 2, 2] = torch.nan
    for last_step in ("relu", "residual"):
        results = []
        for function in (published_norm, instance_norm):
            inputs = [x.clone().requires_grad_() for x in (maps, other)]
            with_other = last_step == "residual" or function is published_norm
            found = function(inputs[0], last_step, inputs[1] if with_other else None)
            found.square().sum().backward()
            results.append([found, *(x.grad for x in inputs if x.grad is not None)])
        for expected, ours in zip(*results, strict=True):
            assert ours.isnan().any() and torch.equal(ours.isnan(), expected.isnan())


def test_the_backbone_trains_alike_without_kernels(monkeypatch, generator):
    torch.manual_seed(0)
    backbone, images = Backbone(16, (8, 12, 16)), torch.rand(3, 3, 48, 64, generator=generator)
    found, taken = [], []
    monkeypatch.setattr(gmflow, "instance_norm", lambda *inputs: taken.append(1) or instance_norm(*inputs))
    for switched_on in (False, True):
        assert not taken
        monkeypatch.setattr(dispatch, "available", lambda on=switched_on: on)
        backbone.zero_grad()
        backbone(images).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in backbone.named_parameters()})
    assert len(taken) >= 15  # the stem's, two in each of six blocks and two shortcuts'
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5 * largest, rtol=1e-3)
