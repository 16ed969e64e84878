"""What both kinds of GPU kernels (cuda.py, triton.py) need of the host: launches, streams and captures, and no waiting for the
device.

A step is one launch for the norm, if that is asked for, and one for the update, for each combination of what a backend wants
apart (`Bucket.key`). What is launched reads the tables of tables.py.
"""

from __future__ import annotations

import contextlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from fusedopt.backends.reference import first_nonfinite
from fusedopt.backends.tables import Kernels, Table
from fusedopt.backends.watch import handed, table_of
from fusedopt.entry import Entry
from fusedopt.extension import _C
from fusedopt.interrupts import uninterrupted
from fusedopt.rules import Rule

# What captured graphs read, for good: nobody says when a graph is gone.
_captured: list[Any] = []
_NOTHING = contextlib.nullcontext()


class Bucket(ABC):
    """Entries on one device, in one table for each key."""

    is_asynchronous = is_capturable = True

    def __init__(self, rule: Rule, entries: Sequence[Entry], is_alone: bool):
        self.entries = list(entries)
        self.has_launched = False
        self._params = [entry.param.tensor for entry in self.entries]
        self._handed = handed(self.entries)
        self._rule = rule
        # Idle parameters, which are only watched, may be elsewhere.
        self.device = next((entry for entry in self.entries if not entry.is_idle), self.entries[0]).param.tensor.device
        self._watch = table_of(self.entries, is_host=self.device.type == "cpu") if _C else None
        self._is_used = False  # nothing watches without the extension: then good for one step
        self._is_captured = False  # what was uploaded since the last step is there only when a graph is replayed
        self._reserve = torch.empty(
            0, dtype=torch.uint8, device="cpu"
        )  # pinned memory for captures, which allocate none
        self._is_uploaded = False  # what stays from step to step
        # Of the last refresh, and so of the step that goes on from there.
        self._stream: torch.cuda.Stream | None = None
        self._in_capture = False
        self._grads_seen: bytes | None = None
        self._hyper_seen: list[list] | None = None
        self._constants: dict[Any, torch.Tensor] = {}
        tables: dict[tuple, list[tuple[int, Entry]]] = {}
        for position, entry in enumerate(entry for entry in self.entries if not entry.is_idle):
            tables.setdefault(self.key(entry), []).append((position, entry))
        self._tables = [
            Table(of_table, self.kernels([entry for _, entry in of_table]), rule) for of_table in tables.values()
        ]

        num_hyper = (max(entry.group for entry in self.entries) + 1) * (len(rule.hyper) + 1)
        self._capture_bytes = 8 * (len(self.entries) + num_hyper) + 64 * (len(self._tables) + 32)

    @abstractmethod
    def key(self, entry: Entry) -> Hashable:
        """Entries of different keys are launched apart."""

    @abstractmethod
    def kernels(self, entries: list[Entry]) -> Kernels:
        """Those of the entries of one table.

        Raises:
            RuntimeError: they cannot run on the device.
        """

    # ---- what a step needs on the device -----------------------------------------------------------------------

    def refresh(self) -> bool:
        grads = [entry.handed_grad for entry in self._handed] if self._handed else []  # a call less in most steps
        if self._is_used or (
            self._watch is not None and not self._watch.refresh(torch.get_num_threads(), False, grads)
        ):
            return False
        with self._on_device():
            self._in_capture = self.is_capturing
            stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
            if not self._tables:
                self._stream = stream
                return True
            if not self._is_uploaded:
                for table in self._tables:
                    table.upload_chunks(self._upload, self.device)
                    table.upload_addresses(self._upload)
                programs = sum(table.kernels.norm_programs for table in self._tables)
                self._partials = torch.zeros((3, programs), dtype=torch.float64, device=self.device)
                self._ticket = torch.zeros((), dtype=torch.int32, device=self.device)
            elif stream != self._stream:
                # Whoever steps on another stream has made it wait for the last step, and so for what was uploaded before that.
                for tensor in self._uploaded():
                    tensor.record_stream(stream)
            self._stream, self._is_uploaded = stream, True
            self._make_reserve()
            addresses = self._grad_addresses()
            has_copies = any([table.stage(self._upload) for table in self._tables])  # noqa: C419  each must make its own
            if addresses != self._grads_seen or has_copies:
                for table in self._tables:
                    table.upload_grads(self._upload, addresses)
            self._grads_seen = None if has_copies else addresses
        return True

    def release(self) -> None:
        self._is_used = self._watch is None
        if self._is_captured:
            self._grads_seen, self._hyper_seen, self._constants, self._is_captured = None, None, {}, False
            if any(table.has_copies for table in self._tables):
                self._is_uploaded = False  # the addresses were, too
        if self._watch is not None:
            self._watch.release()
        for table in self._tables:
            table.unstage()

    def _grad_addresses(self) -> bytes:
        """int64, of the entries that are not idle; 0: no gradient, 1: one without elements."""
        if self._watch is not None:
            return self._watch.grad_addresses()
        grads = [entry.grad for entry in self.entries if not entry.is_idle]
        return struct.pack(f"{len(grads)}q", *(0 if grad is None else grad.data_ptr() or 1 for grad in grads))

    @property
    def is_capturing(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        with self._on_device():
            return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _on_device(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return _NOTHING
        return torch.cuda.device(self.device)

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the device, without waiting for it. New memory each time, as a kernel may still read the old."""
        if self.device.type == "cpu":
            return values.clone()
        if self._in_capture:
            pinned = self._reserved(values)
            _captured.append(pinned)  # every replay of the graph copies again
            self._is_captured = True
        else:
            pinned = values.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def _make_reserve(self) -> None:
        """Pinned memory for what captures may upload: gradients' addresses, hyperparameters, some constants."""
        if self.device.type == "cpu" or len(self._reserve) >= self._capture_bytes or self._in_capture:
            return
        self._reserve = torch.empty(4 * self._capture_bytes, dtype=torch.uint8, pin_memory=True)  # several captures

    def _reserved(self, values: torch.Tensor) -> torch.Tensor:
        """A copy in memory that was pinned before the capture, if there is enough of it."""
        size = -(values.nbytes // -64) * 64
        if len(self._reserve) < size:
            return values.pin_memory()
        memory, self._reserve = self._reserve[: values.nbytes], self._reserve[size:]
        return memory.view(values.dtype).view(values.shape).copy_(values)

    def _uploaded(self) -> Iterator[torch.Tensor]:
        """What is on the device beside the tensors themselves, and stays from step to step."""
        tables = [values for table in self._tables for values in (table.arguments, table.update_arguments)]
        for value in [value for values in tables for value in values.values()]:
            if isinstance(value, torch.Tensor):
                yield value
        yield from (self._partials, self._ticket, *self._constants.values())
        if self._hyper_seen is not None:
            yield self._hyper

    def _launch(self, launch: Callable[[dict[str, Any], int], None], arguments: dict[str, Any]) -> None:
        if self._in_capture:
            _captured.append(arguments)  # every replay reads these tables again, whatever became of the plan
        launch(arguments, 0 if self._stream is None else self._stream.cuda_stream)

    def _constant(self, value: Any, dtype: torch.dtype) -> torch.Tensor:
        """A 0-d tensor on the device: of a number, or of a tensor that is somewhere."""
        if isinstance(value, torch.Tensor):
            return value.detach().to(device=self.device, dtype=dtype, non_blocking=True).reshape(())
        if (value, dtype) not in self._constants:
            if len(self._constants) > 16:
                self._constants.clear()
            self._constants[value, dtype] = self._upload(torch.tensor(value, dtype=dtype, device="cpu"))
        return self._constants[value, dtype]

    def _unclipped(self) -> torch.Tensor:
        """The control that changes nothing."""
        if None not in self._constants:
            self._constants[None] = self.control(1.0, True)
        return self._constants[None]

    def control(self, coef: float, is_finite: bool) -> torch.Tensor:
        """What gradients are multiplied with, and whether their norm is finite, on the device (kernels/engine.py)."""
        return self._upload(torch.tensor([coef, float(not is_finite)], dtype=torch.float64, device="cpu"))

    # ---- norm and update ---------------------------------------------------------------------------------------

    def measure(
        self,
        max_norm: float,
        previous: torch.Tensor | None,
        grad_scale: float | torch.Tensor,
        dtype: torch.dtype,
        is_weighted: Sequence[bool] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the unscaled gradients, 0-d of ``dtype``, and the control (see kernels/engine.py) that clips it.

        Args:
            is_weighted: for each group whether gradients are taken times their parameters; none are if it is empty.
        """
        if not self._tables:
            return torch.zeros((), dtype=dtype, device=self.device), self._unclipped()
        norm = torch.empty((), dtype=dtype, device=self.device)
        control = torch.empty(2, dtype=torch.float64, device=self.device)
        first = 0
        with self._on_device():
            step_wide = dict(
                partials=self._partials, num_partials=self._partials.shape[1], ticket=self._ticket,
                max_norm=self._constant(max_norm, torch.float64),
                previous=self._unclipped() if previous is None else previous,
                grad_scale=self._constant(grad_scale, torch.float32), norm=norm, control=control,
            )  # fmt: skip
            for table in self._tables:
                weights = table.weights(self._upload, is_weighted) if any(is_weighted) else 0
                own = dict(first_partial=first, is_final=int(table is self._tables[-1]), weights=weights)
                self._launch(table.kernels.norm, {**table.arguments, **step_wide, **own})
                first += table.kernels.norm_programs
        return norm, control

    def grad_norm(self, is_weighted: Sequence[bool]) -> float:
        return float(self.measure(float("inf"), None, 1.0, torch.float64, is_weighted)[0])

    def first_nonfinite(self) -> int:
        return first_nonfinite(self.entries)

    def prepare(
        self,
        scalars: Sequence[Sequence[float]],
        grad_coefs: Sequence[float],
        control: torch.Tensor | None = None,
        grad_scale: float | torch.Tensor = 1.0,
        found_inf: float | torch.Tensor = 0.0,
        skips_nonfinite: bool = False,
        skipped: torch.Tensor | None = None,
    ) -> Callable[[], None]:
        """A step. What gradients are multiplied with beside ``grad_coefs``, and whether, the device finds out itself."""
        if not self._tables:  # no kernel counts
            has_skipped = None if skipped is None else self._constant(found_inf, torch.float32) != 0
            return lambda: has_skipped is None or skipped.add_(has_skipped)
        with self._on_device():
            self._set_hyper([[*row, coef] for row, coef in zip(scalars, grad_coefs, strict=True)])
            step_wide = dict(
                hyper=self._hyper, control=self._unclipped() if control is None else control,
                grad_scale=self._constant(grad_scale, torch.float32),
                found_inf=self._constant(found_inf, torch.float32), skips_nonfinite=int(skips_nonfinite),
                skipped=self._constant(0, torch.int64) if skipped is None else skipped,  # not written to if None
                ticket=self._ticket,
            )  # fmt: skip
            if control is not None and self._stream is not None:  # a clip may have been made on another stream
                control.record_stream(self._stream)
            launches = []
            for table in self._tables:
                counts_skip = int(skipped is not None and table is self._tables[0])
                arguments = {**table.arguments, **table.update_arguments, **step_wide, "counts_skip": counts_skip}
                if not self.has_launched:
                    table.kernels.prepare_update(arguments)
                launches.append((table, arguments))
            if self._watch is not None:
                written = self._watch.with_gradient(self._params)
            else:
                written = [entry.param.tensor for entry in self.entries if entry.grad is not None]
        return lambda: self._launch_all(launches, written)

    def _launch_all(self, launches: list[tuple[Table, dict[str, Any]]], written: list[torch.Tensor]) -> None:
        # One launch is made or not made; what is more than one thing to do, no Ctrl-C may divide.
        is_one = len(launches) == 1 and not launches[0][0].has_copies
        with self._on_device(), _NOTHING if is_one else uninterrupted():
            had_launched, num_done = self.has_launched, 0
            self.has_launched = is_written = True  # already now: an interrupt may come right after the launch
            try:
                for table, arguments in launches:
                    self._launch(table.kernels.update, arguments)
                    num_done += 1
                for table in self._tables:
                    if table.has_copies:
                        table.write_back()
            except Exception:
                is_written = num_done > 0
                self.has_launched = had_launched or is_written
                raise
            finally:
                if is_written:  # autograd must notice that a tensor it saved has changed
                    torch.autograd.graph.increment_version(written)

    def _set_hyper(self, rows: list[list]) -> None:
        """Hyperparameters on the device. Those that are tensors there are copied in every step: they may have changed."""
        there = [
            (row, column, value)
            for row, values in enumerate(rows)
            for column, value in enumerate(values)
            if isinstance(value, torch.Tensor)
        ]
        for row, column, _ in there:
            rows[row][column] = 0.0
        if rows != self._hyper_seen:
            self._hyper = self._upload(torch.tensor(rows, dtype=torch.float64, device="cpu"))
            self._hyper_seen = rows
        for row, column, value in there:
            self._hyper[row, column].copy_(value.detach().reshape(()), non_blocking=True)
