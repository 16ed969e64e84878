"""Who takes part, and the rules they run. A new peer or device is a new `Contestant`; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt


@dataclass(frozen=True)
class BenchRule:
    """One update rule as it is timed.

    ``bytes_per_param`` is what the mathematics has to move in float32: read parameter, gradient and states, write parameter
    and states. Clipping reads the gradient once more: 4 bytes.
    """

    name: str
    ours: type
    twin: type | None  # in torch.optim
    bytes_per_param: int
    torch_has_fused: bool  # on this device
    kwargs: dict[str, Any] = field(default_factory=dict)


RULES = {
    rule.name: rule
    for rule in (
        BenchRule("AdamW", fusedopt.AdamW, torch.optim.AdamW, 28, True, {"weight_decay": 0.1}),
        BenchRule("Adam", fusedopt.Adam, torch.optim.Adam, 28, True),
        BenchRule("AMSGrad", fusedopt.AdamW, torch.optim.AdamW, 36, True, {"amsgrad": True}),
        BenchRule("NAdam", fusedopt.NAdam, torch.optim.NAdam, 28, False),
        BenchRule("Lion", fusedopt.Lion, None, 20, False),
        BenchRule("RMSprop", fusedopt.RMSprop, torch.optim.RMSprop, 20, False),
        BenchRule("Adagrad", fusedopt.Adagrad, torch.optim.Adagrad, 20, True),
        BenchRule("SGD", fusedopt.SGD, torch.optim.SGD, 20, True, {"momentum": 0.9}),
    )
}

MAX_NORM = 1.0


@dataclass(frozen=True)
class Contestant:
    """``make(rule, params, clip, lr)`` returns a step (clip included), or None where the contestant has not that rule."""

    name: str
    make: Callable[[BenchRule, list[torch.nn.Parameter], bool, float], Callable[[], Any] | None]


def _ours(backend=None):
    def make(rule, params, clip, lr):
        limit = MAX_NORM if clip else None
        return rule.ours(params, lr=lr, max_grad_norm=limit, backend=backend, **rule.kwargs).step

    return make


def _torch(**implementation):
    def make(rule, params, clip, lr):
        if rule.twin is None or ("fused" in implementation and not rule.torch_has_fused):
            return None
        try:
            optimizer = rule.twin(params, lr=lr, **rule.kwargs, **implementation)
        except RuntimeError:
            if "fused" not in implementation:
                raise
            return None  # this version of torch has it not for this device

        def clip_and_step():
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            optimizer.step()

        return clip_and_step if clip else optimizer.step

    return make


OURS = Contestant("fusedopt", _ours())  # with the backend that "auto" picks, the fastest
OURS_TRITON = Contestant("fusedopt triton", _ours("triton"))
TORCH_FUSED = Contestant("torch fused", _torch(fused=True))
TORCH_FOREACH = Contestant("torch foreach", _torch(foreach=True))
TORCH_SPARSE = "torch sparse"  # the class of torch.optim that takes sparse gradients (sparse.py)
PEERS = {"cpu": (TORCH_FUSED, TORCH_FOREACH), "cuda": (TORCH_FUSED, TORCH_FOREACH, OURS_TRITON)}
