"""The ``paper`` configuration: invariances, matching and visibility, masks, gradients, bad input."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from idnerf.compiled import dispatch
from idnerf.errors import InputError
from idnerf.geometry.cameras import crop
from idnerf.geometry.projection import bilinear_lookup
from idnerf.geometry.rays import pixel_centers, rays_at_pixels
from idnerf.models import paper
from idnerf.models.behaviour import Behaviour, PublishedBehaviour
from idnerf.models.gmflow import CELL_OFFSET, PairMaps, view_pairs
from idnerf.models.matching import (
    bilinear_taps,
    corner_products,
    groupwise_cosine,
    lookup_colours,
    matching_cue,
    pair_index,
    reproject,
    weighted_rows,
)
from idnerf.models.paper import PaperConfig, PaperModel
from idnerf.models.radiance_field import RadianceField, fourier_features
from idnerf.models.ray_transformer import RayTransformer
from idnerf.types import Cameras, Views
from matchnerf_cases import SMALL, looking_at_the_middle, random_scene


@pytest.fixture
def model() -> PaperModel:
    torch.manual_seed(0)
    return PaperModel(SMALL)


def pixels_of(target: Cameras, every: int = 37) -> torch.Tensor:
    return pixel_centers(target.size).reshape(-1, 2)[::every].expand(*target.shape, -1, 2)


@pytest.mark.parametrize("views", [2, 3, 5])
@torch.no_grad()
def test_one_set_of_weights_serves_any_number_of_views_in_any_order(views, model, generator):
    source, target = random_scene(1, views, generator)
    order = torch.randperm(views, generator=generator).roll(1)
    ours = model.render_pixels(model.encode(source), target, pixels_of(target))
    permuted = model.render_pixels(model.encode(source[:, order]), target, pixels_of(target))
    assert ours.rgb.std() > 1e-4
    torch.testing.assert_close(permuted.rgb, ours.rgb, atol=1e-4, rtol=0)
    torch.testing.assert_close(permuted.depth, ours.depth, atol=1e-3, rtol=0)


@torch.no_grad()
def test_batch_of_two_equals_two_batches_of_one(model, generator):
    source, target = random_scene(2, 3, generator)
    together = model.render_pixels(model.encode(source), target, pixels_of(target))
    for i in range(2):
        one = slice(i, i + 1)
        alone = model.render_pixels(model.encode(source[one]), target[one], pixels_of(target[one]))
        torch.testing.assert_close(together.rgb[one], alone.rgb, atol=1e-4, rtol=0)
        torch.testing.assert_close(together.opacity[one], alone.opacity, atol=1e-4, rtol=0)


@pytest.mark.parametrize("published", [False, True])
@torch.no_grad()
def test_any_image_size_and_a_tile_equals_its_pixels(published, generator, monkeypatch):
    torch.manual_seed(0)
    aggregation = "concatenate" if published else "symmetric"
    model = PaperModel(replace(SMALL, published_behaviour=published, view_aggregation=aggregation, num_views=2))
    source, target = random_scene(1, 2, generator, size=(70, 50))
    features = model.encode(source)
    tile = crop(target, 31, 20, (7, 5))
    monkeypatch.setattr(paper, "LOOKUPS_PER_CHUNK", 200)
    image = model.render_tile(features, tile)
    assert image.rgb.shape == (1, 3, 5, 7) and image.depth.shape == image.opacity.shape == (1, 5, 7)
    pixels = pixel_centers((7, 5)).reshape(1, -1, 2) + torch.tensor([31.0, 20.0])
    output = model.render_pixels(features, target, pixels)
    torch.testing.assert_close(image.rgb[0].flatten(1).T, output.rgb[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(image.depth.flatten(1), output.depth, atol=1e-3, rtol=0)
    assert (output.rgb >= 0).all() and (output.rgb <= 1).all() and (output.opacity <= 1 + 1e-5).all()


@torch.no_grad()
@pytest.mark.parametrize("published", [False, True])
def test_a_chunk_makes_no_tensor_on_the_host(published, generator, monkeypatch):
    """Where features are looked up by plain operations, as on a GPU, each would be copied there and waited for."""
    monkeypatch.setattr("idnerf.compiled.gradients.chosen", lambda *_: None)
    monkeypatch.setattr("idnerf.compiled.dispatch.usable", lambda *_: False)
    monkeypatch.setattr(paper, "with_taps", lambda reprojection, *_: reprojection)
    monkeypatch.setattr("idnerf.models.matching.with_taps", lambda reprojection, *_: reprojection)
    aggregation = "concatenate" if published else "symmetric"
    config = replace(SMALL, published_behaviour=published, view_aggregation=aggregation, num_views=3)
    model = PaperModel(replace(config, view_refinement=True, latent_query="pixel", latent_size=(6, 6)))
    source, target = random_scene(1, 3, generator)
    features, pixels = model.encode(source), pixels_of(target)
    latent = model.infer_latent(features, target)
    model.render_pixels(features, target, pixels, latent=latent)  # what later chunks find made
    with HostTensors() as found:
        model.render_pixels(features, target, pixels, latent=latent)
    assert found.made == []


class HostTensors(TorchFunctionMode):
    """Notes what is made from Python numbers and lists; a patched ``torch.Tensor`` would not be whole again."""

    def __init__(self):
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.full, torch.Tensor.new_tensor):
            self.made.append(func.__name__)
        if func is torch.Tensor.__getitem__:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.made.extend("index" for part in keys if isinstance(part, list))
        return func(*args, **(kwargs or {}))


def test_host_tensors_are_noticed():
    with HostTensors() as found:
        torch.zeros(3).new_tensor([1.0])
        torch.tensor([1.0])
        torch.full((2,), 0.5)
        torch.zeros(3)[[0, 1]]
        torch.zeros(3)[torch.zeros(3) > 0]
    assert sorted(found.made) == ["full", "index", "new_tensor", "tensor"]


def test_chunks_are_larger_off_the_cpu():
    on_cpu, on_gpu = (paper.lookups_per_chunk(torch.device(name)) for name in ("cpu", "cuda"))
    assert on_gpu >= 16 * on_cpu


def test_what_inference_made_serves_training_too(model, generator, monkeypatch):
    pair_index.cache_clear()
    source, target = random_scene(1, 3, generator)
    with torch.inference_mode():
        model.render_pixels(model.encode(source), target, pixels_of(target))
    assert not pair_index(3, torch.device("cpu")).is_inference()


@torch.no_grad()
def test_moving_turning_and_scaling_the_world_changes_nothing(model, generator):
    source, target = random_scene(1, 3, generator)
    ours = model.render_pixels(model.encode(source), target, pixels_of(target))
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    turn = turn * torch.linalg.det(turn)
    moved = [in_other_world(cameras, turn, 3.0) for cameras in (source.cameras, target)]
    theirs = model.render_pixels(model.encode(Views(source.images, moved[0])), moved[1], pixels_of(target))
    torch.testing.assert_close(theirs.rgb, ours.rgb, atol=1e-3, rtol=0)
    torch.testing.assert_close(theirs.depth, 3 * ours.depth, atol=1e-2, rtol=0)


def in_other_world(cameras: Cameras, turn: torch.Tensor, scale: float) -> Cameras:
    c2w = cameras.c2w.clone()
    c2w[..., :3, :3] = turn @ c2w[..., :3, :3]
    c2w[..., :3, 3] = scale * c2w[..., :3, 3] @ turn.T + torch.tensor([5.0, -2.0, 1.0])
    return replace(cameras, c2w=c2w, near=scale * cameras.near, far=scale * cameras.far)


@pytest.mark.parametrize("scale", ["coarse", "fine"])
def test_similarity_of_a_textured_plane_peaks_at_its_depth_everywhere(scale, generator):
    """Maps are filled with a known texture of the plane; the image's size is no multiple of anything."""
    size, padded, plane_depth = (330, 200), (336, 208), 4.0
    cameras = looking_at_the_middle(torch.tensor([-0.12, 0.13, 0.0]), size)
    sources, target = cameras[None, :2], cameras[None, 2]
    frequencies = torch.randn(2, 16, generator=generator) * 6
    phases = torch.rand(16, generator=generator) * 6.28

    def texture_maps(stride: int) -> torch.Tensor:
        cells = pixel_centers((padded[0] // stride, padded[1] // stride)) * stride - CELL_OFFSET
        rays = rays_at_pixels(sources, cells.reshape(1, 1, -1, 2).expand(1, 2, -1, -1))
        # The plane is z = 0 in a world whose target camera looks along z from z = -4.
        on_plane = rays.origins - rays.directions * (rays.origins[..., 2:] / rays.directions[..., 2:])
        texture = torch.sin(on_plane[..., :2] @ frequencies + phases)
        return texture.reshape(1, 1, 2, *cells.shape[:2], 16)

    maps = PairMaps(texture_maps(8), texture_maps(4), padded)
    fractions = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    u, v = torch.meshgrid(fractions * size[0], fractions * size[1], indexing="xy")
    rays = rays_at_pixels(target, torch.stack([u, v], -1).reshape(1, -1, 2))
    depths = torch.linspace(3.4, 4.6, 61)
    points = rays.origins[:, :, None] + rays.directions[:, :, None] * (depths / rays.cos[..., None])[..., None]
    reprojection = reproject(points.flatten(1, 2), sources, Behaviour())
    assert reprojection.visible.float().mean() > 0.9
    cue = matching_cue(maps, reprojection, (2, 2), Behaviour()).reshape(25, 61, 4)
    columns = slice(0, 2) if scale == "coarse" else slice(2, 4)
    peak = depths[cue[..., columns].mean(-1).argmax(-1)]
    assert (peak - plane_depth).abs().max() < 0.05


def test_points_behind_a_source_camera_are_not_visible_and_count_for_nothing(generator):
    cameras = looking_at_the_middle(torch.tensor([0.0, 3.14159, 0.1]), (48, 32))[None]
    front = torch.tensor([[[0.0, 0.0, 0.3], [0.1, 0.05, 0.5]]])
    behind_the_second = front + torch.tensor([0.0, 0.0, 5.0])
    points = torch.cat([front, behind_the_second], 1)
    reprojection = reproject(points, cameras, Behaviour())
    assert reprojection.visible[0].tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    # The published code takes them for visible, mirrored through the camera's centre.
    as_published = reproject(points, PublishedBehaviour().cameras(cameras), PublishedBehaviour())
    assert as_published.visible.all()

    shape = (1, len(view_pairs(3)), 2, 4, 6, 8)
    maps = PairMaps(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), (48, 32))
    others = PairMaps(*(m.clone() for m in maps.scales), padded_size=(48, 32))
    for of_second in (others.coarse[:, 0], others.coarse[:, 2], others.fine[:, 0], others.fine[:, 2]):
        of_second.normal_(generator=generator)
    ours = matching_cue(maps, reprojection, (2, 2), Behaviour())
    theirs = matching_cue(others, reprojection, (2, 2), Behaviour())
    torch.testing.assert_close(ours[:, 2:], theirs[:, 2:])
    assert (ours[:, :2] - theirs[:, :2]).abs().max() > 1e-3


def test_colours_of_points_are_the_pixels_they_project_to(generator):
    source, _ = random_scene(2, 3, generator)
    chosen = pixel_centers(source.cameras.size).reshape(-1, 2)[5::61].expand(2, -1, 2)
    first = source.cameras[:, 0]
    rays = rays_at_pixels(first, chosen)
    points = rays.origins + 3.7 * rays.directions
    reprojection = reproject(points, source.cameras, Behaviour())
    colours = lookup_colours(source.images.permute(0, 1, 3, 4, 2).contiguous(), reprojection.pixels)
    expected = source.images[:, 0].flatten(2)[:, :, 5::61].transpose(1, 2)
    torch.testing.assert_close(colours[:, 0], expected, atol=1e-3, rtol=0)


def test_groupwise_cosine_is_the_cosine_of_every_block_and_finite_at_zero(generator):
    first, second = torch.randn(2, 5, 7, 12, generator=generator).unbind()
    ours = groupwise_cosine(first, second, 3)
    for group in range(3):
        block = slice(4 * group, 4 * group + 4)
        expected = F.cosine_similarity(first[..., block], second[..., block], dim=-1)
        torch.testing.assert_close(ours[..., group], expected, atol=1e-5, rtol=1e-5)
    zero = torch.zeros(4, requires_grad=True)
    similarity = groupwise_cosine(zero, torch.ones(4), 1)
    similarity.sum().backward()
    assert similarity.item() == 0 and zero.grad is not None and torch.isfinite(zero.grad).all()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_squared_lengths_of_mixtures_come_from_products_of_neighbours(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(1, 1, 1, height, width, 12, generator=generator)
    positions = torch.rand(9, 2, generator=generator) * torch.tensor([width + 2.0, height + 2.0]) - 1
    linear, quadratic = bilinear_taps(positions, (width, height))
    features = weighted_rows(maps.reshape(-1, 12), linear)
    torch.testing.assert_close(features, bilinear_lookup(maps.flatten(0, 2), positions[None])[0])
    lengths = weighted_rows(corner_products(maps, 3)[0, 0, 0], quadratic)
    expected = features.unflatten(-1, (3, -1)).square().sum(-1)
    torch.testing.assert_close(lengths, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_in_chunks_has_the_gradient_of_one_piece(published, compiled, generator, monkeypatch):
    """And so has rendering without gradient the colours of rendering with it: the two take different ways."""
    if compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr(dispatch, "available", lambda: compiled)
    torch.manual_seed(0)
    aggregation = "concatenate" if published else "symmetric"
    model = PaperModel(replace(SMALL, published_behaviour=published, view_aggregation=aggregation))
    source, target = random_scene(2, 3, generator)
    gradients, colours = [], []
    for lookups in (6 * 8192, 2 * 6 * SMALL.samples_per_ray * 5):
        monkeypatch.setattr(paper, "LOOKUPS_PER_TRAINING_CHUNK", lookups)
        model.zero_grad()
        drawn = torch.Generator().manual_seed(3)
        output = model.render_pixels(model.encode(source), target, pixels_of(target), generator=drawn)
        (output.rgb.square().mean() + output.depth.mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        colours.append(output.rgb.detach())
    torch.testing.assert_close(*colours, atol=1e-5, rtol=0)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-3, msg=name)
    with torch.no_grad():
        drawn = torch.Generator().manual_seed(3)
        output = model.render_pixels(model.encode(source), target, pixels_of(target), generator=drawn)
    torch.testing.assert_close(output.rgb, colours[0], atol=1e-5, rtol=0)


def test_fourier_features_are_all_sines_then_all_cosines():
    features = fourier_features(torch.tensor([0.1, 0.2, 0.3]), 2)
    x = torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(features, torch.cat([x, x.sin(), (2 * x).sin(), x.cos(), (2 * x).cos()]))


def test_ray_transformer_ignores_samples_that_do_not_answer(generator):
    torch.manual_seed(0)
    transformer = RayTransformer()
    tokens = torch.randn(3, 10, 16, generator=generator)
    answering = torch.rand(3, 10, generator=generator) < 0.6
    answering[2] = False
    changed = torch.where(answering[..., None], tokens, torch.randn(3, 10, 16, generator=generator))
    ours, theirs = transformer(tokens, None, answering), transformer(changed, None, answering)
    torch.testing.assert_close(ours[answering], theirs[answering], atol=1e-6, rtol=0)
    assert torch.isfinite(ours).all()
    # On a ray that no view sees all samples answer, as if there were no mask.
    torch.testing.assert_close(ours[2], transformer(tokens)[2])
    assert not torch.allclose(ours[0], transformer(tokens)[0], atol=1e-3)


def test_samples_that_do_not_ask_attend_to_all_alike_as_a_masked_softmax_would(generator):
    torch.manual_seed(0)
    transformer = RayTransformer(8, 2)
    tokens = torch.randn(2, 6, 8, generator=generator)
    asking = torch.rand(2, 6, generator=generator) < 0.5
    query, key, value = (
        layer(tokens).reshape(2, 6, 2, 4).transpose(1, 2)
        for layer in (transformer.query, transformer.key, transformer.value)
    )
    scores = (query @ key.transpose(-1, -2) / 2).masked_fill(~asking[:, None, :, None], -1e9)
    attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 6, 8)
    expected = transformer.norm(tokens + transformer.merge(attended))
    torch.testing.assert_close(transformer(tokens, asking), expected, atol=1e-5, rtol=1e-5)


def test_density_of_a_sample_does_not_depend_on_what_unseen_samples_hold(generator):
    torch.manual_seed(0)
    field = RadianceField(5, hidden=16, frequencies=2)
    positions, directions = torch.rand(2, 9, 3, generator=generator), torch.rand(2, 3, generator=generator)
    condition = torch.randn(2, 9, 5, generator=generator)
    seen_by = torch.tensor([[0.0, 0, 1, 2, 3, 2, 1, 0, 0]]).expand(2, -1)
    seen = seen_by > 0
    changed = torch.where(seen[..., None], condition, condition + 1)
    masks = Behaviour().attention_masks(seen_by)
    raw, theirs = (field(positions, directions, c, *masks)[1] for c in (condition, changed))
    torch.testing.assert_close(raw[seen], theirs[seen], atol=1e-5, rtol=0)
    assert (raw[~seen] - theirs[~seen]).abs().max() > 1e-4


@pytest.mark.parametrize("aggregation", ["symmetric", "concatenate"])
def test_finite_gradients_reach_every_parameter(aggregation, generator):
    torch.manual_seed(0)
    model = PaperModel(replace(SMALL, view_aggregation=aggregation))
    source, target = random_scene(2, 3, generator)
    output = model.render_pixels(model.encode(source), target, pixels_of(target, 97), generator=generator)
    (output.rgb.square().mean() + output.depth.mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_black_images_and_rays_that_no_view_sees_give_finite_gradients(model, generator):
    source, target = random_scene(1, 2, generator)
    away = replace(target, c2w=target.c2w * torch.tensor([-1.0, 1, -1, 1]))
    features = model.encode(replace(source, images=torch.zeros_like(source.images)))
    assert not reproject(
        away.centers[:, None] + 4 * away.c2w[:, None, :3, 2], source.cameras, Behaviour()
    ).visible.any()
    output = model.render_pixels(features, away, pixels_of(away, 97))
    output.rgb.mean().backward()
    assert torch.isfinite(output.rgb).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_stratified_samples_stay_in_their_bins_and_follow_the_generator(model, generator):
    _, target = random_scene(2, 2, generator)
    regular = Behaviour().sample_depths(target, 6, 8, None)
    width = (target.far - target.near)[:, None, None] / 8
    drawn = [Behaviour().sample_depths(target, 6, 8, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert ((drawn[0] - regular).abs() <= 0.501 * width).all()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    published = PublishedBehaviour().sample_depths(target, 6, 8, None)
    torch.testing.assert_close(published[:, 0, 0], target.near)
    torch.testing.assert_close(published[:, 0, -1], target.far)


def test_published_behaviour_reads_pixel_centres_as_integers():
    camera = looking_at_the_middle(torch.zeros(1), (48, 32))
    published = PublishedBehaviour()
    ray = rays_at_pixels(published.cameras(camera), torch.tensor([[[0.5, 0.5]]]))
    corner = rays_at_pixels(camera, torch.zeros(1, 1, 2))
    torch.testing.assert_close(ray.directions, corner.directions)
    ends = torch.tensor([[0.5, 0.5], [47.5, 31.5]])
    mapped = published.map_positions(ends, (48, 32), (6, 4))
    torch.testing.assert_close(mapped, torch.tensor([[0.5, 0.5], [5.5, 3.5]]))


def test_matchnerf_has_no_latent(model, generator):
    source, target = random_scene(1, 2, generator)
    assert model.infer_latent(model.encode(source), target) is None


def test_too_few_views_and_views_that_the_weights_do_not_fit_are_refused(model, generator):
    with pytest.raises(InputError, match="2 or more, got 1"):
        model.encode(random_scene(1, 1, generator)[0])
    fixed = PaperModel(replace(SMALL, view_aggregation="concatenate", num_views=3))
    with pytest.raises(InputError, match="expect 3, got 2"):
        fixed.encode(random_scene(1, 2, generator)[0])


@pytest.mark.parametrize(
    "field, value",
    [
        ("samples_per_ray", 0),
        ("num_views", 1),
        ("groups", (3, 8)),
        ("field_skip", 5),
        ("ray_heads", 3),
        ("ray_heads", 0),
        ("field_layers", 1),
        ("hidden", 0),
        ("hidden", 1),
        ("view_heads", 0),
        ("published_behaviour", True),
    ],
)
def test_bad_configuration_is_named(field, value):
    with pytest.raises(InputError, match=f"--model.paper.{field.replace('_', '-')}"):
        PaperConfig(**{field: value})


@pytest.mark.parametrize(
    "change",
    [{"samples_per_ray": 7}, {"channels": 32}, {"transformer_layers": 1}, {"attention_splits": 1},
     {"groups": (4, 4)}, {"hidden": 8}, {"field_layers": 7}, {"field_skip": 2}, {"frequencies": 3},
     {"ray_width": 12}, {"ray_heads": 2},
     {"view_aggregation": "concatenate"}, {"view_aggregation": "concatenate", "num_views": 4},
     {"published_behaviour": True}],
)  # fmt: skip
@torch.no_grad()
def test_every_field_of_the_configuration_changes_the_result(change, generator):
    views = change.get("num_views", 3)
    source, target = random_scene(1, views, generator)
    pixels = pixels_of(target, 211)
    results = []
    plain = replace(SMALL, view_aggregation="concatenate") if "published_behaviour" in change else SMALL
    for config in (plain, replace(plain, **change)):
        torch.manual_seed(0)
        model = PaperModel(config)
        results.append(model.render_pixels(model.encode(source), target, pixels).rgb)
    assert not torch.allclose(*results, atol=1e-6)


def test_map_positions_put_a_cell_where_the_encoder_centres_it():
    for stride in (8, 4):
        cells = pixel_centers((6, 4))
        positions = Behaviour().map_positions(cells * stride - CELL_OFFSET, (6 * stride, 4 * stride), (6, 4))
        torch.testing.assert_close(positions, cells)
