from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from taskgrad.sampling import Ledger
from taskgrad.sampling.quota import ONE, to_units


def units(*values: float) -> np.ndarray:
    array = np.array(values)
    return to_units(array / array.sum())


def filled(**options: Any) -> Ledger:
    ledger = Ledger([30, 10], **options)
    ledger.append(ledger.start, units(3, 1), "initial")
    ledger.append(ledger.start + 20, units(1, 1), "report on batch 11", ("budget",))
    return ledger


def test_the_entry_in_force_and_the_mean_mix() -> None:
    ledger = filled()
    assert [ledger.at(k).effective_at for k in (0, 19, 20, 10**9)] == [0, 0, 20, 20]
    assert np.allclose(ledger.mean(0, 40), [0.625, 0.375])
    assert np.allclose(ledger.mean(10, 20), [0.75, 0.25])
    assert np.allclose(ledger.mean(30, 40), [0.5, 0.5])
    assert ledger.mean(5, 5).tolist() == [0, 0]
    assert len(ledger) == 2 and ledger[-1].bound == ("budget",)
    assert [entry.cause for entry in ledger] == ["initial", "report on batch 11"]


def test_json_round_trip_keeps_everything() -> None:
    ledger = filled(data="ids", start=7, era=1, past=[{"digest": "ab" * 32}])
    again = Ledger.from_dict(json.loads(json.dumps(ledger.to_dict())))
    assert again.to_dict() == ledger.to_dict()
    assert again.digest() == ledger.digest()


def test_the_digest_covers_what_determines_the_stream() -> None:
    ledgers = [
        filled(),
        filled(data="ids"),
        filled(start=1),
        filled(era=1),
        filled(past=[{"digest": "00" * 32}]),
        Ledger([30, 10]),
    ]
    longer = filled()
    longer.append(30, units(1, 2), "x")
    later = Ledger([30, 10])
    later.append(0, units(3, 1), "initial")
    later.append(21, units(1, 1), "x")
    digests = [ledger.digest() for ledger in (*ledgers, longer, later)]
    assert len(set(digests)) == len(digests)
    assert filled().digest() == digests[0]


def test_entries_cannot_be_changed() -> None:
    weights = units(3, 1)
    ledger = Ledger([30, 10])
    entry = ledger.append(0, weights, "initial")
    weights[0] = 0
    assert int(entry.weights.sum()) == ONE
    with pytest.raises(ValueError, match="read-only"):
        entry.weights[0] = 5


@pytest.mark.parametrize(
    "effective_at, weights, message",
    [
        (20, units(1, 1), "append-only: batch 20 is not after its last entry, at 20"),
        (30, units(1, 1, 1), r"int64 of shape \(2,\), got int64 of shape \(3,\)"),
        (30, np.array([0.5, 0.5]), "got float64"),
        (30, np.array([ONE, 1]), "must sum to 2"),
        (30, np.array([ONE + 1, -1]), "must not be negative"),
    ],
)
def test_bad_entries_raise(effective_at: int, weights: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        filled().append(effective_at, weights, "test")


def test_the_first_entry_is_at_the_start() -> None:
    with pytest.raises(ValueError, match="first entry must take effect at batch 4"):
        Ledger([1], start=4).append(5, np.array([ONE]), "x")
    with pytest.raises(ValueError, match="before batch 4"):
        filled(start=4).at(3)


def test_a_tampered_ledger_is_refused() -> None:
    data = filled().to_dict()
    data["entries"].pop()
    with pytest.raises(ValueError, match="does not match its digest"):
        Ledger.from_dict(data)
