"""The window of the first moment: n weights, and the place of a step in a ring of n slots (section 1.1)."""

from __future__ import annotations


def weights(n: int, beta1: float) -> list[float]:
    """w_i = beta1^i / sum_{j<n} beta1^j, the newest gradient first; they sum to one, and 0^0 = 1.

    >>> [round(7 * w) for w in weights(3, 0.5)]
    [4, 2, 1]
    """
    powers = [beta1**i for i in range(n)]
    return [power / sum(powers) for power in powers]


def place(step: int, n: int) -> int:
    """The slot that the gradient of step t = 1, 2, ... takes over from the one of step t - n.

    >>> [place(t, 3) for t in range(1, 8)]
    [0, 1, 2, 0, 1, 2, 0]
    """
    return (step - 1) % n
