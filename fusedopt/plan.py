"""From parameters to a plan: everything a step needs, validated and kept until something it depends on changes.

Making a plan checks every parameter, gradient and state before anything is written. A later step only asks whether the
plan still holds (`Plan.refresh`): the same objects, at the same addresses, with the same layouts.
"""

from __future__ import annotations

import contextlib
import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import is_
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fusedopt import backends, dtensor, sparse
from fusedopt.errors import UNCHANGED, name_param, named_params, short_dtype
from fusedopt.extension import _C
from fusedopt.interrupts import uninterrupted
from fusedopt.reference import clip_coefficient
from fusedopt.rules import Options, Rule, State, check_no_own, is_elsewhere, number, read_options, with_lr

_NOTHING = contextlib.nullcontext()
MAX_DIMS = 64  # of torch's reductions and of the C++ table
COUNT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)  # of step counts that users put into a state
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def compute_dtype(param: torch.Tensor) -> torch.dtype:
    """What a parameter is computed in: float64 for float64 and complex128, float32 for everything narrower."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def state_dtype(param: torch.Tensor) -> torch.dtype:
    """What a parameter's states are kept in: the dtype it is computed in, or the complex one made of two of these."""
    return param.dtype if param.is_complex() else compute_dtype(param)


def new_state(param: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised state of a parameter: where it is, and if of its shape, with its layout."""
    if shape == param.shape:
        return torch.empty_like(param, dtype=state_dtype(param), requires_grad=False)
    return torch.empty(shape, dtype=state_dtype(param), device=param.device)


def first_state(rule: Rule, group: Mapping[str, Any], kept: State, param: torch.Tensor) -> torch.Tensor:
    """A state as it is before the first step."""
    value = new_state(param, rule.state_shape(group, kept, param.shape)).zero_()
    if kept.initial is not None:
        initial = float(group[kept.initial])
        value.fill_(complex(initial, initial) if value.is_complex() else initial)
    return value


def instead_of(shape: tuple[int, ...], param: torch.Tensor) -> str:
    """The end of a complaint about a state's shape: the right one, where it is not the parameter's."""
    return "" if shape == param.shape else f", not {shape}"


def grad_dtypes(param: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The gradient dtypes a parameter takes: its own, and those that convert to the type it is computed in."""
    if param.is_complex():
        return (param.dtype,)
    real = (torch.float32, torch.bfloat16, torch.float16)
    return (*real, torch.float64) if param.dtype == torch.float64 else real


class Mirror(NamedTuple):
    """A count that the state has in another shape or dtype than a backend uses: read before each update, written after it."""

    name: str
    counted: torch.Tensor  # `Entry.step` or `Entry.extra`
    kept: torch.Tensor  # in the state: one element, of any shape and dtype


@dataclass(slots=True)
class Entry:
    """One parameter of a plan, with what a backend needs to update it. Of DTensors it holds the parts that this process has."""

    param: torch.Tensor
    owner: torch.Tensor  # what the group holds, whose state it is: the parameter itself, or the DTensor it is a part of
    group: int
    index: int
    name: str | None
    variant: str  # the kernel
    states: list[torch.Tensor | None]  # one per state of the rule, None where not stored
    step: torch.Tensor | None  # 0-d float32
    extra: torch.Tensor | None  # 0-d
    mirrors: list[Mirror] = field(default_factory=list)
    source: torch.Tensor | None = None  # the parameter's values, where an update may read them instead
    is_strided: bool = False  # param, grad and states share no dense layout; or, with is_sparse, are not contiguous
    is_sparse: bool = False  # the gradient is
    has_kernels: bool = True  # else the reference is asked, whatever the backend

    @property
    def is_idle(self) -> bool:
        """Whether it has neither a gradient nor state yet, and takes no part until it gets one."""
        return self.step is None

    @property
    def written(self) -> list[torch.Tensor | None]:
        """What an update writes beside the parameter."""
        return [*self.states, self.step, self.extra]

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.param)

    @property
    def state_dtype(self) -> torch.dtype:
        return state_dtype(self.param)

    @property
    def is_distributed(self) -> bool:
        """Whether it is a part of a DTensor. Its gradient is there from `Plan.refresh`, or `make`, to `Plan.release`."""
        return self.param is not self.owner

    def __str__(self) -> str:
        return name_param(self.group, self.index, self.name, self.owner)


@dataclass(slots=True)
class _Span:
    """A tensor of a plan and the addresses between which its elements lie."""

    entry: Entry
    tensor: torch.Tensor
    what: str
    device: str = field(init=False)
    begin: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.device, self.begin = str(self.tensor.device), self.tensor.data_ptr()
        self.end = self.begin + _extent(self.tensor) * self.tensor.element_size()


class Plan:
    """All parameters of an optimizer, in buckets of one device and backend, once it is made.

    Args:
        is_lazy: whether rows that a sparse gradient does not touch may stand still though the rule would move them.
        whole: the options of the whole optimizer.

    Raises:
        ValueError, TypeError: naming the group whose options are wrong.
    """

    def __init__(
        self,
        owner: str,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        state: dict[torch.Tensor, dict[str, Any]],
        is_lazy: bool,
        whole: Mapping[str, Any],
    ):
        self.owner = owner
        self._whole = whole
        self.rule = rule
        self.is_lazy = is_lazy
        self._state = state
        self._options: list[Options | None] = [None] * len(param_groups)
        self._seen: list[tuple[list, list] | None] = [None] * len(param_groups)  # the groups that _options is of
        self._read_options(param_groups)
        self._fresh: list[tuple[Entry, float, list[str]]] = []  # its step count then, names of the states made
        self.reads_sources = self.has_updated = False
        self.buckets = []
        self.asynchronous: Any = None  # the first bucket, if all compute coefficients by themselves, on one device
        self._distributed: list[Entry] = []
        self._mirrors: list[Mirror] = []
        self._of_fsdp1: Entry | None = None
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []  # DTensors, each with what this process has of it

    def make(
        self,
        param_groups: list[dict[str, Any]],
        backend: str | None,
        before: Plan | None,
        sources: Mapping[torch.Tensor, torch.Tensor],
    ) -> None:
        """Checks every parameter, gradient and state, and makes the state that is missing; see `discard_fresh_state`.

        Args:
            before: the plan that this one replaces; knows the step counts that are in no state.
            sources: of parameters, where an update can read their values instead (`update`).

        Raises:
            ValueError, TypeError, RuntimeError: naming the parameter and the reason.
        """
        self.sources = sources
        entries = self._collect(param_groups)
        if any(entry.param.is_cuda for entry in entries) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self.owner}: a CUDA graph is being captured, but parameters, states or options are not those of the "
                f"last step; make a step before the capture; {UNCHANGED}"
            )
        self._counts = {}  # those that are in no state
        if before and not self.rule.keeps_step:
            self._counts = {entry.owner: entry.step for bucket in before.buckets for entry in bucket.entries}
        chosen = functools.cache(lambda device: backends.choose(device, backend))

        def place(entry: Entry) -> tuple[torch.device, bool, dtensor.NormGroup | None, bool]:
            return entry.param.device, entry.has_kernels, dtensor.norm_group(entry.owner), entry.is_sparse

        def backend_of(device: torch.device, has_kernels: bool) -> ModuleType:
            return chosen(device) if has_kernels else backends.reference

        for entry in entries:
            if entry.owner in sources:
                entry.source = self._part_of(sources[entry.owner])
            self._attach_state(entry, param_groups[entry.group], self._state, backend_of)
            self._mirrors += entry.mirrors
        planned = [entry for entry in entries if not entry.is_idle]
        self._of_fsdp1 = next((entry for entry in planned if dtensor.is_of_fsdp1(entry.owner)), None)
        if self._of_fsdp1 is not None and self.rule.num_sums:
            self._fail(TypeError, self._of_fsdp1, "belongs to FSDP1, but the rule sums over whole tensors, not shards")
        self._check_overlap(planned)
        is_double = any(entry.compute_dtype == torch.float64 for entry in planned)
        self.norm_dtype = torch.float64 if is_double else torch.float32
        self.norm_device = planned[0].param.device if planned else torch.device("cpu")
        # Idle parameters are only watched, which any bucket can: frozen ones may be where no backend works.
        members = {place(entry): [] for entry in planned or entries[:1]}
        others = members[min(members, key=lambda where: where[-1])] if members else []  # dense ones, if there are any
        for entry in entries:
            members.get(place(entry), others).append(entry)
        # Sparse ones first: copying rows can run out of memory, and then nothing has been written.
        for where, there in sorted(members.items(), key=lambda item: not item[0][-1]):
            device, has_kernels, norm_group, is_sparse = where
            chosen_backend = backend_of(device, has_kernels)
            if is_sparse:
                self.buckets.append(sparse.Bucket(self.rule, there, chosen_backend))
            else:
                self.buckets.append(chosen_backend.Bucket(self.rule, there))
            self.buckets[-1].norm_group = norm_group
        for bucket in self.buckets:
            bucket.is_alone = len(self.buckets) == 1
        if all(bucket.is_asynchronous and bucket.device == self.buckets[0].device for bucket in self.buckets):
            self.asynchronous = next(iter(self.buckets), None)
        # None: then every bucket is good for one step.
        self._watch = _C.Watch(param_groups, self._state) if _C else None
        # The watch and the buckets compare addresses: while they live, nothing else may come to live at one of them.
        self._pinned = (
            [[group["params"], *group["params"]] for group in param_groups],
            [[values, *(values.values() if isinstance(values, dict) else ())] for values in self._state.values()],
            [
                tensor.untyped_storage()
                for entry in planned
                for tensor in (*entry.written, entry.source)
                if tensor is not None
            ],
        )

    # ---- is the plan still right? ------------------------------------------------------------------------------

    def refresh(self, param_groups: list[dict[str, Any]], state: dict[torch.Tensor, dict[str, Any]]) -> bool:
        """Reads hyperparameters and gradient addresses of this step. False: make a new plan; nothing was changed."""
        return (
            len(param_groups) == len(self._options)
            and (self._watch is None or self._watch.unchanged(param_groups, state))
            and self._read_options(param_groups)
            and self._may_be_captured(param_groups)
            and self._take_parts()
            and all([bucket.refresh() for bucket in self.buckets])  # noqa: C419  each must read its gradients
        )

    def _take_parts(self) -> bool:
        """Gives this process's parts of DTensors their gradients. False: they have other parts, or gradients, than planned."""
        if any(whole._local_tensor is not part for whole, part in self._parts):
            return False
        for entry in self._distributed:
            grad = entry.owner.grad
            if grad is not None and not (dtensor.is_dtensor(grad) and dtensor.is_placed_like(grad, entry.owner)):
                return False
            try:
                entry.param.grad = dtensor.grad_part(grad)
            except RuntimeError:  # one that torch does not let be the gradient of such a tensor: planning tells why
                return False
        return True

    def _may_be_captured(self, param_groups: list[dict[str, Any]]) -> bool:
        """True; or an error, if a CUDA graph is being captured that would not do in a replay what it does now."""
        capturing = [bucket for bucket in self.buckets if bucket.is_capturing]
        if any(isinstance(bucket, sparse.Bucket) for bucket in capturing):
            raise RuntimeError(
                f"{self.owner}: a CUDA graph is being captured, which cannot hold sparse gradients; {UNCHANGED}"
            )
        for index, group in enumerate(param_groups if capturing else ()):
            if not group.get("capturable", True):  # some classes have no such option, as in torch
                raise RuntimeError(
                    f"{self.owner}: param_groups[{index}]: a CUDA graph is being captured, which needs "
                    f"capturable=True; {UNCHANGED}"
                )
        return True

    def _read_options(self, param_groups: list[dict[str, Any]]) -> bool:
        """Takes over the groups' hyperparameters, validated where they changed. False: they select other kernels, or other
        gradients may be sparse."""
        changed = [index for index, group in enumerate(param_groups) if not _is_as_seen(group, self._seen[index])]
        if not changed:
            return True
        # Replaced only when all groups are valid: a refusal must not lose a change.
        read, seen = [*self._options], [*self._seen]
        for index in changed:
            group = param_groups[index]
            if not isinstance(group, dict):
                kind = type(group).__name__
                raise TypeError(f"{self.owner}: param_groups[{index}] is a {kind}, not a dict; {UNCHANGED}")
            try:
                check_no_own(self.rule, group, self._whole)
                scheduled = _but_for_lr(group, seen[index])
                if scheduled:
                    read[index], seen[index] = with_lr(self.rule, read[index], group["lr"]), scheduled
                else:
                    read[index], seen[index] = read_options(self.rule, group), _seen(group)
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{self.owner}: param_groups[{index}]: {reason}; {UNCHANGED}") from None
        is_same_kernel = all(
            before is None or (before.variant, before.is_sparse_exact) == (now.variant, now.is_sparse_exact)
            for before, now in zip(self._options, read, strict=True)
        )
        self._options, self._seen = read, seen
        self.scalars = [options.scalars for options in read]
        self.signs = [-1.0 if options.maximize else 1.0 for options in read]
        return is_same_kernel

    # ---- what a step does --------------------------------------------------------------------------------------

    def active(self) -> list[Entry]:
        """The parameters that have a gradient, in bucket order."""
        return [entry for bucket in self.buckets for entry in bucket.entries if entry.param.grad is not None]

    @property
    def is_weighted(self) -> list[bool]:
        """For each group whether its gradients are taken times their parameters for the norm."""
        if self.rule.norm_weight is None:
            return [False] * len(self.scalars)
        column = self.rule.hyper.index(self.rule.norm_weight)
        return [bool(scalars[column]) for scalars in self.scalars]

    def _check_is_whole(self) -> None:
        """Refuses to take for the norm of all gradients what is that of one process's shard.

        Raises:
            RuntimeError: a parameter is FSDP1's.
        """
        self._refuse_fsdp1(
            "take the norm of its own shard: clip by the model's own clip_grad_norm_(), and leave out max_grad_norm and "
            "nonfinite; or use fully_shard (FSDP2)"
        )

    def grad_norm(self) -> float:
        """2-norm of all gradients, as they are stored, on all processes that they are spread over."""
        self._check_is_whole()
        is_weighted = self.is_weighted
        norms = [bucket.grad_norm(is_weighted) for bucket in self.buckets]
        if len(norms) == 1 and self.buckets[0].norm_group is None:
            return norms[0]
        parts = [
            self._over_processes(bucket, torch.tensor([norm], dtype=torch.float64))
            for bucket, norm in zip(self.buckets, norms, strict=True)
        ]
        return float(combine_norms(parts))

    def measure(
        self, max_norm: float, previous: torch.Tensor | None, grad_scale: float | torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same where everything is `asynchronous`, of the unscaled gradients, 0-d of ``dtype``; and the control that
        clips it. See device.py."""
        self._check_is_whole()
        is_weighted = self.is_weighted
        if len(self.buckets) == 1 and self.buckets[0].norm_group is None:
            return self.buckets[0].measure(max_norm, previous, grad_scale, dtype, is_weighted)
        parts = []
        for bucket in self.buckets:
            norm, control = bucket.measure(math.inf, previous, grad_scale, torch.float64, is_weighted)
            parts.append(self._over_processes(bucket, norm.reshape(1)))
        norm = combine_norms(parts)
        coef = control[0] if max_norm == math.inf else control[0] * clip_coefficient(norm, max_norm)
        return norm.to(dtype), torch.stack([coef, (~norm.isfinite()).double()])

    def _over_processes(self, bucket: Any, norm: torch.Tensor) -> torch.Tensor:
        """The norms of all processes that a bucket is spread over."""
        return dtensor.gathered(norm, bucket.norm_group) if bucket.norm_group else norm

    def check_scaled(self) -> None:
        """Refuses gradients that a GradScaler left scaled, where only the scaler knows how they are spread over processes.

        Raises:
            RuntimeError: a parameter is FSDP1's.
        """
        self._refuse_fsdp1(
            "look for infinities in its own shard alone: call the scaler's unscale_(optimizer) before its step, or leave out "
            "fused=True"
        )

    def _refuse_fsdp1(self, reason: str) -> None:
        if self._of_fsdp1 is not None:
            self._fail(RuntimeError, self._of_fsdp1, f"belongs to FSDP1, of which each process would {reason}")

    def on_any_process(self, found_inf: float | torch.Tensor) -> float | torch.Tensor:
        """Whether any of the processes that parameters are spread over has found it; each of them asks."""
        for group in dict.fromkeys(bucket.norm_group for bucket in self.buckets if bucket.norm_group):
            if not isinstance(found_inf, torch.Tensor):
                found_inf = torch.full((), found_inf, device=self.norm_device)
            found_inf = dtensor.gathered(found_inf.reshape(1), group).max()
        return found_inf

    def first_nonfinite(self) -> Entry | None:
        """The first parameter, in bucket order, whose gradient holds NaN or infinity."""
        for bucket in self.buckets:
            index = bucket.first_nonfinite()
            if index >= 0:
                return bucket.entries[index]
        return None

    def fail_nonfinite(self) -> None:
        """Raises RuntimeError that names the first gradient which holds NaN or infinity."""
        entry = self.first_nonfinite()
        where = f"{entry}: gradient holds NaN or infinity" if entry else "the gradient norm is NaN or infinite"
        raise RuntimeError(f"{self.owner}: {where}; {UNCHANGED}")

    def update(self, coef: float, **on_device: Any) -> None:
        """Advances every parameter that has a gradient by one step, its gradient times ``coef``.

        Where `reads_sources` is set, from the values that its source has.

        Args:
            on_device: what the device multiplies with as well, where everything is `asynchronous`.
        """
        grad_coefs = [sign * coef for sign in self.signs]
        writes = []
        for mirror in self._mirrors:
            mirror.counted.copy_(mirror.kept.detach().reshape(()))
        for bucket in self.buckets:
            writes.append(bucket.prepare(self.scalars, grad_coefs, self.reads_sources, **on_device))
            on_device.pop("skipped", None)  # one counts
        with uninterrupted() if len(self.buckets) > 1 or self._distributed or self._mirrors else _NOTHING:
            for write in writes:
                write()
            for mirror in self._mirrors:
                mirror.kept.detach().copy_(mirror.counted)
            if self._distributed:  # autograd counts how often a DTensor was written to apart from its part
                written = [entry.owner for entry in self._distributed if entry.param.grad is not None]
                torch.autograd.graph.increment_version(written)
        self.has_updated = True

    def release(self) -> None:
        """Lets go of the gradients that `refresh` held."""
        with uninterrupted() if self._distributed else _NOTHING:
            for bucket in self.buckets:
                bucket.release()
            for entry in self._distributed:
                entry.param.grad = None

    def discard_fresh_state(self) -> bool:
        """Removes the state that this plan made and no update has used. True if there was any: the plan is then void."""
        unused = [(entry.owner, names) for entry, step, names in self._fresh if not self._is_used(entry, step)]
        for param, names in unused:
            known = self._state.get(param, {})
            for name in names:
                known.pop(name, None)
            if not known:
                self._state.pop(param, None)
        self._fresh = []
        return bool(unused)

    def _is_used(self, entry: Entry, step: float) -> bool:
        """Whether an update has advanced an entry beyond that step count; without waiting for a device, if no one has."""
        if entry.step.is_cpu or entry.is_sparse:
            return float(entry.step) != step
        device = entry.param.device
        return any(bucket.has_launched for bucket in self.buckets if bucket.is_asynchronous and bucket.device == device)

    # ---- making it ---------------------------------------------------------------------------------------------

    def _fail(self, kind: type[Exception], entry: Entry, reason: str) -> None:
        raise kind(f"{self.owner}: {entry}: {reason}; {UNCHANGED}")

    def _part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """What this process has of a tensor; `refresh` looks whether that is still so."""
        part = dtensor.part_of(whole)
        if part is not whole:
            self._parts.append((whole, part))
        return part

    def _collect(self, param_groups: list[dict[str, Any]]) -> list[Entry]:
        """An entry for every parameter, once, checked against its gradient."""
        entries, seen = [], set()
        for g, group in enumerate(param_groups):
            if "params" not in group:
                raise ValueError(f"{self.owner}: param_groups[{g}]: 'params' is missing; {UNCHANGED}")
            if not isinstance(group["params"], list):
                kind = type(group["params"]).__name__
                raise TypeError(f"{self.owner}: param_groups[{g}]: 'params' is a {kind}, not a list; {UNCHANGED}")
            for i, name, param in named_params(group):
                if id(param) in seen:
                    continue
                if not isinstance(param, torch.Tensor):
                    where = f"param_groups[{g}]['params'][{i}]"
                    raise TypeError(f"{self.owner}: {where} is a {type(param).__name__}, not a tensor; {UNCHANGED}")
                seen.add(id(param))
                variant = self._options[g].variant
                part = self._part_of(param)
                entry = Entry(part, param, g, i, name, variant, [None] * len(self.rule.states), None, None)
                entry.has_kernels = self.rule.has_kernels(group)
                grad = param.grad
                if entry.is_distributed:
                    self._distributed.append(entry)
                    part.grad = None
                    if hasattr(torch.Tensor, "grad_dtype"):  # torch 2.10 and newer
                        part.grad_dtype = None  # any
                    problem = None if grad is None else dtensor.misplaced(grad, param)
                    if problem:
                        self._fail(RuntimeError, entry, f"gradient is {problem}; redistribute it")
                    grad = dtensor.grad_part(grad)
                if grad is not None:
                    entry.is_sparse = sparse.is_sparse(grad) and self.rule.takes_sparse
                    self._check_param(entry)
                    self._check_grad(entry, grad)
                    if entry.is_distributed:
                        part.grad = grad
                entries.append(entry)
        return entries

    def _check_param(self, entry: Entry) -> None:
        param = entry.param
        if entry.is_distributed:
            self._check_distributed(entry)
        if param.is_complex() and not entry.has_kernels:
            self._fail(TypeError, entry, "a rule by rows takes no complex parameters")
        if param.dtype not in PARAM_DTYPES:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
            self._fail(TypeError, entry, f"parameters of this dtype are not supported (supported: {supported})")
        self._check_plain(entry, param, "parameter")
        if param.numel() > 0 and _overlaps_itself(param):
            self._fail(RuntimeError, entry, f"several of its elements share one address, strides {param.stride()}")

    def _check_distributed(self, entry: Entry) -> None:
        """A DTensor, of which each process can update its part by itself."""
        where = dtensor.describe(entry.owner)
        if any(placement.is_partial() for placement in entry.owner.placements):
            self._fail(RuntimeError, entry, f"parameter is {where}; redistribute it")
        if not entry.has_kernels:
            self._fail(TypeError, entry, f"parameter is {where}; a rule by rows takes none")
        if self.rule.num_sums and dtensor.norm_group(entry.owner) is not None:
            self._fail(TypeError, entry, f"parameter is {where}, but the rule sums over the whole of it")

    def _check_grad(self, entry: Entry, grad: torch.Tensor) -> None:
        param = entry.param
        if entry.is_sparse:
            self._check_sparse(entry, grad)
        else:
            self._check_plain(entry, grad, "gradient")
        if grad.shape != param.shape:
            self._fail(RuntimeError, entry, f"gradient has shape {tuple(grad.shape)}")
        if grad.device != param.device:
            self._fail(RuntimeError, entry, f"gradient is on {grad.device}")
        if grad.dtype not in grad_dtypes(param):
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in grad_dtypes(param))
            self._fail(
                RuntimeError, entry, f"gradient is {short_dtype(grad)} (supported for this parameter: {allowed})"
            )

    def _check_sparse(self, entry: Entry, grad: torch.Tensor) -> None:
        """A sparse gradient that this group takes, of sound parts, and no subclass that dispatches itself."""
        if not self.is_lazy and not self._options[entry.group].is_sparse_exact:
            options = self.rule.still_without
            unless = f" unless {' = '.join(options)} = 0" if options else ""
            reason = f"gradient is sparse, but the rule also moves rows that it leaves out{unless}"
            self._fail(RuntimeError, entry, f"{reason}; sparse='lazy' lets them stand still, else make gradients dense")
        if type(grad).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            self._fail(TypeError, entry, f"gradient is a {type(grad).__name__}; this tensor subclass is not supported")
        self._check_plain(entry, grad._indices(), "gradient's tensor of indices")
        self._check_plain(entry, grad._values(), "gradient's tensor of values")
        if not entry.has_kernels and grad.sparse_dim() != 1:
            self._fail(
                RuntimeError, entry, f"gradient has {grad.sparse_dim()} sparse dimensions; a rule by rows takes one"
            )
        if not sparse.has_rows_inside(grad):
            self._fail(RuntimeError, entry, "gradient has indices beyond its shape")

    def _check_plain(self, entry: Entry, tensor: torch.Tensor, what: str) -> None:
        """A strided tensor with memory of its own; not sparse, nested, meta, nor a subclass that dispatches itself."""
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            self._fail(RuntimeError, entry, f"{what} has layout {layout}; only dense tensors are supported")
        if tensor.is_meta:
            self._fail(RuntimeError, entry, f"{what} is on the meta device, it has no values")
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            self._fail(TypeError, entry, f"{what} is a {type(tensor).__name__}; this tensor subclass is not supported")
        for is_lazy, kind, remedy in ((tensor.is_neg(), "negative", "neg"), (tensor.is_conj(), "conjugate", "conj")):
            if is_lazy:
                self._fail(RuntimeError, entry, f"{what} is a lazy {kind} view; call resolve_{remedy}() on it")
        most = MAX_DIMS - tensor.is_complex()  # the table has a complex tensor as pairs
        if tensor.dim() > most:
            self._fail(RuntimeError, entry, f"{what} has {tensor.dim()} dimensions; at most {most} are supported")
        try:
            held = tensor.untyped_storage().nbytes()
        except (RuntimeError, NotImplementedError):
            self._fail(RuntimeError, entry, f"{what} has no memory of its own (is it of torch.func or a fake tensor?)")
        if tensor.numel() > 0 and held < (tensor.storage_offset() + _extent(tensor)) * tensor.element_size():
            self._fail(RuntimeError, entry, f"{what} has lost its memory: {held} bytes are left of its storage")

    def _check_overlap(self, entries: list[Entry]) -> None:
        """What a step writes lies apart, from each other and from what it reads: else elements would race.

        A gradient may be the very memory of its own parameter: each element is then read before it is written.
        """
        written = []
        for entry in entries:
            names = ["parameter", *(f"state {state.name!r}" for state in self.rule.states), "state 'step'"]
            tensors = zip((entry.param, *entry.written), (*names, f"state {self.rule.extra!r}"), strict=True)
            written += [_Span(entry, tensor, what) for tensor, what in tensors if tensor is not None and tensor.numel()]
            written += [_Span(entry, mirror.kept, f"state {mirror.name!r}") for mirror in entry.mirrors]
        written.sort(key=lambda span: (span.device, span.begin))
        clusters: list[list[_Span]] = []  # of neighbours, each of which begins before the ones so far end
        end = 0
        for span in written:
            if not clusters or span.device != clusters[-1][0].device or span.begin >= end:
                clusters.append([])
                end = 0
            clusters[-1].append(span)
            end = max(end, span.end)
        for cluster in clusters:
            self._check_apart(cluster)
        starts = [(cluster[0].device, cluster[0].begin) for cluster in clusters]
        for entry in entries:
            grad = entry.param.grad
            # Values of a sparse gradient that lie in a parameter are copied.
            if grad is None or entry.is_sparse or grad.numel() == 0 or _is_same_memory(grad, entry.param):
                continue
            span = _Span(entry, grad, "gradient")
            first = max(bisect_right(starts, (span.device, span.begin)) - 1, 0)
            for cluster in map(clusters.__getitem__, range(first, len(clusters))):  # a slice would copy all the rest
                if (cluster[0].device, cluster[0].begin) >= (span.device, span.end):
                    break
                if cluster[0].device == span.device and max(other.end for other in cluster) > span.begin:
                    self._check_apart([*cluster, span])

    def _check_apart(self, spans: list[_Span]) -> None:
        """Stretches of memory that overlap may still have no element in common."""
        if len(spans) < 2:
            return
        dense = sorted((span for span in spans if _is_dense(span.tensor)), key=lambda span: span.begin)
        for span, other in zip(dense[1:], dense, strict=False):  # the usual case, without a map
            if span.begin < other.end:
                self._fail_apart(span, other)
        begin = min(span.begin for span in spans)
        owner = torch.full((max(span.end for span in spans) - begin,), -1, dtype=torch.int32, device="cpu")
        for i, span in enumerate(spans):  # owner: index of the span that a byte belongs to
            width = span.tensor.element_size()
            strides = (*(stride * width for stride in span.tensor.stride()), 1)
            own = owner.as_strided((*span.tensor.shape, width), strides, span.begin - begin)
            other = int(own.max())
            if other >= 0:
                self._fail_apart(span, spans[other])
            own.fill_(i)

    def _fail_apart(self, span: _Span, other: _Span) -> None:
        if other.what == "gradient":
            span, other = other, span
        owner = "" if span.entry is other.entry else f" of {other.entry}"
        self._fail(ValueError, span.entry, f"{span.what} shares memory with {other.what}{owner}; they must lie apart")

    def _attach_state(
        self,
        entry: Entry,
        group: Mapping[str, Any],
        state: dict[torch.Tensor, dict[str, Any]],
        backend_of: Callable[[torch.device, bool], ModuleType],
    ) -> None:
        """Checks the state there is, makes what is missing if the parameter has a gradient, and puts it in the entry."""
        param, rule = entry.param, self.rule
        known = state.get(entry.owner, {})
        if not isinstance(known, Mapping):
            self._fail(TypeError, entry, f"its state is a {type(known).__name__}, not a dict")
        stored = rule.stored(group)
        if param.grad is None:
            # Idle until its first gradient, unless it has all its states already.
            is_complete = any(stored) and all(known.get(kept.name) is not None for kept in stored if kept)
            if not is_complete or param.dtype not in PARAM_DTYPES or (rule.keeps_step and "step" not in known):
                return
            self._check_param(entry)

        if entry.source is not None:
            self._check_state(entry, "old_param", self.sources[entry.owner], tuple(entry.owner.shape))
        # Where the backend reads and advances them.
        is_on_device = backend_of(param.device, entry.has_kernels).SCALARS_ON_DEVICE
        device = param.device if is_on_device else torch.device("cpu")
        is_new = not any(kept and known.get(kept.name) is not None for kept in stored)
        made: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}
        scalars = {"step": 0.0} if rule.keeps_step else {}
        if rule.extra:
            scalars[rule.extra] = 1.0
        for name, initial in scalars.items():
            # As torch: a plain 0-d float32; what multiplies up over the run, in the states' dtype.
            dtype = torch.float32 if name == "step" else compute_dtype(param)
            value = known.get(name)
            if isinstance(value, torch.Tensor):
                self._check_plain(entry, value, f"state {name!r}")
            if value is not None and not is_elsewhere(value):  # else it would have to wait for the device
                try:
                    count = number(f"state {name!r}", value)
                except ValueError as error:
                    self._fail(ValueError, entry, str(error))
                if not 0 <= count < math.inf:
                    self._fail(ValueError, entry, f"state {name!r} is {count}")
            if _is_scalar_of(value, dtype, device):
                counts[name] = value
                continue
            counts[name] = _scalar(initial if value is None else value, dtype, device)
            if isinstance(value, torch.Tensor) and value.dtype not in COUNT_DTYPES:
                self._fail(
                    TypeError, entry, f"state {name!r} is {short_dtype(value)}, which cannot count; take float32"
                )
            if isinstance(value, torch.Tensor) and value.device == device:
                entry.mirrors.append(Mirror(name, counts[name], value))
            elif isinstance(value, torch.Tensor) and value.is_cpu and value.is_shared():
                reason = f"state {name!r} is in shared host memory, but this backend counts on {device}"
                self._fail(ValueError, entry, reason)
            else:
                made[name] = counts[name]
        for i, kept in enumerate(stored):
            if kept is None:
                continue
            value = known.get(kept.name)
            if value is None:
                value = made[kept.name] = first_state(rule, group, kept, entry.owner)
            self._check_state(entry, kept.name, value, rule.state_shape(group, kept, entry.owner.shape))
            self._check_stored(entry, kept.name, value, backend_of(param.device, entry.has_kernels))
            entry.states[i] = self._part_of(value)
        if rule.keeps_step:
            entry.step = counts["step"]
        elif not is_new and self._counts.get(entry.owner) is not None:  # the device may have skipped the first step
            entry.step = self._counts[entry.owner]
        else:  # it still has to know its first step
            entry.step = _scalar(0.0 if is_new else 1.0, torch.float32, device)
        if made:
            self._fresh.append(
                (
                    entry,
                    float(entry.step) if entry.step.is_cpu else 0.0,
                    [name for name in made if known.get(name) is None],
                )
            )
            known = state.setdefault(entry.owner, {})
            known.update(made)
        entry.extra = counts[rule.extra] if rule.extra else None
        tensors = [param, *(s for s in (*entry.states, entry.source) if s is not None)]
        if entry.is_sparse:
            entry.is_strided = not all(t.is_contiguous() for t in tensors)
        else:
            tensors += [param.grad] if param.grad is not None else []
            entry.is_strided = not all(_is_dense(t) and _same_strides(t, param) for t in tensors)

    def _check_state(self, entry: Entry, name: str, value: Any, shape: tuple[int, ...]) -> None:
        param = entry.param
        what = f"state {name!r}"
        if not isinstance(value, torch.Tensor):
            self._fail(TypeError, entry, f"{what} is a {type(value).__name__}, not a tensor")
        problem = dtensor.misplaced(value, entry.owner)
        if problem:
            self._fail(ValueError, entry, f"{what} is {problem}")
        self._check_plain(entry, dtensor.part_of(value), what)
        if value.shape != shape:
            self._fail(ValueError, entry, f"{what} has shape {tuple(value.shape)}{instead_of(shape, param)}")
        if value.device != param.device:
            self._fail(ValueError, entry, f"{what} is on {value.device}")
        if value.dtype != state_dtype(param):
            expected = str(state_dtype(param)).removeprefix("torch.")
            self._fail(TypeError, entry, f"{what} is {short_dtype(value)}, not {expected}")
        if value.numel() > 0 and _overlaps_itself(dtensor.part_of(value)):
            self._fail(RuntimeError, entry, f"several elements of {what} share one address")

    def _check_stored(self, entry: Entry, name: str, value: torch.Tensor, backend: ModuleType) -> None:
        """A dtype that the backend's tables know; they would read another one's memory as something else."""
        real = value.dtype.to_real() if value.is_complex() else value.dtype
        is_narrower = entry.compute_dtype == torch.float32 and real in backend.STATE_DTYPES
        if real != entry.compute_dtype and not is_narrower:
            name_of_backend = backend.__name__.rpartition(".")[2]
            reason = f"state {name!r} is {short_dtype(value)}, which backend={name_of_backend!r} cannot store states in"
            self._fail(TypeError, entry, reason)


def combine_norms(parts: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of parts whose 2-norms are given, float64 in vectors on one device; 0-d. Nobody waits for it.

    Scaled, so that squares neither overflow nor vanish; 0, infinity and NaN go through as they are.
    """
    norms = torch.cat([torch.zeros(1, dtype=torch.float64, device=parts[0].device if parts else "cpu"), *parts])
    largest = norms.max()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return scale * (norms / scale).square().sum().sqrt()


def _seen(group: dict[str, Any]) -> tuple[list, list] | None:
    """A group's keys and values; None if an option can change without becoming another object, as a tensor or a list can."""
    options = (value for name, value in group.items() if name not in ("params", "param_names"))
    flat = (item for value in options for item in (value if isinstance(value, tuple) else (value,)))
    is_fixed = all(item is None or type(item) in (float, int, bool, str) for item in flat)
    return ([*group], [*group.values()]) if is_fixed else None


def _is_as_seen(group: dict[str, Any], seen: tuple[list, list] | None) -> bool:
    """Whether a group holds the very objects that it held when it was `_seen`."""
    return seen is not None and type(group) is dict and [*group] == seen[0] and all(map(is_, group.values(), seen[1]))


def _but_for_lr(group: dict[str, Any], seen: tuple[list, list] | None) -> tuple[list, list] | None:
    """What is `_seen` of a group now, if only its learning rate is another, a float: schedulers do that in every step."""
    if seen is None or type(group.get("lr")) is not float:
        return None
    names, values = seen[0], [*seen[1]]
    values[names.index("lr")] = group["lr"]
    return (names, values) if _is_as_seen(group, (names, values)) else None


def _is_scalar_of(value: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a value is what a backend counts in: a plain 0-d tensor of that dtype on that device."""
    return type(value) is torch.Tensor and value.dtype == dtype and value.dim() == 0 and value.device == device


def _scalar(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A new 0-d tensor; without waiting for a device unless a tensor comes from one."""
    if isinstance(value, torch.Tensor) and value.device == device:
        return value.detach().to(dtype).reshape(()).clone()
    return torch.full((), float(value), dtype=dtype, device=device)


def _dims(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of every dimension that has more than one element, innermost first."""
    return sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one block of memory, in any order of dimensions."""
    if tensor.is_contiguous():  # as most are
        return True
    expected = 1
    for stride, size in _dims(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of memory lie between its first element and its last, both included; 1 or more."""
    if tensor.is_contiguous():
        return tensor.numel() or 1
    return 1 + sum(stride * (size - 1) for stride, size in _dims(tensor))


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have every element in the same place."""
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and _same_strides(a, b)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements share an address."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in _dims(tensor):
        if stride <= reach:  # no further than the dimensions inside it reach: perhaps, so count the addresses
            if stride == 0:
                return True
            addresses = torch.zeros((), dtype=torch.int64, device="cpu")
            for step, count in _dims(tensor):
                addresses = addresses.unsqueeze(-1) + step * torch.arange(count, device="cpu")
            return addresses.unique().numel() < tensor.numel()
        reach += stride * (size - 1)
    return False


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.stride() == b.stride() or all(
        s == t or size == 1 for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
