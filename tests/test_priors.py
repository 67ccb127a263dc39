"""The priors' interface and the Gaussian prior: against numerical integration, limits, and formulas written out."""

import subprocess
import sys

import pytest
import torch

from idnerf.errors import InputError
from idnerf.priors.gaussian import GaussianPrior
from idnerf.priors.image_tokens import ray_pictures, stretched_tokens, text_space_tokens
from idnerf.priors.model_source import model_source
from idnerf.priors.network_prior import to_noise
from idnerf.priors.prior import Condition, PriorConfig, guided_noise, load_prior, unet_latent
from idnerf.priors.sampling import ddim_sample
from idnerf.training.prior_measures import TIMESTEPS, linear_noise_errors, noise_errors
from tiny_cases import plane_views


def normal(generator, *shape):
    return torch.randn(*shape, generator=generator)


def test_the_schedule_falls_from_signal_to_noise():
    prior = GaussianPrior(num_timesteps=50)
    abar = prior.alphas_cumprod
    assert prior.num_timesteps == 50 and (abar.diff() < 0).all()
    assert abar[0] > 0.99 and abar[-1] < 1e-4


def test_added_noise_keeps_unit_variance_and_is_differentiable(generator):
    prior = GaussianPrior()
    z = normal(generator, 2, 4, 64, 64).requires_grad_()
    timestep = torch.tensor([100, 900])
    z_t = prior.add_noise(z, normal(generator, 2, 4, 64, 64), timestep)
    assert z_t.var().item() == pytest.approx(1, abs=0.05)
    (gradient,) = torch.autograd.grad(z_t.sum(), z)
    torch.testing.assert_close(gradient[:, 0, 0, 0], prior.alphas_cumprod[timestep].sqrt())


def test_gaussian_noise_prediction_is_the_posterior_mean_by_integration():
    mean, variance, observed = 0.7, 0.3, 0.4
    prior = GaussianPrior(torch.full((4, 1, 1), mean), torch.full((4, 1, 1), variance))
    timestep = torch.tensor([400])
    predicted = prior.predict_noise(torch.full((1, 4, 1, 1), observed), timestep, Condition(torch.ones(1, 1, 1)))
    abar = prior.alphas_cumprod[400].double()
    e = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    z = (observed - (1 - abar).sqrt() * e) / abar.sqrt()
    weights = torch.exp(-e.square() / 2 - (z - mean).square() / (2 * variance))
    expected = (weights * e).sum() / weights.sum()
    torch.testing.assert_close(predicted, torch.full((1, 4, 1, 1), expected.item()), atol=1e-5, rtol=1e-5)


def test_gaussian_prediction_at_the_ends_of_the_schedule(generator):
    prior = GaussianPrior(torch.full((4, 1, 1), 2.0))
    condition = Condition(torch.ones(1, 1, 1))
    noise = normal(generator, 1, 4, 3, 5)
    z_t = prior.add_noise(torch.full_like(noise, 2.0), noise, torch.tensor([999]))
    torch.testing.assert_close(prior.predict_noise(z_t, torch.tensor([999]), condition), noise, atol=2e-2, rtol=0)
    assert prior.predict_noise(z_t, torch.tensor([0]), condition).abs().max() < 0.2  # almost no noise to be found


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 100.0])
def test_guidance_on_the_gaussian_prior_moves_its_mean(scale, generator):
    variance = torch.rand(4, 6, 8, generator=generator) + 0.5
    with_it, without = normal(generator, 4, 6, 8), normal(generator, 4, 6, 8)
    prior = GaussianPrior(with_it, variance, without)
    z_t, timestep = normal(generator, 2, 4, 6, 8), torch.tensor([30, 700])
    condition = Condition(torch.ones(2, 1, 1))
    expected = GaussianPrior(without + scale * (with_it - without), variance).predict_noise(z_t, timestep, condition)
    torch.testing.assert_close(guided_noise(prior, z_t, timestep, condition, scale), expected, atol=1e-4, rtol=1e-4)


def test_the_middle_of_the_target_view_latent_is_the_prior_s_zero():
    torch.testing.assert_close(unet_latent(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_prediction_of_any_type_gives_the_noise_back(prediction_type, generator):
    prior = GaussianPrior()
    z, noise = normal(generator, 3, 4, 5, 6), normal(generator, 3, 4, 5, 6)
    timestep = torch.tensor([20, 500, 990])
    signal, spread = prior.signal_and_noise(timestep)
    truth = {"epsilon": noise, "v_prediction": signal * noise - spread * z, "sample": z}[prediction_type]
    found = to_noise(truth, prediction_type, prior.add_noise(z, noise, timestep), signal, spread)
    torch.testing.assert_close(found, noise, atol=1e-3, rtol=1e-3)


def test_ddim_carries_noise_to_the_gaussian_s_own_samples(generator):
    mean, variance = torch.full((4, 1, 1), 0.5), torch.full((4, 1, 1), 0.25)
    prior = GaussianPrior(mean, variance)
    noise = normal(generator, 1, 4, 8, 8)
    sample = ddim_sample(prior, Condition(torch.ones(1, 1, 1)), noise, steps=200)
    torch.testing.assert_close(sample, 0.5 + 0.5 * noise, atol=0.03, rtol=0)  # the probability flow of a Gaussian


def test_measuring_tells_a_prior_that_listens_from_one_that_does_not(generator):
    class Listening(GaussianPrior):
        """Its mean is the condition's token."""

        def predict_noise(self, z_t, timestep, condition):
            signal, spread = self.signal_and_noise(timestep)
            mean = condition.tokens[..., None]
            return spread * (z_t - signal * mean) / (signal.square() * 0.01 + spread.square())

    means = torch.tensor([-2.0, 0.0, 2.0])[:, None, None]
    latents = means[..., None] + 0.1 * normal(generator, 3, 4, 8, 8)
    errors = noise_errors(Listening(), latents, Condition(means))
    assert all(right < 0.5 * swapped for right, swapped in zip(errors.right[1:], errors.swapped[1:], strict=True))
    deaf = noise_errors(GaussianPrior(), latents, Condition(means * 0 + 1))
    assert deaf.right == deaf.swapped and deaf.summary("x")["x_gain_over_swapped"] == 0


def test_stretched_tokens_are_unit_embeddings_interpolated(generator):
    embeddings = normal(generator, 2, 3, 768) * 7
    unit = embeddings / embeddings.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(stretched_tokens(embeddings, 768), unit)
    wide = stretched_tokens(embeddings, 1024)
    assert wide.shape == (2, 3, 1024)
    # width 1024 from 768: the sample at output i lies at input (i + 0.5) * 0.75 - 0.5
    torch.testing.assert_close(
        wide[..., 5], unit[..., 3] * 0.375 + unit[..., 4] * 0.625 - 0 * wide[..., 5], atol=1e-5, rtol=0
    )


def test_text_tokens_project_onto_the_image_embeddings(generator):
    projection, prompt = normal(generator, 12, 12), normal(generator, 9, 12)
    embeddings = normal(generator, 2, 3, 12)
    tokens = text_space_tokens(embeddings, torch.linalg.pinv(projection), prompt)
    assert tokens.shape == (2, 4, 12)
    torch.testing.assert_close(tokens[:, 0], prompt[:1].expand(2, -1))
    torch.testing.assert_close(tokens[:, 1:].norm(dim=-1), prompt[1].norm().expand(2, 3))
    similarity = torch.cosine_similarity(tokens[:, 1:] @ projection.T, embeddings, dim=-1)
    torch.testing.assert_close(similarity, torch.ones(2, 3), atol=1e-3, rtol=0)


def test_ray_pictures_are_two_per_view_in_the_range_of_pictures():
    views = plane_views(4)
    pictures = ray_pictures(views.cameras[None, 1:], views.cameras[:1], (8, 6))
    assert pictures.shape == (1, 6, 3, 6, 8)
    assert pictures.min() >= 0 and pictures.max() <= 1 and pictures[:, 1::2].std() > 0.05


@pytest.mark.parametrize("text", ["nowhere", "./missing", "/missing/folder", "a/b/c", "user/"])
def test_what_is_neither_folder_nor_hub_id_is_named(text):
    with pytest.raises(InputError, match="local folder in diffusers' format or a hub id"):
        model_source(text)


def test_a_hub_id_may_name_its_revision():
    source = model_source("user/model@v2.0")
    assert (source.location, source.revision, source.folder) == ("user/model", "v2.0", None)


def test_loading_the_gaussian_prior_needs_no_extra():
    prior = load_prior(PriorConfig(kind="gaussian"))
    assert isinstance(prior, GaussianPrior) and prior.parameters() == []
    with pytest.raises(NotImplementedError):
        prior.encode(torch.zeros(1, 3, 8, 8))


def test_inference_loads_no_prior():
    code = (
        "import sys, idnerf.models.idnerf, idnerf.commands.render, idnerf.priors.prior\n"
        "print([m for m in sys.modules if m in ('diffusers', 'transformers', 'idnerf.priors.stable_diffusion')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_linear_yardstick_is_the_closed_form_for_white_latents(generator):
    """Of unit variance and without correlation: e_hat = sqrt(1 - abar) z_t, whose error is abar."""
    prior = GaussianPrior()
    latents = torch.randn(4, 4, 40, 40, generator=generator)
    expected = [float(prior.alphas_cumprod[t * prior.num_timesteps // 1000]) for t in TIMESTEPS]
    assert linear_noise_errors(prior, latents) == pytest.approx(expected, rel=0.1, abs=0.01)
