"""The T×T Gram of the tasks' gradients as one gets it without taskgrad, each in a whole training step.

    T backwards            one backward pass a task through one graph, into a block [T, P]
    T sub-batches          forward and backward pass of every task's rows alone: where examples do not mix
    TorchJD autojac        ``backward`` and ``jac_to_grad``, task after task; "vmapped": all at once, its default
    TorchJD autogram       ``Engine``: the Gram of B examples' losses, summed by task; "T losses": of T losses
    Opacus hooks           per-example gradients from ``GradSampleModule``, summed by task
    Opacus ghost           per-example *norms* from ghost clipping's first pass: no cross terms, so no Gram
    vmap(grad)             per-example gradients from ``torch.func``, summed by task
    ghost dot-product      of in-run data Shapley (arXiv 2406.11011): (dY dYᵀ) ∘ (X Xᵀ) of every layer, summed by task

Each leaves the mean loss's gradient in ``grad``. TorchJD and Opacus are written as their documentation has it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .models import Setting, losses
from .training import Step

GRAM, EXAMPLES = "T×T Gram", "T×T Gram, of per-example gradients"


class _Peer(Step):
    """``product``: of the latest step, the Gram [T, T] of the tasks' gradients."""

    gives = GRAM
    product: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.sizes = [p.numel() for p in self.params]

    def parts(self, tokens: Tensor, ids: Tensor) -> list[Tensor]:
        """Every task's part of the mean loss."""
        each = losses(self.model, tokens) / len(tokens)
        return [each[ids == t].sum() for t in range(self.setting.tasks)]

    def statistics(self) -> dict[str, Tensor]:
        return {"gram": self.product}

    def sum_by_task(self, grads: Iterable[tuple[nn.Parameter, Tensor]], ids: Tensor, set_grad: bool) -> None:
        """The Gram from every parameter's gradients by example [B, *shape], and its gradient where that is not set."""
        self.product = torch.zeros(self.setting.tasks, self.setting.tasks)
        for p, g in grads:
            if len(g) != len(ids):
                raise ValueError(f"a parameter has gradients of {len(g)} examples, the batch {len(ids)}")
            tasks = g.new_zeros(self.setting.tasks, p.numel()).index_add_(0, ids, g.flatten(1))
            self.product += tasks @ tasks.mT
            if set_grad:
                p.grad = tasks.sum(0).view_as(p)


@functools.cache
def _block(tasks: int, numel: int) -> Tensor:
    """One for all variants of a process: it may be the largest thing in it."""
    return torch.empty(tasks, numel)


class TBackwards(_Peer):
    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        block = _block(self.setting.tasks, sum(self.sizes))
        parts = self.parts(tokens, ids)
        for t, part in enumerate(parts):
            grads = torch.autograd.grad(part, self.params, retain_graph=t + 1 < len(parts))
            torch.cat([g.flatten() for g in grads], out=block[t])
        self.reduce(block)

    def reduce(self, block: Tensor) -> None:
        self.product = block @ block.mT
        for p, g in zip(self.params, block.sum(0).split(self.sizes), strict=True):
            p.grad = g.view_as(p)


class SubBatches(TBackwards):
    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        block = _block(self.setting.tasks, sum(self.sizes))
        for t in range(self.setting.tasks):
            loss = losses(self.model, tokens[ids == t]).sum() / len(tokens)
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.params)], out=block[t])
        self.reduce(block)


class Autojac(_Peer):
    """One loss goes backward after the other."""

    chunk: int | None = 1  # losses at a time

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torchjd.aggregation import GramianWeightedAggregator, Weighting  # type: ignore[import-not-found]

        class Ones(Weighting):  # type: ignore[misc]
            """The plain sum; the Gram that every conflict-aware weighting would be handed is kept."""

            def forward(self, gramian: Tensor, /) -> Tensor:
                self.gramian = gramian
                return gramian.new_ones(len(gramian))

        self.weighting = Ones()
        self.aggregator = GramianWeightedAggregator(self.weighting)

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        from torchjd.autojac import backward, jac_to_grad  # type: ignore[import-not-found]

        backward(self.parts(tokens, ids), inputs=self.params, parallel_chunk_size=self.chunk)
        jac_to_grad(self.params, self.aggregator, optimize_gramian_computation=True)
        self.product = self.weighting.gramian


class AutojacVmapped(Autojac):
    largest, chunk = 3e7, None  # TorchJD's default


class Autogram(_Peer):
    gives = EXAMPLES

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torchjd.autogram import Engine  # type: ignore[import-not-found]

        self.engine = Engine(self.model, batch_dim=0)

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        each = losses(self.model, tokens) / len(tokens)
        gram = self.engine.compute_gramian(each)
        of_task = nn.functional.one_hot(ids, self.setting.tasks).to(gram.dtype)
        self.product = of_task.mT @ gram @ of_task
        each.sum().backward()


class AutogramOfTasks(_Peer):
    largest = 1e7

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torchjd.autogram import Engine

        self.engine = Engine(self.model, batch_dim=None)

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        parts = torch.stack(self.parts(tokens, ids))
        self.product = self.engine.compute_gramian(parts)
        parts.sum().backward()


class OpacusHooks(_Peer):
    gives = EXAMPLES

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from opacus.grad_sample import GradSampleModule  # type: ignore[import-not-found]

        self.model = GradSampleModule(self.model, loss_reduction="sum")  # the loss is divided by B already

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        losses(self.model, tokens).mean().backward()
        self.sum_by_task(((p, p.grad_sample) for p in self.params), ids, set_grad=False)  # type: ignore[attr-defined]
        for p in self.params:
            p.grad_sample = None  # type: ignore[attr-defined]


class OpacusGhost(_Peer):
    gives = "norms of per-example gradients only"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import (  # type: ignore[import-not-found]
            GradSampleModuleFastGradientClipping,
        )

        self.model = GradSampleModuleFastGradientClipping(self.model, loss_reduction="sum", use_ghost_clipping=True)

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        losses(self.model, tokens).mean().backward()
        self.norms = self.model.get_norm_sample()  # type: ignore[operator]

    def statistics(self) -> dict[str, Tensor]:
        return {"norms": self.norms}


class VmapGrad(_Peer):
    gives = EXAMPLES

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        named = dict(self.model.named_parameters())
        values = {name: p.detach() for name, p in named.items()}  # else the gradients have a graph of their own

        def loss(values: dict[str, Tensor], example: Tensor) -> Tensor:
            return losses(functools.partial(torch.func.functional_call, self.model, values), example[None])[0] / len(
                tokens
            )

        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no batching rule: it warns, and is as fast
            grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, tokens)
        self.sum_by_task(((p, grads[name]) for name, p in named.items()), ids, set_grad=True)


class GhostDot(_Peer):
    """Rows sorted by task. A weight of two layers would need the products between them, which the method leaves out."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        for module in self.model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
                module.register_forward_hook(self._called)

    def micro_batch(self, tokens: Tensor, ids: Tensor) -> None:
        self.ids, self.product = ids, torch.zeros(self.setting.tasks, self.setting.tasks)
        super().micro_batch(tokens, ids)
        self.product = self.product + self.product.triu(1).mT

    def _called(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if len(output) != len(self.ids):
            raise ValueError(f"a layer was given {len(output)} rows, the batch has {len(self.ids)} examples")
        output.register_hook(functools.partial(self._pair, module, args[0].detach()))

    def _pair(self, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        task_of_row = self.ids.repeat_interleave(grad[0, ..., 0].numel())
        dy = grad.flatten(0, -2)
        if isinstance(module, nn.Embedding):
            self._rows(dy, x.flatten(), task_of_row)
        elif isinstance(module, nn.Linear):
            self._rows(dy, x.flatten(0, -2), task_of_row)
            if module.bias is not None:
                self._sums(dy, task_of_row)
        elif isinstance(module, nn.LayerNorm):
            normed = nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
            self._sums(dy * normed.flatten(0, -2), task_of_row)
            self._sums(dy, task_of_row)

    def _rows(self, dy: Tensor, x: Tensor, task_of_row: Tensor) -> None:
        """Products of all pairs of rows, one task with itself and the later ones at a time."""
        start = 0
        for t, count in enumerate(torch.bincount(task_of_row, minlength=self.setting.tasks).tolist()):
            own = slice(start, start + count)
            pairs = dy[own] @ dy[start:].mT
            pairs *= x[own] @ x[start:].mT if x.dim() == 2 else x[own, None] == x[start:]
            self.product[t].index_add_(0, task_of_row[start:], pairs.sum(0))
            start += count

    def _sums(self, values: Tensor, task_of_row: Tensor) -> None:
        """What is linear in the rows: the tasks' sums, multiplied."""
        sums = values.new_zeros(self.setting.tasks, values.shape[1]).index_add_(0, task_of_row, values)
        self.product += (sums @ sums.mT).triu()


def peers() -> dict[str, type[Step]]:
    """Makers by name, of those whose package is installed."""
    found: dict[str, type[Step]] = {"T backwards": TBackwards, "T sub-batches": SubBatches}
    if find_spec("torchjd"):
        found["TorchJD autojac"] = Autojac
        found["TorchJD autojac, vmapped"] = AutojacVmapped
        found["TorchJD autogram"] = Autogram
        found["TorchJD autogram, T losses"] = AutogramOfTasks
    if find_spec("opacus"):
        found |= {"Opacus hooks": OpacusHooks, "Opacus ghost": OpacusGhost}
    return found | {"vmap(grad)": VmapGrad, "ghost dot-product": GhostDot}
