"""What a step does, from top to bottom: plan, scale, found_inf, norm, clip, skip, update.

`step` is all of it. SAM's ascent and `clip_grad_norm_` use its parts: `Planned`, `measured`, `update`, `defer_clip`.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, TracebackType
from typing import Any, NoReturn

import torch

from fusedopt import dtensor
from fusedopt.entry import Entry
from fusedopt.errors import UNCHANGED, fail
from fusedopt.interrupts import uninterrupted
from fusedopt.options import check_max_grad_norm, check_nonfinite
from fusedopt.plan import Plan, Request
from fusedopt.ranges import is_elsewhere, number
from fusedopt.record import UNCLIPPED, Control, Pending, StepRecord
from fusedopt.stalls import StallWatch

_NOTHING = contextlib.nullcontext()
# What each process would do with FSDP1's parameters, and the remedies.
NORM_OF_SHARD = (
    "take the norm of its own shard: clip by the model's own clip_grad_norm_(), and leave out max_grad_norm and nonfinite; "
    "or use fully_shard (FSDP2)"
)
INFINITIES_OF_SHARD = (
    "look for infinities in its own shard alone: call the scaler's unscale_(optimizer) before its step, or leave out "
    "fused=True"
)


# ---- the plan --------------------------------------------------------------------------------------------------


class Planned:
    """A context in which a plan is validated, and holds the gradients there are now.

    States that were made for an update which then does not happen are gone again at its end.
    """

    def __init__(self, request: Request):
        self._request = request
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._plan: Plan | None = None

    def __enter__(self) -> Plan:
        request = self._request
        try:
            # One operation, so that no thread can come between. By process, so that a fork during a step leaves the child
            # free; by thread, so that one that an interrupt threw out of its step can go on.
            if request.plans.in_step.setdefault(self._process, self._thread) != self._thread:
                raise RuntimeError(f"{request.owner}: another thread is in a step of the same optimizer; {UNCHANGED}")
            plan = self._plan = request.plans.kept.get(request.purpose)
            if plan is not None:
                plan.owner = request.owner
            if (
                plan is None
                or plan.is_void
                or plan.is_lazy != request.is_lazy
                or plan.sources is not request.sources
                or not plan.refresh(request.param_groups, request.state)
            ):
                plan = self._planned_anew(plan)
            return plan
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _planned_anew(self, before: Plan | None) -> Plan:
        request = self._request
        if before is not None:
            # Kept until another one is made: it knows step counts that are in no state.
            before.is_void = True
            self._release()
        plan = self._plan = Plan(request)
        # Apart from the constructor, so that an interrupt finds the states that it made.
        plan.make(request.param_groups, request.backend, before)
        if not plan.refresh(request.param_groups, request.state):
            raise RuntimeError(f"{request.owner}: parameters or gradients changed while they were read; {UNCHANGED}")
        request.plans.kept[request.purpose] = plan
        return plan

    def _release(self) -> None:
        """Lets go of the gradients that the plan holds."""
        plan = self._plan
        with uninterrupted() if plan.distributed else _NOTHING:
            for bucket in plan.buckets:
                bucket.release()
            for entry in plan.distributed:
                entry.handed_grad = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        plan, plans = self._plan, self._request.plans
        try:
            if plan is not None:
                try:
                    self._release()
                finally:
                    if plan.states is not None and plan.states.fresh and plan.discard_unused_states():
                        plan.is_void = True
        finally:
            if plans.in_step.get(self._process) == self._thread:
                del plans.in_step[self._process]


# ---- the step --------------------------------------------------------------------------------------------------


def step(
    request: Request,
    record: StepRecord,
    stalls: StallWatch,
    whole: Mapping[str, Any],
    grad_scale: Any = None,
    found_inf: Any = None,
    before: Callable[[Plan], None] | None = None,
) -> bool:
    """Updates every parameter that has a gradient, or skips the step.

    Args:
        request: for the plan.
        whole: options of the whole optimizer; ``max_grad_norm`` and ``nonfinite`` are looked at.
        grad_scale: what the loss was multiplied with, a number or a tensor of one element; the norm is that of the unscaled
            gradients. None: 1.
        found_inf: whether the caller has already seen a gradient that is not finite, a number or a tensor of one element.
        before: called when nothing is left that refuses the step, before anything is written.

    Returns:
        Whether there was an update; True as well where the device decides that.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: ``nonfinite="error"`` and the norm is NaN or infinite; or gradients changed after a deferred clip.
        And as `Plan.make`. Then nothing has changed.
    """
    with Planned(request) as plan:
        is_updated = _step_planned(plan, record, whole, grad_scale, found_inf, before)
        stalls.num_steps += 1
        # One step before a look too: a parameter that swings between two values is seen at both.
        if is_updated and stalls.num_steps >= stalls.next_look - 1:
            stalls.look(plan, record)
    return is_updated


def _step_planned(
    plan: Plan,
    record: StepRecord,
    whole: Mapping[str, Any],
    grad_scale: Any,
    found_inf: Any,
    before: Callable[[Plan], None] | None,
) -> bool:
    """The step from scale and found_inf on; see `step`."""
    limit, nonfinite = whole.get("max_grad_norm"), whole.get("nonfinite", "propagate")
    if (limit, nonfinite) != record.checked or type(limit) not in (float, NoneType):  # they may be set in every step
        limit, nonfinite = record.checked = check_max_grad_norm(limit), check_nonfinite(nonfinite)
    scale = 1.0 if grad_scale is None else _unscaling(plan, grad_scale)
    found = 0.0 if found_inf is None else _found_on_any_process(plan, found_inf)
    # A deferred clip has looked at the norm already.
    measures = limit is not None or (nonfinite != "propagate" and record.pending is None)

    # An error must be raised now, and so waits for the device.
    if plan.asynchronous is not None and nonfinite != "error":
        control = None if record.pending is None else record.pending_control(plan).on(plan.asynchronous)
        counter = record.counter_on(plan.norm_device)
        if measures:  # the control then holds the scale
            norm, control = measured_on_device(
                plan, math.inf if limit is None else limit, control, scale, plan.norm_dtype
            )
            scale = 1.0
            if record.pending is None:
                record.grad_norm = norm
        device_decides = dict(found_inf=found, skips_nonfinite=nonfinite == "skip", skipped=counter)
        if before is not None:
            before(plan)
        update(plan, 1.0, control=control, grad_scale=scale, **device_decides)
        record.pending = None  # only now: a step that fails must still clip when it is tried again
        return True

    if plan.asynchronous is not None and plan.asynchronous.is_capturing:
        raise RuntimeError(
            f"{plan.owner}: nonfinite='error' waits for the device, which no CUDA graph can; {UNCHANGED}"
        )
    if bool(found):
        record.count_skip()
        return False
    pending = UNCLIPPED if record.pending is None else record.pending_control(plan).on_host()
    coef, is_finite = pending.coef / float(scale), pending.is_finite
    if measures:
        norm = measured(plan) * abs(coef)
        is_finite = math.isfinite(norm)
        if record.pending is None and (is_finite or nonfinite != "error"):
            record.grad_norm = torch.tensor(norm, dtype=plan.norm_dtype, device=plan.norm_device)
        if limit is not None:
            coef *= clip_coefficient(norm, limit)
    if not is_finite and nonfinite == "error":
        fail_nonfinite(plan)
    if not is_finite and nonfinite == "skip":
        record.count_skip()
        return False
    if before is not None:
        before(plan)
    update(plan, coef)
    record.pending = None
    return True


def _unscaling(plan: Plan, grad_scale: Any) -> float | torch.Tensor:
    """What a GradScaler has multiplied the loss with.

    Raises:
        ValueError: it is not positive and finite.
        RuntimeError: a parameter is FSDP1's: only the scaler knows how its gradients are spread over processes.
    """
    if plan.of_fsdp1 is not None:
        _refuse_fsdp1(plan, INFINITIES_OF_SHARD)
    scale = _of_scaler(plan, "grad_scale", grad_scale)
    if not is_elsewhere(scale) and not 0 < scale < math.inf:
        raise ValueError(f"{plan.owner}: grad_scale must be positive and finite, got {scale}; {UNCHANGED}")
    return scale


def _found_on_any_process(plan: Plan, found_inf: Any) -> float | torch.Tensor:
    """Whether any of the processes that parameters are spread over has found a gradient that is not finite.

    A process that skips alone would leave the others waiting for its norm.
    """
    found = _of_scaler(plan, "found_inf", found_inf)
    for group in dict.fromkeys(group for group in plan.norm_groups if group):
        if not isinstance(found, torch.Tensor):
            found = torch.full((), found, device=plan.norm_device)
        found = dtensor.gathered(found.reshape(1), group).max()
    return found


def _of_scaler(plan: Plan, name: str, value: Any) -> float | torch.Tensor:
    """One of GradScaler's attributes: a number, or left where it is if a device has it, which nobody waits for."""
    try:
        return value if is_elsewhere(value) else number(name, value, takes_bool=name == "found_inf")
    except ValueError as error:
        raise ValueError(f"{plan.owner}: {error}; {UNCHANGED}") from None


# ---- the norm --------------------------------------------------------------------------------------------------


def measured(plan: Plan) -> float:
    """2-norm of all gradients, as they are stored, over all processes that they are spread over."""
    if plan.of_fsdp1 is not None:
        _refuse_fsdp1(plan, NORM_OF_SHARD)
    is_weighted = plan.groups.is_weighted
    norms = [bucket.grad_norm(is_weighted) for bucket in plan.buckets]
    if len(norms) == 1 and plan.norm_groups[0] is None:
        return norms[0]
    parts = [torch.tensor([norm], dtype=torch.float64) for norm in norms]
    return float(combine_norms([*map(_over_processes, parts, plan.norm_groups)]))


def measured_on_device(
    plan: Plan, max_norm: float, previous: torch.Tensor | None, grad_scale: float | torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where everything is asynchronous, of the unscaled gradients, 0-d of ``dtype``; and the control that clips it.

    Args:
        previous: the control of an earlier clip.
    """
    if plan.of_fsdp1 is not None:
        _refuse_fsdp1(plan, NORM_OF_SHARD)
    is_weighted = plan.groups.is_weighted
    if len(plan.buckets) == 1 and plan.norm_groups[0] is None:
        return plan.buckets[0].measure(max_norm, previous, grad_scale, dtype, is_weighted)
    parts = []
    for bucket, group in zip(plan.buckets, plan.norm_groups, strict=True):
        norm, control = bucket.measure(math.inf, previous, grad_scale, torch.float64, is_weighted)
        parts.append(_over_processes(norm.reshape(1), group))
    norm = combine_norms(parts)
    coef = control[0] * clip_coefficient(norm, max_norm)
    return norm.to(dtype), torch.stack([coef, (~norm.isfinite()).double()])


def clip_coefficient(norm: Any, max_norm: float) -> Any:
    """min(1, max_norm / (norm + 1e-6)) of a float or a tensor, as torch; NaN for a NaN norm. An infinite limit never clips."""
    if max_norm == math.inf:
        return 1.0
    coef = max_norm / (norm + 1e-6)
    if isinstance(coef, torch.Tensor):
        return coef.clamp(max=1.0)
    return 1.0 if coef >= 1 else coef


def combine_norms(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of parts whose 2-norms are given, float64 in vectors on one device; 0-d. Nobody waits for it.

    Scaled, so that squares neither overflow nor vanish; 0, infinity and NaN go through as they are.
    """
    norms = torch.cat([torch.zeros(1, dtype=torch.float64, device=parts[0].device if parts else "cpu"), *parts])
    largest = norms.max()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return scale * (norms / scale).square().sum().sqrt()


def _over_processes(norm: torch.Tensor, group: dtensor.NormGroup | None) -> torch.Tensor:
    """The norms of all processes of a group."""
    return norm if group is None else dtensor.gathered(norm, group)


def _refuse_fsdp1(plan: Plan, reason: str) -> NoReturn:
    """Only FSDP1 knows how the elements of its parameters are spread over processes."""
    fail(RuntimeError, plan.owner, plan.of_fsdp1, f"belongs to FSDP1, of which each process would {reason}")


def first_nonfinite(plan: Plan) -> Entry | None:
    """The first parameter, in bucket order, whose gradient holds NaN or infinity."""
    for bucket in plan.buckets:
        index = bucket.first_nonfinite()
        if index >= 0:
            return bucket.entries[index]
    return None


def fail_nonfinite(plan: Plan) -> NoReturn:
    """Raises RuntimeError that names the first gradient which holds NaN or infinity."""
    entry = first_nonfinite(plan)
    where = f"{entry}: gradient holds NaN or infinity" if entry else "the gradient norm is NaN or infinite"
    raise RuntimeError(f"{plan.owner}: {where}; {UNCHANGED}")


# ---- clipping at the next step ---------------------------------------------------------------------------------


def defer_clip(
    plans: Sequence[Plan], records: Sequence[StepRecord], max_norm: float, error_if_nonfinite: bool
) -> torch.Tensor:
    """Leaves it to the next step of several optimizers to clip their gradients of now by one common norm.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``; or gradients were changed since an earlier clip
            that no step has used. Then nothing is clipped.
    """
    pending = [
        UNCLIPPED if record.pending is None else record.pending_control(plan, is_replaceable=True)
        for record, plan in zip(records, plans, strict=True)
    ]
    dtype = torch.float64 if any(plan.norm_dtype == torch.float64 for plan in plans) else torch.float32
    if len(plans) == 1 and plans[0].asynchronous is not None:
        previous = pending[0].on(plans[0].asynchronous)
        result, on_device = measured_on_device(plans[0], max_norm, previous, 1.0, dtype)
        controls = [Control(on_device=on_device)]
    else:
        pending = [control.on_host() for control in pending]
        norms = [measured(plan) * control.coef for plan, control in zip(plans, pending, strict=True)]
        norm = float(combine_norms([torch.tensor(norms, dtype=torch.float64)]))
        device = next((plan.norm_device for plan in plans if plan.active()), torch.device("cpu"))
        result = torch.tensor(norm, dtype=dtype, device=device)
        coef = clip_coefficient(norm, max_norm)
        controls = [Control(control.coef * coef, math.isfinite(norm)) for control in pending]
    if error_if_nonfinite and not math.isfinite(result):
        raise RuntimeError(f"the gradient norm is {float(result)}, so gradients cannot be clipped; {UNCHANGED}")
    for record, plan, control in zip(records, plans, controls, strict=True):
        grads = [entry.owner.grad for entry in plan.active()]
        record.pending = Pending.of(control, grads)
        record.grad_norm = result
    return result


# ---- the update ------------------------------------------------------------------------------------------------


def update(plan: Plan, coef: float, **on_device: Any) -> None:
    """Advances every parameter that has a gradient by one step, its gradient times ``coef``.

    Args:
        on_device: what the device multiplies with as well, and when it skips, where everything is asynchronous.
    """
    grad_coefs = [sign * coef for sign in plan.groups.signs]
    for mirror in plan.mirrors:
        mirror.counted.copy_(mirror.kept.detach().reshape(()))
    writes = []
    for bucket in plan.buckets:
        writes.append(bucket.prepare(plan.groups.scalars, grad_coefs, **on_device))
        on_device.pop("skipped", None)  # one counts
    with uninterrupted() if len(plan.buckets) > 1 or plan.distributed or plan.mirrors else _NOTHING:
        for write in writes:
            write()
        for mirror in plan.mirrors:
            mirror.kept.detach().copy_(mirror.counted)
        if plan.distributed:  # autograd counts how often a DTensor was written to apart from its local tensor
            written = [entry.owner for entry in plan.distributed if entry.grad is not None]
            torch.autograd.graph.increment_version(written)
