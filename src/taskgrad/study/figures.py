"""The demo's figures, from the contents of a `result.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import svg

RUN_NAMES = {"natural": "natural mix", "equal": "equal split", "overwrite_boost": "OverwriteBoost"}
_RUN_COLORS = {"natural": 0, "equal": 2, "overwrite_boost": 1}
_TASK_COLORS = {"text": 0, "largest": 1, "copy": 2, "substitution": 3, "noise": 4}
_SPLIT_NAMES = {"seen": "seen in training", "held_out": "held out"}


def accuracy_bars(result: dict[str, Any], split: str) -> str:
    """Accuracy of every rare task at the end of each run, on the instances of `split`, "seen" or "held_out"."""
    tasks = result["rare"]
    series = [
        svg.Series(RUN_NAMES[name], [run["evaluations"][-1][split][task] for task in tasks], _RUN_COLORS[name])
        for name, run in result["runs"].items()
    ]
    title = f"Accuracy on rare tasks, {_SPLIT_NAMES[split]} (dashed: chance)"
    return svg.bar_chart(title, tasks, series, y_max=1.0, marks=[result["chance"][task] for task in tasks])


def accuracy_curves(result: dict[str, Any], split: str) -> str:
    """Mean accuracy over the learnable rare tasks during training, on the instances of `split`."""
    runs = result["runs"]
    steps = [point["step"] for point in next(iter(runs.values()))["evaluations"]]
    series = [
        svg.Series(
            RUN_NAMES[name],
            [float(np.mean([point[split][task] for task in result["learnable"]])) for point in run["evaluations"]],
            _RUN_COLORS[name],
        )
        for name, run in runs.items()
    ]
    title = f"Mean over those that can be learned, {_SPLIT_NAMES[split]}"
    return svg.line_chart(title, steps, series, y_max=1.0, percent=True)


def shares(result: dict[str, Any], name: str) -> str:
    """Share of the sequences that each rare task has, over time."""
    run = result["runs"][name]
    equal = result["config"]["rare_budget"] / len(result["rare"])
    return svg.line_chart(
        f"Share of the batch: {RUN_NAMES[name]}",
        run["curves"]["step"],
        _by_task(result, run["curves"]["share"], result["rare"]),
        percent=True,
        mark=equal,
    )


def overwrite(result: dict[str, Any], name: str) -> str:
    """Overwrite ratio over time."""
    curves = result["runs"][name]["curves"]
    return svg.line_chart(
        f"Overwrite ratio: {RUN_NAMES[name]}",
        curves["step"],
        _by_task(result, curves["overwrite"], result["rare"]),
        y_max=2.0,
        mark=1.0,
    )


def signal(result: dict[str, Any], name: str) -> str:
    """Signal over time, on a logarithmic scale."""
    curves = result["runs"][name]["curves"]
    return svg.line_chart(
        f"Signal: {RUN_NAMES[name]}", curves["step"], _by_task(result, curves["signal"], result["tasks"]), log=True
    )


def conflict(result: dict[str, Any], name: str) -> str:
    """What every task's gradient does to every other task, against what that task does for itself."""
    return svg.heat_map(
        f"Who works against whom: {RUN_NAMES[name]}",
        result["tasks"],
        result["tasks"],
        result["runs"][name]["push"],
        row_label="task",
        column_label="effect of training on … (below 0 undoes, 1 = the task itself)",
    )


def readme_picture(result: dict[str, Any]) -> str:
    """One picture of the result: accuracy on held-out instances at the end, and on the way."""
    bars, curves = accuracy_bars(result, "held_out"), accuracy_curves(result, "held_out")
    content = svg.shifted(bars, 8, 8) + svg.shifted(curves, 484, 8)
    return svg.document(content, 952, 296)


def framed(content: str) -> str:
    """A single figure of the usual size as a document."""
    return svg.document(content, 460, 280)


def _by_task(result: dict[str, Any], rows: Sequence[Sequence[float | None]], tasks: Sequence[str]) -> list[svg.Series]:
    columns = {task: [row[number] for row in rows] for number, task in enumerate(result["tasks"])}
    return [svg.Series(task, columns[task], _TASK_COLORS[task], dashed=task == "noise") for task in tasks]
