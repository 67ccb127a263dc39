"""Small photos are enlarged before they are encoded: the same views, with more pixels."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from idnerf.geometry.rays import pixel_centers
from idnerf.models.enlargement import ENLARGEMENT, enlarged
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.training.examples import stack_examples
from idnerf.training.objectives import LossConfig, objective
from matchnerf_cases import random_scene
from tiny_cases import TINY_CASCADE, TINY_MODELS, tiny_example


def test_a_smooth_picture_is_the_same_picture_with_more_pixels(generator):
    """What lies at K (x, y, 1) before lies at the new K (x, y, 1) after: enlarged about the image's corner."""
    source, _ = random_scene(1, 2, generator)

    def smooth(size):
        x, y = pixel_centers(size).div(torch.tensor(size)).unbind(-1)
        return torch.stack([0.5 + 0.3 * torch.sin(3 * x), 0.5 + 0.3 * torch.cos(2 * y), 0.2 + 0.6 * x * y])

    width, height = source.cameras.size
    views = replace(source, images=smooth((width, height)).expand_as(source.images))
    large = enlarged(views)
    assert large.cameras.size == (width * ENLARGEMENT, height * ENLARGEMENT)
    assert large.images.shape == (*views.images.shape[:3], height * ENLARGEMENT, width * ENLARGEMENT)
    inner = (..., slice(4, -4), slice(4, -4))
    expected = smooth(large.cameras.size).expand_as(large.images)
    torch.testing.assert_close(large.images[inner], expected[inner], atol=2e-3, rtol=0)
    torch.testing.assert_close(large.cameras.K[..., :2, :], ENLARGEMENT * views.cameras.K[..., :2, :])
    torch.testing.assert_close(large.cameras.c2w, views.cameras.c2w)


def test_it_stays_in_range_and_keeps_means(generator):
    source, _ = random_scene(1, 2, generator)
    images = (torch.rand(source.images.shape, generator=generator) > 0.5).float()
    large = enlarged(replace(source, images=images)).images
    assert large.amin() >= 0 and large.amax() <= 1
    assert (F.avg_pool2d(large.flatten(0, 1), ENLARGEMENT) - images.flatten(0, 1)).abs().mean() < 0.2


@pytest.mark.parametrize(("offset", "enlarges"), [(-1, False), (0, True)])
def test_photos_up_to_the_size_of_the_configuration_are_enlarged_for_rendering(offset, enlarges, generator):
    source, target = random_scene(1, 2, generator)
    pixels = source.cameras.width * source.cameras.height
    config = ModelConfig(cascade=replace(TINY_CASCADE, enlarge_up_to=pixels + offset))
    model = IDNeRF(config).eval()
    assert model.enlarges(source) == enlarges
    factor = ENLARGEMENT if enlarges else 1
    with torch.no_grad():
        features = model.encode(source)
        assert features.cameras.width == factor * source.cameras.width and features.enlargement == factor
        assert features.pyramid.fine.shape[3] >= factor * source.cameras.width
        assert model.encode(source, enlarge=False).cameras.size == source.cameras.size
        by_hand = replace(model.core.encode(enlarged(source) if enlarges else source), enlargement=factor)
        expected = model.render_target(by_hand, target).rgb
        torch.testing.assert_close(model.render_target(features, target).rgb, expected, atol=0, rtol=0)


@pytest.mark.parametrize(("share", "factors"), [(0.0, {1}), (0.5, {1, ENLARGEMENT}), (1.0, {ENLARGEMENT})])
def test_a_share_of_the_training_steps_enlarges(share, factors, monkeypatch):
    model = IDNeRF(ModelConfig(cascade=TINY_CASCADE))
    batch, sizes = stack_examples([tiny_example()]), []
    encode = model.core.encode
    monkeypatch.setattr(model.core, "encode", lambda source: sizes.append(source.cameras.width) or encode(source))
    for seed in range(12):
        draws = torch.Generator().manual_seed(seed)
        objective(model, batch, LossConfig(), draws, rays_per_step=8, fast_share=0.5, enlarged_share=share)
    assert {size / batch.source.cameras.width for size in sizes} == factors


def test_only_the_cascade_enlarges():
    source = tiny_example().source[None]
    assert not IDNeRF(TINY_MODELS["paper"]).enlarges(source)
    assert IDNeRF.from_pretrained().enlarges(source)  # the default weights were trained so
