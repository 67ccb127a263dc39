"""From a scene to a report: what a renderer may see, what is scored, and what the file says."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import idnerf
from idnerf.data.image_io import read_image, write_png
from idnerf.data.photo import PosedPhoto
from idnerf.data.scene import Scene
from idnerf.errors import InputError
from idnerf.evaluation.evaluator import crop_window, evaluate_scene, render_inputs
from idnerf.evaluation.metrics import psnr, ssim
from idnerf.evaluation.protocols import evaluation_tasks, get_protocol
from idnerf.evaluation.references import copy_nearest
from idnerf.evaluation.report import build_report, print_table, write_report
from idnerf.geometry.projection import project
from idnerf.types import Cameras, RenderOutput, Views

SIZE = (40, 30)
NEAREST = get_protocol("nearest")


def make_scene(folder: Path, views: int = 4, name: str = "toy", scene_format: str = "transforms") -> Scene:
    """Noise pictures on disk, cameras on a line; the bounds differ from view to view."""
    generator = torch.Generator().manual_seed(1)
    photos = []
    for i in range(views):
        path = folder / name / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, torch.rand(3, SIZE[1], SIZE[0], generator=generator))
        photos.append(PosedPhoto(path, np.eye(4), np.eye(3), SIZE))
    c2w = torch.eye(4).repeat(views, 1, 1)
    c2w[:, 0, 3] = torch.arange(views) * 0.1
    K = torch.tensor([[40.0, 0, 20.0], [0, 40.0, 15.0], [0, 0, 1]]).repeat(views, 1, 1)
    near = 1 + 0.1 * torch.arange(views)
    cameras = Cameras(c2w, K, SIZE, near, 4 * near)
    names = tuple(photo.path.name for photo in photos)
    return Scene(name, scene_format, folder, cameras, names, tuple(range(views)), tuple(photos))


def with_depth(scene: Scene, depth: torch.Tensor) -> Scene:
    return replace(scene, photos=tuple(replace(photo, depth=lambda: depth) for photo in scene.photos))


def grey(source: Views, target: Cameras) -> RenderOutput:
    ones = torch.ones(target.height, target.width)
    return RenderOutput(torch.full((3, target.height, target.width), 0.5), 2 * ones, ones)


@pytest.fixture
def scene(tmp_path) -> Scene:
    return make_scene(tmp_path)


def test_scores_are_those_of_the_prediction_against_the_photo(scene):
    result = evaluate_scene(scene, grey, NEAREST, 2, references=False)
    assert [record["target"] for record in result.views] == [0, 1, 2, 3]
    for record in result.views:
        truth = scene.image(record["target"])
        prediction = torch.full_like(truth, 0.5)
        assert record["psnr"] == pytest.approx(psnr(prediction, truth))
        assert record["ssim"] == pytest.approx(ssim(prediction, truth))
        assert record["ssim_range2"] == pytest.approx(ssim(prediction, truth, 2.0))
        assert record["lpips"] is None and record["seconds"] >= 0
    assert result.references == {} and result.size == SIZE and result.crop == 1.0


def test_the_renderer_gets_sources_and_a_camera_and_never_the_truth(scene):
    seen = []

    def spy(source: Views, target: Cameras) -> RenderOutput:
        seen.append((source, target))
        return grey(source, target)

    evaluate_scene(scene, spy, NEAREST, 2, references=False)
    for index, (source, target) in enumerate(seen):
        assert source.images.shape == (2, 3, 30, 40) and target.shape == ()
        assert not any(torch.equal(image, scene.image(index)) for image in source.images)
        assert torch.equal(target.c2w, scene.cameras.c2w[index])
        assert target.near == source.cameras.near.min() and target.far == source.cameras.far.max()


def test_the_targets_own_bounds_change_nothing(scene):
    task = evaluation_tasks(scene, NEAREST, 2, (1,))[0]
    near = scene.cameras.near.clone()
    near[1] = 1e-3
    other = replace(scene, cameras=replace(scene.cameras, near=near))
    expected, got = render_inputs(scene, task)[1], render_inputs(other, task)[1]
    assert torch.equal(expected.near, got.near) and torch.equal(expected.far, got.far)


def test_photos_are_not_read_as_truth_before_their_group_is_rendered(scene):
    """Images first, scores after: a truth that cannot be read fails only when every image exists."""
    rendered = []

    def count(source: Views, target: Cameras) -> RenderOutput:
        rendered.append(target)
        return grey(source, target)

    scene.photos[0].path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"unreadable|damaged"):
        evaluate_scene(scene, count, NEAREST, 2, references=False, targets=(3, 0))
    assert len(rendered) == 2


@pytest.mark.parametrize(
    ("size", "crop", "scored"),
    [
        ((480, 320), 0.8, (384, 256)),
        ((960, 640), 0.8, (768, 512)),
        ((33, 27), 0.8, (27, 23)),
        ((40, 30), 1.0, (40, 30)),
    ],
)
def test_crop_leaves_out_a_tenth_on_each_side(size, crop, scored):
    rows, columns = crop_window(size, crop)
    image = torch.zeros(size[1], size[0])[rows, columns]
    assert (image.shape[1], image.shape[0]) == scored
    if crop == 0.8:
        assert rows.start == size[1] // 10 and columns.start == size[0] // 10


@pytest.mark.parametrize("crop", [0.0, -0.5, 1.01])
def test_a_crop_that_is_no_share_is_refused(scene, crop):
    with pytest.raises(InputError, match="--crop"):
        evaluate_scene(scene, grey, NEAREST, 2, crop=crop)


def test_the_cropped_border_is_not_scored(scene):
    def good_inside(source: Views, target: Cameras) -> RenderOutput:
        index = round(target.c2w[0, 3].item() / 0.1)
        rgb = torch.zeros(3, 30, 40)
        rgb[:, 3:-3, 4:-4] = scene.image(index)[:, 3:-3, 4:-4]
        return replace(grey(source, target), rgb=rgb)

    (record,) = evaluate_scene(scene, good_inside, NEAREST, 2, crop=0.8, targets=(2,), references=False).views
    assert record["psnr"] == 100.0 and record["ssim"] == pytest.approx(1.0)
    (record,) = evaluate_scene(scene, good_inside, NEAREST, 2, targets=(2,), references=False).views
    assert record["psnr"] < 20


def test_dtu_psnr_is_of_the_foreground_and_ssim_of_the_blackened_image(tmp_path):
    depth = torch.zeros(30, 40)
    depth[5:25, 10:30] = 2.0
    scene = with_depth(make_scene(tmp_path, name="scan7", scene_format="dtu"), depth)
    result = evaluate_scene(scene, grey, NEAREST, 2, targets=(1,), references=False)
    (record,) = result.views
    truth, mask = scene.image(1), depth > 0
    assert record["psnr"] == pytest.approx(psnr(torch.full_like(truth, 0.5), truth, mask))
    assert record["ssim"] == pytest.approx(ssim(0.5 * mask.expand(3, -1, -1), truth * mask))
    assert record["depth_error_mm"] == pytest.approx(0.0) and record["depth_within_2mm"] == 1.0
    assert "psnr_unseen" not in record
    assert not any("no depth maps" in note for note in result.notes)


def test_dtu_without_depth_maps_scores_the_whole_image_and_says_so(tmp_path):
    scene = make_scene(tmp_path, name="scan7", scene_format="dtu")
    result = evaluate_scene(scene, grey, NEAREST, 2, targets=(1,), references=False)
    truth = scene.image(1)
    assert result.views[0]["psnr"] == pytest.approx(psnr(torch.full_like(truth, 0.5), truth))
    assert "scan7: no depth maps: the whole image was scored" in result.notes


def test_exact_depth_adds_depth_error_and_the_psnr_of_unseen_pixels(tmp_path):
    """A wall at depth 2: what leaves the images of all but one source is unseen, and is scored apart."""
    scene = with_depth(make_scene(tmp_path, scene_format="procedural"), torch.full((30, 40), 2.0))
    wide = scene.cameras.c2w.clone()
    wide[:, 0, 3] *= 4
    scene = replace(scene, cameras=replace(scene.cameras, c2w=wide))
    (record,) = evaluate_scene(scene, grey, NEAREST, 2, targets=(0,), references=False).views
    assert record["depth_median_relative_error"] == pytest.approx(0.0, abs=1e-6)
    rows, columns = torch.meshgrid(torch.arange(30) + 0.5, torch.arange(40) + 0.5, indexing="ij")
    points = torch.stack([(columns - 20) / 20, (rows - 15) / 20, torch.full_like(rows, 2.0)], -1).reshape(-1, 3)
    pixels, _ = project(points.expand(2, -1, -1), scene.cameras[[1, 2]])
    seen = ((pixels[..., 0] >= 0) & (pixels[..., 0] < 40)).sum(0).reshape(30, 40)
    truth = scene.image(0)
    assert 0 < (seen < 2).sum() < seen.numel()
    assert record["psnr_unseen"] == pytest.approx(psnr(torch.full_like(truth, 0.5), truth, seen < 2))


def test_nothing_unseen_means_no_such_key(tmp_path):
    scene = with_depth(make_scene(tmp_path, scene_format="procedural"), torch.full((30, 40), 2.0))
    still = torch.eye(4).repeat(4, 1, 1)
    still[:, 2, 3] = torch.tensor([0.0, -0.01, -0.02, -0.03])
    scene = replace(scene, cameras=replace(scene.cameras, c2w=still))
    (record,) = evaluate_scene(scene, grey, NEAREST, 2, targets=(0,), references=False).views
    assert "psnr_unseen" not in record


def test_reference_rows_score_the_same_targets(scene):
    calls = []
    result = evaluate_scene(scene, copy_nearest, NEAREST, 2, progress=lambda done, total: calls.append((done, total)))
    assert list(result.references) == ["copy", "plane", "sweep"]
    for records in result.references.values():
        assert [(r["target"], r["sources"]) for r in records] == [(r["target"], r["sources"]) for r in result.views]
    for mine, reference in zip(result.views, result.references["copy"], strict=True):
        assert mine["psnr"] == reference["psnr"]
    assert calls == [(i, 16) for i in range(1, 17)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: replace(out, rgb=out.rgb * math.nan), "not finite"),
        (lambda out: replace(out, depth=out.depth * math.inf), "not finite"),
        (
            lambda out: out.map(lambda tensor: tensor[..., 1:, :]),
            r"must give 3x30x40 colours, got \(3, 29, 40\)",
        ),
    ],
)
def test_broken_renderings_are_named(scene, change, message):
    with pytest.raises(InputError, match=f"toy, target 2: .*{message}"):
        evaluate_scene(scene, lambda s, t: change(grey(s, t)), NEAREST, 2, targets=(2,), references=False)


def test_lpips_is_measured_where_it_is_given(scene):
    result = evaluate_scene(scene, grey, NEAREST, 2, targets=(0,), references=False, lpips=lambda p, t: 0.25)
    assert result.views[0]["lpips"] == 0.25


def test_pictures_are_kept(scene, tmp_path):
    folder = tmp_path / "kept"
    evaluate_scene(scene, grey, NEAREST, 2, targets=(3,), save=folder, size=(20, 15))
    names = {path.name for path in (folder / "toy").iterdir()}
    rows = {f"003_{row}{kind}.png" for row in ("copy", "plane", "sweep") for kind in ("", "_depth")}
    assert names == rows | {f"003_{what}.png" for what in ("prediction", "truth", "depth", "error")}
    truth = read_image(folder / "toy" / "003_truth.png")
    torch.testing.assert_close(truth, scene.resized((20, 15)).image(3), atol=0.003, rtol=0)


def report_of(*results) -> dict:
    return build_report(results, protocol="nearest", weights="none", num_sources=2, device="cpu")


@pytest.fixture
def report(scene) -> dict:
    return report_of(evaluate_scene(scene, grey, NEAREST, 2, targets=(0, 3)))


def test_report_has_the_agreed_keys(report):
    row = ["views", "scenes", "mean"]
    assert list(report) == [
        "idnerf", "protocol", "weights", "weights_sha256", "quality", "num_sources", "size", "crop", "device", *row,
        "references", "notes",
    ]  # fmt: skip
    assert report["idnerf"] == idnerf.__version__ and report["size"] == [40, 30] and report["crop"] == 1.0
    assert list(report["references"]) == ["copy", "plane", "sweep"]
    for part in (report, *report["references"].values()):
        assert [key for key in part if key in row] == row
        for record in part["views"]:
            assert list(record) == [
                "scene", "target", "sources", "psnr", "ssim", "ssim_range2", "lpips", "seconds"
            ]  # fmt: skip
        assert list(part["scenes"]["toy"]) == ["psnr", "ssim", "ssim_range2", "lpips"]
        assert list(part["mean"]) == ["psnr", "ssim", "ssim_range2", "lpips", "seconds"]


def test_mean_is_over_views_and_not_over_scenes(tmp_path):
    a = evaluate_scene(make_scene(tmp_path, name="a"), grey, NEAREST, 2, targets=(0, 1, 2))
    b = evaluate_scene(make_scene(tmp_path, name="b"), copy_nearest, NEAREST, 2, targets=(3,))
    report = report_of(a, b)
    values = [record["psnr"] for record in a.views + b.views]
    assert report["mean"]["psnr"] == pytest.approx(sum(values) / 4)
    assert report["scenes"]["a"]["psnr"] == pytest.approx(sum(values[:3]) / 3)
    assert report["scenes"]["b"]["psnr"] == pytest.approx(values[3])
    assert len(report["references"]["sweep"]["views"]) == 4 and report["mean"]["lpips"] is None
    assert len(report["notes"]) == len(set(report["notes"]))


def test_scenes_of_several_sizes_leave_the_common_size_null(tmp_path):
    a = evaluate_scene(make_scene(tmp_path, name="a"), grey, NEAREST, 2, targets=(0,), references=False)
    b = evaluate_scene(make_scene(tmp_path, name="b"), grey, NEAREST, 2, targets=(0,), size=(20, 15), references=False)
    report = report_of(a, b)
    assert report["size"] is None and report["crop"] == 1.0 and report["references"] == {}
    assert "sizes differ between scenes: a [40, 30], b [20, 15]" in report["notes"]


def test_report_is_written_whole_or_not_at_all(report, tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_report(path, report)
    assert json.loads(path.read_text()) == report
    broken = {**report, "mean": {"psnr": math.nan}}
    with pytest.raises(ValueError, match="JSON"):
        write_report(path, broken)
    assert json.loads(path.read_text()) == report
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_report_that_cannot_be_written_says_where(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write --json .*file/report.json"):
        write_report(tmp_path / "file" / "report.json", report)


def test_no_scene_is_no_report():
    with pytest.raises(InputError, match="no scene"):
        report_of()


def test_table_shows_scenes_means_references_and_notes(report):
    stream = io.StringIO()
    print_table(report, Console(file=stream, width=140))
    text = stream.getvalue()
    for words in ("toy", "mean of 2 views", "nearest source", "best plane", "plane sweep", "PSNR", "lanczos"):
        assert words in text
    assert f"{report['mean']['psnr']:.2f}" in text and f"{report['references']['sweep']['mean']['ssim']:.3f}" in text
    assert "LPIPS" not in text
