"""Parity with the published MatchNeRF code: its features and pixels, for weights that anyone can regenerate.

The numbers were made by donydchen/matchnerf (commit f3174d1) on a CPU in float32; this is an excerpt.
"""

import numpy as np
import pytest
import torch

from idnerf.geometry.rays import pixel_centers
from idnerf.models.gmflow import view_pairs
from idnerf.models.paper import PaperModel
from idnerf.models.published import convert_matchnerf
from idnerf.types import Cameras, Views
from matchnerf_cases import DATA, published_matchnerf


@pytest.mark.parametrize("views", [2, 3, 4])
def test_features_and_pixels_equal_the_published_code(views):
    with np.load(DATA / "golden_matchnerf.npz") as archive:
        golden = {name: torch.from_numpy(archive[name]) for name in archive}
    config, tensors = convert_matchnerf(published_matchnerf(views))
    assert config.num_views == views
    model = PaperModel(config)
    model.load_state_dict(tensors)

    images = golden["images_4"][1:3] if views == 2 else golden[f"images_{views}"]
    near_far = golden[f"near_far_{views}"]
    c2w = torch.linalg.inv(golden[f"w2c_{views}"].double()).float()
    cameras = Cameras(c2w, golden[f"K_{views}"], (96, 64), near_far[:, 0], near_far[:, 1])
    with torch.no_grad():
        features = model.encode(Views(images[None], cameras[None, :-1]))
        pixels = pixel_centers((96, 64)).reshape(-1, 2)[golden[f"pixel_index_{views}"].long()]
        output = model.render_pixels(features, cameras[None, -1], pixels[None])

    for scale, maps in enumerate(features.maps.scales):
        ours = per_view_maps(maps, views).flatten()[golden[f"features_{scale}_index_{views}"].long()]
        torch.testing.assert_close(ours, golden[f"features_{scale}_{views}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.rgb[0], golden[f"rgb_{views}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.opacity[0], golden[f"opacity_{views}"][:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.depth[0], golden[f"depth_{views}"][:, 0], atol=1e-4, rtol=1e-4)


def per_view_maps(maps: torch.Tensor, views: int) -> torch.Tensor:
    """[batch pair member h w c] to [batch view (partner c) h w] as published, partners in ascending order."""
    pairs = view_pairs(views)
    of_views = []
    for view in range(views):
        partners = [partner for partner in range(views) if partner != view]
        blocks = [maps[:, pairs.index((min(view, p), max(view, p))), int(view > p)] for p in partners]
        of_views.append(torch.cat(blocks, -1).permute(0, 3, 1, 2))
    return torch.stack(of_views, 1)
