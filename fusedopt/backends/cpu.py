"""The C++ engine (csrc/cpu/): tensors in host memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch

from fusedopt.backends.sparse import Touched
from fusedopt.backends.watch import described, handed, table_of
from fusedopt.entry import Entry
from fusedopt.extension import _C, problem
from fusedopt.rules import Rule

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
    return frozenset(_C.formats)


def supports(device: torch.device, is_asked_for: bool = False) -> bool:
    """Whether it takes tensors of that device."""
    return device.type == "cpu"


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
        self._handed = handed(self.entries)
        self.release = self._table.release

    def refresh(self) -> bool:
        grads = [entry.handed_grad for entry in self._handed] if self._handed else []  # a call less in most steps
        return self._table.refresh(torch.get_num_threads(), self._may_move, grads)

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        return self._table.grad_norm(is_weighted, torch.get_num_threads())

    def first_nonfinite(self) -> int:
        return self._table.first_nonfinite()

    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        # Autograd must notice that a tensor it saved has changed.
        written, increment = self._table.with_gradient(self._params), torch.autograd.graph.increment_version
        threads = torch.get_num_threads()
        return functools.partial(self._table.update, scalars, grad_coefs, threads, increment, written)


class Rows:
    """Rows of entries in host memory, updated where they are."""

    def __init__(self, touched: Sequence[Touched]):
        self._touched = touched  # the table has their addresses
        self._table = _C.Bucket(True)
        for part in touched:
            self._table.add_rows(part.entry.param.tensor, part.keys, part.values, *described(part.entry))
        self._table.finish()

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        return self._table.grad_norm(is_weighted, torch.get_num_threads())

    def first_nonfinite(self) -> int:
        return self._table.first_nonfinite()

    def prepare(self, scalars: Sequence[Sequence[float]], grad_coefs: Sequence[float]) -> Callable[[], None]:
        written, increment = [part.entry.param.tensor for part in self._touched], torch.autograd.graph.increment_version
        threads = torch.get_num_threads()
        return functools.partial(self._table.update, scalars, grad_coefs, threads, increment, written)
