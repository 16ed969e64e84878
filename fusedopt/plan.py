"""From parameter groups to a plan: all that a step needs, validated once and kept until something it depends on changes.

Making a plan checks every parameter, gradient and state before anything is written (`Plan.make`). A later step only asks
whether the plan still holds: the same objects, at the same addresses, with the same layouts (`Plan.refresh`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from operator import is_
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fusedopt import backends, dtensor
from fusedopt.backends import sparse
from fusedopt.checks import PARAM_DTYPES, Checks
from fusedopt.entry import AsynchronousBucket, Bucket, Entry, Mirror, Slot
from fusedopt.errors import UNCHANGED, fail, named_params
from fusedopt.extension import _C
from fusedopt.formats import plain_format
from fusedopt.layout import as_real, have_same_strides, is_dense
from fusedopt.rules import Options, Rule, check_no_own, read_options, with_lr
from fusedopt.states import States

NO_SOURCES: Mapping[torch.Tensor, torch.Tensor] = {}  # updates read parameters where they write them
ParamGroups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, Any]]


# ---- the options of groups -----------------------------------------------------------------------------------

Seen = tuple[list, list]  # keys and values of a group


class Groups:
    """The options of all groups of an optimizer.

    Args:
        whole: the options of the whole optimizer.
    """

    def __init__(self, rule: Rule, whole: Mapping[str, Any], num_groups: int):
        self._rule = rule
        self._whole = whole
        self.options: list[Options | None] = [None] * num_groups
        self._seen: list[Seen | None] = [None] * num_groups
        self.scalars: list[tuple[Any, ...]] = []  # for each group its hyperparameters, in the order of `Rule.hyper`
        self.signs: list[float] = []  # for each group what its gradients are multiplied with
        self.is_weighted: list[bool] = []  # for each group whether the norm takes its gradients times their parameters

    def read(self, owner: str, param_groups: list[dict[str, Any]]) -> bool:
        """Takes over hyperparameters, validated where they changed.

        Returns:
            False if the options now select other kernels, or if other gradients may be sparse.

        Raises:
            ValueError, TypeError: naming the group whose options are wrong; then nothing is taken over.
        """
        changed = [index for index, group in enumerate(param_groups) if not _is_as_seen(group, self._seen[index])]
        if not changed:
            return True
        # Replaced only when all groups are valid: a refusal must not lose a change.
        read, seen = [*self.options], [*self._seen]
        for index in changed:
            group = param_groups[index]
            if not isinstance(group, dict):
                kind = type(group).__name__
                raise TypeError(f"{owner}: param_groups[{index}] is a {kind}, not a dict; {UNCHANGED}")
            try:
                check_no_own(self._rule, group, self._whole)
                scheduled = _but_for_lr(group, seen[index])
                if scheduled:
                    read[index], seen[index] = with_lr(self._rule, read[index], group["lr"]), scheduled
                else:
                    read[index], seen[index] = read_options(self._rule, group), _seen(group)
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{owner}: param_groups[{index}]: {reason}; {UNCHANGED}") from None
        is_same_kernel = all(
            before is None or (before.variant, before.is_sparse_exact) == (now.variant, now.is_sparse_exact)
            for before, now in zip(self.options, read, strict=True)
        )
        self.options, self._seen = read, seen
        self.scalars = [options.scalars for options in read]
        self.signs = [-1.0 if options.maximize else 1.0 for options in read]
        weight = None if self._rule.norm_weight is None else self._rule.hyper.index(self._rule.norm_weight)
        self.is_weighted = [weight is not None and bool(scalars[weight]) for scalars in self.scalars]
        return is_same_kernel


def _seen(group: dict[str, Any]) -> Seen | None:
    """A group's keys and values; None if an option can change without becoming another object, as a tensor or a list can."""
    options = (value for name, value in group.items() if name not in ("params", "param_names"))
    flat = (item for value in options for item in (value if isinstance(value, tuple) else (value,)))
    is_fixed = all(item is None or type(item) in (float, int, bool, str) for item in flat)
    return ([*group], [*group.values()]) if is_fixed else None


def _is_as_seen(group: dict[str, Any], seen: Seen | None) -> bool:
    """Whether a group holds the very objects that it held when it was `_seen`."""
    return seen is not None and type(group) is dict and [*group] == seen[0] and all(map(is_, group.values(), seen[1]))


def _but_for_lr(group: dict[str, Any], seen: Seen | None) -> Seen | None:
    """What is `_seen` of a group now, if only its learning rate is another, a float: schedulers do that in every step."""
    if seen is None or type(group.get("lr")) is not float:
        return None
    names, values = seen[0], [*seen[1]]
    values[names.index("lr")] = group["lr"]
    return (names, values) if _is_as_seen(group, (names, values)) else None


# ---- the plan --------------------------------------------------------------------------------------------------


class Plans:
    """The plans that an optimizer keeps from step to step, by what they are for. One thread at a time may use them.

    An object, so that wrappers of the optimizer which copy its attributes share it.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Plan] = {}
        self.in_step: dict[int, int] = {}  # process -> the thread that is in a step


class Request(NamedTuple):
    """What a plan is wanted for."""

    plans: Plans
    purpose: str  # under which it is kept there
    backend: str | None  # as of the optimizer
    owner: str  # who plans, for error messages: ``AdamW.step``
    rule: Rule
    param_groups: ParamGroups
    state: State
    is_lazy: bool  # whether rows that a sparse gradient does not touch may stand still though the rule would move them
    whole: Mapping[str, Any]  # the options of the whole optimizer
    sources: Mapping[torch.Tensor, torch.Tensor]  # of parameters whose values an update reads from another tensor


class Plan:
    """The parameters of an optimizer in buckets of one device and backend.

    Raises:
        ValueError, TypeError: naming the group whose options are wrong.
    """

    def __init__(self, request: Request):
        self.owner = request.owner
        self.rule = request.rule
        self.is_lazy = request.is_lazy
        self.is_void = False  # it has been seen not to hold any more
        self.sources = request.sources
        self._state = request.state
        self.groups = Groups(request.rule, request.whole, len(request.param_groups))
        self.groups.read(request.owner, request.param_groups)
        self.buckets: list[Bucket] = []
        self.norm_groups: list[dtensor.NormGroup | None] = []  # of each bucket
        self.asynchronous: AsynchronousBucket | None = (
            None  # the first bucket, if all compute coefficients by themselves, on one device
        )
        self.mirrors: list[Mirror] = []
        self.of_fsdp1: Entry | None = None
        self.distributed: list[Entry] = []
        self.states: States | None = None
        self._locals: list[tuple[torch.Tensor, torch.Tensor]] = []  # DTensors, each with its local tensor when planned

    # ---- making it ---------------------------------------------------------------------------------------------

    def make(self, param_groups: ParamGroups, backend: str | None, before: Plan | None) -> None:
        """Checks every parameter, gradient and state, and makes the states that are missing; see `discard_unused_states`.

        Args:
            before: the plan that this one replaces; it knows the step counts that are in no state.

        Raises:
            ValueError, TypeError, RuntimeError: naming the parameter and the reason.
        """
        checks = Checks(self.owner, self.rule, self.is_lazy)
        entries = self._collect(param_groups, checks)
        if any(entry.param.tensor.is_cuda for entry in entries) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.owner}: a CUDA graph is being captured, but parameters, states or options are not those of the "
                f"last step; make a step before the capture; {UNCHANGED}"
            )
        counts = {}  # those that are in no state
        if before and not self.rule.keeps_step:
            known = [entry for bucket in before.buckets for entry in bucket.entries if not entry.is_idle]
            counts = {entry.owner: entry.step for entry in known}
        self.states = States(self.rule, self._state, checks, counts)
        chosen = functools.cache(lambda device: backends.choose(device, backend))

        def backend_of(entry: Entry) -> ModuleType:
            return chosen(entry.param.tensor.device) if entry.has_kernels else backends.reference

        for entry in entries:
            self._complete(entry, param_groups[entry.group], backend_of, checks)
        planned = [entry for entry in entries if not entry.is_idle]
        self.of_fsdp1 = next((entry for entry in planned if dtensor.is_of_fsdp1(entry.owner)), None)
        if self.of_fsdp1 is not None and self.rule.num_sums:
            reason = "belongs to FSDP1, but the rule sums over whole tensors, not shards"
            checks.fail(self.of_fsdp1, (TypeError, reason))
        checks.overlap(planned)
        is_double = any(entry.compute_dtype == torch.float64 for entry in planned)
        self.norm_dtype = torch.float64 if is_double else torch.float32
        self.norm_device = planned[0].param.tensor.device if planned else torch.device("cpu")
        self._make_buckets(entries, planned, backend_of)
        # Without the extension every bucket is good for one step.
        self._watch = _C.Watch(param_groups, self._state) if _C else None
        # The watch and the buckets compare addresses: while they live, nothing else may come to live at one of them.
        self._pinned = (
            [[group["params"], *group["params"]] for group in param_groups],
            [[values, *(values.values() if isinstance(values, dict) else ())] for values in self._state.values()],
            [
                tensor.untyped_storage()
                for entry in planned
                for slot in (entry.source, *entry.written)
                for tensor in slot.tensors
                if slot is not entry.param
            ],
        )

    def _collect(self, param_groups: ParamGroups, checks: Checks) -> list[Entry]:
        """One entry per parameter, checked against its gradient."""
        entries, seen = [], set()
        for g, group in enumerate(param_groups):
            if "params" not in group:
                fail(ValueError, self.owner, f"param_groups[{g}]", "'params' is missing")
            if not isinstance(group["params"], list):
                kind = type(group["params"]).__name__
                fail(TypeError, self.owner, f"param_groups[{g}]", f"'params' is a {kind}, not a list")
            for i, name, param in named_params(group):
                if id(param) in seen:
                    continue
                if not isinstance(param, torch.Tensor):
                    where = f"param_groups[{g}]['params'][{i}] is a {type(param).__name__}, not a tensor"
                    raise TypeError(f"{self.owner}: {where}; {UNCHANGED}")
                seen.add(id(param))
                slot = Slot("param", self._local(param), plain_format(param.dtype))
                options = self.groups.options[g]
                states = [None] * len(self.rule.states)
                entry = Entry(param, g, i, name, options.variant, len(entries), slot, slot, states)
                entry.has_kernels = self.rule.has_kernels(group)
                grad = param.grad
                if entry.is_distributed:
                    self.distributed.append(entry)
                    entry.is_grad_handed = True
                    misplaced = None if grad is None else dtensor.misplaced(grad, param)
                    if misplaced:
                        checks.fail(entry, (RuntimeError, f"gradient is {misplaced}; redistribute it"))
                    grad = entry.handed_grad = dtensor.grad_part(grad)
                if grad is not None:
                    entry.is_sparse = sparse.is_sparse(grad) and self.rule.takes_sparse
                    checks.param(entry)
                    checks.grad(entry, grad, options.is_sparse_exact)
                entries.append(entry)
        return entries

    def _complete(self, entry: Entry, group: Mapping[str, Any], backend_of: Any, checks: Checks) -> None:
        """Puts source, states and counts into an entry, unless it is idle: without gradient, and without all its states."""
        param = entry.param.tensor
        if entry.grad is None:
            if param.dtype not in PARAM_DTYPES or not self.states.is_complete(entry, group):
                return
            checks.param(entry)
        source = self.sources.get(entry.owner)
        if source is not None:
            format = plain_format(entry.compute_dtype)
            checks.state(entry, "old_param", source, tuple(entry.owner.shape), format)
            entry.source = Slot("old_param", self._local(source), format)
        backend = backend_of(entry)
        on_device = param.device if backend.SCALARS_ON_DEVICE else torch.device("cpu")
        self.states.adopt(entry, group, on_device, self._local)
        self.mirrors += entry.mirrors
        tensors = [slot.tensor for slot in entry.slots if slot is not None]
        if entry.is_sparse:
            entry.is_strided = not all(tensor.is_contiguous() for tensor in tensors)
        else:
            tensors += [] if entry.grad is None else [entry.grad]
            param, *tensors = map(as_real, (param, *tensors))  # some states hold complex numbers as pairs
            entry.is_strided = not all(is_dense(tensor) and have_same_strides(tensor, param) for tensor in tensors)
        checks.formats(entry, backend.__name__.rpartition(".")[2], backend.formats())

    def _make_buckets(self, entries: list[Entry], planned: list[Entry], backend_of: Any) -> None:
        def place(entry: Entry) -> tuple[torch.device, bool, dtensor.NormGroup | None, bool]:
            return entry.param.tensor.device, entry.has_kernels, entry.norm_group, entry.is_sparse

        # Idle parameters are only watched, which any bucket can: frozen ones may be where no backend works.
        members = {place(entry): [] for entry in planned or entries[:1]}
        others = members[min(members, key=lambda where: where[-1])] if members else []  # dense ones, if there are any
        for entry in entries:
            members.get(place(entry), others).append(entry)
        # Sparse ones first: copying rows can run out of memory, and then nothing has been written.
        for where, there in sorted(members.items(), key=lambda item: not item[0][-1]):
            _, has_kernels, norm_group, is_sparse = where
            first = next((entry for entry in there if not entry.is_idle), there[0])
            backend = backend_of(first) if has_kernels else backends.reference
            make = functools.partial(sparse.Bucket, backend) if is_sparse else backend.Bucket
            self.buckets.append(make(self.rule, there, is_alone=len(members) == 1))
            self.norm_groups.append(norm_group)
        if all(bucket.is_asynchronous and bucket.device == self.buckets[0].device for bucket in self.buckets):
            self.asynchronous = next(iter(self.buckets), None)

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's local tensor; `refresh` looks whether it still is that."""
        local = dtensor.part_of(tensor)
        if local is not tensor:
            self._locals.append((tensor, local))
        return local

    # ---- is the plan still right? ------------------------------------------------------------------------------

    def refresh(self, param_groups: ParamGroups, state: State) -> bool:
        """Reads hyperparameters and gradients of this step. False: make a new plan; nothing was changed."""
        return (
            len(param_groups) == len(self.groups.options)
            and (self._watch is None or self._watch.unchanged(param_groups, state))
            and self.groups.read(self.owner, param_groups)
            and self._may_be_captured(param_groups)
            and (not self._locals or self._take_local_grads())
            and all([bucket.refresh() for bucket in self.buckets])  # noqa: C419  each must read its gradients
        )

    def discard_unused_states(self) -> bool:
        """Removes the states that this plan made and no update has used. True if there were any: the plan is then void."""
        return self.states.discard_unused(self._is_used)

    def _is_used(self, entry: Entry, step: float) -> bool:
        """Whether an update has advanced an entry beyond that step count; without waiting for a device, if no one has."""
        if entry.step.is_cpu or entry.is_sparse:
            return float(entry.step) != step
        device = entry.param.tensor.device
        return any(bucket.has_launched for bucket in self.buckets if bucket.is_asynchronous and bucket.device == device)

    def _take_local_grads(self) -> bool:
        """Hands over the local gradients of DTensors. False: they have other local tensors, or gradients, than planned."""
        if any(tensor._local_tensor is not local for tensor, local in self._locals):
            return False
        for entry in self.distributed:
            grad = entry.owner.grad
            if grad is not None and not (dtensor.is_dtensor(grad) and dtensor.is_placed_like(grad, entry.owner)):
                return False
            entry.handed_grad = dtensor.grad_part(grad)
        return True

    def _may_be_captured(self, param_groups: ParamGroups) -> bool:
        """True; or an error, if a CUDA graph is being captured that would not do in a replay what it does now."""
        capturing = [bucket for bucket in self.buckets if bucket.is_capturing]
        if not capturing:
            return True
        if not all(bucket.is_capturable for bucket in capturing):
            raise RuntimeError(
                f"{self.owner}: a CUDA graph is being captured, which cannot hold sparse gradients; {UNCHANGED}"
            )
        for index, group in enumerate(param_groups):
            if not group.get("capturable", True):  # some classes have no such option, as in torch
                raise RuntimeError(
                    f"{self.owner}: param_groups[{index}]: a CUDA graph is being captured, which needs "
                    f"capturable=True; {UNCHANGED}"
                )
        return True

    # ---- what it holds -----------------------------------------------------------------------------------------

    def active(self) -> list[Entry]:
        """The parameters that have a gradient, in bucket order."""
        return [entry for bucket in self.buckets for entry in bucket.entries if entry.grad is not None]
