"""The ablation, end to end on one tiny scene: what it trains, that it resumes, and what its table says."""

import importlib
import json
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from idnerf.data.procedural import ProceduralConfig, generate_scene
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.priors.gaussian import GaussianPrior
from idnerf.priors.latent_diffusion import SmallPriorConfig, load_small_prior, new_networks, save_small_prior
from idnerf.training.procedural_scenes import ProceduralScenesConfig, draw_example
from idnerf.training.state import STATE_FILE
from idnerf.types import RenderOutput
from tiny_cases import TINY_CASCADE, TINY_PAPER, tiny_example

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
ablation = importlib.import_module("ablation")
tables = importlib.import_module("ablation_table")
boards = importlib.import_module("boards")
knowledge = importlib.import_module("latent_knowledge")

TINY_SCENE = ProceduralConfig(size=(48, 32), num_views=4, complexity=(0.0, 0.1), supersample=1)
TINY_PRIOR = SmallPriorConfig(
    autoencoder_widths=(8, 8, 8, 8), unet_widths=(8, 16), token_width=12, heads=2, planes=4, source_side=48
)
BUDGET = ablation.Budget(
    steps=1, paper_steps=1, rays=16, paper_samples=4, tile=(16, 16), max_scenes=1, prior="gaussian"
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Tiny networks, one tiny scene to train and to evaluate on, one real view."""
    scene = generate_scene(7, TINY_SCENE)
    monkeypatch.setattr(ablation, "CascadeConfig", lambda **options: replace(TINY_CASCADE, **options))
    paper = {"latent_size": None}
    monkeypatch.setattr(ablation, "PaperConfig", lambda **options: replace(TINY_PAPER, **{**paper, **options}))
    monkeypatch.setattr(ablation, "fixed_scenes", lambda _, limit: [(f"tiny-{i}", scene) for i in range(limit)])
    board = boards.Board("demo", "Demo", ("demo_scene",), "nearest", (48, 36), targets=(0,))
    monkeypatch.setattr(ablation, "BOARDS", (board,))
    inner = ablation.training

    def training(*arguments):
        config, scenes = inner(*arguments)
        return replace(config, workers=0), replace(scenes, scene=replace(TINY_SCENE, complexity=(0.0, 1.0)))

    monkeypatch.setattr(ablation, "training", training)
    return tmp_path


def options(folder: Path, **changes) -> dict:
    return {
        "work": folder / "work",
        "budget": BUDGET,
        "seeds": (0,),
        "scenes": 2,
        "num_sources": (2,),
        "device": "cpu",
        **changes,
    }


def test_runs_are_made_once_and_the_table_shows_what_is_there(tiny, monkeypatch, capsys):
    variants = ("no-latent", "guided-pixel", "paper-guided")
    data = Path(str(resources.files("idnerf")))
    ablation.main(**options(tiny, variants=variants, data=data, boards=("demo",)))
    for name in variants:
        assert (tiny / "work" / f"{name}-0" / STATE_FILE).is_file()
        scores = json.loads((tiny / "work" / f"{name}-0.json").read_text())
        assert len(scores["procedural-2"]["scenes"]) == 2 and len(scores["real-2"]) == 1
        assert ("influence" in scores["procedural-2"]) == (name != "no-latent")
        assert (tiny / "work" / f"{name}-0" / "procedural-2.png").is_file()
    table = (tiny / "work" / "ablation.md").read_text()
    assert "Incomplete" not in table and "| guided, `pixel` | 1 |" in table
    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(ablation, "render_with", lambda *_: pytest.fail("rendered again"))
    ablation.main(**options(tiny, variants=variants, data=data, boards=("demo",)))
    assert (tiny / "work" / "ablation.md").read_text() == table
    with pytest.raises(InputError, match="another budget"):
        ablation.main(**options(tiny, variants=variants, budget=replace(BUDGET, steps=2)))
    with pytest.raises(InputError, match="choose among"):
        ablation.main(**options(tiny, variants=("magic",)))


def test_a_run_can_be_trained_first_and_evaluated_later(tiny):
    ablation.main(**options(tiny, variants=("latent",), only_train=True))
    scores = json.loads((tiny / "work" / "latent-0.json").read_text())
    assert "trained" in scores and "procedural-2" not in scores
    ablation.main(**options(tiny, variants=("latent",)))
    assert "procedural-2" in json.loads((tiny / "work" / "latent-0.json").read_text())


def test_the_oracle_s_latent_is_the_true_picture_s(tiny, tmp_path):
    folder = tmp_path / "prior"
    save_small_prior(new_networks(TINY_PRIOR), TINY_PRIOR, folder)
    budget = replace(BUDGET, prior=str(folder))
    ablation.main(**options(tiny, variants=("oracle",), budget=budget, data=tiny))
    scores = json.loads((tiny / "work" / "oracle-0.json").read_text())
    assert scores["procedural-2"]["latent"]["correlation"] == pytest.approx(1, abs=1e-3)
    assert "real-2" not in scores


def test_the_prior_s_estimate_needs_no_true_picture(tiny, tmp_path):
    folder = tmp_path / "prior"
    save_small_prior(new_networks(TINY_PRIOR), TINY_PRIOR, folder)
    data = Path(str(resources.files("idnerf")))
    budget = replace(BUDGET, prior=str(folder), tile=(32, 32))
    ablation.main(**options(tiny, variants=("estimate",), budget=budget, data=data, boards=("demo",), targets=1))
    scores = json.loads((tiny / "work" / "estimate-0.json").read_text())
    assert len(scores["real-2"]) == 1 and "influence" in scores["procedural-2"]


def test_the_estimate_is_the_posterior_mean_of_a_gaussian_prior():
    """From noise alone a prior expects its mean, whatever the noise was."""
    prior = GaussianPrior(mean=torch.full((4, 1, 1), 0.7), variance=torch.full((4, 1, 1), 0.25))
    example = tiny_example(size=(32, 24))
    values = ablation.prior_estimate(prior, example.source[None], example.target.cameras[None])
    assert values.shape == (1, 4, 3, 4)
    torch.testing.assert_close(values, torch.full_like(values, 0.7), atol=0.05, rtol=0)


def test_no_run_begins_after_the_time_is_up(tiny, monkeypatch):
    monkeypatch.setattr(ablation, "train", lambda *_: pytest.fail("trained"))
    ablation.main(**options(tiny, variants=("latent",), minutes=0.0))
    assert "**Incomplete**: latent-0" in (tiny / "work" / "ablation.md").read_text()


def test_variants_differ_in_what_they_are_named_for():
    configs = {
        name: ablation.training(variant, BUDGET, 3, Path("run"), None, "cpu")
        for name, variant in ablation.VARIANTS.items()
    }
    assert len({repr(scenes) for _, scenes in configs.values()}) == 1
    for name, (config, scenes) in configs.items():
        variant = ablation.VARIANTS[name]
        assert (config.guidance.sds_weight > 0) == name.startswith(("guided", "paper-guided"))
        own = getattr(config.model, config.model.configuration)
        assert own.latent_query == variant.query and own.view_refinement == variant.refinement
        assert config.seed == 3 and isinstance(scenes, ProceduralScenesConfig)
        assert config.source_views == (2, 3)
    small = replace(BUDGET, prior="folder")
    aligned = []
    for name in ("guided-pixel", "guided-aligned"):
        config, _ = ablation.training(ablation.VARIANTS[name], small, 0, Path("run"), None, "cpu")
        aligned.append(config.guidance.prior.view_aligned)
    assert aligned == [False, True]


def test_unseen_pixels_are_scored_apart(generator):
    truth = torch.rand(3, 40, 40, generator=generator)
    seen = torch.full((40, 40), 2.0)
    seen[:, 20:] = 1
    rgb = truth.clone()
    rgb[:, :, 20:] = (rgb[:, :, 20:] + 0.1).clamp(0, 1)
    zeros = torch.zeros(40, 40)
    output = RenderOutput(rgb, zeros, zeros)
    task = type("Task", (), {"image": truth, "seen": seen})
    scores = ablation.score(output, task, lambda a, b: (a - b).abs().mean().item())
    assert scores["unseen"] == 0.5
    assert scores["psnr"] - scores["psnr_unseen"] == pytest.approx(3.01, abs=0.01)
    assert scores["ssim_unseen"] < scores["ssim"]
    assert scores["lpips_unseen"] == pytest.approx(scores["lpips"])
    none = ablation.score(output, type("Task", (), {"image": truth, "seen": seen + 1}), None)
    assert none["psnr_unseen"] is None and none["lpips"] is None


def result(variant: str, seed: int, psnr: float) -> dict:
    entry = {"scene": "a", "psnr": psnr, "ssim": 0.8, "lpips": None, "psnr_unseen": psnr - 5, "ssim_unseen": 0.5}
    return {
        "variant": variant,
        "seed": seed,
        "budget": {},
        "procedural-3": {"scenes": [entry, {**entry, "scene": "b"}]},
    }


def test_the_table_gives_means_spreads_and_differences():
    scores = [result("latent", s, 20.0 + s) for s in range(3)] + [result("guided-pixel", s, 20.5 + s) for s in range(3)]
    text = tables.document(scores, {"latent": "without", "guided-pixel": "with"}, (3,))
    assert "| without | 3 | 21.00 ± 1.00 | 0.8000 ± 0.0000 | - | 16.00 ± 1.00 |" in text
    assert "| with - without | +0.50 ± 0.00 (100%) |" in text
    assert tables.with_spread([None, None], 2) == "-"
    assert tables.with_spread([1.0], 2, signed=True) == "+1.00"


def test_the_share_of_variance_that_is_explained(generator):
    """1 of the truth itself, 0 of its mean, 1 of any affine mixture of inputs that determine it."""
    truth = torch.randn(4, 500, generator=generator) * 2 + 1
    assert knowledge.explained(truth, truth) == 1
    assert knowledge.explained(truth.mean(1, keepdim=True).expand_as(truth), truth) == pytest.approx(0, abs=1e-6)
    mixed = torch.randn(4, 4, generator=generator) @ truth + 3
    assert knowledge.explained(knowledge.best_linear(mixed, truth), truth) == pytest.approx(1, abs=1e-4)
    noise = truth + torch.randn(4, 500, generator=generator) * 2  # half of its variance is the truth's
    assert knowledge.explained(knowledge.best_linear(noise, truth), truth) == pytest.approx(0.5, abs=0.06)
    half = torch.arange(500) < 250
    wrong = torch.where(half, truth, truth + 5)
    assert knowledge.explained(wrong, truth, half) == 1 and knowledge.explained(wrong, truth, ~half) < 0


def test_what_is_known_of_a_latent_is_measured_on_maps_of_one_size(tmp_path):
    folder = tmp_path / "prior"
    save_small_prior(new_networks(TINY_PRIOR), TINY_PRIOR, folder)
    priors = [load_small_prior(str(folder), view_aligned=aligned) for aligned in (True, False)]
    example = draw_example(generate_scene(7, TINY_SCENE), 3, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = IDNeRF(ModelConfig(cascade=TINY_CASCADE)).eval()
    maps = knowledge.knowledge(example, model, *priors)
    assert {tuple(m.shape[1:]) for m in maps.values()} == {(4, 6)}
    assert maps["truth"].shape[0] == 4 and maps["unseen"].dtype == torch.bool
