"""Shapes are checked at run time in the tests: every annotated function of the package is wrapped."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

install_import_hook("idnerf", "beartype.beartype")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small procedural scene of five views on disk."""
    from idnerf.data.procedural.config import ProceduralConfig
    from idnerf.data.procedural.files import save_scene
    from idnerf.data.procedural.generate import generate_scene

    folder = tmp_path_factory.mktemp("scenes") / "garden"
    config = ProceduralConfig(size=(64, 48), num_views=5, complexity=(0.1, 0.1), supersample=1)
    save_scene(generate_scene(5, config), folder)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny network that has learnt nothing."""
    from idnerf.models.idnerf import IDNeRF, ModelConfig
    from tiny_cases import TINY_CASCADE

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    IDNeRF(ModelConfig(cascade=TINY_CASCADE)).save(path)
    return path
