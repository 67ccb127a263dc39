"""The cascade: parity with naive references, invariances, geometry on an exact plane, gradients, weights on disk."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from idnerf.checkpoint import read_tensors, write_tensors
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.geometry.cameras import crop, halve, resize
from idnerf.geometry.precision import has_fast_bfloat16
from idnerf.geometry.rays import image_rays, pixel_centers, unproject
from idnerf.models import fine_samples, frustum_volume, fused_convolution, middle_stage
from idnerf.models.cascade import Cascade, CascadeConfig, Quality
from idnerf.models.feature_pyramid import PyramidFeatures, ResidualBlock, normalize_groups
from idnerf.models.feature_pyramid import halve as halve_photos
from idnerf.models.fine_samples import (
    FineOutput,
    FineSamples,
    SampleAttention,
    closed_ray_weights,
    composite_along_ray,
)
from idnerf.models.frustum_volume import MIRRORED_AXES, DepthDistribution, FrustumVolume, VoxelLookup, mirrored
from idnerf.models.idnerf import IDNeRF, ModelConfig, config_from_json, config_to_json
from idnerf.models.image_refinement import confidence_of
from idnerf.models.middle_stage import MiddleOutput, MiddleStage
from idnerf.models.plane_conv import PlaneConv, conv3d_by_planes, onednn_takes
from idnerf.models.view_blending import ContextBlending, ViewBlending, ray_angles
from idnerf.models.view_matching import masked_mean, masked_mean_and_variance, pair_similarity
from idnerf.rendering.renderer import render_in_tiles
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.training.examples import seeded, stack_examples
from idnerf.training.objectives import LossConfig, cascade_objective
from idnerf.training.procedural_scenes import draw_example
from idnerf.types import Cameras, RenderOutput, Views
from tiny_cases import (
    TINY_CASCADE,
    TINY_MODELS,
    cameras_on_a_wall,
    plane_views,
    rotation,
    tiny_example,
    waken,
    with_latent,
)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    """A tiny network whose every branch speaks; not to be changed."""
    torch.manual_seed(0)
    return waken(Cascade(TINY_CASCADE)).eval()


def render(cascade: Cascade, source: Views, target: Cameras) -> RenderOutput:
    with torch.no_grad():
        return cascade.render_tile(cascade.encode(source), target)


def assert_same_picture(a: RenderOutput, b: RenderOutput, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.rgb, b.rgb, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.depth, b.depth, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(a.opacity, b.opacity, atol=tolerance, rtol=0)
    torch.testing.assert_close(a.confidence, b.confidence, atol=tolerance, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 9), (6, 4, 8), (2, 3, 1)])
def test_convolution_by_planes_equals_conv3d_values_and_gradients(stride, size, generator):
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = conv3d_by_planes(x, weight, bias, stride)
    theirs = F.conv3d(x, weight, bias, stride=stride, padding=1)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight, bias), upstream),
        torch.autograd.grad(theirs, (x, weight, bias), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not onednn_takes(torch.float32), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_residual_block_without_gradient_is_fused_and_the_same(dimensions, halves, monkeypatch, generator):
    if halves and not onednn_takes(torch.bfloat16):
        pytest.skip("no bfloat16 on this CPU")
    torch.manual_seed(0)
    block = waken(ResidualBlock(16, dimensions))
    size = (2, 16, 5, 12, 10)[: dimensions + 2]
    layout = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    x = torch.randn(size, generator=generator).contiguous(memory_format=layout)
    x = x.bfloat16() if halves else x
    calls = []
    given = fused_convolution._given

    def recording(*inputs):
        calls.append(given(*inputs) is not None)
        return given(*inputs)

    monkeypatch.setattr(fused_convolution, "_given", recording)
    tolerance = {"atol": 0.05, "rtol": 0.02} if halves else {"atol": 1e-5, "rtol": 1e-5}
    with torch.autocast("cpu", torch.bfloat16, enabled=halves):
        expected = block(x).detach()
        assert calls == [False, False]
        calls.clear()
        with torch.no_grad():
            fused = block(x)
            assert calls == [True, True]
            assert fused.dtype == expected.dtype == x.dtype
            torch.testing.assert_close(fused, expected, **tolerance)
            wide = block(x.float())  # the sum stays in float32
            assert wide.dtype == torch.float32
            torch.testing.assert_close(wide, expected.float(), **tolerance)
            torch.testing.assert_close(block(x.contiguous()), expected, **tolerance)


@pytest.mark.skipif(not onednn_takes(torch.float32), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 9), (6, 4, 8), (2, 3, 1)])
def test_convolution_without_gradient_equals_that_with(stride, size, generator):
    conv = PlaneConv(3, 4, stride)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = torch.randn(2, 3, *size, generator=generator).contiguous(memory_format=layout)
        with torch.no_grad():
            without = conv(x)
        assert without.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(without, conv(x).detach(), atol=1e-5, rtol=1e-5)


def test_convolution_without_gradient_keeps_other_precisions(generator):
    """Double precision and autocast on any CPU: what oneDNN cannot take goes the other way."""
    conv, x = PlaneConv(3, 4), torch.randn(1, 3, 4, 5, 6, generator=generator)
    with torch.no_grad():
        expected = conv(x)
        double = PlaneConv(3, 4).double()
        double.load_state_dict(conv.state_dict())
        torch.testing.assert_close(double(x.double()).float(), expected, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            rough = conv(x)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), expected, atol=0.05, rtol=0.05)


def test_plane_conv_holds_the_parameters_of_conv3d(generator):
    ours, theirs = PlaneConv(2, 3, stride=2), torch.nn.Conv3d(2, 3, 3, stride=2, padding=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, 5, 6, 7, generator=generator)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_closed_ray_sums_to_one_and_keeps_the_open_opacity(generator):
    sigmas = torch.rand(5, 6, generator=generator) * 3
    weights, opacity = closed_ray_weights(sigmas)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    torch.testing.assert_close(opacity, 1 - torch.exp(-sigmas.sum(-1)))
    weights, opacity = closed_ray_weights(torch.zeros(2, 4))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0, 0, 1]]).expand(2, -1))
    assert (opacity == 0).all()


def naive_similarity(features: torch.Tensor, visible: torch.Tensor, groups: int) -> torch.Tensor:
    """Mean and maximum over the pairs that both see the point, one point at a time; zeros where there is none."""
    batch, views, points, channels = features.shape
    out = torch.zeros(batch, points, 2 * groups)
    split = features.reshape(batch, views, points, groups, channels // groups)
    for b in range(batch):
        for p in range(points):
            pairs = [
                (split[b, i, p] * split[b, j, p]).sum(-1)
                for i in range(views)
                for j in range(i + 1, views)
                if visible[b, i, p] and visible[b, j, p]
            ]
            if pairs:
                out[b, p, :groups] = torch.stack(pairs).mean(0)
                out[b, p, groups:] = torch.stack(pairs).amax(0)
    return out


@pytest.mark.parametrize(("views", "share"), [(2, 1.0), (3, 1.0), (4, 1.0), (2, 0.6), (4, 0.6)])
def test_pair_similarity_equals_the_naive_loop(views, share, generator):
    features = torch.randn(2, views, 40, 6, generator=generator)
    visible = torch.rand(2, views, 40, generator=generator) < share
    torch.testing.assert_close(pair_similarity(features, visible, 2), naive_similarity(features, visible, 2))


def test_mean_and_variance_are_those_of_the_views_that_see(generator):
    values = torch.randn(1, 4, 3, 5, generator=generator)
    visible = torch.tensor([[[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]]]).bool()
    mean, variance = masked_mean_and_variance(values, visible)
    torch.testing.assert_close(mean[0, 0], values[0, :, 0].mean(0))
    torch.testing.assert_close(mean[0, 1], values[0, [0, 2], 1].mean(0))
    torch.testing.assert_close(variance[0, 1], values[0, [0, 2], 1].var(0, correction=0))
    torch.testing.assert_close(mean[0, 2], values[0, :, 2].mean(0))


def test_bands_without_gradient_equal_the_whole_with_gradient(cascade, monkeypatch):
    example = tiny_example(size=(37, 50))
    source, target = example.source[None], example.target.cameras[None]
    whole = cascade(cascade.encode(source), target).render
    assert whole.rgb.requires_grad
    # 4 samples x 48 pixels: bands of 4 and of 7 rows; 3 planes a chunk
    for points in (4 * 48 * 4, 4 * 48 * 7):
        monkeypatch.setattr(fine_samples, "POINTS_PER_BAND", points)
        monkeypatch.setattr(frustum_volume, "PLANES_PER_CHUNK", 3)
        monkeypatch.setattr(middle_stage, "HYPOTHESES_PER_CHUNK", 3)
        with torch.no_grad():
            banded = cascade(cascade.encode(source), target).render
        assert_same_picture(banded, whole.map(torch.Tensor.detach), 3e-5)


@pytest.mark.parametrize("quality", ["full", "fast"])
@pytest.mark.parametrize("views", [2, 3, 4, 5])
def test_any_number_of_views(cascade, views, quality):
    example = tiny_example(num_sources=views)
    with torch.no_grad():
        features = cascade.encode(example.source[None])
        output = cascade.render_tile(features, example.target.cameras[None], quality=quality)
    assert output.rgb.shape == (1, 3, 24, 32)
    assert torch.isfinite(output.rgb).all()
    assert output.confidence is not None
    for share in (output.rgb, output.opacity, output.confidence):
        assert share.min() >= 0 and share.max() <= 1
    assert output.depth.min() >= 2 - 1e-4 and output.depth.max() <= 8 + 1e-3


def test_one_view_is_too_few(cascade):
    with pytest.raises(InputError, match="at least 2 source views, got 1"):
        cascade.encode(plane_views(1)[None])


@pytest.mark.parametrize(("source", "target"), [((33, 27), (31, 17)), ((5, 3), (16, 16)), ((16, 48), (1, 1))])
def test_any_image_size(cascade, source, target):
    views = plane_views(3, source)
    camera = replace(views.cameras[:1], size=target)
    output = render(cascade, views[None], camera)
    assert output.rgb.shape == (1, 3, target[1], target[0])
    assert output.depth.shape == output.opacity.shape == (1, target[1], target[0])
    assert torch.isfinite(output.rgb).all() and torch.isfinite(output.depth).all()


def test_a_batch_equals_its_scenes_one_by_one(cascade):
    examples = [tiny_example(seed, size=(30, 22)) for seed in (0, 1)]
    batch = stack_examples(examples)
    together = render(cascade, batch.source, batch.target.cameras)
    for i, example in enumerate(examples):
        alone = render(cascade, example.source[None], example.target.cameras[None])
        assert_same_picture(together.map(lambda x, i=i: x[i : i + 1]), alone)


def test_the_order_of_the_views_does_not_matter(cascade):
    example = tiny_example(num_sources=4)
    source, target = example.source, example.target.cameras[None]
    expected = render(cascade, source[None], target)
    for order in ([1, 0, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        assert_same_picture(render(cascade, source[order][None], target), expected)


def test_moving_and_scaling_the_world_moves_no_colour_and_scales_depth(cascade):
    example = tiny_example()
    expected = render(cascade, example.source[None], example.target.cameras[None])
    scale = 2.5
    motion = torch.eye(4)
    motion[:3, :3] = rotation(0.7, -1.9)
    motion[:3, 3] = torch.tensor([1.0, -2.0, 3.0])

    def move(cameras: Cameras) -> Cameras:
        c2w = cameras.c2w.clone()
        c2w[..., :3, 3] *= scale
        return replace(cameras, c2w=motion @ c2w, near=cameras.near * scale, far=cameras.far * scale)

    source = Views(example.source.images, move(example.source.cameras))
    moved = render(cascade, source[None], move(example.target.cameras)[None])
    unscaled = RenderOutput(moved.rgb, moved.depth / scale, moved.opacity, moved.confidence)
    # Pixels whose projection falls on the very edge of a source may flip their visibility: hence shares, not all.
    assert ((unscaled.rgb - expected.rgb).abs().amax(1) < 1e-3).float().mean() > 0.99
    assert ((unscaled.depth / expected.depth - 1).abs() < 1e-3).float().mean() > 0.99


def test_target_that_no_source_sees_stays_finite(cascade):
    example = tiny_example()
    around = torch.eye(4)
    around[:3, :3] = rotation(0.0, torch.pi)
    behind = replace(example.target.cameras, c2w=example.target.cameras.c2w @ around)
    output = cascade(cascade.encode(example.source[None]), behind[None])
    assert torch.isfinite(output.render.rgb).all() and torch.isfinite(output.render.depth).all()
    assert output.fine.visibility.abs().max() < 1e-6
    output.render.rgb.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in cascade.parameters() if p.grad is not None)
    cascade.zero_grad()


def test_source_camera_in_the_middle_of_the_frustum_stays_finite(cascade):
    example = tiny_example()
    c2w = example.source.cameras.c2w.clone()
    c2w[0] = example.target.cameras.c2w
    c2w[1] = example.target.cameras.c2w
    c2w[1, :3, 3] += 4 * c2w[1, :3, 2]
    source = Views(example.source.images, replace(example.source.cameras, c2w=c2w))
    output = render(cascade, source[None], example.target.cameras[None])
    assert torch.isfinite(output.rgb).all()


def wave_features(cameras: Cameras, depth: float, waves: torch.Tensor) -> torch.Tensor:
    """Unit vectors (sin, cos of waves over the plane z = ``depth``) as channels-last maps."""
    rays = image_rays(cameras)
    t = (depth - rays.origins[..., 2]) / rays.directions[..., 2]
    phases = (rays.origins + t[..., None] * rays.directions)[..., :2] @ waves
    return torch.cat([phases.sin(), phases.cos()], -1) / waves.shape[1] ** 0.5


@pytest.mark.parametrize("plane", [3, 9, 14])
@pytest.mark.parametrize("stage", ["halved", "coarse", "middle", "fine"])
def test_similarity_peaks_at_the_true_plane_everywhere_in_the_image(stage, plane, generator):
    """No lookup is off by part of a cell or of a pixel: features of a plane agree at its depth, and only there."""
    planes, channels = 16, 16
    size = {"halved": (512, 384), "coarse": (256, 192), "middle": (128, 96), "fine": (64, 48)}[stage]
    target = replace(cameras_on_a_wall(1, size, generator), c2w=torch.eye(4)[None])
    source = cameras_on_a_wall(3, size, generator)
    inverse_depths = inverse_depth_planes(target.near, target.far, planes)
    depth = float(1 / inverse_depths[0, plane])
    waves = torch.randn(2, channels // 2, generator=generator) * 4
    if stage == "halved":
        maps = wave_features(resize(source, (size[0] // 8, size[1] // 8)), depth, waves)[None]
        blank = torch.zeros(1, 3, size[1] // 4, size[0] // 4, channels)
        volume = FrustumVolume(channels, 1, (4, 8), 2)
        volume.add_halved(1)
        cues, seen = [], []
        volume.from_halved[0].register_forward_pre_hook(lambda _, inputs: cues.append(inputs[0]))
        volume.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., -2] > 0.99))
        with torch.no_grad():
            volume(PyramidFeatures(blank, blank, halved=(maps,)), source[None], target, planes)
        similarity, seen = torch.cat(cues, 1)[0, :, :1], torch.cat(seen, 1)[0]
    elif stage == "coarse":
        maps = wave_features(resize(source, (size[0] // 4, size[1] // 4)), depth, waves)
        volume = FrustumVolume(channels, 1, (4, 8), 2)
        cues = []
        volume.embed.register_forward_pre_hook(lambda _, inputs: cues.append(inputs[0]))
        with torch.no_grad():
            volume(PyramidFeatures(maps[None], maps[None]), source[None], target, planes)
        similarity, _, _, _, share, _ = torch.cat(cues, 1)[0].split([1, 1, channels, 1, 1, 1], -1)
        seen = share[..., 0] > 0.99
    elif stage == "middle":
        maps = wave_features(resize(source, (64, 48)), depth, waves)
        maps = torch.cat([maps, torch.zeros(3, 48, 64, 3)], -1)[None]
        middle = MiddleStage(channels, 1, 2, (4, 8))
        cues = []
        middle.embed.register_forward_pre_hook(lambda _, inputs: cues.append(inputs[0]))
        # with equal probabilities, hypotheses are the planes
        flat = DepthDistribution(torch.zeros(1, planes, 24, 32), torch.zeros(1, 2, planes, 24, 32))
        with torch.no_grad():
            middle(PyramidFeatures(maps, maps, maps), source[None], target, flat, planes)
        similarity, _, share, _ = torch.cat(cues, 1)[0].split([1, 1 + channels + 6 + 3, 1, 2], -1)
        seen = share[..., 0] > 0.99
    else:
        maps = torch.cat([wave_features(source, depth, waves), torch.zeros(3, 48, 64, 3)], -1)
        samples = FineSamples(channels, 1, 2, 8)
        positions = inverse_depths[..., None].expand(-1, -1, size[0] * size[1])
        with torch.no_grad():
            found = samples._match(PyramidFeatures(maps[None], maps[None]), source[None], target, positions)
        similarity, seen = found.cues[0, :, :1], found.seen.all(1)[0]
    rows, columns = (96, 128) if stage == "halved" else (48, 64)
    similarity, seen = similarity.reshape(planes, rows, columns), seen.reshape(planes, rows, columns)
    best = torch.where(seen, similarity, -1.0).argmax(0)
    for row in (0, rows // 2):
        for column in (0, columns // 2):
            quarter = (slice(row, row + rows // 2), slice(column, column + columns // 2))
            inside = seen[plane][quarter]
            assert inside.float().mean() > 0.15
            assert (best[quarter] == plane)[inside].float().mean() > 0.97
            assert similarity[plane][quarter][inside].mean() > 0.95


def test_normalised_groups_have_unit_length(generator):
    x = torch.randn(2, 5, 4, 6, generator=generator)
    lengths = normalize_groups(x, 3).unflatten(-1, (3, -1)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), atol=1e-3, rtol=0)
    assert torch.isfinite(normalize_groups(torch.zeros(1, 2, 2, 4), 2)).all()


def test_finite_gradients_reach_every_parameter():
    torch.manual_seed(0)
    cascade = waken(Cascade(TINY_CASCADE))
    example = tiny_example()
    output = cascade(cascade.encode(example.source[None]), example.target.cameras[None])
    loss = output.render.rgb.square().mean() + output.error_scale.mean() + output.fine.position.mean()
    loss.backward()
    for name, parameter in cascade.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_jitter_comes_from_the_generator(cascade):
    example = tiny_example()
    with torch.no_grad():
        features = cascade.encode(example.source[None])
        a, b, other = (
            cascade(features, example.target.cameras[None], generator=torch.Generator().manual_seed(seed)).render.rgb
            for seed in (0, 0, 1)
        )
    assert torch.equal(a, b)
    assert (a - other).abs().max() > 1e-4


def test_confidence_is_the_laplace_probability_of_a_small_error(generator):
    scale = torch.tensor([1e-3, 0.05, 0.1, 1.0, 100.0])
    confidence = confidence_of(scale)
    assert (confidence.diff() < 0).all() and confidence.min() >= 0 and confidence.max() <= 1
    draws = torch.rand(2, 100_000, generator=generator).log()
    errors = 0.05 * (draws[0] - draws[1]).abs()  # the difference of two exponentials is Laplace
    assert confidence[1].item() == pytest.approx((errors < 0.1).float().mean().item(), abs=0.01)


def test_a_few_dozen_steps_on_one_procedural_scene_reduce_the_loss():
    scene = generate_scene(5, ProceduralConfig(size=(32, 24), num_views=3, complexity=(0.2, 0.2), supersample=1))
    batch = stack_examples([draw_example(scene, 2, torch.Generator().manual_seed(0))])
    torch.manual_seed(0)
    cascade = Cascade(TINY_CASCADE)
    optimizer = torch.optim.AdamW(cascade.parameters(), lr=3e-3)
    config = LossConfig(mse=5.0, charbonnier=1.0, depth_distribution=0.1)
    losses = []
    for step in range(20):
        objective = cascade_objective(cascade, batch, config, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        objective.loss.backward()
        optimizer.step()
        losses.append(objective.loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses


def awake_model(configuration: str) -> IDNeRF:
    torch.manual_seed(1)
    return waken(IDNeRF(TINY_MODELS[configuration])).eval()


@pytest.mark.parametrize("configuration", ["cascade", "paper"])
def test_weights_round_trip(configuration, tmp_path):
    model = awake_model(configuration)
    model.save(tmp_path / "half.safetensors", step=7)
    model.save(tmp_path / "exact.safetensors", half=False)
    exact, half = (IDNeRF.from_pretrained(tmp_path / f"{name}.safetensors") for name in ("exact", "half"))
    assert exact.config == half.config == model.config
    assert not half.training
    for name, value in model.state_dict().items():
        assert torch.equal(exact.state_dict()[name], value), name
        assert half.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(half.state_dict()[name], value, atol=1e-4, rtol=1e-3)
    assert read_tensors(tmp_path / "half.safetensors")[1]["step"] == 7
    views = plane_views(4, (32, 32))
    ours, read = (m.render(views[1:], views.cameras[0]).rgb for m in (model, half))
    # a sample that moves across the edge of its bin hears another hypothesis: hence shares, not all
    assert ((read - ours).abs() < 2e-2).float().mean() > 0.95
    assert (read - ours).abs().median() < 2e-3


@pytest.mark.parametrize("deeper", [False, True])
def test_large_targets_are_tiled_and_nearly_the_same(monkeypatch, deeper):
    """Tiles see ``TILE_MARGIN`` pixels beyond their seams: less than the coarse network's reach, hence nearly.

    How nearly depends on the random network: the mean of four.
    """
    views = plane_views(3, (32, 24))
    target = replace(views.cameras[0], size=(128, 112))
    sizes, differences = [], []
    tile = Cascade.render_tile
    monkeypatch.setattr(
        Cascade, "render_tile", lambda self, f, t, **kw: (sizes.append(t.size), tile(self, f, t, **kw))[1]
    )

    def small_tiles(render_tile: Callable[[Cameras], RenderOutput], target: Cameras, **_: int) -> RenderOutput:
        return render_in_tiles(render_tile, target, tile_pixels=10_000)

    for seed in range(4):
        torch.manual_seed(seed)
        model = waken(IDNeRF(ModelConfig(cascade=DEEPER if deeper else TINY_CASCADE)), seed).eval()
        sizes.clear()
        whole = model.render(views, target)
        assert sizes == [(128, 112)]
        with monkeypatch.context() as patch:
            patch.setattr("idnerf.models.idnerf.render_in_tiles", small_tiles)
            output = model.render(views, target)
        assert len(sizes) > 3
        differences.append((output.rgb - whole.rgb).abs().mean().item())
    assert sum(differences) / len(differences) < 0.02, differences


def assert_one_line(error: pytest.ExceptionInfo[InputError]) -> None:
    assert "\n" not in str(error.value)


def test_config_survives_json():
    for config in TINY_MODELS.values():
        assert config_from_json(config_to_json(config)) == config


def test_bad_files_are_refused_in_one_line(tmp_path):
    good = tmp_path / "good.safetensors"
    awake_model("cascade").save(good)
    tensors, metadata = read_tensors(good)
    content = good.read_bytes()

    def refused(name: str, match: str) -> None:
        with pytest.raises(InputError, match=match) as error:
            IDNeRF.from_pretrained(tmp_path / name)
        assert_one_line(error)

    for cut in (0, 5, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:cut])
        refused("cut.safetensors", "truncated")
    refused("missing.safetensors", "expected --weights")
    (tmp_path / "empty").mkdir()
    refused("empty", "expected --weights")
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 a pickle")
    refused("model.pth", "idnerf convert")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    refused("foreign.safetensors", "not weights of this version")
    write_tensors(tmp_path / "no_config.safetensors", tensors, {})
    refused("no_config.safetensors", "no model configuration")

    def write(name: str, change_tensors: dict, **change_config) -> None:
        config = dict(metadata["config"])
        config["cascade"] = {**config["cascade"], **change_config}
        write_tensors(tmp_path / name, {**tensors, **change_tensors}, {"config": config})

    first = next(iter(tensors))
    write("shape.safetensors", {first: torch.zeros(3, 3)})
    refused("shape.safetensors", "1 tensors missing or of another shape")
    write("extra.safetensors", {"core.surprise": torch.zeros(3)})
    refused("extra.safetensors", "core.surprise")
    write("other.safetensors", {}, coarse_channels=16)
    refused("other.safetensors", "does not fit")
    write("newer.safetensors", {}, hyperspace=True)
    refused("newer.safetensors", "hyperspace")
    write_tensors(tmp_path / "kind.safetensors", tensors, {"config": {"configuration": "waterfall"}})
    refused("kind.safetensors", "waterfall")
    write_tensors(tmp_path / "fewer.safetensors", {first: tensors[first]}, {"config": metadata["config"]})
    refused("fewer.safetensors", "tensors missing")


def test_a_header_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "idnerf-1", "config": "{"})
    with pytest.raises(InputError, match="not a readable"):
        IDNeRF.from_pretrained(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    model = awake_model("cascade")
    model.save(path)
    before = path.read_bytes()

    def die(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("idnerf.checkpoint.os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        waken(model, 3).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_run_folder_stands_for_its_weights(tmp_path):
    awake_model("cascade").save(tmp_path / "weights.safetensors")
    assert isinstance(IDNeRF.from_pretrained(tmp_path).core, Cascade)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"coarse_groups": 3}, "coarse-groups"),
        ({"fine_groups": 5}, "fine-groups"),
        ({"planes": 0}, "planes"),
        ({"samples_fast": 0}, "samples-fast"),
        ({"volume_widths": ()}, "volume-widths"),
        ({"token_width": 0}, "token-width"),
        ({"token_width": 1}, "token-width: expected 2 or more, got 1"),
        (
            {"cross_view_layers": 1, "pyramid_widths": (16, 32, 64, 90, 128)},
            "pyramid-widths: .* multiple of 4 .* got 90",
        ),
        ({"volume_blocks": (0, 1, 2, 2, 1)}, "volume-blocks"),
        ({"volume_blocks": (0, -1)}, "volume-blocks"),
        ({"refinement_deeper": (96, 0)}, "refinement-deeper"),
        ({"refinement_deeper": (96, 128, 128)}, "refinement-deeper"),
    ],
)
def test_bad_sizes_are_named_by_their_flag(change, named):
    with pytest.raises(InputError, match=named) as error:
        replace(CascadeConfig(), **change)
    assert_one_line(error)


def test_default_sizes_stay_light():
    parameters = sum(p.numel() for p in IDNeRF(ModelConfig()).parameters())
    assert parameters < 3_500_000


def test_masked_mean_equals_the_mean_of_mean_and_variance(generator):
    values = torch.randn(2, 3, 20, 5, generator=generator)
    visible = torch.rand(2, 3, 20, generator=generator) < 0.5
    expected = masked_mean_and_variance(values, visible)[0]
    torch.testing.assert_close(masked_mean(values, visible.float()[..., None]), expected)


@pytest.mark.parametrize("samples", [4, 24])
def test_attention_among_samples_equals_scaled_dot_product_attention(samples, generator, monkeypatch):
    """Few samples as elementwise sums, many through the fused kernel, so many rays at a time."""
    monkeypatch.setattr(fine_samples, "MOST_RAYS", 3)
    attention = SampleAttention(6, heads=2, head_width=3)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, samples, 5, 6, generator=generator)
    tokens = x.transpose(1, 2)  # batch ray sample channel
    q, k, v = (
        part.unflatten(-1, (2, 3)).transpose(2, 3) for part in attention.to_qkv(attention.norm(tokens)).chunk(3, -1)
    )
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(-2)
    torch.testing.assert_close(attention(x), (tokens + attention.out(mixed)).transpose(1, 2))


def blending_case(generator: torch.Generator) -> tuple[ViewBlending, FineOutput, Cameras, Cameras]:
    """A blending with random weights and what three views show of a tile of 8x6 pixels."""
    blending = ViewBlending(fine_channels=4, token_width=6, width=5)
    example = tiny_example()
    target = resize(example.target.cameras, (8, 6))[None]
    shape = (len(example.source), 8, 6, 8)
    views = torch.rand(1, *shape, generator=generator)
    fine = FineOutput(
        views=views,
        tokens=torch.randn(1, 6, 6, 8, generator=generator),
        position=torch.rand(1, 6, 8, generator=generator),
        spread=torch.rand(1, 6, 8, generator=generator),
        opacity=torch.ones(1, 6, 8),
    )
    return blending, fine, example.source.cameras[None], target


@torch.no_grad()
def test_blended_colour_lies_between_the_views_colours_in_any_order_of_views(generator):
    blending, fine, source, target = blending_case(generator)
    blend = blending(fine, source, target)
    rgb = blend.rgb
    assert (rgb <= fine.colours.amax(1) + 1e-6).all() and (rgb >= fine.colours.amin(1) - 1e-6).all()
    assert blend.deviation.min() > 0
    order = torch.arange(source.shape[1]).flip(0)
    swapped = blending(replace(fine, views=fine.views[:, order]), source[:, order], target)
    torch.testing.assert_close(swapped.rgb, rgb)


@torch.no_grad()
def test_blending_with_context_starts_as_no_change_and_then_mixes_the_views_in_any_order(generator):
    blending, fine, source, target = blending_case(generator)
    again, context = ContextBlending(7, 5), torch.randn(1, 7, 6, 8, generator=generator)
    blend = blending(fine, source, target)
    torch.testing.assert_close(again(blend, fine.colours, context), blend.rgb)
    waken(again)
    rgb = again(blend, fine.colours, context)
    assert (rgb - blend.rgb).abs().max() > 1e-3
    assert (rgb <= fine.colours.amax(1) + 1e-6).all() and (rgb >= fine.colours.amin(1) - 1e-6).all()
    order = torch.arange(source.shape[1]).flip(0)
    swapped = blending(replace(fine, views=fine.views[:, order]), source[:, order], target)
    torch.testing.assert_close(again(swapped, fine.colours[:, order], context), rgb)


@torch.no_grad()
def test_view_that_does_not_see_a_pixel_colours_it_hardly(generator):
    blending, fine, source, target = blending_case(generator)
    views = fine.views.clone()
    views[:, :, -1] = 0
    views[:, 1, -1] = 1
    rgb = blending(replace(fine, views=views), source, target).rgb
    torch.testing.assert_close(rgb, views[:, 1, -4:-1], atol=0.02, rtol=0)


@torch.no_grad()
def test_angle_between_rays_is_that_of_the_directions_to_the_point(generator):
    cameras = cameras_on_a_wall(4, (6, 4), generator)
    source, target = cameras[:3], cameras[3:]
    points = unproject(target, torch.full((1, 4, 6), 5.0)).flatten(0, 2)
    to_target = F.normalize(points - target.centers, dim=-1)
    # a chord of the unit circle: the angle, for small ones
    chords = torch.stack([(F.normalize(points - c, dim=-1) - to_target).norm(dim=-1) for c in source.centers])
    angles = ray_angles(source[None], target, torch.full((1, 4, 6), 0.2))
    torch.testing.assert_close(angles[0].flatten(1), chords * 4, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_signal_neither_fades_nor_explodes_from_layer_to_layer():
    spreads, shares = defaultdict(list), defaultdict(list)

    def watch(name):
        def note(layer, inputs, output):
            if layer.weight.any():  # residual branches and heads that start at zero say nothing yet
                spreads[name].append(float(output.square().mean().sqrt()))
                shares[name].append(float((inputs[0] > 0).float().mean()))

        return note

    example = tiny_example()
    for seed in range(5):  # so few channels see so few pixels that one draw of the weights says little
        torch.manual_seed(seed)
        # halved, so small a photo has hardly a cell left
        cascade = Cascade(replace(TINY_CASCADE, halvings=0)).eval()
        for name, layer in cascade.named_modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.Linear):
                layer.register_forward_hook(watch(name))
        cascade.render_tile(cascade.encode(example.source[None]), example.target.cameras[None])
    typical = {name: median(values) for name, values in spreads.items()}
    assert len(typical) > 30
    assert min(typical.values()) > 0.05 and max(typical.values()) < 20, typical
    deep = [median(values) for name, values in shares.items() if "down" in name or "up" in name]
    assert min(deep) > 0.1 and max(deep) < 0.9, shares


def test_compositing_sample_by_sample_has_the_values_and_gradients_of_the_plain_sum(generator):
    weights = torch.rand(2, 1, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = (weights[..., None] * values).sum(-3)
    torch.testing.assert_close(composite_along_ray(weights, values), expected)
    assert torch.autograd.gradcheck(composite_along_ray, (weights, values))
    still = values.detach()  # photos: only the weights take a gradient
    ours = torch.autograd.grad(composite_along_ray(weights, still).square().sum(), weights)[0]
    theirs = torch.autograd.grad((weights[..., None] * still).sum(-3).square().sum(), weights)[0]
    torch.testing.assert_close(ours, theirs)


def test_a_step_in_bfloat16_is_a_step_in_float32_up_to_rounding():
    """Loss within a hundredth, gradient nearly parallel; what leaves the networks is float32."""
    torch.manual_seed(0)
    cascade = waken(Cascade(TINY_CASCADE))
    batch = stack_examples([tiny_example(size=(64, 48))])
    losses, gradients = [], []
    for enabled in (False, True):
        cascade.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            features = cascade.encode(batch.source)
            output = cascade(features, batch.target.cameras)
            loss = cascade_objective(cascade, batch, LossConfig(depth=1.0, depth_distribution=0.2), seeded(1)).loss
        for tensor in (features.pyramid.fine, output.distribution.log_probabilities, output.render.rgb, loss):
            assert tensor.dtype == torch.float32
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in cascade.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("query", ["pixel", "global"])
def test_a_step_in_bfloat16_reaches_the_latent_network(query):
    """The latent and its gradient are float32; the gradient is that of float32 up to rounding."""
    torch.manual_seed(0)
    cascade = waken(IDNeRF(with_latent("cascade", query)).core)
    batch = stack_examples([tiny_example(size=(64, 48))])
    gradients = []
    for enabled in (False, True):
        cascade.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = cascade_objective(cascade, batch, LossConfig(), seeded(1))
        assert result.latent.values.dtype == torch.float32
        result.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in cascade.latent.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


DEEPER = replace(TINY_CASCADE, volume_blocks=(0, 1, 2), refinement_deeper=(8, 10))
CROSS_VIEW = replace(TINY_CASCADE, cross_view_layers=2)


@torch.no_grad()
@pytest.mark.parametrize("views", [2, 3, 5])
def test_cross_view_attention_starts_silent_and_follows_the_order_of_the_views(views, generator):
    torch.manual_seed(0)
    mixed, plain = Cascade(CROSS_VIEW).eval(), Cascade(TINY_CASCADE).eval()
    plain.load_state_dict({k: v for k, v in mixed.state_dict().items() if ".mixing." not in k})
    images = torch.rand(2, views, 3, 37, 50, generator=generator)
    torch.testing.assert_close(mixed.encoder(images).fine, plain.encoder(images).fine)
    waken(mixed)
    features = mixed.encoder(images)
    order = torch.randperm(views, generator=generator)
    torch.testing.assert_close(mixed.encoder(images[:, order]).coarse, features.coarse[:, order], atol=1e-5, rtol=1e-4)
    changed = images.clone()
    changed[:, -1] = 1 - changed[:, -1]
    # another last photo changes the first one's features; without the option it does not
    assert (mixed.encoder(changed).coarse[:, 0] - features.coarse[:, 0]).abs().max() > 1e-3
    assert torch.equal(plain.encoder(changed).coarse[:, 0], plain.encoder(images).coarse[:, 0])


def test_cross_view_layers_can_be_added_to_trained_weights_and_learn(tmp_path):
    torch.manual_seed(0)
    IDNeRF(ModelConfig(cascade=TINY_CASCADE)).save(tmp_path / "plain.safetensors")
    model = IDNeRF.extending(tmp_path / "plain.safetensors", ModelConfig(cascade=CROSS_VIEW))
    core = model.core
    assert isinstance(core, Cascade) and core.encoder.mixing is not None
    waken(core.encoder.mixing)
    batch = stack_examples([tiny_example(size=(64, 48))])
    cascade_objective(core, batch, LossConfig(), seeded(1)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in core.encoder.mixing.parameters())


def test_a_picture_in_bfloat16_is_the_one_in_float32_up_to_rounding():
    torch.manual_seed(0)
    model = IDNeRF(ModelConfig(cascade=TINY_CASCADE)).eval()
    waken(model)
    example = tiny_example(size=(64, 48))
    exact = model.render(example.source, example.target.cameras)
    model.precision = "bf16"
    rounded = model.render(example.source, example.target.cameras)
    assert rounded.rgb.dtype == rounded.depth.dtype == torch.float32
    # hypotheses that change place with their neighbours make a noisy network jump: hence loose
    assert 0 < (rounded.rgb - exact.rgb).abs().mean() < 0.03
    assert (rounded.rgb - exact.rgb).abs().median() < 0.01


def two_surfaces(weights: tuple[float, float]) -> MiddleOutput:
    """Two cells side by side: bins [0, 0.4] and [0.4, 1], of these weights on the left, exchanged on the right."""
    edges = torch.tensor([0.0, 0.4, 1.0])[None, :, None, None].expand(1, 3, 1, 2)
    shares = torch.tensor([weights, weights[::-1]]).T[None, :, None]
    return MiddleOutput(edges, shares.log(), torch.arange(4.0).reshape(1, 1, 2, 1, 2))


def test_a_pixel_draws_from_the_half_resolution_pixel_it_belongs_to_and_knows_the_bin():
    middle = two_surfaces((0.75, 0.25))
    quantiles = ((torch.arange(4) + 0.5) / 4).expand(1, 8, 4)
    positions, rows = middle.draw((2, 4), quantiles)
    near = torch.tensor([0.4 / 6, 0.2, 0.4 * 5 / 6])
    for column in (0, 1):
        left, right = positions[0, :, :, column], positions[0, :, :, column + 2]
        torch.testing.assert_close(
            left, torch.cat([near, torch.tensor([0.7])])[:, None].expand(4, 2), atol=1e-3, rtol=0
        )
        torch.testing.assert_close(right[0], torch.full((2,), 0.2), atol=1e-3, rtol=0)
        assert (right[1:] > 0.4).all()
    tokens, log_weights = middle.rows()[rows].unbind(-1)
    torch.testing.assert_close(tokens[0, :, 1, 1], torch.tensor([0.0, 0, 0, 2]))  # bin 0, bin 1 of the left cell
    torch.testing.assert_close(tokens[0, :, 0, 2], torch.tensor([1.0, 3, 3, 3]))
    torch.testing.assert_close(log_weights[0, 3, 0, 0].mul(5).exp(), torch.tensor(0.25))


def test_one_hypothesis_has_the_whole_ray_as_its_bin():
    torch.manual_seed(0)
    cascade = waken(Cascade(replace(TINY_CASCADE, middle_hypotheses=1, middle_hypotheses_fast=1)))
    batch = stack_examples([tiny_example()])
    output = cascade(cascade.encode(batch.source), batch.target.cameras, generator=seeded(0))
    assert output.middle.edges.shape[1] == 2
    assert (output.middle.edges[:, 0] == 0).all() and (output.middle.edges[:, 1] == 1).all()
    assert (output.middle.log_weights == 0).all() and torch.isfinite(output.render.rgb).all()
    config = LossConfig(depth=1.0, depth_distribution=0.2)
    cascade_objective(cascade, batch, config, seeded(1), "fast").loss.backward()
    assert torch.isfinite(cascade.middle.embed.weight.grad).all()


def test_hypotheses_are_quantiles_of_the_coarse_distribution(generator):
    """Bins cover all of [0, 1], each holds as much coarse probability, and jitter stays inside its bin."""
    logits = 4 * torch.randn(1, 6, 4, 5, generator=generator)
    coarse = DepthDistribution(F.log_softmax(logits, 1), torch.zeros(1, 2, 6, 4, 5))
    middle = MiddleStage(6, 2, 2, (4, 8))
    edges, medians = middle._draw(coarse, (8, 10), 5, None)
    assert (edges[:, 0] == 0).all() and (edges[:, -1] == 1).all()
    probabilities = F.interpolate(coarse.log_probabilities.exp(), size=(8, 10), mode="bilinear")
    cdf = F.pad(probabilities.cumsum(1), (0, 0, 0, 0, 1, 0))
    at = (edges * 6).floor().clamp(0, 5).long()
    low, high = cdf.gather(1, at), cdf.gather(1, at + 1)
    masses = (low + (edges * 6 - at) * (high - low)).diff(dim=1)
    torch.testing.assert_close(masses, torch.full_like(masses, 0.2), atol=1e-3, rtol=0)
    for positions in (medians, middle._draw(coarse, (8, 10), 5, generator)[1]):
        assert (positions >= edges[:, :-1]).all() and (positions <= edges[:, 1:]).all()


def test_weights_from_before_the_middle_stage_load_and_can_be_extended(tmp_path):
    torch.manual_seed(0)
    bare = replace(TINY_CASCADE, middle_hypotheses=0, context_blending=False)
    model = waken(IDNeRF(ModelConfig(cascade=bare))).eval()
    config = config_to_json(model.config)
    for name in list(config["cascade"]):
        if name.startswith("middle") or name == "context_blending":
            del config["cascade"][name]
    write_tensors(tmp_path / "old.safetensors", model.state_dict(), {"config": config})
    loaded = IDNeRF.from_pretrained(tmp_path / "old.safetensors")
    assert loaded.core.middle is None and loaded.core.refinement.context_blending is None
    example = tiny_example()
    expected = model.render(example.source, example.target.cameras)
    assert torch.equal(loaded.render(example.source, example.target.cameras).rgb, expected.rgb)
    core = IDNeRF.extending(tmp_path / "old.safetensors", TINY_MODELS["cascade"]).core
    assert core.middle is not None
    batch = stack_examples([tiny_example(size=(64, 48))])
    losses = []
    optimizer = torch.optim.Adam(core.middle.parameters(), 1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        objective = cascade_objective(core, batch, LossConfig(depth_distribution=1.0), seeded(1))
        objective.terms["middle_distribution"].backward()
        optimizer.step()
        losses.append(objective.terms["middle_distribution"].item())
    assert losses[-1] < losses[0] - 0.05, losses


def test_weights_from_before_halved_matching_load_and_share_their_similarity(tmp_path, monkeypatch):
    """Where all sizes of the photos say the same, the extended network renders what the old one did."""
    torch.manual_seed(0)
    old = waken(IDNeRF(ModelConfig(cascade=replace(TINY_CASCADE, halvings=0)))).eval()
    config = config_to_json(old.config)
    del config["cascade"]["halvings"]
    write_tensors(tmp_path / "old.safetensors", old.state_dict(), {"config": config})
    loaded = IDNeRF.from_pretrained(tmp_path / "old.safetensors")
    example = tiny_example()
    expected = old.render(example.source, example.target.cameras).rgb
    assert torch.equal(loaded.render(example.source, example.target.cameras).rgb, expected)
    assert loaded.encode(example.source[None]).pyramid.halved == ()

    extended = IDNeRF.extending(tmp_path / "old.safetensors", TINY_MODELS["cascade"]).eval()
    names = ("from_halved.0.weight", "halved_gains.0", "from_halved.1.weight", "halved_gains.1")
    assert extended.added == {f"core.volume.{name}" for name in names}
    other = extended.render(example.source, example.target.cameras).rgb
    assert (other - expected).abs().max() > 1e-3
    volume = extended.core.volume
    match = volume._match

    def as_if_never_halved(*inputs):
        found = match(*inputs[:5])
        return replace(found, cues=found.cues[..., : 2 * volume.groups]) if len(inputs) > 5 else found

    monkeypatch.setattr(volume, "_match", as_if_never_halved)
    same = extended.render(example.source, example.target.cameras).rgb
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=0)


def test_weights_from_before_further_blocks_and_scales_load_and_start_as_no_change(tmp_path):
    torch.manual_seed(0)
    old = waken(IDNeRF(TINY_MODELS["cascade"])).eval()
    config = config_to_json(old.config)
    for name in ("volume_blocks", "refinement_deeper"):
        del config["cascade"][name]
    write_tensors(tmp_path / "old.safetensors", old.state_dict(), {"config": config})
    loaded = IDNeRF.from_pretrained(tmp_path / "old.safetensors")
    assert loaded.config == old.config
    example = tiny_example(size=(70, 50))  # not a multiple of the smallest scale
    expected = old.render(example.source, example.target.cameras).rgb
    assert torch.equal(loaded.render(example.source, example.target.cameras).rgb, expected)

    extended = IDNeRF.extending(tmp_path / "old.safetensors", ModelConfig(cascade=DEEPER)).eval()
    assert {name.split(".")[2] for name in extended.added} == {"unet", "deeper"}
    torch.testing.assert_close(extended.render(example.source, example.target.cameras).rgb, expected, atol=1e-6, rtol=0)
    batch = stack_examples([tiny_example(size=(64, 48))])
    optimizer = torch.optim.Adam([p for name, p in extended.named_parameters() if name in extended.added], 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = cascade_objective(extended.core, batch, LossConfig(), seeded(1)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05, losses
    added = dict(extended.named_parameters())
    for name in ("core.volume.unet.more.2.1.conv2.weight", "core.refinement.deeper.downs.1.0.weight"):
        assert added[name].grad is not None and added[name].grad.any(), name


@pytest.mark.parametrize("size", [(64, 48), (61, 47)])
def test_halved_maps_are_the_coarse_maps_of_halved_photos(cascade, size, generator):
    images = torch.rand(1, 2, 3, size[1], size[0], generator=generator)
    even = F.pad(images.flatten(0, 1), (0, -size[0] % 4, 0, -size[1] % 4), mode="replicate")
    with torch.no_grad():
        maps = cascade.encoder(images).halved
        assert len(maps) == 2
        for ours, factor in zip(maps, (2, 4), strict=True):
            smaller = F.avg_pool2d(even, factor).unflatten(0, (1, 2))
            torch.testing.assert_close(ours, cascade.encoder(smaller).coarse)


@pytest.mark.parametrize("named", [{"amx_bf16": True}, {"avx512_bf16": True}, {"avx512_bf16": False}, {}])
def test_bfloat16_counts_as_fast_on_processors_that_multiply_in_it(named, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: named, raising=False)
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False, raising=False)
    assert has_fast_bfloat16("cpu") == any(named.values())


def test_unsure_cells_take_their_share_and_sure_ones_nothing(generator):
    planes = 24
    unsure, sure = torch.zeros(planes), 50 * F.one_hot(torch.tensor(5), planes).float()
    half_sure = torch.zeros(planes)
    half_sure[:8] = 20  # entropy ln 8 / ln 24 = 0.65: between the two
    own = torch.stack([unsure, sure, half_sure]).log_softmax(1).T[None, :, None]
    other = torch.randn(1, planes, 2, 2, generator=generator).log_softmax(1)
    distribution = DepthDistribution(own, torch.zeros(1, 1, planes, 1, 3))
    mixed = distribution.mixed(DepthDistribution(other, torch.zeros(1, 1, planes, 2, 2)), 0.7)
    probabilities = mixed.log_probabilities.exp()
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 1, 3))
    others = F.interpolate(other.exp(), (1, 3), mode="bilinear", align_corners=False)
    torch.testing.assert_close(probabilities[..., 0], 0.3 / planes + 0.7 * others[..., 0])
    torch.testing.assert_close(probabilities[..., 1], own.exp()[..., 1], atol=1e-6, rtol=0)
    from_others = (probabilities[0, 8:, 0, 2] / others[0, 8:, 0, 2]).mean()
    assert 0.1 < from_others < 0.6
    torch.testing.assert_close(mixed.features, distribution.features)


@pytest.mark.parametrize("size", [(64, 48), (66, 50)])
def test_depth_at_half_the_size_is_that_of_halved_photos_and_cameras(size, monkeypatch):
    monkeypatch.setattr(frustum_volume, "UNSURE", (-2.0, -1.0))  # all cells
    torch.manual_seed(0)
    cascade = waken(Cascade(replace(TINY_CASCADE, half_size_share=1.0))).eval()
    views, tile = plane_views(3, size)[None], plane_views(4, (64, 48)).cameras[3:]
    with torch.no_grad():
        found = cascade(cascade.encode(views), tile).distribution.log_probabilities.exp()
        photos = halve_photos(views.images[0])[None]
        alone = cascade.encode(Views(photos, halve(views.cameras)))
        expected = cascade.volume(alone.pyramid, alone.cameras, halve(tile), TINY_CASCADE.planes)
    expected = F.interpolate(expected.log_probabilities.exp(), (12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_training_finds_depth_at_half_the_size_in_the_tile_it_is_given(monkeypatch):
    """With as much around the tile as the images of rendering have; where cells know nothing of it, nothing changes."""
    monkeypatch.setattr(frustum_volume, "UNSURE", (-2.0, -1.0))  # all cells
    torch.manual_seed(0)
    cascade = waken(Cascade(replace(TINY_CASCADE, half_size_share=1.0)))
    views, tile = plane_views(3, (64, 48))[None], plane_views(4, (64, 48)).cameras[3:]
    tile = crop(tile, 16, 8, (48, 32))

    def found() -> tuple[Tensor, ...]:
        output = cascade(cascade.encode(views), tile)
        return tuple(x.log_probabilities.detach() for x in (*output.coarse, output.distribution))

    trained, (_, rendered, _) = found(), torch.no_grad()(found)()
    assert trained[1].shape == (1, TINY_CASCADE.planes, 4, 6)
    assert (trained[1] - rendered).abs().max() > 1e-3  # cells at the ends see what is around the tile
    torch.nn.init.zeros_(cascade.volume.head.weight)  # similarity alone: every cell by itself
    for at_training, at_rendering in zip(found(), torch.no_grad()(found)(), strict=True):
        torch.testing.assert_close(at_training, at_rendering, atol=1e-4, rtol=1e-4)


def test_depth_at_half_the_size_has_a_loss_of_its_own():
    torch.manual_seed(0)
    cascade = waken(Cascade(replace(TINY_CASCADE, half_size_share=0.7)))
    batch = stack_examples([tiny_example()])
    result = cascade_objective(cascade, batch, LossConfig(mse=0.0, depth_distribution=0.5), seeded(1))
    assert set(result.terms) == {"mse", "depth_distribution", "half_size_distribution", "middle_distribution"}
    (gradient,) = torch.autograd.grad(result.terms["half_size_distribution"], cascade.volume.similarity_gain)
    assert torch.isfinite(gradient).all() and gradient.any()
    double = cascade_objective(cascade, batch, LossConfig(mse=0.0, depth_distribution=1.0), seeded(1))
    name = "half_size_distribution"
    torch.testing.assert_close(double.terms[name], 2 * result.terms[name])
    double.loss.backward()
    for parameter in cascade.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_four_mirrorings_commute_with_mirroring_the_volume():
    torch.manual_seed(0)
    volume = waken(Cascade(TINY_CASCADE)).eval().volume
    x = torch.randn(1, volume.embed.out_features, 5, 10, 12)
    with torch.no_grad():
        for axes in MIRRORED_AXES:
            once, mean = (
                volume._filtered(mirrored(x, axes), number) - mirrored(volume._filtered(x, number), axes)
                for number in (1, 4)
            )
            torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
            assert not axes or once.abs().max() > 1e-2


def test_mirrorings_of_either_quality_are_for_rendering_alone():
    torch.manual_seed(0)
    plain = waken(Cascade(TINY_CASCADE)).eval()
    views, tile = plane_views(3, (64, 48))[None], plane_views(4, (64, 48)).cameras[3:]

    def found(quality: Quality, **changes: int) -> Tensor:
        cascade = Cascade(replace(TINY_CASCADE, **changes)).eval()
        cascade.load_state_dict(plain.state_dict())
        return cascade(cascade.encode(views), tile, quality=quality).distribution.log_probabilities.detach()

    others: dict[Quality, str] = {"full": "mirrorings_fast", "fast": "mirrorings"}
    for quality, other in others.items():
        own = {"full": "mirrorings", "fast": "mirrorings_fast"}[quality]
        with torch.no_grad():
            alone = found(quality)
            torch.testing.assert_close(found(quality, **{other: 4}), alone, atol=0, rtol=0)
            assert (found(quality, **{own: 2}) - alone).abs().max() > 1e-3
        torch.testing.assert_close(found(quality, **{own: 2}), found(quality), atol=0, rtol=0)  # training


def test_depth_at_half_the_size_reaches_samples_at_full_size():
    """Every cell covers 4x4 pixels of the middle stage's and 8x8 of the coarse one's."""
    torch.manual_seed(0)
    cascade = waken(Cascade(TINY_CASCADE)).eval()
    views, tile = plane_views(3, (64, 64))[None], plane_views(4, (64, 64)).cameras[3:]
    with torch.no_grad():
        features = cascade.encode(views)
        output = cascade(features, tile, half_size_depth=True)
        alone = cascade(features, halve(tile))
    assert output.middle is not None and alone.middle is not None
    torch.testing.assert_close(output.distribution.log_probabilities, alone.distribution.log_probabilities)
    torch.testing.assert_close(output.middle.log_weights, alone.middle.log_weights)
    assert output.render.rgb.shape == (1, 3, 64, 64) and output.middle.edges.shape[2:] == (16, 16)

    quantiles = torch.rand(1, 64 * 64, 4).sort(-1).values
    positions, rows = output.middle.draw((64, 64), quantiles)
    at_half = quantiles.unflatten(1, (64, 64))[:, 1::2, ::2].flatten(1, 2)
    expected_positions, expected_rows = alone.middle.draw((32, 32), at_half)
    torch.testing.assert_close(positions[:, :, 1::2, ::2], expected_positions)
    assert torch.equal(rows[:, :, 1::2, ::2], expected_rows)

    pixels, where = pixel_centers((64, 64)), torch.rand(1, 2, 64, 64)
    voxels = VoxelLookup(output.distribution, 64).at(pixels, where)
    torch.testing.assert_close(voxels, VoxelLookup(alone.distribution, 32).at(pixels / 2, where))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"middle_hypotheses": 0},
        {"half_size_share": 0.7},
        {"view_refinement": True, "latent_query": "pixel"},
    ],
)
def test_depth_at_half_the_size_in_tiles_and_batches_is_nearly_the_same(changes, monkeypatch):
    torch.manual_seed(0)
    config = replace(TINY_CASCADE, mirrorings=4, full_size_depth_up_to=1, **changes)
    model = waken(IDNeRF(ModelConfig(cascade=config)), 1).eval()
    views = plane_views(3, (64, 48))
    targets = plane_views(5, (250, 190)).cameras[3:]
    whole = model.render(Views(views.images.expand(2, -1, -1, -1, -1), views.cameras[None][[0, 0]]), targets)
    alone = model.render(views, targets[1])
    assert whole.rgb.shape == (2, 3, 190, 250)
    torch.testing.assert_close(whole.rgb[1], alone.rgb, atol=1e-4, rtol=0)

    def small_tiles(render_tile, target, *, margin, step, **_):
        assert (margin, step) == (64, 64)
        return render_in_tiles(render_tile, target, tile_pixels=200 * 200, margin=margin, step=step)

    monkeypatch.setattr("idnerf.models.idnerf.render_in_tiles", small_tiles)
    tiled = model.render(views, targets[1])
    assert (tiled.rgb - alone.rgb).abs().mean() < 0.02


@pytest.mark.parametrize(("up_to", "at_half"), [(0, False), (50 * 40, False), (50 * 40 - 1, True)])
def test_only_targets_above_a_size_find_depth_at_half_of_it(up_to, at_half, monkeypatch):
    torch.manual_seed(0)
    model = IDNeRF(ModelConfig(cascade=replace(TINY_CASCADE, full_size_depth_up_to=up_to))).eval()
    views, target = plane_views(3, (64, 48)), plane_views(4, (50, 40)).cameras[3]
    seen: list[tuple[int, int]] = []
    volume = type(model.core.volume)
    original = volume.forward
    monkeypatch.setattr(volume, "forward", lambda *a, **k: (seen.append(a[3].size), original(*a, **k))[1])
    output = model.render(views, target)
    assert output.rgb.shape == (3, 40, 50) and torch.isfinite(output.rgb).all()
    assert seen[-1] == ((32, 24) if at_half else (64, 48))  # a multiple of the tile's stride
