"""The C++ engine (csrc/cpu/): tensors in host memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence

import torch

from fusedopt.backends.sparse import Touched
from fusedopt.entry import Entry, Slot
from fusedopt.extension import _C, problem
from fusedopt.formats import FORMATS
from fusedopt.rules import Rule


def _use_torch() -> bool:
    """Lets the extension read tensors through torch's stable C ABI. False: it reads Python attributes instead, slowly."""
    try:
        library = ctypes.CDLL(torch._C.__file__)  # loaded already; a symbol is looked for in what it links to as well
        functions = [
            ctypes.cast(getattr(library, name, None), ctypes.c_void_p).value or 0 for name in _C.torch_functions
        ]
    except OSError:
        functions = []
    tensors = [torch.empty(3), torch.nn.Parameter(torch.empty(2, 2)), torch.empty((), dtype=torch.float64)]
    known = [(id(tensor), tensor._cdata, getattr(tensor.untyped_storage(), "_cdata", 0)) for tensor in tensors]
    return _C.use_torch(torch.Tensor, functions, known)


reads_by_abi = _C is not None and _use_torch()

_forced_isa = os.environ.get("FUSEDOPT_CPU_ISA")
if _C and _forced_isa and not _C.set_isa(_forced_isa):
    raise ImportError(
        f"FUSEDOPT_CPU_ISA={_forced_isa!r} is not available on this CPU; it has {', '.join(_C.available_isas())}"
    )


SCALARS_ON_DEVICE = False


def unavailable(where: torch.device | None = None) -> str | None:
    """Why the engine cannot be used here, or None."""
    if _C is None:
        return problem
    return None if _C.available_isas() else "the CPU has none of the instruction sets of this build"


def formats() -> frozenset[str]:
    """Names of the storage formats that it has codecs for."""
    return frozenset(FORMATS)


def supports(device: torch.device, is_asked_for: bool = False) -> bool:
    """Whether it takes tensors of that device."""
    return device.type == "cpu"


def _tensors(slots: Sequence[Slot | None]) -> list[torch.Tensor | None]:
    return [None if slot is None else slot.tensor for slot in slots]


def hand_over(entry: Entry, is_there: bool = True) -> None:  # until the table takes handed gradients
    if entry.is_grad_handed:
        if hasattr(torch.Tensor, "grad_dtype"):
            entry.param.tensor.grad_dtype = None
        entry.param.tensor.grad = entry.handed_grad if is_there else None


def table_of(entries: Sequence[Entry], is_host: bool) -> _C.Bucket:
    """The entries' addresses and layouts in C++, to be updated there, or only watched."""
    table = _C.Bucket(is_host)
    for entry in entries:
        if entry.is_idle:
            table.add_idle(entry.param.tensor)
            continue
        hand_over(entry)
        step, extra = [*(slot.tensor for slot in entry.scalars), None][:2]
        table.add(
            entry.param.tensor,
            entry.grad,
            _tensors(entry.states),
            step,
            extra,
            entry.source.tensor if entry.source is not entry.param else None,
            _C.rules[entry.variant][0],
            entry.group,
            entry.is_strided,
        )
    table.finish()
    return table


def with_gradient(table: _C.Bucket, params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those parameters that had a gradient when the table was refreshed; all of the table's are given."""
    return params if table.all_active() else [params[i] for i in table.active()]


class Bucket:
    """Entries in host memory, with their C++ tensor and chunk tables."""

    is_asynchronous = is_capturing = False
    is_capturable = True

    def __init__(self, rule: Rule, entries: Sequence[Entry], is_alone: bool):
        self.entries = list(entries)
        self.device = torch.device("cpu")
        self._table = table_of(self.entries, is_host=True)
        self._params = [entry.param.tensor for entry in self.entries]
        self._may_move = is_alone  # the table then knows all memory that a step writes
        self._reads_sources = any(entry.source is not entry.param for entry in self.entries)
        self._handed = [entry for entry in self.entries if entry.is_grad_handed]

    def refresh(self) -> bool:
        for entry in self._handed:
            hand_over(entry)
        return self._table.refresh(torch.get_num_threads(), may_move=self._may_move)

    def release(self) -> None:
        self._table.release()
        for entry in self._handed:
            hand_over(entry, False)

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        return self._table.grad_norm(is_weighted, torch.get_num_threads())

    def first_nonfinite(self) -> int:
        return self._table.first_nonfinite()

    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        # Autograd must notice that a tensor it saved has changed.
        written, increment = with_gradient(self._table, self._params), torch.autograd.graph.increment_version
        threads = torch.get_num_threads()
        return lambda: self._table.update(scalars, grad_coefs, self._reads_sources, threads, increment, written)


class Rows:
    """Rows of entries in host memory, updated where they are."""

    def __init__(self, touched: Sequence[Touched]):
        self._touched = touched  # the table has their addresses
        self._table = _C.Bucket(True)
        for part in touched:
            entry = part.entry
            rule = _C.rules[entry.variant][0]
            step, extra = [*(slot.tensor for slot in entry.scalars), None][:2]
            tensors = part.keys, part.values, _tensors(entry.states), step, extra
            self._table.add_rows(entry.param.tensor, *tensors, rule, entry.group, entry.is_strided)
        self._table.finish()

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        return self._table.grad_norm(is_weighted, torch.get_num_threads())

    def first_nonfinite(self) -> int:
        return self._table.first_nonfinite()

    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        written, increment = [part.entry.param.tensor for part in self._touched], torch.autograd.graph.increment_version
        threads = torch.get_num_threads()
        return lambda: self._table.update(scalars, grad_coefs, False, threads, increment, written)
