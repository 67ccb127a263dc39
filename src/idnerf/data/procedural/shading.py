"""From hits to colour: textures, bump, lights with shadows, gloss."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from idnerf.data.procedural.atlas import Atlas, sample_atlas
from idnerf.data.procedural.primitives import (
    RELIEF,
    SHEET,
    Primitives,
    dominant_axis,
    length,
    surface_gradient,
    unit,
)
from idnerf.data.procedural.raster import Hits, Pinhole
from idnerf.geometry.cameras import invert_rigid

MATERIAL_FIELDS = (
    "texture", "detail", "scale", "detail_scale", "detail_strength", "cos", "sin", "offset_u", "offset_v",
    "red", "green", "blue", "gloss", "shininess", "bump", "emission", "unit_uv", "translucency", "mirror",
)  # fmt: skip
"""Columns of the material table.

texture, detail: atlas indices; scale, detail_scale: tiles per scene unit; detail_strength: how far the second
texture modulates the first; cos, sin, offset_u, offset_v: rotation and shift of the texture; red, green,
blue: tint; gloss, shininess: Blinn-Phong; bump: slope of the relief; emission: share of light of its own
(backdrops); unit_uv: 1 maps the texture once over a sheet; translucency: share of light that comes through
from behind; mirror: share of the surroundings that is reflected.
"""
COLUMN = {name: i for i, name in enumerate(MATERIAL_FIELDS)}


@dataclass(frozen=True)
class ShadowMap:
    """Depth as a light sees it."""

    camera: Pinhole
    depth: Float[Tensor, "height width"]


@dataclass(frozen=True)
class Light:
    """A point light (far away: a directional one); ``colour``: its irradiance at the scene's middle."""

    position: Float[Tensor, "3"]
    colour: Float[Tensor, "3"]
    falloff_distance: float
    shadow: ShadowMap | None


@dataclass(frozen=True)
class Appearance:
    """All that shading needs beside the shapes.

    Attributes:
        ambient: (constant; gradient along x, y, z) of the ambient light as a function of the normal.
        sky: depth maps from several sides; a point hidden from them gets less ambient light.
        environment: atlas index of the texture that stands for the surroundings in reflections.
    """

    atlas: Atlas
    materials: Float[Tensor, "material field"]
    lights: tuple[Light, ...]
    ambient: Float[Tensor, "4 3"]
    sky: tuple[ShadowMap, ...]
    reliefs: Float[Tensor, "relief size size"]
    environment: int = 0


def shade(
    primitives: Primitives, appearance: Appearance, camera: Pinhole, hits: Hits, chunk: int = 65536
) -> Float[Tensor, "hit 3"]:
    """Linear radiance of every hit."""
    colours = []
    for start in range(0, len(hits.pixel), chunk):
        part = slice(start, start + chunk)
        some = Hits(hits.pixel[part], hits.u[part], hits.v[part], hits.depth[part], hits.surface[part])
        colours.append(shade_chunk(primitives, appearance, camera, some))
    return torch.cat(colours) if colours else hits.u.new_zeros(0, 3)


def shade_chunk(primitives: Primitives, appearance: Appearance, camera: Pinhole, hits: Hits) -> Float[Tensor, "hit 3"]:
    fx, fy, cx, cy = camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]
    in_camera = torch.stack([(hits.u - cx) / fx, (hits.v - cy) / fy, torch.ones_like(hits.u)])
    directions = camera.c2w[:3, :3] @ in_camera
    points = camera.c2w[:3, 3:] + directions * hits.depth
    to_viewer = -directions / length(directions)

    kind = primitives.kind[hits.surface // 2]
    rotation = primitives.rotation.reshape(-1, 9).T[:, hits.surface]
    half = primitives.half.T[:, hits.surface]
    shape = primitives.shape.T[:, hits.surface]
    offset = points - primitives.center.T[:, hits.surface]
    axes = rotation.reshape(3, 3, -1)
    local = (axes * offset[:, None]).sum(0)
    canonical = local / half
    gradient, face = surface_gradient(primitives, kind, shape, canonical, appearance.reliefs)
    local_normal = unit(gradient / half)
    material_index = primitives.material[hits.surface] + face * primitives.per_face[hits.surface]
    material = appearance.materials.T[:, material_index]

    u, v, tangent_u, tangent_v = texture_coordinates(local, canonical, local_normal, kind, material, axes)
    normals = (axes * local_normal).sum(1)
    facing = (normals * to_viewer).sum(0)
    side = torch.where(facing >= 0, 1.0, -1.0)
    normals, facing = normals * side, facing.abs()
    # Width of a pixel on the surface, between its short and its long side.
    footprint = hits.depth / fx * facing.clamp_min(0.08) ** -0.65
    albedo, slopes = surface_colour(appearance.atlas, material, u, v, footprint)
    bump = material[COLUMN["bump"]]
    bumped = unit(normals - bump * side * (slopes[0] * tangent_u + slopes[1] * tangent_v))
    return light_surface(appearance, points, normals, bumped, to_viewer, albedo, material, kind, footprint).T


def texture_coordinates(
    local: Float[Tensor, "3 hit"],
    canonical: Float[Tensor, "3 hit"],
    normal: Float[Tensor, "3 hit"],
    kind: Int[Tensor, "hit"],
    material: Float[Tensor, "field hit"],
    axes: Float[Tensor, "3 3 hit"],
) -> tuple[
    Float[Tensor, "hit"], Float[Tensor, "hit"], Float[Tensor, "3 hit"], Float[Tensor, "3 hit"]
]:  # fmt: skip
    """Tiles (u, v), projected along the dominant axis of the normal, and the world directions of u and v."""
    axis = dominant_axis(normal)
    # Height fields are textured from above whatever their slope, but for their sides; so are sheets.
    from_above = (kind == SHEET) | ((kind == RELIEF) & (normal[2] != 0))
    axis = torch.where(from_above, 2, axis)
    first, second = torch.where(axis == 0, 1, 0), torch.where(axis == 2, 1, 2)
    p, q = local.gather(0, first[None])[0], local.gather(0, second[None])[0]
    cos, sin, scale = material[COLUMN["cos"]], material[COLUMN["sin"]], material[COLUMN["scale"]]
    u = (cos * p + sin * q) * scale + material[COLUMN["offset_u"]]
    v = (cos * q - sin * p) * scale + material[COLUMN["offset_v"]]
    whole = (material[COLUMN["unit_uv"]] > 0) & (kind == SHEET)
    u = torch.where(whole, 0.5 * canonical[0] + 0.5, u)
    v = torch.where(whole, 0.5 * canonical[1] + 0.5, v)
    along_p = axes.gather(1, first[None, None].expand(3, 1, -1))[:, 0]
    along_q = axes.gather(1, second[None, None].expand(3, 1, -1))[:, 0]
    cos, sin = torch.where(whole, 1.0, cos), torch.where(whole, 0.0, sin)
    return u, v, cos * along_p + sin * along_q, cos * along_q - sin * along_p


def surface_colour(
    atlas: Atlas,
    material: Float[Tensor, "field hit"],
    u: Float[Tensor, "hit"],
    v: Float[Tensor, "hit"],
    footprint: Float[Tensor, "hit"],
) -> tuple[Float[Tensor, "3 hit"], Float[Tensor, "2 hit"]]:
    """Albedo and surface slopes: a texture, modulated by a second one at another scale."""
    scale = material[COLUMN["scale"]]
    # Texels as wide as the pixel's footprint: no aliasing, as sharp as a photo resized to this size.
    level = torch.log2(footprint * scale * atlas.size)
    texels = sample_atlas(atlas, material[COLUMN["texture"]].int(), u, v, level)
    ratio = material[COLUMN["detail_scale"]]
    detail_level = level + torch.log2(ratio)
    detail = sample_atlas(atlas, material[COLUMN["detail"]].int(), u * ratio + 0.37, v * ratio + 0.11, detail_level)
    strength = material[COLUMN["detail_strength"]]
    grey = detail[:, :3].mean(-1)
    albedo = texels[:, :3].T * (1 + strength * (2.5 * grey - 0.6)).clamp(0.15, 2.5)
    tint = torch.stack([material[COLUMN[name]] for name in ("red", "green", "blue")])
    slopes = texels[:, 3:5].T + strength * detail[:, 3:5].T
    return (albedo * tint).clamp(0.005, 0.98), slopes


def light_surface(
    appearance: Appearance,
    points: Float[Tensor, "3 hit"],
    normals: Float[Tensor, "3 hit"],
    bumped: Float[Tensor, "3 hit"],
    to_viewer: Float[Tensor, "3 hit"],
    albedo: Float[Tensor, "3 hit"],
    material: Float[Tensor, "field hit"],
    kind: Int[Tensor, "hit"],
    footprint: Float[Tensor, "hit"],
) -> Float[Tensor, "3 hit"]:
    """Ambient + Lambert + Blinn-Phong, with Schlick's Fresnel term on the gloss."""
    ambient = appearance.ambient
    open_sky = torch.ones_like(footprint)
    if appearance.sky:
        views = [lit_fraction(view, points, normals) for view in appearance.sky]
        open_sky = 0.2 + 0.8 * torch.stack(views).mean(0)
    irradiance = (ambient[0][:, None] + ambient[1:].T @ bumped).clamp_min(0.0) * open_sky
    gloss, shininess = material[COLUMN["gloss"]], material[COLUMN["shininess"]]
    emission, translucency = material[COLUMN["emission"]], material[COLUMN["translucency"]]
    cosine = (bumped * to_viewer).sum(0).clamp(0, 1)
    mirrored = 2 * cosine * bumped - to_viewer
    surroundings = (ambient[0][:, None] + 2.5 * ambient[1:].T @ mirrored).clamp_min(0.0)
    highlight = surroundings * (gloss * open_sky * (0.3 + 2.0 * (1 - cosine) ** 5))
    highlight = highlight + reflection(appearance, mirrored, cosine, material[COLUMN["mirror"]] * open_sky)
    thin = kind == SHEET
    for light in appearance.lights:
        offset = light.position[:, None] - points
        distance = length(offset)
        to_light = offset / distance
        cosine = (bumped * to_light).sum(0)
        received = cosine.clamp_min(0) + translucency * (-cosine).clamp_min(0)
        # Thin sheets are lit from both sides: their shadow test leaves on the light's side.
        toward = torch.where(thin & (cosine < 0), -1.0, 1.0) * normals
        strength = (light.falloff_distance / distance.clamp_min(0.3 * light.falloff_distance)) ** 2
        if light.shadow is not None:
            strength = strength * lit_fraction(light.shadow, points, toward)
        received = received * strength
        halfway = unit(to_light + to_viewer)
        lobe = (bumped * halfway).sum(0).clamp_min(0) ** shininess * (shininess + 8) / (8 * math.pi)
        fresnel = 0.25 + 0.75 * (1 - (halfway * to_viewer).sum(0).clamp(0, 1)) ** 5
        irradiance = irradiance + light.colour[:, None] * received
        highlight = highlight + light.colour[:, None] * (gloss * lobe * fresnel * strength * (cosine > 0))
    return albedo * (emission + (1 - emission) * irradiance) + highlight


REFLECTION_LEVEL = 2.5
"""Mip level at which reflections look the surroundings up: coarse, so that small curved things do not sparkle."""


def reflection(
    appearance: Appearance,
    mirrored: Float[Tensor, "3 hit"],
    cosine: Float[Tensor, "hit"],
    strength: Float[Tensor, "hit"],
) -> Float[Tensor, "3 hit"]:
    """Light from the surroundings by mirrored direction, as if infinitely far away; more at grazing angles."""
    result = torch.zeros_like(mirrored)
    index = (strength > 0).nonzero()[:, 0]
    if len(index) == 0:
        return result
    x, y, z = mirrored[:, index].unbind(0)
    u, v = torch.atan2(x, z) / (2 * math.pi), 0.5 * y
    texture = torch.full_like(index, appearance.environment)
    colour = sample_atlas(appearance.atlas, texture, u, v, torch.full_like(u, REFLECTION_LEVEL))[:, :3].T
    bright = appearance.ambient[0][:, None] * (1.5 - 1.5 * y)  # up is -y: more light from above
    fresnel = strength[index] * (0.2 + 0.8 * (1 - cosine[index]) ** 5)
    return result.index_copy(1, index, 2.0 * colour * bright * fresnel)


def lit_fraction(
    shadow: ShadowMap, points: Float[Tensor, "3 hit"], normals: Float[Tensor, "3 hit"]
) -> Float[Tensor, "hit"]:
    """Share of the light that reaches each point: percentage-closer filtering (Reeves 1987).

    A world point gets the same answer in every view. Points outside the map are lit.
    """
    camera = shadow.camera
    w2c = invert_rigid(camera.c2w)
    texel = 1 / camera.K[0, 0]
    z = w2c[2, :3] @ points + w2c[2, 3]
    moved = points + normals * (1.5 * texel * z.clamp_min(0))
    in_light = w2c[:3, :3] @ moved + w2c[:3, 3:]
    z = in_light[2]
    homogeneous = camera.K @ in_light
    u, v = (homogeneous[:2] / z.clamp_min(1e-6)).unbind(0)
    width, height = camera.size
    inside = (z > 0) & (u >= 1) & (u < width - 1) & (v >= 1) & (v < height - 1)
    x, y = (u - 0.5).clamp(0, width - 2.001), (v - 0.5).clamp(0, height - 2.001)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    start = y0.long() * width + x0.long()
    reference = z - texel * z
    flat = shadow.depth.reshape(-1)
    lit = [(reference <= flat[start + step]).float() for step in (0, 1, width, width + 1)]
    fraction = (lit[0] * (1 - fx) + lit[1] * fx) * (1 - fy) + (lit[2] * (1 - fx) + lit[3] * fx) * fy
    return torch.where(inside, fraction, 1.0)
