"""The one place that calls scikit-image: marching cubes (Lewiner et al. 2003)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.errors import InputError


def marching_cubes(
    distances: Float[Tensor, "x y z"], known: Float[Tensor, "x y z"]
) -> tuple[Float[Tensor, "vertex 3"], Int64[Tensor, "face 3"]]:
    """The surface where the signed distance is 0, between corners that are known (``known`` > 0).

    Vertices are in (fractional) corner numbers. Triangles are counter-clockwise seen from the positive side.

    Raises:
        InputError: scikit-image is not installed, or there is no surface.
    """
    require_scikit_image()
    from skimage.measure import marching_cubes as lewiner

    nothing = "the depth maps show no surface: lower --min-confidence or --min-views, or raise --resolution"
    if not bool((distances < 0).any()):
        raise InputError(nothing)
    corners, triangles, _, _ = lewiner(distances.numpy(), 0.0, gradient_direction="descent", allow_degenerate=False)
    vertices, faces = torch.from_numpy(corners.copy()).float(), torch.from_numpy(triangles.astype("int64"))
    # a vertex lies on the edge between two corners; beyond the known ones the distance is made up
    low, high = vertices.floor().long(), vertices.ceil().long()
    sound = (known[tuple(low.T)] > 0) & (known[tuple(high.T)] > 0)
    faces = faces[sound[faces].all(-1)]
    if len(faces) == 0:
        raise InputError(nothing)
    return vertices, faces


def require_scikit_image() -> None:
    """Raises InputError when the extra is not installed: before the work, not after it."""
    try:
        import skimage.measure  # noqa: F401
    except ImportError as error:
        raise InputError("a mesh needs scikit-image: `pip install '.[export]'` in a checkout") from error
