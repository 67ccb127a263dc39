"""The speed benchmark's bookkeeping: what is counted, how rows and ratios are made; tiny cases, no timing decides."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from idnerf.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
pages = importlib.import_module("pages")
published_code = importlib.import_module("published_code")
roofline = importlib.import_module("roofline")
scale = importlib.import_module("scale")
speed = importlib.import_module("speed")
cases = importlib.import_module("speed_cases")

CPU = torch.device("cpu")
EFFORT = cases.Effort(repeats=1)


class TwoParts(nn.Module):
    """A linear layer, a lookup outside of any part."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        features = nn.functional.embedding_bag(rows, table, mode="sum")
        return self.linear(features)


def test_operations_and_bytes_go_to_the_part_that_runs():
    table, rows = torch.ones(1000, 8), torch.zeros(5, 4, dtype=torch.int32)
    model = TwoParts()
    with torch.inference_mode():
        costs = roofline.stage_costs(model, lambda: model(table, rows), CPU, processor=True, repeats=1)
    assert costs["linear"].flops == 2 * 5 * 8 * 16
    assert costs["linear"].bytes >= 4 * (5 * 8 + 8 * 16 + 5 * 16)
    assert costs["rest"].flops == 0
    # the twenty rows that are taken, not the thousand of the table
    assert 20 * 8 * 4 < costs["rest"].bytes < 1000 * 8 * 4
    rates = roofline.MachineRates(matmul=1e9, copy=1e6)
    assert costs["linear"].floor(rates) == pytest.approx(costs["linear"].bytes / 1e6)


@pytest.mark.parametrize("seconds_of_row, expected", [(1.0, 512), (1.3, 23), (1000.0, 2)])
def test_a_part_of_the_rows_is_rendered_where_all_would_take_too_long(seconds_of_row, expected):
    effort = replace(EFFORT, whole=600.0, part=30.0)
    assert cases.rows_that_fit(lambda rows: rows * seconds_of_row, 512, effort) == expected


def test_every_system_gets_the_same_photos_and_a_tile_has_the_rays_asked_for():
    case = cases.Case("cascade fast", "train", (64, 48), rays=256, scenes=2)
    first, second = cases.inputs(case, "cpu"), cases.inputs(replace(case, system="idnerf"), "cpu")
    assert torch.equal(first.source.images, second.source.images) and first.source.images.shape == (2, 3, 3, 48, 64)
    tile = cases.tile_of(first, 256)
    assert tile.target.images.shape == (2, 3, 16, 16) and tile.target.cameras.size == (16, 16)
    assert torch.equal(tile.target.images, first.target.images[:, :, 16:32, 24:40])


@pytest.mark.parametrize("stage", ["encode", "render", "train", "frames"])
def test_the_cascade_is_measured(stage):
    case = cases.Case("cascade fast", stage, (64, 48), rays=256, frames=2)
    result = cases.run_case(case, EFFORT, None)
    assert result["seconds"] > 0 and result["share"] == 1 and 0.05 < result["peak_gb"] < 100


def test_results_are_kept_and_only_failures_are_measured_again(tmp_path, monkeypatch):
    calls = []

    def measured(case, effort, reference):
        calls.append(case.stage)
        return {"failed": "no"} if case.stage == "render" else {"seconds": 1.0, "share": 1.0, "peak_gb": 1.0}

    monkeypatch.setattr(speed, "measured", measured)
    options = speed.Options(results=tmp_path / "results.jsonl")
    for _ in range(2):
        measure = speed.measure_all(options, EFFORT)
        results = [measure(cases.Case("idnerf", stage, (64, 48))) for stage in ("encode", "render")]
    assert calls == ["encode", "render", "render"]
    assert results[0]["seconds"] == 1.0
    assert len(options.results.read_text().splitlines()) == 3


def test_ratios_compare_the_same_stage_and_size():
    def row(system, seconds, size=(640, 512), **more):
        return cases.Case(system, "render", size), {"seconds": seconds, "share": 1.0, "peak_gb": 2.0, **more}

    lines = speed.stage_table(
        [
            row("published idnerf", 8000.0, share=0.01),
            row("published idnerf", 20000.0, size=(960, 640)),
            row("published matchnerf", 2000.0),
            row("idnerf", 200.0),
            row("matchnerf", 500.0),
            row("cascade full", 8.0),
            (cases.Case("cascade fast", "render", (640, 512)), {"failed": "a | b"}),
        ]
    )
    ratios = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in lines[2:]}
    assert ratios["idnerf"] == "40.0" and ratios["matchnerf"] == "4.0" and ratios["cascade full"] == "1000.0"
    assert ratios["published matchnerf"] == "" and "from 1.0% of the rows" in lines[2]
    assert all(line.count("|") == 7 for line in lines)


def test_tables_go_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- speed -->\nold\n<!-- end of speed -->\nb\n")
    pages.put_between_marks(page, "speed", "new\n")
    pages.put_between_marks(page, "speed", "newer")
    assert page.read_text() == "a\n<!-- speed -->\nnewer\n<!-- end of speed -->\nb\n"
    with pytest.raises(InputError, match="scale"):
        pages.put_between_marks(page, "scale", "x")


def test_the_project_page_has_every_mark():
    text = (BENCHMARKS.parent / "docs" / "performance.md").read_text()
    for name in ("speed", "scale"):
        assert text.index(f"<!-- {name} -->") < text.index(f"<!-- end of {name} -->")


def test_a_ring_sends_nearly_twice_the_gradients_and_latency_counts_every_message():
    size = 1_000_000
    free = scale.Network("", 8, bandwidth=1e9, latency=0.0)
    assert scale.all_reduce_seconds(size, free) == pytest.approx(2 * 7 / 8 * size / 1e9)
    slow = replace(free, latency=1.0)
    assert scale.all_reduce_seconds(0, slow) == pytest.approx(14)
    assert scale.all_reduce_seconds(size, replace(free, gpus=1)) == 0


def test_curves_are_drawn(tmp_path):
    row = {"encode s": 1.0, "full s": 2.0, "full GB": 1.0, "fast s": 1.0, "fast GB": 1.0}
    rows = [(1.0, row), (2.0, row)]
    scale.draw(tmp_path / "scale.svg", (("megapixels", rows), ("views", rows)))
    assert "<svg" in (tmp_path / "scale.svg").read_text()
    lines = scale.table(rows, "views", lambda n: f"{n:.0f}")
    assert len(lines) == 4 and lines[2].startswith("| 1 | 1 | 2 |")


def test_weights_depend_on_their_names_alone_and_published_options_read_as_attributes():
    value = torch.zeros(4, 3)
    weight = published_code.named_random_weight("a.weight", value)
    assert torch.equal(weight, published_code.named_random_weight("a.weight", value))
    assert not torch.equal(weight, published_code.named_random_weight("b.weight", value))
    assert published_code.named_random_weight("n", torch.tensor(3)) == 3
    options = published_code.options("idnerf", "cpu")
    assert options.nerf.depth.param == "metric" and options.decoder.skip == [4]
    options.nerf.more = {"x": 1}
    assert options["nerf"]["more"]["x"] == 1
    with pytest.raises(AttributeError):
        _ = options.nerf.absent


def test_a_folder_without_the_published_code_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="models/idnerf"):
        published_code.published_model(tmp_path, "idnerf", "cpu")


def test_figures_have_three_digits():
    assert [speed.figures(x) for x in (0.01234, 1.2345, 99.96, 12345.6)] == ["0.0123", "1.23", "100", "12346"]
