"""Who is being overwritten, and what was kept: windowed ratios with their standard errors.

Overwrite ratio: ρ_t = max(0, −Σ_{s≠t}⟨m_t, g_s⟩) / ⟨m_t, g_t⟩, numerator and denominator averaged over all steps of
the window, those without t too, and clipped only after averaging (clipping every step turns noise into overwriting).
At a stationary point of the mixture every unfinished task has ρ → 1, so 1 is no threshold.

Retention: 1 − undone_t / gained_t with gained_t = −Σ own_t and undone_t = Σ others_t over the window's appearances of
t.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW_STEPS = 200  # horizon of the overwrite ratio, in steps
WINDOW_APPEARANCES = 50  # horizon of what was kept, in appearances of the task


class Moments:
    """Exponentially weighted moments of pairs (x, y), one pair per task and entry."""

    def __init__(self, num_tasks: int, horizon: int, device: torch.device) -> None:
        self.decay = 1 - 1 / horizon
        self.sums = torch.zeros(7, num_tasks, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, mask: Tensor) -> None:
        """Enter x, y [T] where ``mask`` [T]; elsewhere the window stands still."""
        decay = torch.full((7, 1), self.decay, dtype=torch.float64, device=x.device)
        decay[1] = self.decay**2
        ones = torch.ones_like(x)
        entry = torch.stack([ones, ones, x, y, x * x, y * y, x * y])
        self.sums = torch.where(mask, self.sums * decay + entry, self.sums)

    @property
    def weight(self) -> Tensor:
        return self.sums[0]

    @property
    def mean(self) -> tuple[Tensor, Tensor]:
        return self.sums[2] / self.sums[0], self.sums[3] / self.sums[0]

    @property
    def covariance(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unbiased var(x), var(y), cov(x, y), and the effective number of entries."""
        w, w2, _, _, xx, yy, xy = self.sums
        x, y = self.mean
        n = w * w / w2
        fix = torch.where(n > 1.5, n / (n - 1), torch.nan)
        return (xx / w - x * x) * fix, (yy / w - y * y) * fix, (xy / w - x * y) * fix, n

    def ratio(self) -> tuple[Tensor, Tensor]:
        """x̄ / ȳ and its standard error (delta method); NaN unless ȳ exceeds two of its standard errors."""
        x, y = self.mean
        var_x, var_y, cov, n = self.covariance
        sure = y > 2 * (var_y.clamp(min=0) / n).sqrt()
        ratio = torch.where(sure, x / y, torch.nan)
        spread = (var_x - 2 * ratio * cov + ratio**2 * var_y).clamp(min=0)
        return ratio, (spread / n).sqrt() / y


class Overwriting:
    """The windows of a tracker: pull of the others, what was kept, and the cosine to the rest of the batch."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self.pull = Moments(num_tasks, WINDOW_STEPS, device)
        self.kept = Moments(num_tasks, WINDOW_APPEARANCES, device)
        self.cosine = Moments(num_tasks, WINDOW_APPEARANCES, device)

    def add(self, memory_dot: Tensor, own: Tensor, others: Tensor, cosine: Tensor, valid: Tensor) -> None:
        """Enter a step: memory_dot [T, T + 1]; own and others effect and cos(g − g_t, g_t), [T], NaN where
        undefined."""
        mine = memory_dot.diagonal()
        rest = memory_dot.sum(1) - mine
        self.pull.add(-rest, mine, valid & torch.isfinite(mine) & torch.isfinite(rest))
        self.kept.add(others, -own, valid & torch.isfinite(own) & torch.isfinite(others))
        self.cosine.add(cosine, cosine, valid & torch.isfinite(cosine))

    def read(self) -> dict[str, Tensor]:
        """The windowed fields of ``StepReport``, [T] each."""
        ratio, error = self.pull.ratio()
        pull, own_pull = self.pull.mean
        undone_ratio, retention_se = self.kept.ratio()
        undone, gained = (m * self.kept.weight for m in self.kept.mean)
        spread, _, _, _ = self.cosine.covariance
        return {
            "overwrite": ratio.clamp(min=0),
            "overwrite_se": error,
            "pull": pull,
            "own_pull": own_pull,
            "gained": gained,
            "undone": undone,
            "retention": 1 - undone_ratio,
            "retention_se": retention_se,
            "others_cosine_mean": self.cosine.mean[0],
            "others_cosine_std": spread.clamp(min=0).sqrt(),
        }
