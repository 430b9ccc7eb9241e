"""How long a batch will take, from those of late: a part that every batch costs, and a part for each look in it."""

from __future__ import annotations

_FORGET = 0.9
"""What a batch counts when the next one is over."""


class Pace:
    """Least squares of seconds over looks, the older ones fading. While all batches were of one size, time is taken to grow with
    the number of looks: who expects too little breaks a promise, who expects too much is corrected by the first larger batch."""

    def __init__(self, looks: int, seconds: float) -> None:
        self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self.learn(looks, seconds)

    def learn(self, looks: int, seconds: float) -> None:
        """A batch of so many took so long."""
        for name, value in (("_weight", 1.0), ("_n", looks), ("_nn", looks * looks), ("_t", seconds), ("_nt", looks * seconds)):
            setattr(self, name, _FORGET * getattr(self, name) + value)

    def __call__(self, looks: int) -> float:
        """Seconds of a batch of so many."""
        n, t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - n * n
        most = t / n
        each = most if spread < 0.05 else min(most, max(0.0, (self._nt / self._weight - n * t) / spread))
        return t + each * (looks - n)
