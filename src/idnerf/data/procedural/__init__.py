"""Procedural scenes: random primitives, textures, lights and cameras, rendered with exact depth in pure PyTorch.

seed -> rigs (cameras) -> layout (builder, objects, textures, masks) -> raster (primitives) -> shading -> generate
"""

from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.dataset import ProceduralDataset
from idnerf.data.procedural.generate import generate_scene

__all__ = ["ProceduralConfig", "ProceduralDataset", "ProceduralScene", "generate_scene"]
