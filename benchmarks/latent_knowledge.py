"""What can be known of the target's latent: a prior's estimate beside what the sources show without any prior.

python benchmarks/latent_knowledge.py
python benchmarks/latent_knowledge.py --prior RUN/prior

Prints the share of the true latents' variance that each explains (1: all, 0: their mean), over all latent cells and
over those that fewer than two sources see. Held-out procedural scenes, from easy to hard.
"""

import sys

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Bool, Float
from torch import Tensor

from ablation import prior_estimate
from idnerf.commands.options import load_model
from idnerf.data.procedural.config import ProceduralConfig
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF
from idnerf.models.latent import LATENT_STRIDE, FrustumLatentInference
from idnerf.priors.latent_diffusion import SmallPrior, load_small_prior
from idnerf.priors.view_alignment import align_sources
from idnerf.training.examples import Example
from idnerf.training.procedural_scenes import held_out_examples

NUM_SOURCES = 3
Cells = Float[Tensor, "channel cell"]


def explained(guess: Cells, truth: Cells, where: Bool[Tensor, "cell"] | None = None) -> float:
    """1 - squared error / variance of the truth about its mean over all cells, both over the cells ``where``."""
    here = torch.ones(truth.shape[1], dtype=torch.bool) if where is None else where
    spread = truth - truth.mean(1, keepdim=True)
    return float(1 - (guess - truth)[:, here].square().sum() / spread[:, here].square().sum())


def best_linear(inputs: Cells, truth: Cells) -> Cells:
    """The best affine function of each cell's ``inputs``, fitted to these very cells."""
    x = F.pad(inputs.T.double(), (0, 1), value=1.0)
    return (x @ torch.linalg.lstsq(x, truth.T.double()).solution).T.float()


@torch.no_grad()
def knowledge(
    example: Example, model: IDNeRF, prior: SmallPrior, unaligned: SmallPrior
) -> dict[str, Float[Tensor, "c h w"]]:
    """The true latent of an example's target and everything that guesses at it, as maps of one size."""
    source, target = example.source, example.target
    images, cameras, camera = source.images[None], source.cameras[None], target.cameras[None]
    truth = prior.encode(target.images[None])[0]
    height, width = truth.shape[-2:]
    encoded = prior.encode_sources(type(source)(images, cameras))
    aligned = align_sources(encoded.thumbnails, encoded.latents, cameras, camera, (width, height), prior.config.planes)
    network = FrustumLatentInference(1, None)
    quarter = images.new_zeros(1, len(source), images.shape[-2] // 4, images.shape[-1] // 4, 1)
    start = network(network.view_maps(images, quarter), cameras, camera).values[0]  # before any training
    rendered = prior.encode(model.render(source, target.cameras, quality="fast").rgb.clamp(0, 1)[None])[0]
    estimate = prior_estimate(prior, type(source)(images, cameras), camera)[0]
    assert example.seen is not None
    return {
        "truth": truth,
        "colours of the true picture, 8x8 means (linear)": F.avg_pool2d(target.images, LATENT_STRIDE),
        "colours that the views agree on (linear): where the latent network starts": start[:3],
        "source latents blended over a plane sweep (linear)": aligned[0, :4],
        "the prior's estimate, view-aligned": estimate,
        "the prior's estimate, tokens alone": prior_estimate(unaligned, type(source)(images, cameras), camera)[0],
        "what the model renders without any latent, encoded (linear)": rendered,
        "the same and the prior's view-aligned estimate together (linear)": torch.cat([rendered, estimate]),
        "unseen": F.avg_pool2d((example.seen < 2).float()[None], LATENT_STRIDE) > 0.5,
    }


def main(scenes: int = 30, prior: str | None = None, weights: str = "default") -> None:
    """Measure, print a table.

    Args:
        scenes: how many; they are made anew, about a second each.
        prior: folder of the small prior; none takes the one that comes with the package.
        weights: of the model without latent.
    """
    priors = [load_small_prior(prior, view_aligned=aligned) for aligned in (True, False)]
    model = load_model(weights, torch.device("cpu"))
    found: dict[str, list[Tensor]] = {}
    for example in held_out_examples(ProceduralConfig(size=(288, 208)), scenes, NUM_SOURCES):
        for name, values in knowledge(example, model, *priors).items():
            found.setdefault(name, []).append(values.flatten(1))
    cells = {name: torch.cat(values, 1) for name, values in found.items()}
    truth, unseen = cells.pop("truth"), cells.pop("unseen")[0]
    print(
        f"{truth.shape[1]} cells, {unseen.float().mean():.0%} of them seen by fewer than two of {NUM_SOURCES} sources\n"
    )
    print("| known of the latent | variance explained | where fewer than two sources see |\n|---|---|---|")
    for name, values in cells.items():
        guess = best_linear(values, truth) if "(linear)" in name else values
        print(f"| {name} | {explained(guess, truth):.3f} | {explained(guess, truth, unseen):.3f} |")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
