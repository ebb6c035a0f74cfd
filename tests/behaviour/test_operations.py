"""How many operations tracking adds to a step of a GPT-2: on a GPU launches are what it costs."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import taskgrad as tg

transformers = pytest.importorskip("transformers")

TASKS = [str(t) for t in range(8)]


class Phases(TorchDispatchMode):
    """Operations that Python and autograd issue, by the phase of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[self.phase] += 1
        return func(*args, **(kwargs or {}))


def count(mode: str | None) -> Counter[str]:
    """Of a step after the first ones, which are checked; twelve layers as GPT-2 has, and narrow."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=12, n_head=2, n_embd=64, vocab_size=128, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = None if mode is None else tg.track(model, TASKS, optimizer, mode=mode)  # type: ignore[arg-type]
    tokens, ids = torch.randint(0, 128, (8, 16)), torch.arange(8)
    counted = Phases()
    for step in range(5):
        with counted if step == 4 else contextlib.nullcontext():
            counted.phase = "passes"
            with contextlib.nullcontext() if tracker is None else tracker.batch(ids):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            counted.phase = "step"
            optimizer.step()
        optimizer.zero_grad()
    return counted.counts


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "passes", "step"), [("sketch", 870, 90), ("exact_gram", 1010, 330)])
def test_operations_that_tracking_adds(mode: str, passes: int, step: int) -> None:
    """148 parameters; reading and closing the step is ``step``. More than these is a decision, not an accident."""
    plain, tracked = count(None), count(mode)
    assert tracked["passes"] - plain["passes"] <= passes
    assert tracked["step"] - plain["step"] <= step
