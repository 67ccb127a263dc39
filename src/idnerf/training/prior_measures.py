"""What a prior knows: whether its noise prediction depends on its condition, and pictures to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.priors.latent_diffusion import SmallPrior, make_condition
from idnerf.priors.prior import Condition, Prior
from idnerf.priors.sampling import ddim_sample
from idnerf.training.examples import seeded
from idnerf.training.losses import psnr_of_mse
from idnerf.training.prior_examples import EncodedGroups, LatentBatch, choose_views, sources_to, stack_sources
from idnerf.types import stack_cameras

TIMESTEPS = (100, 300, 500, 700, 900)
"""Of 1000, where the noise prediction is measured."""
MEASURED_SOURCES = 3
MEASURED_TARGETS = 2
"""Targets per held-out scene."""


@dataclass(frozen=True)
class NoiseErrors:
    """Mean squared error of the noise prediction per timestep of ``TIMESTEPS``, in units of the noise's variance.

    Attributes:
        right: under the target's own condition.
        swapped: under the condition of another scene.
        none: without condition.
    """

    right: tuple[float, ...]
    swapped: tuple[float, ...]
    none: tuple[float, ...]

    def summary(self, prefix: str) -> dict[str, float]:
        """Means over timesteps, and by how much the right condition beats the two others (1: no noise error left)."""
        means = {name: sum(getattr(self, name)) / len(TIMESTEPS) for name in ("right", "swapped", "none")}
        values = {f"{prefix}_noise_mse_{name}": value for name, value in means.items()}
        values[f"{prefix}_gain_over_swapped"] = 1 - means["right"] / means["swapped"]
        values[f"{prefix}_gain_over_none"] = 1 - means["right"] / means["none"]
        return values


@torch.no_grad()
def noise_errors(
    prior: Prior, latents: Float[Tensor, "batch 4 height width"], condition: Condition, seed: int = 0
) -> NoiseErrors:
    """Measure a prior on clean latents and their conditions (batch >= 2: the swapped condition is the next item's)."""
    swapped = Condition(condition.tokens.roll(1, 0), None if condition.map is None else condition.map.roll(1, 0))
    conditions = {"right": condition, "swapped": swapped, "none": prior.unconditional(condition)}
    errors: dict[str, list[float]] = {name: [] for name in conditions}
    for timestep in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=seeded(seed, timestep)).to(latents.device)
        t = torch.full((len(latents),), timestep * prior.num_timesteps // 1000, device=latents.device)
        z_t = prior.add_noise(latents, noise, t)
        for name, given in conditions.items():
            errors[name].append(float((prior.predict_noise(z_t, t, given) - noise).square().mean()))
    return NoiseErrors(**{name: tuple(values) for name, values in errors.items()})


@torch.no_grad()
def linear_noise_errors(prior: Prior, latents: Float[Tensor, "batch 4 height width"], seed: int = 0) -> list[float]:
    """What a prior has to beat: the errors of ``noise_errors`` of the best linear function of the 3x3 noisy latents
    around each cell. It is fitted to the very latents it is measured on; predicting zero would have an error of 1.
    """
    errors = []
    for timestep in TIMESTEPS:
        noise = torch.randn(latents.shape, generator=seeded(seed, timestep)).to(latents.device)
        t = torch.full((len(latents),), timestep * prior.num_timesteps // 1000, device=latents.device)
        z_t = prior.add_noise(latents, noise, t)
        around = F.unfold(F.pad(z_t, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
        x = torch.cat([around, around.new_ones(len(around), 1)], 1).double()
        y = noise.flatten(2).transpose(1, 2).flatten(0, 1).double()
        ridge = 1e-6 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        errors.append(float((y - x @ torch.linalg.solve(x.T @ x + ridge, x.T @ y)).square().mean()))
    return errors


def measured_batches(groups: EncodedGroups) -> list[LatentBatch]:
    """The first ``MEASURED_TARGETS`` views of every held-out group as targets, each from its nearest other views."""
    encoded = [groups.group(index) for index in range(len(groups))]
    batches = []
    for target in range(MEASURED_TARGETS):
        chosen = [choose_views(g, target, min(MEASURED_SOURCES, len(g.latents) - 1), None) for g in encoded]
        fewest = min(len(source.latents) for _, _, source in chosen)
        sources = [replace(s, latents=s.latents[:fewest], thumbnails=s.thumbnails[:fewest]) for _, _, s in chosen]
        sources = [replace(s, cameras=s.cameras[:fewest]) for s in sources]
        batches.append(
            LatentBatch(
                torch.stack([latents for latents, _, _ in chosen]),
                stack_cameras([camera for _, camera, _ in chosen]),
                stack_sources(sources),
            )
        )
    return batches


def batch_condition(prior: SmallPrior, batch: LatentBatch, *, view_aligned: bool) -> Condition:
    """The condition of a batch of encoded views."""
    height, width = batch.latents.shape[-2:]
    source = sources_to(batch.source, prior.device)
    planes = prior.config.planes if view_aligned else 0
    with torch.no_grad():
        return make_condition(prior.tokens, source, batch.target.to(prior.device), (width, height), planes)


def measure_conditioning(prior: SmallPrior, batches: Sequence[LatentBatch]) -> dict[str, float]:
    """``NoiseErrors`` of the view-aligned condition and of the tokens alone, means over the batches; and what the best
    linear function of the noisy latents attains."""
    values: dict[str, float] = {}
    linear = [linear_noise_errors(prior, b.latents.to(prior.device), seed=n) for n, b in enumerate(batches)]
    values["linear_noise_mse"] = sum(sum(errors) for errors in linear) / (len(batches) * len(TIMESTEPS))
    for name, view_aligned in (("aligned", True), ("tokens", False)):
        errors = [
            noise_errors(
                prior, b.latents.to(prior.device), batch_condition(prior, b, view_aligned=view_aligned), seed=n
            )
            for n, b in enumerate(batches)
        ]
        mean = NoiseErrors(
            *(
                tuple(sum(row) / len(row) for row in zip(*(getattr(e, field) for e in errors), strict=True))
                for field in ("right", "swapped", "none")
            )
        )
        values |= mean.summary(name)
    return values


@torch.no_grad()
def reconstruction(
    prior: SmallPrior, images: Float[Tensor, "image 3 height width"]
) -> tuple[Float[Tensor, "image 3 height width"], float]:
    """Through the autoencoder and back, and its PSNR (dB)."""
    images = images.to(prior.device)
    result = prior.decode(prior.encode(images))
    return result, psnr_of_mse(float((result - images).square().mean()))


@torch.no_grad()
def sample_rows(
    prior: SmallPrior, groups: EncodedGroups, count: int, *, steps: int = 25, guidance_scale: float = 1.5
) -> Float[Tensor, "3 height width"]:
    """A grid of pictures, one row per held-out scene.

    Columns: target photo, its reconstruction, the nearest source photo, a sample under the view-aligned condition, one
    under the tokens alone, one without condition; the same noise in every column.
    """
    batch = measured_batches(groups)[0]
    count = min(count, len(batch.latents))
    truth = torch.stack([groups.views(index).images[0] for index in range(count)]).to(prior.device)
    latents = batch.latents[:count].to(prior.device)
    noise = torch.randn(latents.shape, generator=seeded(0, 13)).to(prior.device)
    columns = [truth, prior.decode(latents), prior.decode(batch.source.latents[:count, 0].to(prior.device))]
    aligned = first_items(batch_condition(prior, batch, view_aligned=True), count)
    tokens = first_items(batch_condition(prior, batch, view_aligned=False), count)
    for condition, scale in ((aligned, guidance_scale), (tokens, guidance_scale), (tokens, 0.0)):
        samples = ddim_sample(prior, condition, noise, steps=steps, guidance_scale=scale)
        columns.append(prior.decode(samples))
    return grid(torch.stack(columns, 1))


def first_items(condition: Condition, count: int) -> Condition:
    return Condition(condition.tokens[:count], None if condition.map is None else condition.map[:count])


def grid(pictures: Float[Tensor, "row column 3 height width"], gap: int = 4) -> Float[Tensor, "3 grid_h grid_w"]:
    """Rows and columns of pictures on white, ``gap`` pixels apart."""
    padded = F.pad(pictures, (0, gap, 0, gap), value=1.0)
    row, column, _, height, width = padded.shape
    return padded.permute(2, 0, 3, 1, 4).reshape(3, row * height, column * width)[:, :-gap, :-gap].clamp(0, 1)
