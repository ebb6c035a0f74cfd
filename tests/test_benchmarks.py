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


def inside(out: Path, *more: str) -> int:
    return gpu.main(["--inside", "--device", "cpu", "--tiny", "--out", str(out), *more])


def test_cases_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "gpu-wgrad-cpu.json"
    inside(tmp_path, "--part", "wgrad")
    before = json.loads(path.read_text())
    kept, failed, partial = before["rows"][0], dict(before["rows"][0]), dict(before["rows"][1])
    inside(tmp_path, "--part", "wgrad")
    assert json.loads(path.read_text())["rows"] == before["rows"]
    failed = {**kept, "variants": {**kept["variants"], "loop": {"failed": "off"}}}
    path.write_text(json.dumps({**before, "rows": [failed, {**partial, "partial": True}]}))
    inside(tmp_path, "--part", "wgrad")
    again = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in again] == [row["case"] for row in before["rows"]]
    assert "ms" in again[0]["variants"]["loop"] and again[0] != kept and "partial" not in again[1]


@pytest.mark.parametrize("call", gpu.CALLS)
def test_a_call_ends_within_ten_minutes(call: int) -> None:
    assert sum(part.seconds for part in gpu.CALLS[call]) <= gpu.CALL_SECONDS < 600
    assert all(part.seconds > gpu.GRACE for part in gpu.CALLS[call] if part.kind)


def test_calls_choose_cases_that_exist_and_measure_all_of_the_grid() -> None:
    parts = {part.name: part for parts in gpu.CALLS.values() for part in parts}
    assert len(parts) == sum(len(parts) for parts in gpu.CALLS.values())

    def chosen(name: str, cases: list[str]) -> set[str]:
        only = gpu.parse(list(parts[name].options)).only
        assert all(any(o in case for case in cases) for o in only)
        return {case for case in cases if any(o in case for o in only)}

    shapes = [name for name, _ in gpu_wgrad.cases(gpu_wgrad.DEFAULT, CPU)]
    assert chosen("wgrad", shapes) | chosen("wgrad-more", shapes) >= {n for n in shapes if "T=2" not in n.split()}
    plans = [plan.title for plan in (*gpu_step.PLANS, *gpu_step.LONGER)]
    assert chosen("gpt2", plans) == chosen("profile", plans) == {"GPT-2 8k"}
    assert chosen("gpt2-32k", plans) == {"GPT-2 32k"} and chosen("1b", plans) == {"1B stack 8k"}


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_and_its_lines_are_kept(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    hangs = gpu.Part("hangs", None, 5, ("-c", f"print('begun'); {child}"))
    wrong = gpu.Part("wrong", None, 60, ("-c", "import sys; sys.exit(3)"))
    good = gpu.Part("good", None, 60, ("-c", "print('done on', 'DEVICE')"))
    assert not gpu.run_call((hangs, wrong, good), [], "cpu", tmp_path, 100)
    found = json.loads((tmp_path / "parts.json").read_text())
    assert found == {"hangs": "ended after 5 s", "wrong": "status 3", "good": "ended well"}
    assert (tmp_path / "hangs.log").read_text() == "begun\n"
    (tmp_path / "good.log").unlink()
    assert gpu.run_call((good,), [], "cpu", tmp_path, 100) and not (tmp_path / "good.log").exists()
    assert not gpu.run_call((wrong,), [], "cpu", tmp_path, 0.0)
    assert "no time was left" in json.loads((tmp_path / "parts.json").read_text())["wrong"]


@pytest.mark.slow
def test_a_call_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (gpu.CALLS[1][0], gpu.CALLS[1][3], *gpu.CALLS[2])
    monkeypatch.setitem(gpu.CALLS, 2, parts)
    assert gpu.main(["--call", "2", "--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "parts.json").read_text()) == {part.name: "ended well" for part in parts}
    assert "taskgrad" in (tmp_path / "doctor.log").read_text()
    for name in ("gpt2", "profile", "wgrad", "streams"):
        found = json.loads((tmp_path / f"gpu-{name}-cpu.json").read_text())
        assert found["rows"] and not found["failed"] and not found["left out"]
        assert not any(row.get("partial") for row in found["rows"])


@pytest.mark.slow
def test_a_step_is_told_of_variant_by_variant() -> None:
    told: list[int] = []
    gpu_step.measure(gpu_step.TINY[0], CPU, 0.01, ("torchjd", "exact"), lambda row: told.append(len(row["variants"])))
    assert told == [1, 2, 3]


def test_a_wrong_baseline_costs_its_own_times_only() -> None:
    off = case(good=Variant(lambda x: {"y": 2 * x}, {"y": 1e-6}))
    off.variants["base"] = Variant(lambda x: {"y": 3 * x}, {"y": 1e-6})  # type: ignore[index]
    found = gpu_timing.measure(off, CPU, LIMITS, 0.01)
    assert "failed" in found["variants"]["base"] and found["variants"]["good"]["ms"][1] > 0
    assert "| good |" in "\n".join(gpu.table(found))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
