"""Outputs of submodules, forecast between refreshes by a rule on the refreshed values.

A rule takes the history, (step, value) of every refresh with the newest first, and the step to forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .hooks import Arguments, Keywords, Reference

History = Sequence[tuple[int, Tensor]]
Rule = Callable[[History, int], Tensor]


class Forecasting(Reference):
    """Refresh the first `warm_up` steps, and every `interval`-th one from the last of these on."""

    def __init__(
        self,
        model: nn.Module,
        paths: Sequence[str],
        interval: int,
        warm_up: int,
        rule: Rule,
        **limits: Any,
    ) -> None:
        self.paths, self.interval, self.rule = paths, interval, rule
        super().__init__(model, warm_up=warm_up, **limits)
        for path in paths:
            self.wrap(path, lambda original, *a, path=path, **k: self.forecast(path, original, *a, **k))

    def reset(self) -> None:
        super().reset()
        self.history: dict[str, list[tuple[int, Tensor]]] = {path: [] for path in self.paths}

    def forecast(self, path: str, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not self.decisions[-1]:
            return self.rule(self.history[path], self.step)
        value = original(*args, **kwargs)
        self.history[path].insert(0, (self.step, value))
        return value

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        self.record(self.forced or (self.step - (self.warm_up - 1)) % self.interval == 0)
        return super().run(args, kwargs)


def weighted(history: History, weights: Sequence[float]) -> Tensor:
    """The sum of the newest values, each times its weight."""
    total = weights[0] * history[0][1]
    for weight, (_, value) in zip(weights[1:], history[1:], strict=False):
        total = total + weight * value
    return total


def hold(history: History, step: int) -> Tensor:
    """The newest value."""
    return history[0][1]


def derivatives(history: History, order: int, first: int) -> list[Tensor]:
    """TaylorSeer's table at the newest refresh: d0 = F, d(i+1) = (d(i) - d(i) at the refresh before) / steps between.

    The table of a refresh before step `first` holds d0 alone.
    """
    (now, value), *earlier = history
    table = [value]
    if earlier and now >= first:
        for old in derivatives(earlier, order, first)[:order]:
            table.append((table[-1] - old) / (now - earlier[0][0]))
    return table


def taylor(order: int, first: int = 0) -> Rule:
    """TaylorSeer (arXiv 2503.06923): sum of d(i) x^i / i!, x steps past the newest refresh."""

    def rule(history: History, step: int) -> Tensor:
        x = step - history[0][0]
        return sum(d * x**i / math.factorial(i) for i, d in enumerate(derivatives(history, order, first)))

    return rule


def hermite(order: int = 2, sigma: float = 0.5, first: int = 0) -> Rule:
    """HiCache (arXiv 2508.16984): Taylor's table with sigma^i H_i(sigma x) for x^i, H the physicists' polynomials."""

    def rule(history: History, step: int) -> Tensor:
        x = sigma * (step - history[0][0])
        polynomials = [1.0, 2 * x]
        for n in range(1, order):
            polynomials.append(2 * x * polynomials[n] - 2 * n * polynomials[n - 1])
        table = derivatives(history, order, first)
        return sum(d * sigma**i * polynomials[i] / math.factorial(i) for i, d in enumerate(table))

    return rule


def foca(history: History, step: int) -> Tensor:
    """FoCa (arXiv 2508.16211) in closed form: 7/3 F1 - 5/3 F2 + 1/3 F3, whatever the distances.

    It is BDF2, 4/3 F1 - 1/3 F2 + 2/3 h F', with the slope from three values, h F' = 3/2 F1 - 2 F2 + 1/2 F3. With two
    values 2 F1 - F2, with one F1.
    """
    return weighted(history, {1: [1.0], 2: [2.0, -1.0]}.get(len(history), [7 / 3, -5 / 3, 1 / 3]))


def foca_heun(horizon: int = 3) -> Rule:
    """FoCa as cache-dit documents it: F + e/2 (d + d'), e = steps past the newest refresh, `horizon` at the most.

    F is the newest refreshed value, d the difference of the two newest refreshed values, d' the difference of the
    values of the last two steps, forecast or not; neither difference is divided by steps. One refresh: its value.
    """

    def rule(history: History, step: int) -> Tensor:
        refreshed = dict(history)
        places = sorted(refreshed)
        values: list[Tensor] = []
        for now in range(places[0], step + 1):
            past = [place for place in places if place < now]
            if now in refreshed:
                values.append(refreshed[now])
            elif len(past) == 1:
                values.append(values[-1])
            else:
                newest = refreshed[past[-1]]
                slopes = newest - refreshed[past[-2]] + values[-1] - values[-2]
                values.append(newest + min(now - past[-1], horizon) / 2 * slopes)
        return values[-1]

    return rule


def adams_bashforth(order: int = 3) -> Rule:
    """AB-Cache (arXiv 2504.10540): the k newest values with binomial weights; for k = 3, 3 F1 - 3 F2 + F3.

    With fewer values, the lower order that they allow.
    """

    def rule(history: History, step: int) -> Tensor:
        k = min(order, len(history))
        return weighted(history, [(-1.0) ** j * math.comb(k, j + 1) for j in range(k)])

    return rule


def berrut(count: int) -> Rule:
    """ChebBooster (arXiv 2608.23429): w_j = r_j / (x - x_j) over their sum, r_j = (-1)^j, halved at both ends.

    Over the `count` newest refreshes, or as many as there are.
    """

    def rule(history: History, step: int) -> Tensor:
        newest = history[:count]
        ends = (0, len(newest) - 1)
        terms = [(-1.0) ** j * (0.5 if j in ends else 1.0) / (step - place) for j, (place, _) in enumerate(newest)]
        return weighted(newest, [term / sum(terms) for term in terms])

    return rule


def rows(table: Sequence[Sequence[float]]) -> Rule:
    """L2P (arXiv 2604.26365): learned weights ``table[step]`` over the refreshed values, newest first."""

    def rule(history: History, step: int) -> Tensor:
        return weighted(history, table[step])

    return rule
