"""AdaShift: decorrelation of step size and gradient in Adam (Zhou, Zhang et al., ICLR 2019, arXiv 1810.00143).

>>> from zq_lib import adashift
>>> optimizer = adashift.AdaShift(model.parameters(), lr=1e-2, phi="max")
>>> # train as with any optimiser of torch
>>> optimizer.report()
"""

from __future__ import annotations

from zq_lib.adashift.config import AdaShiftConfig
from zq_lib.adashift.counterexamples import Sequential, Stochastic, critical_delta, simulate
from zq_lib.adashift.factors import net_update_factors
from zq_lib.adashift.optimizer import AdaShift, ParameterReport

__all__ = [
    "AdaShift",
    "AdaShiftConfig",
    "ParameterReport",
    "Sequential",
    "Stochastic",
    "critical_delta",
    "net_update_factors",
    "simulate",
]
