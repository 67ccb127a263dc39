"""Refinement on one scene: a few minutes of training on its own photos, never worse than the start.

Each photo in turn is the target of its nearest others. Photos that are held out say when to stop, and which weights to
keep: those of the best held-out score, the starting weights among them.

    hold out    some photos are neither target nor source of a step; they are scored from the photos that remain
    rotate      for three photos, where none can be spared: one short training per photo, that photo being a source but
                never a target; the number of steps that was best on average is then taken once more with every photo

This loop stands beside the trainer's (``training.trainer``): it has no run folder, no schedule and no processes, and it
may end with the weights it began with.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.view_selection import nearest_indices, spread_indices
from idnerf.errors import InputError
from idnerf.geometry.cameras import crop
from idnerf.geometry.trajectories import rotate_between
from idnerf.models.cascade import Cascade
from idnerf.models.idnerf import IDNeRF
from idnerf.priors.prior import load_prior
from idnerf.training.examples import Example, bounds_from_sources, cut_tile, draw_int, seeded, stack_examples
from idnerf.training.losses import psnr_of_mse
from idnerf.training.objectives import LossConfig, objective
from idnerf.training.optimizer import (
    OptimizerConfig,
    clip_gradients,
    freeze_still_parts,
    make_optimizer,
    set_learning_rate,
    update_ema,
)
from idnerf.training.score_distillation import GuidanceConfig, ScoreDistillation
from idnerf.types import Cameras, Views

COLOUR_LOSS = LossConfig(mse=5.0, charbonnier=1.0, ssim=0.4, blend=0.5, confidence=0.01)
"""The cascade's training loss without its depth terms: photos have no depth."""
FROM_THREE_PHOTOS = 3
"""Fewest photos: a target and two sources."""


@dataclass(frozen=True)
class FinetuneConfig:
    """A refinement."""

    steps: int = 400
    """At most so many steps."""
    minutes: float = 10.0
    """At most so many minutes; a rotation shares them."""
    lr: float = 1e-4
    """Learning rate."""
    encoder_lr: float = 0.0
    """Learning rate of the image encoder; 0 leaves it as it is, which also makes steps faster."""
    warmup: int = 10
    """Steps over which the learning rate rises."""
    ema_decay: float = 0.97
    """Decay of the moving average of the weights, which is what is scored and kept."""
    tile: tuple[int, int] = (128, 96)
    """Target pixels per step as a window (width, height)."""
    rays: int = 1024
    """Target rays per step of the `paper` configuration, which takes scattered pixels."""
    evaluate_every: int = 25
    """Steps between held-out scores."""
    patience: int = 4
    """Scores in a row without a new best before it stops."""
    loss: LossConfig = field(default_factory=lambda: COLOUR_LOSS)
    """Weights of the loss terms."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Score distillation of the target-view latent at cameras between the photos."""
    seed: int = 0
    """Of targets, tiles and samples."""

    def __post_init__(self) -> None:
        for name in ("steps", "rays", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        if not self.minutes > 0:
            raise InputError(f"--minutes: expected above 0, got {self.minutes}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"--lr: expected above 0, finite, got {self.lr}")
        for name in ("encoder_lr", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')}: expected 0 or more, finite, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema-decay: expected a decay in [0, 1), got {self.ema_decay}")
        if min(self.tile) < 8:
            raise InputError(f"--tile: expected at least 8x8 pixels, got {self.tile[0]}x{self.tile[1]}")


@dataclass(frozen=True)
class Split:
    """Roles of the photos, by position.

    Attributes:
        targets: whose pixels the loss asks for.
        sources: that targets and held-out photos are rendered from (never from themselves).
        held_out: scored, never asked for.
    """

    targets: tuple[int, ...]
    sources: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class Refinement:
    """What a refinement did; the model holds the weights that were kept.

    Attributes:
        before, after: held-out PSNR in dB of each photo scored, at the start and at the weights kept. After a
            rotation, ``after`` is each photo's score in the training that did not ask for it.
        scored: positions of these photos.
        best_step: steps that the weights kept have seen; 0 is the start itself.
        curve: (step, mean held-out PSNR).
        seconds: wall time.
        stopped: why it ended.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    scored: tuple[int, ...]
    best_step: int
    curve: tuple[tuple[int, float], ...]
    seconds: float
    stopped: str


Progress = Callable[[int, int], None]


def hold_out(photos: Views, number: int | None = None) -> Split:
    """The split of a scene of at least 4 photos: one in six is held out, at least one, spread over the scene.

    Raises:
        InputError: too few photos remain to train on.
    """
    count = len(photos)
    number = max(1, count // 6) if number is None else number
    if number < 1 or count - number < FROM_THREE_PHOTOS:
        raise InputError(
            f"{number} of {count} photos cannot be held out: at least {FROM_THREE_PHOTOS} must remain; give more photos"
        )
    return split_without(count, spread_indices(photos.cameras.centers, number))


def split_without(count: int, held_out: Sequence[int]) -> Split:
    """The split that leaves the given photos out altogether."""
    rest = tuple(i for i in range(count) if i not in held_out)
    return Split(rest, rest, tuple(sorted(held_out)))


def rotation(count: int) -> list[Split]:
    """One split per photo: it is held out as a target and still a source of the others."""
    everyone = tuple(range(count))
    return [Split(tuple(i for i in everyone if i != k), everyone, (k,)) for k in everyone]


def finetune(
    model: IDNeRF,
    photos: Views,
    splits: Sequence[Split],
    config: FinetuneConfig,
    *,
    num_sources: int = 3,
    progress: Progress | None = None,
) -> Refinement:
    """Refine ``model`` in place on the photos of one scene; it is left in evaluation mode with the weights kept.

    Args:
        photos: [view], on any device; worked on where the model is.
        splits: one, or those of a ``rotation``.
        num_sources: source views of each target, or as many as there are.
        progress: told (steps done, steps at most).

    Raises:
        InputError: splits without enough sources, or guidance of a model without latent.
    """
    photos = photos.to(model.device)
    for split in splits:
        if len(split.sources) < FROM_THREE_PHOTOS or not split.targets or not split.held_out:
            raise InputError(
                f"refinement needs at least {FROM_THREE_PHOTOS} photos to train on (a target and two sources) and one "
                f"to score; got {len(split.sources)} and {len(split.held_out)}: give more photos"
            )
    guidance = start_guidance(model, config)
    start = time.monotonic()
    seconds = config.minutes * 60
    if len(splits) == 1:
        run = Run(model, photos, splits[0], config, num_sources, guidance)
        stopped = run.until_best(start + seconds, progress)
        run.keep_best()
        best = run.best_step
        return Refinement(
            run.scores[0], run.scores[best], splits[0].held_out, best, run.curve(), time.monotonic() - start, stopped
        )
    return rotate(model, photos, splits, config, num_sources, guidance, start, progress)


def rotate(
    model: IDNeRF,
    photos: Views,
    splits: Sequence[Split],
    config: FinetuneConfig,
    num_sources: int,
    guidance: ScoreDistillation | None,
    start: float,
    progress: Progress | None,
) -> Refinement:
    """Cross-validated stopping: the number of steps that is best on average over the splits, then with all photos.

    The weights of that last training are kept if they also render the photos from one another better than the start.
    """
    share = config.minutes * 60 / (len(splits) + 1)
    total = config.steps * (len(splits) + 1)
    scores, stopped = [], ""
    for number, split in enumerate(splits):
        run = Run(copy.deepcopy(model), photos, split, config, num_sources, guidance)

        def update(done: int, _: int, number: int = number) -> None:
            if progress is not None:
                progress(number * config.steps + done, total)

        stopped = run.until_best(start + share * (number + 1), update)
        scores.append(run.scores)
        del run  # its weights, their average and its moments: one training's at a time
    common = sorted(set.intersection(*map(set, scores)))
    curve = tuple((step, mean(mean(of_split[step]) for of_split in scores)) for step in common)
    best = max(curve, key=lambda entry: (entry[1], -entry[0]))[0]
    if best > 0:
        everyone = Split(splits[0].sources, splits[0].sources, splits[0].sources)
        last = Run(model, photos, everyone, config, num_sources, guidance)
        last.evaluate()
        for step in range(best):
            last.step()
            if progress is not None:
                progress(len(splits) * config.steps + step + 1, total)
        last.evaluate()
        last.keep_best()
        best = last.best_step
    model.eval()
    return Refinement(
        before=tuple(of_split[0][0] for of_split in scores),
        after=tuple(of_split[best][0] for of_split in scores),
        scored=tuple(split.held_out[0] for split in splits),
        best_step=best,
        curve=curve,
        seconds=time.monotonic() - start,
        stopped=stopped,
    )


class Run:
    """One training on one split, step by step.

    Attributes:
        scores: held-out PSNRs by step, of the averaged weights; step 0 is the start.
    """

    def __init__(
        self,
        model: IDNeRF,
        photos: Views,
        split: Split,
        config: FinetuneConfig,
        num_sources: int,
        guidance: ScoreDistillation | None,
    ):
        self.model, self.photos, self.split, self.config = model, photos, split, config
        self.num_sources, self.guidance = num_sources, guidance
        self.rates = OptimizerConfig(
            encoder_lr=config.encoder_lr, decoder_lr=config.lr, latent_lr=config.lr, weight_decay=0.0
        )
        freeze_still_parts(model.requires_grad_(True), self.rates)
        self.optimizer = make_optimizer(model, self.rates)
        self.ema = {name: value.clone() for name, value in model.state_dict().items()}
        self.best = {name: value.clone() for name, value in model.state_dict().items()}
        self.best_step = self.steps = 0
        self.scores: dict[int, tuple[float, ...]] = {}

    def until_best(self, deadline: float, progress: Progress | None) -> str:
        """Train until the held-out score stops rising, or steps or time are used up. Says which it was."""
        self.evaluate()
        if -math.inf in self.scores[0]:
            raise InputError("the starting weights render numbers that are not finite: are they sound?")
        for _ in range(self.config.steps):
            self.step()
            if progress is not None:
                progress(self.steps, self.config.steps)
            late = time.monotonic() > deadline
            if self.steps % self.config.evaluate_every == 0 or self.steps == self.config.steps or late:
                self.evaluate()
            if late:
                return "the time was up"
            if -math.inf in self.scores.get(self.steps, ()):
                return "it diverged: lower --lr"
            if self.steps - self.best_step >= self.config.patience * self.config.evaluate_every:
                return "the held-out score had stopped rising"
        return "all steps were done"

    def step(self) -> None:
        """One target, one step of the optimizer."""
        generator = seeded(self.config.seed, self.steps)
        batch = stack_examples([self.example(generator)])
        seed = seeded(self.config.seed, self.steps, 1).initial_seed()
        device_generator = torch.Generator(self.model.device).manual_seed(seed)
        self.model.train()
        set_learning_rate(self.optimizer, min(1.0, (self.steps + 1) / max(1, self.config.warmup)))
        self.optimizer.zero_grad()
        result = objective(
            self.model,
            batch,
            self.config.loss,
            device_generator,
            rays_per_step=self.config.rays,
            fast_share=0.0,
            enlarged_share=float(self.model.enlarges(batch.source)),  # as rendering will see them
        )
        terms = list(result.terms.values())
        if self.guidance is not None:
            terms.append(self.guide(self.guidance, batch.source, generator, device_generator))
        torch.stack(terms).sum().backward()
        if torch.isfinite(clip_gradients(self.optimizer, self.rates)):  # a bad tile is no reason to lose the rest
            self.optimizer.step()
        update_ema(self.ema, self.model, self.config.ema_decay, self.steps)
        self.steps += 1

    def guide(
        self, guidance: ScoreDistillation, source: Views, generator: torch.Generator, device_generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Score distillation of the latent at a camera that no photo was taken from.

        A window of it for the cascade, whose latent is local, unless all of it is read at once (`global`).
        """
        target = unseen_camera(self.photos.cameras, self.split.sources, generator)
        if isinstance(self.model.core, Cascade) and self.model.core.config.latent_query != "global":
            size = min(self.config.tile[0], target.width), min(self.config.tile[1], target.height)
            left, top = (draw_int(0, b - a, generator) for a, b in zip(size, target.size, strict=True))
            target = crop(target, left, top, size)
        target = bounds_from_sources(target, source.cameras)
        latent = self.model.infer_latent(self.model.encode(source), target)
        assert latent is not None  # ``start_guidance`` made sure
        return guidance(latent, source, self.steps / self.config.steps, device_generator)

    def example(self, generator: torch.Generator) -> Example:
        """A random target photo, sources drawn from its nearest others (one more than are used), a random tile."""
        split, cameras = self.split, self.photos.cameras
        target = split.targets[draw_int(0, len(split.targets) - 1, generator)]
        others = [i for i in split.sources if i != target]
        near = nearest_indices(cameras, cameras[target], min(self.num_sources + 1, len(others)), others)
        chosen = [near[i] for i in torch.randperm(len(near), generator=generator)[: self.num_sources].tolist()]
        source = self.photos[chosen]
        views = Views(self.photos.images[target], bounds_from_sources(cameras[target], source.cameras))
        whole = Example(source, views, None, None, f"photo {target}")
        return cut_tile(whole, self.config.tile, generator) if self.model.config.configuration == "cascade" else whole

    def evaluate(self) -> None:
        """Score the averaged weights and remember them when they are the best."""
        current = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.scores[self.steps] = held_out_psnr(
            self.model, self.photos, self.split.held_out, self.split.sources, self.num_sources
        )
        if mean(self.scores[self.steps]) > mean(self.scores[self.best_step]):
            self.best_step = self.steps
            self.best = {name: value.clone() for name, value in self.ema.items()}
        self.model.load_state_dict(current)

    def keep_best(self) -> None:
        """Put the best weights into the model."""
        self.model.load_state_dict(self.best)
        self.model.requires_grad_(True).eval()

    def curve(self) -> tuple[tuple[int, float], ...]:
        """(step, mean held-out PSNR)."""
        return tuple((step, mean(values)) for step, values in sorted(self.scores.items()))


def held_out_psnr(
    model: IDNeRF, photos: Views, scored: Sequence[int], sources: Sequence[int], num_sources: int
) -> tuple[float, ...]:
    """PSNR of whole photos in dB, each rendered from its ``num_sources`` nearest source photos (never itself).

    Minus infinity where the rendering is not finite.
    """
    model.eval()
    values = []
    for i in scored:
        camera = photos.cameras[i]
        others = [j for j in sources if j != i]
        source = photos[nearest_indices(photos.cameras, camera, min(num_sources, len(others)), others)]
        output = model.render(source, bounds_from_sources(camera, source.cameras))
        mse = float((output.rgb - photos.images[i]).square().mean())
        values.append(psnr_of_mse(mse) if math.isfinite(mse) else -math.inf)
    return tuple(values)


def start_guidance(model: IDNeRF, config: FinetuneConfig) -> ScoreDistillation | None:
    """The frozen prior and its loss; None, and nothing is loaded, for a weight of 0.

    Raises:
        InputError: the model infers no latent, or the prior cannot be loaded.
    """
    if config.guidance.sds_weight == 0:
        return None
    if getattr(model.core, "latent", None) is None:
        raise InputError(
            f"--guidance.sds-weight {config.guidance.sds_weight}: these weights infer no target-view latent; give "
            "--weights of a model trained with one, or leave the guidance out"
        )
    return ScoreDistillation(config.guidance, load_prior(config.guidance.prior, model.device))


def unseen_camera(cameras: Cameras, positions: Sequence[int], generator: torch.Generator) -> Cameras:
    """A camera between a photo's and its neighbour's, as [1]: a random share of the way, and as far aside at most."""
    first = positions[draw_int(0, len(positions) - 1, generator)]
    others = [i for i in positions if i != first]
    near = nearest_indices(cameras, cameras[first], min(3, len(others)), others)
    second = near[draw_int(0, len(near) - 1, generator)]
    share = float(torch.rand((), generator=generator))
    a, b = cameras.c2w[first], cameras.c2w[second]
    aside = (torch.rand(3, generator=generator) - 0.5).to(a) * 0.5 * (b[:3, 3] - a[:3, 3]).norm()
    c2w = torch.eye(4).to(a)
    c2w[:3, :3] = rotate_between(a[None, :3, :3], b[None, :3, :3], torch.tensor([share]).to(a))[0]
    c2w[:3, 3] = torch.lerp(a[:3, 3], b[:3, 3], share) + aside
    camera = cameras[first]
    return Cameras(c2w, camera.K, camera.size, camera.near, camera.far)[None]
