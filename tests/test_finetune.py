"""Refinement on one scene: never worse than the start, blind to what is held out, and worth its minutes."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from command_line import run
from idnerf.checkpoint import read_tensors
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF
from idnerf.priors.prior import PriorConfig
from idnerf.training.examples import seeded
from idnerf.training.finetune import (
    FinetuneConfig,
    Run,
    Split,
    finetune,
    held_out_psnr,
    hold_out,
    rotation,
    split_without,
    start_guidance,
    unseen_camera,
)
from idnerf.training.score_distillation import GuidanceConfig, ScoreDistillation
from idnerf.types import Views
from tiny_cases import TINY_MODELS, plane_views, waken, with_latent

TILE = (16, 16)
QUICK = FinetuneConfig(steps=6, evaluate_every=3, tile=TILE, warmup=1, ema_decay=0.0)


def tiny_model(configuration: str = "cascade", seed: int = 0) -> IDNeRF:
    torch.manual_seed(seed)
    return waken(IDNeRF(TINY_MODELS[configuration])).eval()


def state(model: IDNeRF) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- roles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "number"), [(4, 1), (6, 1), (12, 2), (50, 8)])
def test_one_photo_in_six_is_held_out_and_the_others_train(count, number):
    split = hold_out(plane_views(count, (16, 16)))
    assert len(split.held_out) == number and split.targets == split.sources
    assert sorted((*split.targets, *split.held_out)) == list(range(count))


def test_a_rotation_holds_out_each_photo_once_as_a_target():
    splits = rotation(3)
    assert [split.held_out for split in splits] == [(0,), (1,), (2,)]
    for split in splits:
        assert split.sources == (0, 1, 2) and set(split.targets) == {0, 1, 2} - set(split.held_out)


def test_too_few_photos_are_refused():
    with pytest.raises(InputError, match="at least 3 must remain"):
        hold_out(plane_views(3, (16, 16)))
    with pytest.raises(InputError, match="give more photos"):
        finetune(tiny_model(), plane_views(4), [split_without(4, [0, 1])], QUICK)


def test_held_out_photos_have_no_say_in_a_step():
    photos = plane_views(5)
    split = split_without(5, [2])
    spoilt = photos.images.clone()
    spoilt[2] = 1 - spoilt[2]
    states = []
    for images in (photos.images, spoilt):
        run = Run(tiny_model(), Views(images, photos.cameras), split, QUICK, 3, None)
        for _ in range(2):
            run.step()
        states.append(state(run.model))
    assert not moved(*states) and moved(states[0], state(tiny_model()))


def test_the_seed_is_that_of_the_samples_too(monkeypatch):
    drawn: dict[int, list] = {}
    whole = Run.example

    def told(_model, batch, _loss, generator, **_):
        drawn.setdefault(config.seed, []).append((batch.scenes, torch.rand(2, generator=generator).tolist()))
        raise InterruptedError

    monkeypatch.setattr("idnerf.training.finetune.objective", told)
    monkeypatch.setattr(Run, "example", lambda run, _: whole(run, torch.Generator().manual_seed(0)))
    for seed in (0, 0, 1):
        config = replace(QUICK, seed=seed)
        with pytest.raises(InterruptedError):
            Run(tiny_model(), plane_views(4), rotation(4)[0], config, 3, None).step()
    assert drawn[0][0] == drawn[0][1] and drawn[0][0][0] == drawn[1][0][0] and drawn[0][0][1] != drawn[1][0][1]


def test_a_target_is_never_its_own_source():
    photos = plane_views(4)
    run = Run(tiny_model(), photos, rotation(4)[0], QUICK, 3, None)
    seen = set()
    for seed in range(30):
        example = run.example(torch.Generator().manual_seed(seed))
        target = int(example.scene.removeprefix("photo "))
        seen.add(target)
        same = (example.source.cameras.c2w - photos.cameras.c2w[target]).abs().amax((-2, -1))
        assert (same > 1e-4).all() and len(example.source) == 3
        assert example.target.images.shape == (3, 16, 16)
    assert seen == {1, 2, 3}


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", ["hold out", "rotate"])
def test_steps_that_do_harm_leave_the_starting_weights_bit_for_bit(splits):
    photos = plane_views(4 if splits == "hold out" else 3)
    model = tiny_model()
    start = state(model)
    roles = [hold_out(photos)] if splits == "hold out" else rotation(3)
    config = FinetuneConfig(steps=4, evaluate_every=2, tile=TILE, lr=300.0, warmup=0, ema_decay=0.0)
    result = finetune(model, photos, roles, config)
    assert result.best_step == 0 and result.after == result.before
    assert not moved(start, state(model)) and not model.training


def test_a_diverged_training_says_so():
    config = FinetuneConfig(steps=9, evaluate_every=1, tile=TILE, lr=1e30, warmup=0, ema_decay=0.0)
    result = finetune(tiny_model(), plane_views(4), [hold_out(plane_views(4))], config)
    assert "lower --lr" in result.stopped and result.best_step == 0 and result.curve[-1][1] == -math.inf


@pytest.mark.parametrize("splits", ["hold out", "rotate"])
def test_an_untrained_model_gets_better_on_photos_it_was_not_asked_for(splits):
    photos = plane_views(4 if splits == "hold out" else 3)
    model = tiny_model()
    start = state(model)
    roles = [hold_out(photos)] if splits == "hold out" else rotation(3)
    config = FinetuneConfig(steps=16, evaluate_every=8, tile=(32, 24), lr=3e-3, warmup=2, ema_decay=0.5)
    told = []
    result = finetune(model, photos, roles, config, progress=lambda done, total: told.append((done, total)))
    assert (
        result.best_step > 0 and sum(result.after) / len(result.after) > sum(result.before) / len(result.before) + 0.5
    )
    assert [step for step, _ in result.curve] == [0, 8, 16]
    assert not model.training and all(p.requires_grad for p in model.parameters())
    changed = moved(start, state(model))
    assert changed and not any("encoder" in name.split(".") for name in changed)
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] <= told[-1][1]
    if splits == "hold out":
        assert held_out_psnr(model, photos, roles[0].held_out, roles[0].sources, 3) == pytest.approx(result.after)


def test_the_encoder_moves_when_it_has_a_learning_rate():
    run = Run(tiny_model(), plane_views(4), rotation(4)[0], FinetuneConfig(tile=TILE, encoder_lr=1e-3), 3, None)
    start = state(run.model)
    run.step()
    assert any("encoder" in name.split(".") for name in moved(start, state(run.model)))


def test_the_same_seed_gives_the_same_weights():
    states = []
    for seed in (0, 0, 1):
        config = FinetuneConfig(tile=TILE, seed=seed, ema_decay=0.0)
        run = Run(tiny_model(), plane_views(4), hold_out(plane_views(4)), config, 3, None)
        run.step(), run.step()
        states.append(state(run.model))
    assert not moved(states[0], states[1]) and moved(states[0], states[2])


def test_time_and_patience_end_it():
    photos, split = plane_views(4), hold_out(plane_views(4))
    hurried = finetune(tiny_model(), photos, [split], FinetuneConfig(minutes=1e-6, tile=TILE))
    assert hurried.stopped == "the time was up" and hurried.curve[-1][0] == 1
    config = FinetuneConfig(steps=50, evaluate_every=1, patience=2, lr=1e-12, warmup=0, tile=TILE)
    idle = finetune(tiny_model(), photos, [split], config)
    assert "stopped rising" in idle.stopped and idle.curve[-1][0] <= 10


def test_the_paper_configuration_is_refined_too():
    model = tiny_model("paper")
    start = state(model)
    config = FinetuneConfig(steps=2, evaluate_every=1, lr=1e-3, rays=32, ema_decay=0.0)
    result = finetune(model, plane_views(4), [hold_out(plane_views(4))], config)
    assert result.curve[-1][0] == 2
    assert bool(moved(start, state(model))) == (result.best_step > 0)


# --- guidance -----------------------------------------------------------------------------------------------------

GUIDED = GuidanceConfig(sds_weight=1.0, guidance_scale=1.0, prior=PriorConfig(kind="gaussian"))


def test_a_rotation_keeps_one_training_at_a_time():
    photos, alive = plane_views(5), []

    def count(*_: int) -> None:
        alive.append(sum(type(thing) is Run for thing in gc.get_objects()))

    config = replace(QUICK, steps=2, evaluate_every=1)
    finetune(tiny_model(), photos, rotation(5), config, num_sources=2, progress=count)
    assert len(alive) >= 10 and set(alive) == {1}


def test_unseen_cameras_lie_between_photos(generator):
    cameras = plane_views(5).cameras
    spread = torch.cdist(cameras.centers, cameras.centers).max()
    for _ in range(20):
        camera = unseen_camera(cameras, (0, 1, 3, 4), generator)
        rotation_part = camera.c2w[0, :3, :3]
        torch.testing.assert_close(rotation_part @ rotation_part.T, torch.eye(3), atol=1e-5, rtol=0)
        distances = (cameras.centers[[0, 1, 3, 4]] - camera.centers[0]).norm(dim=-1)
        assert distances.min() < spread and (distances > 1e-5).all()


def test_guidance_trains_the_latent_network_at_cameras_without_photo():
    torch.manual_seed(0)
    model = waken(IDNeRF(with_latent("cascade", "pixel"))).eval()
    photos = plane_views(4)
    states = []
    for guidance in (GuidanceConfig(), GUIDED):
        copy = IDNeRF(model.config)
        copy.load_state_dict(model.state_dict())
        config = FinetuneConfig(tile=TILE, guidance=guidance, ema_decay=0.0)
        run = Run(copy, photos, hold_out(photos), config, 3, start_guidance(copy, config))
        run.step()
        states.append(state(run.model))
    different = moved(*states)
    assert different and all("latent" in name for name in different)


@pytest.mark.parametrize(("query", "size"), [("pixel", TILE), ("global", (32, 24))])
def test_guidance_of_a_latent_that_is_read_at_once_is_of_all_of_it(query, size, monkeypatch):
    sizes = []

    def record(_, latent, *others):
        sizes.append(latent.cameras.size)
        return latent.values.sum()

    monkeypatch.setattr(ScoreDistillation, "__call__", record)
    model, photos = IDNeRF(with_latent("cascade", query)), plane_views(4)
    config = FinetuneConfig(tile=TILE, guidance=GUIDED)
    guidance = start_guidance(model, config)
    assert guidance is not None
    run = Run(model, photos, hold_out(photos), config, 3, guidance)
    run.guide(guidance, photos[1:][None], seeded(0), seeded(1))
    assert sizes == [size]


def test_guidance_of_a_model_without_latent_is_refused():
    config = FinetuneConfig(tile=TILE, guidance=GUIDED)
    with pytest.raises(InputError, match="no target-view latent"):
        finetune(tiny_model(), plane_views(4), [hold_out(plane_views(4))], config)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "garden"
    config = ProceduralConfig(size=(48, 32), num_views=5, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), folder)
    return folder


STEPS = ["--steps", 2, "--evaluate-every", 1, "--tile", 16, 16]


def test_the_command_writes_weights_that_the_others_take(capsys, scene, weights, tmp_path):
    out = tmp_path / "a" / "mine.safetensors"
    code, text, error = run(capsys, "finetune", scene, "--out", out, "--weights", weights, "--test", 3, *STEPS)
    assert code == 0, error
    assert "held out: PSNR" in text and "test: PSNR" in text and "view 3:" in text
    facts = read_tensors(out)[1]["finetuned"]
    assert (
        facts["photos"] == [0, 1, 2, 4] and 3 not in facts["held_out"] and facts["psnr_after"] >= facts["psnr_before"]
    )
    IDNeRF.from_pretrained(out)
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_photo_named_twice_counts_once(capsys, scene, weights, tmp_path):
    code, text, error = run(
        capsys, "finetune", scene, "--out", tmp_path / "mine.safetensors", "--weights", weights, "--test", "3,3",
        "--held-out", "0,0", *STEPS,
    )  # fmt: skip
    assert code == 0 and text.count(" 3: ") == 1 and text.count(" 0: ") == 1, (text, error)


def test_three_photos_rotate(capsys, scene, weights, tmp_path):
    out = tmp_path / "mine.safetensors"
    code, text, error = run(capsys, "finetune", scene, "--out", out, "--weights", weights, "--sources", "0,2,4", *STEPS)
    assert code == 0 and all(f"{view}: " in text.splitlines()[0] for view in (0, 2, 4)), error


def test_splits_are_checked_when_they_lack_something():
    with pytest.raises(InputError, match="one to score"):
        finetune(tiny_model(), plane_views(4), [Split((0, 1, 2), (0, 1, 2), ())], QUICK)
