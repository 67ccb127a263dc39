"""Views that another surface keeps from seeing a pixel: against a scene whose occlusion is known exactly."""

from dataclasses import replace
from math import cos, sin

import pytest
import torch
import torch.nn.functional as F

from idnerf.compiled import dispatch
from idnerf.geometry.cameras import crop
from idnerf.geometry.projection import project, visible
from idnerf.geometry.rays import pixel_centers
from idnerf.models.cascade import Cascade
from idnerf.models.fine_samples import FineOutput
from idnerf.models.occlusion import nearest_in_cells, occluded_shares, without_occluded
from idnerf.types import Cameras
from tiny_cases import TINY_CASCADE, plane_views, rotation, waken

SIZE = (96, 64)
NEAR, FAR, SCREEN, WALL = 2.0, 10.0, 2.5, 8.0
HALF_WIDTH, HALF_HEIGHT = 0.35, 0.25
"""Of a screen around the z axis, before a wall."""


@pytest.fixture(params=["PyTorch", "compiled"])
def either_way(request, monkeypatch):
    """Calls a function without or with the compiled kernels."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(dispatch, "available", lambda: False)
    return lambda function: function()


def camera(
    x: float = 0.0,
    y: float = 0.0,
    z: float = 0.0,
    pan: float = 0.0,
    roll: float = 0.0,
    size: tuple[int, int] = SIZE,
    zoom: float = 1.0,
) -> Cameras:
    """Turned by ``pan`` radians from looking along z, after ``roll`` about its axis."""
    c2w = torch.eye(4)
    about_axis = torch.tensor([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    c2w[:3, :3] = rotation(0.0, pan) @ about_axis
    c2w[:3, 3] = torch.tensor([x, y, z])
    focal = zoom * size[0]
    K = torch.tensor([[focal, 0, size[0] / 2], [0, 1.1 * focal, size[1] / 2], [0, 0, 1]])
    return Cameras(c2w, K, size, torch.tensor(NEAR), torch.tensor(FAR))


def sources(*cameras: Cameras) -> Cameras:
    """One batch of them."""
    c2w, K = (torch.stack([getattr(c, name) for c in cameras])[None] for name in ("c2w", "K"))
    bounds = torch.ones(1, len(cameras))
    return Cameras(c2w, K, cameras[0].size, bounds * NEAR, bounds * FAR)


def directions(target: Cameras) -> torch.Tensor:
    """[height width 3] of the pixels' rays, depth 1; the target looks along z."""
    pixels = F.pad(pixel_centers(target.size, target.device), (0, 1), value=1.0)
    return pixels @ torch.linalg.inv(target.K).T @ target.c2w[:3, :3].T


def on_screen(points: torch.Tensor) -> torch.Tensor:
    return (points[..., 0].abs() < HALF_WIDTH) & (points[..., 1].abs() < HALF_HEIGHT)


def positions(target: Cameras, screen: float = SCREEN) -> torch.Tensor:
    """Of the scene's surfaces along the target's rays, in [0, 1] of inverse depth: [1 height width]."""
    hits = on_screen(target.c2w[:3, 3] + screen * directions(target))
    depth = torch.where(hits, screen, WALL)
    return ((1 / depth - 1 / NEAR) / (1 / FAR - 1 / NEAR))[None]


def truly_occluded(target: Cameras, source: Cameras, screen: float = SCREEN) -> torch.Tensor:
    """Whether the screen lies between a source and what the target sees: by intersection."""
    origin = target.c2w[:3, 3]
    rays = directions(target)
    hits = on_screen(origin + screen * rays)
    wall = origin + WALL * rays
    center = source.c2w[:3, 3]
    share = (screen - center[2]) / (WALL - center[2])
    return on_screen(center + (wall - center) * share) & ~hits


OTHERS = {
    "aside": camera(0.3),
    "above": camera(-0.25, 0.1),
    "turned": camera(0.1, -0.2, pan=0.1),
    "rolled": camera(0.25, 0.1, roll=0.7),
    "ahead": camera(0.2, z=1.3),
    "behind": camera(2.0, 0.3, z=-4.0),
}


def photographed_at(other: Cameras, scale: float) -> Cameras:
    """The same camera with a photo so much larger."""
    size = (int(other.width * scale), int(other.height * scale))
    return replace(other, K=other.K * torch.tensor([scale, scale, 1])[:, None], size=size)


@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0], ids=str)
@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_what_lies_behind_a_screen_is_occluded(other, scale, either_way):
    """But for what lies within two pixels of the outlines. ``scale``: of the source's photo."""
    target, source = camera(size=(192, 128)), photographed_at(other, 2 * scale)
    found = either_way(lambda: occluded_shares(positions(target), sources(source), target[None], 0.03)[0, 0])
    exact = truly_occluded(target, source).float()[None, None]
    wall = target.c2w[:3, 3] + WALL * directions(target)
    judged = visible(*project(wall.flatten(0, 1), source), source.size).unflatten(0, exact.shape[-2:])
    inside = (-F.max_pool2d(-exact, 5, 1, 2)[0, 0] > 0) & judged
    outside = (F.max_pool2d(exact, 5, 1, 2)[0, 0] == 0) & judged
    on_outline = F.max_pool2d(on_screen(SCREEN * directions(target)).float()[None, None], 5, 1, 2)[0, 0] > 0
    assert inside.sum() > 50
    assert found[inside].min() == 1
    assert found[outside & ~on_outline].max() == 0


def test_the_share_is_of_inverse_depth_in_the_view(either_way):
    """None below the tolerance, all from twice as much on, linear between; more is allowed where a view is nearer."""
    tolerance = 0.03
    for aside, screen in (
        (camera(1.5), 7.0),
        (camera(1.5), 5.0),
        (camera(1.0, z=4.0), 7.0),
        (camera(1.5, z=-3.0), 6.2),
    ):
        target = camera()
        shift = float(aside.c2w[2, 3])
        nearer = 1 / (screen - shift) - 1 / (WALL - shift)
        allowed = tolerance * (1 / NEAR - 1 / FAR) * max(1, (WALL / (WALL - shift)) ** 2)
        expected = min(max(nearer / allowed - 1, 0), 1)
        assert truly_occluded(target, aside, screen).any()
        position = positions(target, screen)
        found = either_way(lambda p=position, a=aside, t=target: occluded_shares(p, sources(a), t[None], tolerance))
        assert float(found.max()) == pytest.approx(expected, abs=1e-3), (screen, shift)


@pytest.mark.parametrize("slope", [0.0, 0.5, -0.5])
def test_no_plane_occludes_itself(slope):
    """Even or slanted, seen from aside, turned, from nearer or further away."""
    target = camera()
    ramp = torch.linspace(-1, 1, SIZE[0]).expand(SIZE[1], -1)
    position = (0.5 + slope * ramp * 0.8)[None]
    views = (camera(0.3), camera(-0.3, 0.2, pan=-0.1), camera(zoom=0.6), camera(zoom=3.0), camera(z=0.5), camera(z=-3))
    views = sources(*views)
    assert occluded_shares(position, views, target[None], 0.03).max() == 0


def test_the_target_s_own_camera_sees_all():
    target = camera()
    found = occluded_shares(positions(target), sources(camera(), camera(0.3)), target[None], 0.03)
    assert found[0, 0].max() == 0
    assert found[0, 1].max() == 1


def test_order_of_views_and_other_examples_do_not_matter():
    target = camera()
    views = sources(camera(0.3), camera(-0.3), camera(0.0, 0.2))
    found = occluded_shares(positions(target), views, target[None], 0.03)
    turned = occluded_shares(positions(target), views[:, [2, 0, 1]], target[None], 0.03)
    torch.testing.assert_close(turned, found[:, [2, 0, 1]])
    both = torch.cat([positions(target), positions(target) * 0 + 0.5])
    two = Cameras(
        *(torch.cat([x, x]) for x in (views.c2w, views.K)),
        views.size,
        views.near.expand(2, -1),
        views.far.expand(2, -1),
    )
    at_once = occluded_shares(both, two, target[None][[0, 0]], 0.03)
    torch.testing.assert_close(at_once[:1], found)
    assert at_once[1].max() == 0


def test_a_tile_knows_what_the_whole_knows():
    """As long as what hides lies in it."""
    target, source = camera(), sources(camera(0.3))
    whole = occluded_shares(positions(target), source, target[None], 0.03)[0, 0]
    x, y, width, height = 16, 8, 64, 48
    tile = occluded_shares(
        positions(target)[:, y : y + height, x : x + width], source, crop(target[None], x, y, (width, height)), 0.03
    )[0, 0]
    assert whole.sum() > 50
    # buffers begin elsewhere, by less than a cell
    assert (tile != whole[y : y + height, x : x + width]).float().mean() < 0.01


def test_what_a_view_does_not_see_hides_nothing_and_stays_finite():
    """Surfaces behind the source, beside its photo, at infinity."""
    target = camera()
    behind = camera()
    behind.c2w[2, 3] = 5.0  # between screen and wall
    away = camera(0.3, pan=3.0)
    views = sources(behind, away)
    found = occluded_shares(positions(target), views, target[None], 0.03)
    assert torch.equal(found, torch.zeros_like(found))
    endless = replace(target, far=torch.tensor(torch.inf))[None]
    found = occluded_shares(torch.rand(1, SIZE[1], SIZE[0]), sources(camera(0.3)), endless, 0.03)
    assert torch.isfinite(found).all()


def test_no_number_is_no_surface(either_way):
    """Where a network gives none, other pixels are judged as before."""
    target, source = camera(), sources(camera(0.3))
    position = positions(target)
    clean = either_way(lambda: occluded_shares(position, source, target[None], 0.03))
    position[0, 3, 3] = torch.nan  # on the wall
    found = either_way(lambda: occluded_shares(position, source, target[None], 0.03))
    found[..., 3, 3] = clean[..., 3, 3]
    assert torch.equal(found, clean)


@pytest.mark.parametrize(
    ("box", "roll"),
    [((100, 52, 40, 24), 0.0), ((40, 52, 112, 24), 1.5), ((84, 20, 48, 48), 0.8), ((84, 20, 48, 48), -0.8)],
    ids=["far from the corner", "on its side", "turned", "turned back"],
)
def test_a_tile_of_a_large_target(box, roll, either_way):
    """Its depth buffer begins where it lies in the photo, and holds it turned too."""
    x, y, width, height = box
    rows, columns = slice(y, y + height), slice(x, x + width)
    target, other = camera(size=(192, 128)), camera(-0.3, roll=roll, size=(768, 512))
    exact = truly_occluded(target, other)[rows, columns].float()[None, None]
    inside = -F.max_pool2d(-exact, 5, 1, 2)[0, 0] > 0
    inside[:, : 123 - x + 6] = False  # what hides these lies before the tile
    assert inside.sum() > 50
    position = positions(target)[:, rows, columns]
    found = either_way(lambda: occluded_shares(position, sources(other), crop(target[None], *box[:2], box[2:]), 0.03))
    assert found[0, 0][inside].min() == 1


def test_a_view_that_stands_right_before_what_it_sees(either_way):
    """A target's pixel is many of its cells wide, unless they are as wide as that."""
    target, near_by = camera(size=(192, 128)), camera(0.05, z=6.5, size=(192, 128))
    exact = truly_occluded(target, near_by, 7.2).float()[None, None]
    inside = -F.max_pool2d(-exact, 5, 1, 2)[0, 0] > 0
    assert inside.sum() > 50
    found = either_way(lambda: occluded_shares(positions(target, 7.2), sources(near_by), target[None], 0.03)[0, 0])
    assert found[inside].min() == 1


@pytest.mark.parametrize("side", [64, 256])
def test_the_last_number_before_the_end_is_in_the_last_cell(side):
    """It may round up to the end, and one cell more with the radius."""
    last = torch.nextafter(torch.tensor(float(side)), torch.tensor(0.0))
    cells = torch.stack([torch.tensor([0.5, 0.5]), last.expand(2)])[None]
    found = nearest_in_cells(cells, torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.ones(1, 2).bool(), side)
    assert found.tolist() == [[1, 2]]


def test_cells_hold_the_nearest_of_what_reaches_them():
    cells = torch.tensor([[0.5, 0.5], [0.6, 0.4], [3.9, 1.5], [4.2, 1.5], [7.9, 7.9]])[None]
    inverse_depth = torch.tensor([1.0, 2.0, 3.0, 2.5, 4.0])[None]
    near, far = torch.full((1, 5), 0.05), torch.full((1, 5), 0.25)
    inside = torch.ones(1, 5, dtype=torch.bool)
    assert nearest_in_cells(cells, inverse_depth, near, inside, 8).flatten().tolist() == [2, 2, 3, 2.5, 4]
    assert nearest_in_cells(cells, inverse_depth, far, inside, 8).flatten().tolist() == [2, 2, 3, 3, 4]
    inside[..., 1] = False
    assert nearest_in_cells(cells, inverse_depth, near, inside, 8).flatten()[[0, 2, 4]].tolist() == [1, 3, 4]


def fine_output(target: Cameras, views: int) -> FineOutput:
    generator = torch.Generator().manual_seed(0)
    height, width = target.height, target.width
    shown = torch.rand(1, views, height, width, 8, generator=generator).movedim(-1, 2)  # channels last, as it comes
    position = positions(target)
    return FineOutput(shown, torch.rand(1, 4, height, width), position, position * 0, position * 0 + 1)


def test_visibility_alone_is_changed_and_its_gradient_stops_there():
    target, source = camera(), sources(camera(0.3), camera(-0.3))
    hidden = occluded_shares(positions(target), source, target[None], 0.03)
    fine = fine_output(target, 2)
    with torch.no_grad():
        given = replace(fine, views=fine.views.clone())
        in_place = without_occluded(given, source, target[None], 0.03)
    assert in_place.views.data_ptr() == given.views.data_ptr()
    variable = fine.views.clone().requires_grad_()
    position = fine.position.clone().requires_grad_()
    apart = without_occluded(replace(fine, views=variable, position=position), source, target[None], 0.03)
    torch.testing.assert_close(apart.views, in_place.views, rtol=0, atol=0)
    assert torch.equal(apart.views[:, :, :-1], fine.views[:, :, :-1])
    torch.testing.assert_close(apart.visibility, fine.visibility * (1 - hidden))
    apart.views.sum().backward()
    assert position.grad is None
    assert variable.grad is not None
    torch.testing.assert_close(variable.grad[:, :, -1], 1 - hidden)
    assert torch.equal(variable.grad[:, :, :-1], torch.ones_like(variable.grad[:, :, :-1]))


def test_the_cascade_blends_without_hidden_views():
    """Every view shows another colour; where one is hidden, its colour has next to no share."""
    torch.manual_seed(0)
    target, source = camera()[None], sources(camera(0.3), camera(-0.3))
    cascade = Cascade(TINY_CASCADE).eval()
    with torch.no_grad():
        fine = fine_output(target[0], 2)
        width = TINY_CASCADE.fine_channels + 4
        views = torch.zeros(1, 2, width, SIZE[1], SIZE[0])
        views[:, 0, -4], views[:, 1, -3], views[:, :, -1] = 1.0, 1.0, 1.0  # red, green, visible
        tokens = torch.zeros(1, TINY_CASCADE.token_width, SIZE[1], SIZE[0])
        fine = replace(fine, views=views, tokens=tokens)
        hidden = occluded_shares(fine.position, source, target, 0.03)[0]
        rgb = cascade.blending(without_occluded(fine, source, target, 0.03), source, target).rgb[0]
    only = (hidden[0] == 1) & (hidden[1] == 0)
    assert only.sum() > 50
    assert (rgb[0][only] < 0.02).all()
    neither = (hidden == 0).all(0)
    assert (rgb[0][neither] > 0.1).all()


def test_the_option_reaches_the_picture_but_not_depth():
    torch.manual_seed(0)
    plain = waken(Cascade(TINY_CASCADE)).eval()
    tested = Cascade(replace(TINY_CASCADE, occlusion_tolerance=1.0)).eval()
    tested.load_state_dict(plain.state_dict())
    strict = Cascade(replace(TINY_CASCADE, occlusion_tolerance=0.001)).eval()
    strict.load_state_dict(plain.state_dict())
    views, tile = plane_views(3, (64, 48))[None], plane_views(4, (64, 48)).cameras[3:]
    with torch.no_grad():
        pictures = [model(model.encode(views), tile).render for model in (plain, tested, strict)]
    for name in ("rgb", "depth", "opacity", "confidence"):
        assert torch.equal(getattr(pictures[0], name), getattr(pictures[1], name)), name
    assert torch.equal(pictures[0].depth, pictures[2].depth)
    assert (pictures[0].rgb - pictures[2].rgb).abs().max() > 1e-3  # a network that was never trained finds no plane
