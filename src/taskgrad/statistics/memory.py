"""The memory of every task's gradient, and where the parameters stood when the task was last seen.

m_t is the bias-corrected exponential moving average of the task's mean gradient ḡ_t over the steps in which it
appeared, read before the current batch enters it. When t appears at step k, having last appeared at j < k,

    own_t    = ⟨ḡ_t(k), θ_{j+1} − θ_j⟩     what its own step changed in its loss, to first order
    others_t = ⟨ḡ_t(k), θ_k − θ_{j+1}⟩     what everything since changed

are unbiased, because the noise of the fresh batch is independent of the path. All vectors are sketches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import memory_read, memory_write


class TaskMemory:
    """EMA of the mean gradient of each of T tasks over K columns, and the parameters around its last appearance.

    ``missed`` [T, P] says how many of the appearances a parameter was not in: it began to train later, was frozen, or
    was left out of a step. Its mean is over the others alone.

    Memory: T·K numbers in the gradients' dtype and 2·T·K float64.

    Args:
        num_tasks: T.
        widths: int64 [P], columns of each parameter, K in all.
        decay: of the EMA, per appearance.
        dtype, device: of the EMA.
    """

    def __init__(self, num_tasks: int, widths: Tensor, decay: float, dtype: torch.dtype, device: torch.device) -> None:
        self.decay = decay
        width = int(widths.sum())
        self.widths = widths
        self.missed = torch.zeros(num_tasks, len(widths), dtype=torch.int64, device=device)
        self.uneven = False  # whether some parameter missed something
        self.ema = torch.zeros(num_tasks, width, dtype=dtype, device=device)
        self.before = torch.zeros(num_tasks, width, dtype=torch.float64, device=device)
        self.after = torch.zeros(num_tasks, width, dtype=torch.float64, device=device)
        self.count = torch.zeros(num_tasks, dtype=torch.int64, device=device)
        self.last_seen = torch.full((num_tasks,), -1, dtype=torch.int64, device=device)

    def resume(self, widths: Tensor) -> None:
        """Fields were replaced by saved ones, of parameters with ``widths`` [P] columns."""
        self.widths, self.uneven = widths, bool(self.missed.any())

    def widen(self, widths: Tensor, theta: Tensor) -> None:
        """Add columns for parameters that began to train; they stood at ``theta`` [K] until now."""
        late = len(widths) - len(self.widths)
        self.widths = widths
        self.missed = torch.cat([self.missed, self.count[:, None].expand(-1, late)], 1)
        self.uneven = True
        old = self.ema.shape[1]
        extra = theta[old:].expand(self.ema.shape[0], -1)
        self.ema = torch.cat([self.ema, torch.zeros_like(extra, dtype=self.ema.dtype)], 1)
        self.before = torch.cat([self.before, extra], 1)
        self.after = torch.cat([self.after, extra], 1)

    def steps_since_seen(self, step: int) -> Tensor:
        """Steps from each task's last appearance to ``step``, int64 [T]; −1 for tasks never seen."""
        return torch.where(self.last_seen >= 0, step - self.last_seen, -1)

    def forget_columns(self, columns: slice) -> None:
        self.ema[:, columns] = 0

    def _correction(self) -> Tensor:
        """What the EMA is multiplied with so that it does not lean to its start, [T, 1], or [T, K] where parameters
        differ."""
        count = self.count[:, None]
        if self.uneven:
            missed = torch.repeat_interleave(self.missed, self.widths, 1, output_size=self.ema.shape[1])
            count = (count - missed).clamp(min=0)
        bias = 1 - self.decay ** count.double()
        return torch.where(count > 0, 1 / bias, 0.0)

    def read(self, gradient: Tensor, to_mean: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Products of the step's gradients with the memory, in float64, of every task and meaningless where it has no
        memory or is not in the step.

        Args:
            gradient: G [T + 1, K], the last row is rest.
            to_mean: [T], float64, what makes g_t the mean gradient ḡ_t: Σw / Σ_{rows of t} w; 0 for absent tasks.
            theta: [K], float64, the parameters the gradients were taken at.

        Returns:
            ⟨m_t, g_s⟩ [T, T + 1], and [5, T]: ‖ḡ_t‖², ⟨m_t, ḡ_t⟩, own_t, others_t and ½⟨ḡ_t − m_t, θ − θ_j⟩.
        """
        return memory_read(self.ema, self.before, self.after, gradient, theta, to_mean, self._correction())

    def write(
        self,
        gradient: Tensor,
        to_mean: Tensor,
        seen: Tensor,
        before: Tensor,
        after: Tensor,
        step: int,
        left_out: Tensor | None = None,
    ) -> Tensor:
        """Enter the step, and say what it did to every task by the memory as it was: ⟨m_t, θ_{k+1} − θ_k⟩ [T], 0 for a
        task without.

        Args:
            gradient: G [T + 1, K].
            to_mean: as read, [T].
            seen: [T] bool, the tasks that enter.
            before, after: [K], float64, the parameters around the step.
            step: its number.
            left_out: [P] bool, parameters whose memory stays as it is; ``None`` for none.
        """
        out = None
        if left_out is not None:
            out = torch.repeat_interleave(left_out, self.widths, output_size=self.ema.shape[1])
        where = (self.ema, self.before, self.after, gradient, to_mean, seen, out, before, after)
        predicted = memory_write(*where, self._correction(), self.decay)
        if left_out is not None:
            self.missed = self.missed + seen[:, None] * left_out
            self.uneven = True
        self.count = self.count + seen
        self.last_seen = torch.where(seen, step, self.last_seen)
        return predicted
