"""The weights that come with the package: small, loadable, and better than what learns nothing."""

from importlib import resources
from pathlib import Path

import pytest
import torch

from idnerf import load_scene
from idnerf.checkpoint import locate_weights
from idnerf.evaluation.evaluator import evaluate_scene
from idnerf.evaluation.protocols import get_protocol
from idnerf.models.idnerf import IDNeRF

MOST_BYTES = 25 * 2**20
MOST_PARAMETERS = 6_000_000


@pytest.fixture(scope="module")
def model() -> IDNeRF:
    return IDNeRF.from_pretrained()


def test_they_are_small_and_in_half_precision(model):
    assert locate_weights("default").stat().st_size < MOST_BYTES
    assert sum(parameter.numel() for parameter in model.parameters()) < MOST_PARAMETERS
    assert model.config.configuration == "cascade" and not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("num_sources", [2, 3, 4])
def test_they_beat_every_reference_row_on_a_scene_they_never_saw(model, num_sources):
    scene = load_scene(Path(str(resources.files("idnerf") / "demo_scene"))).resized((240, 180))
    result = evaluate_scene(scene, model.render, get_protocol("nearest"), num_sources, targets=(0,))
    ours = result.views[0]
    for row, views in result.references.items():
        assert ours["psnr"] > views[0]["psnr"] + 0.5, row
        assert ours["ssim"] > views[0]["ssim"], row


def test_the_page_on_weights_knows_their_size():
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text(encoding="utf-8")
    assert f"The default weights take {locate_weights('default').stat().st_size / 1e6:.1f} MB" in page
