"""Depth ranges that leave surfaces out are widened, right ones are left alone."""

import math
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from idnerf import load_scene
from idnerf.evaluation.metrics import psnr
from idnerf.models.depth_range import BEYOND, FEWEST_VOTES, STEP, votes, widened
from idnerf.models.frustum_volume import DepthDistribution
from idnerf.models.idnerf import IDNeRF


@pytest.mark.parametrize("nearer", [True, False])
def test_a_bound_moves_only_for_enough_votes_and_then_past_them(nearer):
    bound = torch.tensor(4.0)
    inside, outside = (5.0, 2.0) if nearer else (3.0, 9.0)
    few, many = int(1000 * FEWEST_VOTES) - 1, 3 * int(1000 * FEWEST_VOTES)

    def after(count: int) -> float:
        depths = torch.tensor([outside] * count + [inside] * (1000 - count)).sort().values
        return float(widened(depths, bound, nearer))

    assert after(0) == after(few) == 4.0
    moved = after(many)
    assert (moved < outside) if nearer else (moved > outside)
    assert abs(math.log(moved / outside)) < 2 * math.log(STEP) + 1e-6  # past them, but not far
    steps = abs(math.log(moved / 4.0)) / math.log(STEP)
    assert steps == pytest.approx(round(steps), abs=1e-4)


def test_votes_within_the_tolerance_do_not_move_it_and_no_votes_neither():
    bound = torch.tensor(4.0)
    assert float(widened(torch.full((50,), 4.0 / BEYOND + 1e-3), bound, nearer=True)) == 4.0
    assert float(widened(torch.empty(0), bound, nearer=False)) == 4.0


def test_only_peaked_cells_away_from_the_ends_vote():
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
