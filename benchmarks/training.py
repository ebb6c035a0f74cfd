"""A model in training on a CPU: plain, and tracked in the ways that a step is priced in."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

import taskgrad as tg

from .models import Decoder, Setting, losses


class Step:
    """A decoder and its optimizer; calling it is a whole step. All of a setting start from the same weights.

    Rows are sorted by task, as ``AdaptiveBatchSampler`` emits them, or ``shuffled``; ``micro`` batches make a step,
    each with rows of all tasks. The learning rate is 0 until ``train``: the first steps' Gram is that of the start.

    Attributes:
        every: steps in which everything happens that a step may do.
        params: the model's parameters.
        gives: what one knows of the tasks' gradients after it.
        largest: T · P beyond which nobody waits for it.
        settling: first steps that do more than later ones.
    """

    gives = "the gradient"
    largest = float("inf")
    settling = 1

    def __init__(self, setting: Setting, *, micro: int = 1, shuffled: bool = False, clip: bool = False) -> None:
        self.setting, self.clip, self.every = setting, clip, 1
        torch.manual_seed(0)
        self.model: nn.Module = Decoder(setting)
        self.params = list(self.model.parameters())
        tokens, ids = data(setting)
        if shuffled:
            order = torch.randperm(len(ids))
            tokens, ids = tokens[order], ids[order]
        self.batches = [(tokens[i::micro], ids[i::micro]) for i in range(micro)]
        self.optimizer = torch.optim.AdamW(self.params, lr=0.0)

    def __call__(self) -> None:
        self.backward()
        self.close()

    def backward(self) -> None:
        """Fill ``grad`` of every parameter."""
        for tokens, ids in self.batches:
            self.micro_batch(tokens, ids)

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        (losses(self.model, tokens).mean() / len(self.batches)).backward()

    def close(self) -> None:
        if self.clip:
            nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        """Leave the first steps behind, on short sequences, which take less time."""
        whole = self.batches
        self.batches = [(tokens[:, : 2 + tokens.shape[1] // 8], ids) for tokens, ids in whole]
        for _ in range(self.settling * self.every):
            self()
        self.batches = whole

    def train(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4

    def statistics(self) -> dict[str, Tensor]:
        """Of the latest step that took any: "gram" [T, T] of the tasks' gradients, or "norms" [B] of the examples'."""
        return {}


class Tracked(Step):
    """``outside``: of ``batch()``, after the first steps."""

    settling = 4  # rows, sums and coverage are checked in them

    def __init__(
        self,
        setting: Setting,
        mode: Literal["sketch", "exact_gram", "exact"],
        *,
        every: int = 1,
        outside: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(setting, **options)
        self.every, self.outside, self.inside = every, outside, True
        self.gives = {
            "sketch": "sketched T×T Gram, signal, effects",
            "exact_gram": "T×T Gram; sketched signal, effects",
            "exact": "T×T Gram, signal, effects, T gradients",
        }[mode]
        self.tracker = tg.track(
            self.model, [str(t) for t in range(setting.tasks)], self.optimizer, mode=mode, every=every
        )

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        if not self.inside:
            return super().micro_batch(tokens, ids)
        with self.tracker.batch(ids) as batch:
            each = losses(self.model, tokens)
            batch.losses(each)
            (each.mean() / len(self.batches)).backward()

    def close(self) -> None:
        super().close()
        if self.inside:
            self.tracker.report()

    def settle(self) -> None:
        super().settle()
        self.inside = not self.outside

    def statistics(self) -> dict[str, Tensor]:
        if not self.inside:
            return {}
        report = self.tracker.report(wait=True)
        if not report.valid or self.tracker.coverage().unattributed:
            raise ArithmeticError(f"step {report.step}: valid {report.valid}, {self.tracker.coverage()}")
        return {"gram": report.gram}


def data(setting: Setting) -> tuple[Tensor, Tensor]:
    """Random tokens [B, L + 1], and the examples' tasks [B] in equal parts, in order."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, setting.vocab, (setting.batch, setting.length + 1), generator=generator)
    return tokens, torch.arange(setting.batch) * setting.tasks // setting.batch
