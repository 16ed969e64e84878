"""Clipping by global norm, three ways, one mechanism: a coefficient that the update multiplies gradients with.

1. ``Optimizer(..., max_grad_norm=1.0)``: every step computes the norm and clips.
2. ``opt.clip_grad_norm_(1.0)``: computes the norm now, and the next ``step`` clips.
3. ``fusedopt.clip_grad_norm_([opt_a, opt_b], 1.0)``: the same, with one norm over several optimizers.

Gradients are never written: after any of the three, ``p.grad`` is what ``backward`` left.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch.utils.weak import TensorWeakRef

from fusedopt import dtensor
from fusedopt.compiler import not_compiled
from fusedopt.errors import UNCHANGED
from fusedopt.plan import Plan, combine_norms
from fusedopt.rules import is_elsewhere, number
from fusedopt.types import Nonfinite

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

NONFINITE: tuple[Nonfinite, ...] = get_args(Nonfinite)


def check_max_norm(name: str, max_norm: float) -> float:
    """The limit as a float.

    Raises:
        ValueError: negative, NaN or not a number.
    """
    value = number(name, max_norm)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0 (inf: compute the norm, do not clip), got {max_norm}")
    return value


def check_max_grad_norm(max_grad_norm: float | None) -> float | None:
    """The limit of every step as a float; None stays None.

    Raises:
        ValueError: zero, which configurations use for "off", negative, NaN or not a number.
    """
    if max_grad_norm is None:
        return None
    value = number("max_grad_norm", max_grad_norm)
    if value == 0:
        raise ValueError(
            f"max_grad_norm must be > 0, got {max_grad_norm} (it would zero every gradient); pass None to disable clipping"
        )
    if not value > 0:
        raise ValueError(f"max_grad_norm must be > 0 (inf: compute the norm, do not clip), got {max_grad_norm}")
    return value


def check_nonfinite(value: Nonfinite) -> Nonfinite:
    """The same value.

    Raises:
        ValueError: none of `NONFINITE`.
    """
    if value not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, NONFINITE))}, got {value!r}")
    return value


def coefficient(norm: float, max_norm: float) -> float:
    """min(1, max_norm / (norm + 1e-6)), as torch; NaN for a NaN norm. An infinite limit never clips."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef >= 1 else coef


def _version_of(grad: torch.Tensor) -> tuple[int, int]:
    """How often it was written to, as autograd counts, apart for a DTensor and for what this process has of it. Not counted
    for tensors made in inference mode."""
    whole, part = (0 if of.is_inference() else of._version for of in (grad, dtensor.part_of(grad)))
    return whole, part


@dataclass(frozen=True)
class Control:
    """What gradients are to be multiplied with, and whether their norm is finite: known here, or on their device."""

    coef: float = 1.0
    is_finite: bool = True
    # In place of the two: float64 [coef, 0 if finite else 1], the control of kernels/engine.py.
    on_device: torch.Tensor | None = None

    def on_host(self) -> Control:
        """The same, known here; waits for the device."""
        if self.on_device is None:
            return self
        coef, is_nonfinite = map(float, self.on_device)
        return Control(coef, is_nonfinite == 0)

    def on(self, bucket: Any) -> torch.Tensor | None:
        """The same on the device of a bucket that is asynchronous; None if there is nothing to multiply with."""
        if self.on_device is not None:
            return self.on_device.to(bucket.device, non_blocking=True)
        return None if self == UNCLIPPED else bucket.control(self.coef, self.is_finite)


UNCLIPPED = Control()


@dataclass(frozen=True)
class Pending:
    """A clip that the next step is to make, and the gradients that it is for."""

    control: Control
    grads: dict[int, tuple[TensorWeakRef, tuple[int, int]]]  # id -> (gradient, its version)

    def knows(self, grad: torch.Tensor) -> bool:
        """Whether the norm was taken of this gradient, perhaps with other values."""
        return id(grad) in self.grads and self.grads[id(grad)][0]() is grad  # an id may be used again

    def is_for(self, grad: torch.Tensor) -> bool:
        """Whether the norm was taken of this gradient, not written to since."""
        return self.knows(grad) and _version_of(grad) == self.grads[id(grad)][1]


class Clip:
    """What one optimizer knows about clipping. Apart from the optimizer, so that wrappers that copy its attributes share it."""

    def __init__(self) -> None:
        self.grad_norm: torch.Tensor | None = None
        self._num_skipped = 0
        self._num_skipped_on_device: torch.Tensor | None = None
        self._pending: Pending | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pending": None}  # a copy has other gradients

    @property
    def skipped_steps(self) -> int | torch.Tensor:
        """A tensor where the device decides, and counts."""
        if self._num_skipped_on_device is None:
            return self._num_skipped
        return self._num_skipped + self._num_skipped_on_device

    def count_skip(self) -> None:
        """One more step that changed nothing."""
        self._num_skipped += 1
        self.forget()

    def forget(self) -> None:
        """Drops what `defer` left for the next step."""
        self._pending = None

    def pending(self, plan: Plan, *, is_replaceable: bool = False) -> Control:
        """What waits for the next step.

        Args:
            plan: holds the gradients of now.
            is_replaceable: drop it if every gradient is another tensor than those it is for.

        Raises:
            RuntimeError: a gradient is new or was written to since, so that clipping it would be wrong.
        """
        if self._pending is None:
            return UNCLIPPED
        active = plan.active()
        if is_replaceable and not any(self._pending.knows(entry.owner.grad) for entry in active):
            self.forget()
            return UNCLIPPED
        changed = [entry for entry in active if not self._pending.is_for(entry.owner.grad)]
        if changed:
            raise RuntimeError(
                f"{plan.owner}: {changed[0]}: its gradient is new or was changed since clip_grad_norm_; call step() before "
                f"changing gradients, or this optimizer's zero_grad() to drop the clip; {UNCHANGED}"
            )
        return self._pending.control

    def defer(self, plan: Plan, control: Control) -> None:
        """Leaves it to the next step to multiply the gradients of now."""
        grads = [entry.owner.grad for entry in plan.active()]
        seen = {id(grad): (TensorWeakRef(grad), _version_of(grad)) for grad in grads}
        self._pending = Pending(control, seen)

    def _measures(self, limit: float | None, nonfinite: Nonfinite) -> bool:
        """Whether a step needs the norm; a deferred clip has looked at it already."""
        return limit is not None or (nonfinite != "propagate" and self._pending is None)

    def step(
        self, plan: Plan, max_grad_norm: float | None, nonfinite: Nonfinite, grad_scale: Any, found_inf: Any
    ) -> None:
        """Updates, or skips the step.

        Args:
            max_grad_norm, nonfinite: as of the optimizer.
            grad_scale: what the loss was multiplied with, a number or a tensor of one; the norm is that of the unscaled
                gradients. None: 1.
            found_inf: whether the caller has already seen a gradient that is not finite: a number or a tensor of one.

        Raises:
            ValueError: ``max_grad_norm``, ``nonfinite`` or ``grad_scale`` is out of range.
            RuntimeError: ``nonfinite="error"`` and the norm is NaN or infinite; or gradients changed after a deferred clip.
        """
        plan.has_updated = False
        limit, nonfinite = check_max_grad_norm(max_grad_norm), check_nonfinite(nonfinite)
        if grad_scale is None:
            grad_scale = 1.0
        else:
            plan.check_scaled()
            grad_scale = _checked(plan, "grad_scale", grad_scale)
        if found_inf is None:
            found_inf = 0.0
        else:
            found_inf = _checked(plan, "found_inf", found_inf, takes_bool=True)
            found_inf = plan.on_any_process(found_inf)  # who skips alone would leave others waiting for its norm
        if nonfinite == "error" and plan.asynchronous is not None and plan.asynchronous.is_capturing:
            raise RuntimeError(
                f"{plan.owner}: nonfinite='error' waits for the device, which no CUDA graph can; {UNCHANGED}"
            )
        # An error must be raised now, and so waits for the device.
        if plan.asynchronous is None or nonfinite == "error":
            coef = self._coef(plan, limit, nonfinite, float(grad_scale), bool(found_inf))
            if coef is not None:
                plan.update(coef)
        else:
            self._step_on_device(plan, limit, nonfinite, grad_scale, found_inf)
        self.forget()  # only now: a step that fails must still clip when it is tried again

    def _coef(
        self, plan: Plan, limit: float | None, nonfinite: Nonfinite, grad_scale: float, found_inf: bool
    ) -> float | None:
        """What this step multiplies gradients with; None if it is to be skipped."""
        if found_inf:
            self._num_skipped += 1
            return None
        pending = self.pending(plan).on_host()
        coef, is_finite = pending.coef / grad_scale, pending.is_finite
        if self._measures(limit, nonfinite):
            norm = plan.grad_norm() * abs(coef)
            is_finite = math.isfinite(norm)
            if self._pending is None and (is_finite or nonfinite != "error"):
                self.grad_norm = torch.tensor(norm, dtype=plan.norm_dtype, device=plan.norm_device)
            if limit is not None:
                coef *= coefficient(norm, limit)
        if not is_finite and nonfinite == "error":
            plan.fail_nonfinite()
        if not is_finite and nonfinite == "skip":
            self._num_skipped += 1
            return None
        return coef

    def _step_on_device(
        self, plan: Plan, limit: float | None, nonfinite: Nonfinite, grad_scale: Any, found_inf: Any
    ) -> None:
        """The same without waiting for the device, which decides itself what happens."""
        device = plan.norm_device
        if self._num_skipped_on_device is None or self._num_skipped_on_device.device != device:
            if self._num_skipped_on_device is not None:
                self._num_skipped += int(self._num_skipped_on_device)
            self._num_skipped_on_device = torch.zeros((), dtype=torch.int64, device=device)
        control = self.pending(plan).on(plan.asynchronous)
        if self._measures(limit, nonfinite):
            norm, control = plan.measure(math.inf if limit is None else limit, control, grad_scale, plan.norm_dtype)
            grad_scale = 1.0  # is in the control
            if self._pending is None:
                self.grad_norm = norm
        plan.update(
            1.0,
            control=control,
            grad_scale=grad_scale,
            found_inf=found_inf,
            skips_nonfinite=nonfinite == "skip",
            skipped=self._num_skipped_on_device,
        )


def _checked(plan: Plan, name: str, value: Any, takes_bool: bool = False) -> float | torch.Tensor:
    """One of GradScaler's attributes: a number, or left where it is if a device has it, which nobody waits for."""
    try:
        if is_elsewhere(value):
            return value
        value = number(name, value, takes_bool)
    except ValueError as error:
        raise ValueError(f"{plan.owner}: {error}; {UNCHANGED}") from None
    if not takes_bool and not 0 < value < math.inf:
        raise ValueError(f"{plan.owner}: {name} must be positive and finite, got {value}; {UNCHANGED}")
    return value


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
    from fusedopt.optimizer import FusedOptimizer

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
        plans = [stack.enter_context(optimizer._planned("clip_grad_norm_")) for optimizer in optimizers]
        owner_of: dict[int, int] = {}
        for i, plan in enumerate(plans):
            for entry in (entry for bucket in plan.buckets for entry in bucket.entries):
                owner = owner_of.setdefault(id(entry.param), i)
                if owner != i:
                    raise ValueError(f"clip_grad_norm_: optimizers[{i}]: {entry}: also in optimizers[{owner}]")
        clips = [optimizer._clip for optimizer in optimizers]
        pending = [clip.pending(plan, is_replaceable=True) for clip, plan in zip(clips, plans, strict=True)]
        dtype = torch.float64 if any(plan.norm_dtype == torch.float64 for plan in plans) else torch.float32
        buckets = [plan.asynchronous for plan in plans]
        if len(plans) == 1 and buckets[0] is not None:
            result, on_device = plans[0].measure(limit, pending[0].on(buckets[0]), 1.0, dtype)
            controls = [Control(on_device=on_device)]
        else:
            pending = [control.on_host() for control in pending]
            norms = [plan.grad_norm() * c.coef for plan, c in zip(plans, pending, strict=True)]
            norm = float(combine_norms([torch.tensor(norms, dtype=torch.float64)]))
            device = next((plan.norm_device for plan in plans if plan.active()), torch.device("cpu"))
            result = torch.tensor(norm, dtype=dtype, device=device)
            coef = coefficient(norm, limit)
            controls = [Control(control.coef * coef, math.isfinite(norm)) for control in pending]
        if error_if_nonfinite and not math.isfinite(result):
            raise RuntimeError(f"the gradient norm is {float(result)}, so gradients cannot be clipped; {UNCHANGED}")
        for clip, plan, control in zip(clips, plans, controls, strict=True):
            clip.defer(plan, control)
            clip.grad_norm = result
    return result
