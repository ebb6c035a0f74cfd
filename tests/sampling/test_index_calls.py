"""Random calls of the C++ index engine, past the checks of ``IndexEngine``, in a process of their own: each raises or
gives a batch that can be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from taskgrad.sampling import native

SEQUENCES = 600
CALLS = """
import random, sys
import numpy as np
from taskgrad import _index_engine

ONE = 1 << 40
ODD = (-(2**63), -(2**40), -3, -1, 0, 1, 2, 3, 5, 8, 13, 100, 2**31, 2**40, 2**62)

def array(rng, length, numbers):
    return np.array([rng.choice(numbers) for _ in range(length)], dtype=np.int64)

def weights(rng, tasks):
    parts = np.array([rng.randint(0, 5) for _ in range(tasks)]) * (ONE // 64)
    parts[rng.randrange(tasks)] += ONE - parts.sum() + rng.choice((0, 0, 0, 0, 1))
    return parts

def check(counts, positions, sizes, batch_size):
    assert counts.min() >= 0 and counts.sum() == batch_size == len(positions), (counts, positions)
    task = np.repeat(np.arange(len(sizes)), counts)
    assert positions.min() >= 0 and (positions < sizes[task]).all(), (counts, positions)

def sequence(seed):
    rng = random.Random(seed)
    tasks, batch_size, first = rng.randint(1, 5), rng.randint(1, 6), rng.choice((0, 0, 3, -5))
    sizes = array(rng, tasks, (1, 2, 5, 300, 1000, 2**40))
    draws = rng.choice((None, None, array(rng, tasks, (0, 1, 5, 20, 2**40, -4))))
    probe = rng.choice((0, 0, 1, 2, 5, -3, 2**62))
    try:
        engine = _index_engine.Engine(seed, sizes, batch_size, first, 0, probe, draws)
    except ValueError:
        return 0
    drawn = 0
    for i in range(rng.randint(1, 12)):
        calls = ("commit", "commit", "draw", "draw", "draw", "state", "snapshot_at", "restore")
        call = "commit" if i == 0 else rng.choice(calls)
        k = rng.choice(ODD) if rng.random() < 0.3 else first + rng.randint(-3, 20)
        if call != "commit" and 10**4 < k <= 2**40:
            k = 2000  # counting up to it would take days
        try:
            if call == "commit":
                engine.commit(rng.choice((k, first)), weights(rng, tasks))
            elif call == "draw":
                check(*engine.draw(k), sizes, batch_size)
                drawn += 1
            elif call == "restore":
                numbers = (0, 0, 1, 2, 5, -1, *rng.choices(ODD, k=rng.randint(0, 2)))
                engine.restore(k, *(array(rng, tasks, numbers) for _ in range(4)))
            else:
                getattr(engine, call)(k)
        except (ValueError, IndexError, RuntimeError):
            pass
    return drawn

print(sum(sequence(seed) for seed in range(int(sys.argv[1]))))
"""


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ index engine is not in force")
def test_no_sequence_of_calls_crashes_the_engine(tmp_path):
    script = Path(tmp_path, "calls.py")
    script.write_text(CALLS)
    command = [sys.executable, "-X", "faulthandler", str(script), str(SEQUENCES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > SEQUENCES / 4  # batches


@pytest.mark.skipif(native.load()[0] is None, reason="the C++ index engine is not in force")
def test_weights_begin_with_the_first_batch_and_move_forward():
    import numpy as np

    from taskgrad.sampling.quota import ONE

    module, _ = native.load()
    engine = module.Engine(0, np.array([3, 4]), 2, 3, 0, 0, None)
    weights = np.array([ONE, 0])
    for wrong in (2, 4):
        with pytest.raises(ValueError, match="the first weights must be for the first batch"):
            engine.commit(wrong, weights)
    engine.commit(3, weights)
    engine.commit(9, weights)
    with pytest.raises(ValueError, match="a later one than the last"):
        engine.commit(9, weights)
    assert engine.draw(20)[0].tolist() == [2, 0]
