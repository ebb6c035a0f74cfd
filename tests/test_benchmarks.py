"""The GPU benchmarks, tried out on a CPU with tiny shapes: a wrong kernel gets no time, files say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, gpu_step, gpu_streams, gpu_timing, gpu_wgrad, roofline, sanitize, verify
from benchmarks.gpu_timing import Case, Values, Variant
from benchmarks.models import Setting

CPU = torch.device("cpu")
LIMITS = {"bf16": 1.0, "fp32": 1.0, "fp64": 1.0, "copy": 1.0}


@pytest.mark.parametrize("part", ["wgrad", "streams"])
def test_every_variant_of_a_kernel_is_right_and_timed(part: str, tmp_path: Path) -> None:
    assert gpu.main(["--inside", "--device", "cpu", "--tiny", "--part", part, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"gpu-{part}-cpu.json").read_text())
    assert found["rows"] and not found["failed"] and not found["left out"]
    for row in found["rows"]:
        for name, variant in row["variants"].items():
            low, middle, high = variant["ms"]
            assert 0 < low <= middle <= high, (row["case"], name)
            assert variant["TFLOP/s"] >= 0 and variant["error"]
    page = (tmp_path / f"gpu-{part}-cpu.md").read_text()
    assert all(f"## {row['case']}" in page for row in found["rows"])


def test_default_grids_name_the_goal_first_and_hold_the_whole_grid() -> None:
    names = [name for name, _ in gpu_wgrad.cases(gpu_wgrad.DEFAULT, CPU)]
    assert names[0] == "wgrad d=4096x4096 N=8192 T=8" and len(set(names)) == len(names)
    assert len(gpu_wgrad.FULL) == 4 * 3 * 4
    streams = [name for name, _ in gpu_streams.cases(gpu_streams.DEFAULT, CPU)]
    assert len(set(streams)) == len(streams)


def test_a_budget_of_nothing_leaves_everything_out(tmp_path: Path) -> None:
    arguments = [
        "--inside",
        "--device",
        "cpu",
        "--tiny",
        "--part",
        "wgrad",
        "--seconds",
        "1e-9",
        "--out",
        str(tmp_path),
    ]
    assert gpu.main(arguments) == 0
    found = json.loads((tmp_path / "gpu-wgrad-cpu.json").read_text())
    assert not found["rows"] and len(found["left out"]) == len(gpu_wgrad.TINY)


def test_a_whole_step_is_checked_and_timed() -> None:
    row = gpu_step.measure(gpu_step.TINY[0], CPU, 0.01)
    for name, variant in row["variants"].items():
        if name == "torchjd":
            continue  # another version of it is not ours to test
        assert "ms" in variant, (name, variant)
    assert row["variants"]["sketch"]["gram error"] < gpu_step.LIMIT["sketch"]
    assert row["variants"]["exact gram"]["gram error"] < 1e-2
    assert not row["variants"]["sketch"]["left out"]
    assert "| sketch |" in "\n".join(gpu.table(row))


def test_the_models_have_the_sizes_they_are_named_after() -> None:
    counts = {}
    for plan in gpu_step.PLANS:
        with torch.device("meta"):
            counts[plan.name] = sum(p.numel() for p in gpu_step.Decoder(plan.setting).parameters())
    assert 123e6 < counts["GPT-2 124M"] < 126e6
    assert 0.95e9 < counts["1B stack"] < 1.1e9
    assert 28e6 < counts["GPT 29M"] < 36e6


def test_where_a_step_spends_its_time_is_written_as_text(tmp_path: Path) -> None:
    gpu_step.profile(gpu_step.TINY[0], CPU, tmp_path / "profile.txt")
    text = (tmp_path / "profile.txt").read_text()
    assert "tiny, plain" in text and "tiny, sketch" in text and "aten::" in text


def case(**runs: Variant) -> Case:
    def make(generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(40, generator=generator),)

    def truth(x: Tensor) -> Values:
        return {"y": 2 * x.double()}

    variants = {"base": Variant(lambda x: {"y": x + x}, {"y": 1e-6}), **runs}
    return Case("double", {"n": 40}, 40.0, 320.0, "fp32", make, truth, variants, "base")


def unwritten(x: Tensor) -> Values:
    y = torch.empty_like(x)
    y[1:] = 2 * x[1:]
    return {"y": y}


def broken(x: Tensor) -> Values:
    raise RuntimeError("no kernel image")


class Drifting:
    calls = 0

    def __call__(self, x: Tensor) -> Values:
        self.calls += 1
        return {"y": 2 * x * (1 + 1e-7 * self.calls)}


def test_a_wrong_kernel_gets_no_time() -> None:
    runs = {
        "off": Variant(lambda x: {"y": 2 * x + 1e-3}, {"y": 1e-6}, ours=True),
        "hole": Variant(unwritten, {"y": 1e-6}, ours=True),
        "nan": Variant(lambda x: {"y": x * float("nan")}, {"y": 1e-6}),
        "shape": Variant(lambda x: {"y": 2 * x[:3]}, {"y": 1e-6}, ours=True),
        "broken": Variant(broken, {"y": 1e-6}),
        "drifting": Variant(Drifting(), {"y": 1e-3}, ours=True),
        "good": Variant(lambda x: {"y": 2 * x}, {"y": 1e-6}, ours=True),
    }
    found = gpu_timing.measure(case(**runs), CPU, LIMITS, 0.01)["variants"]
    assert {name for name in found if "ms" in found[name]} == {"base", "good"}
    assert {name for name in found if "failed" in found[name]} == runs.keys() - {"good"}
    assert "same bits" in found["drifting"]["failed"] and "no kernel image" in found["broken"]["failed"]


def test_variants_can_be_left_out() -> None:
    runs = {"slow one": Variant(lambda x: {"y": 2 * x}, {"y": 1e-6})}
    assert set(gpu_timing.measure(case(**runs), CPU, LIMITS, 0.01, ["slow"])["variants"]) == {"base"}


def test_the_share_of_the_ceiling_is_of_the_nearer_one() -> None:
    limits = {"fp32": 2.0, "copy": 100.0}
    one = gpu_timing.rates(case(), 1.0, limits)  # 320 bytes at 100 GB/s: 3.2 ns; 40 operations at 2 TFLOP/s: 0.02 ns
    assert one["of ceiling"] == pytest.approx(3.2e-6, abs=1e-4)
    assert one["GB/s"] == pytest.approx(320 / 1e6, abs=0.1)


def test_kernels_under_the_sanitizer_are_right() -> None:
    assert sanitize.inside(CPU) == 0


@pytest.mark.parametrize(
    ("output", "count"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= ERROR SUMMARY: 12 errors\n", 12),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n", 3),
        ("Segmentation fault\n", None),
    ],
)
def test_the_sanitizers_summary_is_read(output: str, count: int | None) -> None:
    assert sanitize.errors_in(output) == count


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    sanitize.sanitizer() is None or not torch.cuda.is_available(), reason="needs compute-sanitizer and a GPU"
)
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    count, output = sanitize.under(tool)
    assert count == 0, output[-4000:]


def test_arithmetic_is_marked_as_computed_and_is_what_is_committed() -> None:
    text = roofline.page(roofline.Rates())
    assert "computed, not measured" in text
    assert (roofline.RESULTS / "gpu-arithmetic.md").read_text() == text


def test_materialising_costs_what_the_goal_says() -> None:
    found = {e.goal: e for e in roofline.estimates(roofline.Rates())}
    assert found["(materialise in bfloat16, d = 4096, N = 8192, T = 8)"].low == pytest.approx(1.39, abs=5e-3)


def test_only_measurements_on_a_gpu_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert gpu.main(["--inside", "--device", "cpu", "--tiny", "--part", "wgrad", "--out", str(tmp_path)]) == 0
    roofline.main(["--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.svg"))
    run = json.loads((tmp_path / "gpu-wgrad-cpu.json").read_text())
    run["machine"]["gpu"] = "Some GPU"
    (tmp_path / "gpu-wgrad-some-gpu.json").write_text(json.dumps(run))
    roofline.main(["--out", str(tmp_path)])
    assert "Measured on Some GPU" in (tmp_path / "gpu-roofline-some-gpu.svg").read_text()


def test_the_first_step_costs_more_than_later_ones(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = verify.run([Setting(64, 64, 1, 8, 16, 2)], CPU, 3)
    assert row["ms"]["first"][1] > row["ms"]["plain"][1] > 0
    assert "checks / plain" in capsys.readouterr().out
