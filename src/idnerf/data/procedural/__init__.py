"""Procedural scenes: random primitives, textures, lights and cameras; exact depth, pure PyTorch.

seed -> rigs (cameras) -> layout (objects, builder, textures, masks) -> raster (primitives) -> shading
"""

from idnerf.data.procedural.config import ProceduralConfig, ProceduralScene
from idnerf.data.procedural.dataset import ProceduralDataset
from idnerf.data.procedural.generate import generate_scene

__all__ = ["ProceduralConfig", "ProceduralDataset", "ProceduralScene", "generate_scene"]
