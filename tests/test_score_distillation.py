"""Score distillation: its gradient, in closed form and in whom it reaches; schedules; guided trainings."""

import ast
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import idnerf
from idnerf.checkpoint import read_tensors
from idnerf.config import CASCADE_LOSS, PRESETS
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF
from idnerf.models.latent import TargetLatent
from idnerf.priors.gaussian import GaussianPrior
from idnerf.priors.prior import Condition, PriorConfig, load_prior, unet_latent
from idnerf.training import score_distillation, trainer
from idnerf.training.examples import StepDataset, seeded, stack_examples
from idnerf.training.objectives import LossConfig, objective
from idnerf.training.optimizer import (
    OptimizerConfig,
    clip_gradients,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)
from idnerf.training.score_distillation import (
    GuidanceConfig,
    ScoreDistillation,
    distillation_gradient,
    distillation_loss,
    scheduled_weight,
    timestep_bounds,
    timestep_weight,
)
from idnerf.training.trainer import Objectives, TrainerConfig, train
from idnerf.types import Batch, Views
from tiny_cases import TINY_MODELS, PlaneScenes, plane_views, tiny_example, waken, with_latent

CONFIGURATIONS = ("cascade", "paper")
GAUSSIAN = PriorConfig(kind="gaussian")


def gaussian() -> GaussianPrior:
    generator = torch.Generator().manual_seed(1)
    mean, other = torch.randn(2, 4, 1, 1, generator=generator)
    return GaussianPrior(mean, 0.2 + torch.rand(4, 1, 1, generator=generator), other)


def drawn(number: int = 2, size: tuple[int, int] = (5, 3), seed: int = 0):
    """(z, noise, timesteps, condition)."""
    generator = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, number, 4, size[1], size[0], generator=generator)
    timestep = torch.randint(20, 980, (number,), generator=generator)
    return z, noise, timestep, Condition(torch.ones(number, 1, 1))


def latent_of(z: torch.Tensor) -> tuple[TargetLatent, Views]:
    """A latent of as many targets, and their sources."""
    batch = stack_examples([tiny_example(seed, num_sources=2) for seed in range(len(z))])
    return TargetLatent(z, batch.target.cameras), batch.source


# The gradient


def test_the_gradient_in_z_is_the_weighted_difference_of_noises():
    prior, config = gaussian(), GuidanceConfig(sds_weight=1.0, guidance_scale=7.0)
    z, noise, timestep, condition = drawn(1)
    z.requires_grad_()
    loss = distillation_loss(z, distillation_gradient(prior, z, noise, timestep, condition, config))
    (gradient,) = torch.autograd.grad(loss, z)
    z_t = prior.add_noise(unet_latent(z.detach()), noise, timestep)
    with_condition = prior.predict_noise(z_t, timestep, condition)
    without = prior.predict_noise(z_t, timestep, prior.unconditional(condition))
    abar = prior.alphas_cumprod[timestep]
    expected = abar.sqrt() * (1 - abar) * (without + 7.0 * (with_condition - without) - noise)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 100.0])
def test_the_closed_form_under_the_gaussian_prior(scale):
    """e_hat - e = (s spread (x - m) - s^2 v e) / (s^2 v + spread^2) for x = 2 z - 1 and the guided mean m."""
    prior = gaussian()
    z, noise, timestep, condition = drawn()
    config = GuidanceConfig(sds_weight=1.0, guidance_scale=scale, weighting="uniform")
    gradient = distillation_gradient(prior, z, noise, timestep, condition, config)
    abar = prior.alphas_cumprod[timestep].double()[:, None, None, None]
    s, spread = abar.sqrt(), (1 - abar).sqrt()
    mean = prior.unconditional_mean + scale * (prior.mean - prior.unconditional_mean)
    x, v = 2 * z - 1, prior.variance
    expected = (s * spread * (x - mean) - s * s * v * noise) / (s * s * v + spread * spread)
    torch.testing.assert_close(gradient, expected.float(), atol=1e-4 * max(1.0, scale), rtol=1e-4)


def test_following_the_gradient_leads_to_what_the_prior_expects():
    mean = torch.tensor([0.8, -0.3, 0.1, -1.0])[:, None, None]
    config = GuidanceConfig(sds_weight=1.0, guidance_scale=1.0)
    distillation = ScoreDistillation(config, GaussianPrior(mean, torch.full((4, 1, 1), 0.01)))
    latent, source = latent_of(torch.zeros(1, 4, 6, 8))
    z, generator = latent.values, seeded(0)
    for _ in range(400):
        z.requires_grad_()
        (gradient,) = torch.autograd.grad(distillation(latent.with_values(z), source, 0.5, generator), z)
        z = (z - 0.1 * gradient).detach()
    torch.testing.assert_close(unet_latent(z).mean((0, 2, 3)), mean[:, 0, 0], atol=0.1, rtol=0)


def test_a_batch_of_two_is_two_of_one():
    prior, config = gaussian(), GuidanceConfig(sds_weight=1.0)
    z, noise, timestep, condition = drawn(2)
    z.requires_grad_()
    together = distillation_loss(z, distillation_gradient(prior, z, noise, timestep, condition, config))
    alone = [
        distillation_loss(
            z[i : i + 1],
            distillation_gradient(
                prior, z[i : i + 1], noise[i : i + 1], timestep[i : i + 1], Condition(condition.tokens[:1]), config
            ),
        )
        for i in range(2)
    ]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (together, (alone[0] + alone[1]) / 2)))


def guided_objective(configuration: str, query: str = "pixel", **changes) -> tuple[IDNeRF, Objectives, Batch]:
    """A waken model, its guided objective under the Gaussian prior, and a batch."""
    torch.manual_seed(0)
    model = waken(IDNeRF(with_latent(configuration, query)))
    config = GuidanceConfig(**{"sds_weight": 1.0, "prior": GAUSSIAN, **changes})
    loss = CASCADE_LOSS if configuration == "cascade" else LossConfig()
    training = TrainerConfig(model=model.config, loss=loss, guidance=config, steps=10, rays=32)
    distillation = ScoreDistillation(config, load_prior(GAUSSIAN))
    return model, Objectives(model, training, distillation), stack_examples([tiny_example(num_sources=2)])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_it_reaches_the_latent_network_and_nothing_else(configuration):
    model, objectives, batch = guided_objective(configuration)
    terms, _, _ = objectives(batch, 0, 0)
    terms["score_distillation"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in model.named_parameters() if name.startswith("core.latent.")}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_guidance_does_not_disturb_what_else_a_step_draws(configuration):
    _, objectives, batch = guided_objective(configuration)
    terms, mse, _ = objectives(batch, 3, 0)
    objectives.guidance = None
    unguided, unguided_mse, _ = objectives(batch, 3, 0)
    assert set(terms) - set(unguided) == {"score_distillation"}
    assert torch.equal(mse, unguided_mse)
    assert all(torch.equal(terms[name], value) for name, value in unguided.items())


# Schedules


def test_weights_of_timesteps():
    abar = torch.tensor([0.99, 0.5, 0.04])
    torch.testing.assert_close(timestep_weight("id-nerf", abar), abar.sqrt() * (1 - abar))
    torch.testing.assert_close(timestep_weight("dreamfusion", abar), 1 - abar)
    torch.testing.assert_close(timestep_weight("uniform", abar), torch.ones(3))
    prior = gaussian()
    z, noise, timestep, condition = drawn()
    config = GuidanceConfig(sds_weight=1.0, guidance_scale=1.0, weighting="clean")
    gradient = distillation_gradient(prior, z, noise, timestep, condition, config)
    signal, spread = prior.signal_and_noise(timestep)
    z_t = prior.add_noise(unet_latent(z), noise, timestep)
    clean = (z_t - spread * prior.predict_noise(z_t, timestep, condition)) / signal
    torch.testing.assert_close(gradient, unet_latent(z) - clean, atol=1e-3, rtol=1e-3)


def test_timesteps_stay_in_their_range_and_anneal():
    config = GuidanceConfig(timesteps=(0.02, 0.98), last_max_timestep=0.3)
    assert timestep_bounds(config, 0.0, 1000) == (20, 980)
    assert timestep_bounds(config, 0.5, 1000) == (20, 640)
    assert timestep_bounds(config, 1.0, 1000) == (20, 300)
    assert timestep_bounds(GuidanceConfig(timesteps=(0.0, 1.0), last_max_timestep=1.0), 0.0, 50) == (0, 49)
    assert timestep_bounds(GuidanceConfig(timesteps=(1.0, 1.0), last_max_timestep=1.0), 0.0, 50) == (49, 49)


def test_the_largest_timestep_stays_where_no_other_is_asked_for():
    config = GuidanceConfig(timesteps=(0.02, 0.5))
    assert [timestep_bounds(config, progress, 1000) for progress in (0.0, 0.5, 1.0)] == [(20, 500)] * 3
    assert timestep_bounds(GuidanceConfig(timesteps=(0.99, 1.0)), 0.5, 1000) == (990, 999)


def test_drawn_timesteps_fill_the_range(monkeypatch):
    config = GuidanceConfig(sds_weight=1.0, timesteps=(0.2, 0.3), last_max_timestep=0.25)
    distillation = ScoreDistillation(config, gaussian())
    latent, source = latent_of(torch.zeros(1, 4, 3, 4))
    seen = []
    inner = score_distillation.distillation_gradient
    monkeypatch.setattr(
        score_distillation,
        "distillation_gradient",
        lambda prior, z, noise, timestep, *rest: (seen.append(timestep), inner(prior, z, noise, timestep, *rest))[1],
    )
    generator = seeded(2)
    for _ in range(300):
        distillation(latent, source, 0.5, generator)
    timesteps = torch.cat(seen)
    low, high = timestep_bounds(config, 0.5, 1000)
    assert timesteps.min() >= low and timesteps.max() <= high
    assert timesteps.min() < low + 5 and timesteps.max() > high - 5


def test_the_weight_scales_the_loss_and_rises_over_the_warm_up():
    config = GuidanceConfig(sds_weight=0.5, warmup=0.2)
    assert [scheduled_weight(config, p) for p in (0.0, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.25, 0.5, 0.5])
    assert scheduled_weight(replace(config, warmup=0.0), 0.0) == 0.5
    latent, source = latent_of(torch.full((1, 4, 3, 4), 0.3))
    losses = {
        (weight, progress): ScoreDistillation(replace(config, sds_weight=weight), gaussian())(
            latent, source, progress, seeded(0)
        ).item()
        for weight in (0.5, 2.0)
        for progress in (0.1, 0.5)
    }
    assert losses[2.0, 0.1] == pytest.approx(4 * losses[0.5, 0.1], rel=1e-4)
    assert losses[2.0, 0.5] == pytest.approx(2 * losses[2.0, 0.1], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sds_weight": -1.0}, "sds-weight"),
        ({"sds_weight": math.nan}, "sds-weight"),
        ({"guidance_scale": -1.0}, "guidance-scale"),
        ({"timesteps": (0.5, 0.4)}, "timesteps"),
        ({"timesteps": (0.0, 1.2)}, "timesteps"),
        ({"last_max_timestep": 0.01}, "last-max-timestep"),
        ({"warmup": 2.0}, "warmup"),
    ],
)
def test_bad_options_are_named_by_their_flag(change, named):
    with pytest.raises(InputError, match=f"--guidance.{named}") as error:
        GuidanceConfig(**change)
    assert "\n" not in str(error.value)


# The optimizer


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("query", ["global", "pixel"])
def test_every_parameter_sits_in_one_group_and_moves_within_two_steps(configuration, query):
    """The fault of the public code: its latent network is in no group, so guidance changes nothing."""
    model, objectives, _ = guided_objective(configuration, query)
    config = OptimizerConfig(weight_decay=0.0, encoder_lr=1e-3, decoder_lr=2e-3, latent_lr=3e-3)
    groups = parameter_groups(model, config)
    assert {group["name"]: group["lr"] for group in groups} == {"encoder": 1e-3, "decoder": 2e-3, "latent": 3e-3}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in model.core.latent.parameters()}
    optimizer = make_optimizer(model, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    dataset = StepDataset(PlaneScenes(), seed=0, batch_size=1, source_views=(3, 3), tile=None, augment=False)
    for step in range(2):
        optimizer.zero_grad()
        terms, _, _ = objectives(dataset[step], step, 0)
        torch.stack(list(terms.values())).sum().backward()
        assert torch.isfinite(clip_gradients(optimizer, config))
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 1e-3, 1.5e-3]


@pytest.mark.parametrize("clip", ["all", "encoder"])
def test_a_strong_pull_on_the_latent_does_not_slow_the_rest(clip):
    model = IDNeRF(with_latent("paper", "pixel"))
    config = OptimizerConfig(grad_clip=1.0, clip=clip)
    optimizer = make_optimizer(model, config)
    size = {"encoder": 3.0, "decoder": 4.0, "latent": 1e6}
    for group in optimizer.param_groups:
        total = sum(p.numel() for p in group["params"])
        for p in group["params"]:
            p.grad = torch.full_like(p, size[group["name"]] / total**0.5)
    norm = clip_gradients(optimizer, config)
    assert norm.item() == pytest.approx(1e6, rel=1e-3)
    after = {
        group["name"]: torch.cat([p.grad.flatten() for p in group["params"]]).norm().item()
        for group in optimizer.param_groups
    }
    expected = {"all": (0.6, 0.8, 1.0), "encoder": (1.0, 4.0, 1e6)}[clip]
    assert tuple(after.values()) == pytest.approx(expected, rel=1e-3)


# Trainings


def tiny_training(out: Path, configuration: str = "cascade", **changes) -> TrainerConfig:
    return TrainerConfig(
        **{
            "model": with_latent(configuration, "pixel"),
            "guidance": GuidanceConfig(sds_weight=0.1, prior=GAUSSIAN),
            "out": out,
            "steps": 3,
            "tile": (16, 16),
            "rays": 32,
            "device": "cpu",
            "workers": 0,
            "validate_every": 0,
            **changes,
        }
    )


def trained(config: TrainerConfig) -> dict[str, torch.Tensor]:
    return read_tensors(train(config, PlaneScenes(), []) / "training_state.safetensors", "state")[0]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_weight_of_zero_is_exactly_the_unguided_run_and_loads_no_prior(configuration, tmp_path, monkeypatch):
    guided = trained(tiny_training(tmp_path / "guided", configuration))
    monkeypatch.setattr(trainer, "load_prior", lambda *_: pytest.fail("a prior was loaded"))
    off = GuidanceConfig(sds_weight=0.0, guidance_scale=3.0, prior=PriorConfig(kind="stable-diffusion-1.5"))
    zero = trained(tiny_training(tmp_path / "zero", configuration, guidance=off))
    unguided = trained(tiny_training(tmp_path / "unguided", configuration, guidance=GuidanceConfig()))
    assert all(torch.equal(value, unguided[name]) for name, value in zero.items())
    assert any(not torch.equal(value, unguided[name]) for name, value in guided.items())


def test_a_guided_training_is_logged_and_resumes_bit_for_bit(tmp_path):
    whole = trained(tiny_training(tmp_path / "whole", steps=4, save_every=2, log_every=1))
    entries = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all("score_distillation" in str(e) for e in entries if e["kind"] == "train")

    class Stops(PlaneScenes):
        def example(self, item, num_sources, generator):
            if item == 2:
                raise KeyboardInterrupt
            return super().example(item, num_sources, generator)

    config = tiny_training(tmp_path / "parts", steps=4, save_every=2, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, Stops(), [])
    parts = trained(replace(config, resume=tmp_path / "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_guidance_without_a_latent_is_refused(tmp_path):
    config = tiny_training(tmp_path, model=TINY_MODELS["cascade"])
    with pytest.raises(InputError, match=r"--model\.cascade\.latent-query pixel") as error:
        train(config, PlaneScenes(), [])
    assert "\n" not in str(error.value)


def test_a_network_prior_stays_as_it_is_and_out_of_the_checkpoints(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from idnerf.priors.latent_diffusion import SmallPriorConfig, new_networks, save_small_prior

    torch.manual_seed(0)
    sizes = SmallPriorConfig(autoencoder_widths=(8, 8, 8, 8), unet_widths=(8, 16), token_width=8, planes=3)
    save_small_prior(new_networks(sizes), sizes, tmp_path / "prior")
    loaded = []

    def load(config: PriorConfig, device: torch.device):
        prior = load_prior(config, device)
        loaded.append((prior, [p.clone() for p in prior.parameters()]))
        return prior

    monkeypatch.setattr(trainer, "load_prior", load)
    guidance = GuidanceConfig(sds_weight=1.0, prior=PriorConfig(kind="small", path=str(tmp_path / "prior")))
    config = tiny_training(tmp_path / "run", "paper", guidance=guidance, steps=2)
    state = trained(config)
    ((prior, before),) = loaded
    assert len(before) > 20
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(before, prior.parameters(), strict=True))
    names = set(IDNeRF(config.model).state_dict())
    assert {k.removeprefix("model/") for k in state if k.startswith("model/")} == names
    assert set(read_tensors(tmp_path / "run" / "weights.safetensors")[0]) == names


def test_inference_with_guided_weights_loads_no_prior(tmp_path):
    IDNeRF(with_latent("cascade", "pixel")).save(tmp_path / "weights.safetensors")
    views = plane_views(3)
    torch.save([views.images, views.cameras.c2w, views.cameras.K], tmp_path / "views.pt")
    code = (
        "import sys, torch, idnerf\n"
        f"model = idnerf.IDNeRF.from_pretrained({str(tmp_path / 'weights.safetensors')!r})\n"
        f"images, c2w, K = torch.load({str(tmp_path / 'views.pt')!r})\n"
        "from idnerf.types import Cameras, Views\n"
        "cameras = Cameras(c2w, K, (32, 24), torch.full((3,), 2.0), torch.full((3,), 8.0))\n"
        "assert model.render(Views(images, cameras)[1:], cameras[0]).rgb.shape == (3, 24, 32)\n"
        "heavy = ('diffusers', 'transformers')\n"
        "print([m for m in sys.modules if m in heavy or m.startswith('idnerf.priors')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_the_trainers_call_backward():
    callers = set()
    package = Path(idnerf.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
                callers.add(str(path.relative_to(package)))
    assert "training/trainer.py" in callers
    assert all(caller.startswith("training/") for caller in callers)
    assert not any("model" in caller or "distillation" in caller for caller in callers)


def test_presets_say_who_is_guided():
    guided = {name for name, preset in PRESETS.items() if preset.trainer.guidance.sds_weight > 0}
    assert guided >= {"idnerf-dtu", "idnerf-procedural"}
    assert not any(name.startswith("matchnerf") for name in guided)
    dtu = PRESETS["idnerf-dtu"].trainer
    assert dtu.guidance.guidance_scale == 100 and dtu.guidance.timesteps == (0.02, 0.98)
    assert (dtu.optimizer.encoder_lr, dtu.optimizer.decoder_lr, dtu.optimizer.latent_lr) == (5e-5, 5e-5, 1e-3)


def test_objective_hands_out_the_latent_that_was_rendered_with():
    model, _, batch = guided_objective("cascade")
    result = objective(model, batch, LossConfig(), seeded(0), rays_per_step=8, fast_share=0.0)
    assert result.latent is not None and result.latent.values.requires_grad
    plain = IDNeRF(TINY_MODELS["cascade"])
    assert objective(plain, batch, LossConfig(), seeded(0), rays_per_step=8, fast_share=0.0).latent is None


def test_a_latent_is_added_to_trained_weights(tmp_path):
    torch.manual_seed(4)
    plain = IDNeRF(TINY_MODELS["cascade"])
    plain.save(tmp_path / "plain.safetensors", half=False)
    config = tiny_training(tmp_path / "run", init=str(tmp_path / "plain.safetensors"), extend=True)
    model = trainer.start_model(config)
    assert model.config == with_latent("cascade", "pixel")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    assert trainer.start_model(replace(config, extend=False)).config == TINY_MODELS["cascade"]
    model.save(tmp_path / "latent.safetensors")
    for weights, wanted in (("latent", TINY_MODELS["cascade"]), ("plain", with_latent("paper", "pixel"))):
        with pytest.raises(InputError, match="cannot be extended"):
            IDNeRF.extending(tmp_path / f"{weights}.safetensors", wanted)


def test_the_added_parts_alone_can_be_trained(tmp_path):
    torch.manual_seed(4)
    IDNeRF(TINY_MODELS["cascade"]).save(tmp_path / "plain.safetensors", half=False)
    config = tiny_training(tmp_path / "run", init=str(tmp_path / "plain.safetensors"), extend=True, only_added=True)
    start = {name: value.clone() for name, value in trainer.start_model(config).state_dict().items()}
    trainer.train(replace(config, steps=2), PlaneScenes(), [])
    tensors, _ = read_tensors(tmp_path / "run" / "training_state.safetensors")
    moved = {k for k, value in start.items() if not torch.equal(value, tensors[f"model/{k}"])}
    assert moved and all(name.startswith(("core.latent.", "core.view_refinement.")) for name in moved)
    assert any(name.startswith("core.latent.") for name in moved)
    with pytest.raises(InputError, match="--only-added"):
        replace(config, extend=False)
