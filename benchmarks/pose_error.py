"""Error of poses found by `idnerf poses` against given ones, after the best similarity (Umeyama 1991).

python benchmarks/pose_error.py GIVEN_SCENE FOUND_SCENE [FOUND_SCENE ...]
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from idnerf.data.load import load_scene
from idnerf.data.scene import Scene


@dataclass(frozen=True)
class PoseError:
    """Rotations in degrees; positions as a share of the scene extent (largest distance between two given centres)."""

    views: int
    rotation_mean: float
    rotation_max: float
    position_mean: float
    position_max: float
    focal_ratio: float
    near_ratio: float
    far_ratio: float


def align(found: np.ndarray, given: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(scale, rotation, translation) that takes the found camera-to-world poses to the given ones.

    The rotation is the one that fits all cameras' orientations best, not their centres: centres alone leave it open
    when they lie on a line. Scale and translation fit the centres by least squares.
    """
    U, _, Vt = np.linalg.svd(sum(g[:3, :3] @ f[:3, :3].T for f, g in zip(found, given, strict=True)))
    rotation = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    turned, wanted = found[:, :3, 3] @ rotation.T, given[:, :3, 3]
    a, b = turned - turned.mean(0), wanted - wanted.mean(0)
    scale = float((a * b).sum() / (a * a).sum())
    return scale, rotation, wanted.mean(0) - scale * turned.mean(0)


def compare(given: Scene, found: Scene) -> PoseError:
    """Error over the views that both have, matched by file name without ending."""
    places = {Path(name).stem: i for i, name in enumerate(given.image_names)}
    pairs = [(places[Path(name).stem], j) for j, name in enumerate(found.image_names) if Path(name).stem in places]
    given_at, found_at = [i for i, _ in pairs], [j for _, j in pairs]
    truth = given.cameras[given_at].c2w.double().numpy()
    guess = found.cameras[found_at].c2w.double().numpy()
    scale, rotation, translation = align(guess, truth)
    turns = np.einsum("nji,jk,nkl->nil", truth[:, :3, :3], rotation, guess[:, :3, :3])
    # From the skew part: arccos of the trace loses small angles to rounding.
    sine = np.linalg.norm(turns - turns.transpose(0, 2, 1), axis=(1, 2)) / np.sqrt(8)
    degrees = np.degrees(np.arctan2(sine, (np.trace(turns, axis1=1, axis2=2) - 1) / 2))
    centers = scale * guess[:, :3, 3] @ rotation.T + translation
    extent = np.linalg.norm(truth[:, None, :3, 3] - truth[None, :, :3, 3], axis=-1).max()
    distance = np.linalg.norm(centers - truth[:, :3, 3], axis=1) / extent
    resized = found.resized(given.cameras.size)
    near, far = (
        float((getattr(found.cameras, end)[found_at] * scale / getattr(given.cameras, end)[given_at]).median())
        for end in ("near", "far")
    )
    focal = float(resized.cameras.K[0, 0, 0] / given.cameras.K[0, 0, 0])
    return PoseError(len(pairs), degrees.mean(), degrees.max(), distance.mean(), distance.max(), focal, near, far)


def main(given: tyro.conf.Positional[Path], found: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Print a table.

    Args:
        given: scene with the poses to compare against.
        found: scenes of the same photos (all or some) as `idnerf poses` wrote them.
    """
    truth = load_scene(given)
    print("| scene | views | rotation deg (mean, max) | position % of extent (mean, max) | focal | near | far |")
    print("|---|---|---|---|---|---|---|")
    for path in found:
        e = compare(truth, load_scene(path))
        print(
            f"| {path.name} | {e.views} | {e.rotation_mean:.3f} {e.rotation_max:.3f} | {100 * e.position_mean:.2f} "
            f"{100 * e.position_max:.2f} | x{e.focal_ratio:.3f} | x{e.near_ratio:.2f} | x{e.far_ratio:.2f} |"
        )


if __name__ == "__main__":
    tyro.cli(main)
