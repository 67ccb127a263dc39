"""Views that another surface keeps from seeing a pixel: against a scene whose occlusion is known exactly."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from idnerf.geometry.cameras import crop
from idnerf.geometry.rays import pixel_centers
from idnerf.models.cascade import Cascade
from idnerf.models.fine_samples import FineOutput
from idnerf.models.occlusion import hidden_shares, nearest_in_cells, without_occluded
from idnerf.types import Cameras
from tiny_cases import TINY_CASCADE, plane_views, rotation, waken

SIZE = (96, 64)
NEAR, FAR, SCREEN, WALL = 2.0, 10.0, 2.5, 8.0
HALF_WIDTH, HALF_HEIGHT = 0.35, 0.25
"""Of a screen around the z axis, before a wall."""


def camera(
    x: float = 0.0, y: float = 0.0, pan: float = 0.0, size: tuple[int, int] = SIZE, zoom: float = 1.0
) -> Cameras:
    """At (x, y, 0), turned by ``pan`` radians from looking along z."""
    c2w = torch.eye(4)
    c2w[:3, :3] = rotation(0.0, pan)
    c2w[:2, 3] = torch.tensor([x, y])
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


def truly_hidden(target: Cameras, source: Cameras, screen: float = SCREEN) -> torch.Tensor:
    """Whether the screen lies between a source and what the target sees: by intersection."""
    origin = target.c2w[:3, 3]
    rays = directions(target)
    hits = on_screen(origin + screen * rays)
    wall = origin + WALL * rays
    center = source.c2w[:3, 3]
    return on_screen(center + (wall - center) * (screen / WALL)) & ~hits


@pytest.mark.parametrize("zoom", [0.7, 1.0, 2.0], ids=str)
@pytest.mark.parametrize(
    "other", [camera(0.3), camera(-0.25, 0.1), camera(0.1, -0.2, pan=0.1)], ids=["x", "xy", "turned"]
)
def test_what_lies_behind_a_screen_is_hidden(other, zoom):
    """Within a pixel and a half of its outline. ``zoom``: of the source, whose photo is as much larger."""
    size = (int(SIZE[0] * zoom), int(SIZE[1] * zoom))
    source = replace(other, K=other.K * torch.tensor([zoom, zoom, 1])[:, None], size=size)
    target = camera()
    found = hidden_shares(positions(target), sources(source), target[None], 0.03)[0, 0]
    exact = truly_hidden(target, source).float()
    assert exact.sum() > 50
    window = exact[None, None]
    always = -F.max_pool2d(-window, 5, 1, 2)[0, 0] > 0  # further than two pixels inside
    never = F.max_pool2d(window, 5, 1, 2)[0, 0] == 0
    inside_photo = torch.ones_like(always)
    inside_photo[:, :8] = inside_photo[:, -8:] = False  # what the source does not see is not judged
    assert found[always & inside_photo].min() == 1
    near_outline = F.max_pool2d((on_screen(SCREEN * directions(target))).float()[None, None], 7, 1, 3)[0, 0] > 0
    assert found[never & ~near_outline].max() == 0
    assert (found.round() != exact)[inside_photo].float().mean() < 0.03


def test_a_screen_that_is_hardly_nearer_hides_nothing():
    """Less than the tolerance: nothing; more than twice: all; between: a part."""
    target, aside = camera(), camera(1.5)
    for gap, expected in ((0.02, 0.0), (0.045, 0.5), (0.08, 1.0)):
        inverse = 1 / WALL + gap * (1 / NEAR - 1 / FAR)
        screen = 1 / inverse
        found = hidden_shares(positions(target, screen), sources(aside), target[None], 0.03)[0, 0]
        assert truly_hidden(target, aside, screen).any()
        torch.testing.assert_close(found.max(), torch.tensor(expected), atol=0.02, rtol=0)


@pytest.mark.parametrize("slope", [0.0, 0.5, -0.5])
def test_no_plane_hides_itself(slope):
    """Even or slanted, seen from anywhere, at any size."""
    target = camera()
    ramp = torch.linspace(-1, 1, SIZE[0]).expand(SIZE[1], -1)
    position = (0.5 + slope * ramp * 0.8)[None]
    views = sources(camera(0.3), camera(-0.3, 0.2, pan=-0.1), camera(zoom=0.6), camera(zoom=3.0))
    assert hidden_shares(position, views, target[None], 0.03).max() == 0


def test_the_target_s_own_camera_sees_all():
    target = camera()
    found = hidden_shares(positions(target), sources(camera(), camera(0.3)), target[None], 0.03)
    assert found[0, 0].max() == 0
    assert found[0, 1].max() == 1


def test_order_of_views_and_other_examples_do_not_matter():
    target = camera()
    views = sources(camera(0.3), camera(-0.3), camera(0.0, 0.2))
    found = hidden_shares(positions(target), views, target[None], 0.03)
    turned = hidden_shares(positions(target), views[:, [2, 0, 1]], target[None], 0.03)
    torch.testing.assert_close(turned, found[:, [2, 0, 1]])
    both = torch.cat([positions(target), positions(target) * 0 + 0.5])
    two = Cameras(
        *(torch.cat([x, x]) for x in (views.c2w, views.K)),
        views.size,
        views.near.expand(2, -1),
        views.far.expand(2, -1),
    )
    at_once = hidden_shares(both, two, target[None][[0, 0]], 0.03)
    torch.testing.assert_close(at_once[:1], found)
    assert at_once[1].max() == 0


def test_a_tile_knows_what_the_whole_knows():
    """As long as what hides lies in it."""
    target, source = camera(), sources(camera(0.3))
    whole = hidden_shares(positions(target), source, target[None], 0.03)[0, 0]
    x, y, width, height = 16, 8, 64, 48
    tile = hidden_shares(
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
    found = hidden_shares(positions(target), views, target[None], 0.03)
    assert torch.equal(found, torch.zeros_like(found))
    endless = replace(target, far=torch.tensor(torch.inf))[None]
    found = hidden_shares(torch.rand(1, SIZE[1], SIZE[0]), sources(camera(0.3)), endless, 0.03)
    assert torch.isfinite(found).all()


def test_no_number_is_no_surface():
    """A network that diverged must show in the picture, not in an index out of range."""
    target = camera()
    position = positions(target)
    position[0, 10, 10] = torch.nan
    hidden_shares(position, sources(camera(0.3)), target[None], 0.03)


def test_cells_hold_the_nearest_of_what_overlaps_them():
    cells = torch.tensor([[0.5, 0.5], [0.6, 0.4], [3.5, 1.5], [7.9, 3.9]])[None, None]
    closeness = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, None]
    seen = torch.ones(1, 1, 4, dtype=torch.bool)
    assert nearest_in_cells(cells, closeness, seen, (8, 4)).flatten().tolist() == [2, 2, 3, 4]
    seen[..., 1] = False
    assert nearest_in_cells(cells, closeness, seen, (8, 4)).flatten()[[0, 2, 3]].tolist() == [1, 3, 4]


def fine_output(target: Cameras, views: int) -> FineOutput:
    generator = torch.Generator().manual_seed(0)
    height, width = target.height, target.width
    shown = torch.rand(1, views, 8, height, width, generator=generator).contiguous(memory_format=torch.preserve_format)
    position = positions(target)
    return FineOutput(shown, torch.rand(1, 4, height, width), position, position * 0, position * 0 + 1)


def test_visibility_alone_is_changed_and_its_gradient_stops_there():
    target, source = camera(), sources(camera(0.3), camera(-0.3))
    hidden = hidden_shares(positions(target), source, target[None], 0.03)
    fine = fine_output(target, 2)
    with torch.no_grad():
        in_place = without_occluded(replace(fine, views=fine.views.clone()), source, target[None], 0.03)
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
        hidden = hidden_shares(fine.position, source, target, 0.03)[0]
        rgb = cascade.blending(without_occluded(fine, source, target, 0.03), source, target).rgb[0]
    only = (hidden[0] == 1) & (hidden[1] == 0)
    assert only.sum() > 50
    assert (rgb[0][only] < 0.02).all()
    neither = (hidden == 0).all(0)
    assert (rgb[0][neither] > 0.1).all()


def test_a_scene_without_occlusion_renders_as_without_the_test():
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
