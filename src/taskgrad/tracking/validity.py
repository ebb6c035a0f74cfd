"""Why a step's report is not valid."""

from __future__ import annotations

from collections.abc import Sequence

# in the order in which they are said: the first that holds explains the others
REASONS = {
    "misfit": "the ids of a batch fitted no layer: they must be one per row of what the model is run on",
    "interrupted": "a backward pass was left by an exception and its gradients were not zeroed; call zero_grad() then",
    "cut short": (
        "an optimizer stepped and another one did not before the next batch, so that there was no one gradient that "
        "the step was taken on; track each optimizer's part with a tracker of its own (include=...), or name only the "
        "optimizer that steps every time"
    ),
    "mixed": (
        "some gradients are those of more backward passes than others: zeroed for some parameters only, or the "
        "optimizers step at different times; zero_grad() all of them together"
    ),
    "unreached": (
        "no backward pass reached a tracked layer in this step's batches, yet there are gradients: filled by hand, by "
        "backward(inputs=...), which leaves the statistics out, or by a forward outside of batch()"
    ),
    "nothing": "every parameter was left out, see tracker.coverage()",
    "vanished": (
        "the gradients were None or zero at the step: zeroed after the backward pass, the step was skipped, or another "
        "optimizer stepped than the one that track() was given"
    ),
    "infinite": "gradients are not finite",
    "changed": (
        "param.grad is not one factor times the sum over tasks: clipped by value, clipped or scaled between backward "
        "passes, filled by hand, not zeroed after the last step (also of parameters that no optimizer holds: "
        "model.zero_grad()), changed by hooks, with a penalty on most weights in it, or partly of a "
        "backward pass outside of batch()"
    ),
}


def because(flags: Sequence[bool]) -> str | None:
    """The reason, from one flag for each of ``REASONS``; ``None`` if none is set."""
    return next((reason for reason, flag in zip(REASONS.values(), flags, strict=True) if flag), None)
