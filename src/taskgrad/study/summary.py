"""What the demo's tables say, from the contents of a `result.json`."""

from __future__ import annotations

from typing import Any

import numpy as np

from .figures import RUN_NAMES

HEADER = ("run", "task", "seen", "held out", "share", "at end", "epochs")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Table rows under `HEADER`: for each run its text loss and mean accuracy, then one row per rare task."""
    out: list[tuple[str, ...]] = []
    for name, run in result["runs"].items():
        final = run["evaluations"][-1]
        means = [float(np.mean([final[split][task] for task in result["learnable"]])) for split in ("seen", "held_out")]
        text = result["tasks"].index("text")
        last = run["curves"]["share"][-1]
        out.append(
            (
                RUN_NAMES[name],
                "text (loss)",
                "",
                f"{final['text_loss']:.3f}",
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
                    f"{final['seen'][task]:.2f}",
                    f"{final['held_out'][task]:.2f}",
                    f"{run['share'][number]:.2%}",
                    f"{last[number]:.2%}",
                    f"{run['epochs'][number]:.2f}",
                )
            )
        out.append(("", "learnable mean", f"{means[0]:.2f}", f"{means[1]:.2f}", "", "", ""))
    return out
