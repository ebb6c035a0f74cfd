"""From what a step brings to the host to the rows of its report: a few numbers by task, in NumPy.

The device multiplies gradients with one another, with the memory and with what the parameters moved by; all that is
said of the products is worked out here, in the order of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .cosine import cosines
from .windows import Overwriting

Floats = npt.NDArray[np.float64]
Values = Mapping[str, npt.NDArray[Any]]


def figures(values: Values, overwriting: Overwriting, exact_norms: bool) -> dict[str, dict[str, Floats]]:
    """The values of a report's rows, by the statistics that they are from, and the step enters the windows.

    Args:
        values: of a step, by name: ``valid``; ``gram`` [T + 1, T + 1]; ``dots`` [T, T + 1] and ``sums`` [5, T] as
            ``taskgrad.statistics.memory`` reads them; ``predicted`` [T]; ``had`` [T] bool, tasks with a memory;
            ``split`` [T] bool, whose effects are known apart; ``to_mean`` [T]; ``weight``, ``examples``, ``loss`` and
            ``loss_mass`` [T + 1]; ``since`` [T].
        overwriting: the windows.
        exact_norms: the Gram's diagonal knows the norms better than ``sums``.
    """
    with np.errstate(all="ignore"):  # NaN is what is undefined
        gram, to_mean, had = values["gram"], values["to_mean"], values["had"] > 0
        tasks = len(to_mean)
        cosine, others_cosine = cosines(gram)
        present = to_mean > 0
        both = present & had
        split = both & (values["split"] > 0)
        square, signal, own, others, bend = values["sums"]
        if exact_norms:
            square = gram.diagonal()[:tasks].clip(min=0) * to_mean**2
        reading = {
            "norm": _where(present, np.sqrt(square)),
            "signal": _where(both, signal),
            "memory_dot": _where(had[:, None], values["dots"]),
            "own_effect": _where(split, own),
            "others_effect": _where(split, others),
            "update_effect": _where(both, own + others),
            "curvature": _where(both, bend),
        }
        if values["valid"]:
            own, others = reading["own_effect"], reading["others_effect"]
            overwriting.add(reading["memory_dot"], own, others, others_cosine)
        loss = values["loss"] / values["loss_mass"]
        counts = {"examples": values["examples"], "tokens": values["weight"], "loss": loss}
        return {
            "counts": {name: value[:tasks] for name, value in counts.items()},
            "gram": {"gram": gram[:tasks, :tasks].copy(), "cosine": cosine, "others_cosine": others_cosine},
            "reading": reading,
            "windows": overwriting.read(),
            "memory": {"predicted_effect": _where(had, values["predicted"]), "steps_since_seen": values["since"]},
        }


def _where(flags: npt.NDArray[np.bool_], values: Floats) -> Floats:
    return np.where(flags, values, np.nan)
