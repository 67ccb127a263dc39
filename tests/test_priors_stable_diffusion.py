"""Stable Diffusion priors end to end on tiny folders in the real format; bad input in one line."""

import importlib

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from idnerf.errors import InputError
from idnerf.priors.clip import MEAN, STD, clip_pixels
from idnerf.priors.model_source import hub_error, model_source
from idnerf.priors.prior import PriorConfig, guided_noise, load_prior
from idnerf.types import Views
from prior_folders import EMBEDDING, clip_folder, diffusion_folder
from tiny_cases import plane_views


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    return {
        "clip": clip_folder(root / "clip"),
        "clip-wide": clip_folder(root / "clip-wide", hidden=16, activation="gelu"),
        "stable-diffusion-1.5": diffusion_folder(root / "sd15"),
        "stable-diffusion-2.1": diffusion_folder(
            root / "sd21", width=16, prediction_type="v_prediction", activation="gelu"
        ),
        "image-variation": diffusion_folder(root / "variation", text=False),
    }


def config(folders, kind, adapter="auto", **options):
    clip = None if kind == "image-variation" else str(folders["clip-wide" if "2.1" in kind else "clip"])
    return PriorConfig(kind=kind, path=str(folders[kind]), adapter=adapter, image_encoder=clip, **options)


def example(batch=2, views=3):
    photos = plane_views(views + 1, (40, 24))
    source = Views(photos.images[None, 1:].expand(batch, -1, -1, -1, -1), photos.cameras[None, 1:][[0] * batch])
    return source, photos.cameras[:1][[0] * batch]


CASES = [
    ("stable-diffusion-1.5", "auto", 4),
    ("stable-diffusion-1.5", "paper", 9),
    ("stable-diffusion-2.1", "auto", 4),
    ("stable-diffusion-2.1", "paper", 9),
    ("image-variation", "auto", 3),
]


@pytest.mark.parametrize(("kind", "adapter", "tokens"), CASES)
def test_a_prior_predicts_noise_of_the_latent_s_shape_and_stays_as_it_was(folders, kind, adapter, tokens, generator):
    prior = load_prior(config(folders, kind, adapter))
    before = [p.clone() for p in prior.parameters()]
    source, target = example()
    condition = prior.condition(source, target, (8, 8))
    assert condition.tokens.shape == (2, tokens, prior.condition_width) and condition.map is None
    z = torch.randn(2, 4, 8, 8, generator=generator, requires_grad=True)
    timestep = torch.tensor([10, 800])
    z_t = prior.add_noise(z, torch.randn(2, 4, 8, 8, generator=generator), timestep)
    noise = guided_noise(prior, z_t, timestep, condition, 100.0)
    assert noise.shape == z.shape and noise.isfinite().all() and not noise.requires_grad
    assert len(before) > 20 and not any(p.requires_grad for p in prior.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, prior.parameters(), strict=True))
    # the condition is heard: one token off changes the prediction
    other = prior.predict_noise(z_t, timestep, prior.unconditional(condition))
    assert not torch.allclose(other, prior.predict_noise(z_t, timestep, condition), atol=1e-5)


@pytest.mark.parametrize("kind", ["stable-diffusion-1.5", "stable-diffusion-2.1"])
def test_noise_is_the_u_net_s_prediction_converted(folders, kind, generator):
    prior = load_prior(config(folders, kind, attention_slicing=False))
    unet = UNet2DConditionModel.from_pretrained(folders[kind], subfolder="unet").eval()
    source, target = example(batch=1)
    condition = prior.condition(source, target, (8, 8))
    z_t, timestep = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([333])
    with torch.no_grad():
        prediction = unet(z_t, timestep, encoder_hidden_states=condition.tokens).sample
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = (1 - betas).cumprod(0)[333].float()
    expected = prediction if "1.5" in kind else abar.sqrt() * prediction + (1 - abar).sqrt() * z_t
    torch.testing.assert_close(prior.predict_noise(z_t, timestep, condition), expected, atol=1e-5, rtol=1e-4)


def test_the_projection_is_inverted_once(folders, monkeypatch):
    inverted, inner = [], torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda matrix: inverted.append(1) or inner(matrix))
    prior = load_prior(config(folders, "stable-diffusion-1.5", "text"))
    source, target = example()
    first, second = (prior.condition(source, target, (8, 8)).tokens for _ in range(2))
    assert torch.equal(first, second) and len(inverted) == 1


def test_attention_slicing_changes_nothing_but_memory(folders, generator):
    source, target = example(batch=1)
    z_t, timestep = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500])
    found = []
    for slicing in (False, True):
        prior = load_prior(config(folders, "stable-diffusion-1.5", attention_slicing=slicing))
        found.append(prior.predict_noise(z_t, timestep, prior.condition(source, target, (8, 8))))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_without_condition_stands_the_empty_prompt(folders):
    prior = load_prior(config(folders, "stable-diffusion-1.5"))
    source, target = example(views=2)
    without = prior.unconditional(prior.condition(source, target, (8, 8)))
    network = CLIPTextModel.from_pretrained(folders["stable-diffusion-1.5"], subfolder="text_encoder").eval()
    with torch.no_grad():  # start, end, and the end token again as padding
        states = network(input_ids=torch.tensor([[18] + [19] * 8])).last_hidden_state
    torch.testing.assert_close(without.tokens, states[:, :3].expand(2, -1, -1), atol=1e-5, rtol=1e-5)


def test_stable_diffusion_2_pads_the_empty_prompt_with_token_0(folders):
    prior = load_prior(config(folders, "stable-diffusion-2.1"))
    source, target = example(views=3)
    without = prior.unconditional(prior.condition(source, target, (8, 8)))
    network = CLIPTextModel.from_pretrained(folders["stable-diffusion-2.1"], subfolder="text_encoder").eval()
    with torch.no_grad():
        states = network(input_ids=torch.tensor([[18, 19] + [0] * 7])).last_hidden_state
    torch.testing.assert_close(without.tokens, states[:, :4].expand(2, -1, -1), atol=1e-5, rtol=1e-5)


def test_image_variation_takes_embeddings_as_they_are_and_zeros_for_nothing(folders):
    prior = load_prior(config(folders, "image-variation"))
    source, target = example()
    condition = prior.condition(source, target, (8, 8))
    torch.testing.assert_close(condition.tokens[0], prior.encoder.embed(source.images[0]))
    assert not prior.unconditional(condition).tokens.any()


def test_permuting_the_sources_permutes_the_tokens(folders):
    prior = load_prior(config(folders, "image-variation"))
    source, target = example()
    order = torch.tensor([2, 0, 1])
    shuffled = Views(source.images[:, order], source.cameras[:, order])
    tokens = prior.condition(source, target, (8, 8)).tokens
    torch.testing.assert_close(prior.condition(shuffled, target, (8, 8)).tokens, tokens[:, order], atol=1e-5, rtol=1e-5)


def test_ray_tokens_can_be_asked_for_and_left_out(folders):
    source, target = example(views=2)
    for adapter, rays, count in (("auto", True, 7), ("paper", False, 2)):
        prior = load_prior(config(folders, "stable-diffusion-1.5", adapter, ray_tokens=rays))
        assert prior.condition(source, target, (8, 8)).tokens.shape[1] == count


def test_latents_are_the_scaled_mean_of_the_autoencoder(folders, generator):
    prior = load_prior(config(folders, "image-variation"))
    autoencoder = AutoencoderKL.from_pretrained(folders["image-variation"], subfolder="vae").eval()
    images = torch.rand(2, 3, 24, 32, generator=generator)
    latents = prior.encode(images)
    with torch.no_grad():
        expected = autoencoder.encode(2 * images - 1).latent_dist.mean * 0.18215
        decoded = (autoencoder.decode(expected / 0.18215).sample + 1) / 2
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(prior.decode(latents), decoded.clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_clip_pixels_of_a_grey_picture():
    pixels = clip_pixels(torch.full((1, 3, 30, 50), 0.6), 16)
    expected = (torch.tensor([0.6] * 3) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels, expected[None, :, None, None].expand(1, 3, 16, 16), atol=1e-5, rtol=0)


def expect_line(match, prior_config):
    with pytest.raises(InputError, match=match) as caught:
        load_prior(prior_config)
    assert "\n" not in str(caught.value)


def test_widths_that_do_not_fit_are_told(folders):
    wide = str(folders["stable-diffusion-2.1"])
    clip = str(folders["clip"])
    expect_line("text tower", PriorConfig(kind="stable-diffusion-2.1", path=wide, image_encoder=clip))
    expect_line(
        f"embeddings of {EMBEDDING}",
        PriorConfig(kind="image-variation", path=wide, adapter="native", image_encoder=clip),
    )


def test_a_missing_folder_part_or_model_is_one_line(folders, tmp_path):
    (tmp_path / "unet").mkdir()
    expect_line("hub id", PriorConfig(kind="stable-diffusion-1.5", path=str(tmp_path / "nothing")))
    expect_line("cannot be read", PriorConfig(kind="stable-diffusion-1.5", path=str(tmp_path)))
    expect_line("no folder 'unet'", PriorConfig(kind="stable-diffusion-1.5", path=str(folders["clip"])))
    expect_line("hf download", PriorConfig(kind="stable-diffusion-2.1", path="nobody-here/no-such-model"))
    good = str(folders["stable-diffusion-1.5"])
    expect_line("hf download", PriorConfig(kind="stable-diffusion-1.5", path=good, image_encoder="nobody/none"))


def test_a_gated_model_is_told_apart():
    error = OSError("Access to model user/model is restricted: 401 Client Error, gated repo")
    assert "accept its terms at https://huggingface.co/user/model" in str(
        hub_error(model_source("user/model"), "unet", error)
    )


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_missing_extra_is_one_line(folders, package, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    expect_line(r"pip install '\.\[prior\]'", config(folders, "stable-diffusion-1.5"))
