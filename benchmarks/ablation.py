"""What does the guidance do? Trains and evaluates variants at one fixed budget, on the same data with the same seeds.

python benchmarks/ablation.py --work out/ablation --steps 1500 --pool POOL --data DATA --out docs/ablation.md

Every run (a variant with a seed) keeps its training in WORK/VARIANT-SEED and its scores in WORK/VARIANT-SEED.json.
What is there is skipped, a training that was cut short is resumed: run it in pieces (--minutes), or --variants and
--seeds on several machines and copy the JSON files together. The table shows whatever is there.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from ablation_table import document
from boards import BOARDS, board_targets, cells_of, commit, compute_cell, device_name, scene_at
from fixed_scenes import FixedTask, fixed_scenes, fixed_task
from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import choose_device
from idnerf.config import PRESETS, ProceduralTraining
from idnerf.data.image_io import write_png
from idnerf.errors import InputError
from idnerf.evaluation.evaluator import HIGHEST_PSNR
from idnerf.evaluation.lpips import Lpips, load_lpips
from idnerf.evaluation.metrics import SSIM_WINDOW, psnr, ssim_map
from idnerf.evaluation.report import write_report
from idnerf.models.cascade import Cascade, CascadeConfig, Quality
from idnerf.models.idnerf import IDNeRF, ModelConfig, read_weights
from idnerf.models.latent import (
    LATENT_MIDDLE,
    LATENT_STRIDE,
    FrustumLatentInference,
    LatentQuery,
    TargetLatent,
)
from idnerf.models.paper import PaperConfig
from idnerf.priors.prior import Prior, PriorConfig, load_prior, unet_latent
from idnerf.priors.sampling import ddim_sample
from idnerf.training import objectives, trainer
from idnerf.training.examples import seeded
from idnerf.training.objectives import Objective
from idnerf.training.procedural_scenes import ProceduralScenes, ProceduralScenesConfig, shrunk_scene
from idnerf.training.score_distillation import GuidanceConfig
from idnerf.training.state import STATE_FILE
from idnerf.training.trainer import TrainerConfig, start_model, train
from idnerf.types import Batch, Cameras, RenderOutput, Views

Scores = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What distinguishes a row of the table."""

    title: str
    query: LatentQuery = "pixel"
    guided: bool = False
    view_aligned: bool = False
    refinement: bool = True
    given: Literal["truth", "estimate"] | None = None
    """The latent is not inferred but given: the true picture's own, or the prior's estimate from the sources."""
    configuration: Literal["cascade", "paper"] = "cascade"


VARIANTS = {
    "no-latent": Variant("no latent", query="none"),
    "latent": Variant("latent, no guidance"),
    "guided-global": Variant("guided, `global`", query="global", guided=True),
    "guided-pixel": Variant("guided, `pixel`", guided=True),
    "guided-aligned": Variant("guided, `pixel`, view-aligned condition", guided=True, view_aligned=True),
    "paper-latent": Variant("`paper`: latent, no guidance", configuration="paper"),
    "paper-guided": Variant("`paper`: guided, `pixel`", guided=True, configuration="paper"),
    "oracle": Variant("latent given: the prior's own latent of the true picture", given="truth"),
    "estimate": Variant("latent given: the prior's estimate from the sources, view-aligned", given="estimate"),
    "plain": Variant("no latent, no view refinement", query="none", refinement=False),
    "latent-global": Variant("latent `global`, no guidance", query="global"),
    "paper-no-latent": Variant("`paper`: no latent", query="none", configuration="paper"),
}
"""The first seven are the table; the others are there for asking."""


@dataclass(frozen=True)
class Budget:
    """What every run gets. Runs of one work folder must agree in it."""

    steps: int = 1500
    """Training steps of the cascade."""
    paper_steps: int = 500
    """Training steps of the `paper` configuration."""
    rays: int = 512
    """Rays per step of the `paper` configuration."""
    paper_samples: int = 64
    """Samples per ray of the `paper` configuration."""
    tile: tuple[int, int] = (128, 96)
    """Target pixels per step of the cascade (width, height)."""
    shrink: int = 1
    """Procedural scenes and real photos are shrunk by this factor along each side, in training and evaluation."""
    max_scenes: int = 1_000_000
    """Number of procedural scenes in training."""
    complexity: tuple[float, float] = (0.0, 1.0)
    """Their complexity."""
    start_scenes: int = 256
    """Scenes known at the first step."""
    init: str | None = None
    """Cascade weights to start from (`default` or a file), extended by the latent; none trains from scratch."""
    only_added: bool = False
    """With `--init`: train the added parts only, so that variants differ by nothing else."""
    lr: float | None = None
    """Peak learning rate of the decoder and of the latent network; none takes the preset's."""
    fast: bool = False
    """The cascade trains and renders at quality `fast`."""
    prior: str | None = None
    """Folder of the small prior; none takes the one that comes with the package; `gaussian` knows nothing."""
    guidance: GuidanceConfig = field(default_factory=lambda: GuidanceConfig(sds_weight=1.0, guidance_scale=3.0))
    """Score distillation of the guided variants; its prior is what `--prior` and the variant say."""

    @property
    def quality(self) -> Quality:
        return "fast" if self.fast else "full"


def prior_config(budget: Budget, view_aligned: bool) -> PriorConfig:
    """The prior of a variant."""
    if budget.prior == "gaussian":
        return PriorConfig(kind="gaussian")
    return PriorConfig(kind="small", path=budget.prior, view_aligned=view_aligned)


def training(
    variant: Variant, budget: Budget, seed: int, run: Path, pool: Path | None, device: str
) -> tuple[TrainerConfig, ProceduralScenesConfig]:
    """The training of a run: presets, but for what the variant and the budget say."""
    paper = variant.configuration == "paper"
    preset = PRESETS["idnerf-procedural" if paper else "cascade-procedural"]
    assert isinstance(preset, ProceduralTraining)
    options = {"view_refinement": variant.refinement, "latent_query": variant.query}
    base = CascadeConfig() if paper or budget.init is None else read_weights(budget.init)[3].cascade
    model = ModelConfig(
        variant.configuration,
        cascade=replace(base, enlarge_up_to=0, **options),  # trained without, so rendered without
        paper=PaperConfig(samples_per_ray=budget.paper_samples, latent_size=None, **options),
    )
    guidance = replace(budget.guidance, prior=prior_config(budget, variant.view_aligned))
    rates = preset.trainer.optimizer
    if budget.lr is not None:
        rates = replace(rates, decoder_lr=budget.lr, latent_lr=budget.lr)
    config = replace(
        preset.trainer,
        model=model,
        guidance=guidance if variant.guided else GuidanceConfig(),
        out=run,
        optimizer=rates if not paper else preset.trainer.optimizer,
        fast_share=1.0 if budget.fast else preset.trainer.fast_share,
        enlarged_share=0.0,  # it costs time, and is no question of the latent
        resume=run if (run / STATE_FILE).exists() else None,
        init=None if paper else budget.init,
        extend=True,
        only_added=budget.only_added and not paper,
        steps=budget.paper_steps if paper else budget.steps,
        source_views=(2, 3),
        tile=budget.tile,
        rays=budget.rays,
        seed=seed,
        device=device,
        validate_every=0,
        save_every=100,
    )
    scenes = replace(
        preset.scenes,
        scene=replace(preset.scenes.scene, complexity=budget.complexity),
        pool=pool,
        max_scenes=budget.max_scenes,
        shrink=budget.shrink,
        start_scenes=min(budget.start_scenes, budget.max_scenes),
    )
    return config, scenes


class GivenLatent(FrustumLatentInference):
    """A latent that is shown, not inferred, for trained and for evaluated targets alike: what the guidance could make
    of it at best.
    """

    def show(self, values: Float[Tensor, "batch 4 cells_y cells_x"]) -> None:
        """The U-Net's latents of the next targets."""
        self.values = (1 + values.float()) / 2  # inverse of ``unet_latent``

    def forward(self, maps: Tensor, source: Cameras, target: Cameras) -> TargetLatent:
        return TargetLatent(self.values.to(maps.device), target)


def with_given_latent(model: IDNeRF) -> IDNeRF:
    """The model with its latent network replaced; its weights stay, unused, so that the run folder can be read."""
    assert isinstance(model.core, Cascade) and isinstance(model.core.latent, FrustumLatentInference)
    model.core.latent.__class__ = GivenLatent
    return model


def prior_estimate(
    prior: Prior, source: Views, target: Cameras, draws: int = 4
) -> Float[Tensor, "batch 4 cells_y cells_x"]:
    """What the prior expects of [batch] targets given [batch view] sources alone: its clean estimate from pure noise,
    mean over ``draws``. Score distillation at high timesteps pulls latents there. Sides: multiples of 8.
    """
    source, target = source.to(prior.device), target.to(prior.device)
    size = (target.width // LATENT_STRIDE, target.height // LATENT_STRIDE)
    condition = prior.condition(source, target, size)
    noises = (torch.randn(len(target), 4, size[1], size[0], generator=seeded(number)) for number in range(draws))
    return torch.stack([ddim_sample(prior, condition, z.to(prior.device), steps=1) for z in noises]).mean(0)


def show(
    model: IDNeRF,
    variant: Variant,
    source: Views,
    target: Cameras,
    truth: Float[Tensor, "batch 3 height width"] | None,
    prior: Prior | None,
) -> None:
    """Show the latents of the next targets to a model that is given them; any other does not look."""
    if variant.given is None:
        return
    assert prior is not None and isinstance(model.core, Cascade) and isinstance(model.core.latent, GivenLatent)
    if variant.given == "truth":
        assert truth is not None
        model.core.latent.show(prior.encode(truth.to(prior.device)))
    else:
        model.core.latent.show(prior_estimate(prior, source, target))


def train_with_given_latent(variant: Variant, config: TrainerConfig, scenes: ProceduralScenes, prior: Prior) -> None:
    """``train`` of a model that is shown every target's latent."""

    def objective(model: IDNeRF, batch: Batch, *arguments: Any, **options: Any) -> Objective:
        show(model, variant, batch.source, batch.target.cameras, batch.target.images, prior)
        return objectives.objective(model, batch, *arguments, **options)

    with (
        patch.object(trainer, "objective", objective),
        patch.object(trainer, "start_model", lambda *given: with_given_latent(start_model(*given))),
    ):
        train(config, scenes, [])


# ---------------------------------------------------------------------------------------------------------------------


def score(output: RenderOutput, task: FixedTask, lpips: Lpips | None) -> Scores:
    """PSNR, SSIM and LPIPS over all pixels, and over those that fewer than two sources see (None where too few).

    LPIPS has no mask: for the latter the truth stands in everywhere else, in both pictures.
    """
    rgb, truth = output.rgb.clamp(0, 1), task.image
    unseen = task.seen < 2
    windows = ssim_map(rgb, truth)
    margin = SSIM_WINDOW // 2
    at_windows = unseen[margin:-margin, margin:-margin]
    scores: Scores = {
        "psnr": min(psnr(rgb, truth), HIGHEST_PSNR),
        "ssim": windows.mean().item(),
        "lpips": None if lpips is None else lpips(rgb, truth),
        "unseen": unseen.double().mean().item(),
    }
    if int(at_windows.sum()) < 100:
        return scores | {"psnr_unseen": None, "ssim_unseen": None, "lpips_unseen": None}
    return scores | {
        "psnr_unseen": min(psnr(rgb, truth, unseen), HIGHEST_PSNR),
        "ssim_unseen": windows[at_windows].mean().item(),
        "lpips_unseen": None if lpips is None else lpips(torch.where(unseen, rgb, truth), truth),
    }


def render_with(
    model: IDNeRF, task: FixedTask, quality: Quality, latent: TargetLatent | None = None
) -> tuple[RenderOutput, TargetLatent | None]:
    """The task's picture, under the inferred or a given latent; and that latent."""
    source, target = task.source.to(model.device)[None], task.target.to(model.device)[None]
    with torch.inference_mode():
        features = model.encode(source)
        latent = model.infer_latent(features, target) if latent is None else latent
        output = model.render_target(features, target, quality=quality, latent=latent)
    return output.map(lambda x: x[0].float().cpu()), latent


def influence(
    model: IDNeRF, quality: Quality, tasks: Sequence[FixedTask], latents: Sequence[TargetLatent]
) -> list[Scores]:
    """Scores with the latent blanked (the prior's middle everywhere) and with the next scene's latent in its place."""
    entries = []
    for number, (task, latent) in enumerate(zip(tasks, latents, strict=True)):
        others = {
            "blank": torch.full_like(latent.values, LATENT_MIDDLE),
            "swapped": latents[(number + 1) % len(latents)].values,
        }
        entry: Scores = {"scene": task.name}
        for name, values in others.items():
            output, _ = render_with(model, task, quality, latent.with_values(values))
            scores = score(output, task, None)
            entry |= {f"{name}_psnr": scores["psnr"], f"{name}_psnr_unseen": scores["psnr_unseen"]}
        entries.append(entry)
    return entries


def latent_statistics(prior: Prior | None, tasks: Sequence[FixedTask], latents: Sequence[TargetLatent]) -> Scores:
    """Mean, spread, and how well latents correlate with the prior's own latents of the true pictures."""
    values = torch.stack([latent.values[0].float().cpu() for latent in latents])
    statistics: Scores = {"mean": values.mean().item(), "spread": values.std().item(), "correlation": None}
    if prior is not None:
        pairs = []
        for task, latent in zip(tasks, latents, strict=True):
            width, height = (side - side % 8 for side in task.target.size)
            truth = prior.encode(task.image[None, :, :height, :width].to(prior.device)).float().cpu()[0]
            if truth.shape == latent.values.shape[1:]:
                x = torch.stack([unet_latent(latent.values[0].float().cpu()).flatten(1), truth.flatten(1)])
                x = x - x.mean(-1, keepdim=True)
                pairs.append(float((x[0] * x[1]).sum() / (x[0].norm() * x[1].norm()).clamp_min(1e-9)))
        statistics["correlation"] = sum(pairs) / len(pairs) if pairs else None
    return statistics


def pictures(
    renderings: Sequence[RenderOutput],
    latents: Sequence[TargetLatent],
    prior: Prior | None,
    tasks: Sequence[FixedTask],
    path: Path,
) -> None:
    """A row per scene: truth, rendering, pixels that fewer than two sources see, the latent decoded by the prior."""
    rows = []
    for number, (task, output) in enumerate(zip(tasks, renderings, strict=True)):
        columns = [task.image, output.rgb, (task.seen < 2).float().expand(3, -1, -1)]
        if latents and prior is not None:
            height, width = task.image.shape[-2:]
            decoded = prior.decode(unet_latent(latents[number].values.to(prior.device))).cpu()[0, :, :height, :width]
            columns.append(torch.zeros_like(task.image))
            columns[-1][:, : decoded.shape[1], : decoded.shape[2]] = decoded
        rows.append(torch.cat(columns, -1))
    write_png(path, torch.cat(rows, -2))


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One variant with one seed: its JSON file, filled piece by piece."""

    name: str
    seed: int
    budget: Budget
    work: Path
    scores: Scores = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = json.loads(json.dumps(asdict(self.budget), default=str))
        self.scores = {"variant": self.name, "seed": self.seed, "budget": settings}
        if self.path.is_file():
            self.scores = json.loads(self.path.read_text())
            if self.scores["budget"] != settings:
                raise InputError(f"{self.path} is of another budget: give another --work, or the same options")

    @property
    def variant(self) -> Variant:
        return VARIANTS[self.name]

    @property
    def folder(self) -> Path:
        return self.work / f"{self.name}-{self.seed}"

    @property
    def path(self) -> Path:
        return self.work / f"{self.name}-{self.seed}.json"

    def keep(self, key: str, value: Any) -> None:
        self.scores[key] = value
        write_report(self.path, self.scores)
        print(f"{self.name}-{self.seed}: {key}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, the same for all runs."""

    num_sources: tuple[int, ...]
    scenes: int
    data: Path | None
    boards: tuple[str, ...]
    targets: int | None = None


def finish(run: Run, evaluation: Evaluation | None, pool: Path | None, device: str, deadline: float) -> None:
    """Do what a run still lacks, the training alone if ``evaluation`` is None; no piece begins after ``deadline``."""
    where = choose_device(device)
    if "trained" not in run.scores:
        config, scenes = training(run.variant, run.budget, run.seed, run.folder, pool, device)
        start = time.process_time()
        if run.variant.given:
            prior = load_prior(prior_config(run.budget, True), where)
            train_with_given_latent(run.variant, config, ProceduralScenes(scenes), prior)
        else:
            train(config, ProceduralScenes(scenes), [])
        made = {"commit": commit(), "device": device_name(where), "processor_seconds": time.process_time() - start}
        run.keep("trained", made)
    if evaluation is None:
        return
    pieces = [f"procedural-{n}" for n in evaluation.num_sources]
    real = evaluation.data is not None and run.variant.given != "truth"  # photos have no truth to show it in time
    pieces += [f"real-{n}" for n in evaluation.num_sources] if real else []
    if all(piece in run.scores for piece in pieces):
        return
    model = IDNeRF.from_pretrained(run.folder).to(where)
    model = with_given_latent(model) if run.variant.given else model
    for n in evaluation.num_sources:
        if f"procedural-{n}" not in run.scores and time.monotonic() < deadline:
            run.keep(f"procedural-{n}", evaluate_procedural(model, run, n, evaluation.scenes, where))
        if real and f"real-{n}" not in run.scores and time.monotonic() < deadline:
            run.keep(f"real-{n}", evaluate_real(model, run, n, evaluation, where))


def evaluate_procedural(model: IDNeRF, run: Run, num_sources: int, limit: int, where: torch.device) -> Scores:
    """Held-out procedural scenes: scores by scene, what the latent does, what it looks like."""
    shrink = run.budget.shrink
    tasks = [
        fixed_task(name, shrunk_scene(s, shrink), num_sources) for name, s in fixed_scenes(run.work / "scenes", limit)
    ]
    lpips, _ = load_lpips(where)
    knows = run.variant.query != "none" and run.budget.prior != "gaussian"
    prior = load_prior(prior_config(run.budget, True), where) if knows else None
    scenes, renderings, latents = [], [], []
    for task in tasks:
        show(model, run.variant, task.source[None], task.target[None], task.image[None], prior)
        output, latent = render_with(model, task, run.budget.quality)
        renderings.append(output)
        scenes.append({"scene": task.name, **score(output, task, lpips)})
        latents += [] if latent is None else [latent]
    result: Scores = {"scenes": scenes}
    if latents:
        result["influence"] = influence(model, run.budget.quality, tasks, latents)
        result["latent"] = latent_statistics(prior, tasks, latents)
    pictures(renderings[:4], latents[:4], prior, tasks[:4], run.folder / f"procedural-{num_sources}.png")
    return result


def evaluate_real(
    model: IDNeRF, run: Run, num_sources: int, evaluation: Evaluation, where: torch.device
) -> list[Scores]:
    """PSNR on the development scenes under the protocols of the scoreboard."""
    assert evaluation.data is not None
    budget = run.budget
    prior = load_prior(prior_config(budget, True), where) if run.variant.given else None

    def render(source: Views, target: Cameras) -> RenderOutput:
        show(model, run.variant, source[None], target[None], None, prior)
        with torch.inference_mode():
            return model.render(source, target, quality=budget.quality)

    entries = []
    for board in BOARDS:
        if board.name not in evaluation.boards:
            continue
        size = (board.size[0] // budget.shrink, board.size[1] // budget.shrink)
        board = replace(
            board, size=size, num_sources=(num_sources,), crops=board.crops[:1], targets=board.quick or board.targets
        )
        targets = {folder: ids[: evaluation.targets] for folder, ids in board_targets(board, evaluation.data).items()}
        for cell in cells_of(board, targets):
            scores = compute_cell(cell, scene_at(evaluation.data, cell.folder), render, where)
            found = scores["crops"][f"{board.crops[0]:g}"]
            picked = {key: found[key] for key in ("psnr", "ssim")}
            entries.append({"scene": scores["scene"], "target": cell.target, **picked})
    return entries


def main(
    work: Path = Path("out/ablation"),
    out: Path | None = None,
    variants: tuple[str, ...] = tuple(VARIANTS)[:7],
    seeds: tuple[int, ...] = (0, 1, 2),
    budget: tyro.conf.OmitArgPrefixes[Budget] = Budget(),
    pool: Path | None = None,
    data: Path | None = None,
    boards: tuple[str, ...] = ("half",),
    num_sources: tuple[int, ...] = (3, 2),
    scenes: int = 32,
    targets: int | None = None,
    minutes: float = float("inf"),
    device: str = "auto",
    only_train: bool = False,
    only_table: bool = False,
) -> None:
    """Train, evaluate, and write the table.

    Args:
        work: folder of runs and results.
        out: markdown file of the table; WORK/ablation.md by default.
        variants: rows of the table.
        seeds: of weights, examples and noise.
        budget: what every run gets.
        pool: folder that keeps generated training scenes.
        data: folder of the real development scenes; none leaves them out.
        boards: groups of them (benchmarks/boards.py).
        num_sources: numbers of source views to evaluate with.
        scenes: procedural scenes to evaluate on, of 64.
        targets: views of each real scene to evaluate on; none takes the protocol's.
        minutes: begin nothing new after so long.
        device: auto, cpu or cuda.
        only_train: leave the evaluation to a later call.
        only_table: run nothing, write the table of what is there.
    """
    keep_freed_memory()
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise InputError(f"--variants: unknown {unknown[0]!r}, choose among {' '.join(VARIANTS)}")
    # seed by seed, so that what is there after a while compares
    runs = [Run(name, seed, budget, work) for seed in seeds for name in variants]
    deadline = time.monotonic() + 60 * minutes
    evaluation = Evaluation(num_sources, scenes, data, boards, targets)
    for run in runs:
        if not only_table and time.monotonic() < deadline:
            finish(run, None if only_train else evaluation, pool, device, deadline)
    path = out or work / "ablation.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = {name: VARIANTS[name].title for name in variants}
    path.write_text(document([run.scores for run in runs], titles, num_sources), encoding="utf-8")
    print(path)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
