"""The tables in device memory that the kernels of one launch read, described in kernels/engine.py, and what reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusedopt.entry import Entry
from fusedopt.formats import Format, plain_format
from fusedopt.layout import as_real
from fusedopt.rules import Rule

Upload = Callable[[torch.Tensor], torch.Tensor]
# What both engines' kernels take, by name (kernels/engine.py).
TABLE_ARGUMENTS = {
    "grads", "entry_of", "index_of", "numel", "num_chunks", "num_entries", "ticket", "control", "grad_scale",
}  # fmt: skip
NORM_ARGUMENTS = TABLE_ARGUMENTS | {
    "partials", "first_partial", "num_partials", "max_norm", "previous", "norm", "is_final", "weights",
}  # fmt: skip
UPDATE_ARGUMENTS = TABLE_ARGUMENTS | {
    "addresses", "seeds", "group_of", "hyper", "found_inf", "skipped", "skips_nonfinite", "counts_skip", "num_scalars",
    "num_sums", "first_chunk", "partial_sums", "sums",
}  # fmt: skip
# Rows of the table of addresses; the gradients have a table of their own.
GRAD, SOURCE, PARAM = -1, 0, 1


def grad_format(entry: Entry) -> Format:
    """Of the gradient, or expected of the first one."""
    return plain_format((entry.param.tensor if entry.grad is None else entry.grad).dtype)


def _numel(entry: Entry) -> int:
    """Of the real numbers, if the parameter is complex."""
    return as_real(entry.param.tensor.detach()).numel()


def num_chunks(entries: Sequence[Entry], chunk: int) -> int:
    """In how many pieces of at most so many elements their tensors come."""
    return sum(-(_numel(entry) // -chunk) for entry in entries)


class Kernels(ABC):
    """The norm and the update of one table, ready to be launched on the current stream, whose handle is given.

    Arguments are those of the kernels, by name; tensors stand for their addresses.
    """

    chunk: int  # elements of one tensor that a program takes before it looks for more
    norm_programs: int  # how many programs run, at least one
    tables: Mapping[str, torch.Tensor]  # what they take beside the tables that all do, on the host

    @abstractmethod
    def norm(self, arguments: dict[str, Any], stream: int) -> None: ...

    def prepare_update(self, arguments: dict[str, Any]) -> None:  # noqa: B027  most have nothing to do
        """What can fail before the first launch does, so that nothing is written then."""

    @abstractmethod
    def update(self, arguments: dict[str, Any], stream: int) -> None: ...


class Table:
    """Entries that are launched together, as the kernels see them.

    Args:
        entries: each with its position among the bucket's entries that are not idle.
    """

    def __init__(self, entries: list[tuple[int, Entry]], kernels: Kernels, rule: Rule):
        self.kernels = kernels
        self._num_sums = rule.num_sums
        self._positions = torch.tensor([position for position, _ in entries], device="cpu")
        self._entries = [entry for _, entry in entries]
        self._strided = [(index, entry) for index, entry in enumerate(self._entries) if entry.is_strided]
        self._staged: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []  # row, entry, tensor, copy
        # Of both kernels, and what only the update takes beside them; by name.
        self.arguments: dict[str, Any] = {}
        self.update_arguments: dict[str, Any] = {}

    # ---- tensors of which not all have their elements in the same order ----------------------------------------

    def stage(self, upload: Upload) -> bool:
        """Copies the tensors that do not have their elements in the parameter's order. False: there are none."""
        self._staged = self._copies() if self._strided else []
        if self._staged:
            self.upload_addresses(upload)
        return bool(self._staged)

    @torch.no_grad()
    def _copies(self) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
        copies = []
        for index, entry in self._strided:
            param = as_real(entry.param.tensor.detach())
            if entry.grad is None or param.numel() == 0:  # a copy of nothing has no address
                continue
            slots = [(row, slot.tensor.detach()) for row, slot in enumerate(entry.slots) if slot is not None]
            for row, tensor in [(GRAD, entry.grad), *slots[SOURCE if self._reads_elsewhere(entry) else PARAM :]]:
                tensor = as_real(tensor)
                copy = torch.empty_like(param, dtype=tensor.dtype)  # dense; in the parameter's order if that is too
                if copy.stride() != tensor.stride():
                    copies.append((row, index, tensor, copy.copy_(tensor)))
        return copies

    @staticmethod
    def _reads_elsewhere(entry: Entry) -> bool:
        """Whether an update reads the parameter elsewhere than it writes it."""
        return entry.source is not entry.param

    @property
    def has_copies(self) -> bool:
        """Whether there is something to write back."""
        return bool(self._staged)

    @torch.no_grad()
    def write_back(self) -> None:
        """Brings what an update wrote into copies to where it belongs."""
        for row, _, tensor, copy in self._staged:
            if row >= PARAM:
                tensor.copy_(copy)

    def unstage(self) -> None:
        """Lets go of the copies."""
        self._staged = []

    # ---- tables ------------------------------------------------------------------------------------------------

    def upload_chunks(self, upload: Upload, device: torch.device) -> None:
        """The tables that stay as they are."""
        chunk = self.kernels.chunk
        numel = torch.tensor([_numel(entry) for entry in self._entries], device="cpu")
        counts = (numel + chunk - 1) // chunk
        entry_of = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32, device="cpu"), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        index_of = (torch.arange(len(entry_of), device="cpu") - first).to(torch.int32)
        tables = {"entry_of": entry_of, "index_of": index_of, "numel": numel, **self.kernels.tables}
        self.arguments = {name: upload(table) for name, table in tables.items()}
        self.arguments |= {"num_chunks": len(entry_of), "num_entries": len(self._entries)}
        of_entries = {name: [getattr(entry, name) for entry in self._entries] for name in ("group", "seed")}
        group_of, seeds = (torch.tensor(values, device="cpu").to(torch.int32) for values in of_entries.values())
        self.update_arguments = {
            "group_of": upload(group_of), "seeds": upload(seeds), "num_scalars": len(self._entries[0].scalars),
        }  # fmt: skip
        if self._num_sums:
            self.update_arguments["num_sums"] = self._num_sums
            first_chunk = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
            self.update_arguments["first_chunk"] = upload(first_chunk)
            for name, size in (("partial_sums", len(entry_of)), ("sums", len(self._entries))):
                self.update_arguments[name] = torch.zeros((self._num_sums, size), dtype=torch.float64, device=device)

    def upload_addresses(self, upload: Upload) -> None:
        """Where slots, scalars and auxiliary values lie."""
        columns = []
        for entry in self._entries:
            slots = entry.slots
            tensors = [None if slot is None else slot.tensor for slot in (*slots, *entry.scalars)]
            tensors += [None if slot is None else slot.aux for slot in slots]
            columns.append([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        addresses = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()
        for row, index, _, copy in self._staged:
            if row != GRAD:
                addresses[row, index] = copy.data_ptr()
                if row == PARAM and not self._reads_elsewhere(self._entries[index]):
                    addresses[SOURCE, index] = copy.data_ptr()
        self.update_arguments["addresses"] = upload(addresses)
        aux_row = PARAM - len(self._entries[0].slots)  # from the end
        self._param_addresses = addresses[[PARAM, aux_row]]

    def weights(self, upload: Upload, is_weighted: Sequence[bool]) -> torch.Tensor:
        """What gradients are multiplied with for the norm: the parameter's addresses where the group is weighted, else 0."""
        mask = torch.tensor([is_weighted[entry.group] for entry in self._entries], device="cpu")
        return upload(torch.where(mask, self._param_addresses, 0))

    def upload_grads(self, upload: Upload, addresses: bytes) -> None:
        """Where the gradients of this step lie."""
        grads = torch.frombuffer(bytearray(addresses), dtype=torch.int64)
        if len(self._positions) < len(grads):  # else it has all
            grads = grads[self._positions]
        for row, index, _, copy in self._staged:
            if row == GRAD:
                grads[index] = copy.data_ptr()
        self.arguments["grads"] = upload(grads)
