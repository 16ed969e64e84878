"""Clipping by global norm, three ways, one mechanism: a coefficient that the update multiplies gradients with.

1. ``Optimizer(..., max_grad_norm=1.0)``: every step computes the norm and clips.
2. ``opt.clip_grad_norm_(1.0)``: computes the norm now, and the next ``step`` clips.
3. ``fusedopt.clip_grad_norm_([opt_a, opt_b], 1.0)``: the same, with one norm over several optimizers.

Gradients are never written: after any of the three, ``p.grad`` is what ``backward`` left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

from fusedopt.compiler import not_compiled
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import check_max_norm
from fusedopt.step import Planned, defer_clip


@not_compiled
def clip_grad_norm_(
    optimizers: FusedOptimizer | Iterable[FusedOptimizer], max_norm: float, *, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Clips the gradients of several optimizers by their common norm, at the next ``step`` of each.

    Between this and that step gradients may be removed, not changed: the step raises if one is new or was written to. To
    go on without a step, call the optimizer's ``zero_grad()``, which drops the clip.

    Args:
        optimizers: one fusedopt optimizer, or several without a parameter in common.
        max_norm: largest norm, >= 0; ``inf`` only computes it.
        error_if_nonfinite: raise instead of going on if the norm is NaN or infinite.

    Returns:
        The 2-norm over all gradients before clipping, 0-d; float64 if one of the parameters is, else float32, on the
        first parameter's device.

    Raises:
        TypeError: not a fusedopt optimizer.
        ValueError: ``max_norm`` negative or NaN; no optimizer; a parameter in two of them.
        RuntimeError: the norm is not finite and ``error_if_nonfinite``; or gradients were changed since an earlier clip
            that no step has used. Then nothing is clipped.
    """
    if not isinstance(optimizers, Iterable):
        optimizers = [optimizers]  # one optimizer; what else it may be is refused below
    optimizers = list(optimizers)
    if not optimizers:
        raise ValueError("clip_grad_norm_ needs at least one optimizer; the iterable is empty or already used up")
    for optimizer in optimizers:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"clip_grad_norm_ takes fusedopt optimizers, got {type(optimizer).__name__}")
    limit = check_max_norm("max_norm", max_norm)
    with contextlib.ExitStack() as stack:
        plans = [stack.enter_context(Planned(optimizer._request("clip_grad_norm_"))) for optimizer in optimizers]
        owner_of: dict[int, int] = {}
        for i, plan in enumerate(plans):
            for entry in (entry for bucket in plan.buckets for entry in bucket.entries):
                owner = owner_of.setdefault(id(entry.owner), i)
                if owner != i:
                    raise ValueError(f"clip_grad_norm_: optimizers[{i}]: {entry}: also in optimizers[{owner}]")
        return defer_clip(plans, [optimizer._record for optimizer in optimizers], limit, error_if_nonfinite)
