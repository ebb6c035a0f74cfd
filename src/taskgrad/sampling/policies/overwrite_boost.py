"""R1 ported (development)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..arrays import FloatArray
from .base import Policy, PolicyState
from .updates import column, counted

_TINY = 1e-12
EVERY = 10
BLOCK, BLOCKS = 16, 24
FIRST = 40


class OverwriteBoost(Policy):
    guard_defaults: ClassVar[Mapping[str, float]] = {"budget": 0.05, "probe_every": 200}
    # constants
    base = 0.2
    keep = 0.3
    cut_base = 0.4
    cap_unproven = 8.0
    cap = 8.0
    power = 2.0
    k0, k1, mid = 0.3, 0.7, 0.5
    recent = 0.15
    z_last = 3.0
    z_trend = 3.0
    signal_evidence = True
    z_trust = 2.0
    relative = False
    nil = 0.02
    use_signal = True
    use_losses = True
    use_rho = True
    rho = None

    def __init__(self, fresh: bool = False, **constants: Any) -> None:
        self.fresh = fresh
        for name, value in constants.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def initial(self, state: PolicyState) -> FloatArray:
        return _equal_parts(state)

    def weights(self, report: Any, state: PolicyState) -> FloatArray:
        memory = state.memory
        equal = _equal_parts(state)
        if not memory:
            memory.update(reports=0, block=np.zeros((9, len(equal))).tolist(), parts=equal.tolist())
        examples, norm, signal = counted(report), column(report, "norm"), column(report, "signal")
        loss = column(report, "loss") if report.loss is not None and self.use_losses else np.full(len(equal), np.nan)
        seen = (examples > 0) & np.isfinite(norm)
        energy = np.where(seen, examples * np.where(seen, norm, 0.0) ** 2, 0.0)
        signals = seen & np.isfinite(signal)
        signal = np.where(signals, signal, 0.0)
        losses = seen & np.isfinite(loss)
        loss = np.where(losses, loss, 0.0)
        block = np.array(memory["block"]) + np.stack(
            [seen, energy, signals, signal, signal**2, losses, loss, loss**2, seen * 0.0]
        )
        memory["reports"] += 1
        if memory["reports"] % EVERY == 0:
            rho, rho_se = column(report, "overwrite"), column(report, "overwrite_se")
            pull, own = column(report, "pull"), column(report, "own_pull")
            memory["parts"] = self.decide(block, (rho, rho_se, pull, own), state, equal).tolist()
            block = np.zeros_like(block)
        memory["block"] = block.tolist()
        return np.array(memory["parts"])

    def decide(self, block, pulls, state: PolicyState, equal: FloatArray) -> FloatArray:
        memory = state.memory
        count = len(equal)
        rare = equal > 0
        seen, energy, signals, signal, signal2, losses, loss, loss2, _ = block
        k = float(state.step + 1)
        h = float(state.horizon) if state.horizon else np.inf
        kept = {name: np.array(v) for name, v in memory.get("kept", {}).items()} or fresh(count)
        m = kept
        enter(m, "energy", seen, energy, None, 200)
        m["peak"] = np.where(m["energy_w"] > 100, np.maximum(m["peak"], m["energy"]), m["peak"])
        enter(m, "signal", signals, signal, signal2, 200)
        m["n"] += losses
        first = (m["n"] <= FIRST) & (losses > 0)
        enter(m, "loss0", np.where(first, losses, 0), np.where(first, loss, 0), np.where(first, loss2, 0), 1e9)
        enter(m, "loss", losses, loss, loss2, 100)
        push(m, losses, loss, loss2)
        m["seen"] += seen
        z = zscore(m["signal"], m["signal_2"], m["signal_w"]) * (m["signal_w"] > 100)
        if not self.use_signal:
            z = np.zeros_like(z)
        trend = trend_z(m)
        evidence = (m["seen"] > 150) & (
            (trend > self.z_trend) & (m["n"] > 150) | ((z > self.z_last) & self.signal_evidence)
        )
        m["last"] = np.where(evidence, k, m["last"])
        lossratio = np.where(m["n"] > FIRST, m["loss"] / np.maximum(m["loss0"], 1e-20), 1.0)
        low = (m["n"] > 150) & (
            m["loss"]
            < 0.95 * m["loss0"]
            - 2 * np.sqrt(var(m, "loss") / np.maximum(m["loss_w"], 1) + var(m, "loss0") / np.maximum(m["loss0_w"], 1))
        )
        m["able"] = np.maximum(m["able"], low)
        heldout = self.observe(m, memory, state)
        able = m["able"] > 0
        need = np.where(m["peak"] > 0, m["energy"] / np.maximum(m["peak"], 1e-300), 1.0)
        need = np.minimum(1.0, np.minimum(need, lossratio))
        if state.epochs is not None and not self.fresh:
            need = np.where(state.epochs > 3, 1.0, need)
        if heldout is not None:
            able = able | (heldout < 0.9)
            need = np.where(np.isnan(heldout), need, np.clip(heldout, 0, 1))
        m["able"] = able * 1.0
        u = np.maximum(k / h - np.maximum(0.0, m["last"] / h - self.recent), 0)
        x = np.where(
            u < self.k0,
            1.0,
            np.where(
                u < self.k1,
                1 - (1 - self.mid) * (u - self.k0) / (self.k1 - self.k0),
                np.maximum(self.mid - 5 * (u - self.k1), 0),
            ),
        )
        x = np.where(k > 0.85 * h, 0.0, x)
        if memory.get("losses") is None:
            memory["losses"] = False
        memory["losses"] = memory["losses"] or bool(losses.sum() > 0) or heldout is not None
        if not memory["losses"]:
            x = np.ones_like(x)
        trust = np.where(able, 1.0, x)
        parts = self.split(equal, rare, able, trust, need, z, m, pulls)
        memory["kept"] = {name: v.tolist() for name, v in m.items()}
        return parts

    def split(self, equal, rare, able, trust, need, z, m, pulls):
        cut = trust < 0.3
        want = np.where(
            cut | ~rare, 0.0, equal * need**self.power * np.where((z > self.z_trust) & self.signal_evidence, 1.0, trust)
        )
        if self.relative:
            need = np.maximum(need - self.nil, 0) / (1 - self.nil)
            base = equal * np.where(cut, self.cut_base, (self.base + self.keep) * np.clip(need / 0.05, 0, 1))
        else:
            base = equal * np.where(cut, self.cut_base, self.base + self.keep * np.minimum(1, need / 0.05))
        high = np.where(cut, 0.0, np.where(able, self.cap * need, self.cap_unproven * need)) * equal
        return base + fill(want, high, 1 - float(base.sum()))

    def observe(self, m, memory, state):
        if state.eval_losses is None:
            return None
        count = memory.get("evaluations", 0)
        v = np.array([state.eval_losses.get(t, np.nan) for t in state.tasks])
        if state.evaluations != count:
            memory["evaluations"] = state.evaluations
            memory["held"] = memory.get("held", [])[-2:] + [[None if np.isnan(x) else x for x in v]]
            if "held0" not in memory:
                memory["held0"] = memory["held"][0]
        held = np.array(memory["held"], dtype=float)
        v0 = np.array(memory["held0"], dtype=float)
        return held.mean(0) / np.maximum(v0, 1e-12) if len(held) == 3 else np.ones(len(v))


def fresh(count):
    z = np.zeros(count)
    out = {}
    for name in ("energy", "signal", "loss", "loss0"):
        out.update({name: z.copy(), name + "_2": z.copy(), name + "_w": z.copy()})
    out.update(
        peak=z.copy(),
        n=z.copy(),
        seen=z.copy(),
        last=z.copy(),
        able=z.copy(),
        blocks=np.zeros((count, BLOCKS, 3)),
        filled=z.astype(int),
        size=z + BLOCK,
        current=np.zeros((count, 3)),
    )
    return out


def enter(m, name, count, total, squares, window):
    d = (1 - 1 / window) ** count
    g = (1 - d) * window
    w = d * m[name + "_w"] + g
    f = g / np.maximum(w, 1e-9)
    n = np.maximum(count, 1)
    m[name] = m[name] + f * (total / n - m[name])
    if squares is not None:
        m[name + "_2"] = m[name + "_2"] + f * (squares / n - m[name + "_2"])
    m[name + "_w"] = w


def var(m, name):
    return np.maximum(m[name + "_2"] - m[name] ** 2, 0)


def zscore(mean, squares, weight):
    return mean / np.sqrt(np.maximum(squares - mean**2, 1e-300) / np.maximum(weight, 1e-9))


def push(m, n, total, squares):
    m["current"] = m["current"] + np.stack([n, total, squares], 1)
    full = np.flatnonzero(m["current"][:, 0] >= m["size"])
    m["blocks"][full, m["filled"][full]] = m["current"][full]
    m["current"][full] = 0
    m["filled"][full] += 1
    for t in np.flatnonzero(m["filled"] == BLOCKS):
        m["blocks"][t, : BLOCKS // 2] = m["blocks"][t].reshape(BLOCKS // 2, 2, 3).sum(1)
        m["filled"][t] = BLOCKS // 2
        m["size"][t] *= 2


def trend_z(m):
    sums = np.concatenate([np.zeros((len(m["filled"]), 1, 3)), np.cumsum(m["blocks"], 1)], 1)
    n = m["filled"]
    third = np.maximum(2, n // 3)
    rows = np.arange(len(n))
    late = sums[rows, n] - sums[rows, np.maximum(n - third, 0)]
    early = sums[rows, np.maximum(n - third, 0)] - sums[rows, np.maximum(n - 2 * third, 0)]

    def moments(a):
        c = np.maximum(a[:, 0], 1)
        mean = a[:, 1] / c
        return mean, np.maximum(a[:, 2] / c - mean**2, 0) / c

    ml, vl = moments(late)
    me, ve = moments(early)
    return np.where(n >= 6, (me - ml) / np.sqrt(vl + ve + 1e-20), 0.0)


def _equal_parts(state: PolicyState) -> FloatArray:
    """Importance of the rare tasks, divided by its sum [T]; zeros if there is none."""
    wanted = np.where(state.natural < 1.0 / len(state.tasks), state.importance, 0.0)
    out: FloatArray = wanted / max(float(wanted.sum()), _TINY)
    return out


def fill(want: FloatArray, high: FloatArray, total: float) -> FloatArray:
    """min(c x want, high) [T] with the factor c for which it sums to ``total``; ``high`` where that is not enough."""
    out = np.where(want > 0, high, 0.0)
    free = want > 0
    while free.any() and out.sum() > total + _TINY:
        rest = total - float(out[~free].sum())
        shared = want * (rest / float(want[free].sum()))
        over = free & (shared >= high)
        if not over.any():
            return np.where(free, shared, out)
        free &= ~over
    return out
