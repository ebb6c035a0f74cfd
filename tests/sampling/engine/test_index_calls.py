"""Random calls of both index engines, past the checks of ``IndexEngine``, in a process of their own: each raises or
gives a batch that can be there, and both do the same, but after a state was handed in that no batch leads to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from taskgrad.sampling.engine import index_numpy, native
from taskgrad.sampling.engine.quota import ONE
from tests.sampling.helpers import needs_extension

SEQUENCES = 600
CALLS = """
import random, sys
import numpy as np
from taskgrad import _index_engine
from taskgrad.sampling.engine import index_numpy

ONE = 1 << 40
ODD = (-(2**63), -(2**40), -3, -1, 0, 1, 2, 3, 5, 8, 13, 100, 2**31, 2**40, 2**62)

def array(rng, length, numbers):
    return np.array([rng.choice(numbers) for _ in range(length)], dtype=np.int64)

def weights(rng, tasks):
    parts = np.array([rng.randint(0, 5) for _ in range(tasks)]) * (ONE // 64)
    parts[rng.randrange(tasks)] += ONE - parts.sum() + rng.choice((0, 0, 0, 0, 1))
    return parts

def check(counts, positions, offset, sizes, batch_size, replicas):
    assert counts.min() >= 0 and counts.sum() == batch_size == len(positions), (counts, positions)
    assert 0 <= offset < replicas
    task = np.repeat(np.arange(len(sizes)), counts)
    assert positions.min() >= 0 and (positions < sizes[task]).all(), (counts, positions)

def outcome(function, *arguments):
    try:
        out = function(*arguments)
    except (ValueError, IndexError, RuntimeError) as error:
        return type(error), None
    return None, out

def plain(out):
    if isinstance(out, tuple):
        return [plain(part) for part in out]
    return out.tolist() if isinstance(out, np.ndarray) else out

def sequence(seed):
    rng = random.Random(seed)
    tasks, replicas, first = rng.randint(1, 5), rng.choice((1, 1, 2, 3, 4, 0, -2)), rng.choice((0, 0, 3, -5))
    batch_size = abs(replicas) * rng.randint(1, 6) + rng.choice((0, 0, 0, 0, 1))
    sizes = array(rng, tasks, (1, 2, 5, 300, 1000, 2**40))
    draws = rng.choice((None, None, array(rng, tasks, (0, 1, 5, 20, 2**40, -4))))
    probe = rng.choice((0, 0, 1, 2, 5, -3, 2**62))
    made = [
        outcome(module.Engine, seed, sizes, batch_size, first, 0, probe, draws, replicas)
        for module in (_index_engine, index_numpy)
    ]
    assert made[0][0] == made[1][0], (made, sizes, batch_size, first, probe, draws, replicas)
    if made[0][0]:
        return 0
    engines = [engine for _, engine in made]
    drawn, same = 0, True
    names = ("commit", "draw", "draw", "counts", "examples", "examples", "state", "snapshot_at", "restore")
    for i in range(rng.randint(1, 12)):
        call = "commit" if i == 0 and rng.random() < 0.8 else rng.choice(names)
        k = rng.choice(ODD) if rng.random() < 0.3 else first + rng.randint(-3, 20)
        if call != "commit" and 100 < k <= 2**40:
            k = 1100 if rng.random() < 0.02 else 60  # counting up to it would take days
        arguments = [k]
        if call == "commit":
            arguments = [rng.choice((k, first, first)), weights(rng, tasks)]
        elif call == "restore":
            numbers = (0, 0, 1, 2, 5, -1, *rng.choices(ODD, k=rng.randint(0, 2)))
            lengths = [tasks] * 4 + [tasks * replicas if replicas > 1 else rng.choice((0, 0, 0, 1))]
            arguments += [array(rng, length, numbers) for length in lengths]
        elif call == "examples":
            order = rng.choice((None, np.arange(rng.choice((3, 700)), dtype=rng.choice((np.uint32, np.uint64)))))
            starts = array(rng, tasks, (0, 9) if order is None else (0, 0, 0, 5, -3, 2**50))
            arguments += [starts, order, rng.choice((0, 0, 0, 1, replicas - 1, replicas, -1))]
        answers = [outcome(getattr(engine, call), *arguments) for engine in engines]
        if same:
            assert [answers[0][0], plain(answers[0][1])] == [answers[1][0], plain(answers[1][1])], (seed, arguments)
        for error, out in answers:
            if call == "draw" and error is None:
                check(*out, sizes, batch_size, replicas)
                drawn += 1
        same = same and (call != "restore" or answers[0][0] is not None)
    return drawn

print(sum(sequence(seed) for seed in range(int(sys.argv[1]))))
"""


@needs_extension
def test_no_sequence_of_calls_crashes_an_engine(tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text(CALLS)
    command = [sys.executable, "-X", "faulthandler", str(script), str(SEQUENCES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > SEQUENCES / 4  # batches


@pytest.mark.parametrize("kind", [pytest.param("C++", marks=needs_extension), "NumPy"])
def test_weights_begin_with_the_first_batch_and_move_forward(kind: str) -> None:
    module, _ = native.load()
    make = index_numpy.Engine if kind == "NumPy" else module.Engine  # type: ignore[union-attr]
    engine = make(0, np.array([3, 4]), 2, 3, 0, 0, None)
    weights = np.array([ONE, 0])
    for wrong in (2, 4):
        with pytest.raises(ValueError, match="the first weights must be for the first batch"):
            engine.commit(wrong, weights)
        for call in (engine.draw, engine.counts):
            with pytest.raises(IndexError, match=r"batch \d+ has no weights"):
                call(20)
    engine.commit(3, weights)
    engine.commit(9, weights)
    with pytest.raises(ValueError, match="a later one than the last"):
        engine.commit(9, weights)
    assert engine.draw(20)[0].tolist() == [2, 0]
