"""Training of the small latent diffusion prior: first the autoencoder, then the U-Net on its latents.

Steps 0 .. A-1     autoencoder: crops -> latents -> crops
after step A-1     its latents get zero mean and unit variance; from here on it is frozen (A = 0 with `--init`)
Steps A .. A+U-1   U-Net and source tokens: noisy target latents, condition -> v (arXiv 2202.00512)

Like every training here, a step is a function of (seed, step): a run that is resumed gives the same weights on the CPU.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from idnerf.data.image_io import write_png
from idnerf.errors import InputError
from idnerf.priors.latent_diffusion import (
    FACTOR,
    SmallNetworks,
    SmallPrior,
    SmallPriorConfig,
    load_networks,
    make_condition,
    new_networks,
    new_schedule,
    save_small_prior,
)
from idnerf.priors.latent_scale import fold_scale, latent_statistics
from idnerf.priors.prior import Condition
from idnerf.training.examples import seeded
from idnerf.training.losses import charbonnier, psnr_of_mse, ssim_loss
from idnerf.training.optimizer import OptimizerConfig, one_cycle, set_learning_rate, update_ema
from idnerf.training.prior_examples import EncodedGroups, autoencoder_crops, latent_batch, sources_to
from idnerf.training.prior_measures import grid, measure_conditioning, measured_batches, reconstruction, sample_rows
from idnerf.training.prior_scenes import ViewGroups, photo_groups, procedural_groups
from idnerf.training.run_log import RunLog
from idnerf.training.state import STATE_FILE, load_state, restore, save_state
from idnerf.training.trainer import TrainingDivergedError, plain

STATISTICS_GROUPS = 32
"""Scenes whose latents give the mean and variance of all."""


@dataclass(frozen=True)
class PriorTrainerConfig:
    """Train the small latent diffusion prior; needs the extra `prior` (`pip install '.[prior]'` in a checkout)."""

    out: Path = Path("runs/prior")
    """Run folder: `prior/` in diffusers' format, training state, log, pictures."""
    resume: Path | None = None
    """Run folder to continue; its options are found again, and those given here change them: all that are not the
    usual ones."""
    init: str | None = None
    """Small prior to go on from, a folder or `default` (the package's): its autoencoder and sizes are kept, whatever
    `--sizes` and `--autoencoder-steps` say, and all steps are the U-Net's."""
    scenes: Path | None = None
    """A scene, or a folder of scenes, of any format that idnerf reads; none takes procedural scenes."""
    pool: Path | None = None
    """Folder that keeps procedural scenes; none generates them whenever they are needed, which is slow."""
    num_scenes: int = 600
    """Number of procedural scenes."""
    size: tuple[int, int] = (288, 208)
    """Size of the photos (width, height), multiples of 8."""
    shrink: int = 1
    """Procedural scenes are rendered (and kept in the pool) this many times as large, then shrunk to `--size`."""
    sizes: SmallPriorConfig = field(default_factory=SmallPriorConfig)
    """Sizes of the networks."""
    autoencoder_steps: int = 3000
    """Steps of the autoencoder."""
    unet_steps: int = 6000
    """Steps of the U-Net."""
    crop: int = 64
    """Side of the autoencoder's training windows in pixels, a multiple of 8."""
    autoencoder_batch: int = 8
    """Windows per step of the autoencoder."""
    batch_size: int = 8
    """Targets per step of the U-Net."""
    source_views: tuple[int, int] = (2, 4)
    """Fewest and most source views."""
    autoencoder_lr: float = 4e-4
    """Peak learning rate of the autoencoder."""
    unet_lr: float = 6e-4
    """Peak learning rate of the U-Net and the source tokens."""
    drop_condition: float = 0.1
    """Share of the examples without any condition, for classifier-free guidance."""
    drop_aligned: float = 0.3
    """Share of the examples with tokens but without the view-aligned features."""
    kl: float = 1e-6
    """Weight of the autoencoder's Kullback-Leibler term."""
    ema_decay: float = 0.998
    """Decay of the moving average of the weights that is saved."""
    augment: bool = True
    """Recolour scenes."""
    held_out: int = 8
    """Scenes for measuring."""
    seed: int = 0
    """Of weights, examples and noise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: networks under automatic mixed precision; pays on a GPU and on CPUs with AMX or AVX-512 BF16. Cameras
    stay in fp32."""
    threads: int = 0
    """Threads of PyTorch on the CPU; 0 leaves its choice."""
    log_every: int = 50
    """Steps between log entries."""
    measure_every: int = 1000
    """Steps between measurements and pictures, which the end of either part has too; 0 never measures."""
    save_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in (
            "num_scenes",
            "shrink",
            "autoencoder_steps",
            "unet_steps",
            "autoencoder_batch",
            "batch_size",
            "log_every",
        ):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("measure_every", "threads", "kl"):
            require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        require(self.save_every >= 1, "save_every", "at least 1", self.save_every)
        require(self.held_out >= 2, "held_out", "at least 2", self.held_out)
        require(
            min(self.size) >= 16 and not any(s % FACTOR for s in self.size),
            "size",
            "multiples of 8 from 16 on",
            self.size,
        )
        side = self.sizes.source_side
        fits = self.init is not None or max(self.size) <= side  # a prior to go on from brings its own sizes
        require(fits, "sizes.source_side", f"{max(self.size)} or more for this --size", side)
        require(
            self.crop % FACTOR == 0 and 16 <= self.crop <= min(self.size),
            "crop",
            f"a multiple of 8 from 16 to {min(self.size)}",
            self.crop,
        )
        require(
            1 <= self.source_views[0] <= self.source_views[1], "source_views", "1 <= fewest <= most", "another order"
        )
        require(self.source_views[1] <= 5, "source_views", "at most 5 (scenes have 6 views)", self.source_views[1])
        require(
            min(self.drop_condition, self.drop_aligned) >= 0 and self.drop_condition + self.drop_aligned <= 1,
            "drop_condition",
            "shares >= 0 that sum to 1 at most with --drop-aligned",
            self.drop_condition,
        )
        for name in ("autoencoder_lr", "unet_lr"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        require(0 <= self.ema_decay < 1, "ema_decay", "a decay in [0, 1)", self.ema_decay)
        require(self.scenes is None or self.pool is None, "pool", "either --pool or --scenes", "both")
        is_file = self.pool is not None and self.pool.exists() and not self.pool.is_dir()
        require(not is_file, "pool", "a folder", f"the file {self.pool}")

    @property
    def first_steps(self) -> int:
        """Steps before the U-Net's begin."""
        return 0 if self.init is not None else self.autoencoder_steps


def require(holds: bool, name: str, expected: str, got: Any) -> None:
    if not holds:
        raise InputError(f"--{name.replace('_', '-')}: expected {expected}, got {got}")


def train_small_prior(
    config: PriorTrainerConfig, device: torch.device, options: Mapping[str, Any] | None = None
) -> Path:
    """Train; returns the run folder.

    Args:
        config: the training.
        device: where it runs.
        options: kept with the training state for whoever resumes it (``TrainingState.options``).

    Raises:
        TrainingDivergedError: the loss or its gradient is not finite.
        InputError: data that cannot be read, a run that cannot be resumed, or a missing extra.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = config.resume or config.out
    if config.resume is None and (run / STATE_FILE).exists():
        raise InputError(f"{run} holds a training already: continue it with --resume {run}, or give another --out")
    torch.manual_seed(config.seed)
    if config.init is None:
        networks = new_networks(config.sizes).to(device)
    else:
        networks, sizes, _, _ = load_networks(None if config.init == "default" else config.init, flag="init")
        if max(config.size) > sizes.source_side:
            raise InputError(
                f"--size: expected at most {sizes.source_side} on the longer side, as --init {config.init} was trained "
                f"for, got {max(config.size)}; give a smaller --size"
            )
        networks, config = networks.to(device), replace(config, sizes=sizes)
        networks.autoencoder.requires_grad_(False)
    ema = {name: value.clone() for name, value in networks.state_dict().items()}
    optimizer = make_prior_optimizer(networks, config)
    start = 0
    if config.resume is not None:
        state = load_state(run / STATE_FILE)
        begun = state.config.get("autoencoder_steps")
        if begun != config.autoencoder_steps:  # it says where the U-Net's steps begin
            raise InputError(f"--autoencoder-steps: {run} was started with {begun}, got {config.autoencoder_steps}")
        begun = state.config.get("init")
        if not same_prior(begun, config.init):  # so does this
            raise InputError(f"--init: {run} was started with {begun or 'none'}, got {config.init or 'none'}")
        restore(state, networks, ema, optimizer)
        start, options = state.step, options or state.options
    groups, held_out = make_groups(config)
    training = PriorTraining(config, networks, ema, optimizer, groups, held_out, run, options)
    total = config.first_steps + config.unet_steps
    log = RunLog(run, total, start)
    try:
        for step in range(start, total):
            training.step(step, log)
    finally:
        log.close()
    return run


def same_prior(first: str | None, second: str | None) -> bool:
    """Whether two values of `--init` say the same; folders may be named from anywhere."""
    if first is None or second is None:
        return first == second
    return Path(first).absolute() == Path(second).absolute()


def make_groups(config: PriorTrainerConfig) -> tuple[ViewGroups, ViewGroups]:
    """Groups to train on, and held-out ones."""
    if config.scenes is not None:
        return photo_groups(config.scenes, config.size, config.source_views[1] + 2, config.held_out)
    return procedural_groups(config.size, config.pool, config.num_scenes, config.held_out, config.shrink)


def make_prior_optimizer(networks: SmallNetworks, config: PriorTrainerConfig) -> torch.optim.AdamW:
    """The autoencoder in one group, the rest in the other."""
    rest = [*networks.unet.parameters(), *networks.tokens.parameters()]
    groups = [
        {"params": list(networks.autoencoder.parameters()), "lr": config.autoencoder_lr},
        {"params": rest, "lr": config.unet_lr},
    ]
    return torch.optim.AdamW(
        [{**group, "peak_lr": group["lr"]} for group in groups], betas=(0.9, 0.99), weight_decay=1e-4
    )


class PriorTraining:
    """The state of one training, stepped by number."""

    def __init__(
        self,
        config: PriorTrainerConfig,
        networks: SmallNetworks,
        ema: dict[str, Tensor],
        optimizer: torch.optim.AdamW,
        groups: ViewGroups,
        held_out: ViewGroups,
        run: Path,
        options: Mapping[str, Any] | None = None,
    ):
        self.config, self.networks, self.ema, self.optimizer = config, networks, ema, optimizer
        self.groups, self.held_out, self.run, self.options = groups, held_out, run, options
        self.device = ema["tokens.empty"].device
        self.alphas_cumprod = new_schedule().alphas_cumprod.to(self.device)
        self.encoded: EncodedGroups | None = None
        self.encoded_held_out: EncodedGroups | None = None
        self.sums: dict[str, float] = {}
        self.summed = 0

    def step(self, step: int, log: RunLog) -> None:
        """One step, and what is due after it: the switch to the U-Net, log, checkpoint, measurements."""
        c = self.config
        first = step < c.first_steps
        within, steps = (step, c.first_steps) if first else (step - c.first_steps, c.unet_steps)
        set_learning_rate(self.optimizer, one_cycle(within / steps, OptimizerConfig()))
        self.optimizer.zero_grad()
        terms = self.autoencoder_terms(step) if first else self.unet_terms(step)
        loss = torch.stack([v for k, v in terms.items() if k != "squared_error"]).sum()
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is not finite at step {step}; the last checkpoint stays in {self.run}"
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        if not torch.isfinite(norm):  # a step would spoil the weights that are about to be saved
            raise TrainingDivergedError(
                f"the gradient is not finite at step {step}; the last checkpoint stays in {self.run}"
            )
        self.optimizer.step()
        update_ema(self.ema, self.networks, c.ema_decay, within)
        done, last = step + 1, within + 1 == steps
        if first and last:
            self.freeze_autoencoder()
        self.count(terms)
        log.advance(done, f"{'autoencoder' if first else 'U-Net'} loss {float(loss.detach()):.4f}")
        if done % c.log_every == 0 or last:
            log.numbers(done, self.take(), "autoencoder" if first else "unet")
        if done % c.save_every == 0 or last:
            save_state(self.run / STATE_FILE, done, self.networks, self.ema, self.optimizer, plain(c), self.options)
            save_small_prior(self.averaged(), c.sizes, self.run / "prior")
        if c.measure_every and (done % c.measure_every == 0 or last):
            log.numbers(done, self.measure(done, unet=not first), "held_out")

    def autoencoder_terms(self, step: int) -> dict[str, Float[Tensor, ""]]:
        """Charbonnier (of pixels and of 8x8 means), SSIM and Kullback-Leibler terms of one batch of windows."""
        c = self.config
        images = autoencoder_crops(self.groups, c.seed, step, c.autoencoder_batch, c.crop).to(self.device)
        with self.autocast():
            posterior = self.networks.autoencoder.encode(2 * images - 1).latent_dist
        posterior = type(posterior)(posterior.parameters.float())
        noise = torch.randn(posterior.mean.shape, generator=seeded(c.seed, step, 14)).to(self.device)
        with self.autocast():
            decoded = self.networks.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        result = (decoded.float() + 1) / 2
        return {
            "charbonnier": charbonnier(result, images),
            # colours come late by themselves: what a latent covers must first of all be right on average
            "means": charbonnier(F.avg_pool2d(result, FACTOR), F.avg_pool2d(images, FACTOR)),
            "ssim": 0.2 * ssim_loss(result, images),
            "kl": c.kl * posterior.kl().mean(),
            "squared_error": (result - images).square().mean().detach(),
        }

    def unet_terms(self, step: int) -> dict[str, Float[Tensor, ""]]:
        """Squared error of v at timesteps spread evenly over the batch, under conditions that are dropped at random."""
        c = self.config
        batch = latent_batch(self.encoded_groups(), c.seed, step, c.batch_size, c.source_views)
        latents, target = batch.latents.to(self.device), batch.target.to(self.device)
        height, width = latents.shape[-2:]
        source = sources_to(batch.source, self.device)
        aligned = None if batch.aligned is None else batch.aligned.to(self.device)
        condition = make_condition(self.networks.tokens, source, target, (width, height), c.sizes.planes, aligned)
        generator = seeded(c.seed, step, 15)
        share = torch.rand(len(latents), generator=generator).to(self.device)
        condition = drop_parts(condition, self.networks, share, c.drop_condition, c.drop_aligned)
        steps = len(self.alphas_cumprod)
        even = (torch.arange(len(latents)) + torch.rand((), generator=generator)) / len(latents)
        timestep = (even * steps).long().clamp_max(steps - 1).to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        return {"v": self.v_error(latents, noise, timestep, condition)}

    def v_error(
        self,
        latents: Float[Tensor, "batch 4 height width"],
        noise: Float[Tensor, "batch 4 height width"],
        timestep: Int64[Tensor, "batch"],
        condition: Condition,
    ) -> Float[Tensor, ""]:
        assert condition.map is not None
        abar = self.alphas_cumprod[timestep][:, None, None, None]
        signal, spread = abar.sqrt(), (1 - abar).sqrt()
        sample = torch.cat([signal * latents + spread * noise, condition.map], 1)
        with self.autocast():
            v = self.networks.unet(sample, timestep, encoder_hidden_states=condition.tokens).sample
        return (v.float() - (signal * noise - spread * latents)).square().mean()

    def autocast(self) -> torch.autocast:
        """Around the networks alone: cameras in bfloat16 would miss by pixels."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def freeze_autoencoder(self) -> None:
        """Take the averaged autoencoder and give its latents zero mean and unit variance, in weights and average."""
        averaged = {k: v for k, v in self.ema.items() if k.startswith("autoencoder.")}
        self.networks.load_state_dict({**self.networks.state_dict(), **averaged})
        prior = self.frozen_copy()
        numbers = torch.linspace(0, len(self.groups) - 1, min(STATISTICS_GROUPS, len(self.groups))).long().tolist()
        latents = [prior.encode(self.groups.group(n).images.to(self.device)).movedim(1, 0).flatten(1) for n in numbers]
        mean, deviation = latent_statistics(torch.cat(latents, 1)[None, :, :, None])
        fold_scale(self.networks.autoencoder, mean, deviation)
        for name, value in self.networks.autoencoder.state_dict().items():
            self.ema[f"autoencoder.{name}"].copy_(value)

    def encoded_groups(self) -> EncodedGroups:
        if self.encoded is None:
            self.encoded = EncodedGroups(self.groups, self.frozen_copy(), augment=self.config.augment)
        return self.encoded

    def frozen_copy(self) -> SmallPrior:
        return SmallPrior(copy.deepcopy(self.networks), new_schedule(), self.config.sizes).to(self.device)

    def averaged(self) -> SmallNetworks:
        """A copy of the networks with the averaged weights."""
        networks = copy.deepcopy(self.networks)
        networks.load_state_dict(self.ema)
        return networks

    def measure(self, step: int, *, unet: bool) -> dict[str, float]:
        """Of the averaged weights on held-out scenes; pictures go to the run folder."""
        prior = SmallPrior(self.averaged(), new_schedule(), self.config.sizes).to(self.device)
        images = torch.stack([self.held_out.group(n).images[0] for n in range(len(self.held_out))])
        result, psnr = reconstruction(prior, images)
        pictures = torch.stack([images[:4], result[:4].cpu()], 1)
        write_png(self.run / "reconstructions.png", grid(pictures))
        values = {"reconstruction_psnr": psnr}
        if unet:
            if self.encoded_held_out is None:
                self.encoded_held_out = EncodedGroups(self.held_out, prior, augment=False)
            values |= measure_conditioning(prior, measured_batches(self.encoded_held_out))
            write_png(self.run / "samples.png", sample_rows(prior, self.encoded_held_out, 4))
        return values

    def count(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.summed += 1

    def take(self) -> dict[str, float]:
        """Means since the last log entry."""
        means = {name: value / self.summed for name, value in self.sums.items()}
        if "squared_error" in means:
            means["psnr"] = psnr_of_mse(means.pop("squared_error"))
        self.sums, self.summed = {}, 0
        return means


def drop_parts(
    condition: Condition,
    networks: SmallNetworks,
    share: Float[Tensor, "batch"],
    drop_condition: float,
    drop_aligned: float,
) -> Condition:
    """Items with a ``share`` (uniform in [0, 1)) below ``drop_condition`` lose everything, the next ``drop_aligned``
    the aligned features (the map but for the target's rays)."""
    assert condition.map is not None
    nothing = (share < drop_condition)[:, None, None]
    unaligned = (share < drop_condition + drop_aligned)[:, None, None, None]
    tokens = torch.where(nothing, networks.tokens.nothing(*condition.tokens.shape[:2]), condition.tokens)
    rays, aligned = condition.map[:, :2], condition.map[:, 2:]
    rays = torch.where(nothing[..., None], torch.zeros_like(rays), rays)
    return Condition(tokens, torch.cat([rays, torch.where(unaligned, torch.zeros_like(aligned), aligned)], 1))
