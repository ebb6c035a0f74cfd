"""The memory of every task's gradient, and where the parameters stood when the task was last seen.

m_t is the bias-corrected exponential moving average of the task's mean gradient ḡ_t over the steps in which it
appeared, read before the current batch enters it. When t appears at step k, having last appeared at j < k,

    own_t    = ⟨ḡ_t(k), θ_{j+1} − θ_j⟩     what its own step changed in its loss, to first order
    others_t = ⟨ḡ_t(k), θ_k − θ_{j+1}⟩     what everything since changed

are unbiased, because the noise of the fresh batch is independent of the path. All vectors are sketches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reading:
    """What one step's gradients say against the memory; float64, NaN where undefined."""

    mean_gradient: Tensor  # ḡ [T, K]
    norm: Tensor  # [T]
    signal: Tensor  # ⟨m_t, ḡ_t⟩ [T]
    memory_dot: Tensor  # ⟨m_t, g_s⟩ [T, T + 1], the last column is rest
    own_effect: Tensor  # [T]
    others_effect: Tensor  # [T]
    curvature: Tensor  # ½⟨ḡ_t(k) − m_t, θ_k − θ_j⟩ [T]
    memory: Tensor  # m_t [T, K], zero where there is none


class TaskMemory:
    """EMA of the mean gradient of each of T tasks over K columns, and the parameters around its last appearance.

    Memory: T·K numbers in the gradients' dtype and 2·T·K float64.
    """

    def __init__(self, num_tasks: int, width: int, decay: float, dtype: torch.dtype, device: torch.device) -> None:
        self.decay = decay
        self.ema = torch.zeros(num_tasks, width, dtype=dtype, device=device)
        self.before = torch.zeros(num_tasks, width, dtype=torch.float64, device=device)
        self.after = torch.zeros(num_tasks, width, dtype=torch.float64, device=device)
        self.count = torch.zeros(num_tasks, dtype=torch.int64, device=device)
        self.last_seen = torch.full((num_tasks,), -1, dtype=torch.int64, device=device)

    def widen(self, theta: Tensor) -> None:
        """Add columns for parameters that began to train; they stood at ``theta`` [K] until now."""
        old = self.ema.shape[1]
        extra = theta[old:].expand(self.ema.shape[0], -1)
        self.ema = torch.cat([self.ema, torch.zeros_like(extra, dtype=self.ema.dtype)], 1)
        self.before = torch.cat([self.before, extra], 1)
        self.after = torch.cat([self.after, extra], 1)

    def forget_columns(self, columns: slice) -> None:
        self.ema[:, columns] = 0

    def read(self, gradient: Tensor, weight: Tensor, theta: Tensor) -> Reading:
        """Products of the step's gradients with the memory.

        Args:
            gradient: G [T + 1, K], float64, the last row is rest.
            weight: [T + 1], float64, summed loss weights of the rows.
            theta: [K], float64, the parameters the gradients were taken at.
        """
        tasks = self.count.shape[0]
        present = weight[:tasks] > 0
        share = torch.where(present, weight.sum() / weight[:tasks], 0.0)
        mean = gradient[:tasks] * share[:, None]
        had = self.count > 0
        memory = self.ema.double() / torch.where(had, 1 - self.decay ** self.count.double(), 1.0)[:, None]
        both = present & had
        nan = torch.full((), torch.nan, dtype=torch.float64, device=mean.device)
        dots = memory @ gradient.mT
        own = (mean * (self.after - self.before)).sum(1)
        others = (mean * (theta - self.after)).sum(1)
        bend = 0.5 * ((mean - memory) * (theta - self.before)).sum(1)
        return Reading(
            mean_gradient=mean,
            norm=torch.where(present, mean.norm(dim=1), nan),
            signal=torch.where(both, (memory * mean).sum(1), nan),
            memory_dot=torch.where(had[:, None], dots, nan),
            own_effect=torch.where(both, own, nan),
            others_effect=torch.where(both, others, nan),
            curvature=torch.where(both, bend, nan),
            memory=memory,
        )

    def write(self, reading: Reading, seen: Tensor, before: Tensor, after: Tensor, step: int) -> None:
        """Enter the step: ``seen`` [T] are the tasks that appeared, ``before`` and ``after`` [K] the parameters around
        it."""
        mean = reading.mean_gradient.to(self.ema.dtype)
        row = seen[:, None]
        self.ema = torch.where(row, self.decay * self.ema + (1 - self.decay) * mean, self.ema)
        self.before = torch.where(row, before, self.before)
        self.after = torch.where(row, after, self.after)
        self.count = self.count + seen
        self.last_seen = torch.where(seen, step, self.last_seen)

    def state_dict(self) -> dict[str, Tensor]:
        return {k: getattr(self, k).clone() for k in ("ema", "before", "after", "count", "last_seen")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, value in state.items():
            setattr(self, key, value.to(getattr(self, key)).clone())
