"""Training the small prior: both parts move what they should, resuming is exact, bad input is one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from idnerf.checkpoint import read_tensors
from idnerf.commands.parsing import call_with
from idnerf.commands.train_prior import train_prior
from idnerf.data.image_io import read_image
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.data.procedural.files import save_scene
from idnerf.data.procedural.generate import generate_scene
from idnerf.errors import InputError
from idnerf.priors.latent_diffusion import (
    EncodedSources,
    SmallPriorConfig,
    load_small_prior,
    make_condition,
    new_networks,
)
from idnerf.priors.prior import Condition
from idnerf.training import prior_examples
from idnerf.training.prior_examples import (
    EncodedGroups,
    autoencoder_crops,
    choose_views,
    cut_latents,
    latent_batch,
    window_side,
)
from idnerf.training.prior_scenes import photo_groups, procedural_groups
from idnerf.training.prior_trainer import PriorTrainerConfig, drop_parts, train_small_prior
from idnerf.training.state import STATE_FILE, load_state
from idnerf.training.trainer import TrainingDivergedError
from idnerf.types import Views
from tiny_cases import cameras_on_a_wall, photograph_plane, plane_views

TINY = SmallPriorConfig(
    autoencoder_widths=(8, 8, 8, 8), unet_widths=(8, 16), token_width=12, heads=2, planes=4, source_side=48
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Two scenes of seven views in our own format."""
    root = tmp_path_factory.mktemp("scenes")
    for seed in (3, 4):
        config = ProceduralConfig(size=(48, 32), num_views=7, complexity=(0.0, 0.0), supersample=1)
        save_scene(generate_scene(seed, config), root / f"scene{seed}")
    return root


@pytest.fixture(scope="module")
def config(scenes) -> PriorTrainerConfig:
    return PriorTrainerConfig(
        scenes=scenes,
        size=(48, 32),
        sizes=TINY,
        autoencoder_steps=2,
        unet_steps=2,
        drop_condition=0.5,
        crop=24,
        autoencoder_batch=4,
        batch_size=2,
        source_views=(2, 3),
        held_out=2,
        log_every=1,
        save_every=1,
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> Path:
    return train_small_prior(replace(config, out=tmp_path_factory.mktemp("runs") / "prior"), torch.device("cpu"))


def state(run: Path, part: str) -> dict[str, torch.Tensor]:
    tensors, _ = read_tensors(run / "training_state.safetensors")
    return {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}


def test_a_run_leaves_a_prior_pictures_and_a_log(run):
    prior = load_small_prior(str(run / "prior"))
    assert prior.config == TINY
    assert read_image(run / "reconstructions.png").shape == (3, 2 * 36 - 4, 2 * 52 - 4)
    assert read_image(run / "samples.png").shape == (3, 2 * 36 - 4, 6 * 52 - 4)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {e["kind"] for e in entries} == {"autoencoder", "unet", "held_out"}
    last = entries[-1]
    for name in (
        "aligned_noise_mse_right",
        "tokens_noise_mse_swapped",
        "aligned_gain_over_none",
        "reconstruction_psnr",
    ):
        assert name in last


def test_every_weight_moves_and_only_in_its_own_part(run, config):
    torch.manual_seed(config.seed)
    start = new_networks(TINY).state_dict()
    after = state(run, "model/")
    # the weights that decide only what the tiny run has not reached yet: none
    still = [name for name, value in start.items() if torch.equal(value, after[name])]
    assert still == []


def test_the_second_part_leaves_the_autoencoder_as_the_first_left_it(run, config, tmp_path):
    stopped = replace(config, out=tmp_path / "a", unet_steps=1, measure_every=0)
    first = state(train_small_prior(stopped, torch.device("cpu")), "model/autoencoder.")
    last = state(run, "model/autoencoder.")
    assert len(first) > 50 and all(torch.equal(first[k], last[k]) for k in first)


def test_latents_of_the_trained_autoencoder_have_unit_scale(run, config):
    prior = load_small_prior(str(run / "prior"))
    groups, _ = photo_groups(config.scenes, config.size, 5, 2)
    latents = torch.cat([prior.encode(groups.group(n).images) for n in range(len(groups))])
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_is_the_same_bit_for_bit(stop, run, config, tmp_path, monkeypatch):
    """Stopped in the first part, between the parts, in the second part."""
    from idnerf.training import prior_trainer

    one_step = prior_trainer.PriorTraining.step

    def until(self, step, log):
        if step == stop:
            raise KeyboardInterrupt
        one_step(self, step, log)

    place = replace(config, out=tmp_path / "run", measure_every=0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prior_trainer.PriorTraining, "step", until)
        train_small_prior(place, torch.device("cpu"))
    resumed = train_small_prior(replace(place, resume=tmp_path / "run"), torch.device("cpu"))
    for part in ("model/", "ema/"):
        whole, again = state(run, part), state(resumed, part)
        assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_windows_of_latents_keep_their_rays(generator):
    photos = plane_views(2, (64, 48))
    latents = torch.arange(4 * 6 * 8, dtype=torch.float32).reshape(4, 6, 8)
    window, camera = cut_latents(latents, photos.cameras[0], (3, 2), (4, 3))
    torch.testing.assert_close(window, latents[:, 2:5, 3:7])
    assert camera.size == (32, 24)
    torch.testing.assert_close(camera.K[:2, 2], photos.cameras.K[0, :2, 2] - torch.tensor([24.0, 16.0]))


@pytest.mark.parametrize(("whole", "share", "expected"), [(26, 0.0, 8), (26, 1.0, 26), (5, 0.3, 5), (26, 0.5, 17)])
def test_window_sides(whole, share, expected):
    assert window_side(whole, share) == expected


def test_sources_are_the_nearest_and_bound_the_target_s_depth(generator):
    cameras = cameras_on_a_wall(5, (64, 48), generator)
    cameras = cameras.with_bounds(torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([10.0, 20, 30, 40, 50]))
    group = EncodedSources(torch.randn(5, 4, 6, 8), torch.rand(5, 3, 12, 16), cameras)
    latents, camera, source = choose_views(group, 2, 2, None)
    torch.testing.assert_close(latents, group.latents[2])
    distances = (cameras.centers - cameras.centers[2]).abs().sum(-1)
    nearest = distances.argsort()[1:3]
    torch.testing.assert_close(source.latents, group.latents[nearest])
    assert camera.near == source.cameras.near.min() and camera.far == source.cameras.far.max()


def test_view_aligned_features_are_computed_once_and_cut_to_the_window(run, config, monkeypatch):
    prior = load_small_prior(str(run / "prior"))
    groups = EncodedGroups(photo_groups(config.scenes, config.size, 5, 2)[0], prior, augment=True)
    sweeps = []
    inner = prior_examples.align_sources
    monkeypatch.setattr(prior_examples, "align_sources", lambda *a: sweeps.append(1) or inner(*a))
    for step in range(4):
        batch = latent_batch(groups, 0, step, 2, (2, 2))
        assert batch.aligned is not None and batch.aligned.shape[2:] == batch.latents.shape[2:]
        known = make_condition(prior.tokens, batch.source, batch.target, batch.latents.shape[:1:-1], 4, batch.aligned)
        anew = make_condition(prior.tokens, batch.source, batch.target, batch.latents.shape[:1:-1], 4)
        assert torch.equal(known.tokens, anew.tokens) and torch.equal(known.map[:, :2], anew.map[:, :2])
        # half precision; costs are averaged with their neighbours, which end at a window's edge
        inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        torch.testing.assert_close(known.map[inside], anew.map[inside], atol=5e-3, rtol=5e-3)
    done = len(sweeps)
    latent_batch(groups, 0, 3, 2, (2, 2))
    assert done <= 8 and len(sweeps) == done


def test_networks_can_train_in_bfloat16(run, config, tmp_path):
    """The same steps, but for rounding: every weight moves, and none far from where it goes in single precision."""
    half = train_small_prior(
        replace(config, out=tmp_path / "run", precision="bf16", measure_every=0), torch.device("cpu")
    )
    exact, rounded = state(run, "model/autoencoder."), state(half, "model/autoencoder.")
    assert any(not torch.equal(exact[k], rounded[k]) for k in exact)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in rounded.values())
    lr = config.autoencoder_lr * config.autoencoder_steps  # AdamW's steps are at most about the rate
    names = [k for k in exact if "quant_conv" not in k]  # those take up the latents' scale
    assert max((exact[k] - rounded[k]).abs().max() for k in names) < 4 * lr


def test_procedural_groups_shrink_what_the_pool_keeps(tmp_path):
    whole, held_out = procedural_groups((32, 24), tmp_path, 1, 2)
    half, held_out_half = procedural_groups((16, 12), tmp_path, 1, 2, shrink=2)
    for large, small in ((whole.group(0), half.group(0)), (held_out.group(1), held_out_half.group(1))):
        torch.testing.assert_close(small.images, torch.nn.functional.avg_pool2d(large.images, 2))
        assert small.cameras.size == (16, 12)
    assert len(list(tmp_path.iterdir())) == 1


def test_crops_are_a_function_of_the_step():
    generator = torch.Generator().manual_seed(0)
    photos, _ = photograph_plane(cameras_on_a_wall(6, (48, 32), generator), generator)

    class OneGroup:
        def __len__(self) -> int:
            return 1

        def group(self, index: int) -> Views:
            return photos

    first, again, other = (autoencoder_crops(OneGroup(), 0, step, 3, 16) for step in (4, 4, 5))
    assert first.shape == (3, 3, 16, 16) and torch.equal(first, again) and not torch.equal(first, other)


def test_dropping_parts_of_a_condition(generator):
    networks = new_networks(TINY)
    condition = Condition(torch.randn(4, 5, 12, generator=generator), torch.ones(4, 9, 3, 3))
    dropped = drop_parts(condition, networks, torch.tensor([0.05, 0.2, 0.39, 0.8]), 0.1, 0.3)
    torch.testing.assert_close(dropped.tokens[0], networks.tokens.empty.expand(5, -1))
    torch.testing.assert_close(dropped.tokens[1:], condition.tokens[1:])
    assert dropped.map.sum((2, 3)).eq(0).tolist() == [[True] * 9, *[[False] * 2 + [True] * 7] * 2, [False] * 9]


def test_a_training_goes_on_from_a_prior_and_keeps_its_autoencoder(run, config, tmp_path):
    """All steps are the U-Net's, and sizes are the prior's own, whatever the options say."""
    further = replace(config, init=str(run / "prior"), out=tmp_path / "further", sizes=SmallPriorConfig(planes=7))
    train_small_prior(further, torch.device("cpu"))
    before, after = (load_small_prior(str(r / "prior")) for r in (run, tmp_path / "further"))
    assert after.config == TINY
    for name, value in before.autoencoder.state_dict().items():
        assert torch.equal(value, after.autoencoder.state_dict()[name]), name
    moved = [not torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters(), strict=True)]
    assert any(moved)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "further" / "log.jsonl").read_text().splitlines()]
    assert kinds.count("unet") == config.unet_steps and "autoencoder" not in kinds
    with pytest.raises(InputError, match=r"--init: .* was started with .*prior, got none"):
        train_small_prior(replace(config, resume=tmp_path / "further"), torch.device("cpu"))
    other = replace(further, out=tmp_path / "other")
    with pytest.raises(InputError, match=r"holds no small prior .* as --init"):
        train_small_prior(replace(other, init=str(tmp_path)), torch.device("cpu"))
    with pytest.raises(InputError, match=r"--size: expected at most 48 on the longer side, as --init .*, got 64; give"):
        train_small_prior(replace(other, size=(64, 48)), torch.device("cpu"))


class Explode(torch.autograd.Function):
    """Unchanged forward; the gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0] * float("inf")


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(config, tmp_path, monkeypatch):
    from idnerf.training import prior_trainer

    terms = prior_trainer.PriorTraining.unet_terms
    monkeypatch.setattr(
        prior_trainer.PriorTraining,
        "unet_terms",
        lambda self, step: {"v": Explode.apply(terms(self, step)["v"]) if step == 3 else terms(self, step)["v"]},
    )
    place = replace(config, out=tmp_path / "run", measure_every=0)
    with pytest.raises(TrainingDivergedError, match=r"gradient is not finite at step 3; the last checkpoint stays in"):
        train_small_prior(place, torch.device("cpu"))
    assert load_state(tmp_path / "run" / STATE_FILE).step == 3
    assert all(torch.isfinite(value).all() for value in state(tmp_path / "run", "model/").values())


def test_a_resumed_run_finds_its_options_again_and_takes_new_ones(config, tmp_path, capsys, monkeypatch):
    place = tmp_path / "run"
    started = replace(config, out=place, measure_every=0, seed=5, augment=False)
    train_prior(started, "cpu")
    kept = load_state(place / STATE_FILE).config
    assert (kept["seed"], kept["augment"], kept["unet_steps"]) == (5, False, 2)
    arguments = ["--resume", str(place), "--unet-steps", "3", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    call_with(train_prior, arguments, "idnerf train-prior")
    again = load_state(place / STATE_FILE)
    assert again.step == 5 and again.config == {**kept, "unet_steps": 3, "resume": str(place), "out": "runs/prior"}
    said = capsys.readouterr().err
    assert "goes on with" in said and "--seed 5" in said and "--unet-steps 3" in said and "--no-augment" in said
    with pytest.raises(InputError, match=r"--autoencoder-steps: .* was started with 2, got 5"):
        call_with(train_prior, [*arguments, "--autoencoder-steps", "5"], "idnerf train-prior")


def test_a_run_that_does_not_say_how_it_was_started_is_warned_of(run, config, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    train_prior(replace(config, resume=tmp_path / "run"), "cpu")
    assert "does not say how it was started" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_another_autoencoder(run, config):
    with pytest.raises(InputError, match=r"--autoencoder-steps: .* was started with 2, got 5"):
        train_small_prior(replace(config, resume=run, autoencoder_steps=5), torch.device("cpu"))


def test_a_run_folder_is_not_overwritten(run, config):
    with pytest.raises(InputError, match="--resume"):
        train_small_prior(replace(config, out=run), torch.device("cpu"))
