"""Who is being overwritten, and what was kept: windowed ratios with their standard errors.

Overwrite ratio: ρ_t = max(0, −Σ_{s≠t}⟨m_t, g_s⟩) / ⟨m_t, g_t⟩, numerator and denominator averaged over all steps of
the window, those without t too, and clipped only after averaging (clipping every step turns noise into overwriting).
At a stationary point of the mixture every unfinished task has ρ → 1, so 1 is no threshold.

Retention: 1 − undone_t / gained_t with gained_t = −Σ own_t and undone_t = Σ others_t over the window's appearances of
t.

On the host and in NumPy: these are a few numbers by task.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WINDOW_STEPS = 200  # horizon of the overwrite ratio, in steps
WINDOW_APPEARANCES = 50  # horizon of what was kept, in appearances of the task
_quiet = np.errstate(all="ignore")  # 0 / 0 is how a window says that it is empty


class Moments:
    """Exponentially weighted moments of pairs (x, y), one pair per entry of ``shape``; ``horizon``, which broadcasts to
    that, in additions."""

    def __init__(self, shape: tuple[int, ...], horizon: npt.ArrayLike) -> None:
        decay = np.broadcast_to(1 - 1 / np.asarray(horizon, dtype=np.float64), shape)
        self._decay = np.stack([decay, decay**2, *[decay] * 5])
        self.sums = np.zeros((7, *shape))  # of 1 and 1² times the weights, x, y, x², y², xy

    @_quiet
    def add(self, x: Floats, y: Floats, mask: Bools) -> None:
        """Enter x, y where ``mask``; elsewhere the window stands still."""
        entry = np.stack([np.ones_like(x), np.ones_like(x), x, y, x * x, y * y, x * y])
        self.sums = np.where(mask, self.sums * self._decay + entry, self.sums)

    @property
    def weight(self) -> Floats:
        weight: Floats = self.sums[0]
        return weight

    @property
    @_quiet
    def mean(self) -> Floats:
        """Of x and of y, stacked."""
        x_and_y: Floats = self.sums[2:4] / self.sums[0]
        return x_and_y

    @property
    @_quiet
    def covariance(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Unbiased var(x), var(y), cov(x, y), and the effective number of entries."""
        w, w2, _, _, xx, yy, xy = self.sums
        x, y = self.mean
        n = w * w / w2
        fix = np.where(n > 1.5, n / (n - 1), np.nan)
        return (xx / w - x * x) * fix, (yy / w - y * y) * fix, (xy / w - x * y) * fix, n

    @_quiet
    def ratio(self) -> tuple[Floats, Floats]:
        """x̄ / ȳ and its standard error (delta method); NaN unless ȳ exceeds two of its standard errors."""
        x, y = self.mean
        var_x, var_y, cov, n = self.covariance
        sure = y > 2 * np.sqrt(var_y.clip(min=0) / n)
        ratio = np.where(sure, x / y, np.nan)
        spread = (var_x - 2 * ratio * cov + ratio**2 * var_y).clip(min=0)
        return ratio, np.sqrt(spread / n) / y


class Overwriting:
    """The windows of a tracker: pull of the others, what was kept, and the cosine to the rest of the batch."""

    def __init__(self, num_tasks: int) -> None:
        self.moments = Moments((3, num_tasks), [[WINDOW_STEPS], [WINDOW_APPEARANCES], [WINDOW_APPEARANCES]])

    def add(self, memory_dot: Floats, own: Floats, others: Floats, cosine: Floats) -> None:
        """Enter a step: memory_dot [T, T + 1]; own and others effect and cos(g − g_t, g_t), [T], NaN where
        undefined."""
        mine = memory_dot.diagonal()
        rest = memory_dot.sum(1) - mine
        x, y = np.stack([-rest, others, cosine]), np.stack([mine, -own, cosine])
        self.moments.add(x, y, np.isfinite(x) & np.isfinite(y))

    def read(self) -> dict[str, Floats]:
        """The windowed fields of ``StepReport``, [T] each."""
        (ratio, undone_ratio, _), (error, retention_se, _) = self.moments.ratio()
        (pull, undone, cosine), (own_pull, gained, _) = self.moments.mean
        kept = self.moments.weight[1]
        spread = self.moments.covariance[0][2]
        return {
            "overwrite": ratio.clip(min=0),
            "overwrite_se": error,
            "pull": pull,
            "own_pull": own_pull,
            "gained": gained * kept,
            "undone": undone * kept,
            "retention": 1 - undone_ratio,
            "retention_se": retention_se,
            "others_cosine_mean": cosine,
            "others_cosine_std": np.sqrt(spread.clip(min=0)),
        }
