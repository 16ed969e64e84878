"""Clipping by global norm, three ways, one mechanism: a coefficient that the update multiplies gradients with.

1. ``Optimizer(..., max_grad_norm=1.0)``: every step computes the norm and clips.
2. ``opt.clip_grad_norm_(1.0)``: computes the norm now, and the next ``step`` clips.
3. ``fusedopt.clip_grad_norm_([opt_a, opt_b], 1.0)``: the same, with one norm over several optimizers.

Gradients are never written: after any of the three, ``p.grad`` is what ``backward`` left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from fusedopt.errors import UNCHANGED
from fusedopt.plan import Plan, combine_norms

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

NONFINITE = ("propagate", "skip", "error")


def check_max_norm(name: str, max_norm: float | None) -> float | None:
    """The limit as a float; None stays None.

    Raises:
        ValueError: negative or NaN.
    """
    if max_norm is None:
        return None
    value = float(max_norm)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0 (inf: compute the norm, do not clip), got {max_norm}")
    return value


def coefficient(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch; NaN for a NaN norm. An infinite limit never clips."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef >= 1 else coef


class Clip:
    """What one optimizer knows about clipping. Apart from the optimizer, so that wrappers that copy its attributes share it."""

    def __init__(self, max_grad_norm: float | None, nonfinite: str):
        self.max_grad_norm = check_max_norm("max_grad_norm", max_grad_norm)
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {', '.join(map(repr, NONFINITE))}, got {nonfinite!r}")
        self.nonfinite = nonfinite
        self.grad_norm: torch.Tensor | None = None
        self.skipped_steps = 0
        self.forget()

    def forget(self) -> None:
        """Drops what `defer` left for the next step."""
        self._pending_coef = 1.0
        self._pending_is_finite: bool | None = None  # None: nothing is pending

    def defer(self, norm: float, max_norm: float) -> None:
        """Leaves it to the next step to clip to ``max_norm`` a gradient whose norm, clipped so far, is ``norm``."""
        self._pending_coef *= coefficient(norm, max_norm)
        self._pending_is_finite = math.isfinite(norm)

    @property
    def pending_coef(self) -> float:
        return self._pending_coef

    def take(self, plan: Plan, grad_scale: float, found_inf: bool) -> float | None:
        """What this step multiplies gradients with; None if it is to be skipped.

        Args:
            grad_scale: what the loss was multiplied with; the norm is that of the unscaled gradients.
            found_inf: whether the caller has already seen a gradient that is not finite.

        Raises:
            RuntimeError: ``nonfinite="error"`` and the norm is NaN or infinite.
        """
        if found_inf:
            self._skip()
            return None
        coef = self._pending_coef / grad_scale
        is_finite = self._pending_is_finite
        if self.max_grad_norm is not None or (self.nonfinite != "propagate" and is_finite is None):
            norm = plan.grad_norm() * abs(coef)
            is_finite = math.isfinite(norm)
            if is_finite or self.nonfinite != "error":
                self.record(norm, plan)
            if self.max_grad_norm is not None:
                coef *= coefficient(norm, self.max_grad_norm)
        if is_finite is False and self.nonfinite == "error":
            entry = plan.first_nonfinite()
            where = f"{entry}: gradient holds NaN or infinity" if entry else "the gradient norm is NaN or infinite"
            raise RuntimeError(f"{plan.owner}: {where}; {UNCHANGED}")
        if is_finite is False and self.nonfinite == "skip":
            self._skip()
            return None
        self.forget()
        return coef

    def record(self, norm: float, plan: Plan) -> None:
        self.grad_norm = torch.tensor(norm, dtype=plan.norm_dtype, device=plan.norm_device)

    def _skip(self) -> None:
        self.skipped_steps += 1
        self.forget()


def clip_grad_norm_(
    optimizers: FusedOptimizer | Iterable[FusedOptimizer], max_norm: float, *, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Clips the gradients of several optimizers by their common norm, at the next ``step`` of each.

    Args:
        optimizers: one fusedopt optimizer, or several without a parameter in common.
        max_norm: largest norm; ``inf`` only computes it.
        error_if_nonfinite: raise instead of going on if the norm is NaN or infinite.

    Returns:
        The 2-norm over all gradients before clipping, 0-d.

    Raises:
        TypeError: not a fusedopt optimizer.
        ValueError: ``max_norm`` negative or NaN; no optimizer; a parameter in two of them.
        RuntimeError: the norm is not finite and ``error_if_nonfinite``. Then nothing is clipped.
    """
    from fusedopt.optimizer import FusedOptimizer

    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    if not optimizers:
        raise ValueError("clip_grad_norm_ needs at least one optimizer; the iterable is empty or already used up")
    for optimizer in optimizers:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"clip_grad_norm_ takes fusedopt optimizers, got {type(optimizer).__name__}")
    limit = check_max_norm("max_norm", max_norm)
    if limit is None:
        raise ValueError("max_norm must be a number, got None")
    owner_of: dict[int, int] = {}
    for i, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for param in group["params"]:
                if owner_of.setdefault(id(param), i) != i:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} is in optimizers {owner_of[id(param)]} and {i}"
                    )

    norms = []
    for optimizer in optimizers:
        with optimizer._planned("clip_grad_norm_") as plan:
            norms.append(plan.grad_norm() * optimizer._clip.pending_coef)
            dtype, device = plan.norm_dtype, plan.norm_device
    norm = combine_norms(norms)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(f"the gradient norm is {norm}, so gradients cannot be clipped; {UNCHANGED}")
    result = torch.tensor(norm, dtype=dtype, device=device)
    for optimizer in optimizers:
        optimizer._clip.defer(norm, limit)
        optimizer._clip.grad_norm = result
    return result
