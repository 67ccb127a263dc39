"""Arrays in, arrays out: equal to the typed way, whatever the layout, and clear about what does not fit."""

import inspect

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
    d = idnerf.render(**{**arrays, "images": as_bytes.long().tolist()}, model=model)
    for other in (b, c, d):
        torch.testing.assert_close(a.rgb, other.rgb)


def test_any_precision_is_taken(model, arrays):
    ours = idnerf.render(**arrays, model=model, quality="fast")
    as_double = {name: value.double() if torch.is_tensor(value) else value for name, value in arrays.items()}
    torch.testing.assert_close(idnerf.render(**as_double, model=model, quality="fast").rgb, ours.rgb)
    near, far = torch.ones(3).double(), torch.full((3,), 4.0).double()
    source = Cameras(as_double["c2w"], as_double["K"].expand(3, 3, 3), (40, 32), near, far)
    target = Cameras(as_double["target_c2w"], as_double["target_K"], (40, 32), near[0], far[0])
    typed = model.render(Views(as_double["images"], source), target, quality="fast")
    torch.testing.assert_close(typed.rgb, ours.rgb)


def test_size_of_the_target_is_free(model, arrays):
    for size in ((24, 16), (24.0, 16.0), np.array([24, 16]), [24, torch.tensor(16)]):
        assert idnerf.render(**arrays, model=model, size=size, quality="fast").rgb.shape == (3, 16, 24)


def test_each_source_may_have_its_own_depth_range(model, arrays):
    """The target's is then the widest, as in a scene."""
    near, far = np.array([1.0, 1.5, 2.0]), torch.tensor([6.0, 4.0, 5.0])
    ours = idnerf.render(**{**arrays, "near": near, "far": far}, model=model, quality="fast")
    cameras = Cameras(arrays["c2w"], arrays["K"].expand(3, 3, 3), (40, 32), torch.from_numpy(near).float(), far)
    target = Cameras(arrays["target_c2w"], arrays["target_K"], (40, 32), torch.tensor(1.0), torch.tensor(6.0))
    theirs = model.render(Views(arrays["images"], cameras), target, quality="fast")
    assert torch.equal(ours.rgb, theirs.rgb) and torch.equal(ours.depth, theirs.depth)
    one = idnerf.render(**{**arrays, "near": torch.tensor([1.0]), "far": np.array([6.0])}, model=model, quality="fast")
    number = idnerf.render(**{**arrays, "near": 1.0, "far": 6.0}, model=model, quality="fast")
    assert torch.equal(one.rgb, number.rgb)


def test_geographic_coordinates_render_like_those_around_the_origin(model, arrays):
    middle = torch.tensor([512_345.6, 5_345_678.9, 432.1], dtype=torch.float64)
    moved = {name: arrays[name].double().clone() for name in ("c2w", "target_c2w")}
    for pose in moved.values():
        pose[..., :3, 3] += middle
    here, there = (idnerf.render(**{**arrays, **change}, model=model, quality="fast") for change in ({}, moved))
    torch.testing.assert_close(there.rgb, here.rgb, atol=1e-4, rtol=0)
    torch.testing.assert_close(there.depth, here.depth, atol=1e-3, rtol=0)


def test_ordinary_coordinates_are_left_as_they_are(model, arrays, monkeypatch):
    passed = []
    monkeypatch.setattr(model, "render", lambda source, target, **_: passed.append((source.cameras, target)))
    shift = torch.tensor([3.0, -50.0, 20.0])
    for name in ("c2w", "target_c2w"):
        arrays[name][..., :3, 3] += shift
    inspect.unwrap(idnerf.render)(**arrays, model=model)
    ((source, target),) = passed
    assert torch.equal(source.c2w, arrays["c2w"]) and torch.equal(target.c2w, arrays["target_c2w"])


def typed(arrays: dict) -> tuple[Views, Cameras]:
    """Source views and cameras of two targets."""
    bounds = torch.tensor([1.0, 4.0])
    source = Cameras(arrays["c2w"], arrays["K"].expand(3, 3, 3), (40, 32), bounds[:1].expand(3), bounds[1:].expand(3))
    poses = torch.stack([arrays["target_c2w"], torch.eye(4)])
    targets = Cameras(poses, arrays["K"].expand(2, 3, 3), (40, 32), bounds[:1].expand(2), bounds[1:].expand(2))
    return Views(arrays["images"], source), targets


def test_several_targets_of_the_same_sources(model, arrays, monkeypatch):
    source, targets = typed(arrays)
    single = [model.render(source, targets[i], quality="fast") for i in range(2)]
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda views: encoded.append(views) or encode(views))
    both = model.render(source, targets, quality="fast")
    assert both.rgb.shape == (2, 3, 32, 40) and both.confidence.shape == (2, 32, 40) and len(encoded) == 1
    for i in range(2):
        assert torch.equal(both.rgb[i], single[i].rgb) and torch.equal(both.depth[i], single[i].depth)
    pairs = Views(torch.stack([source.images] * 2), source.cameras[None][[0, 0]])
    torch.testing.assert_close(model.render(pairs, targets, quality="fast").rgb, both.rgb)
    assert model.render(source, targets[:1], quality="fast").rgb.shape == (1, 3, 32, 40)


def test_shapes_that_do_not_go_together_are_refused(model, arrays):
    source, targets = typed(arrays)
    wrong = [
        (source[None], targets[0]),
        (source[None], targets),
        (source, targets[:0]),
        (source, targets[None]),
        (source[0], targets[0]),
        (source[None][None], targets[:1]),
    ]
    for sources, target in wrong:
        with pytest.raises(InputError, match="expected source \\[view\\] with target") as error:
            model.render(sources, target)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="a camera for each image"):
        model.render(Views(source.images[None], source.cameras), targets[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"images": torch.rand(3, 32, 40)}, "expected images"),
        ({"c2w": torch.eye(4)}, "expected c2w"),
        ({"K": torch.eye(4)}, "expected K"),
        ({"target_c2w": torch.full((4, 4), torch.nan)}, "not finite"),
        ({"near": 2.0, "far": 1.0}, "near"),
        ({"quality": "best"}, "quality"),
        ({"images": torch.rand(2, 3, 32, 40), "c2w": torch.eye(4).repeat(2, 1, 1), "K": torch.eye(3).repeat(3, 1, 1)},
         "expected K"),
        ({"images": torch.full((3, 3, 32, 40), torch.nan)}, "images hold numbers that are not finite"),
        ({"images": torch.full((3, 3, 32, 40), 255.0)}, "floats in \\[0, 1\\] or whole numbers"),
        ({"images": torch.full((3, 3, 32, 40), 1000)}, "got 1000 to 1000"),
        ({"far": float("inf")}, "both finite"),
        ({"near": float("nan")}, "both finite"),
        ({"size": (0, 10)}, "expected size as"),
        ({"size": (24.5, 16.0)}, "expected size as"),
        ({"size": (float("nan"), 16.0)}, "expected size as"),
        ({"size": 24}, "expected size as"),
        ({"size": (24, 16, 3)}, "expected size as"),
        ({"images": torch.ones(3, 3, 32, 40, dtype=torch.bool)}, "got booleans"),
        ({"near": [1.0, 1.0]}, "expected near as one number, or of shape \\[3\\]"),
        ({"far": torch.ones(3, 1)}, "expected far as one number"),
        ({"near": [1.0, 5.0, 1.0]}, "got near 5 and far 4"),
        ({"near": None}, "expected near and far as numbers"),
        ({"far": "4m"}, "expected near and far as numbers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(model, arrays, change, expected):
    with pytest.raises(InputError, match=expected) as error:
        idnerf.render(**{**arrays, **change}, model=model)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_refused_by_the_model(model, arrays):
    bounds = torch.tensor([1.0, 4.0])
    source = Cameras(arrays["c2w"], arrays["K"].expand(3, 3, 3), (40, 32), bounds[:1].expand(3), bounds[1:].expand(3))
    views = Views(arrays["images"], source)
    object.__setattr__(views, "images", (arrays["images"] * 255).byte())  # nothing checks types outside the tests
    unchecked = inspect.unwrap(IDNeRF.render)
    with pytest.raises(InputError, match=r"floats in \[0, 1\], got torch.uint8"):
        unchecked(model, views, source[0])


def test_overshoots_of_a_bicubic_filter_are_no_error(model, arrays):
    edge = torch.zeros(3, 3, 32, 40)
    edge[..., 20:] = 1
    blurred = torch.nn.functional.interpolate(edge, scale_factor=2, mode="bicubic")[..., ::2, ::2]
    assert blurred.min() < -0.03
    idnerf.render(**{**arrays, "images": blurred}, model=model)


def test_an_unknown_quality_is_refused_by_the_model_too(model, arrays):
    bounds = torch.tensor([1.0, 4.0])
    source = Cameras(arrays["c2w"], arrays["K"].expand(3, 3, 3), (40, 32), bounds[:1].expand(3), bounds[1:].expand(3))
    unchecked = inspect.unwrap(IDNeRF.render)  # as it is without the tests' type checks
    with pytest.raises(InputError, match="expected quality 'full' or 'fast', got 'Full'"):
        unchecked(model, Views(arrays["images"], source), source[0], quality="Full")
    features = model.encode(Views(arrays["images"], source)[None])
    with pytest.raises(InputError, match="expected quality 'full' or 'fast', got 'Full'"):
        inspect.unwrap(IDNeRF.render_target)(model, features, source[:1], quality="Full")
