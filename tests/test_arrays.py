"""Arrays in, arrays out: equal to the typed way, whatever the layout, and clear about what does not fit."""

import numpy as np
import pytest
import torch

import idnerf
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.types import Cameras, Views
from tiny_cases import TINY_CASCADE


@pytest.fixture(scope="module")
def model() -> IDNeRF:
    torch.manual_seed(0)
    return IDNeRF(ModelConfig(cascade=TINY_CASCADE)).eval()


@pytest.fixture
def arrays(generator) -> dict:
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[:, 0, 3] = torch.tensor([-0.1, 0.0, 0.1])
    K = torch.tensor([[40.0, 0, 20], [0, 40, 16], [0, 0, 1]])
    target = torch.eye(4)
    target[0, 3] = 0.05
    return {
        "images": torch.rand(3, 3, 32, 40, generator=generator),
        "K": K,
        "c2w": c2w,
        "target_K": K,
        "target_c2w": target,
        "near": 1.0,
        "far": 4.0,
    }


def test_equals_the_typed_way(model, arrays, tmp_path):
    ours = idnerf.render(**arrays, model=model)
    model.save(tmp_path / "weights.safetensors", half=False)
    from_path = idnerf.render(**arrays, model=tmp_path / "weights.safetensors")
    torch.testing.assert_close(from_path.rgb, ours.rgb)
    bounds = torch.tensor([1.0, 4.0])
    cameras = Cameras(arrays["c2w"], arrays["K"].expand(3, 3, 3), (40, 32), bounds[:1].expand(3), bounds[1:].expand(3))
    target = Cameras(arrays["target_c2w"], arrays["target_K"], (40, 32), bounds[0], bounds[1])
    theirs = model.render(Views(arrays["images"], cameras), target)
    torch.testing.assert_close(ours.rgb, theirs.rgb)
    assert ours.rgb.shape == (3, 32, 40) and ours.depth.shape == (32, 40)


def test_takes_numpy_channels_last_and_8_bit(model, arrays):
    as_bytes = (arrays["images"] * 255).round().byte()
    a = idnerf.render(**{**arrays, "images": as_bytes.float() / 255}, model=model)
    b = idnerf.render(**{**arrays, "images": as_bytes.permute(0, 2, 3, 1).numpy()}, model=model)
    c = idnerf.render(
        **{**arrays, "K": np.tile(arrays["K"].numpy(), (3, 1, 1)), "images": as_bytes.numpy()}, model=model
    )
    torch.testing.assert_close(a.rgb, b.rgb)
    torch.testing.assert_close(a.rgb, c.rgb)


def test_size_of_the_target_is_free(model, arrays):
    assert idnerf.render(**arrays, model=model, size=(24, 16), quality="fast").rgb.shape == (3, 16, 24)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": torch.rand(3, 32, 40)}, "expected images"),
        ({"c2w": torch.eye(4)}, "expected c2w"),
        ({"K": torch.eye(4)}, "expected K"),
        ({"target_c2w": torch.full((4, 4), torch.nan)}, "not finite"),
        ({"near": 2.0, "far": 1.0}, "near"),
        ({"quality": "best"}, "quality"),
    ],
)
def test_what_does_not_fit_is_named(model, arrays, change, expected):
    with pytest.raises(InputError, match=expected) as error:
        idnerf.render(**{**arrays, **change}, model=model)
    assert "\n" not in str(error.value)
