"""Selection: which clients a round asks. Every way is a Selector; all draw from one seeded stream."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Candidate:
    """A client that could train this round. `labels` counts its examples of each class."""

    client: int
    examples: int
    labels: tuple[int, ...]
    memory: float  # budget over the unplanned step's peak
    seconds: float  # its round, as the clock would count it
    op_seconds: float  # the ops of one step as it runs them, on its device


class Selector(Protocol):
    """Chooses clients, and is told afterwards how each did."""

    def choose(self, server_round: int, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Return at most `count` clients of `candidates`, in no order that matters."""

    def observe(self, server_round: int, client: int, squared_loss: float) -> None:
        """Note the mean squared loss that a client trained at in a round."""


@dataclass(slots=True)
class Random:
    """Uniformly without replacement, as FedAvg does (McMahan et al. 2017)."""

    seed: int

    def choose(self, server_round: int, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Draw."""
        clients = sorted(c.client for c in candidates)
        return random.Random(f"random/{self.seed}/{server_round}").sample(clients, min(count, len(clients)))

    def observe(self, server_round: int, client: int, squared_loss: float) -> None:
        """Learn nothing."""


@dataclass(slots=True)
class Everyone:
    """All candidates, whatever `count` says."""

    seed: int

    def choose(self, server_round: int, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Take all."""
        return sorted(c.client for c in candidates)

    def observe(self, server_round: int, client: int, squared_loss: float) -> None:
        """Learn nothing."""


@dataclass(slots=True)
class _Learned:
    """What utility-driven selection remembers: each client's latest squared loss, and when that was."""

    seed: int
    squared_loss: dict[int, float] = field(default_factory=dict)
    last_round: dict[int, int] = field(default_factory=dict)

    def observe(self, server_round: int, client: int, squared_loss: float) -> None:
        """Remember the latest."""
        self.squared_loss[client], self.last_round[client] = squared_loss, server_round

    def staleness(self, server_round: int, client: int) -> float:
        """Return the upper-confidence term sqrt(0.1 ln R / last), as in Oort's code."""
        return math.sqrt(0.1 * math.log(max(2, server_round)) / max(1, self.last_round.get(client, 1)))


EXPLORE, EXPLORE_DECAY, EXPLORE_LEAST = 0.9, 0.95, 0.2
CLIP = 0.98  # quantile at which utilities are cut, so that one outlier does not take every round


@dataclass(slots=True)
class Oort(_Learned):
    """Oort (Lai et al. 2021): |B| sqrt(mean squared loss), less for stragglers, with exploration and staleness.

    `patience` is the quantile of durations above which a client is a straggler, `penalty` the exponent of
    (preferred / its duration). Constants are those of the authors' code.
    """

    patience: float = 0.5
    penalty: float = 2.0

    def choose(self, server_round: int, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Exploit the best of those tried, explore the fastest of the rest."""
        source = random.Random(f"oort/{self.seed}/{server_round}")
        tried = [c for c in candidates if c.client in self.last_round]
        new = [c for c in candidates if c.client not in self.last_round]
        share = max(EXPLORE_LEAST, EXPLORE * EXPLORE_DECAY ** (server_round - 1))
        explore = min(len(new), max(round(share * count), count - len(tried)))
        score = dict(zip((c.client for c in tried), self._scores(server_round, tried), strict=True))
        best = sorted(score, key=lambda c: (-score[c], c))[: max(0, count - explore)]
        fast = sorted(new, key=lambda c: (c.seconds, source.random()))[: 2 * explore]
        return best + [c.client for c in source.sample(fast, min(explore, len(fast)))]

    def _scores(self, server_round: int, tried: Sequence[Candidate]) -> list[float]:
        if not tried:
            return []
        preferred = float(np.quantile([c.seconds for c in tried], self.patience))
        utility = [c.examples * math.sqrt(self.squared_loss[c.client]) for c in tried]
        late = [min(1.0, (preferred / max(1e-9, c.seconds)) ** self.penalty) for c in tried]
        stale = [self.staleness(server_round, c.client) for c in tried]
        return [(u + s) * x for u, s, x in zip(_unit(utility), stale, late, strict=True)]


@dataclass(slots=True)
class MemoryAwareUcb(_Learned):
    """FedHybrid's selection: loss, memory, compute and diversity, by upper confidence bounds.

        utility(i) = mean squared loss(i) * min(1, M_i / M_G) * (1 / sum of op times), each from 0 to 1
        score(i)   = utility(i) + sqrt(0.1 ln R / last round of i), or `unseen` for a client never asked
        picked greedily by score(i) * diversity(i), diversity = 1 - the distance of the chosen clients' labels,
        i's included, from the labels of the round's pool (total variation)

    Source: the published reviews of FedHybrid (Tam et al. 2024), whose printed indicator contradicts itself: read
    here as Oort's exponent, so that a small memory costs utility and does not exclude. The terms' exponents
    (`compute`, `diversity`) are ours, chosen among four pairs on three seeds that no reported figure uses.
    """

    compute: float = 0.1
    diversity: float = 8.0
    unseen: float = 2.0

    def choose(self, server_round: int, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Pick the best one after another; each changes how diverse the next would be."""
        pool = sorted(candidates, key=lambda c: c.client)
        if not pool:
            return []
        source = random.Random(f"ucb/{self.seed}/{server_round}")
        score = np.array(self._scores(server_round, pool)) + 1e-6 * np.array([source.random() for _ in pool])
        labels = np.array([c.labels for c in pool], dtype=float)
        target = labels.sum(axis=0) / max(1.0, labels.sum())
        chosen: list[int] = []
        held = np.zeros_like(target)
        for _ in range(min(count, len(pool))):
            value = score * _closeness(held + labels, target) ** self.diversity
            value[chosen] = -1.0
            best = int(np.argmax(value))
            chosen.append(best)
            held = held + labels[best]
        return [pool[i].client for i in chosen]

    def _scores(self, server_round: int, pool: Sequence[Candidate]) -> list[float]:
        known = [self.squared_loss.get(c.client, math.nan) for c in pool]
        filled = _unit(
            [max([k for k in known if not math.isnan(k)], default=1.0) if math.isnan(k) else k for k in known]
        )
        fastest = min(c.op_seconds for c in pool)
        scores = []
        for c, loss in zip(pool, filled, strict=True):
            fast = (fastest / c.op_seconds) ** self.compute
            term = self.unseen if c.client not in self.last_round else self.staleness(server_round, c.client)
            scores.append(fast * min(1.0, c.memory) * loss + fast * term)
        return scores


def _unit(values: Sequence[float]) -> list[float]:
    """Scale to [0, 1] after cutting at the CLIP quantile; equal values are all 1."""
    top, low = float(np.quantile(values, CLIP)), min(values)
    return [1.0 if top <= low else (min(v, top) - low) / (top - low) for v in values]


def _closeness(counts: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1 - total variation between each row of counts [N, classes] and the target [classes]."""
    shares = counts / np.maximum(1.0, counts.sum(axis=1, keepdims=True))
    closeness: NDArray[np.float64] = 1 - np.abs(shares - target).sum(axis=1) / 2
    return closeness
