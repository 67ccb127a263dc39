"""Depth ranges that leave surfaces out are widened, right ones are left alone."""

import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from idnerf import load_scene
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.evaluation.metrics import psnr
from idnerf.geometry.rays import pixel_centers
from idnerf.models.cascade import Cascade
from idnerf.models.depth_range import (
    BEYOND,
    FEWEST_FAR_VOTES,
    FEWEST_NEAR_VOTES,
    FEWEST_SURE,
    LARGEST_PROBE,
    PROBED_FRAMES,
    STEP,
    fitted_path,
    fitted_range,
    probe_size,
    votes,
    widened,
)
from idnerf.models.frustum_volume import DepthDistribution, FrustumVolume
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.rendering.sampling import inverse_depth_planes
from idnerf.types import Cameras
from tiny_cases import TINY_CASCADE, TINY_PAPER, plane_views, waken, with_latent


def after_votes(depths: torch.Tensor, voting: torch.Tensor, fewest: float, nearer: bool) -> float:
    """Where a bound of 4 moves to."""
    return float(widened(depths[None], voting[None], fewest, torch.tensor([4.0]), nearer))


@pytest.mark.parametrize("fewest", [FEWEST_SURE, FEWEST_NEAR_VOTES, FEWEST_FAR_VOTES])
@pytest.mark.parametrize("nearer", [True, False])
def test_a_bound_moves_only_for_enough_votes_and_then_past_them(nearer, fewest):
    inside, outside = (5.0, 2.0) if nearer else (3.0, 9.0)
    few, many = int(1000 * fewest) - 1, 3 * int(1000 * fewest)

    def after(count: int) -> float:
        depths = torch.tensor([outside] * count + [inside] * (1000 - count))
        return float(after_votes(depths, torch.ones(1000, dtype=torch.bool), fewest, nearer))

    assert after(0) == after(few) == 4.0
    moved = after(many)
    assert (moved < outside) if nearer else (moved > outside)
    assert abs(math.log(moved / outside)) < 2 * math.log(STEP) + 1e-6  # past them, but not far
    steps = abs(math.log(moved / 4.0)) / math.log(STEP)
    assert steps == pytest.approx(round(steps), abs=1e-4)


def test_votes_within_the_tolerance_do_not_move_it_and_no_votes_neither():
    all_vote, none_votes = torch.ones(50, dtype=torch.bool), torch.zeros(50, dtype=torch.bool)
    assert after_votes(torch.full((50,), 4.0 / BEYOND + 1e-3), all_vote, FEWEST_SURE, nearer=True) == 4.0
    assert after_votes(torch.full((50,), 9.0), none_votes, FEWEST_SURE, nearer=False) == 4.0
    assert after_votes(torch.full((50,), 1.0), none_votes, FEWEST_SURE, nearer=True) == 4.0
    few = torch.arange(1000) < 5
    assert after_votes(torch.full((1000,), 9.0), few, FEWEST_SURE, nearer=False) == 4.0  # hardly any vote


def test_every_target_of_a_batch_has_votes_of_its_own():
    depths = torch.tensor([[9.0] * 100, [5.0] * 100, [9.0] * 100])
    voting = torch.ones(3, 100, dtype=torch.bool)
    voting[2] = False
    moved = widened(depths, voting, FEWEST_SURE, torch.tensor([4.0, 6.0, 4.0]), nearer=False)
    assert moved[0] > 9 and moved[1:].tolist() == [6.0, 4.0]


@pytest.mark.parametrize(("size", "probe"), [((480, 320), (120, 80)), ((1920, 1080), (480, 264)), ((16, 16), (8, 8))])
def test_a_target_is_probed_at_a_quarter_of_its_size(size, probe):
    assert probe_size(size) == probe


@pytest.mark.parametrize("size", [(4096, 2160), (8192, 8192), (8192, 300), (2048, 1080)])
def test_a_probe_s_memory_is_bounded(size):
    width, height = probe_size(size)
    assert width * height <= LARGEST_PROBE and width % 8 == height % 8 == 0
    assert width / height == pytest.approx(size[0] / size[1], rel=0.15)


def test_only_peaked_cells_away_from_the_ends_are_sure():
    probabilities = torch.full((1, 10, 1, 4), 1e-4)
    probabilities[0, 0, 0, 0] = 1  # at the nearest plane
    probabilities[0, 6, 0, 1] = 1
    probabilities[0, :, 0, 2] = 0.1  # flat
    probabilities[0, 9, 0, 3] = 1  # at the farthest
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    likeliest, voting = votes(DepthDistribution(probabilities.log(), torch.zeros(1, 1, 10, 1, 4)))
    assert voting.flatten().tolist() == [False, True, False, False]
    assert int(likeliest[0, 0, 1]) == 6


@torch.no_grad()
def test_the_default_weights_see_what_a_wrong_range_leaves_out():
    model = IDNeRF.from_pretrained()
    scene = load_scene(Path(str(resources.files("idnerf") / "demo_scene"))).resized((240, 180))
    target = scene.cameras[0]
    source = scene.nearest(target, n=3, candidates=range(1, len(scene)))
    target = target.with_bounds(*scene.target_bounds(source.cameras))
    features, truth = model.encode(source[None]), scene.image(0)
    right = model.core.fit_range(features, target[None])
    assert float(right.near) >= 0.85 * float(target.near) and float(right.far) <= 1.2 * float(target.far)

    wrong = replace(target, near=target.near * 2)
    fitted = model.core.fit_range(features, wrong[None])
    assert float(fitted.near) < 0.85 * float(wrong.near)
    good = psnr(model.render(source, target).rgb, truth)
    assert psnr(model.render(source, wrong).rgb, truth) > good - 1.5
    as_given = model.core.render_tile(features, wrong[None]).rgb[0]
    assert psnr(as_given, truth) < good - 1.5  # what it would have cost


@torch.no_grad()
def test_an_even_backdrop_does_not_widen_the_range():
    """Behind an object on white every depth agrees; a range that holds the object is left as it is.

    Without the rule about texture, far grows to 2.3 times here.
    """
    model = IDNeRF.from_pretrained()
    scene = generate_scene(6, ProceduralConfig(size=(240, 180), num_views=4, rig="inward"))
    near, far = scene.views.cameras.near.min(), scene.views.cameras.far.max()
    disc = (pixel_centers((240, 180)) - torch.tensor([120.0, 90.0])).norm(dim=-1) < 60
    white = replace(scene.views, images=torch.where(disc, scene.views.images, 1.0))
    target = white.cameras[0].with_bounds(near, far)
    fitted = model.core.fit_range(model.encode(white[1:][None]), target[None])
    assert float(fitted.far) <= STEP**2 * float(far)


class UnsureVolume(FrustumVolume):
    """Leans towards one depth without being sure of it, in a share of the cells; elsewhere it is sure of another."""

    def __init__(self, depth: float, share: float, elsewhere: float):
        torch.nn.Module.__init__(self)
        self.depth, self.share, self.elsewhere = depth, share, elsewhere

    def forward(self, features, source, target, planes):
        depths = 1 / inverse_depth_planes(target.near, target.far, planes)[0]
        height, width = target.height // self.scale, target.width // self.scale
        probabilities = torch.full((planes, height, width), 0.7 / planes)
        beyond, inside = ((depths.log() - math.log(d)).abs().argmin() for d in (self.depth, self.elsewhere))
        unsure = torch.arange(height * width).unflatten(0, (height, width)) < self.share * height * width
        probabilities[beyond] += 0.3 * unsure
        probabilities[inside] += 1000.0 * ~unsure
        log = (probabilities / probabilities.sum(0)).log()[None]
        return DepthDistribution(log, torch.zeros(1, 1, *log.shape[1:]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("share", "nearer", "moves"),
    [
        (0.5, True, True),
        (0.14, True, True),
        (0.09, True, False),
        (0.0, True, False),
        (0.5, False, True),
        (0.2, False, True),
        (0.14, False, False),
        (0.0, False, False),
    ],
)
def test_many_unsure_cells_on_texture_widen_a_range(share, moves, nearer, generator):
    """Inward-looking views of a near surface agree on little: nobody was sure, the picture lost 17 dB."""
    scene = generate_scene(3, ProceduralConfig(size=(256, 256), num_views=3))
    noise = replace(scene.views, images=torch.rand(scene.views.images.shape, generator=generator))
    near, far, beyond = (2.0, 20.0, 1.5) if nearer else (2.0, 6.0, 9.0)
    target = noise.cameras[0].with_bounds(torch.tensor(near), torch.tensor(far))
    same = noise.cameras[[0, 0]]  # seen from the target itself, every depth is on the same pixel
    features = IDNeRF.from_pretrained().encode(replace(noise[[0, 0]], cameras=same)[None])
    volume = UnsureVolume(depth=beyond, share=share, elsewhere=5.0)
    fitted = fitted_range(volume, features.pyramid, features.cameras, target[None], 48, features.enlargement)
    moved, kept = (fitted.near, fitted.far) if nearer else (fitted.far, fitted.near)
    assert ((float(moved) < beyond) if nearer else (float(moved) > beyond)) == moves
    assert abs(math.log(float(moved) / beyond)) < 3 * math.log(STEP)
    assert float(kept) == pytest.approx(far if nearer else near)


@pytest.mark.parametrize(("frames", "nearer", "moves"), [(1, 1, True), (2, 1, True), (60, 3, False), (60, 4, True)])
def test_a_path_moves_its_bounds_alike_where_a_third_of_its_frames_want_it(frames, nearer, moves):
    path = plane_views(1, (64, 48)).cameras[[0] * frames]
    path = path.with_bounds(torch.linspace(1.0, 2.0, frames), torch.linspace(5.0, 8.0, frames))
    asked: list[float] = []

    def fit(camera: Cameras) -> Cameras:
        asked.append(float(camera.near))
        few = len(asked) <= nearer
        return camera.with_bounds(camera.near / (STEP**2 if few else 1.0), camera.far * (1.0 if few else STEP**3))

    fitted = fitted_path(fit, path)
    assert len(asked) == min(frames, PROBED_FRAMES) and (asked[0], asked[-1]) == (path.near[0], path.near[-1])
    torch.testing.assert_close(fitted.near, path.near / (STEP**2 if moves else 1.0))
    torch.testing.assert_close(fitted.far, path.far * (STEP**3 if len(asked) > nearer else 1.0))
    assert torch.equal(fitted.c2w, path.c2w)


@torch.no_grad()
@pytest.mark.parametrize("latent", [False, True])
def test_frames_of_a_fitted_path_keep_its_range_and_a_single_one_is_rendered_as_by_itself(latent, monkeypatch):
    torch.manual_seed(0)
    model = waken(IDNeRF(with_latent("cascade", "pixel") if latent else ModelConfig(cascade=TINY_CASCADE))).eval()
    views = plane_views(3, (64, 48))
    features, path = model.encode(views[None]), plane_views(6, (64, 48)).cameras[3:]
    wide = path.with_bounds(path.near / STEP, path.far * STEP)
    monkeypatch.setattr(Cascade, "fit_range", lambda *_: wide[:1])
    fitted = model.fit_path(features, path)
    torch.testing.assert_close(fitted.near, wide.near)
    torch.testing.assert_close(fitted.far, wide.far)
    by_path = model.render_target(features, fitted[:1], latent=model.infer_latent(features, path[:1]), fit_range=False)
    by_itself = model.render_target(features, path[:1])
    torch.testing.assert_close(by_path.depth, by_itself.depth)
    torch.testing.assert_close(by_path.rgb, by_itself.rgb)
    as_given = model.render_target(features, path[:1], fit_range=False)
    assert (as_given.depth - by_path.depth).abs().max() > 1e-3
    paper = IDNeRF(ModelConfig(configuration="paper", paper=TINY_PAPER)).eval()
    assert paper.fit_path(None, path) is path
    for wrong in (path[0], path[:0]):
        with pytest.raises(InputError, match=r"expected the cameras \[frame\] of a path"):
            model.fit_path(features, wrong)
