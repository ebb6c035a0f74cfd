"""``taskgrad doctor``, and the three ways to a native kernel it tells apart, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import taskgrad
from taskgrad import cli, doctor
from taskgrad.capture.sketch import sketch_map
from taskgrad.ops import _native
from taskgrad.sampling.engine import native
from tests.utils.called import Called

PACKAGE = Path(taskgrad.__file__).parent
built_ahead = pytest.mark.skipif(bool(list(PACKAGE.glob("_C*.so"))), reason="the package carries built kernels")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a compiler")

CALL = """
    import warnings, torch, taskgrad
    from taskgrad.ops import _native, sum_gram
    block = torch.randn(3, 1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            total, gram = sum_gram(block)
    torch.testing.assert_close(gram, block.double() @ block.double().mT)
    print(_native.status())
    for warning in caught:
        print(f"{warning.category.__name__}: {warning.message}")
"""


def python(code: str, environment: Mapping[str, str], **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TASKGRAD_NATIVE": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_explain_prints_the_cost_model(capsys):
    assert cli.main(["doctor", "--explain", "8192", "4096", "4096", "8"]) == 0
    out = capsys.readouterr().out
    assert "not a measurement" in out
    assert all(name in out for name in ("dense product", "fused", "ghost", "exact Gram: fused", "sketch: "))


WAYS = {"ghost_gram": "ghost", "wgrad_gram": "fused", "sum_gram": "materialise"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="explains the GPU")
@pytest.mark.parametrize(
    "size", [(8, 128, 96, 2), (1024, 128, 96, 2), (64, 16, 16, 3), (128, 512, 96, 3), (2048, 40, 300, 1)], ids=str
)
def test_what_is_explained_is_what_runs(size):
    rows, d_in, d_out, tasks = size
    printed = dict(
        line.split(": ", 1) for line in doctor.explain(*size).splitlines() if line.startswith(("exact", "ske"))
    )
    sketch = sketch_map((d_out, d_in), 1024, 0, "")
    dy, x = torch.randn(rows, 1, d_out), torch.randn(rows, 1, d_in)
    offsets = torch.tensor([0, *(rows * (t + 1) // (tasks + 1) for t in range(tasks + 1))])
    with Called() as gram:
        torch.ops.taskgrad.wgrad_stats(dy, x, None, offsets, sketch.left, sketch.right)
    assert printed["exact Gram"] == next(WAYS[name] for name in gram.ops if name in WAYS)
    with Called() as sketched:
        torch.ops.taskgrad.wgrad_sketch(dy, x, None, offsets, sketch.left, sketch.right)
    of_tasks = sketched.products.count((d_out, d_in)) == tasks + 1
    assert printed["sketch"] == ("of the gradients of the tasks" if of_tasks else "skinny products of dY and X")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [["doctor"], ["doctor", "--json"], ["doctor", "--explain", "8", "8", "8", "2"], ["--help"], ["--version"]],
)
def test_nobody_reads_on(arguments, unbuffered):
    """As under ``| head -1``, where the reader is gone before the first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "taskgrad.cli", *arguments],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    # argparse keeps it to itself where nothing is buffered
    assert process.wait() == (0 if unbuffered and arguments[0].startswith("-") else 141)


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capfd):
    def broken(args):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.main(["doctor"])


@pytest.mark.parametrize("rows", ["0", "many"])
def test_explain_refuses_what_is_no_size(rows, capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--explain", rows, "64", "64", "8"])
    assert "--explain" in capsys.readouterr().err


def test_json_holds_versions_and_the_kernel_in_force(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["taskgrad"] == taskgrad.__version__
    assert facts["torch"] == torch.__version__
    assert facts["kernels on cpu"] == str(_native.status())
    assert facts["index engine"] == native.load()[1]
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())


def test_lines_name_every_fact(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in (
        "taskgrad",
        "torch",
        "triton",
        "gpu",
        "nvcc",
        "compiler",
        "kernels on cpu",
        "kernels on cuda",
        "index engine",
    ):
        assert f"\n{name} " in "\n" + printed


def test_reference_on_request():
    done = python(CALL, {"TASKGRAD_NATIVE": "0"}, check=True)
    assert done.stdout == "reference because TASKGRAD_NATIVE=0\n"
    assert done.stderr == ""


DRAW = """
    import sys
    {first}
    from taskgrad.sampling import AdaptiveBatchSampler
    from taskgrad.sampling.engine import native
    from taskgrad.sampling.policies import Uniform
    print(native.load()[1])
    print(list(AdaptiveBatchSampler({{"a": 900, "b": 20}}, 8, Uniform(), num_batches=3)))
"""
MISSING = 'sys.modules["taskgrad._index_engine"] = None'  # importing it fails


def test_index_engine_runs_on_numpy_on_request_or_where_it_was_not_built():
    asked = python(DRAW.format(first=""), {"TASKGRAD_NATIVE": "0"}, check=True).stdout.splitlines()
    missing = python(DRAW.format(first=MISSING), {}, check=True).stdout.splitlines()
    assert asked[0] == "NumPy because TASKGRAD_NATIVE=0"
    assert (
        missing[0].startswith("NumPy because ") and "built on installation where a C++ compiler is found" in missing[0]
    )
    assert asked[1] == missing[1]


def test_index_engine_in_cpp_draws_the_same():
    here = python(DRAW.format(first=""), {}, check=True).stdout.splitlines()
    if not here[0].startswith("C++ at "):
        pytest.skip("the C++ index engine is not built")
    assert here[1] == python(DRAW.format(first=""), {"TASKGRAD_NATIVE": "0"}, check=True).stdout.splitlines()[1]


def test_an_index_engine_demanded_and_missing_is_an_error():
    code = f"import sys; {MISSING}; from taskgrad import cli; print('exit code', cli.main(['doctor']))"
    done = python(code, {"TASKGRAD_NATIVE": "1"}, check=True)
    assert "unavailable: TASKGRAD_NATIVE=1, but the C++ index engine is not available" in done.stdout
    assert "exit code 1" in done.stdout
    done = python(DRAW.format(first=MISSING), {"TASKGRAD_NATIVE": "1"})
    assert "RuntimeError: TASKGRAD_NATIVE=1, but the C++ index engine is not available" in done.stderr


@pytest.mark.parametrize("version", ["ALGORITHM", "INTERFACE"])
def test_an_index_engine_of_other_sources_is_not_used(version):
    stale = f"from taskgrad.sampling.engine import index_numpy; index_numpy.{version} = -1"
    done = python(DRAW.format(first=stale), {}, check=True)
    assert done.stdout.startswith("NumPy because ")


@pytest.mark.parametrize("size", [0, 40, 4096, 100_000])
def test_an_index_engine_that_is_cut_off_is_not_loaded(size, tmp_path):
    if native.load()[0] is None:
        pytest.skip("the C++ index engine is not built")
    shutil.copytree(PACKAGE, tmp_path / "taskgrad", ignore=shutil.ignore_patterns("__pycache__"))
    (engine,) = tmp_path.rglob("_index_engine*.so")
    os.truncate(engine, size)
    done = python(DRAW.format(first=""), {"PYTHONPATH": str(tmp_path)}, check=True)
    assert done.stdout.startswith("NumPy because ") and str(engine) in done.stdout.splitlines()[0]


def test_unknown_wish_is_an_error():
    for code in (CALL, DRAW.format(first="")):
        done = python(code, {"TASKGRAD_NATIVE": "yes"})
        assert "TASKGRAD_NATIVE must be 0, 1 or unset, got 'yes'" in done.stderr


@built_ahead
@needs_compiler
def test_compiled_once_then_loaded_without_a_compiler(tmp_path):
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    first = python(CALL, cache, check=True)
    assert first.stdout.startswith(f"compiled on first use at {tmp_path}")
    assert first.stdout.count("\n") == 1  # no warning
    assert first.stderr.count("taskgrad: compiling its CPU kernels, once") == 1
    second = python(CALL, {**cache, "CXX": "no-such-compiler"}, check=True)
    assert second.stdout == first.stdout
    assert second.stderr == ""
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == ["lock", "taskgrad_ops.so", "taskgrad_ops.so.seal"]


@built_ahead
def test_without_a_compiler_the_reference_runs_and_says_so_once(tmp_path):
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"}
    done = python(CALL, environment, check=True)
    status, warning, *more = done.stdout.splitlines()
    assert status.startswith("reference because no C++ compiler: 'no-such-compiler' is not on PATH")
    assert warning.startswith("RuntimeWarning: taskgrad runs its slower reference kernels: no C++ compiler")
    assert not more


@built_ahead
def test_demanded_kernels_that_cannot_be_had_are_an_error(tmp_path):
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler", "TASKGRAD_NATIVE": "1"}
    message = "TASKGRAD_NATIVE=1, but the native kernels are not available: no C++ compiler"
    code = """
        import taskgrad.cli, taskgrad.ops, torch
        print("exit code", taskgrad.cli.main(["doctor"]))
        taskgrad.ops.sum_gram(torch.ones(2, 3))
    """
    done = python(code, environment)
    assert f"unavailable: {message}" in done.stdout and "exit code 1" in done.stdout
    assert f"RuntimeError: {message}" in done.stderr


@built_ahead
def test_a_compiler_that_fails_is_survived(tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = python(CALL, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(broken)}, check=True)
    assert done.stdout.startswith("reference because ")
    assert done.stdout.count("RuntimeWarning") == 1


def test_import_compiles_nothing(tmp_path):
    done = python("import taskgrad, taskgrad.ops", {"TORCH_EXTENSIONS_DIR": str(tmp_path)}, check=True)
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_unknown_command_lists_the_known_ones(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "command" in capsys.readouterr().err


@built_ahead
def test_names_with_other_letters_on_an_ascii_terminal(tmp_path):
    odd = {"CXX": "zwölf\x1b[2J", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", **odd}
    command = [sys.executable, "-m", "taskgrad.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and r"zw\xf6lf\x1b[2J" in done.stdout, done.stderr
