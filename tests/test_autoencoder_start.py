"""The small prior's autoencoder before any training: block means, in colour, and nothing dead."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from idnerf.priors.diffusers_networks import build_autoencoder


def smooth_pictures(generator: torch.Generator) -> torch.Tensor:
    """Coloured blobs of every contrast, each picture with a mean colour of its own."""
    coarse = torch.rand(6, 3, 4, 5, generator=generator) * torch.linspace(0.1, 1, 6)[:, None, None, None]
    shift = torch.rand(6, 3, 1, 1, generator=generator) * (1 - coarse.amax((1, 2, 3), keepdim=True))
    return F.interpolate(coarse + shift, size=(32, 40), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (8, 32, 64, 96), (16, 16, 24, 32)])
def test_an_untrained_autoencoder_gives_the_mean_colour_of_every_block(widths, generator):
    torch.manual_seed(1)
    network = build_autoencoder(widths).eval()
    images = smooth_pictures(generator)
    with torch.no_grad():
        latents = network.encode(2 * images - 1).latent_dist.mean
        result = (network.decode(latents).sample + 1) / 2
    assert latents.shape == (6, 4, 4, 5)
    means = F.interpolate(F.avg_pool2d(images, 8), scale_factor=8)
    assert (result - means).abs().max() < 0.06  # the pictures' own share in the normalisation
    assert (result - means).square().mean() < 0.03**2
    grey = images.mean(1, keepdim=True).expand_as(images)
    with torch.no_grad():
        brightness = network.encode(2 * grey - 1).latent_dist.mean
    assert brightness[:, 1:3].abs().max() < 2e-3 < 0.1 < brightness[:, 0].abs().max()  # a grey has no hue


def test_every_weight_of_it_learns(generator):
    """Zeros are where the path needs them, but no weight is cut off: after two steps each has a gradient."""
    torch.manual_seed(1)
    network = build_autoencoder((8, 16, 16, 16))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0)
    images = smooth_pictures(generator)
    for _ in range(3):
        optimizer.zero_grad()
        posterior = network.encode(2 * images - 1).latent_dist
        noisy = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        (network.decode(noisy).sample - 2 * images + 1).square().mean().backward()
        optimizer.step()
    still = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []
