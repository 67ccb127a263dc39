"""Latent inference and view refinement: geometry, invariances, naive references, both configurations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from idnerf.errors import InputError
from idnerf.geometry.cameras import crop, resize
from idnerf.geometry.projection import bilinear_lookup, project, visible
from idnerf.geometry.rays import image_rays, pixel_centers
from idnerf.models.cascade import Cascade, CascadeConfig
from idnerf.models.enlargement import enlarged
from idnerf.models.gmflow import PairMaps, view_pairs
from idnerf.models.idnerf import IDNeRF, ModelConfig, config_from_json, config_to_json
from idnerf.models.latent import (
    LATENT_MIDDLE,
    FrustumLatentInference,
    ImageLatentInference,
    LatentToken,
    TargetLatent,
    latent_cameras,
    ray_maps,
    relative_cameras,
)
from idnerf.models.paper import PaperConfig
from idnerf.models.view_refinement import MapTokens, TokenAttention
from idnerf.rendering.opponent_axes import OPPONENT_AXES, OPPONENT_DEVIATIONS
from idnerf.rendering.renderer import render_in_tiles
from idnerf.training.examples import StepDataset, TileBatch, seeded, stack_examples
from idnerf.training.objectives import LossConfig, objective
from idnerf.types import Cameras, Views
from tiny_cases import (
    TINY_MODELS,
    PlaneScenes,
    cameras_on_a_wall,
    plane_views,
    rotation,
    tiny_example,
    waken,
    with_latent,
)


class ImageLatent(torch.nn.Module):
    """The paper's network with the face that the tests below use."""

    def __init__(self) -> None:
        super().__init__()
        self.network = waken(ImageLatentInference((8, 6)))

    def forward(self, source: Views, target: Cameras) -> TargetLatent:
        return self.network(source.images, source.cameras, target)


class FrustumLatent(torch.nn.Module):
    """The cascade's; stand-in encoder features: each 4x4 block's mean colour and brightness squared."""

    def __init__(self) -> None:
        super().__init__()
        self.network = waken(FrustumLatentInference(4, None, planes=4))

    def forward(self, source: Views, target: Cameras) -> TargetLatent:
        small = F.avg_pool2d(source.images.flatten(0, 1), 4)
        features = torch.cat([small, small.mean(1, keepdim=True).square()], 1)
        features = features.unflatten(0, source.cameras.shape).movedim(2, -1)
        return self.network(self.network.view_maps(source.images, features), source.cameras, target)


NETWORKS = {"image": ImageLatent, "frustum": FrustumLatent}


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def network(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def scene(seed: int = 0, views: int = 3, size: tuple[int, int] = (32, 24)) -> tuple[Views, Cameras]:
    """Source views [1 view] and a target [1]."""
    all_views = plane_views(views + 1, size, seed)
    return all_views[1:][None], all_views.cameras[:1]


# Where the latent lies


def test_cells_of_eight_pixels_cover_the_target_or_a_fixed_grid_spans_it():
    _, target = scene(size=(37, 24))
    cameras, cells = latent_cameras(target, None)
    assert cells == (5, 3) and cameras.size == (40, 24)
    assert torch.equal(cameras.K, target.K)
    assert latent_cameras(target, (64, 64)) == (target, (64, 64))


@pytest.mark.parametrize("size", [None, (10, 6)])
def test_a_ramp_is_read_where_it_lies_from_any_crop_and_size(size, generator):
    _, target = scene(size=(64, 48))
    cameras, (across, down) = latent_cameras(target, size)
    cell = torch.tensor([cameras.width / across, cameras.height / down])
    centres = pixel_centers((across, down)) * cell  # pixel position of every cell
    latent = TargetLatent(torch.cat([centres, centres.flip(-1)], -1).movedim(-1, 0)[None], cameras)
    pixels = torch.rand(1, 50, 2, generator=generator) * torch.tensor([40.0, 30.0]) + 10
    expected = torch.cat([pixels, pixels.flip(-1)], -1)
    torch.testing.assert_close(latent.at(target, pixels), expected, atol=1e-3, rtol=0)
    window = crop(target, 7, 5, (50, 40))
    torch.testing.assert_close(latent.at(window, pixels - torch.tensor([7.0, 5.0])), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(latent.at(resize(target, (32, 24)), pixels / 2), expected, atol=1e-3, rtol=0)


def test_ray_maps_are_the_target_frames_rays_in_units_of_near():
    source, target = scene()
    relative = relative_cameras(source.cameras, target)
    maps = ray_maps(relative)
    assert maps.shape == (1, 3, 6, 24, 32)
    depth = 1.7
    points = maps[:, :, :3] + depth * maps[:, :, 3:]  # target frame, units of near
    rays = image_rays(source.cameras)
    world = rays.origins + depth * target.near[:, None, None, None, None] * rays.directions
    here = target.c2w[0, :3, :3].T @ (world - target.centers).flatten(0, -2).T / target.near
    torch.testing.assert_close(points.movedim(2, 0).flatten(1), here, atol=1e-4, rtol=0)
    own = ray_maps(relative_cameras(target[:, None], target))
    torch.testing.assert_close(own[:, :, :3], torch.zeros_like(own[:, :, :3]), atol=1e-5, rtol=0)


# What both networks promise


@pytest.mark.parametrize("views", [2, 3, 5])
def test_any_number_of_views_one_set_of_weights(network, views):
    latent = network(*scene(views=views))
    assert latent.values.shape[:2] == (1, 4) and torch.isfinite(latent.values).all()
    assert latent.values.std() > 1e-3


def test_latents_start_around_the_middle_of_the_prior():
    torch.manual_seed(0)
    latent = ImageLatentInference((8, 8))
    source, target = scene()
    assert latent(source.images, source.cameras, target).values.mean().item() == pytest.approx(LATENT_MIDDLE, abs=0.6)


def test_the_order_of_the_views_does_not_matter(network):
    source, target = scene(views=4)
    expected = network(source, target).values
    for order in ([1, 0, 2, 3], [3, 2, 1, 0]):
        torch.testing.assert_close(network(source[:, order], target).values, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_equals_its_scenes_one_by_one(network):
    examples = [tiny_example(seed) for seed in (0, 1)]
    batch = stack_examples(examples)
    together = network(batch.source, batch.target.cameras).values
    for i, example in enumerate(examples):
        alone = network(example.source[None], example.target.cameras[None]).values
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_training_and_evaluation_agree_at_batch_one(network):
    """What batch normalisation would not do."""
    example = scene()
    evaluated = network(*example).values
    network.train()
    trained = network(*example).values
    network.eval()
    assert torch.equal(trained, evaluated)


def test_moving_and_scaling_the_world_changes_nothing(network):
    source, target = scene()
    expected = network(source, target).values
    scale, motion = 3.5, torch.eye(4)
    motion[:3, :3] = rotation(0.5, -1.2)
    motion[:3, 3] = torch.tensor([4.0, -1.0, 2.0])

    def move(cameras: Cameras) -> Cameras:
        c2w = cameras.c2w.clone()
        c2w[..., :3, 3] *= scale
        return replace(cameras, c2w=motion @ c2w, near=cameras.near * scale, far=cameras.far * scale)

    moved = network(Views(source.images, move(source.cameras)), move(target)).values
    # a lookup on the very edge of a source may flip its visibility
    assert ((moved - expected).abs() < 1e-3).float().mean() > 0.95


def test_every_weight_gets_a_finite_gradient(network):
    network(*scene()).values.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    network.zero_grad()


# The cascade's network


def test_a_tile_of_the_target_has_the_tile_of_its_latent():
    """No pixel sees the image's size, so cells whose convolutions stay inside agree: tiles would show no seams."""
    torch.manual_seed(0)
    network = FrustumLatent().eval()
    source, _ = scene(size=(96, 96))
    target = cameras_on_a_wall(1, (160, 128), torch.Generator().manual_seed(3))
    whole = network(source, target).values
    tile = network(source, crop(target, 32, 16, (96, 80))).values  # cells 4..16 x 2..12
    reach = 3  # three 3x3 convolutions
    inside = (..., slice(reach, -reach), slice(reach, -reach))
    torch.testing.assert_close(tile[inside], whole[:, :, 2:12, 4:16][inside], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plane", [0, 2, 5])
def test_views_agree_on_the_plane_where_the_surface_is(plane, generator):
    """Maps of a textured plane are looked up at the same place from all views on its own plane of the sweep."""
    planes, width = 6, 8
    target = replace(cameras_on_a_wall(1, (64, 48), generator), c2w=torch.eye(4)[None])
    source = cameras_on_a_wall(3, (256, 192), generator)
    depth = 1 / (1 / target.near + (plane + 0.5) / planes * (1 / target.far - 1 / target.near))
    rays = image_rays(resize(source, (64, 48)))
    points = rays.origins + rays.directions * ((depth - rays.origins[..., 2:]) / rays.directions[..., 2:])
    maps = (points[..., :2] @ (torch.randn(2, width, generator=generator) * 3)).sin()
    network = FrustumLatentInference(width, None, planes, width)
    taken = []
    network.on_plane.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    network(F.pad(maps, (0, 3))[None], source[None], target)  # no colours
    looked_up, origins, directions = taken[0].unflatten(2, (planes, -1)).split([width, 3, 3], -1)
    spread = looked_up.var(1).sum(-1)[0]
    here = (pixel_centers((8, 6)).flatten(0, 1) * 8 - target.K[0, :2, 2]) / target.K[0, [0, 1], [0, 1]]
    points = F.pad(here, (0, 1), value=1.0) * depth
    seen = visible(*project(points.expand(3, -1, -1), source), source.size).all(0)
    assert seen.float().mean() > 0.3
    assert (spread.argmin(0) == plane)[seen].float().mean() > 0.95
    # the rays that come with them pass through the sweep's points
    along = F.normalize(points / target.near - origins[0, :, plane], dim=-1)
    torch.testing.assert_close(along, directions[0, :, plane], atol=1e-4, rtol=0)


def test_before_training_the_latent_is_the_colour_that_the_views_agree_on():
    """A block colour's deviation along each opponent axis is one unit of the prior, the middle of it grey."""
    torch.manual_seed(0)
    network = FrustumLatentInference(4, None)
    source, target = scene(size=(64, 48))
    colour = torch.tensor([0.8, 0.5, 0.3])
    images = colour[:, None, None].expand(1, 3, 3, 48, 64)
    features = torch.randn(1, 3, 12, 16, 4)
    values = network(network.view_maps(images, features), source.cameras, target).values
    along = OPPONENT_AXES @ (2 * colour - 1) / OPPONENT_DEVIATIONS
    assert (values[0, 3] == LATENT_MIDDLE).all()  # the fourth channel says nothing yet
    expected = LATENT_MIDDLE + along[:, None, None].expand_as(values[0, :3]) / 2
    close = ((values[0, :3] - expected).abs() < 1e-3).all(0)
    assert close.float().mean() > 0.5  # cells that some view looks at


def test_the_encoder_learns_nothing_from_the_latent():
    network = FrustumLatentInference(4, None)
    features = torch.randn(1, 2, 6, 8, 4, requires_grad=True)
    network.view_maps(torch.rand(1, 2, 3, 24, 32), features).sum().backward()
    assert features.grad is None


def test_a_point_reads_the_same_place_at_any_depth(generator):
    """The latent lies in the target's image plane."""
    _, target = scene(size=(64, 48))
    latent = TargetLatent(torch.randn(1, 4, 6, 8, generator=generator), latent_cameras(target, None)[0])
    rays = image_rays(target)
    near, far = (
        latent.at(target, project((rays.origins + t * rays.directions).flatten(1, 2)[:, 700:710], target)[0])
        for t in (1.0, 7.0)
    )
    torch.testing.assert_close(near, far, atol=1e-3, rtol=0)


# Tokens


def test_attention_equals_the_matrix_product(generator):
    attention = waken(TokenAttention(8, 4, 4))
    tokens = torch.randn(2, 4, 50, 8, generator=generator)
    answering = torch.rand(2, 4, 50, generator=generator) < 0.7
    answering[:, 0] = True
    q, k, v = (x.unflatten(-1, (4, 4)).permute(0, 2, 3, 1, 4) for x in attention.to_qkv(tokens).chunk(3, -1))
    mask = answering.transpose(1, 2)[:, :, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).permute(0, 3, 1, 2, 4).flatten(-2)
    torch.testing.assert_close(attention(tokens, answering), attention.norm(tokens + attention.merge(mixed)))


def test_tokens_are_views_and_silent_ones_change_nothing(generator):
    attention = waken(TokenAttention())
    tokens = torch.randn(1, 3, 20, 8, generator=generator)
    everyone = torch.ones(1, 3, 20, dtype=torch.bool)
    result = attention(tokens, everyone)
    torch.testing.assert_close(attention(tokens[:, [2, 0, 1]], everyone), result[:, [2, 0, 1]])
    silent = everyone.clone()
    silent[:, 2] = False
    changed = tokens.clone()
    changed[:, 2] = 100.0
    torch.testing.assert_close(attention(changed, silent)[:, :2], attention(tokens, silent)[:, :2])
    torch.testing.assert_close(attention(tokens, silent)[:, :2], attention(tokens[:, :2], everyone[:, :2]))
    assert torch.isfinite(attention(tokens, torch.zeros_like(everyone))).all()


@pytest.mark.parametrize("views", [2, 3, 4])
def test_view_tokens_equal_features_looked_up_first(views, generator):
    """Mapping the maps and then looking up is looking up and then mapping the mean over the partners."""
    channels, width, points = 6, 5, 30
    pairs = view_pairs(views)
    coarse = torch.randn(1, len(pairs), 2, 4, 5, channels, generator=generator)
    fine = torch.randn(1, len(pairs), 2, 8, 10, channels, generator=generator)
    tokens = MapTokens(channels, width)
    maps = tokens.maps(PairMaps(coarse, fine, (40, 32)))
    for linear, scale, ours in zip((tokens.of_coarse, tokens.of_fine), (coarse, fine), maps, strict=True):
        positions = torch.rand(1, points, 2, generator=generator) * 4
        for view in range(views):
            partners = [scale[:, p, m] for p, pair in enumerate(pairs) for m, v in enumerate(pair) if v == view]
            assert len(partners) == views - 1
            expected = linear(torch.stack([bilinear_lookup(x, positions) for x in partners]).mean(0))
            torch.testing.assert_close(bilinear_lookup(ours[:, view].contiguous(), positions), expected)


def test_a_pixel_reads_its_own_four_cells_and_global_reads_all(generator):
    _, target = scene(size=(64, 48))
    z = torch.randn(1, 4, 6, 8, generator=generator, requires_grad=True)
    latent = TargetLatent(z, target)
    pixels = torch.tensor([[[30.0, 21.0], [5.0, 40.0]]])
    token = LatentToken("pixel", 8)(latent, target, pixels)
    gradient = torch.autograd.grad(token[0, 0].sum(), z)[0].abs().sum((0, 1))
    assert gradient.nonzero().tolist() == [[2, 3], [2, 4], [3, 3], [3, 4]] or (gradient > 0).sum() == 4
    token = LatentToken("global", 8)(latent, target, pixels)
    assert torch.equal(token[0, 0], token[0, 1])
    assert (torch.autograd.grad(token[0, 0].sum(), z)[0] != 0).all()


# In the model


CONFIGURATIONS = ("cascade", "paper")
QUERIES = ("none", "global", "pixel")


def awake(configuration: str, query: str) -> IDNeRF:
    torch.manual_seed(0)
    return waken(IDNeRF(with_latent(configuration, query))).eval()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("query", QUERIES)
def test_refined_pictures_of_any_number_of_views_in_any_order(configuration, query):
    model = awake(configuration, query)
    for views in (2, 4):
        example = tiny_example(num_sources=views, size=(24, 20))
        picture = model.render(example.source, example.target.cameras)
        assert torch.isfinite(picture.rgb).all() and picture.rgb.std() > 0
        swapped = model.render(example.source[[1, 0, *range(2, views)]], example.target.cameras)
        torch.testing.assert_close(swapped.rgb, picture.rgb, atol=1e-4, rtol=0)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("query", ["global", "pixel"])
def test_a_given_latent_takes_the_place_of_the_inferred_one(configuration, query):
    """The hook that measures what the latent does: zeros, or another scene's."""
    model = awake(configuration, query)
    example = tiny_example(size=(24, 20))
    source, target = example.source[None], example.target.cameras[None]
    features = model.encode(source)
    own = model.infer_latent(features, target)
    assert own is not None
    expected = model.render_target(features, target).rgb
    assert torch.equal(model.render_target(features, target, latent=own).rgb, expected)
    without = model.render_target(features, target, latent=own.with_values(torch.zeros_like(own.values))).rgb
    assert (without - expected).abs().max() > 1e-4


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_latent_is_inferred_once_for_all_tiles(configuration, monkeypatch):
    model = awake(configuration, "pixel")
    views = plane_views(3, (24, 20))
    target = replace(views.cameras[0], size=(48, 44))
    calls = []
    infer = type(model.core).infer_latent
    monkeypatch.setattr(
        type(model.core), "infer_latent", lambda self, f, t: (calls.append(t.size), infer(self, f, t))[1]
    )
    whole = model.render(views[1:], target)
    assert calls == [(48, 44)]
    monkeypatch.setattr(
        "idnerf.models.idnerf.render_in_tiles",
        lambda render, t, **_: render_in_tiles(render, t, tile_pixels=1200, margin=8),
    )
    tiled = model.render(views[1:], target)
    assert calls == [(48, 44)] * 2
    if configuration == "paper":  # rays know nothing of their tile
        torch.testing.assert_close(tiled.rgb, whole.rgb, atol=1e-4, rtol=0)


@pytest.mark.parametrize("enlarged_share", [0.0, 1.0])
@pytest.mark.parametrize("query", ["global", "pixel"])
def test_training_on_tiles_reads_the_latent_that_rendering_reads(query, enlarged_share):
    """`global` reads all of it, so training must infer it for the whole target that the tile was cut from."""
    torch.manual_seed(0)
    model = waken(IDNeRF(with_latent("cascade", query)))
    scenes = StepDataset(PlaneScenes((64, 48)), seed=0, batch_size=2, source_views=(3, 3), tile=(32, 24), augment=True)
    batch = scenes[0].to("cpu")
    assert isinstance(batch, TileBatch) and batch.whole.size == (64, 48)
    result = objective(
        model, batch, LossConfig(), seeded(0), rays_per_step=1, fast_share=0.0, enlarged_share=enlarged_share
    )
    assert result.latent.cameras.size == ((64, 48) if query == "global" else (32, 24))
    source = enlarged(batch.source) if enlarged_share else batch.source
    features = model.core.encode(source)
    whole = model.core.infer_latent(features, batch.whole)
    if query == "global":
        read = model.core.view_refinement.read
        trained, rendered = (read(latent, batch.target.cameras) for latent in (result.latent, whole))
        torch.testing.assert_close(trained, rendered)


def test_whole_targets_are_not_cut_from_anything():
    scenes = StepDataset(PlaneScenes(), seed=0, batch_size=1, source_views=(2, 2), tile=None, augment=False)
    assert not isinstance(scenes[0], TileBatch)


def test_refinement_starts_silent_in_the_cascade():
    """Weights trained without it give the same picture with it, until it has learnt something."""
    example = tiny_example()
    torch.manual_seed(3)
    plain = waken(Cascade(TINY_MODELS["cascade"].cascade)).eval()
    refined = Cascade(with_latent("cascade", "pixel").cascade).eval()
    missing = refined.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith(("latent.", "view_refinement.")) for key in missing.missing_keys)
    with torch.no_grad():
        ours, theirs = (
            core.render_tile(core.encode(example.source[None]), example.target.cameras[None])
            for core in (refined, plain)
        )
    assert torch.equal(ours.rgb, theirs.rgb) and torch.equal(ours.depth, theirs.depth)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_without_refinement_nothing_is_added(configuration):
    names = IDNeRF(TINY_MODELS[configuration]).state_dict()
    assert not [name for name in names if "latent" in name or "view_refinement" in name or ".tokens." in name]


def test_parts_shared_with_the_plain_cascade_start_alike():
    """So that runs of an ablation differ by what is compared, not by chance."""
    states = []
    for config in (TINY_MODELS["cascade"], with_latent("cascade", "pixel")):
        torch.manual_seed(7)
        states.append(IDNeRF(config).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_weights_and_config_with_a_latent_round_trip(configuration, tmp_path):
    for size in (None, (6, 5)):
        config = with_latent(configuration, "pixel")
        config = replace(config, **{configuration: replace(getattr(config, configuration), latent_size=size)})
        assert config_from_json(config_to_json(config)) == config
    model = IDNeRF(config)
    model.save(tmp_path / "weights.safetensors", half=False)
    read = IDNeRF.from_pretrained(tmp_path / "weights.safetensors")
    assert read.config == config
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())


def test_both_configurations_stay_under_six_million_parameters():
    for config in (
        ModelConfig("cascade", cascade=CascadeConfig(view_refinement=True, latent_query="global")),
        ModelConfig("paper", paper=PaperConfig(view_refinement=True, latent_query="global")),
    ):
        assert sum(p.numel() for p in IDNeRF(config).parameters()) < 6_000_000


@pytest.mark.parametrize("kind", [CascadeConfig, PaperConfig])
def test_options_that_do_not_fit_are_named(kind):
    for change, named in (
        ({"latent_query": "pixel"}, "view-refinement"),
        ({"latent_size": (0, 8)}, "latent-size"),
        ({"view_width": 0}, "view.width"),
    ):
        with pytest.raises(InputError, match=named) as error:
            kind(**change)
        assert "\n" not in str(error.value)
