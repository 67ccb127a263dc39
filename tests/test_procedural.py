"""Procedural scenes: exact depth against analytic cases, agreement between views, determinism, round trips."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from idnerf.data.procedural import test_set
from idnerf.data.procedural.builder import BOX, CYLINDER, ELLIPSOID, SHAPES, SceneBuilder, random_rotation
from idnerf.data.procedural.camera_effects import blur, compress, photograph, sharpen, through_jpeg, vignette
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.dataset import ProceduralDataset
from idnerf.data.procedural.files import OPENCV_TO_OPENGL, save_scene
from idnerf.data.procedural.generate import (
    cast_shadows,
    depth_ranges,
    end_rays,
    generate_scene,
    render_view,
    rotated_grid,
)
from idnerf.data.procedural.layout import draw_place, draw_world
from idnerf.data.procedural.pool import pack_scene, unpack_scene
from idnerf.data.procedural.primitives import relief_depth, sheet_depth
from idnerf.data.procedural.raster import Pinhole, canonical_frames, find_candidates, first_hits
from idnerf.data.procedural.rigs import draw_rig
from idnerf.data.procedural.themes import INTERIOR, OBJECTS
from idnerf.data.seen import count_seen
from idnerf.errors import InputError
from idnerf.geometry.projection import bilinear_lookup, project, visible
from idnerf.geometry.rays import image_rays, pixel_centers, unproject
from idnerf.training.procedural_scenes import HELD_OUT_SEED
from idnerf.types import Cameras

SMALL = ProceduralConfig(size=(48, 36), num_views=3, supersample=1)


def pinhole(size: tuple[int, int] = (64, 48)) -> Pinhole:
    K = torch.tensor([[60.0, 0, size[0] / 2], [0, 60.0, size[1] / 2], [0, 0, 1]])
    return Pinhole(torch.eye(4), K, size)


def trace(builder: SceneBuilder, camera: Pinhole, reliefs: torch.Tensor | None = None) -> torch.Tensor:
    """Depth image of the primitives of a builder, inf where there is nothing."""
    primitives, _ = builder.build()
    maps = torch.ones(11, 8, 8), torch.zeros(1, 8, 8) if reliefs is None else reliefs
    frames, candidates = canonical_frames(primitives, camera), find_candidates(primitives, camera)
    depth, _ = first_hits(primitives, frames, candidates, camera.size, (0.5, 0.5), *maps)
    return depth.reshape(camera.size[1], camera.size[0])


def new_builder(seed: int = 0) -> SceneBuilder:
    return SceneBuilder(["noise"], random.Random(seed), 0.5)


def as_cameras(camera: Pinhole) -> Cameras:
    return Cameras(camera.c2w, camera.K, camera.size, torch.tensor(0.1), torch.tensor(100.0))


def test_depth_of_a_sphere_is_analytic():
    builder, camera = new_builder(), pinhole()
    center, radius = torch.tensor([0.2, -0.1, 5.0]), 1.3
    builder.add_body(center.numpy(), random_rotation(random.Random(3)), (radius,) * 3, ELLIPSOID, 0)
    rays = image_rays(as_cameras(camera))
    b = (rays.directions * center).sum(-1)
    discriminant = b**2 - center @ center + radius**2
    expected = torch.where(discriminant > 0, (b - discriminant.clamp_min(0).sqrt()) * rays.cos, torch.inf)
    depth = trace(builder, camera)
    grazing = discriminant.abs() < 1e-3
    assert (torch.isfinite(expected) & ~grazing).sum() > 300
    torch.testing.assert_close(depth[~grazing], expected[~grazing], rtol=1e-5, atol=1e-4)


def test_depth_of_a_box_face_is_its_distance():
    builder, camera = new_builder(), pinhole()
    builder.add_body((0.0, 0.0, 4.0), np.eye(3), (0.8, 0.5, 1.0), BOX, 0)
    depth = trace(builder, camera)
    u, v = pixel_centers(camera.size).unbind(-1)
    on_face = ((u - 32).abs() / 60 * 3 < 0.8) & ((v - 24).abs() / 60 * 3 < 0.5)
    assert on_face.sum() > 300
    torch.testing.assert_close(depth[on_face], torch.full_like(depth[on_face], 3.0))
    assert torch.isinf(depth[~on_face]).all()


def test_thin_distant_cylinder_is_found_where_it_is():
    builder, camera = new_builder(), pinhole((640, 48))
    builder.add_body((0.0, 0.0, 50.0), np.eye(3)[:, [1, 2, 0]], (0.5, 0.5, 30.0), CYLINDER, 0)
    hit = torch.isfinite(trace(builder, camera))
    rows = hit[:, 320].nonzero()[:, 0]
    assert rows.tolist() == [23, 24]  # 1 unit at distance 50, focal 60: 1.2 pixels about the middle row
    # Its front edges end half a radius off: |u - 320| = 60 * 30 / 49.5 at most.
    assert 2 * 35 <= hit[23].sum() <= 2 * 37


@pytest.mark.parametrize("seed", range(6))
def test_boolean_difference_equals_point_membership(seed):
    """Walk along every ray in small steps: the first point in A and not in B."""
    rng = random.Random(seed)
    builder, camera = new_builder(), pinhole((24, 18))
    camera = Pinhole(camera.c2w, torch.tensor([[22.0, 0, 12], [0, 22.0, 9], [0, 0, 1]]), camera.size)
    bodies = []
    for center in ((0.0, 0.0, 3.0), (rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6), rng.uniform(2.2, 3.0))):
        half = np.array([rng.uniform(0.5, 1) for _ in range(3)])
        bodies.append((np.array(center), random_rotation(rng), half, rng.choice(SHAPES)))
    (a, b) = bodies
    builder.add_carved(a[0], a[1], a[2], a[3], 0, *b)

    def contains(body, points: torch.Tensor) -> torch.Tensor:
        center, rotation, half, (qa, qb, qe) = body
        x, y, z = (((points - torch.tensor(center)) @ torch.tensor(rotation)) / torch.tensor(half)).unbind(-1)
        inside_box = (x.abs() <= 1) & (y.abs() <= 1) & (z.abs() <= 1)
        return inside_box & (qa * (x * x + y * y) + qb * z * z + qe * z <= 1)

    step = 2e-3
    z = torch.arange(0.5, 6, step, dtype=torch.float64)
    u, v = pixel_centers(camera.size).double().unbind(-1)
    directions = torch.stack([(u - 12) / 22, (v - 9) / 22, torch.ones_like(u)], -1)
    points = directions[..., None, :] * z[:, None]
    member = contains(a, points) & ~contains(b, points)
    expected = torch.where(member.any(-1), z[member.int().argmax(-1)], torch.inf)
    depth = trace(builder, camera).double()
    agree = (depth == expected) | ((depth - expected).abs() <= 2 * step)
    assert torch.isfinite(expected).sum() > 20
    # A sliver thinner than a step can be missed by the reference.
    assert agree.float().mean() > 0.99


def test_flat_sheet_hit_and_outline():
    builder = new_builder()
    camera = pinhole()
    builder.add_sheet((0.0, 0.0, 4.0), np.eye(3), 1.0, 0.5, (0.0, 0.0), "square", 0)
    depth = trace(builder, camera)
    u, v = pixel_centers(camera.size).unbind(-1)
    inside = ((u - 32).abs() < 15) & ((v - 24).abs() < 7.5)
    torch.testing.assert_close(depth[inside], torch.full_like(depth[inside], 4.0))
    assert torch.isinf(depth[~inside]).all()


def test_bent_sheet_hit_satisfies_its_equation(generator):
    o = torch.randn(3, 500, generator=generator) * 0.3 - torch.tensor([0, 0, 3.0])[:, None]
    d = torch.randn(3, 500, generator=generator) * 0.2 + torch.tensor([0, 0, 1.0])[:, None]
    shape = torch.stack([torch.rand(500, generator=generator) - 0.5 for _ in range(2)] + [torch.zeros(500)])
    shape[:, :100] = 0
    depth = sheet_depth(o, d, shape, torch.zeros(500), torch.ones(1, 8, 8))
    hit = torch.isfinite(depth)
    assert hit[:100].any() and hit.sum() > 200
    x, y, z = (o + depth * d)[:, hit]
    torch.testing.assert_close(z, shape[0, hit] * x**2 + shape[1, hit] * y**2, atol=1e-5, rtol=0)
    assert (x.abs() <= 1).all() and (y.abs() <= 1).all()


def test_sloping_relief_is_a_plane(generator):
    size = 64
    slope = ((torch.arange(size) + 0.5) / size).expand(size, size)[None].contiguous()
    o = torch.stack([torch.rand(300, generator=generator) - 0.5 for _ in range(2)] + [torch.full((300,), 3.0)])
    d = torch.randn(3, 300, generator=generator) * 0.1 - torch.tensor([0, 0, 1.0])[:, None]
    endless = torch.full((300,), torch.inf)
    depth = relief_depth(o, d, torch.zeros(3, 300), torch.zeros(300), endless, slope)
    # Height h = u, that is z = x: o_z + t d_z = o_x + t d_x.
    expected = (o[2] - o[0]) / (d[0] - d[2])
    x, y, _ = o + expected * d
    inside = (x.abs() < 0.95) & (y.abs() < 0.95)
    assert inside.sum() > 150
    torch.testing.assert_close(depth[inside], expected[inside], atol=1e-3, rtol=0)


def test_same_seed_same_scene_and_other_seed_another():
    a, b, c = (generate_scene(seed, SMALL) for seed in (4, 4, 5))
    torch.testing.assert_close(a.views.images, b.views.images, rtol=0, atol=0)
    torch.testing.assert_close(a.depth, b.depth, rtol=0, atol=0)
    torch.testing.assert_close(a.views.cameras.c2w, b.views.cameras.c2w, rtol=0, atol=0)
    assert a.name == b.name != c.name
    assert (a.views.images - c.views.images).abs().mean() > 0.02


def slopes_too_much(depth: torch.Tensor) -> torch.Tensor:
    """Pixels whose 3x3 neighbourhood spans more than 2 % of inverse depth: edges, and surfaces nearly on edge."""
    inverse = 1 / depth[None]
    high = torch.nn.functional.max_pool2d(inverse, 3, 1, 1)
    low = -torch.nn.functional.max_pool2d(-inverse, 3, 1, 1)
    return ((high - low) / high > 0.02)[0]


@pytest.mark.parametrize("rig", ["forward", "inward"])
def test_neighbour_warped_by_exact_depth_agrees_above_30_db(rig):
    """In the median scene; gloss and reflections move from view to view in some."""
    psnr, share = zip(*(warp_agreement(seed, rig) for seed in range(1, 5)), strict=True)
    assert np.median(psnr) > 32 and min(psnr) > 28
    assert np.median(share) > 0.25


def warp_agreement(seed: int, rig: str) -> tuple[float, float]:
    """PSNR of a view looked up in its nearest neighbour, where both see the point (depths agree to 0.5 %), away from
    edges (``slopes_too_much``); share of the pixels compared."""
    scene = generate_scene(seed, ProceduralConfig(size=(192, 144), num_views=6, rig=rig, photo=0.0))
    cameras = scene.views.cameras
    distance = torch.linalg.vector_norm(cameras.centers - cameras.centers[0], dim=-1)
    other = int(distance[1:].argmin()) + 1
    pixels, z = project(unproject(cameras[0], scene.depth[0]).reshape(-1, 3), cameras[other])
    edge = slopes_too_much(scene.depth[other]).float()
    image = scene.views.images[other].permute(1, 2, 0)
    looked_up = bilinear_lookup(
        torch.cat([image, scene.depth[other][..., None], edge[..., None]], -1)[None], pixels[None]
    )[0]
    same = visible(pixels, z, cameras.size) & ((looked_up[:, 3] / z - 1).abs() < 0.005)
    same &= (looked_up[:, 4] == 0) & ~slopes_too_much(scene.depth[0]).reshape(-1)
    error = looked_up[same, :3] - scene.views.images[0].permute(1, 2, 0).reshape(-1, 3)[same]
    return -10 * math.log10(float((error**2).mean())), float(same.float().mean())


@pytest.mark.parametrize("rig", ["forward", "inward", "mixed"])
def test_scenes_are_finite_within_range_and_overlap(rig):
    shares = []
    for seed in range(3):
        scene = generate_scene(seed, ProceduralConfig(size=(64, 48), num_views=6, rig=rig, supersample=1))
        images, cameras, depth = scene.views.images, scene.views.cameras, scene.depth
        assert images.shape == (6, 3, 48, 64) and depth.shape == (6, 48, 64)
        assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
        assert images.std() > 0.02
        near, far = cameras.near[:, None, None], cameras.far[:, None, None]
        assert torch.isfinite(depth).all() and (near > 0).all()
        # Sky and backdrops may lie beyond far; nothing lies before near.
        assert (near < depth).all() and (near < far).all()
        orthonormal = cameras.c2w[:, :3, :3] @ cameras.c2w[:, :3, :3].transpose(1, 2)
        torch.testing.assert_close(orthonormal, torch.eye(3).expand(6, 3, 3), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.linalg.det(cameras.c2w), torch.ones(6), atol=1e-4, rtol=0)
        seen = count_seen(cameras[1:], depth[1:], cameras[0], depth[0])
        shares.append(float((seen >= 2).float().mean()))
        assert scene.name.startswith("procedural-") and (rig == "mixed" or rig in scene.name)
    assert np.mean(shares) > (0.7 if rig == "forward" else 0.5)


def test_complexity_adds_primitives():
    def count(complexity: float) -> float:
        total = 0
        for seed in range(3):
            rng = random.Random(seed)
            rig = draw_rig("mixed", (64, 48), 4, rng)
            total += len(draw_world(rig, complexity, rng, torch.Generator().manual_seed(seed)).primitives)
        return total / 3

    assert 2 * count(0.0) < count(0.5) < 0.8 * count(1.0)


def test_rendering_creates_no_tensor_on_the_default_device():
    """All tensors follow the scene's device: a default device without data would break any that do not."""
    rng = random.Random(1)
    rig = draw_rig("mixed", (48, 36), 2, rng)
    world = draw_world(rig, 0.9, rng, torch.Generator().manual_seed(1))
    expected = render_view(cast_shadows(world), rig.cameras[0], 2)
    with torch.device("meta"):
        rendered = render_view(cast_shadows(world), rig.cameras[0], 2)
    torch.testing.assert_close(rendered, expected)


def test_supersampling_changes_edges_only_and_no_depth():
    one = generate_scene(3, ProceduralConfig(size=(64, 48), num_views=2, supersample=1, photo=0.0))
    two = generate_scene(3, ProceduralConfig(size=(64, 48), num_views=2, supersample=2, photo=0.0))
    torch.testing.assert_close(one.depth, two.depth)
    differs = ((one.views.images - two.views.images).abs().amax(1) > 0.03).float().mean()
    assert 0.005 < differs < 0.6


def test_photographic_effects_grow_with_strength_and_keep_the_picture(generator):
    clean = torch.rand(3, 3, 40, 50, generator=generator) * 0.6 + 0.2
    errors = []
    for strength in (0.1, 1.0, 4.0):
        draws = [
            photograph(clean, strength, random.Random(seed), torch.Generator().manual_seed(seed)) for seed in range(8)
        ]
        errors.append(float(torch.stack([(image - clean).abs().mean() for image in draws]).mean()))
        assert all(image.min() >= 0 and image.max() <= 1 for image in draws)
    assert 1e-4 < errors[0] < errors[1] < errors[2] < 0.3


def test_jpeg_changes_little_less_at_higher_quality_and_always_alike(generator):
    smooth = blur(torch.rand(2, 3, 48, 64, generator=generator) * 0.6 + 0.2, 0.8)
    errors = [float((through_jpeg(smooth, q, 0) - smooth).square().mean().sqrt()) for q in (75, 90, 98)]
    assert 0.05 > errors[0] > errors[1] > errors[2] > 0
    torch.testing.assert_close(through_jpeg(smooth, 80, 2), through_jpeg(smooth, 80, 2), rtol=0, atol=0)
    chosen = [not torch.equal(compress(smooth, 1.0, random.Random(seed)), smooth) for seed in range(60)]
    assert 18 < sum(chosen) < 42


def test_sharpening_and_vignetting_leave_flat_surfaces_and_the_middle():
    flat = torch.full((1, 3, 9, 9), 0.4)
    torch.testing.assert_close(sharpen(flat, 0.5), flat)
    step = torch.cat([torch.full((1, 3, 8, 8), 0.3), torch.full((1, 3, 8, 8), 0.6)], -1)
    edge = sharpen(step, 0.5)[0, 0, 4]
    assert edge[7] < 0.3 and edge[8] > 0.6 and edge[0] == pytest.approx(0.3, abs=1e-5)
    gain = vignette(flat, 0.2)
    assert gain[4, 4] == 1 and gain[0, 0] == pytest.approx(0.8) and gain.amin() == gain[0, 0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rotated_grid_has_one_ray_per_row_column_and_cell(n):
    places = torch.tensor(rotated_grid(n), dtype=torch.float64)
    assert places.shape == (n * n, 2)
    for axis in (0, 1):
        expected = (torch.arange(n * n, dtype=torch.float64) + 0.5) / n**2
        torch.testing.assert_close(places[:, axis].sort().values, expected)
    assert len({(int(x * n), int(y * n)) for x, y in places.tolist()}) == n * n


@pytest.mark.parametrize("maker", [*OBJECTS, *INTERIOR], ids=lambda maker: maker.__name__)
def test_every_object_fits_about_its_size_with_proper_frames(maker):
    families = ["noise", "leaf", "petal", "white", "plain", "glyph"]
    for seed in range(3):
        builder = SceneBuilder(families, random.Random(seed), 0.7)
        maker(builder, np.array([0.0, 0.0, 3.0]), 0.5)
        primitives, materials = builder.build()
        assert len(builder) >= 1 and torch.isfinite(materials).all() and (primitives.half > 0).all()
        eye = torch.eye(3).expand(len(primitives.rotation), 3, 3)
        torch.testing.assert_close(primitives.rotation @ primitives.rotation.mT, eye, atol=1e-5, rtol=0)
        assert (torch.linalg.det(primitives.rotation) > 0.99).all()
        assert primitives.material.amax() < len(materials)


def test_plain_backdrops_are_common_before_inward_rigs_and_rare_before_forward_ones():
    for kind, low, high in (("inward", 0.25, 0.45), ("forward", 0.02, 0.12)):
        rig = draw_rig(kind, (32, 24), 2, random.Random(0))
        drawn = [draw_place(rig, random.Random(seed)) for seed in range(400)]
        assert low < np.mean([backdrop is not None for _, backdrop in drawn]) < high
        assert all(place == "studio" for place, backdrop in drawn if backdrop is not None)
        colours = {backdrop for _, backdrop in drawn}
        assert (1.0, 1.0, 1.0) in colours and (0.0, 0.0, 0.0) in colours


def test_depth_range_ends_with_the_content_or_with_everything():
    depth = torch.tensor([[[2.0, 3.0], [5.0, 400.0]], [[2.5, 3.0], [6.0, 300.0]]])
    fars = []
    for seed in range(60):
        near, far = depth_ranges(depth, 7.0, random.Random(seed))
        assert (near < depth.flatten(1).amin(1)).all() and (far > near).all()
        fars.append(far)
    beyond = torch.stack([(far < depth.flatten(1).amax(1)).all() for far in fars])
    assert 0.5 < beyond.float().mean() < 0.85
    assert all((far >= 7.0).all() for far in fars)
    everything = [depth_ranges(depth, float("inf"), random.Random(seed))[1] for seed in range(20)]
    assert all((far > depth.flatten(1).amax(1)).all() for far in everything)
    sky_only = torch.full((1, 2, 2), 50.0)
    near, far = depth_ranges(sky_only, 7.0, random.Random(1))
    assert (near < far).all()


def test_backdrop_pixels_have_its_colour_and_edges_are_mixed():
    rng = random.Random(3)
    rig = draw_rig("inward", (64, 48), 1, rng)
    for seed in range(100):
        world = draw_world(rig, 0.3, random.Random(seed), torch.Generator().manual_seed(seed))
        if world.backdrop is not None:
            break
    world = cast_shadows(world)
    image, depth, coverage = render_view(world, rig.cameras[0], 2)
    assert (coverage == 0).any() and (coverage == 1).any() and ((coverage > 0) & (coverage < 1)).any()
    assert (image[:, coverage == 0] == 0).all() and torch.isfinite(depth).all()
    assert (depth[coverage == 0] > depth[coverage == 1].amin()).all()


def test_fixed_test_scenes_are_disjoint_from_training_and_balanced():
    entries = test_set.named_configs()
    names, seeds = [e[0] for e in entries], [e[1] for e in entries]
    assert len(set(names)) == len(set(seeds)) == 64
    assert test_set.test_scene_configs() == [(seed, config) for _, seed, config in entries]
    assert min(seeds) >= HELD_OUT_SEED + 100_000  # beyond those held out beside a training
    cells = [(config.rig, config.complexity) for _, _, config in entries]
    assert len(set(cells[:8])) == 8 and all(cells.count(cell) == 8 for cell in set(cells))
    (name, scene), *rest = list(test_set.test_scenes(1))
    assert not rest and name == names[0] and scene.name.endswith(str(seeds[0]))
    assert scene.views.images.shape == (6, 3, 208, 288)


def test_forward_rigs_look_like_crops_of_larger_images():
    rigs = [draw_rig("forward", (288, 208), 6, random.Random(seed)) for seed in range(200)]
    degrees = np.array([2 * np.degrees(np.arctan(rig.tan_x)) for rig in rigs])
    assert degrees.min() >= 23.9 and degrees.max() <= 75.1 and 25 < np.quantile(degrees, 0.25) < 45
    baselines = np.array([rig.baseline for rig in rigs])
    assert baselines.min() >= 0.03 and baselines.max() <= 0.25
    # Neighbours move the nearest things by less than a third of the frame.
    assert (baselines / np.array([2 * rig.tan_x for rig in rigs])).max() < 0.31


def test_blur_keeps_constants_and_spreads_a_point():
    constant = torch.full((1, 3, 5, 6), 0.4)
    torch.testing.assert_close(blur(constant, 0.5), constant)
    point = torch.zeros(1, 3, 5, 5)
    point[..., 2, 2] = 1
    spread = blur(point, 0.5)
    torch.testing.assert_close(spread.sum(), torch.tensor(3.0))
    assert spread[0, 0, 2, 1] / spread[0, 0, 2, 2] == pytest.approx(np.exp(-2), rel=1e-4)


def test_count_seen_of_two_planes():
    """A near square hides part of a far wall from a camera moved sideways; geometry by hand."""
    K = torch.tensor([[50.0, 0, 50], [0, 50.0, 50], [0, 0, 1]])
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[1, 0, 3], c2w[2, 2, 3] = 1.0, -20.0
    cameras = Cameras(c2w, K.repeat(3, 1, 1), (100, 100), torch.ones(3), torch.full((3,), 50.0))

    def depth(center: torch.Tensor) -> torch.Tensor:
        """Wall at z = 10; square |x|, |y| < 1 at z = 5."""
        x, y = ((pixel_centers((100, 100)) - 50) / 50).unbind(-1)
        to_square = 5 - center[2]
        on_square = ((center[0] + x * to_square).abs() < 1) & ((center[1] + y * to_square).abs() < 1)
        return torch.where(on_square, to_square, 10 - center[2])

    depths = torch.stack([depth(c) for c in cameras.centers])
    target, target_depth = cameras[0], depths[0]
    seen = count_seen(cameras[1:2], depths[1:2], target, target_depth)
    points = unproject(target, target_depth)
    # From (1, 0, 0) the square covers wall points with x in (-3, 1), |y| < 2; the image ends at x = 1 - 10 .. 1 + 10.
    hidden = (points[..., 2] > 9) & (points[..., 0] < 1) & (points[..., 0] > -3) & (points[..., 1].abs() < 2)
    outside = points[..., 0] < 1 - points[..., 2]
    expected = (~hidden & ~outside).float()
    assert 0.005 < hidden.float().mean() < 0.2
    assert (seen == expected).float().mean() > 0.97
    inner = torch.nn.functional.avg_pool2d(expected[None], 3, 1, 1)[0]
    decided = (inner == 0) | (inner == 1)
    assert (seen == expected)[decided].all()
    # A camera twenty units behind sees all that the target sees but what the square hides from it.
    both = count_seen(cameras[1:], depths[1:], target, target_depth)
    assert set(both.unique().tolist()) <= {0.0, 1.0, 2.0}
    assert ((both - seen) >= 0).all() and (both - seen)[target_depth == 5].all()


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_count_seen_takes_any_batch_and_identical_views_see_everything(batch):
    scene = generate_scene(2, SMALL)
    cameras, depth = scene.views.cameras, scene.depth

    def tile(x: torch.Tensor) -> torch.Tensor:
        return x.expand((*batch, *x.shape))

    def tiled(c: Cameras) -> Cameras:
        return Cameras(tile(c.c2w), tile(c.K), c.size, tile(c.near), tile(c.far))

    source, target = tiled(cameras), tiled(cameras[0])
    seen = count_seen(source, tile(depth), target, tile(depth[0]))
    assert seen.shape == (*batch, 36, 48)
    assert (seen >= 1).float().mean() > 0.995
    unknown = count_seen(source, tile(depth), target, torch.zeros_like(tile(depth[0])))
    assert (unknown == 0).all()


def test_dataset_is_resumable_and_independent_of_workers_and_ranks():
    config = ProceduralConfig(size=(16, 12), num_views=2, supersample=1, complexity=(0.0, 0.1))

    def names(loader) -> list[str]:
        return [scene.name for scene in loader]

    plain = names(ProceduralDataset(config, start=3, count=4, rank=0, world_size=1))
    assert [int(name.split("-")[-1]) for name in plain] == [3, 4, 5, 6]
    assert names(ProceduralDataset(config, start=5, count=2, rank=0, world_size=1)) == plain[2:]
    workers = DataLoader(
        ProceduralDataset(config, start=3, count=4, rank=0, world_size=1), batch_size=None, num_workers=2
    )
    assert names(workers) == plain
    ranks = [names(ProceduralDataset(config, start=3, count=4, rank=r, world_size=2)) for r in (0, 1)]
    assert ranks == [plain[0::2], plain[1::2]]


def test_dataset_reads_its_rank_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = ProceduralDataset(SMALL)
    assert (dataset.rank, dataset.world_size) == (1, 2)


def test_pack_round_trip(tmp_path):
    scene = generate_scene(6, SMALL)
    pack_scene(scene, tmp_path / "a.safetensors")
    back = unpack_scene(tmp_path / "a.safetensors")
    assert back.name == scene.name and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    torch.testing.assert_close(back.views.images, scene.views.images, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(back.depth, scene.depth, rtol=1e-3, atol=0)
    for field in ("c2w", "K", "near", "far", "size"):
        torch.testing.assert_close(
            getattr(back.views.cameras, field), getattr(scene.views.cameras, field), rtol=0, atol=0
        )


def test_a_damaged_packed_scene_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    pack_scene(generate_scene(6, SMALL), path)
    whole = path.read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", b"<html>", whole[:9] + b"}}" + whole[11:]):
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match=r"a.safetensors is no packed scene, or a damaged one"):
            unpack_scene(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"a.safetensors is no packed scene"):
        unpack_scene(path)


def test_a_packed_scene_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("idnerf.data.procedural.pool.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        pack_scene(generate_scene(6, SMALL), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_saved_scene_reads_back(tmp_path):
    scene = generate_scene(7, SMALL)
    save_scene(scene, tmp_path / "scene")
    contents = json.loads((tmp_path / "scene" / "transforms.json").read_text())
    assert contents["idnerf_procedural"] is True and len(contents["frames"]) == 3
    for i, frame in enumerate(contents["frames"]):
        camera = scene.views.cameras[i]
        c2w = torch.tensor(frame["transform_matrix"]) @ OPENCV_TO_OPENGL
        torch.testing.assert_close(c2w, camera.c2w)
        K = torch.tensor([[frame["fl_x"], 0, frame["cx"]], [0, frame["fl_y"], frame["cy"]], [0, 0, 1]])
        torch.testing.assert_close(K, camera.K)
        assert (frame["w"], frame["h"]) == camera.size
        assert frame["near"] == pytest.approx(float(camera.near)) and frame["far"] == pytest.approx(float(camera.far))
        depth = np.load(tmp_path / "scene" / frame["depth_file_path"])
        assert depth.dtype == np.float32
        torch.testing.assert_close(torch.from_numpy(depth), scene.depth[i])
        assert (tmp_path / "scene" / frame["file_path"]).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["scene"]
    with pytest.raises(InputError, match="empty folder"):
        save_scene(scene, tmp_path / "scene")


@pytest.mark.parametrize(
    "field",
    [
        {"size": (4, 4)},
        {"num_views": 1},
        {"complexity": (0.5, 0.2)},
        {"supersample": 0},
        {"photo": -1.0},
        {"interiors": 1.5},
    ],
)
def test_bad_config_is_named_in_one_line(field):
    with pytest.raises(InputError) as error:
        ProceduralConfig(**field)
    assert next(iter(field)).replace("_", "-") in str(error.value) and "\n" not in str(error.value)


def test_interiors_are_rooms_and_leave_other_scenes_as_they_are():
    rig = draw_rig("forward", (32, 24), 2, random.Random(0))

    def world(interior: bool, seed: int):
        return draw_world(rig, 0.5, random.Random(seed), torch.Generator().manual_seed(seed), interior)

    assert all(world(True, seed).backdrop is None for seed in range(8))
    assert all(world(True, seed).content_far == math.inf for seed in range(8))  # walls all around
    size = {"size": (16, 12), "num_views": 2, "supersample": 1}
    without = generate_scene(7, ProceduralConfig(**size))
    for share, same in ((0.0, True), (1.0, False)):
        other = generate_scene(7, ProceduralConfig(**size, interiors=share))
        assert torch.equal(other.views.images, without.views.images) == same


def test_missing_pool_file_says_so(tmp_path):
    with pytest.raises(InputError, match="fill the pool"):
        unpack_scene(tmp_path / "none.safetensors")


def test_things_at_the_camera_and_rays_that_leave_the_scene_keep_depth_and_range_finite():
    depth = torch.full((2, 4, 5), 3.0)
    depth[0, 0, 0], depth[1, 1, 1] = 1e-5, float("inf")
    ended = end_rays(depth)
    assert torch.isfinite(ended).all() and ended[1, 1, 1] > 100 * 3.0
    assert torch.equal(ended[torch.isfinite(depth)], depth[torch.isfinite(depth)])
    for seed in range(8):
        near, far = depth_ranges(ended, 7.0, random.Random(seed))
        assert (near > 0.01).all() and torch.isfinite(far).all() and (far > near).all()
    generated = generate_scene(455, ProceduralConfig(size=(48, 36), num_views=2))  # open to the sky, a leaf at the lens
    assert torch.isfinite(generated.depth).all() and torch.isfinite(generated.views.cameras.far).all()


def test_count_seen_takes_depth_that_is_no_number_as_unseen():
    scene = generate_scene(3, ProceduralConfig(size=(32, 24), num_views=3, complexity=(0.0, 0.0)))
    cameras, depth = scene.views.cameras, scene.depth.clone()
    expected = count_seen(cameras[1:], depth[1:], cameras[0], depth[0])
    depth[0, 5, 5], depth[0, 6, 6] = float("inf"), float("nan")
    seen = count_seen(cameras[1:], depth[1:], cameras[0], depth[0])
    assert seen[5, 5] == 0 and seen[6, 6] == 0
    seen[5, 5], seen[6, 6] = expected[5, 5], expected[6, 6]
    assert torch.equal(seen, expected)
