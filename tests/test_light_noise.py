"""Differences in light between the source photos of a training: how much, on what, and on what not."""

from dataclasses import replace

import pytest
import torch

from idnerf.data.procedural.config import ProceduralConfig
from idnerf.errors import InputError
from idnerf.training.examples import seeded
from idnerf.training.light_noise import LightNoiseConfig, relight
from idnerf.training.procedural_scenes import ProceduralScenes, ProceduralScenesConfig


def factors(config: LightNoiseConfig, generator: torch.Generator, views: int = 3) -> torch.Tensor:
    """What relighting multiplies dark grey photos of 64x48 by: [view 3 48 64]."""
    grey = torch.full((views, 3, 48, 64), 0.1)
    return relight(grey, config, generator) / grey


def test_exposure_is_one_factor_for_a_photo_and_has_the_size_that_is_asked_for(generator):
    gain = factors(LightNoiseConfig(share=1.0, exposure=0.1, light=0.0), generator, views=4)
    torch.testing.assert_close(gain, gain[:, :1, :1, :1].expand_as(gain))
    assert gain[:, 0, 0, 0].std() > 0
    logs = [factors(LightNoiseConfig(1.0, 0.1, 0.0), generator, 8)[:, 0, 0, 0].log() for _ in range(300)]
    # a factor drawn evenly from [0, 1] has the root mean square 1 / sqrt(3)
    assert torch.cat(logs).std().item() == pytest.approx(0.1 / 3**0.5, rel=0.15)


def test_light_varies_smoothly_over_a_photo_and_alike_in_its_colours(generator):
    gain = factors(LightNoiseConfig(share=1.0, exposure=0.0, light=0.3), generator)
    torch.testing.assert_close(gain, gain[:, :1].expand_as(gain))
    assert not torch.allclose(gain[0], gain[1], atol=1e-3)
    logs = gain[:, 0].log()
    spread = (logs.amax((1, 2)) - logs.amin((1, 2))).max()
    steps = max(logs.diff(dim=1).abs().max(), logs.diff(dim=2).abs().max())
    assert 0 < steps < 0.15 * spread


def test_colours_stay_in_range_and_black_stays_black(generator):
    images = torch.rand(2, 3, 48, 64, generator=generator)
    images[:, :, :8] = 0
    bright = relight(images, LightNoiseConfig(1.0, exposure=1.0, light=1.0), generator)
    assert bright.min() == 0 and bright.max() <= 1
    assert torch.equal(bright[:, :, :8], torch.zeros_like(bright[:, :, :8]))


def test_a_share_of_the_examples_is_relit_and_none_of_share_0(generator):
    images = torch.rand(2, 3, 12, 16, generator=generator)
    state = generator.get_state()
    assert relight(images, LightNoiseConfig(), generator) is images
    assert torch.equal(generator.get_state(), state)  # the examples are those of before
    relit = [relight(images, LightNoiseConfig(share=0.3), generator) is not images for _ in range(300)]
    assert sum(relit) / 300 == pytest.approx(0.3, abs=0.09)


def test_examples_have_relit_sources_and_nothing_else_changed(tmp_path):
    scene = ProceduralConfig(size=(48, 32), num_views=4, complexity=(0.0, 0.1), supersample=1)
    config = ProceduralScenesConfig(scene=scene, pool=tmp_path, start_scenes=1, max_scenes=1)
    plain, relit = (
        ProceduralScenes(replace(config, light_noise=LightNoiseConfig(share=share))).example(0, 2, seeded(3))
        for share in (0.0, 1.0)
    )
    assert not torch.equal(plain.source.images, relit.source.images)
    torch.testing.assert_close(plain.source.images, relit.source.images, atol=0.4, rtol=0)
    assert torch.equal(plain.target.images, relit.target.images)
    for part in ("source", "target"):
        a, b = getattr(plain, part).cameras, getattr(relit, part).cameras
        assert torch.equal(a.c2w, b.c2w) and torch.equal(a.K, b.K)
    assert plain.depth is not None and relit.depth is not None and torch.equal(plain.depth, relit.depth)


def test_bad_numbers_are_named():
    with pytest.raises(InputError, match=r"light-noise\.share: expected a share"):
        LightNoiseConfig(share=2.0)
    with pytest.raises(InputError, match=r"light-noise\.light: expected 0 to 1"):
        LightNoiseConfig(light=-0.1)
