"""What the demo's tables say, from the contents of a `result.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .figures import RUN_NAMES

HEADER = ("run", "task", "held out", "seen", "share", "at end", "epochs")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows under `HEADER`: for each run its text loss, one row per rare task and their mean, and last of all what
    always giving the most frequent answer gets."""
    out: list[tuple[str, ...]] = []
    for name, run in result["runs"].items():
        final = run["evaluations"][-1]
        means = [_learnable_mean(result, final[split]) for split in ("held_out", "seen")]
        text = result["tasks"].index("text")
        last = run["curves"]["share"][-1]
        out.append(
            (
                RUN_NAMES[name],
                "text (loss)",
                f"{final['text_loss']:.3f}",
                "",
                f"{run['share'][text]:.2%}",
                f"{last[text]:.2%}",
                f"{run['epochs'][text]:.2f}",
            )
        )
        for task in result["rare"]:
            number = result["tasks"].index(task)
            out.append(
                (
                    "",
                    task,
                    f"{final['held_out'][task]:.2f}",
                    f"{final['seen'][task]:.2f}",
                    f"{run['share'][number]:.2%}",
                    f"{last[number]:.2%}",
                    f"{run['epochs'][number]:.2f}",
                )
            )
        out.append(("", "learnable mean", f"{means[0]:.2f}", f"{means[1]:.2f}", "", "", ""))
    for number, task in enumerate(result["rare"]):
        out.append(("" if number else "chance", task, f"{result['chance'][task]:.2f}", "", "", "", ""))
    out.append(("", "learnable mean", f"{_learnable_mean(result, result['chance']):.2f}", "", "", "", ""))
    return out


def headline(result: dict[str, Any]) -> str:
    """The result in a sentence: mean accuracy on held-out and on seen instances, and the text's loss."""
    parts = []
    for name, run in result["runs"].items():
        final = run["evaluations"][-1]
        held_out, seen = (_learnable_mean(result, final[split]) for split in ("held_out", "seen"))
        parts.append(f"{RUN_NAMES[name]} {held_out:.2f} ({seen:.2f}, text loss {final['text_loss']:.3f})")
    return f"Right answers on held-out (seen) instances of the rare tasks that can be learned: {', '.join(parts)}."


def _learnable_mean(result: dict[str, Any], accuracy: dict[str, float]) -> float:
    return float(np.mean([accuracy[task] for task in result["learnable"]]))
