"""The scoreboard's bookkeeping, the measures of confidence, the scenes made to fail: tiny data, no trained weights."""

import importlib
import json
import sys
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from idnerf.data.procedural import ProceduralConfig
from idnerf.errors import InputError
from idnerf.evaluation import calibration as measures
from idnerf.evaluation.references import copy_nearest
from idnerf.geometry.projection import bilinear_lookup, project
from idnerf.geometry.rays import unproject
from idnerf.types import Cameras, RenderOutput

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
boards = importlib.import_module("boards")
scoreboard = importlib.import_module("scoreboard")
selection = importlib.import_module("selection")
scenes_on_disk = importlib.import_module("fixed_scenes")
curves = importlib.import_module("calibration")
made = importlib.import_module("limit_scenes")
limits = importlib.import_module("limits")
parts = importlib.import_module("error_parts")

DATA = Path(str(resources.files("idnerf")))
CPU = torch.device("cpu")


class Counted:
    """A render function that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, source, target):
        self.calls += 1
        return copy_nearest(source, target)


@pytest.fixture
def board():
    return boards.Board(
        "demo", "Demo", ("demo_scene",), "nearest", (48, 36), (0.8, 1.0), num_sources=(2, 3), targets=(0, 2, 1)
    )


@pytest.fixture
def results(tmp_path):
    return boards.Results(tmp_path / "work")


@pytest.mark.parametrize("count", [1, 4, 11])
def test_the_halves_share_no_target_and_leave_none_out(count):
    targets = tuple(range(50, 50 + count))
    chosen, reported = boards.selection_half(targets), boards.reporting_half(targets)
    assert set(chosen) | set(reported) == set(targets) and not set(chosen) & set(reported)
    assert chosen[0] == targets[0] and len(chosen) - len(reported) in (0, 1)


def test_a_run_goes_on_where_it_stopped_and_renders_once_for_both_crops(board, results):
    cells = boards.cells_of(board, boards.board_targets(board, DATA))
    assert len(cells) == 6 and cells[0].num_sources == 3
    first = Counted()
    assert boards.fill(cells[:4], "copy", lambda: first, results, DATA, CPU)
    assert first.calls == 4
    second = Counted()
    assert boards.fill(cells, "copy", lambda: second, results, DATA, CPU)
    assert second.calls == 2
    scores = results.read("copy", cells[0])
    assert set(scores["crops"]) == {"0.8", "1"} and scores["crops"]["0.8"] != scores["crops"]["1"]
    assert cells[0].target not in scores["sources"] and len(scores["sources"]) == 3


def test_no_rendering_begins_after_the_deadline(board, results):
    cells = boards.cells_of(board, boards.board_targets(board, DATA))
    counted = Counted()
    assert not boards.fill(cells, "copy", lambda: counted, results, DATA, CPU, deadline=time.monotonic() - 1)
    assert counted.calls == 0 and not results.folder.exists()


def cell_scores(psnr: float) -> dict:
    crop = {"psnr": psnr, "ssim": 0.5, "ssim_range2": 0.6}
    stated = {"device": "CPU", "torch": "2", "idnerf": "0", "commit": "c", "date": "d"}
    return {"crops": {"0.8": crop, "1": {**crop, "psnr": psnr - 1}}, "seconds": 2.0, "processor_seconds": 3.0, **stated}


def test_a_table_compares_the_same_views_and_leaves_gaps_open(board):
    targets = {"a/x": (1, 2), "a/y": (3,)}
    ours = {("a/x", 3, 1): 20.0, ("a/x", 3, 2): 22.0, ("a/y", 3, 3): 30.0, ("a/x", 2, 1): 10.0}
    rows = {
        "weights": {key: cell_scores(value) for key, value in ours.items()},
        "copy": {key: cell_scores(5.0) for key in ours},
        "plane": {("a/x", 3, 1): cell_scores(7.0)},
        "sweep": {("a/x", 2, 2): cell_scores(9.0)},
    }
    lines = scoreboard.board_table(board, 0.8, targets, rows)[2:]
    cells = {
        (words[0], words[1]): words for words in ([w.strip(" *") for w in line.split("|")[1:-1]] for line in lines)
    }
    assert set(cells) == {("2", "x"), ("2", "mean"), ("3", "x"), ("3", "y"), ("3", "mean")}
    assert cells["3", "x"][2:4] == ["2", "21.00"] and cells["3", "mean"][2:4] == ["3", "24.00"]
    assert cells["3", "x"][8:] == ["5.00 / 0.500", "-", "-"]  # a reference that lacks a view says nothing
    aims = scoreboard.aims_table(board, targets, rows)
    assert "| 24.00 dB |" in aims[2] and "+10.00 dB (1 views)" in aims[4] and aims[5].endswith("| - |")
    assert scoreboard.board_table(board, 1.0, targets, rows)[-1].split("|")[4].strip(" *") == "23.00"


def test_the_document_says_what_is_missing_and_keeps_the_halves_apart(tmp_path, board, results, monkeypatch):
    monkeypatch.setattr(scoreboard, "BOARDS", (replace(board, name="half", num_sources=(3,)),))
    monkeypatch.setattr(scoreboard, "load_model", lambda weights, device: type("M", (), {"render": Counted()})())
    out = tmp_path / "scoreboard.md"
    scoreboard.main(DATA, out, work=results.folder, rows=("weights", "copy"), device="cpu")
    text = out.read_text()
    assert "6 of 12 renderings are still missing" in text
    assert "| demo_scene 48x36 | 3 |" in text and "(2) |" in text and "(1) |" in text
    assert "not measured here" in text
    scoreboard.main(DATA, out, work=results.folder, device="cpu")
    assert "still missing" not in out.read_text()
    with pytest.raises(InputError, match="--only"):
        scoreboard.main(DATA, out, work=results.folder, only=("nothing",))
    with pytest.raises(InputError, match="--out"):
        scoreboard.main(DATA, work=results.folder)


@pytest.fixture
def few_scenes(monkeypatch):
    config = ProceduralConfig(size=(48, 40), num_views=4, rig="forward", complexity=(0.0, 0.0), supersample=1)
    named = [("forward-easy-0", 1_500_000_000, config), ("inward-hard-0", 1_500_000_001, replace(config, rig="inward"))]
    monkeypatch.setattr(scenes_on_disk, "named_configs", lambda: named)


def test_fixed_scenes_are_rendered_once_and_stay_of_one_generator(tmp_path, few_scenes, monkeypatch):
    first = dict(scenes_on_disk.fixed_scenes(tmp_path, 1))
    assert list(first) == ["forward-easy-0"]
    monkeypatch.setattr(scenes_on_disk, "generate_scene", lambda *_: pytest.fail("rendered again"))
    again = dict(scenes_on_disk.fixed_scenes(tmp_path, 1))
    assert torch.equal(first["forward-easy-0"].views.images, again["forward-easy-0"].views.images)
    monkeypatch.setattr(scenes_on_disk, "generator_version", lambda: "another")
    assert len(dict(scenes_on_disk.fixed_scenes(tmp_path, 1))) == 1
    with pytest.raises(InputError, match="lacks inward-hard-0"):
        list(scenes_on_disk.fixed_scenes(tmp_path))


def test_a_perfect_renderer_scores_perfectly_on_the_fixed_scenes(tmp_path, few_scenes):
    tasks = {n: scenes_on_disk.fixed_task(n, s, 3) for n, s in scenes_on_disk.fixed_scenes(tmp_path)}
    by_center = {tuple(task.target.centers.tolist()): task for task in tasks.values()}

    def perfect(source, target):
        task = by_center[tuple(target.centers.tolist())]
        assert len(source) == 3 and not (source.cameras.c2w == target.c2w).all(-1).all(-1).any()
        beyond = (task.depth > target.far) | (task.seen < 2)  # nothing can tell how far these are
        depth = torch.where(beyond, target.far * 2, task.depth)
        return RenderOutput(task.image, depth, torch.ones_like(task.depth))

    scores = selection.score_fixed_scenes(perfect, tmp_path, None)
    assert {entry["psnr"] for entry in scores.values()} == {100.0}
    assert all(entry["depth"] == 0 and entry["psnr_seen"] == 100 for entry in scores.values())
    assert "procedural(2) 100.00 1.0000" in selection.procedural_line(scores)
    assert len(selection.by_kind(scores)) == 4


def test_selection_prints_a_line_and_scores_a_file_once(tmp_path, few_scenes, board, results, monkeypatch, capsys):
    monkeypatch.setattr(selection, "BOARDS", (replace(board, name="half"),))
    counted = Counted()
    monkeypatch.setattr(selection, "load_model", lambda weights, device: type("M", (), {"render": counted})())
    for _ in range(2):
        selection.select(DATA, ["default"], results, tmp_path / "scenes", CPU, quick=True, details=False)
    lines = capsys.readouterr().out.splitlines()
    assert counted.calls == 2 + 2  # two scenes, two of the three targets
    assert len(lines) == 2 and "half n3: demo_scene" in lines[0] and "procedural(2)" in lines[0]
    assert lines[0].rsplit("|", 1)[0] == lines[1].rsplit("|", 1)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Confidence


def test_rank_correlation_agrees_with_scipy_ties_included(generator):
    stats = pytest.importorskip("scipy.stats")
    a = torch.randint(0, 9, (200,), generator=generator).float()
    b = a + 4 * torch.randn(200, generator=generator)
    assert measures.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-9)
    assert measures.spearman(b, -b.exp()) == pytest.approx(-1)
    assert measures.spearman(a, torch.ones(200)) == 0


def test_sparsification_is_lowest_for_the_oracle_and_flat_for_chance(generator):
    error = torch.rand(20000, generator=generator).square()
    oracle, chance = (measures.sparsification(error, c) for c in (-error, torch.rand(20000, generator=generator)))
    assert (oracle.diff() < 0).all() and (oracle[1:] < chance[1:]).all()
    assert oracle[0] == pytest.approx(error.mean().item(), rel=1e-5)
    # keeping the lower half of u^2, u even in [0, 1], leaves 1/12 of 1/3
    assert oracle[10] == pytest.approx(1 / 12, rel=0.03)
    assert measures.area_above_oracle(error, -error) == (0, 0)
    assert measures.area_above_oracle(error, torch.rand(20000, generator=generator))[1] == pytest.approx(1, abs=0.05)
    assert measures.area_above_oracle(error, error)[1] > 1.3


def test_bins_of_an_honest_forecast_lie_on_the_diagonal(generator):
    scale = torch.rand(200000, generator=generator) * 0.2 + 0.01
    error = torch.distributions.Exponential(torch.ones(200000)).sample() * scale
    confidence = 1 - torch.exp(-0.1 / scale)
    bins = measures.confidence_bins(confidence, error, scale > 0.15)
    assert measures.expected_calibration_error(bins) < 0.01
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)
    assert bins[0].hidden == 1 and bins[-1].hidden == 0 and sum(b.count for b in bins) == 200000
    overconfident = measures.confidence_bins(confidence.sqrt(), error)
    assert measures.expected_calibration_error(overconfident) > 0.02
    with pytest.raises(InputError, match="10"):
        measures.confidence_bins(confidence[:5], error[:5])


def test_the_confidence_page_says_so_when_confidence_is_useless(generator):
    error = torch.rand(4000, generator=generator)
    seen = torch.randint(0, 4, (4000,), generator=generator).float()
    useless = curves.Pixels(torch.rand(4000, generator=generator), error, seen, 1)
    assert "does not predict error" in curves.findings({"procedural": useless})[0]
    honest = curves.Pixels(1 - error, error, seen, 1)
    text = curves.document({"procedural": honest}, "images/x.svg", "hash")
    assert "does not predict" not in text and "| yes |" in text
    by_seen = replace(honest, confidence=seen / 3)
    assert curves.hidden_detection(by_seen) == 1
    assert curves.hidden_detection(replace(honest, confidence=torch.ones(4000))) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes made to fail

SMALL = (48, 36)


def test_exact_depth_carries_one_photo_onto_the_other():
    case = made.limit_case(made.room(), 2, 4.0, (96, 72))
    points = unproject(case.target, case.depth).reshape(1, -1, 3)
    pixels, depth = project(points.expand(2, -1, -1), case.source.cameras)
    looked_up = bilinear_lookup(case.source.images.permute(0, 2, 3, 1).contiguous(), pixels)
    error = (looked_up - case.image.permute(1, 2, 0).reshape(1, -1, 3)).abs().mean((0, 2)).reshape(case.depth.shape)
    panel = case.shows(1)  # seen whole by both sources
    assert panel.float().mean() > 0.1 and (depth > 0).all()
    assert error[panel].median() < 0.03 < (case.image[:, panel] - case.image[:, panel].roll(5, 1)).abs().median()


def test_the_back_wall_has_its_depth_and_the_sky_has_none():
    assert made.limit_case(made.room(), 2, 4.0, SMALL).depth.max() == pytest.approx(5.5, abs=1e-4)
    case = made.limit_case(replace(made.room(back=False), sky=True), 2, 4.0, SMALL)
    assert torch.equal(case.depth == 0, case.shows(-1)) and case.shows(-1).any()


def test_a_mirror_shows_what_a_camera_behind_it_would_see():
    wall = made.Surface((0.3, 0, -3), (5, 0, 0), (0, -4, 0), texture=2, tiles=2)
    ball = made.Surface((0.4, 0.2, -2), (0.6, 0, 0), texture=3)
    mirror = made.Surface((0, 0, 2), (9, 0, 0), (0, -9, 0), kind="mirror")
    front = made.ring(2, 0.0, SMALL)[0]
    behind = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0]))  # looks back, from as far behind the mirror
    behind[2, 3] = 4.0
    textures = made.texture_bank()
    seen = made.photograph(made.World((wall, ball, mirror)), front, textures, 0.0)
    direct = made.photograph(
        made.World((wall, ball)), Cameras(behind, front.K, front.size, front.near, front.far), textures, 0.0
    )
    torch.testing.assert_close(seen, 0.92 * direct.flip(-1), atol=0.02, rtol=0)


def test_only_the_moving_ball_moves():
    still, moving = made.room(), made.with_surface(made.room(), made.MAIN_BALL, motion=(0.1, 0.0, 0.0))
    camera, textures = made.ring(2, 5.0, SMALL)[0], made.texture_bank()
    before, after = (made.photograph(moving, camera, textures, t) for t in (0.0, 1.0))
    assert torch.equal(before, made.photograph(still, camera, textures, 1.0))
    changed = ((before - after).abs().amax(0) > 0.02).float().mean()
    assert 0.005 < changed < 0.15


def test_sources_stand_where_asked():
    cameras = made.ring(2, 20.0, SMALL)
    axis = cameras.c2w[:, :3, 2]
    assert torch.rad2deg((axis[0] @ axis[1]).acos()) == pytest.approx(20, abs=0.01)
    offset = cameras.centers - torch.tensor([0.0, 0.0, made.PIVOT])
    torch.testing.assert_close(offset.norm(dim=-1), torch.full((3,), made.PIVOT))


def test_a_wrong_range_that_holds_nothing_is_left_out():
    camera = made.ring(2, 5.0, SMALL)[0].with_bounds(torch.tensor(2.0), torch.tensor(3.0))
    assert limits.wrong_range(camera, limits.Range("", near=2.0)) is None
    wide = limits.wrong_range(camera, limits.Range("", near=0.5, far=2.0))
    assert (float(wide.near), float(wide.far)) == (1.0, 6.0)
    depth = torch.tensor([[1.5, 2.5], [2.5, 5.0]])
    assert limits.outside(depth, camera) == 0.5 and limits.outside(depth, wide) == 0


def test_exposure_is_a_factor_on_linear_light():
    image = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    torch.testing.assert_close(limits.exposed(limits.exposed(image, 2.0), 0.5), image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(limits.exposed(image, 1.0), image, atol=1e-6, rtol=1e-5)


def test_the_parts_of_a_photo_s_error(generator):
    """A block that lies elsewhere is moved back; what a source does not frame is counted with its error."""
    coarse = torch.rand(1, 3, 16, 20, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, size=(128, 160), mode="bicubic")[0].clamp(0, 1)
    moved = parts.shifted(truth, 0.75, -0.5)
    K = torch.tensor([[160.0, 0, 80], [0, 160, 64], [0, 0, 1]])
    target = Cameras(torch.eye(4), K, (160, 128), torch.tensor(1.0), torch.tensor(9.0))
    source = Cameras(torch.eye(4).repeat(2, 1, 1), K.expand(2, 3, 3), (160, 128), torch.ones(2), 9 * torch.ones(2))
    source.c2w[1, 0, 3] = 0.5  # its picture ends 40 pixels before the target's at depth 2
    depth = torch.full((128, 160), 2.0)
    output = RenderOutput(moved, depth, depth)
    window = (slice(0, 128), slice(0, 160))
    found = parts.error_parts(output, truth, source, target, window)
    assert found["cut"] == pytest.approx(40 / 160, abs=0.01)
    assert 0.15 < found["error_there"] < 0.35
    assert found["moved"] - found["unmoved"] > 8 and found["psnr"] == pytest.approx(found["unmoved"], abs=0.01)
    exact = parts.error_parts(RenderOutput(truth, depth, depth), truth, source, target, window)
    assert exact["moved"] == exact["unmoved"] and exact["psnr_elsewhere"] > 60
    assert "+0.00" in parts.parts_table({"photo": exact})[-1]


def test_measurements_are_kept(tmp_path):
    kept = limits.Kept(tmp_path)
    assert kept("a", lambda: {"psnr": 1.0}) == {"psnr": 1.0}
    assert kept("a", lambda: pytest.fail("measured again")) == {"psnr": 1.0}
    assert json.loads((tmp_path / "a.json").read_text()) == {"psnr": 1.0}


def with_confidence(source, target):
    """The nearest photo, more confident where it is bright."""
    output = copy_nearest(source, target)
    return replace(output, confidence=output.rgb.mean(0))


@pytest.fixture
def stub(monkeypatch):
    """The stub above in place of the model."""
    model = type("Model", (), {"render": staticmethod(with_confidence)})
    for module in (limits, curves):
        monkeypatch.setattr(module, "load_model", lambda weights, device: model)


def test_the_limits_page_is_written_with_its_pictures_and_not_measured_twice(tmp_path, few_scenes, stub, monkeypatch):
    monkeypatch.setattr(limits, "limit_case", lambda w, n=3, degrees=6.0: made.limit_case(w, n, degrees, SMALL))
    monkeypatch.setattr(limits, "BOARDS", ())
    out = tmp_path / "docs" / "limits.md"
    out.parent.mkdir()
    limits.main(out, work=tmp_path / "work", quick=True, device="cpu")
    text = out.read_text()
    for failure in limits.FAILURES:
        assert f"images/limit_{failure.name}.jpg" in text
        assert (tmp_path / "docs" / "images" / f"limit_{failure.name}.jpg").stat().st_size > 1000
    assert text.count("| procedural (") == len(limits.RANGES) + 1 and "| room | 45 degrees |" in text
    monkeypatch.setattr(limits, "limit_case", lambda *_: pytest.fail("measured again"))
    limits.main(out, work=tmp_path / "work", quick=True, device="cpu")
    assert out.read_text() == text


def test_the_confidence_page_is_written_with_its_plot(tmp_path, few_scenes, stub):
    pytest.importorskip("matplotlib")
    out = tmp_path / "confidence.md"
    curves.main(out, work=tmp_path / "work", device="cpu")
    text, plot = out.read_text(), tmp_path / "images" / "confidence.svg"
    assert "(images/confidence.svg)" in text and "| 10 |" in text and "procedural test scenes" in text
    first = plot.read_bytes()
    curves.main(out, work=tmp_path / "work", device="cpu")
    assert plot.read_bytes() == first
