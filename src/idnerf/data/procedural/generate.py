"""From a seed to a rendered scene."""

import random
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.procedural.builder import random_rotation
from idnerf.data.procedural.camera_effects import composite, compress, develop, photograph
from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.layout import World, draw_world
from idnerf.data.procedural.raster import (
    Hits,
    Pinhole,
    canonical_frames,
    find_candidates,
    first_hits,
    near_edges,
    select,
)
from idnerf.data.procedural.rigs import draw_rig, loguniform
from idnerf.data.procedural.shading import ShadowMap, shade
from idnerf.types import Cameras, Views

NEAREST = 0.01
"""Near is at least about this share of a view's median depth, whatever reaches the camera."""
OPEN_SKY = 1000.0
"""Depth, in medians, of a ray that leaves the scene."""


def to_device(world: World, device: torch.device | str) -> World:
    """The world's tables on another device (they are always drawn on the CPU: scenes do not depend on it)."""
    look = world.appearance
    lights = tuple(replace(x, position=x.position.to(device), colour=x.colour.to(device)) for x in look.lights)
    appearance = replace(
        look,
        atlas=look.atlas.to(device),
        materials=look.materials.to(device),
        lights=lights,
        ambient=look.ambient.to(device),
        reliefs=look.reliefs.to(device),
    )
    shadow = tuple(move_camera(c, device) for c in world.shadow_cameras)
    sky = tuple(move_camera(c, device) for c in world.sky_cameras)
    return replace(
        world,
        primitives=world.primitives.to(device),
        appearance=appearance,
        outlines=world.outlines.to(device),
        shadow_cameras=shadow,
        sky_cameras=sky,
    )


def move_camera(camera: Pinhole, device: torch.device | str) -> Pinhole:
    return Pinhole(camera.c2w.to(device), camera.K.to(device), camera.size)


def cast_shadows(world: World) -> World:
    """Render the depth maps of the lights and of the sky (the enclosure casts no shadow)."""
    inside = replace(world, primitives=without_room(world))
    maps = [shadow_map(inside, camera) for camera in world.shadow_cameras]
    lights = tuple(replace(x, shadow=m) for x, m in zip(world.appearance.lights, maps, strict=True))
    sky = tuple(shadow_map(inside, camera) for camera in world.sky_cameras)
    return replace(world, appearance=replace(world.appearance, lights=lights, sky=sky))


def shadow_map(world: World, camera: Pinhole) -> ShadowMap:
    """Depth of the first surface that each pixel of a light's camera sees."""
    frames = canonical_frames(world.primitives, camera)
    candidates = find_candidates(world.primitives, camera)
    maps = (world.outlines, world.appearance.reliefs)
    depth, _ = first_hits(world.primitives, frames, candidates, camera.size, (0.5, 0.5), *maps)
    return ShadowMap(camera, depth.reshape(camera.size[1], camera.size[0]))


def without_room(world: World):
    """The primitives except the enclosure, which is the last one."""
    p = world.primitives
    keep = len(p) - 1
    return replace(
        p,
        kind=p.kind[:keep],
        center=p.center[: 2 * keep],
        rotation=p.rotation[: 2 * keep],
        half=p.half[: 2 * keep],
        shape=p.shape[: 2 * keep],
        material=p.material[: 2 * keep],
        per_face=p.per_face[: 2 * keep],
    )


def render_view(
    world: World, camera: Pinhole, supersample: int
) -> tuple[Float[Tensor, "3 height width"], Float[Tensor, "height width"], Float[Tensor, "height width"]]:
    """Radiance (``tone``), exact depth and coverage of one view.

    One ray per pixel centre gives the depth, and the colour of smooth regions (textures are band-limited by
    their mip pyramid); pixels near an edge take the mean of supersample^2 rays instead.

    Where the world has a backdrop, the colour is that of the share ``coverage`` of the pixel that is not
    the enclosure; else coverage is 1.
    """
    width, height = camera.size
    primitives, maps = world.primitives, (world.outlines, world.appearance.reliefs)
    frames = canonical_frames(primitives, camera)
    candidates = find_candidates(primitives, camera)
    depth, surface = first_hits(primitives, frames, candidates, camera.size, (0.5, 0.5), *maps)
    edge = near_edges(depth.reshape(height, width), surface.reshape(height, width)).reshape(-1)
    if supersample == 1:
        edge = torch.zeros_like(edge)
    smooth = (~edge).nonzero()[:, 0]
    passes = [pass_hits(smooth, width, (0.5, 0.5), depth, surface)]
    if edge.any():
        inner = [select(some, edge) for some in candidates]
        pixels = edge.nonzero()[:, 0]
        for offset in rotated_grid(supersample):
            found = first_hits(primitives, frames, inner, camera.size, offset, *maps)
            passes.append(pass_hits(pixels, width, offset, *found))
    hits = Hits(*(torch.cat([getattr(p, name) for p in passes]) for name in ("pixel", "u", "v", "depth", "surface")))
    rays = torch.bincount(hits.pixel, minlength=width * height).clamp_min(1)
    if world.backdrop is not None:
        solid = (hits.surface < 2 * (len(primitives) - 1)).nonzero()[:, 0]  # the enclosure comes last
        hits = Hits(*(getattr(hits, name)[solid] for name in ("pixel", "u", "v", "depth", "surface")))
    colour = shade(primitives, world.appearance, camera, hits)
    total = torch.zeros(width * height, 3, device=colour.device).index_add_(0, hits.pixel, tone(colour))
    count = torch.bincount(hits.pixel, minlength=width * height)
    image = (total / count.clamp_min(1)[:, None]).T.reshape(3, height, width)
    coverage = torch.ones_like(depth) if world.backdrop is None else count / rays
    return image, depth.reshape(height, width), coverage.reshape(height, width)


def rotated_grid(n: int) -> list[tuple[float, float]]:
    """n^2 positions in the unit square, no two in one row or column: edges of any slope get n^2 shades."""
    steps = [(i, j) for j in range(n) for i in range(n)]
    return [((i + (j + 0.5) / n) / n, (j + (n - i - 0.5) / n) / n) for i, j in steps]


def pass_hits(pixels: Tensor, width: int, offset: tuple[float, float], depth: Tensor, surface: Tensor) -> Hits:
    """The hits of one ray per pixel of ``pixels``."""
    pixels = pixels[surface[pixels] >= 0]
    u = (pixels % width).float() + offset[0]
    v = torch.div(pixels, width, rounding_mode="floor").float() + offset[1]
    return Hits(pixels, u, v, depth[pixels], surface[pixels])


def tone(radiance: Tensor) -> Tensor:
    """Compress highlights (extended Reinhard curve) before averaging, so that edges do not sparkle."""
    return radiance * (1 + radiance / 9) / (1 + radiance)


def depth_ranges(
    depth: Float[Tensor, "view height width"], content_far: float, rng: random.Random
) -> tuple[Float[Tensor, "view"], Float[Tensor, "view"]]:
    """Near and far: each view's own range with random slack, or one for all (0.8 min, 1.2 max: LLFF).

    Seven times in ten the range ends with the content (``content_far``): the sky or backdrop behind is then
    beyond far, as it is where ranges come from reconstructed points. A thing that reaches the camera does not pull
    near below a hundredth of the median depth.
    """
    flat = depth.flatten(1)
    low, high = torch.maximum(flat.amin(1), NEAREST * flat.median(1).values), flat.amax(1)
    if rng.random() < 0.7:
        high = high.clamp_max(content_far)
        low = torch.minimum(low, 0.7 * high)
    if rng.random() < 0.3:
        return 0.8 * low.min().expand(len(low)).clone(), 1.2 * high.max().expand(len(high)).clone()
    return low * loguniform(rng, 0.5, 0.98), high * loguniform(rng, 1.02, 1.8)


def end_rays(depth: Float[Tensor, "view height width"]) -> Float[Tensor, "view height width"]:
    """Depth of pixels whose ray leaves the scene (infinite): far behind everything, but a number."""
    hit = torch.isfinite(depth)
    typical = depth[hit].median() if hit.any() else depth.new_tensor(1.0)
    return torch.where(hit, depth, OPEN_SKY * typical)


@torch.no_grad()
def generate_scene(seed: int, config: ProceduralConfig, device: torch.device | str = "cpu") -> ProceduralScene:
    """Draw and render scene number ``seed``; the same (seed, config) gives the same scene.

    Cameras and depth are in the scene's own random scale (0.1 to 100 units to the nearest things) and
    orientation.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    complexity = rng.uniform(*config.complexity)
    rig = draw_rig(config.rig, config.size, config.num_views, rng)
    # drawn only where wanted, so that scenes without interiors are those that they were before there were any
    interior = config.interiors > 0 and rng.random() < config.interiors
    world = cast_shadows(to_device(draw_world(rig, complexity, rng, generator, interior), device))
    rendered = [render_view(world, move_camera(c, device), config.supersample) for c in rig.cameras]
    radiance, depth, coverage = (torch.stack(images) for images in zip(*rendered, strict=True))
    images = develop(radiance, coverage, rng)
    if config.photo > 0:
        # A cut-out rendering has a perfectly even backdrop: only compression comes after it.
        images = photograph(images, config.photo, rng, generator)
    if world.backdrop is not None:
        images = composite(images, coverage, world.backdrop)
    if config.photo > 0:
        images = compress(images, config.photo, rng)
    scale = loguniform(rng, 0.1, 100.0)
    depth = end_rays(depth) * scale
    near, far = depth_ranges(depth, world.content_far * scale, rng)
    c2w = torch.stack([c.c2w for c in rig.cameras])
    turn = torch.eye(4)
    turn[:3, :3] = torch.tensor(random_rotation(rng), dtype=torch.float32)
    c2w[:, :3, 3] *= scale
    cameras = Cameras(
        (turn @ c2w).to(device), torch.stack([c.K for c in rig.cameras]).to(device), config.size, near, far
    )
    return ProceduralScene(Views(images, cameras), depth, f"procedural-{rig.kind}-{seed:06d}")
