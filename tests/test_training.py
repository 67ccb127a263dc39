"""Training: every loss, examples by step, optimizer, resuming, failing, presets, two processes."""

import ast
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.utils.data import DataLoader

import idnerf
import two_processes
from idnerf.checkpoint import read_tensors, write_tensors
from idnerf.commands.parsing import parse
from idnerf.commands.train import check_model_options, flags_of, recorded_flags
from idnerf.commands.train import train as train_command
from idnerf.config import PRESETS, DTUTraining, ProceduralTraining, run_training
from idnerf.data.dtu import scans
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.export.consistency import FilterConfig
from idnerf.export.mesh import MeshConfig
from idnerf.geometry.projection import project
from idnerf.models.cascade import Cascade, CascadeConfig
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.models.paper import PaperConfig
from idnerf.poses.config import PosesConfig
from idnerf.priors.latent_diffusion import SmallPriorConfig
from idnerf.priors.prior import PriorConfig
from idnerf.training import procedural_scenes
from idnerf.training.camera_noise import CameraNoiseConfig
from idnerf.training.dtu_layout import inspect_dtu
from idnerf.training.dtu_scenes import DTUScenes, dtu_held_out, read_pairs
from idnerf.training.examples import (
    StepDataset,
    bounds_from_sources,
    cut_tile,
    mirror,
    recolour,
    seeded,
    stack_examples,
)
from idnerf.training.finetune import FinetuneConfig
from idnerf.training.light_noise import LightNoiseConfig
from idnerf.training.losses import (
    bin_cross_entropy,
    charbonnier,
    depth_histogram,
    inverse_depth_position,
    laplace_negative_log_likelihood,
    mean_squared_error,
    psnr_of_mse,
    ssim_loss,
)
from idnerf.training.objectives import LossConfig, cascade_objective, colour_weights, objective
from idnerf.training.optimizer import (
    OptimizerConfig,
    clip_gradients,
    freeze_still_parts,
    make_optimizer,
    one_cycle,
    parameter_groups,
    set_learning_rate,
    update_ema,
)
from idnerf.training.prior_trainer import PriorTrainerConfig
from idnerf.training.procedural_scenes import (
    HELD_OUT_SEED,
    ProceduralScenes,
    ProceduralScenesConfig,
    draw_example,
    fill,
    held_out_examples,
    shrunk_scene,
)
from idnerf.training.run_log import RISE_STEPS, LossWatch
from idnerf.training.score_distillation import GuidanceConfig, ScoreDistillation
from idnerf.training.state import STATE_FILE, JudgedStates, load_state, save_state
from idnerf.training.trainer import (
    BEFORE_RISE,
    Objectives,
    TrainerConfig,
    TrainingDivergedError,
    keep,
    process_counts,
    risen,
    train,
)
from scene_writers import make_scene, write_dtu, write_pfm
from tiny_cases import TINY_CASCADE, TINY_MODELS, TINY_PAPER, PlaneScenes, tiny_example, waken, with_latent

ALL_TERMS = LossConfig(
    mse=5.0, charbonnier=1.0, ssim=0.4, blend=0.5, depth_distribution=0.1, depth=1.0, confidence=0.01
)


def tiny_config(out: Path, configuration: str = "cascade", **changes) -> TrainerConfig:
    return replace(
        TrainerConfig(
            model=TINY_MODELS[configuration],
            loss=ALL_TERMS if configuration == "cascade" else LossConfig(),
            out=out,
            steps=4,
            tile=(16, 16),
            rays=32,
            device="cpu",
            workers=0,
            log_every=2,
            validate_every=0,
            save_every=2,
        ),
        **changes,
    )


# Losses


def test_charbonnier_is_squared_near_zero_and_absolute_far_away():
    zero = torch.zeros(10)
    assert charbonnier(zero, zero) == pytest.approx(0, abs=1e-7)
    assert charbonnier(zero + 1e-3, zero).item() == pytest.approx(1e-6 / 0.02, rel=0.01)
    assert charbonnier(zero + 3.0, zero).item() == pytest.approx(3.0 - 0.01, rel=1e-4)


def test_ssim_loss_is_zero_for_equal_images_and_agrees_with_scikit_image(generator):
    a = torch.rand(2, 3, 24, 31, generator=generator)
    assert ssim_loss(a, a).item() == pytest.approx(0, abs=1e-6)
    b = (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(0, 1)
    expected = np.mean(
        [
            structural_similarity(
                x.numpy(), y.numpy(), win_size=7, channel_axis=0, data_range=1.0, use_sample_covariance=False
            )
            for x, y in zip(a.double(), b.double(), strict=True)
        ]
    )
    assert ssim_loss(a, b).item() == pytest.approx((1 - expected) / 2, abs=1e-4)


@pytest.mark.parametrize("loss", [mean_squared_error, charbonnier, ssim_loss])
def test_pixels_of_weight_0_do_not_count_in_image_losses(loss, generator):
    truth = torch.rand(1, 3, 16, 20, generator=generator)
    weights = torch.ones(1, 1, 16, 20)
    weights[..., 10:] = 0
    wrong = torch.cat([truth[..., :10], torch.rand(1, 3, 16, 10, generator=generator)], -1)
    right = torch.cat([torch.rand(1, 3, 16, 4, generator=generator), truth[..., 4:]], -1)
    reach = 0.02 if loss is ssim_loss else 0.0  # windows on the border have a share of both
    assert loss(wrong, truth, weights).item() == pytest.approx(0, abs=1e-6 + 5 * reach)
    assert loss(right, truth, weights).item() > 0.02
    torch.testing.assert_close(loss(right, truth, torch.ones_like(weights)), loss(right, truth))


def test_unseen_pixels_count_less_where_the_data_knows_them():
    example = tiny_example()
    batch = stack_examples([example])
    seen = torch.zeros_like(batch.target.images[:, 0])
    seen[..., ::2] = 2
    batch = replace(batch, seen=seen)
    assert colour_weights(batch, LossConfig()) is None
    assert colour_weights(replace(batch, seen=None), LossConfig(unseen=0.2)) is None
    weights = colour_weights(batch, LossConfig(unseen=0.25))
    assert weights is not None and weights[..., ::2].unique().item() == 1 and weights[..., 1::2].unique().item() == 0.25


def test_every_colour_term_of_the_cascade_hears_of_unseen_pixels(monkeypatch):
    """A picture that is wrong where fewer than two sources see, and only there, costs nothing under a factor of 0."""
    batch = stack_examples([tiny_example(seed) for seed in (0, 1)])
    truth = batch.target.images
    seen = torch.full_like(truth[:, 0], 2)
    seen[..., : truth.shape[-1] // 2] = 1
    batch = replace(batch, seen=seen, depth=None)
    rgb = torch.where(seen[:, None] < 2, 1 - truth, truth)
    render = type("Render", (), {"rgb": rgb})
    output = type("Output", (), {"render": render, "blended": rgb, "latent": None})
    core = Cascade(TINY_CASCADE)
    monkeypatch.setattr(Cascade, "forward", lambda *_, **__: output)
    config = LossConfig(mse=1.0, charbonnier=1.0, ssim=1.0, blend=1.0, unseen=0.0)
    terms = cascade_objective(core, batch, config, seeded(0)).terms
    assert set(terms) == {"mse", "charbonnier", "ssim", "blend"}
    full = cascade_objective(core, batch, replace(config, unseen=1.0), seeded(0)).terms
    for name, value in terms.items():  # windows of SSIM on the border have a share of both
        assert value.item() == pytest.approx(0, abs=1e-6) if name != "ssim" else value < 0.5 * full[name], name
        assert full[name] > 0.01, name
    with pytest.raises(InputError, match=r"--loss\.unseen: expected a factor from 0 to 1, got 1\.5"):
        LossConfig(unseen=1.5)


@pytest.mark.parametrize("loss", [charbonnier, ssim_loss])
def test_image_losses_have_finite_gradients_on_flat_and_equal_images(loss):
    flat = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    loss(flat, torch.full((1, 3, 8, 8), 0.5)).backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_laplace_likelihood_is_best_where_the_scale_is_the_error():
    error = torch.tensor([0.05, 0.2])
    scale = error.clone().requires_grad_()
    laplace_negative_log_likelihood(error, scale).backward()
    torch.testing.assert_close(scale.grad, torch.zeros(2), atol=1e-5, rtol=0)
    best = laplace_negative_log_likelihood(error, error)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert laplace_negative_log_likelihood(error, error * factor) > best


def test_position_runs_from_near_to_far_in_inverse_depth():
    near, far = torch.tensor([2.0]), torch.tensor([8.0])
    depth = torch.tensor([[[2.0, 8.0, 3.2]]])
    torch.testing.assert_close(inverse_depth_position(depth, near, far), torch.tensor([[[0.0, 1.0, 0.5]]]))


def depth_at(positions: torch.Tensor, near: float = 2.0, far: float = 8.0) -> torch.Tensor:
    return 1 / (1 / near + positions * (1 / far - 1 / near))


BOUNDS = (torch.tensor([2.0]), torch.tensor([8.0]))


def test_depth_histogram_puts_its_mass_in_the_right_bins():
    planes = 6
    for plane in range(planes):
        depth = depth_at(torch.full((1, 4, 4), (plane + 0.5) / planes))
        histogram, known = depth_histogram(depth, *BOUNDS, planes, 4)
        expected = torch.zeros(1, planes, 1, 1)
        expected[0, plane] = 1
        torch.testing.assert_close(histogram, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(known, torch.ones(1, 1, 1))
    between, _ = depth_histogram(depth_at(torch.full((1, 4, 4), 2.25 / planes)), *BOUNDS, planes, 4)
    torch.testing.assert_close(between[0, 1:3, 0, 0], torch.tensor([0.25, 0.75]), atol=1e-4, rtol=0)


def test_depth_histogram_has_two_peaks_at_an_edge_and_none_where_nothing_is_known():
    depth = depth_at(torch.full((1, 4, 8), 0.5 / 6))
    depth[:, :, 1:4] = depth_at(torch.tensor(4.5 / 6))
    depth[:, :2, :] = 0  # the upper half is unknown
    depth[:, :, 4:] = 0
    histogram, known = depth_histogram(depth, *BOUNDS, 6, 4)
    torch.testing.assert_close(histogram[0, :, 0, 0], torch.tensor([0.25, 0, 0, 0, 0.75, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(known, torch.tensor([[[0.5, 0.0]]]))
    assert histogram[0, :, 0, 1].abs().max() == 0


def test_bin_cross_entropy_is_that_of_the_bin_each_pixel_lies_in(generator):
    log_weights = torch.randn(2, 4, 3, 5, generator=generator).log_softmax(1)
    edges = torch.cat([torch.zeros(2, 1, 3, 5), torch.rand(2, 3, 3, 5, generator=generator).sort(1).values], 1)
    edges = torch.cat([edges, torch.ones(2, 1, 3, 5)], 1)
    position = 1.4 * torch.rand(2, 6, 10, generator=generator) - 0.2  # some beyond either end
    weight = (torch.rand(2, 6, 10, generator=generator) < 0.7).float()
    expected, total = 0.0, 0.0
    for b, y, x in weight.nonzero().tolist():
        cell = (b, slice(None), y // 2, x // 2)
        index = min(max(int((position[b, y, x] >= edges[cell]).sum()) - 1, 0), 3)
        expected, total = expected - log_weights[cell][index].item(), total + 1
    ours = bin_cross_entropy(log_weights, edges, position, weight)
    assert ours.item() == pytest.approx(expected / total, rel=1e-5)
    assert bin_cross_entropy(log_weights, edges, position, torch.zeros_like(weight)) == 0


@pytest.mark.parametrize("planes", [1, 2, 7])
def test_depth_histogram_sums_to_one_also_outside_the_bounds(planes, generator):
    depth = 0.5 + 12 * torch.rand(2, 8, 12, generator=generator)
    near, far = torch.tensor([2.0, 1.0]), torch.tensor([8.0, 9.0])
    histogram, _ = depth_histogram(depth, near, far, planes, 4)
    assert histogram.shape == (2, planes, 2, 3)
    assert histogram.min() >= 0
    torch.testing.assert_close(histogram.sum(1), torch.ones(2, 2, 3))


def test_psnr_of_known_errors():
    assert psnr_of_mse(0.01) == pytest.approx(20, abs=1e-4)
    assert math.isfinite(psnr_of_mse(0.0))


def test_losses_of_a_perfect_cascade_picture_see_only_what_is_wrong():
    """Unknown depth asks nothing of depth, and a term of weight 0 is left out."""
    model = IDNeRF(TINY_MODELS["cascade"])
    batch = stack_examples([tiny_example()])
    assert batch.depth is not None
    unknown = replace(batch, depth=torch.zeros_like(batch.depth))
    config = LossConfig(mse=1.0, depth=1.0, depth_distribution=1.0)

    def terms(batch, config):
        return objective(model, batch, config, seeded(0), rays_per_step=8, fast_share=0.0).terms

    of_depth = {"depth", "depth_distribution", "middle_distribution"}
    assert set(terms(batch, config)) == {"mse", *of_depth}
    assert all(terms(unknown, config)[name] == 0 for name in of_depth)
    assert set(terms(replace(batch, depth=None), config)) == {"mse"}
    weights = {f.name for f in dataclasses.fields(LossConfig)} - {"unseen"}
    assert set(terms(batch, ALL_TERMS)) == {*weights, "middle_distribution"}  # weighted like the coarse one


def test_fast_share_decides_the_quality():
    model = IDNeRF(TINY_MODELS["cascade"])
    batch = stack_examples([tiny_example()])
    planes = []
    model.core.volume.register_forward_hook(lambda _, inputs, output: planes.append(inputs[3]))
    for share in (0.0, 1.0):
        objective(model, batch, LossConfig(), seeded(0), rays_per_step=8, fast_share=share)
    assert planes == [TINY_CASCADE.planes, TINY_CASCADE.planes_fast]


# Examples


def dataset(rank: int = 0, world: int = 1, batch_size: int = 1, **changes) -> StepDataset:
    options = {"seed": 3, "source_views": (2, 4), "tile": (16, 12), "augment": True, **changes}
    return StepDataset(PlaneScenes(), batch_size=batch_size, rank=rank, world=world, **options)


def assert_same_batch(a, b) -> None:
    assert a.scenes == b.scenes
    for x, y in [
        (a.source.images, b.source.images),
        (a.source.cameras.c2w, b.source.cameras.c2w),
        (a.target.images, b.target.images),
        (a.target.cameras.K, b.target.cameras.K),
        (a.depth, b.depth),
        (a.seen, b.seen),
    ]:
        assert torch.equal(x, y)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_whatever_the_number_of_workers(workers):
    loader = DataLoader(dataset(), batch_size=None, sampler=range(2, 6), num_workers=workers, collate_fn=keep)
    for step, batch in zip(range(2, 6), loader, strict=True):
        assert_same_batch(batch, dataset()[step])


def test_steps_differ_and_sources_vary_in_number():
    batches = [dataset()[step] for step in range(12)]
    assert len({batch.scenes for batch in batches}) == 12
    assert {batch.source.images.shape[1] for batch in batches} == {2, 3, 4}


def test_two_processes_together_draw_what_one_draws_with_twice_the_batch():
    for step in (0, 7):
        whole = dataset(batch_size=4)[step]
        halves = [dataset(rank, 2, batch_size=2)[step] for rank in (0, 1)]
        assert halves[0].scenes + halves[1].scenes == whole.scenes
        assert torch.equal(torch.cat([half.target.images for half in halves]), whole.target.images)
        assert torch.equal(torch.cat([half.source.images for half in halves]), whole.source.images)


def test_seeded_streams_do_not_repeat():
    seeds = {seeded(a, b, c).initial_seed() for a in range(10) for b in range(100) for c in range(3)}
    assert len(seeds) == 3000
    assert seeded(1, 2).initial_seed() == seeded(1, 2).initial_seed() != seeded(2, 1).initial_seed()


def test_a_tile_is_a_window_of_the_target_and_its_camera_sees_the_same_rays():
    example = tiny_example(size=(32, 24))
    tile = cut_tile(example, (10, 8), seeded(4))
    left, top = (example.target.cameras.K - tile.target.cameras.K)[:2, 2].round().int().tolist()
    assert tile.target.cameras.size == (10, 8)
    window = (..., slice(top, top + 8), slice(left, left + 10))
    assert torch.equal(tile.target.images, example.target.images[window])
    assert example.depth is not None and tile.depth is not None
    assert torch.equal(tile.depth, example.depth[window])
    whole = cut_tile(example, (500, 500), seeded(4))
    assert torch.equal(whole.target.images, example.target.images)


def test_recolouring_keeps_equal_colours_equal_and_stays_in_range():
    example = tiny_example()
    same = replace(
        example,
        target=replace(example.target, images=example.source.images[1], cameras=example.source.cameras[1]),
    )
    changed = recolour(same, seeded(1))
    assert torch.equal(changed.target.images, changed.source.images[1])
    assert (changed.target.images - same.target.images).abs().max() > 0.01
    assert changed.target.images.min() >= 0 and changed.target.images.max() <= 1


def test_mirroring_moves_every_point_to_the_mirrored_pixel():
    example = tiny_example()
    skewed = example.source.cameras.K.clone()
    skewed[..., 0, 1] = 0.7
    example = replace(
        example, source=replace(example.source, cameras=replace(example.source.cameras, K=skewed)), depth=None
    )
    mirrored = mirror(example)
    points = torch.randn(20, 3, generator=seeded(3)) * 0.5 + torch.tensor([0.0, 0.0, 5.0])
    reflected = points * torch.tensor([-1.0, 1.0, 1.0])
    for before, after in ((example.source, mirrored.source), (example.target, mirrored.target)):
        count = before.cameras.shape
        pixels, depth = project(points.expand(*count, -1, -1), before.cameras)
        moved, moved_depth = project(reflected.expand(*count, -1, -1), after.cameras)
        torch.testing.assert_close(moved[..., 0], before.cameras.width - pixels[..., 0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(moved[..., 1], pixels[..., 1], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(moved_depth, depth)
        assert torch.equal(after.images, before.images.flip(-1))
        assert torch.allclose(torch.linalg.det(after.cameras.c2w), torch.tensor(1.0))
    twice = mirror(mirrored)
    torch.testing.assert_close(twice.source.cameras.K, example.source.cameras.K)
    assert torch.equal(twice.target.images, example.target.images)


@pytest.mark.parametrize("latent", [False, True])
def test_the_paper_configuration_trains_its_encoder_in_bfloat16(latent):
    """What lies behind the encoder stays in float32; gradients keep their direction."""
    torch.manual_seed(0)
    model = waken(IDNeRF(with_latent("paper", "pixel") if latent else TINY_MODELS["paper"]))
    batch = stack_examples([tiny_example()])
    found = []
    for precision in ("float32", "bf16"):
        config = TrainerConfig(precision=precision, model=model.config, rays=64)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features = model.core.encode(batch.source)
        assert all(scale.dtype == torch.float32 for scale in features.maps.scales)
        terms, _, _ = Objectives(model, config)(batch, 0, 0)
        sum(terms.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((features.maps.fine, terms["mse"].item(), gradients))
    (exact, mse, expected), (rounded, our_mse, ours) = found
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert our_mse == pytest.approx(mse, rel=0.01) and ours.keys() == expected.keys()
    parts = {"encoder": 0.95, "field": 0.9999, **({"refinement": 0.9999, "latent": 0.999} if latent else {})}
    for part, least in parts.items():
        one, other = (torch.cat([g.flatten() for n, g in of.items() if f"core.{part}" in n]) for of in (ours, expected))
        assert torch.cosine_similarity(one, other, dim=0) > least, part


def test_bounds_come_from_the_sources_alone():
    example = tiny_example()
    source = example.source.cameras.with_bounds(torch.tensor([2.0, 1.5, 3.0]), torch.tensor([9.0, 7.0, 8.0]))
    bounded = bounds_from_sources(example.target.cameras, source)
    assert (bounded.near, bounded.far) == (1.5, 9.0)


# Optimizer


@pytest.mark.parametrize("configuration", ["cascade", "paper"])
def test_groups_hold_every_parameter_once_and_every_parameter_moves(configuration):
    """Layers behind a branch that starts at zero move one step after it does, hence a few steps."""
    torch.manual_seed(0)
    model = IDNeRF(TINY_MODELS[configuration])
    config = OptimizerConfig(weight_decay=0.0)
    groups = parameter_groups(model, config)
    grouped = [p for group in groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.core.encoder.parameters()}
    optimizer = make_optimizer(model, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = ALL_TERMS if configuration == "cascade" else LossConfig()
    for step in range(4):
        batch = dataset(tile=None)[step]
        optimizer.zero_grad()
        objective(model, batch, loss, seeded(step), rays_per_step=64, fast_share=0.0).loss.backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_part_with_no_learning_rate_stays_as_it_is():
    torch.manual_seed(0)
    model = IDNeRF(TINY_MODELS["cascade"])
    config = OptimizerConfig(encoder_lr=0.0)
    freeze_still_parts(model, config)
    assert not any(p.requires_grad for p in model.core.encoder.parameters())
    optimizer = make_optimizer(model, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for step in range(2):
        optimizer.zero_grad()
        objective(
            model, dataset(tile=None)[step], ALL_TERMS, seeded(step), rays_per_step=64, fast_share=0.0
        ).loss.backward()
        clip_gradients(optimizer, config)
        optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    encoder = {f"core.encoder.{name}" for name, _ in model.core.encoder.named_parameters()}
    assert encoder <= still and len(still) < len(before)


def test_what_was_added_is_trained_where_its_part_is_not(tmp_path):
    bare = ModelConfig(cascade=replace(TINY_CASCADE, middle_hypotheses=0, context_blending=False))
    IDNeRF(bare).save(tmp_path / "bare.safetensors", step=7)
    model = IDNeRF.extending(tmp_path / "bare.safetensors", TINY_MODELS["cascade"])
    assert model.metadata["step"] == 7
    config = OptimizerConfig(encoder_lr=0.0)
    freeze_still_parts(model, config, model.added)
    trained = {name for name, p in model.core.encoder.named_parameters() if p.requires_grad}
    assert trained == {"middle_head.1.weight", "middle_head.1.bias"}
    groups = {group["name"]: group["params"] for group in parameter_groups(model, config)}
    assert not groups["encoder"] and sum(map(len, groups.values())) == sum(p.requires_grad for p in model.parameters())
    model.core.requires_grad_(False)
    with pytest.raises(InputError, match="learning rate of 0"):
        freeze_still_parts(model, config)


def test_an_extended_run_is_resumed_without_the_weights_it_began_with(tmp_path):
    """Whether they are gone, or newer ones are in their place that have the added part too."""
    start = tmp_path / "start.safetensors"
    IDNeRF(TINY_MODELS["cascade"]).save(start)
    wider = replace(TINY_MODELS["cascade"], cascade=replace(TINY_CASCADE, cross_view_layers=1))
    config = tiny_config(tmp_path / "run", model=wider, init=str(start), extend=True, steps=4)
    config = replace(config, optimizer=OptimizerConfig(encoder_lr=0.0))
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupted(2), [])
    train(replace(config, out=tmp_path / "whole"), PlaneScenes(), [])
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    IDNeRF.extending(start, wider).save(start)
    train(replace(config, resume=tmp_path / "run"), PlaneScenes(), [])
    start.unlink()
    train(replace(config, resume=tmp_path / "again"), PlaneScenes(), [])
    whole, *resumed = (load_state(tmp_path / name / STATE_FILE) for name in ("whole", "run", "again"))
    assert whole.added and all("mixing" in name for name in whole.added)
    for state in resumed:
        assert all(torch.equal(value, state.model[name]) for name, value in whole.model.items())
        assert state.added == whole.added


def test_a_run_from_before_an_option_is_resumed_without_it(tmp_path):
    """What the run did not know of is off, whatever the preset says today."""
    old = replace(TINY_MODELS["cascade"], cascade=replace(TINY_CASCADE, halvings=0))
    config = tiny_config(tmp_path / "run", model=old, steps=2, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupted(1), [])
    tensors, metadata = read_tensors(tmp_path / "run" / STATE_FILE)
    del metadata["train_config"]["model"]["cascade"]["halvings"]
    write_tensors(tmp_path / "run" / STATE_FILE, tensors, metadata)
    asked = replace(old, cascade=replace(TINY_CASCADE, halvings=1))
    with pytest.raises(InputError, match="halvings: expected 0"):
        train(replace(config, model=asked, resume=tmp_path / "run"), PlaneScenes(), [])
    train(replace(config, model=TINY_MODELS["cascade"], resume=tmp_path / "run"), PlaneScenes(), [])
    assert IDNeRF.from_pretrained(tmp_path / "run").config.cascade.halvings == 0


class Unreadable(PlaneScenes):
    """Scenes of a pool that has gone."""

    def example(self, item, num_sources, generator):
        return (Path("/gone") / str(item)).read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_a_worker_misses_is_named(workers, tmp_path):
    with pytest.raises((InputError, FileNotFoundError), match="/gone/0") as error:
        train(tiny_config(tmp_path / "run", steps=1, workers=workers), Unreadable(), [])
    assert "Traceback" not in str(error.value)


def test_one_cycle_rises_then_falls():
    config = OptimizerConfig(warmup=0.1, final_lr=0.02)
    shares = [one_cycle(i / 1000, config) for i in range(1001)]
    peak = shares.index(max(shares))
    assert shares[peak] == pytest.approx(1, abs=1e-3) and peak == pytest.approx(100, abs=1)
    assert all(a <= b for a, b in pairwise(shares[:101]))
    assert all(a >= b for a, b in pairwise(shares[100:]))
    assert shares[0] > 0 and shares[-1] == pytest.approx(0.02)
    assert shares[550] == pytest.approx((1 + 0.02) / 2, abs=1e-3)
    assert one_cycle(0.0, replace(config, warmup=0.0)) == 1.0


def test_learning_rates_of_the_parts_keep_their_ratio():
    model = IDNeRF(TINY_MODELS["cascade"])
    optimizer = make_optimizer(model, OptimizerConfig(encoder_lr=1e-3, decoder_lr=4e-3))
    set_learning_rate(optimizer, 0.5)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "encoder": 5e-4,
        "decoder": 2e-3,
    }


def test_moving_average_follows_its_recurrence_and_forgets_the_start():
    layer = torch.nn.Linear(2, 2)
    ema = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = layer.weight.detach().clone()
    for step in range(30):
        torch.nn.init.normal_(layer.weight)
        update_ema(ema, layer, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        torch.testing.assert_close(ema["weight"], expected)
    update_ema(ema, layer, 0.0, 100)
    assert torch.equal(ema["weight"], layer.weight)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TrainerConfig(steps=0), "--steps"),
        (lambda: TrainerConfig(workers=-1), "--workers"),
        (lambda: TrainerConfig(fast_share=1.5), "--fast-share"),
        (lambda: TrainerConfig(enlarged_share=2.0), "--enlarged-share"),
        (lambda: CascadeConfig(enlarge_up_to=-1), "--model.cascade.enlarge-up-to"),
        (lambda: CascadeConfig(half_size_share=1.5), "--model.cascade.half-size-share"),
        (lambda: CascadeConfig(full_size_depth_up_to=-1), "--model.cascade.full-size-depth-up-to"),
        (lambda: CascadeConfig(occlusion_tolerance=1.5), "--model.cascade.occlusion-tolerance"),
        (lambda: CascadeConfig(occlusion_tolerance=-0.1), "--model.cascade.occlusion-tolerance"),
        (lambda: CascadeConfig(mirrorings=5), "--model.cascade.mirrorings"),
        (lambda: CascadeConfig(mirrorings_fast=0), "--model.cascade.mirrorings-fast"),
        (lambda: TrainerConfig(source_views=(1, 3)), "--source-views"),
        (lambda: TrainerConfig(source_views=(4, 3)), "--source-views"),
        (lambda: TrainerConfig(tile=(4, 64)), "--tile"),
        (lambda: OptimizerConfig(warmup=1.0), "--optimizer.warmup"),
        (lambda: OptimizerConfig(latent_lr=-1.0), "--optimizer.latent-lr"),
        (lambda: OptimizerConfig(ema_decay=1.0), "--optimizer.ema-decay"),
        (lambda: OptimizerConfig(grad_clip=-1.0), "--optimizer.grad-clip"),
        (lambda: ProceduralScenesConfig(reuse=0.0), "--scenes.reuse"),
        (lambda: ProceduralScenesConfig(max_scenes=0), "--scenes.max-scenes"),
    ],
)
def test_bad_options_are_named_by_their_flag(make, named):
    with pytest.raises(InputError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


# The loop


class Interrupted(PlaneScenes):
    """Stops the training when the example of one item is asked for."""

    def __init__(self, item: int):
        super().__init__()
        self.item = item

    def example(self, item, num_sources, generator):
        if item == self.item:
            raise KeyboardInterrupt
        return super().example(item, num_sources, generator)


@pytest.mark.parametrize("configuration", ["cascade", "paper"])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(configuration, tmp_path):
    config = tiny_config(tmp_path / "whole", configuration)
    train(config, PlaneScenes(), [])
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, out=tmp_path / "parts"), Interrupted(2), [])
    assert load_state(tmp_path / "parts" / STATE_FILE).step == 2
    train(replace(config, resume=tmp_path / "parts"), PlaneScenes(), [])
    whole, parts = (read_tensors(tmp_path / name / STATE_FILE)[0] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert any(name.endswith("exp_avg_sq") for name in whole)
    for name, value in whole.items():
        assert torch.equal(parts[name], value), name
    weights = [read_tensors(tmp_path / name / "weights.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_run_folder_holds_averaged_weights_numbers_and_pictures(tmp_path):
    config = tiny_config(tmp_path, validate_every=3)
    assert train(config, PlaneScenes(), [tiny_example()]) == tmp_path
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in entries] == [
        ("train", 2),
        ("validation", 3),
        ("train", 4),
        ("validation", 4),
    ]
    assert all(math.isfinite(v) for e in entries for v in e.values() if isinstance(v, float))
    assert {"psnr", "depth_median_relative_error"} <= entries[1].keys()
    assert {"loss", "mse", "ssim", "rays_per_second"} <= entries[0].keys()
    assert list((tmp_path / "tensorboard").glob("events*"))
    state = load_state(tmp_path / STATE_FILE)
    model = IDNeRF.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state.ema[name], atol=1e-3, rtol=1e-3)
    assert state.config["steps"] == 4
    assert model.metadata["step"] == 4


def test_validation_changes_no_weight(tmp_path):
    train(tiny_config(tmp_path / "without"), PlaneScenes(), [])
    train(tiny_config(tmp_path / "with", validate_every=1), PlaneScenes(), [tiny_example()])
    a, b = (read_tensors(tmp_path / name / STATE_FILE)[0] for name in ("without", "with"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_last_checkpoint(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(TrainingDivergedError, match=r"loss is not finite at step 3 on plane 3") as error:
        train(config, PlaneScenes(bad_item=3), [])
    assert "\n" not in str(error.value)
    state = load_state(tmp_path / STATE_FILE)
    assert state.step == 2
    assert all(torch.isfinite(v).all() for v in state.model.values())
    assert all(torch.isfinite(v).all() for v in IDNeRF.from_pretrained(tmp_path).state_dict().values())


@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path, monkeypatch, grad_clip):
    """The loss alone does not tell: the step would be taken and its weights saved before the next loss is seen."""

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    monkeypatch.setattr("idnerf.training.objectives.charbonnier", lambda a, b, *_: Explode.apply((a - b).mean()))
    config = tiny_config(tmp_path, save_every=1, optimizer=OptimizerConfig(grad_clip=grad_clip))
    with pytest.raises(TrainingDivergedError, match="gradient is not finite at step 0 on plane 0"):
        train(config, PlaneScenes(), [])
    assert not (tmp_path / STATE_FILE).exists()


def test_a_rise_of_the_loss_is_noticed_once_and_noise_is_not():
    watch = LossWatch()
    assert [watch.rises(x, RISE_STEPS) for x in (1.0, 0.5, 0.7, 0.9, 1.2, 0.6, 0.85)] == [
        False,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert watch.lowest == 0.5


def test_states_saved_before_a_rise_is_noticed_are_not_the_ones_kept(tmp_path, monkeypatch, rising_at_step_5):
    """Steps 5 to 8 are judged together at step 8, and saved one by one until then."""
    monkeypatch.setattr("idnerf.training.run_log.RISE_STEPS", 4)
    train(tiny_config(tmp_path, steps=9, save_every=1, log_every=2, loss=rising_at_step_5), PlaneScenes(), [])
    assert load_state(tmp_path / BEFORE_RISE).step == 4
    assert load_state(tmp_path / STATE_FILE).step == 9


def test_a_hard_scene_is_no_rise():
    watch = LossWatch()
    assert not any(watch.rises(loss, RISE_STEPS // 10) for loss in [0.5, 0.4, 0.45, 0.9, 0.5, 0.6] * 20)
    assert not watch.risen and watch.latest < 0.65
    assert any(watch.rises(1.2, RISE_STEPS // 10) for _ in range(10))


@pytest.fixture
def rising_at_step_5(monkeypatch) -> LossConfig:
    """Losses of 1 up to step 4, of 2 from then on."""
    steps = []

    def rising(a, b, *_):
        steps.append(1)
        return 0.0 * a.sum() + (2.0 if len(steps) > 4 else 1.0)

    monkeypatch.setattr("idnerf.training.objectives.charbonnier", rising)
    return LossConfig(charbonnier=1.0, mse=0.0, blend=0.0)


def test_a_loss_that_rises_is_warned_of_and_the_state_from_before_is_kept(
    tmp_path, monkeypatch, capfd, rising_at_step_5
):
    """Seen on default weights in training: within 100 steps the loss doubled, and thousands of steps were lost."""
    monkeypatch.setattr("idnerf.training.run_log.RISE_STEPS", 1)
    config = tiny_config(tmp_path, steps=6, save_every=2, log_every=1, loss=rising_at_step_5)
    train(config, PlaneScenes(), [])
    shown = capfd.readouterr().err
    assert shown.count("warning: loss") == 1 and "at step 5" in shown
    assert load_state(tmp_path / BEFORE_RISE).step == 4
    assert BEFORE_RISE in risen(LossWatch(), 6, tmp_path, tmp_path / STATE_FILE)  # a second rise
    assert load_state(tmp_path / BEFORE_RISE).step == 4
    assert load_state(tmp_path / STATE_FILE).step == 6
    assert not list(tmp_path.glob("*.judged")) and BEFORE_RISE not in risen(LossWatch(), 6, tmp_path, None)
    (tmp_path / BEFORE_RISE).replace(tmp_path / STATE_FILE)
    train(replace(config, resume=tmp_path), PlaneScenes(), [])


def test_a_resumed_training_remembers_the_lowest_loss(tmp_path, monkeypatch, capfd, rising_at_step_5):
    monkeypatch.setattr("idnerf.training.run_log.RISE_STEPS", 1)
    config = tiny_config(tmp_path, steps=6, save_every=1, log_every=1, loss=rising_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupted(4), [])
    state = load_state(tmp_path / STATE_FILE)
    assert state.step == 4 and state.watch is not None and not state.watch["risen"]
    train(replace(config, resume=tmp_path), PlaneScenes(), [])
    shown = capfd.readouterr().err
    assert shown.count("warning: loss") == 1 and "at step 5" in shown
    assert load_state(tmp_path / BEFORE_RISE).step == 4
    assert load_state(tmp_path / STATE_FILE).watch == {"lowest": state.watch["lowest"], "risen": True}
    again = LossWatch()
    again.recall(LossWatch().remembered())
    assert again.lowest == math.inf


def test_another_loss_does_not_compare_with_that_before_a_resume(tmp_path, monkeypatch, capfd, rising_at_step_5):
    monkeypatch.setattr("idnerf.training.run_log.RISE_STEPS", 1)
    config = tiny_config(tmp_path, steps=3, save_every=1, log_every=1, loss=rising_at_step_5)
    train(config, PlaneScenes(), [])
    heavier = replace(config.loss, charbonnier=3.0)
    train(replace(config, resume=tmp_path, steps=4, loss=heavier), PlaneScenes(), [])
    assert "warning: loss" not in capfd.readouterr().err


def test_a_state_that_was_not_judged_is_not_sound_after_a_resume(tmp_path):
    path = tmp_path / STATE_FILE
    states = JudgedStates(path)
    states.before_save(sound=True)
    path.write_text("sound")
    states.before_save(sound=False)
    path.write_text("not judged")
    resumed = JudgedStates(path)
    assert resumed.judged is not None and resumed.judged.read_text() == "sound"
    resumed.before_save(sound=False)
    path.write_text("nor this one")
    assert resumed.judged.read_text() == "sound"
    resumed.all_sound()
    assert resumed.judged == path and JudgedStates(path).judged == path
    assert JudgedStates(tmp_path / "none").judged is None


def test_score_distillation_that_rises_is_no_rise_of_the_loss(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("idnerf.training.run_log.RISE_STEPS", 1)
    monkeypatch.setattr("idnerf.training.objectives.charbonnier", lambda a, b, *_: 0.0 * a.sum() + 1.0)
    monkeypatch.setattr(
        ScoreDistillation, "__call__", lambda _, z, source, progress, *__: 0 * z.values.sum() + progress
    )
    guidance = GuidanceConfig(sds_weight=1.0, prior=PriorConfig(kind="gaussian"))
    loss = LossConfig(charbonnier=1.0, mse=0.0)
    model = with_latent("cascade", "pixel")
    config = tiny_config(tmp_path, steps=6, log_every=1, model=model, loss=loss, guidance=guidance)
    train(config, PlaneScenes(), [])
    assert "warning: loss" not in capfd.readouterr().err and not (tmp_path / BEFORE_RISE).exists()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[0] == 1 and losses[-1] > 1.6


def test_a_folder_with_a_training_is_refused_without_resume(tmp_path):
    config = tiny_config(tmp_path, steps=1)
    train(config, PlaneScenes(), [])
    with pytest.raises(InputError, match="--resume"):
        train(config, PlaneScenes(), [])


def test_what_cannot_be_resumed_is_refused(tmp_path):
    config = tiny_config(tmp_path / "run", steps=1)
    with pytest.raises(InputError, match="found nothing"):
        train(replace(config, resume=tmp_path / "nowhere"), PlaneScenes(), [])
    train(config, PlaneScenes(), [])
    other = replace(TINY_MODELS["cascade"], cascade=replace(TINY_CASCADE, token_width=12))
    made = []
    with pytest.raises(InputError, match=r"--model\.cascade\.token-width: expected 8, what the run .* with, got 12"):
        train(replace(config, model=other, resume=tmp_path / "run"), PlaneScenes(), lambda: made.append(1) or [])
    assert not made
    with pytest.raises(InputError, match="of the configuration cascade, got paper"):
        train(replace(config, model=TINY_MODELS["paper"], resume=tmp_path / "run"), PlaneScenes(), [])
    state = tmp_path / "run" / STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        train(replace(config, resume=tmp_path / "run"), PlaneScenes(), [])
    state.write_bytes((tmp_path / "run" / "weights.safetensors").read_bytes())
    with pytest.raises(InputError, match="no training state"):
        train(replace(config, resume=tmp_path / "run"), PlaneScenes(), [])


def test_an_interrupted_save_leaves_the_old_state_readable(tmp_path, monkeypatch):
    model = IDNeRF(TINY_MODELS["cascade"])
    optimizer = make_optimizer(model, OptimizerConfig())
    path = tmp_path / STATE_FILE
    save_state(path, 5, model, model.state_dict(), optimizer, {})

    def half(tensors, file, metadata=None):
        Path(file).write_bytes(b"\x10\0\0\0")
        raise OSError("no space left on device")

    monkeypatch.setattr("idnerf.checkpoint.save_file", half)
    with pytest.raises(InputError, match="no space"):
        save_state(path, 6, model, model.state_dict(), optimizer, {})
    assert load_state(path).step == 5
    assert [p.name for p in tmp_path.iterdir()] == [STATE_FILE]


def test_weights_to_start_from_bring_their_configuration(tmp_path):
    torch.manual_seed(5)
    IDNeRF(TINY_MODELS["paper"]).save(tmp_path / "start.safetensors")
    config = tiny_config(tmp_path / "run", init=str(tmp_path / "start.safetensors"), steps=1)
    train(config, PlaneScenes(), [])
    started = IDNeRF.from_pretrained(tmp_path / "run")
    assert started.config == TINY_MODELS["paper"]
    first = IDNeRF.from_pretrained(tmp_path / "start.safetensors").fingerprint()
    assert started.metadata["training"]["started_from_sha256"] == first
    assert "earlier_steps" not in started.metadata["training"]
    train(tiny_config(tmp_path / "again", init=str(tmp_path / "run"), steps=2), PlaneScenes(), [])
    train(tiny_config(tmp_path / "third", init=str(tmp_path / "again"), steps=1), PlaneScenes(), [])
    third = IDNeRF.from_pretrained(tmp_path / "third").metadata
    assert (third["step"], third["training"]["earlier_steps"]) == (1, 3)


def test_a_resumed_run_needs_its_encoder_weights_no_more(tmp_path):
    config = tiny_config(tmp_path / "run", "paper", steps=1)
    train(config, PlaneScenes(), [])
    resumed = replace(config, resume=tmp_path / "run", steps=2, encoder_init=tmp_path / "gone.safetensors")
    train(resumed, PlaneScenes(), [])
    assert load_state(tmp_path / "run" / STATE_FILE).step == 2


def test_encoder_weights_are_for_the_paper_configuration_only(tmp_path):
    config = tiny_config(tmp_path / "run", encoder_init=tmp_path / "gmflow.safetensors")
    with pytest.raises(InputError, match="only the `paper` configuration"):
        train(config, PlaneScenes(), [])


class Broken(PlaneScenes):
    def example(self, item, num_sources, generator):
        raise InputError("expected a scene, found none; look again")


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_one_line_also_from_a_worker(tmp_path, workers):
    with pytest.raises(InputError) as error:
        train(tiny_config(tmp_path, workers=workers), Broken(), [])
    assert str(error.value) == "expected a scene, found none; look again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_missing_device_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="--device cuda") as error:
        train(tiny_config(tmp_path, device="cuda"), PlaneScenes(), [])
    assert "\n" not in str(error.value)


# Procedural scenes


def procedural(**changes) -> ProceduralScenesConfig:
    scene = ProceduralConfig(size=(24, 16), num_views=4, complexity=(0.0, 0.1), supersample=1)
    return ProceduralScenesConfig(scene=scene, start_scenes=1, max_scenes=1, **changes)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """A pool with the one scene of ``procedural()``."""
    folder = tmp_path_factory.mktemp("pool")
    ProceduralScenes(procedural(pool=folder)).scene(0)
    return folder


def test_held_out_seeds_are_never_trained_on(monkeypatch):
    seeds = []

    def note(seed, config):
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(procedural_scenes, "generate_scene", note)
    last = ProceduralScenesConfig(first_seed=HELD_OUT_SEED - 50, max_scenes=50, start_scenes=50)
    for item in (*range(20), 10**9):
        with pytest.raises(KeyboardInterrupt):
            ProceduralScenes(last).example(item, 2, seeded(item))
    assert min(seeds) >= HELD_OUT_SEED - 50 and max(seeds) < HELD_OUT_SEED
    with pytest.raises(KeyboardInterrupt):
        held_out_examples(last.scene, 1)
    assert seeds[-1] == HELD_OUT_SEED
    with pytest.raises(InputError, match=r"--scenes.first-seed"):
        replace(last, max_scenes=51)


def test_scenes_join_as_items_go_on_from_easy_to_hard():
    scenes = ProceduralScenes(ProceduralScenesConfig(ramp_scenes=100))
    tops = [scenes.scene_config(i).complexity[1] for i in range(0, 120, 10)]
    assert tops == sorted(tops) and tops[0] == pytest.approx(1 / 3) and tops[-1] == 1.0


def test_a_pool_filled_ahead_is_what_the_presets_take(tmp_path, monkeypatch):
    """As documented: the very scenes that the training would make, and none of them made again."""
    fill(tmp_path, start=3, count=1, nice=0)
    (file,) = tmp_path.iterdir()
    scenes = ProceduralScenes(PRESETS["cascade-procedural"].scenes)  # type: ignore[union-attr]
    made = scenes.scene(3)
    monkeypatch.setattr(procedural_scenes, "generate_scene", None)
    kept = ProceduralScenes(replace(scenes.config, pool=tmp_path)).scene(3)
    assert file.name == "00000003.safetensors" and kept.name == made.name
    torch.testing.assert_close(kept.views.images, made.views.images, atol=0.51 / 255, rtol=0)
    fill(tmp_path, start=3, count=1, nice=0)


def test_examples_of_a_pool(pool):
    scenes = ProceduralScenes(procedural(pool=pool))
    scene = scenes.scene(0)
    example = scenes.example(0, 2, seeded(1))
    again = scenes.example(0, 2, seeded(1))
    assert torch.equal(example.target.images, again.target.images)
    assert example.source.images.shape == (2, 3, 16, 24)
    distances = (scene.views.images - example.target.images).abs().flatten(1).sum(1)
    assert (distances == 0).sum() == 1  # the target is one of the views ...
    assert (example.source.images - example.target.images).abs().flatten(1).sum(1).min() > 0  # ... and no source
    assert example.depth is not None
    known = example.depth[example.depth > 0]
    assert (known >= example.target.cameras.near).all() and (known <= example.target.cameras.far).all()


def test_too_few_views_and_a_pool_of_another_size_are_bad_input(pool):
    scenes = ProceduralScenes(procedural(pool=pool))
    with pytest.raises(InputError, match=r"--scenes.scene.num-views"):
        draw_example(scenes.scene(0), 4, seeded(0))
    config = procedural(pool=pool)
    with pytest.raises(InputError, match=r"--scenes.pool") as error:
        ProceduralScenes(replace(config, scene=replace(config.scene, size=(32, 16)))).scene(0)
    assert "\n" not in str(error.value)


# DTU


def write_dtu_root(root: Path) -> Path:
    """A training scan of 5 views under two lights with depth, and a test scan, in the published layout, tiny photos."""
    scene = make_scene(views=5, size=(640, 512), focal=(560.0, 560.0), center=None)
    ids = (0, 1, 2, 3, 4)
    for light in (0, 3):
        write_dtu(root, scene, scan="scan3", light=light, ids=ids)
    for i in ids:
        write_pfm(root / "Depths" / "scan3" / f"depth_map_{i:04d}.pfm", np.full((512, 640), 800.0))
    lines = ["5"]
    for i in ids:
        others = sorted((j for j in ids if j != i), key=lambda j: abs(i - j))
        lines += [str(i), "4 " + " ".join(f"{j} {100.0 / abs(i - j):.3f}" for j in others)]
    (root / "Cameras" / "pair.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def dtu_root(tmp_path_factory) -> Path:
    return write_dtu_root(tmp_path_factory.mktemp("dtu"))


def test_shrunk_scenes_keep_their_geometry():
    """A pixel of the small picture shows what its pixels of the large one show, where they show it."""
    scene = generate_scene(3, ProceduralConfig(size=(32, 24), num_views=2, complexity=(0.0, 0.0), supersample=1))
    small = shrunk_scene(scene, 2)
    assert small.views.cameras.size == (16, 12) and small.depth.shape == (2, 12, 16)
    fine_pixels = scene.views.images[..., 6:8, 10:12]
    torch.testing.assert_close(small.views.images[..., 3, 5], fine_pixels.mean((-2, -1)))
    fine, coarse = scene.views.cameras[0], small.views.cameras[0]
    point = torch.tensor([0.3, -0.2, 1.0])
    torch.testing.assert_close((fine.K @ point)[:2] / 2, (coarse.K @ point)[:2])
    assert torch.equal(small.depth, scene.depth[:, 1::2, 1::2])
    assert shrunk_scene(scene, 1) is scene
    with pytest.raises(InputError, match=r"--scenes.shrink: expected a divisor"):
        ProceduralScenesConfig(scene=ProceduralConfig(size=(32, 24)), shrink=5)


def test_dtu_examples_follow_the_pair_list(dtu_root):
    assert read_pairs(dtu_root / "Cameras" / "pair.txt")[0] == [1, 2, 3, 4]
    scenes = DTUScenes(dtu_root, (40, 32))
    assert scenes.scans == ["scan3"]
    names = set()
    for item in range(8):
        example = scenes.example(item, 3, seeded(item))
        names.add(example.scene)
        assert example.source.images.shape == (3, 3, 32, 40)
        centers = torch.cat([example.source.cameras.centers, example.target.cameras.centers[None]])
        assert len(torch.unique(centers, dim=0)) == 4  # no view twice
        assert example.depth is not None
        torch.testing.assert_close(example.depth, torch.full((32, 40), 4.0))
    assert {"light 0", "light 3"} <= {name.split(", ")[1] for name in names}
    assert dtu_held_out(dtu_root, (40, 32), 4) == []


def test_scan_folders_of_another_name_are_trained_on_as_they_are_checked(dtu_root, tmp_path):
    root = tmp_path / "DTU"
    shutil.copytree(dtu_root, root)
    folders = root / "Rectified"
    (folders / "scan3_train").rename(folders / "scan3")
    assert inspect_dtu(root).lights == inspect_dtu(dtu_root).lights
    ours, theirs = (DTUScenes(place, (40, 32)).example(0, 3, seeded(0)) for place in (root, dtu_root))
    assert ours.scene == theirs.scene and torch.equal(ours.source.images, theirs.source.images)
    (folders / "scan3_train").mkdir()  # the one that is looked into
    assert scans(root) == ["scan3"] and inspect_dtu(root).training_problems


@pytest.mark.parametrize("content", ["", "2\n0\n1 1 9.0\n1\n2 0 9.0", "many"])
def test_malformed_pair_lists_are_bad_input(tmp_path, content):
    path = tmp_path / "pair.txt"
    path.write_text(content)
    with pytest.raises(InputError, match="malformed"):
        read_pairs(path)
    with pytest.raises(InputError, match="found none"):
        read_pairs(tmp_path / "missing.txt")


def test_what_is_no_dtu_root_is_bad_input(dtu_root, tmp_path):
    with pytest.raises(InputError, match="expected a DTU root"):
        DTUScenes(tmp_path, (40, 32))
    (tmp_path / "Rectified" / "scan1_train").mkdir(parents=True)
    (tmp_path / "Rectified" / "scans_of_mine_train").mkdir()
    with pytest.raises(InputError, match="none of DTU's training scans"):
        DTUScenes(tmp_path, (40, 32))
    with pytest.raises(InputError, match="no view has 5 partners"):
        DTUScenes(dtu_root, (40, 32)).example(0, 5, seeded(0))
    (tmp_path / "Rectified" / "scan3_train").mkdir()
    (tmp_path / "Cameras").mkdir()
    (tmp_path / "Cameras" / "pair.txt").write_text("0")
    with pytest.raises(InputError, match="no pictures of scan3"):
        DTUScenes(tmp_path, (40, 32)).example(0, 3, seeded(0))


# Presets


def tiny_model(config: ModelConfig) -> ModelConfig:
    """Tiny sizes with the options of ``config`` that make it another network."""
    tiny = TINY_MODELS[config.configuration]
    own = getattr(config, config.configuration)
    options = {name: getattr(own, name) for name in ("view_refinement", "latent_query")}
    return replace(tiny, **{config.configuration: replace(getattr(tiny, config.configuration), **options)})


def tiny_preset(name: str, out: Path, pool: Path, dtu_root: Path) -> ProceduralTraining | DTUTraining:
    """Tiny sizes, and the Gaussian prior for the preset's own."""
    preset = PRESETS[name]
    trainer = replace(
        preset.trainer,
        model=tiny_model(preset.trainer.model),
        guidance=replace(preset.trainer.guidance, prior=PriorConfig(kind="gaussian")),
        out=out,
        steps=2,
        rays=16,
        tile=(16, 16),
        device="cpu",
        workers=0,
        source_views=(2, 3),
        validate_every=2,
    )
    if isinstance(preset, DTUTraining):
        return replace(preset, trainer=trainer, root=dtu_root, size=(40, 32), held_out=1)
    return replace(preset, trainer=trainer, scenes=procedural(pool=pool), held_out=1)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_trains(name, tmp_path, pool, dtu_root):
    run = run_training(tiny_preset(name, tmp_path / "run", pool, dtu_root))
    model = IDNeRF.from_pretrained(run)
    assert model.config.configuration == PRESETS[name].trainer.model.configuration
    training = model.metadata["training"]
    assert ("DTU" if name.endswith("dtu") else "procedural") in training["data"] and training["source_views"] == [2, 3]
    assert ("prior" in training) == name.startswith("idnerf")
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert next(e["kind"] for e in entries if e["step"] == 2) == "train"


@pytest.mark.parametrize("wrong", ["used run folder", "weights that are none", "no such run", "no latent to guide"])
def test_what_forbids_a_training_is_said_before_held_out_scenes_are_made(wrong, tmp_path, pool, monkeypatch):
    def made(*_):
        raise AssertionError("made held-out scenes first")

    monkeypatch.setattr(procedural_scenes, "held_out_examples", made)
    preset = tiny_preset("cascade-procedural", tmp_path / "run", pool, tmp_path)
    changes = {
        "used run folder": {},
        "weights that are none": {"init": str(tmp_path / "none.safetensors")},
        "no such run": {"resume": tmp_path / "nowhere"},
        "no latent to guide": {"guidance": replace(preset.trainer.guidance, sds_weight=1.0)},
    }
    if wrong == "used run folder":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "training_state.safetensors").touch()
    with pytest.raises(InputError):
        run_training(replace(preset, trainer=replace(preset.trainer, **changes[wrong])))


def child_environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(idnerf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=child_environment(), timeout=300
    )


def test_the_command_line_trains(tmp_path, dtu_root):
    flags = {
        "root": dtu_root,
        "out": tmp_path / "run",
        "size": "40 32",
        "steps": 2,
        "rays": 16,
        "workers": 1,
        "device": "cpu",
        "source-views": "2 3",
        **{f"model.paper.{name.replace('_', '-')}": value for name, value in dataclasses.asdict(TINY_PAPER).items()},
    }
    left_out = ("groups", "view_aggregation", "num_views", "published_behaviour", "attention_splits")
    for name in (*left_out, "view_refinement"):
        del flags[f"model.paper.{name.replace('_', '-')}"]
    flags["model.paper.latent-size"] = "6 6"
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split())]
    done = run_command("-m", "idnerf.cli", "train", "matchnerf-dtu", *words)
    assert done.returncode == 0, done.stderr
    assert "weights.safetensors" in done.stdout
    assert IDNeRF.from_pretrained(tmp_path / "run").config.paper == TINY_PAPER


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_flags_give_a_preset_back(name, tmp_path):
    trainer = PRESETS[name].trainer
    prior = replace(trainer.guidance.prior, ray_tokens=False, path=str(tmp_path / "a prior"))
    guidance = replace(trainer.guidance, prior=prior)
    changed = replace(PRESETS[name], trainer=replace(trainer, steps=7, tile=None, augment=False, guidance=guidance))
    for config in (PRESETS[name], changed):
        if isinstance(config, DTUTraining):
            config = replace(config, root=config.root.absolute())  # it holds in any folder
        assert parse(type(config), list(flags_of(config)), "train", default=PRESETS[name]) == config


def test_a_run_that_does_not_say_how_it_was_started_is_warned_of(tmp_path, capsys):
    train(tiny_config(tmp_path / "run"), PlaneScenes(), [])
    assert recorded_flags("cascade-procedural", ["--resume", str(tmp_path / "run")]) == []
    assert "does not say how it was started" in capsys.readouterr().err


def test_a_resumed_run_needs_its_first_weights_no_more_and_keeps_its_origin(tmp_path):
    start = tmp_path / "start.safetensors"
    IDNeRF(TINY_MODELS["paper"]).save(start)
    config = tiny_config(tmp_path / "run", init=str(start), steps=2, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupted(1), [], options={"flags": ["--steps", "2"]})
    origin = load_state(tmp_path / "run" / STATE_FILE).origin
    start.unlink()
    train(replace(config, resume=tmp_path / "run"), PlaneScenes(), [])
    state = load_state(tmp_path / "run" / STATE_FILE)
    assert (state.step, state.origin, state.options) == (2, origin, {"flags": ["--steps", "2"]})
    assert IDNeRF.from_pretrained(tmp_path / "run").metadata["training"] == origin


def test_a_resumed_run_finds_its_options_again_and_takes_new_ones(tmp_path, pool, dtu_root):
    run, name = tmp_path / "run", "cascade-procedural"
    preset = tiny_preset(name, run, pool, dtu_root)
    preset = replace(preset, trainer=replace(preset.trainer, seed=5, fast_share=0.25, save_every=1))
    here = ["--device", "cpu", "--workers", "0"]
    train_command([name, *flags_of(preset), *here, "--out", str(run)])
    assert load_state(run / STATE_FILE).step == 2
    train_command([name, "--resume", str(run), "--steps", "3", *here])
    state = load_state(run / STATE_FILE)
    assert state.step == state.config["steps"] == 3
    assert (state.config["seed"], state.config["fast_share"], state.config["tile"]) == (5, 0.25, [16, 16])
    train_command([name, f"--resume={run}", *here])  # the new number of steps is found again, too
    flags = load_state(run / STATE_FILE).options["flags"]
    assert flags[flags.index("--steps") + 1] == "3"
    train_command([name, f"--resume={run}", "--steps", "4", *here])
    assert load_state(run / STATE_FILE).step == 4
    with pytest.raises(InputError, match="was started with the preset cascade-procedural, got matchnerf-procedural"):
        train_command(["matchnerf-procedural", "--resume", str(run)])


def test_a_run_from_before_a_model_option_is_resumed_without_flags_whatever_its_preset_says(tmp_path, pool, dtu_root):
    run, name = tmp_path / "run", "cascade-procedural"
    here = ["--device", "cpu", "--workers", "0"]
    train_command([name, *flags_of(tiny_preset(name, run, pool, dtu_root)), *here, "--out", str(run)])
    tensors, metadata = read_tensors(run / STATE_FILE)
    del metadata["train_config"]["model"]["cascade"]["mirrorings"]
    flags, flag = metadata["options"]["flags"], "--model.cascade.mirrorings"
    del flags[flags.index(flag) : flags.index(flag) + 2]
    write_tensors(run / STATE_FILE, tensors, metadata)
    assert PRESETS[name].trainer.model.cascade.mirrorings == 4
    train_command([name, "--resume", str(run), "--steps", "3", *here])
    assert load_state(run / STATE_FILE).step == 3
    assert IDNeRF.from_pretrained(run).config.cascade.mirrorings == 1


# Several processes


def test_torchrun_decides_the_number_of_processes():
    torchrun = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "WORLD_SIZE": "6", "RANK": "1", "LOCAL_RANK": "1"}
    assert process_counts(1, torchrun) == process_counts(2, torchrun) == (2, 3)
    assert process_counts(4, {}) == (4, 1)
    with pytest.raises(InputError, match="--processes 3: torchrun has started 2"):
        process_counts(3, torchrun)


def test_two_processes_give_the_gradient_of_one_and_train_together(tmp_path):
    two_processes.main(tmp_path, 2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = run_command(*torchrun, two_processes.__file__, str(tmp_path), "1")
    assert two.returncode == 0, two.stderr
    ours, theirs = (torch.load(tmp_path / f"gradients_{size}.pt", weights_only=True) for size in (2, 1))
    assert (ours["world"], theirs["world"]) == (1, 2)
    for name, gradient in ours["gradients"].items():
        torch.testing.assert_close(theirs["gradients"][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["step"]) for e in entries] == [(k, s) for s in (1, 2, 3) for k in ("train", "validation")]
    assert load_state(tmp_path / "run" / STATE_FILE).step == 3
    assert (tmp_path / "stopped_0").exists() and (tmp_path / "stopped_1").exists()


def test_processes_that_the_command_starts_say_once_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("idnerf.commands.train.run_training", lambda *_: tmp_path)
    for rank in ("0", "1"):  # as Lightning Fabric's launcher numbers them for --processes 2
        for name, value in (("LOCAL_RANK", rank), ("NODE_RANK", "0"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        train_command(["cascade-procedural", "--processes", "2", "--device", "cpu", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("weights.safetensors") == 1


# Configuration


CONFIGS = [
    CascadeConfig,
    PaperConfig,
    ModelConfig,
    GuidanceConfig,
    PriorConfig,
    LossConfig,
    OptimizerConfig,
    TrainerConfig,
    ProceduralScenesConfig,
    ProceduralConfig,
    CameraNoiseConfig,
    LightNoiseConfig,
    ProceduralTraining,
    DTUTraining,
    FinetuneConfig,
    PriorTrainerConfig,
    SmallPriorConfig,
    PosesConfig,
    FilterConfig,
    MeshConfig,
]
CALLED = {"config", "c"}
"""What a variable of a configuration is called, beside the names of the fields that hold one."""


def holders() -> dict[str, set[str]]:
    """Names of the fields that hold each configuration."""
    names: dict[str, set[str]] = {config.__name__: set() for config in CONFIGS}
    for config in CONFIGS:
        for field, kind in get_type_hints(config).items():
            if getattr(kind, "__name__", "") in names:
                names[kind.__name__].add(field)
    return names


def options_read() -> dict[str, set[str]]:
    """By configuration, the options read of a variable that is called like one of it; ``__post_init__`` apart.

    Of a variable called ``config`` only in modules that name the configuration, of ``self`` only in its own class.
    """
    held_by, read = holders(), {config.__name__: set() for config in CONFIGS}

    def visit(node: ast.AST, named: set[str], owner: str) -> None:
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            return
        owner = node.name if isinstance(node, ast.ClassDef) else owner
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            for config, fields in held_by.items():
                if base in fields or (base in CALLED and config in named) or (base == "self" and owner == config):
                    read[config].add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child, named, owner)

    for path in Path(idnerf.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        visit(tree, named, "")
    return read


def test_an_option_of_a_common_name_is_not_read_by_whoever_reads_that_name():
    read = options_read()
    for name in ("shape", "weights", "images"):
        assert not [config for config, names in read.items() if name in names], name


def test_every_option_is_read_and_documented():
    read = options_read()
    for config in CONFIGS:
        unread = [field.name for field in dataclasses.fields(config) if field.name not in read[config.__name__]]
        assert not unread, f"{config.__name__}: nothing reads {unread}"
        source = ast.parse(Path(sys.modules[config.__module__].__file__ or "").read_text(encoding="utf-8"))
        body = next(n for n in ast.walk(source) if isinstance(n, ast.ClassDef) and n.name == config.__name__).body
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign):
                assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), (
                    f"{config.__name__}.{ast.unparse(statement.target)} has no docstring, so no help"
                )


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.cascade.samples", "3"],  # what the weights have
        ["--model.cascade.samples", "5", "--extend"],
        ["--steps", "1"],
    ],
)
def test_model_options_that_a_training_follows_are_taken(tmp_path, flags):
    held = ModelConfig(cascade=replace(TINY_CASCADE, samples=3))
    IDNeRF(held).save(tmp_path / "start.safetensors")
    arguments = ["--init", str(tmp_path / "start.safetensors"), *flags]
    config = parse(ProceduralTraining, arguments, "train", default=PRESETS["cascade-procedural"])
    check_model_options(config.trainer, arguments)
    refused = [*arguments, "--model.cascade.samples", "4"]
    config = parse(ProceduralTraining, refused, "train", default=PRESETS["cascade-procedural"])
    if "--extend" not in flags:
        with pytest.raises(InputError, match="add --extend"):
            check_model_options(config.trainer, refused)
    check_model_options(replace(config.trainer, resume=tmp_path), refused)
