"""Every refusal of a parameter, a gradient or a state. Nothing here changes anything."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from fusedopt import dtensor
from fusedopt.backends.sparse import has_rows_inside
from fusedopt.entry import Entry, Slot, compute_dtype
from fusedopt.errors import fail, short_dtype
from fusedopt.formats import Format
from fusedopt.layout import are_same_memory, extent, is_dense, overlaps_itself
from fusedopt.ranges import number
from fusedopt.rules import Rule

MAX_DIMS = 64  # of torch's reductions and of the C++ table
COUNT_DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)  # of step counts that users put into a state
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)

Problem = tuple[type[Exception], str]


def grad_dtypes(param: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The gradient dtypes a parameter takes: its own, and those that convert to the dtype its update computes in."""
    if param.is_complex():
        return (param.dtype,)
    real = (torch.float32, torch.bfloat16, torch.float16)
    return (*real, torch.float64) if param.dtype == torch.float64 else real


def listed(dtypes: Sequence[torch.dtype]) -> str:
    """``float32, bfloat16``."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


# ---- one tensor ------------------------------------------------------------------------------------------------


def memory_problem(tensor: torch.Tensor) -> Problem | None:
    """Why engines cannot read a tensor's memory; None: it is strided, and holds its values where it says."""
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return RuntimeError, f"has layout {layout}; only dense tensors are supported"
    if tensor.is_meta:
        return RuntimeError, "is on the meta device, it has no values"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return TypeError, f"is a {type(tensor).__name__}; this tensor subclass is not supported"
    for is_lazy, kind, remedy in ((tensor.is_neg(), "negative", "neg"), (tensor.is_conj(), "conjugate", "conj")):
        if is_lazy:
            return RuntimeError, f"is a lazy {kind} view; call resolve_{remedy}() on it"
    most = MAX_DIMS - tensor.is_complex()  # the table has a complex tensor as pairs
    if tensor.dim() > most:
        return RuntimeError, f"has {tensor.dim()} dimensions; at most {most} are supported"
    try:
        held = tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return RuntimeError, "has no memory of its own (is it of torch.func or a fake tensor?)"
    if tensor.numel() > 0 and held < (tensor.storage_offset() + extent(tensor)) * tensor.element_size():
        return RuntimeError, f"has lost its memory: {held} bytes are left of its storage"
    return None


def state_problem(
    value: Any, param: torch.Tensor, shape: tuple[int, ...], format: Format | None = None
) -> Problem | None:
    """Why a value cannot be a parameter's state.

    Args:
        shape: what the state must have.
        format: how it must be stored, on the parameter's device. None: it is loaded, so that anything that converts will do.
    """
    if not isinstance(value, torch.Tensor):
        return TypeError, f"is a {type(value).__name__}, not a tensor"
    misplaced = dtensor.misplaced(value, param)
    if misplaced:
        return ValueError, f"is {misplaced}"
    local = dtensor.part_of(value)
    if format is not None:
        problem = memory_problem(local)
        if problem:
            return problem
    elif value.is_meta or value.layout != torch.strided:
        return (
            RuntimeError,
            "is on the meta device, it has no values" if value.is_meta else f"has layout {value.layout}",
        )
    if value.shape != shape:
        expected = "" if shape == param.shape else f", not {shape}"
        return ValueError, f"has shape {tuple(value.shape)}{expected}"
    if format is None:
        is_number = value.is_floating_point() or value.is_complex()
        is_convertible = is_number and value.is_complex() == param.is_complex()
        expected = "complex" if param.is_complex() else "real floating-point"
        return None if is_convertible else (TypeError, f"is {short_dtype(value)}, not {expected}")
    if value.device != param.device:
        return ValueError, f"is on {value.device}"
    dtype = format.dtype.to_complex() if param.is_complex() and format.is_plain else format.dtype
    if value.dtype != dtype:
        return TypeError, f"is {short_dtype(value)}, not {listed([dtype])}"
    if value.numel() > 0 and overlaps_itself(local):
        return RuntimeError, "has several elements at one address"
    return None


def count_problem(value: Any) -> Problem | None:
    """Why a value cannot be a step count, or another number that a rule counts."""
    if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_meta):
        return ValueError, f"has shape {tuple(value.shape)} on {value.device}, not one value"
    try:
        count = number("it", value)
    except ValueError:
        return ValueError, f"is {value!r}, not a number"
    return None if 0 <= count < math.inf else (ValueError, f"is {count}")


# ---- the tensors of an entry -----------------------------------------------------------------------------------


@dataclass
class Checks:
    """The checks that planning makes, for one optimizer.

    Args:
        owner: who asks, for messages: ``AdamW.step``.
        is_lazy: whether rows without a gradient may stand still though the rule would move them.
    """

    owner: str
    rule: Rule
    is_lazy: bool

    def fail(self, entry: Entry, problem: Problem, what: str = "") -> NoReturn:
        """Raises the problem as an error about an entry, or about ``what`` of it."""
        kind, reason = problem
        fail(kind, self.owner, entry, f"{what} {reason}".lstrip())

    def memory(self, entry: Entry, tensor: torch.Tensor, what: str) -> None:
        """Refuses a tensor whose memory engines cannot read."""
        problem = memory_problem(tensor)
        if problem:
            self.fail(entry, problem, what)

    def param(self, entry: Entry) -> None:
        """Refuses a parameter that no backend, or no rule of this kind, can update."""
        param = entry.param.tensor
        if entry.is_distributed:
            self._distributed(entry)
        if param.is_complex() and not entry.has_kernels:
            self.fail(entry, (TypeError, "rowwise=True does not support complex parameters"))
        if param.dtype not in PARAM_DTYPES:
            supported = f"parameters of this dtype are not supported (supported: {listed(PARAM_DTYPES)})"
            self.fail(entry, (TypeError, supported))
        self.memory(entry, param, "parameter")
        if param.numel() > 0 and overlaps_itself(param):
            self.fail(entry, (RuntimeError, f"several of its elements share one address, strides {param.stride()}"))

    def _distributed(self, entry: Entry) -> None:
        """A DTensor of which each process can update its local tensor by itself."""
        where = f"parameter is {dtensor.describe(entry.owner)}"
        if any(placement.is_partial() for placement in entry.owner.placements):
            self.fail(entry, (RuntimeError, f"{where}; redistribute it"))
        if not entry.has_kernels:
            self.fail(entry, (TypeError, f"{where}; rowwise=True supports plain tensors only"))
        if self.rule.num_sums and entry.norm_group is not None:
            self.fail(entry, (TypeError, f"{where}, but the rule sums over the whole of it"))

    def grad(self, entry: Entry, grad: torch.Tensor, is_sparse_exact: bool) -> None:
        """Refuses a gradient that does not fit its parameter."""
        param = entry.param.tensor
        if entry.is_sparse:
            self._sparse(entry, grad, is_sparse_exact)
        else:
            self.memory(entry, grad, "gradient")
        if grad.shape != param.shape:
            self.fail(entry, (RuntimeError, f"gradient has shape {tuple(grad.shape)}"))
        if grad.device != param.device:
            self.fail(entry, (RuntimeError, f"gradient is on {grad.device}"))
        if grad.dtype not in grad_dtypes(param):
            supported = f"supported for this parameter: {listed(grad_dtypes(param))}"
            self.fail(entry, (RuntimeError, f"gradient is {short_dtype(grad)} ({supported})"))

    def _sparse(self, entry: Entry, grad: torch.Tensor, is_sparse_exact: bool) -> None:
        """A sparse gradient that this group takes, of sound parts, and no subclass that dispatches itself."""
        if not self.is_lazy and not is_sparse_exact:
            options = self.rule.still_without
            unless = f" unless {' = '.join(options)} = 0" if options else ""
            reason = (
                f"gradient is sparse, but {self.owner.partition('.')[0]} also updates rows without a gradient{unless}"
            )
            remedy = "pass sparse='lazy' to leave those rows unchanged, or use dense gradients"
            self.fail(entry, (RuntimeError, f"{reason}; {remedy}"))
        if type(grad).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            reason = f"gradient is a {type(grad).__name__}; this tensor subclass is not supported"
            self.fail(entry, (TypeError, reason))
        self.memory(entry, grad._indices(), "gradient's tensor of indices")
        self.memory(entry, grad._values(), "gradient's tensor of values")
        if not entry.has_kernels and grad.sparse_dim() != 1:
            reason = f"gradient has {grad.sparse_dim()} sparse dimensions; rowwise=True supports one"
            self.fail(entry, (RuntimeError, reason))
        if not has_rows_inside(grad):
            self.fail(entry, (RuntimeError, "gradient has indices beyond its shape"))

    def state(self, entry: Entry, role: str, value: Any, shape: tuple[int, ...], format: Format) -> None:
        """Refuses a value that cannot be used as a state where it is."""
        problem = state_problem(value, entry.owner, shape, format)
        if problem:
            self.fail(entry, problem, f"state {role!r}")

    def aux(self, entry: Entry, name: str, value: Any, num_aux: int, format: Format) -> None:
        """Refuses what cannot be the auxiliary values of a state."""
        if not isinstance(value, torch.Tensor):
            self.fail(entry, (TypeError, f"is a {type(value).__name__}, not a tensor"), f"state {name!r}")
        self.memory(entry, value, f"state {name!r}")
        found = (value.dtype, tuple(value.shape), value.device, value.is_contiguous())
        if found != (format.aux_dtype, (num_aux,), entry.param.tensor.device, True):
            expected = f"{num_aux} values of {listed([format.aux_dtype])} on {entry.param.tensor.device}"
            self.fail(entry, (ValueError, f"does not hold {expected} in one run"), f"state {name!r}")

    def formats(self, entry: Entry, backend: str, known: frozenset[str]) -> None:
        """Refuses a slot in a format that the backend has no codec for, or cannot use for this entry."""
        for slot in (slot for slot in entry.slots if slot is not None):
            what = "parameter" if slot is entry.param else f"state {slot.role!r}"
            is_written = slot is not entry.source or slot is entry.param
            if slot.format.name not in known:
                reason = f"is stored as {slot.format.name}, which backend={backend!r} has no codec for"
                self.fail(entry, (TypeError, reason), what)
            if is_written and slot.format.compute_dtype != compute_dtype(entry.param.tensor):
                reason = f"is stored as {slot.format.name}, but the update computes in {listed([entry.compute_dtype])}"
                self.fail(entry, (TypeError, reason), what)
            is_by_place = slot.format.per_aux or slot.format.takes_random  # in memory order
            if is_by_place and (entry.is_strided or entry.is_sparse):
                needed = "dense tensors in one memory order, and dense gradients"
                self.fail(entry, (TypeError, f"is stored as {slot.format.name}, which needs {needed}"), what)

    # ---- memory that must not overlap --------------------------------------------------------------------------

    def overlap(self, entries: list[Entry]) -> None:
        """Refuses memory that a step would write while it reads or writes the same memory for something else.

        A gradient may be the very memory of its own parameter: each element is then read before it is written.
        """
        written = []
        for entry in entries:
            slots: list[Slot] = [entry.param, *entry.written]
            for slot in slots:
                what = "parameter" if slot is entry.param else f"state {slot.role!r}"
                written += [_Span(entry, tensor, what) for tensor in slot.tensors if tensor.numel()]
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
            self._apart(cluster)
        starts = [(cluster[0].device, cluster[0].begin) for cluster in clusters]
        for entry in entries:
            grad = entry.grad
            # Values of a sparse gradient that lie in a parameter are copied.
            if grad is None or entry.is_sparse or grad.numel() == 0 or are_same_memory(grad, entry.param.tensor):
                continue
            span = _Span(entry, grad, "gradient")
            first = max(bisect_right(starts, (span.device, span.begin)) - 1, 0)
            for cluster in map(clusters.__getitem__, range(first, len(clusters))):  # a slice would copy all the rest
                if (cluster[0].device, cluster[0].begin) >= (span.device, span.end):
                    break
                if cluster[0].device == span.device and max(other.end for other in cluster) > span.begin:
                    self._apart([*cluster, span])

    def _apart(self, spans: list[_Span]) -> None:
        """Ranges of memory that overlap may still have no element in common."""
        if len(spans) < 2:
            return
        dense = sorted((span for span in spans if is_dense(span.tensor)), key=lambda span: span.begin)
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

    def _fail_apart(self, span: _Span, other: _Span) -> NoReturn:
        if other.what == "gradient":
            span, other = other, span
        owner = "" if span.entry is other.entry else f" of {other.entry}"
        reason = f"shares memory with {other.what}{owner}; they must not overlap"
        self.fail(span.entry, (ValueError, reason), span.what)


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
        self.end = self.begin + extent(self.tensor) * self.tensor.element_size()
