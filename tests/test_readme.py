"""The code blocks of the README run as printed, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_as_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "product" in printed
    assert "100.0% of the trainable elements attributed" in printed
    assert (tmp_path / "taskgrad.safetensors").exists()
    assert re.search(r"^\d+ report on batch \d+ \w+", printed, flags=re.MULTILINE)  # it ran long enough to adapt
    scale, tg = namespace["Scale"], namespace["tg"]
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), scale(3))  # type: ignore[operator]
    tracker = tg.track(model, ["a", "b"], mode="exact", verify=False)  # type: ignore[attr-defined]
    with tracker.batch(torch.tensor([0, 1, 1])):
        model(torch.randn(3, 4)).square().mean().backward()
    tracker.step()
    torch.testing.assert_close(tracker.task_gradients()["1.gamma"].sum(0), model[1].gamma.grad)
