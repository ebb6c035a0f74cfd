"""Samplers whose task mix follows the training run: how they are built, and what a loader draws from them.

What they tell is in ``views``, what they are told in ``counting``, how they are saved in ``saving``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Generic, TypeVar

from torch.utils.data import Sampler

from .._ranks import world_size
from .adapted import AdaptedPolicy
from .data.arguments import data_of
from .data.shares import TaskShares
from .inputs import count_of
from .loading import loaders
from .loading.drawing import Drawing, Examples
from .options import Options, takes
from .policies import OverwriteBoost
from .saving import Saving
from .settings import Settings

_Item = TypeVar("_Item")


class _Adaptive(Saving, Sampler[_Item], Generic[_Item]):
    """Everything but the form of the items; the arguments are those of ``AdaptiveBatchSampler``."""

    @takes(Options)
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.policy = OverwriteBoost() if options.policy is None else options.policy
        policy = AdaptedPolicy(self.policy)
        self._index = data_of(options.task_of_example, options.shares, options.tasks, options.dataset)
        self._begin(Settings.build(self._index, policy, options))

    def set_epoch(self, epoch: int) -> None:
        """For loaders that call it: changes nothing. They count from 0 in every process, the stream goes on; to run an
        epoch again there is ``rewind``."""
        count_of("epoch", epoch, 0)

    def rewind(self, epoch: int) -> None:
        """Let the next ``iter()`` run through ``epoch`` again, from its start; what came after it follows again too.

        Reports on batches that were counted before do not decide again. Raises ValueError for an epoch that has not
        begun, or is from before ``rebase``.
        """
        self._stream.rewind(count_of("epoch", epoch, 0))

    def _drawing(self) -> Drawing:
        shards = loaders.shards()
        if shards > 1:
            raise RuntimeError(
                f"Accelerate is about to spread the batches of this sampler over {shards} processes, each of which "
                "would count a few of them only: build the sampler with num_replicas and rank and leave its loader out "
                "of accelerator.prepare(), or use taskgrad.integrations.accelerate.prepare(accelerator, tracker, "
                "sampler, loader) in its place"
            )
        ranks = world_size()
        if ranks > 1 and not self._settings.sharded and not self._warned:
            self._warned = True
            warnings.warn(
                f"taskgrad: {ranks} ranks are up, and all of them draw the same batches from this sampler: build it "
                f"with num_replicas={ranks}, rank=torch.distributed.get_rank() and batch_size per rank (with "
                "num_replicas=1, rank=0 where they are to train on the same ones)",
                stacklevel=3,
            )
        return Drawing(self._stream, self._draw)

    def _draw(self, k: int) -> list[int]:
        self._following.hand_over(k - 1 - self._settings.delay)
        self._decisions.enter_before(k + 1)
        if isinstance(self._index, TaskShares):
            tasks: list[int] = self._ids(k, self.rank).tolist()
            return tasks
        return self._index.examples(self._decisions.engine, k, self.rank)

    def __len__(self) -> int:
        return self._settings.length


class AdaptiveBatchSampler(_Adaptive[list[int]]):
    """Yields lists of data set indices, sorted by task, for ``DataLoader(dataset, batch_sampler=...)``.

    Every ``iter()`` yields ``len`` batches, from the first one not consumed, whether the last epoch was run through,
    left early, or only looked into. Consumed is what ``follow`` or ``update`` counts, without them what was drawn.

    Args:
        task_of_example: one task per example of the data set: indices into ``tasks`` (list, array or tensor of
            integers) or names. Where each task lies in one piece, a mapping instead: name -> number of examples (one
            task after the other, as in a ConcatDataset) or name -> range(start, stop). For very large data sets a
            ``TaskIndex``.
        batch_size: examples in every batch, of one rank.
        policy: decides the mix from reports (``taskgrad.policies``); ``OverwriteBoost()`` by default.
        seed: with the data's sizes, the ledger and the guards it determines every batch.
        shares: instead of ``task_of_example``, for streams: task -> its natural share of the examples. Tasks are drawn
            then, not examples: batches hold task indices, there are no passes, and ``num_batches`` must be given.
        tasks: names, in the order the tracker has them. Without it they are those of a mapping or a ``TaskIndex``,
            else tasks are numbered; the tracker followed, or the first report, names them.
        dataset: only its length is read, to check ``task_of_example`` against it.
        num_batches: batches in an epoch, by default ceil(examples / (batch_size * num_replicas)). Every batch is full.
        num_replicas, rank: as of a ``DistributedSampler``, but never read from a process group: of every global batch
            this sampler draws the part of ``rank``: rows of it that no other rank gets, together all of them, and
            over the run about as many of every task as the others' (see ``sampling.engine.replicas``).
        update_every: weights change only at batches that are multiples of it.
        delay: batches between a report and its effect, at least: as many as the loader may draw ahead
            (``num_workers * prefetch_factor``; Accelerate one more, and times the processes). 64 by default; in a run
            whose ``horizon`` is short a sixteenth of it, at least 8.
        horizon: batches of the whole run, for policies with a schedule.
        importance: how much each task counts, positive, for policies that use one (``OverwriteBoost``; the published
            baselines do not): a mapping (1 for the others), one per task, or a number for all.
        critical: tasks that ``OverwriteBoost`` never gives up on, however little a raise has bought so far.
        budget: the largest share of a batch that may be diverted from the natural mix.
        probe_every: a task unseen for that many batches takes a slot.
        min_weight, max_weight: bounds on each task's weight: a number for all, a mapping or one per task.
        max_change: the largest factor between a task's weight and its predecessor.
        max_epochs: passes after which a task gets no more; its share goes to the others in proportion.
        pinned: tasks that the policy cannot raise: with a budget they give way like the natural mix does, without
            one they keep their natural share.
        resume: after ``load_state_dict`` in the middle of an epoch, ``"seek"`` continues at the first batch not
            consumed; ``"replay"`` starts that epoch again, for loaders that draw it again and skip (transformers'
            Trainer).

    Guards left at None are the policy's own defaults (``guard_defaults``), or off. Where they collide, the stronger
    wins: max_epochs, probe_every, min_weight, budget, max_change, policy. Raises TypeError or ValueError.
    """

    def __iter__(self) -> Iterator[list[int]]:
        return self._drawing()


class AdaptiveSampler(_Adaptive[int]):
    """The same stream, one index at a time, for loaders that want a ``sampler`` and batch by themselves.

    They must batch by the same ``batch_size``; ``len`` counts examples. Everything else is as in
    ``AdaptiveBatchSampler``, and still counted in batches.
    """

    def __iter__(self) -> Iterator[int]:
        return Examples(self._drawing(), self.batch_size)

    def __len__(self) -> int:
        return self._settings.length * self.batch_size
