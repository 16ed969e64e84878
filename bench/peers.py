"""Who takes part, and the rules they run. A new peer or device is a new `Contestant`; nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt


@dataclass(frozen=True)
class BenchRule:
    """One update rule as it is timed.

    ``bytes_per_param`` is what the mathematics has to move in float32: read parameter, gradient and states, write parameter
    and states; with what it reads before, where it sums over tensors. Clipping reads the gradient once more: 4 bytes. SAM's
    ascent (``sam_rho``) reads it for its norm, reads parameter and gradient, and writes the parameter and what it was: 20.
    """

    name: str
    ours: type
    twin: type | None  # in torch.optim
    bytes_per_param: int
    torch_has_fused: bool  # on this device
    kwargs: dict[str, Any] = field(default_factory=dict)
    sam_rho: float | None = None  # both steps of SAM around it, without the second gradient


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
        BenchRule("RAdam", fusedopt.RAdam, torch.optim.RAdam, 28, False),
        BenchRule("Adan", fusedopt.Adan, None, 44, False),
        BenchRule("LAMB", fusedopt.LAMB, None, 44, False),
        BenchRule("StableAdamW", fusedopt.StableAdamW, None, 36, False),
        BenchRule("SAM(AdamW)", fusedopt.AdamW, torch.optim.AdamW, 48, True, {"weight_decay": 0.1}, sam_rho=0.05),
    )
}

MAX_NORM = 1.0


@dataclass(frozen=True)
class Contestant:
    """``make(rule, params, clip, lr)`` returns a step (clip included), or None where the contestant has not that rule."""

    name: str
    make: Callable[[BenchRule, list[torch.nn.Parameter], bool, float], Callable[[], Any] | None]


def _scheduled(optimizer, step):
    """The step, each time with another learning rate, as a schedule sets it: options are then read anew."""
    group = optimizer.param_groups[0]

    def scheduled():
        group["lr"] *= 1 - 2**-20
        step()

    return scheduled


def _ours(backend=None):
    def make(rule, params, clip, lr):
        options = dict(lr=lr, max_grad_norm=MAX_NORM if clip else None, backend=backend, **rule.kwargs)
        if rule.sam_rho is None:
            optimizer = rule.ours(params, **options)
            return _scheduled(optimizer, optimizer.step)
        optimizer = fusedopt.SAM(params, rule.ours, rho=rule.sam_rho, **options)

        def both_steps():
            optimizer.first_step()
            optimizer.second_step()

        return _scheduled(optimizer, both_steps)

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

        step = _scheduled(optimizer, clip_and_step if clip else optimizer.step)
        return step if rule.sam_rho is None else functools.partial(_plain_sam, params, rule.sam_rho, step)

    return make


@torch.no_grad()
def _plain_sam(params, rho, step):
    """Tensor by tensor, in the operations of the implementation that is copied most (github.com/davda54/sam): where ASAM
    has a factor, SAM multiplies by 1.0. It reads and writes 76 bytes a parameter; without these products, and with weights
    restored by a subtraction, not to the bit, it would be 64.
    """
    norm = torch.stack([(1.0 * param.grad).norm() for param in params]).norm()
    weights = [param.data for param in params]
    for param, old in zip(params, weights, strict=True):
        # There the copy comes back; here the contestants share parameters, which are to stay where they were.
        param.data = old.clone()
        param.add_(1.0 * param.grad * (rho / (norm + 1e-12)))
    for param, old in zip(params, weights, strict=True):
        param.data = old
    step()


OURS = Contestant("fusedopt", _ours())  # with the backend that "auto" picks, the fastest
OURS_TRITON = Contestant("fusedopt triton", _ours("triton"))
TORCH_FUSED = Contestant("torch fused", _torch(fused=True))
TORCH_FOREACH = Contestant("torch foreach", _torch(foreach=True))
TORCH_SPARSE = "torch sparse"  # the class of torch.optim that takes sparse gradients (sparse.py)
PEERS = {"cpu": (TORCH_FUSED, TORCH_FOREACH), "cuda": (TORCH_FUSED, TORCH_FOREACH, OURS_TRITON)}
