"""Fitting L(n) = eps + beta n ** -alpha to a loss curve."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np

from ..arrays import FloatArray

HUBER = 1e-3
ALPHA_MIN, ALPHA_MAX = 0.01, 0.8
_STEPS = 40


@dataclass(frozen=True)
class ScalingLaw:
    """L(n) = eps + exp(log_beta) n ** -alpha."""

    log_beta: float
    eps: float
    alpha: float

    def reducible(self, samples: float) -> float:
        """L(n) - eps, the part of the loss that more samples would remove."""
        return exp(self.log_beta - self.alpha * log(samples))


def fit(samples: FloatArray, losses: FloatArray) -> ScalingLaw:
    """The law with the least Huber loss (delta 1e-3) of log L among 0.01 <= alpha <= 0.8, eps >= 0.

    ``samples``, ``losses``: float64 [P], positive. For a given alpha the law is linear in eps and beta, so only alpha
    needs a search: a grid and a finer one around its best point, to 5e-4. No start to choose, no local minima met.
    """
    logs = np.log(samples)
    middle = float(logs.mean())
    grid = np.linspace(ALPHA_MIN, ALPHA_MAX, 80)
    for width in (0.01, 0.0):
        eps, height, miss = _profile(grid, logs - middle, losses)
        best = int(miss.argmin())
        if width:
            around = np.linspace(grid[best] - width, grid[best] + width, 41)
            grid = np.clip(around, ALPHA_MIN, ALPHA_MAX)
    alpha = float(grid[best])
    return ScalingLaw(log(height[best]) + alpha * middle, float(eps[best]), alpha)


def _profile(alpha: FloatArray, logs: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Best eps, beta and Huber loss for each of ``alpha`` [A], with log n [P] counted from its mean.

    By regressions of losses [P] on n ** -alpha, each weighted as the Huber loss and the logarithm ask for at the law
    found by the one before. The best law is kept.
    """
    power = np.exp(-alpha[:, None] * logs)
    least = 1e-12 * float(losses.mean())
    weight = np.broadcast_to(losses**-2.0, power.shape)
    best_eps, best_height = np.zeros(len(alpha)), np.zeros(len(alpha))
    best_miss = np.full(len(alpha), np.inf)
    for _ in range(_STEPS):
        eps, height = _regress(power, losses, weight, least)
        law = eps[:, None] + height[:, None] * power
        size = np.abs(np.log(losses / law)) / HUBER
        miss = np.where(size > 1, size - 0.5, 0.5 * size**2).sum(1)
        better = miss < best_miss
        best_eps, best_height = np.where(better, eps, best_eps), np.where(better, height, best_height)
        best_miss = np.where(better, miss, best_miss)
        weight = 1.0 / (np.maximum(size, 1.0) * law**2)
    return best_eps, best_height, best_miss


def _regress(x: FloatArray, y: FloatArray, weight: FloatArray, least: float) -> tuple[FloatArray, FloatArray]:
    """Weighted regression of y [P] on x [A, P]: intercept and slope [A], both at least ``least``."""
    total, mean_x, mean_y = weight.sum(1), (weight * x).sum(1), (weight * y).sum(1)
    mean_x, mean_y = mean_x / total, mean_y / total
    apart = x - mean_x[:, None]
    slope = (weight * apart * y).sum(1) / (weight * apart**2).sum(1)
    intercept = mean_y - slope * mean_x
    through_origin = (weight * x * y).sum(1) / (weight * x**2).sum(1)
    slope = np.where(intercept < least, through_origin, slope)
    flat = slope < least
    return np.where(flat, np.maximum(mean_y, least), np.maximum(intercept, least)), np.where(flat, least, slope)
