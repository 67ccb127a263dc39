"""Our small latent diffusion prior: geometry of its condition, its folder, its latents' scale."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, UNet2DConditionModel

from idnerf.errors import InputError
from idnerf.geometry.cameras import crop
from idnerf.priors.latent_diffusion import (
    SmallPrior,
    SmallPriorConfig,
    load_small_prior,
    new_networks,
    new_schedule,
    save_small_prior,
    working_size,
)
from idnerf.priors.latent_scale import fold_scale, latent_statistics
from idnerf.priors.prior import PriorConfig, guided_noise, load_prior
from idnerf.priors.ray_maps import relative_ray_maps, target_ray_map
from idnerf.priors.view_alignment import align_sources
from idnerf.training.prior_examples import EncodedGroups
from idnerf.training.prior_measures import batch_condition, linear_noise_errors, measured_batches, noise_errors
from idnerf.training.prior_scenes import procedural_groups
from idnerf.types import Cameras, Views
from tiny_cases import plane_views, rotation, waken

TINY = SmallPriorConfig(
    autoencoder_widths=(8, 8, 8, 8), unet_widths=(8, 16), token_width=12, heads=2, planes=6, source_side=64
)


def tiny_prior(seed: int = 0) -> SmallPrior:
    torch.manual_seed(seed)
    return SmallPrior(waken(new_networks(TINY)), new_schedule(), TINY)


@pytest.fixture(scope="module")
def prior() -> SmallPrior:
    return tiny_prior()


def example(views: int = 3, size: tuple[int, int] = (64, 48)) -> tuple[Views, Cameras]:
    photos = plane_views(views + 1, size)
    return photos[1:][None], photos.cameras[:1]


def moved(cameras: Cameras, motion: torch.Tensor, scale: float = 1.0) -> Cameras:
    """The same cameras in a world that is turned, shifted and scaled."""
    c2w = cameras.c2w.clone()
    c2w[..., :3, 3] *= scale
    return Cameras(motion @ c2w, cameras.K, cameras.size, cameras.near * scale, cameras.far * scale)


def test_the_condition_knows_neither_the_world_s_axes_nor_its_unit(prior):
    source, target = example()
    motion = torch.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation(0.4, -1.1), torch.tensor([3.0, -2.0, 5.0])
    here = prior.condition(source, target, (8, 6))
    there = prior.condition(
        Views(source.images, moved(source.cameras, motion, 2.5)), moved(target, motion, 2.5), (8, 6)
    )
    torch.testing.assert_close(there.tokens, here.tokens, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(there.map, here.map, atol=2e-3, rtol=1e-3)


def test_rays_of_the_target_seen_from_itself():
    _, target = example()
    maps = relative_ray_maps(target[:, None], target, (8, 6))[0, 0]
    assert maps[:3].abs().max() < 1e-5
    torch.testing.assert_close(maps[3:5] / maps[5:], target_ray_map(target, (8, 6))[0], atol=1e-5, rtol=1e-4)


def test_rays_of_a_crop_are_the_crop_of_the_rays():
    _, target = example(size=(64, 48))
    whole = target_ray_map(target, (8, 6))
    window = target_ray_map(crop(target, 16, 8, (32, 24)), (4, 3))
    torch.testing.assert_close(window, whole[:, :, 1:4, 2:6], atol=1e-5, rtol=1e-4)


def test_aligned_latents_of_a_plane_are_the_target_s_own():
    photos = plane_views(4, (288, 208))
    latents = torch.cat([F.avg_pool2d(photos.images, 8)] * 2, 1)[:, :4]
    fine = F.avg_pool2d(photos.images, 4)
    cameras = photos.cameras
    aligned = align_sources(fine[None, 1:], latents[None, 1:], cameras[None, 1:], cameras[:1], (36, 26), 32)[0]
    seen_by_all = aligned[5] > 0.99
    error = (aligned[:4] - latents[0]).abs().mean(0)[seen_by_all].mean()
    unaligned = (latents[1] - latents[0]).abs().mean(0)[seen_by_all].mean()
    assert seen_by_all.float().mean() > 0.3 and error < 0.1 * unaligned
    # position 0 is near, 1 is far; the plane lies at depth 4 of 2 .. 8
    position = (1 / 4 - 1 / 2) / (1 / 8 - 1 / 2)
    assert aligned[6][seen_by_all].median().item() == pytest.approx(position, abs=0.05)


def test_alignment_does_not_depend_on_the_order_of_views_and_survives_views_that_see_nothing(generator):
    photos = plane_views(4, (64, 48))
    latents, fine = torch.randn(1, 3, 4, 6, 8, generator=generator), F.avg_pool2d(photos.images, 4)[None, 1:]
    source, target = photos.cameras[None, 1:], photos.cameras[:1]
    aligned = align_sources(fine, latents, source, target, (8, 6), 6)
    order = [2, 0, 1]
    shuffled = align_sources(fine[:, order], latents[:, order], source[:, order], target, (8, 6), 6)
    torch.testing.assert_close(shuffled, aligned, atol=1e-5, rtol=1e-4)
    about = torch.diag(torch.tensor([-1.0, 1, -1, 1]))
    blind = replace(source, c2w=source.c2w @ about)  # all look the other way
    nothing = align_sources(fine, latents, blind, target, (8, 6), 6)
    assert nothing.isfinite().all() and not nothing[:, :4].any() and not nothing[:, 5].any()


@pytest.mark.parametrize("views", [1, 2, 5])
def test_any_number_of_views_in_any_order(prior, views):
    source, target = example(views)
    condition = prior.condition(source, target, (8, 6))
    assert condition.tokens.shape == (1, views * 4, prior.condition_width)
    order = torch.randperm(views)
    shuffled = prior.condition(Views(source.images[:, order], source.cameras[:, order]), target, (8, 6))
    expected = condition.tokens.unflatten(1, (views, -1))[:, order].flatten(1, 2)
    torch.testing.assert_close(shuffled.tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shuffled.map, condition.map, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (16, 16)])
def test_noise_is_predicted_at_any_size_of_latent_and_hears_both_parts_of_the_condition(prior, size, generator):
    source, target = example()
    condition = prior.condition(source, target, size)
    z_t, timestep = torch.randn(1, 4, size[1], size[0], generator=generator), torch.tensor([600])
    e = prior.predict_noise(z_t, timestep, condition)
    assert e.shape == z_t.shape and e.isfinite().all()
    for other in (replace(condition, tokens=condition.tokens * 0), replace(condition, map=condition.map * 0)):
        assert (prior.predict_noise(z_t, timestep, other) - e).abs().max() > 1e-4
    without = prior.unconditional(condition)
    assert without.tokens.shape == condition.tokens.shape and not without.map.any()
    assert guided_noise(prior, z_t, timestep, condition, 3.0).isfinite().all()


def test_a_batch_of_two_is_two_of_one(prior, generator):
    source, target = example()
    other = Views(source.images.flip(1), source.cameras[:, [2, 1, 0]])
    both = Views(
        torch.cat([source.images, other.images.flip(-1)]),
        Cameras(
            torch.cat([source.cameras.c2w, other.cameras.c2w]),
            torch.cat([source.cameras.K, other.cameras.K]),
            source.cameras.size,
            source.cameras.near.repeat(2, 1),
            source.cameras.far.repeat(2, 1),
        ),
    )
    condition = prior.condition(both, target[[0, 0]], (8, 6))
    z_t, timestep = torch.randn(2, 4, 6, 8, generator=generator), torch.tensor([100, 700])
    together = prior.predict_noise(z_t, timestep, condition)
    for item in range(2):
        alone = prior.condition(both[item : item + 1], target, (8, 6))
        one = slice(item, item + 1)
        torch.testing.assert_close(
            prior.predict_noise(z_t[one], timestep[one], alone), together[one], atol=1e-4, rtol=1e-3
        )


def test_tokens_alone_leave_the_aligned_features_out():
    prior = tiny_prior()
    prior.view_aligned = False
    source, target = example()
    condition = prior.condition(source, target, (8, 6))
    assert not condition.map[:, 2:].any() and condition.map[:, :2].abs().sum() > 0


def test_the_folder_is_read_back_and_by_diffusers_itself(tmp_path, generator):
    torch.manual_seed(0)
    networks = waken(new_networks(TINY))
    save_small_prior(networks, TINY, tmp_path / "prior")
    save_small_prior(networks, TINY, tmp_path / "prior")  # replaces
    assert [p.name for p in tmp_path.iterdir()] == ["prior"]
    prior = load_prior(PriorConfig(path=str(tmp_path / "prior")))
    assert isinstance(prior, SmallPrior) and prior.config == TINY
    assert len(prior.parameters()) == len(list(networks.parameters()))
    assert not any(p.requires_grad for p in prior.parameters())
    original = SmallPrior(networks, new_schedule(), TINY)
    source, target = example()
    z_t, timestep = torch.randn(1, 4, 6, 8, generator=generator), torch.tensor([300])
    found, expected = (p.predict_noise(z_t, timestep, p.condition(source, target, (8, 6))) for p in (prior, original))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # halves
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "prior", subfolder="unet")
    vae = AutoencoderKL.from_pretrained(tmp_path / "prior", subfolder="vae")
    assert unet.config.cross_attention_dim == 12 and vae.config.latent_channels == 4


def test_what_is_no_small_prior_is_one_line(tmp_path):
    with pytest.raises(InputError, match="idnerf train-prior") as caught:
        load_small_prior(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"autoencoder_widths": (8, 8)}, {"unet_widths": (8, 15)}, {"token_width": 7}, {"planes": 0}, {"source_side": 4}],
)
def test_sizes_that_cannot_be_are_named(options):
    with pytest.raises(InputError, match="--sizes"):
        replace(TINY, **options)


def test_working_size_keeps_the_shape_in_multiples_of_8():
    assert working_size((640, 512), 288) == (288, 232)
    assert working_size((288, 208), 288) == (288, 208)
    assert working_size((3, 5), 288) == (8, 8)


def test_folding_the_scale_normalises_latents_and_keeps_reconstructions(generator):
    prior = tiny_prior()
    images = torch.rand(3, 3, 32, 32, generator=generator)
    latents, decoded = prior.encode(images), prior.decode(prior.encode(images))
    mean, deviation = latent_statistics(latents)
    fold_scale(prior.autoencoder, mean, deviation)
    mean, deviation = latent_statistics(prior.encode(images))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(prior.decode(prior.encode(images)), decoded, atol=1e-4, rtol=1e-3)


def test_the_prior_of_the_package_listens_to_its_condition_and_beats_a_linear_guess():
    prior = load_small_prior()
    _, held_out = procedural_groups((288, 208), None, 1, 2)
    batch = measured_batches(EncodedGroups(held_out, prior, augment=False))[0]
    errors = noise_errors(prior, batch.latents, batch_condition(prior, batch, view_aligned=True))
    linear = linear_noise_errors(prior, batch.latents)
    assert sum(errors.right) < 0.95 * sum(linear)
    assert sum(errors.right) < 0.75 * sum(errors.swapped)
