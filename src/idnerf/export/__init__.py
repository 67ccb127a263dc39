"""Geometry out of rendered depth: point clouds, meshes, depth maps, datasets (docs/export.md)."""
