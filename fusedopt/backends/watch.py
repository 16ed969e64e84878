"""Tables of entries in C++, which see whether tensors are still what and where they were when the plan was made."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from fusedopt.entry import Entry, Slot
from fusedopt.extension import _C


def use_torch() -> bool:
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


reads_by_abi = _C is not None and use_torch()


def described(entry: Entry) -> tuple[Any, ...]:
    """What a table takes of an entry beside its parameter and gradient."""

    def slot(of: Slot | None) -> Any:
        return None if of is None else (of.tensor, _C.formats[of.format.name][0], of.aux)

    scalars = [scalar.tensor for scalar in entry.scalars]
    rule = _C.rules[entry.variant][0]
    return [*map(slot, entry.slots)], scalars, rule, entry.group, entry.seed, entry.is_strided


def table_of(entries: Sequence[Entry], is_host: bool) -> _C.Bucket:
    """The entries' addresses and layouts in C++, to be updated there, or only watched."""
    table = _C.Bucket(is_host)
    for entry in entries:
        if entry.is_idle:
            table.add_idle(entry.owner)  # a DTensor's first gradient arrives there, not at its local tensor
            continue
        table.add(entry.param.tensor, entry.grad, *described(entry), entry.is_grad_handed)
    table.finish()
    return table


def handed(entries: Sequence[Entry]) -> list[Entry]:
    """Those entries whose gradients the table is given in each step, in its order."""
    return [entry for entry in entries if entry.is_grad_handed and not entry.is_idle]
