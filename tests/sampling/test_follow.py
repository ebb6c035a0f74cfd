"""A sampler that follows a tracker: what counts as a batch, which reports decide, and when."""

from __future__ import annotations

import copy
import hashlib
import itertools
import queue
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import taskgrad as tg
from taskgrad.sampling import AdaptiveBatchSampler
from taskgrad.sampling.policies import DoGE, Policy, PolicyState, Uniform
from taskgrad.tracking.tracker import TaskGradTracker
from tests.sampling.helpers import NAMES, TASK_OF_EXAMPLE

Batch = tuple[Tensor, Tensor]


class Seen(Policy):
    """Keeps what it was given; moves with every report."""

    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.states: list[PolicyState] = []

    def weights(self, report: Any, state: PolicyState) -> Any:
        self.reports.append(report)
        self.states.append(state)
        return np.random.default_rng(len(self.reports)).dirichlet(np.ones(4))


class Restless(Policy):
    """Other weights after every report, from all reports so far."""

    def weights(self, report: Any, state: PolicyState) -> Any:
        text = f"{state.memory.get('past', '')}/{report.norm.tolist()}/{state.step}/{state.weights.tolist()}"
        state.memory["past"] = hashlib.sha256(text.encode()).hexdigest()
        return np.random.default_rng(int(state.memory["past"][:12], 16)).dirichlet(np.ones(4))


class Loop:
    """A model, its tracker, and a sampler that follows it."""

    def __init__(self, policy: Any = None, follow: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.tracker = tg.track(self.model, NAMES, self.optimizer, verify=False)
        options = {"batch_size": 16, "num_batches": 20, "update_every": 1, "delay": 0, **options}
        self.policy = Seen() if policy is None else policy
        self.sampler = AdaptiveBatchSampler(TASK_OF_EXAMPLE, policy=self.policy, **options)
        if follow:
            self.sampler.follow(self.tracker)
        self.x = torch.randn(len(TASK_OF_EXAMPLE), 3)

    def batches(self) -> Iterator[Batch]:
        for rows in self.sampler:
            yield self.x[rows], torch.from_numpy(TASK_OF_EXAMPLE[rows])

    def loss(self, x: Tensor) -> Tensor:
        return (self.model(x).squeeze(1) - x.sum(1)).square().mean()

    def step(self, batch: Batch, **options: Any) -> None:
        with self.tracker.batch(batch[1], **options):
            self.loss(batch[0]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_every_batch_counts_and_every_report_decides() -> None:
    loop = Loop()
    for k, batch in enumerate(loop.batches()):
        loop.step(batch)
        assert loop.sampler.consumed == k + 1
    assert [state.step for state in loop.policy.states] == list(range(20))
    assert [report.step for report in loop.policy.reports] == list(range(1, 21))
    assert [entry.cause for entry in loop.sampler.ledger][1:3] == ["report on batch 0", "report on batch 1"]
    assert loop.sampler.tasks == NAMES
    assert {state.lr for state in loop.policy.states} == {0.1}


def test_the_same_stream_as_by_hand() -> None:
    followed, by_hand = Loop(delay=3, update_every=2), Loop(delay=3, update_every=2, follow=False)
    rows: list[list[float]] = [[], []]
    for mine, loop in zip(rows, (followed, by_hand), strict=True):
        for batch in loop.batches():
            mine.append(float(batch[0].sum()))
            loop.step(batch)
            if loop is by_hand:
                loop.sampler.update(loop.tracker.report(), lr=0.1)
    assert rows[0] == rows[1]
    assert followed.sampler.ledger.digest() == by_hand.sampler.ledger.digest()
    assert len(followed.sampler.ledger) > 5


def test_accumulation_counts_batches_and_reports_belong_to_the_last_one() -> None:
    loop = Loop()
    for k, (x, ids) in enumerate(loop.batches()):
        with loop.tracker.batch(ids):
            (loop.loss(x) / 4).backward()
        if k % 4 == 3:
            loop.optimizer.step()
            loop.optimizer.zero_grad()
    assert loop.sampler.consumed == 20
    assert [state.step for state in loop.policy.states] == [3, 7, 11, 15, 19]


def test_an_exception_inside_counts_the_batch() -> None:
    loop = Loop()
    for k, batch in enumerate(loop.batches()):
        if k % 3 == 0:
            with pytest.raises(ZeroDivisionError), loop.tracker.batch(batch[1]):
                loop.loss(batch[0])
                _ = 1 // 0
        else:
            loop.step(batch)
        assert loop.sampler.consumed == k + 1
    assert [state.step for state in loop.policy.states] == [k for k in range(20) if k % 3]


@torch.no_grad()
def evaluated_around(loop: Loop, batch: Batch) -> None:
    with loop.tracker.batch(batch[1]):
        loop.model(batch[0])


def evaluated_inside(loop: Loop, batch: Batch) -> None:
    with loop.tracker.batch(batch[1]), torch.no_grad():
        loop.model(batch[0])
        loop.model(batch[0])


def evaluated_in_inference_mode(loop: Loop, batch: Batch) -> None:
    with torch.inference_mode(), loop.tracker.batch(batch[1]) as entered:
        entered.losses((loop.model(batch[0]).squeeze(1)).square())


def trained_in_evaluation_mode(loop: Loop, batch: Batch) -> None:
    loop.model.eval()
    with loop.tracker.batch(batch[1]):
        loop.loss(batch[0]).backward()


def without_a_forward(loop: Loop, batch: Batch) -> None:
    with loop.tracker.batch(batch[1]):
        pass


def with_a_forward_of_each_kind(loop: Loop, batch: Batch) -> None:
    with loop.tracker.batch(batch[1]):
        with torch.no_grad():
            loop.model(batch[0])
        loop.loss(batch[0]).backward()


def a_further_one(loop: Loop, batch: Batch) -> None:
    with loop.tracker.batch(batch[1], advance=False):
        loop.loss(batch[0]).backward()


def compiled_evaluation(loop: Loop, batch: Batch) -> None:
    compiled = torch.compile(loop.model, backend="aot_eager", fullgraph=True)
    with loop.tracker.batch(batch[1]), torch.no_grad():
        compiled(batch[0])


def compiled_training(loop: Loop, batch: Batch) -> None:
    compiled = torch.compile(loop.model, backend="aot_eager", fullgraph=True)
    with loop.tracker.batch(batch[1]):
        compiled(batch[0]).square().mean().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch compiles so
@pytest.mark.parametrize(
    "inside, counts",
    [
        (evaluated_around, 0),
        (evaluated_inside, 0),
        (evaluated_in_inference_mode, 0),
        (trained_in_evaluation_mode, 1),
        (without_a_forward, 1),
        (with_a_forward_of_each_kind, 1),
        (a_further_one, 0),
        (compiled_evaluation, 0),
        (compiled_training, 1),
    ],
)
def test_what_counts(inside: Callable[[Loop, Batch], None], counts: int) -> None:
    loop = Loop()
    batches = loop.batches()
    batch = next(batches)
    for _ in range(2):
        inside(loop, batch)
        next(batches)
    assert loop.sampler.consumed == 2 * counts


def test_several_batches_on_one_batch_of_the_loader() -> None:
    """Two optimizers in turn, as in a GAN: both reports belong to the batch of the loader."""
    loop = Loop(delay=1)
    for batch in loop.batches():
        loop.step(batch)
        loop.step(batch, advance=False)
    assert loop.sampler.consumed == 20
    assert [state.step for state in loop.policy.states] == [k for k in range(20) for _ in range(2)]


def test_two_passes_of_one_step() -> None:
    """As in SAM: the second gradient is taken elsewhere, at the same batch."""
    loop = Loop()
    for x, ids in loop.batches():
        with loop.tracker.batch(ids):
            loop.loss(x).backward()
        loop.optimizer.zero_grad()
        with loop.tracker.batch(ids, advance=False):
            loop.loss(x).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert loop.sampler.consumed == 20
    assert [state.step for state in loop.policy.states] == list(range(20))


def test_more_batches_than_were_drawn_are_not_counted_and_told_once() -> None:
    loop = Loop()
    with pytest.warns(UserWarning, match=r"left more often than batches were drawn.*advance=False") as said:
        for batch in loop.batches():
            loop.step(batch)
            loop.step(batch)
    assert loop.sampler.consumed == 20 and len(said) == 1


def test_loader_batches_without_one_are_counted_by_advance() -> None:
    loop = Loop()
    for k, batch in enumerate(loop.batches()):
        if k % 2:
            loop.sampler.advance()
        else:
            loop.step(batch)
    assert loop.sampler.consumed == 20
    with pytest.raises(ValueError, match=r"advance\(1\) goes beyond what was drawn: 20 batches are counted, and 20"):
        loop.sampler.advance()
    for wrong in (-1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="batches must be"):
            loop.sampler.advance(wrong)  # type: ignore[arg-type]


def test_an_epoch_that_was_not_counted_whole_is_told() -> None:
    loop = Loop(delay=20)
    with pytest.warns(UserWarning, match="tasks of 3 batches"):
        for k, batch in enumerate(loop.batches()):
            if k % 2:
                loop.step(batch)
    with pytest.warns(UserWarning, match=r"run through, but 10 of its batches were not counted.*advance"):
        next(iter(loop.sampler))


def test_steps_that_do_not_come_and_invalid_reports_decide_nothing() -> None:
    loop = Loop()
    for k, (x, ids) in enumerate(loop.batches()):
        with loop.tracker.batch(ids):
            (loop.loss(x) * (float("nan") if k % 5 == 4 else 1.0)).backward()
        if k % 5 == 4:
            for p in loop.model.parameters():
                p.grad = None if k == 4 else p.grad  # one is skipped, the others step on NaN
        if k != 4:
            loop.optimizer.step()
        loop.optimizer.zero_grad()
        if k == 9:
            break
    assert loop.sampler.consumed == 10
    assert [state.step for state in loop.policy.states] == [k for k in range(9) if k != 4]


def test_a_late_change_moves_and_is_told_once() -> None:
    loop = Loop(delay=1, update_every=3)
    ahead = iter(DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=loop.sampler, num_workers=2))  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"due at batch 3, but 5 batches were drawn.*delay=4 or more") as said:
        for rows in ahead:
            loop.step((loop.x[rows], torch.from_numpy(TASK_OF_EXAMPLE[rows])))
    assert len(said) == 1 and loop.sampler.consumed == 20
    causes = [(entry.effective_at, entry.cause) for entry in loop.sampler.ledger][1:]
    assert causes[0] == (6, "report on batch 1, late: due at 3")
    assert all(at % 3 == 0 for at, _ in causes)


@pytest.mark.slow
def test_the_defaults_take_six_workers_without_a_word() -> None:
    loop = Loop(delay=None, update_every=10, num_batches=160)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This DataLoader will create 6 worker processes")
        warnings.filterwarnings("ignore", ".*multi-threaded, use of fork")
        loader = DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=loop.sampler, num_workers=6)  # type: ignore[arg-type]
        for rows in loader:
            loop.step((loop.x[rows], torch.from_numpy(TASK_OF_EXAMPLE[rows])))
    assert loop.sampler.consumed == 160
    assert loop.sampler.ledger[1].cause == "report on batch 5" and loop.sampler.ledger[1].effective_at == 70


def test_a_short_horizon_shortens_the_delay() -> None:
    for horizon, delay in ((None, 64), (10_000, 64), (640, 40), (100, 8), (10, 8)):
        loop = Loop(delay=None, horizon=horizon)
        assert loop.sampler._settings.delay == delay


class Slow:
    """A delivery that is there when chance, or somebody who waits, wants it."""

    def __init__(self, delivery: Any, chance: np.random.Generator, waited: list[int]) -> None:
        self._delivery, self._chance, self._waited = delivery, chance, waited

    @property
    def arrived(self) -> bool:
        return bool(self._chance.random() < 0.1)

    @property
    def report(self) -> Any:
        self._waited.append(self._delivery.step)
        return self._delivery.report


def _slowly(closed: Any, chance: np.random.Generator, waited: list[int], delivery: Any, *rest: Any) -> None:
    closed(Slow(delivery, chance, waited), *rest)


def test_what_is_handed_over_late_by_the_device_changes_nothing() -> None:
    """Copies that arrive whenever they do: the ledger is the same, and a draw waits for those it needs only."""
    straight = Loop(policy=Restless(), delay=4, update_every=2)
    for batch in straight.batches():
        straight.step(batch)
    for seed in range(5):
        loop = Loop(policy=Restless(), delay=4, update_every=2)
        chance = np.random.default_rng(seed)
        waited: list[int] = []
        closed = loop.sampler._following.closed
        loop.sampler._following.closed = partial(_slowly, closed, chance, waited)  # type: ignore[method-assign]
        for k, batch in enumerate(loop.batches()):
            assert len(waited) >= k - 4  # batches up to k - 1 - delay have decided about batch k
            loop.step(batch)
            if k == 11:
                loop.sampler.observe({"text": 1.0})
        assert loop.sampler.state_dict()["memory"] == straight.sampler.state_dict()["memory"]  # waits for all
        assert loop.sampler.ledger.digest() == straight.sampler.ledger.digest()
        assert waited == list(range(1, 21))


def test_evaluation_losses_count_from_the_next_report_on() -> None:
    loop = Loop()
    for k, batch in enumerate(loop.batches()):
        if k == 7:
            loop.sampler.observe({"legal": 2.0})
        loop.step(batch)
    assert [state.eval_losses is not None for state in loop.policy.states] == [k >= 7 for k in range(20)]


def test_the_learning_rate_is_the_one_of_the_step() -> None:
    loop = Loop()
    schedule = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer, 0.5)
    for batch in loop.batches():
        loop.step(batch)
        schedule.step()
    assert [state.lr for state in loop.policy.states] == [0.1 * 0.5**k for k in range(20)]
    moving = Loop(policy=DoGE())
    for group in moving.optimizer.param_groups:
        group["lr"] = torch.tensor(0.1)
    for batch in moving.batches():
        moving.step(batch)
    assert len(moving.sampler.ledger) > 1


def test_a_policy_that_reads_nothing_is_asked_nothing() -> None:
    loop = Loop(policy=Uniform())
    for batch in loop.batches():
        loop.step(batch)
    assert loop.sampler.consumed == 20 and len(loop.sampler.ledger) == 1


def test_looking_before_training_costs_nothing() -> None:
    loop, straight = Loop(delay=4), Loop(delay=4)
    first = next(loop.batches())
    next(loop.batches())
    rows = [[float(b[0].sum()) for b in mine.batches() if mine.step(b) is None] for mine in (loop, straight)]
    assert rows[0] == rows[1] and float(first[0].sum()) == rows[0][0]
    late = Loop(follow=False, delay=4)
    peek = [next(late.batches())[0].sum().item(), next(late.batches())[0].sum().item()]
    late.sampler.follow(late.tracker)
    assert late.sampler.consumed == 0 and peek[0] == rows[0][0]
    assert [float(batch[0].sum()) for batch in late.batches() if late.step(batch) is None] == rows[0]


def test_an_epoch_run_through_before_following_counts() -> None:
    loop = Loop(follow=False)
    for batch in loop.batches():
        loop.step(batch)
    loop.sampler.follow(loop.tracker)
    assert loop.sampler.consumed == 20


def test_update_is_refused_while_following() -> None:
    loop = Loop()
    loop.step(next(loop.batches()))
    with pytest.raises(RuntimeError, match=r"follows a tracker.*leave update\(\) out"):
        loop.sampler.update(loop.tracker.report())
    assert loop.sampler.consumed == 1


def test_following_twice_another_tracker_and_none() -> None:
    loop, other = Loop(), Loop(follow=False)
    loop.sampler.follow(loop.tracker)
    for batch in loop.batches():
        loop.step(batch)
        if loop.sampler.consumed == 5:
            break
    loop.sampler.follow(other.tracker)
    for x, ids in loop.batches():
        other.step((x, ids))
        loop.step((x, ids))  # no longer heard
    assert loop.sampler.consumed == 25 and len(loop.policy.reports) == 25
    for wrong in (None, loop.model, "tracker"):
        with pytest.raises(TypeError, match=r"tracker must be what taskgrad\.track returned"):
            loop.sampler.follow(wrong)
    tracker = tg.track(nn.Linear(2, 2), ["a", "b"])
    with pytest.raises(ValueError, match=r"the tracker is on the tasks \['a', 'b'\].*same tasks in the same order"):
        loop.sampler.follow(tracker)


def test_a_tracker_tells_one_sampler() -> None:
    loop = Loop()
    second = AdaptiveBatchSampler(TASK_OF_EXAMPLE, 16, Seen(), num_batches=20, delay=0)
    with pytest.warns(UserWarning, match="another sampler follows this sampler's tracker now"):
        second.follow(loop.tracker)
    for rows in second:
        loop.step((loop.x[rows], torch.from_numpy(TASK_OF_EXAMPLE[rows])))
    assert second.consumed == 20 and loop.sampler.consumed == 0
    assert len(list(loop.sampler)) == loop.sampler.consumed == 20  # what is drawn, from now on


def test_a_removed_tracker_tells_nothing_and_can_be_replaced() -> None:
    loop = Loop()
    loop.step(next(loop.batches()))
    loop.tracker.remove()
    loop.tracker.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        loop.sampler.follow(loop.tracker)
    loop.tracker = tg.track(loop.model, NAMES, loop.optimizer, verify=False)
    loop.sampler.follow(loop.tracker)
    loop.step(next(loop.batches()))
    assert loop.sampler.consumed == 2 and [state.step for state in loop.policy.states] == [0, 1]


def test_batches_that_are_not_those_counted_are_told() -> None:
    loop = Loop(policy=Restless(), delay=4)
    batches = loop.batches()
    next(batches)
    with pytest.warns(UserWarning, match="tasks of 3 batches trained on are not those.*advance"):
        for batch in batches:
            loop.step(batch)
    quiet = Loop(policy=Restless())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, ids in quiet.batches():
            order = torch.randperm(16)
            quiet.step((x[order], ids[order]))
        for x, ids in quiet.batches():  # batches of one's own
            quiet.step((torch.cat([x, x]), torch.cat([ids, ids])))
        for x, ids in quiet.batches():  # rows of no task
            quiet.step((x, torch.where(torch.arange(16) < 3, -1, ids)))


def test_ids_per_token_count_too() -> None:
    loop = Loop()
    for x, ids in loop.batches():
        with loop.tracker.batch(ids[:, None].expand(-1, 5).contiguous()):
            loop.model(x[:, None].expand(-1, 5, -1)).square().mean().backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert loop.sampler.consumed == 20 and len(loop.policy.reports) == 20


def test_resumed_together() -> None:
    straight, policy = Loop(policy=Restless(), delay=2), Restless()
    rows = [float(batch[0].sum()) for _ in range(2) for batch in straight.batches() if straight.step(batch) is None]
    first = Loop(policy=policy, delay=2)
    found = []
    for batch in first.batches():
        found.append(float(batch[0].sum()))
        first.step(batch)
        if len(found) == 13:
            break
    second = Loop(policy=Restless(), delay=2)
    second.tracker.load_state_dict(first.tracker.state_dict())
    second.sampler.load_state_dict(first.sampler.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    assert second.sampler.consumed == 13
    for _ in range(2):
        found += [float(batch[0].sum()) for batch in second.batches() if second.step(batch) is None]
    assert found == rows
    assert second.sampler.ledger.digest() == straight.sampler.ledger.digest()


def test_what_a_tracker_is_told_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a listener nothing is called; the model's own hooks stay as they were."""
    loop = Loop(follow=False)
    monkeypatch.setattr(TaskGradTracker, "_closed", None)
    loop.step(next(loop.batches()))
    assert loop.tracker.report().valid


def test_a_loader_may_draw_in_a_thread_of_its_own() -> None:
    straight = Loop(policy=Restless(), delay=12, num_batches=100)
    rows = [float(batch[0].sum()) for batch in straight.batches() if straight.step(batch) is None]
    loop = Loop(policy=Restless(), delay=12, num_batches=100)
    drawn: queue.Queue[Batch | None] = queue.Queue(maxsize=10)

    def draw() -> None:
        for batch in loop.batches():
            drawn.put(batch)
        drawn.put(None)

    thread = threading.Thread(target=draw)
    thread.start()
    found = [float(batch[0].sum()) for batch in iter(drawn.get, None) if loop.step(batch) is None]
    thread.join()
    assert found == rows and loop.sampler.consumed == 100
    assert loop.sampler.ledger.digest() == straight.sampler.ledger.digest() and len(loop.sampler.ledger) > 20


def drawn(loop: Loop, train: Callable[[Loop, Batch], None] | None = None) -> list[float]:
    """One iteration, trained on; a number for every batch."""
    out = []
    for batch in loop.batches():
        out.append(float(batch[0].sum()))
        (Loop.step if train is None else train)(loop, batch)
    return out


def straight_epochs(count: int, **options: Any) -> list[list[float]]:
    loop = Loop(policy=Restless(), **{"delay": 4, **options})
    return [drawn(loop) for _ in range(count)]


def test_the_stream_goes_on_where_the_tracker_is_removed() -> None:
    loop = Loop(policy=Restless(), delay=4)
    first = drawn(loop)
    loop.tracker.remove()
    others = [drawn(loop, lambda loop, batch: loop.loss(batch[0]).backward()) for _ in range(2)]
    assert len({tuple(rows) for rows in (first, *others)}) == 3
    assert loop.sampler.consumed == 60


def test_a_follow_that_fails_changes_nothing() -> None:
    loop, other = Loop(), Loop(follow=False)
    other.tracker.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        loop.sampler.follow(other.tracker)
    drawn(loop)
    assert loop.sampler.consumed == 20 == len(loop.policy.reports)


def test_a_loaded_or_copied_sampler_that_nobody_counts_for_goes_on_and_is_told() -> None:
    rows = straight_epochs(1)
    loop = Loop(policy=Restless(), delay=4)
    assert drawn(loop) == rows[0]
    loaded, copied = (Loop(policy=Restless(), delay=4, follow=False) for _ in range(2))
    loaded.sampler.load_state_dict(loop.sampler.state_dict())
    copied.sampler = copy.deepcopy(loop.sampler)
    for other in (loaded, copied):
        first = drawn(other)
        with pytest.warns(UserWarning, match=r"nobody counted its batches.*follow\(tracker\), also after loading"):
            second = drawn(other)
        assert first != second and other.sampler.consumed == 60


def test_a_tracker_of_another_model_is_told_in_the_third_epoch() -> None:
    loop, other = Loop(follow=False), Loop(follow=False)
    loop.sampler.follow(other.tracker)
    assert drawn(loop) == drawn(loop)
    with pytest.warns(UserWarning, match="none of their batches counted.*not that of the model that trains"):
        drawn(loop)


def test_looking_at_everything_is_no_reason_to_warn() -> None:
    """Statistics before training, evaluation on the training loader after every epoch, a look in mid-epoch."""
    straight = straight_epochs(3, delay=30)
    loop = Loop(policy=Restless(), delay=30)
    list(loop.sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(3):
            rows = []
            for k, batch in enumerate(loop.batches()):
                rows.append(float(batch[0].sum()))
                loop.step(batch)
                if k == 7 and epoch == 1:
                    list(loop.sampler)
            assert rows == straight[epoch] and loop.sampler.epoch == epoch
            for batch in loop.batches():
                evaluated_around(loop, batch)
    assert loop.sampler.consumed == 60


def reentrant(loop: Loop, batch: Batch) -> None:
    x = batch[0].clone().requires_grad_()
    with loop.tracker.batch(batch[1]):
        loss = checkpoint(loop.model, x, use_reentrant=True).square().mean()
    loss.backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def gradients_on_inside(loop: Loop, batch: Batch) -> None:
    with torch.no_grad(), loop.tracker.batch(batch[1]), torch.enable_grad():
        loop.loss(batch[0]).backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def stepped_inside(loop: Loop, batch: Batch) -> None:
    with loop.tracker.batch(batch[1]):
        loop.loss(batch[0]).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()


@pytest.mark.parametrize("train", [reentrant, gradients_on_inside, stepped_inside])
def test_batches_that_train_in_other_ways_count_and_their_reports_are_on_them(
    train: Callable[[Loop, Batch], None],
) -> None:
    loop = Loop()
    drawn(loop, train)
    assert loop.sampler.consumed == 20
    assert [(r.step, s.step) for r, s in zip(loop.policy.reports, loop.policy.states, strict=True)] == [
        (k + 1, k) for k in range(20)
    ]


def test_an_epoch_run_again_does_not_decide_again() -> None:
    loop = Loop(delay=4)
    drawn(loop)
    loop.sampler.rewind(0)
    drawn(loop)
    drawn(loop)
    assert [state.step for state in loop.policy.states] == list(range(40))


def test_iterations_that_somebody_keeps() -> None:
    """Left early and kept alive, in a list or by a name that is bound again."""
    kept, loop = [], Loop(policy=Restless(), delay=4)
    for _ in range(3):
        iteration = iter(loop.sampler)
        kept.append(iteration)
        for rows in itertools.islice(iteration, 9):
            loop.step((loop.x[rows], torch.from_numpy(TASK_OF_EXAMPLE[rows])))
    assert loop.sampler.epoch == 2 and loop.sampler.state_dict()["epoch"] == [2, 18, 38]
    resumed = Loop(policy=Restless(), delay=4)
    resumed.sampler.load_state_dict(loop.sampler.state_dict())
    assert len(list(resumed.sampler)) == 11
    loop.sampler.rewind(2)


def test_what_the_loop_holds_is_not_kept_alive() -> None:
    loop = Loop()
    activations = torch.zeros(1000)
    gone = weakref.ref(activations)
    batches = iter(DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=loop.sampler))  # type: ignore[arg-type]
    next(batches)
    del activations
    assert gone() is None


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_runs_ahead_over_the_end_of_an_epoch(ahead: int) -> None:
    straight = Loop(policy=Restless(), delay=12)
    rows = [row for _ in range(3) for row in drawn(straight)]
    loop = Loop(policy=Restless(), delay=12)
    endless = itertools.chain.from_iterable(loop.batches() for _ in itertools.count())
    waiting = [next(endless) for _ in range(ahead)]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while len(found) < 60:
            waiting.append(next(endless))
            batch = waiting.pop(0)
            found.append(float(batch[0].sum()))
            loop.step(batch)
    assert found == rows and loop.sampler.consumed == 60
    assert loop.sampler.ledger.digest() == straight.sampler.ledger.digest()


def test_counting_once_too_often_is_told_whenever_it_happens() -> None:
    loop = Loop(policy=Restless(), delay=8, num_batches=200)
    loader = DataLoader(range(len(TASK_OF_EXAMPLE)), batch_sampler=loop.sampler, num_workers=1)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"counted twice \(tried again after an error\)"):
        for k, rows in enumerate(loader):
            loop.step((loop.x[rows], torch.from_numpy(TASK_OF_EXAMPLE[rows])))
            if k == 40:
                with loop.tracker.batch(torch.zeros(16, dtype=torch.int64)):
                    pass
            if k == 120:
                break
