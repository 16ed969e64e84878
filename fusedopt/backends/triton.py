"""The Triton kernels (kernels/, installed as fusedopt.kernels): tensors on a GPU, and no waiting for it.

A step is one launch for the norm, if that is asked for, and one for the update, for each combination of dtypes and kept states.

With TRITON_INTERPRET=1 they run on tensors in host memory instead, in Triton's interpreter: slow, and how they are tested.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fusedopt.backends.cpu import table_of, with_gradient
from fusedopt.backends.reference import as_real, first_nonfinite
from fusedopt.extension import _C
from fusedopt.rules import Rule

if TYPE_CHECKING:
    from fusedopt.plan import Entry

SCALARS_ON_DEVICE = True
OLDEST = (3, 6)  # version of Triton: the kernels pass tuples
# What captured graphs read, for good: nobody says when a graph is gone.
_captured: list[Any] = []
GRAD = -1  # slot of the gradient, whose addresses are apart; others are rows of the kernels' table


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """(the kernels, None), or (None, the reason why there are none)."""
    try:
        import triton

        found = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
        if found < OLDEST:
            return None, f"Triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
        from fusedopt import kernels
        from fusedopt.kernels import engine, rules  # noqa: F401
    except Exception as error:  # whatever it is, other backends must go on
        return None, f"Triton cannot be imported: {' '.join(str(error).split())}"
    return kernels, None


def version() -> str:
    """That of Triton, where the kernels can be used."""
    import triton

    return f"{triton.__version__}{', interpreted (TRITON_INTERPRET=1)' if is_interpreted() else ''}"


def unavailable() -> str | None:
    """Why the kernels cannot be used here, or None."""
    return _load()[1]


def supports(device: torch.device, is_asked_for: bool = False) -> bool:
    """Whether they take tensors of that device; in the interpreter only for who asks for it."""
    return is_asked_for and device.type == "cpu" if is_interpreted() else device.type == "cuda"


class Bucket:
    """Entries on one device, in one table for each combination of kernel and dtypes."""

    is_asynchronous = True

    def __init__(self, rule: Rule, entries: Sequence[Entry]):
        self.entries = list(entries)
        self.has_launched = False
        self._params = [entry.param for entry in self.entries]
        self._rule = rule
        # Idle parameters, which are only watched, may be elsewhere.
        self.device = next((entry for entry in self.entries if not entry.is_idle), self.entries[0]).param.device
        self._watch = table_of(self.entries, is_host=self.device.type == "cpu") if _C else None
        self._is_used = False  # nothing watches without the extension: then good for one step
        self._is_captured = False  # what was uploaded is there only when a graph is replayed
        self._stream: int | None = None
        self._grads_seen: bytes | None = None
        self._hyper_seen: list[list] | None = None
        self._constants: dict[Any, torch.Tensor] = {}
        tables: dict[tuple, list[tuple[int, Entry]]] = {}
        for position, entry in enumerate(entry for entry in self.entries if not entry.is_idle):
            grad = entry.param.grad
            key = (entry.variant, entry.param.dtype, entry.param.dtype if grad is None else grad.dtype)
            tables.setdefault(key, []).append((position, entry))
        self._tables = [_Table(of_table) for of_table in tables.values()]

    # ---- what a step needs on the device -----------------------------------------------------------------------

    def refresh(self) -> bool:
        if self._is_used or (self._watch is not None and not self._watch.refresh(torch.get_num_threads())):
            return False
        if not self._tables:
            return True
        with self._on_device():
            stream = _current_stream(self.device)
            if stream != self._stream:  # what was uploaded on another stream may not have arrived
                self._stream, self._grads_seen, self._hyper_seen, self._constants = stream, None, None, {}
                for table in self._tables:
                    table.upload_chunks(self._upload)
                programs = max(sum(table.num_programs for table in self._tables), 1)
                self._partials = torch.zeros((3, programs), dtype=torch.float64, device=self.device)
                self._ticket = torch.zeros((), dtype=torch.int32, device=self.device)
                for table in self._tables:
                    table.upload_addresses(self._upload)
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
            self._stream, self._is_captured = None, False
        if self._watch is not None:
            self._watch.release()
        for table in self._tables:
            table.unstage()

    def _grad_addresses(self) -> bytes:
        """int64, of the entries that are not idle; 0: no gradient, 1: one without elements."""
        if self._watch is not None:
            return self._watch.grad_addresses()
        grads = [entry.param.grad for entry in self.entries if not entry.is_idle]
        return struct.pack(f"{len(grads)}q", *(0 if grad is None else grad.data_ptr() or 1 for grad in grads))

    @property
    def is_capturing(self) -> bool:
        """Whether what is launched now goes into a CUDA graph."""
        with self._on_device():
            return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _on_device(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the device, without waiting for it. New memory each time, as a kernel may still read the old."""
        if self.device.type == "cpu":
            return values.clone()
        pinned = values.pin_memory()
        copy = pinned.to(self.device, non_blocking=True)
        if self.is_capturing:
            _captured.append(pinned)  # every replay of the graph copies again
            self._is_captured = True
        return copy

    def _launch(self, kernel: Any, table: _Table, *arguments: Any, **options: Any) -> None:
        if self.is_capturing:
            _captured.append(arguments)  # every replay reads these tables again, whatever became of the plan
        kernel[(table.num_programs,)](*arguments, **options)

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
        self, max_norm: float, previous: torch.Tensor | None, grad_scale: float | torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the unscaled gradients, 0-d of ``dtype``, and the control (see kernels/engine.py) that clips it."""
        if not self._tables:
            return torch.zeros((), dtype=dtype, device=self.device), self._unclipped()
        norm = torch.empty((), dtype=dtype, device=self.device)
        control = torch.empty(2, dtype=torch.float64, device=self.device)
        kernels = _load()[0]
        first = 0
        with self._on_device():
            scalars = (
                self._constant(max_norm, torch.float64),
                self._unclipped() if previous is None else previous,
                self._constant(grad_scale, torch.float32),
            )
            for table in self._tables:
                self._launch(
                    kernels.engine.global_norm, table, *table.norm_arguments,
                    self._partials, first, self._partials.shape[1], self._ticket, *scalars, norm, control,
                    GRAD_DTYPE=table.types["GRAD_DTYPE"],
                    IS_FINAL=table is self._tables[-1],
                    NUM_PARTIALS=1 << (self._partials.shape[1] - 1).bit_length(), **table.norm_options,
                )  # fmt: skip
                first += table.num_programs
        return norm, control

    def grad_norm(self) -> float:
        return float(self.measure(float("inf"), None, 1.0, torch.float64)[0])

    def first_nonfinite(self) -> int:
        return first_nonfinite(self.entries)

    def update(
        self,
        scalars: Sequence[Sequence[float]],
        grad_coefs: Sequence[float],
        control: torch.Tensor | None = None,
        grad_scale: float | torch.Tensor = 1.0,
        found_inf: float | torch.Tensor = 0.0,
        skips_nonfinite: bool = False,
        skipped: torch.Tensor | None = None,
    ) -> None:
        """One step. What gradients are multiplied with beside ``grad_coefs``, and whether, the device finds out itself."""
        if not self._tables:
            return
        kernels = _load()[0]
        with self._on_device():
            self._set_hyper([[*row, coef] for row, coef in zip(scalars, grad_coefs, strict=True)])
            if control is None:
                control = self._unclipped()
            step_wide = (
                control,
                self._constant(grad_scale, torch.float32),
                self._constant(found_inf, torch.float32),
                int(skips_nonfinite),
                self._constant(0, torch.int64) if skipped is None else skipped,  # not written to if None
            )
            prepare, rule = (getattr(kernels.rules, prefix + self._rule.name) for prefix in ("prepare_", ""))
            launches = []
            for table in self._tables:
                counts_skip = int(skipped is not None and table is self._tables[0])
                arguments = (*table.update_arguments(self._hyper), *step_wide, counts_skip, self._ticket)
                options = dict(
                    PREPARE=prepare, UPDATE=rule, NUM_HYPER=len(self._rule.hyper), HAS_EXTRA=self._rule.extra is not None,
                    STORES=table.stores, **table.types, **table.update_options,
                )  # fmt: skip
                if not self.has_launched:  # compiles, which can fail, before anything is written
                    kernels.engine.update.warmup(*arguments, grid=(table.num_programs,), **options)
                launches.append((table, arguments, options))
            if self._watch is not None:
                written = with_gradient(self._watch, self._params)
            else:
                written = [param for param in self._params if param.grad is not None]
            with _uninterrupted():
                for table, arguments, options in launches:
                    self._launch(kernels.engine.update, table, *arguments, **options)
                    self.has_launched = True
                for table in self._tables:
                    table.write_back()
                # Autograd must notice that a tensor it saved has changed.
                torch.autograd.graph.increment_version(written)

    def _set_hyper(self, rows: list[list]) -> None:
        """Hyperparameters on the device. Those that are tensors there are copied in every step: they may have changed."""
        numbers = [[0.0 if isinstance(value, torch.Tensor) else value for value in row] for row in rows]
        if numbers != self._hyper_seen:
            self._hyper = self._upload(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
            self._hyper_seen = numbers
        for row, values in enumerate(rows):
            for column, value in enumerate(values):
                if isinstance(value, torch.Tensor):
                    self._hyper[row, column].copy_(value.detach().reshape(()), non_blocking=True)


class _Table:
    """Entries of one kernel and one set of dtypes, as the kernels see them.

    Args:
        entries: each with its position among the bucket's entries that are not idle.
    """

    def __init__(self, entries: list[tuple[int, Entry]]):
        import triton.language as tl

        self._positions = torch.tensor([position for position, _ in entries], device="cpu")
        self._entries = [entry for _, entry in entries]
        self._numels = [as_real(entry.param.detach()).numel() for entry in self._entries]
        self._strided = [(index, entry) for index, entry in enumerate(self._entries) if entry.is_strided]
        self._staged: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []  # slot, entry, tensor, copy
        first = self._entries[0]
        names = {
            torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
        }  # fmt: skip
        param = as_real(first.param.detach())
        grad = param if first.param.grad is None else as_real(first.param.grad)
        self.types = {
            "PARAM_DTYPE": names[param.dtype], "GRAD_DTYPE": names[grad.dtype], "DTYPE": names[first.compute_dtype],
        }  # fmt: skip
        self.stores = tuple(state is not None for state in first.states)
        engine, machine = _load()[0].engine, _machine(param.device)
        itemsizes = (param.element_size(), grad.element_size(), first.compute_dtype.itemsize)
        self.norm_options = engine.launch_options(engine.global_norm, itemsizes[1:2], *machine[1:])
        self.update_options = engine.launch_options(engine.update, itemsizes, *machine[1:])
        self._chunk = engine.CHUNK
        self._num_chunks = sum(-(numel // -self._chunk) for numel in self._numels)
        self.num_programs = max(min(self._num_chunks, machine[0] * engine.PROGRAMS_PER_PROCESSOR), 1)

    # ---- tensors of which not all have their elements in the same order ----------------------------------------

    @torch.no_grad()
    def stage(self, upload: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Copies the tensors that do not have their elements in the parameter's order. False: there are none."""
        self._staged = []
        for index, entry in self._strided:
            if entry.param.grad is None:
                continue
            param = as_real(entry.param.detach())
            for slot, tensor in [(GRAD, entry.param.grad), (0, entry.param.detach()), *enumerate(entry.states, 1)]:
                if tensor is not None:
                    tensor = as_real(tensor)
                    copy = torch.empty_like(param, dtype=tensor.dtype)  # dense; in the parameter's order if that is too
                    if copy.stride() != tensor.stride():
                        self._staged.append((slot, index, tensor, copy.copy_(tensor)))
        if self._staged:
            self.upload_addresses(upload)
        return bool(self._staged)

    @torch.no_grad()
    def write_back(self) -> None:
        """Brings what an update wrote into copies to where it belongs."""
        for slot, _, tensor, copy in self._staged:
            if slot != GRAD:
                tensor.copy_(copy)

    def unstage(self) -> None:
        """Lets go of the copies."""
        self._staged = []

    # ---- tables ------------------------------------------------------------------------------------------------

    def upload_chunks(self, upload: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The tables that stay as they are."""
        numel = torch.tensor(self._numels, dtype=torch.int64, device="cpu")
        counts = (numel + self._chunk - 1) // self._chunk
        entry_of = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32, device="cpu"), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        index_of = (torch.arange(len(entry_of), device="cpu") - first).to(torch.int32)
        self._chunks = (upload(entry_of), upload(index_of), upload(numel), self._num_chunks)
        self._group_of = upload(torch.tensor([entry.group for entry in self._entries], dtype=torch.int32, device="cpu"))

    def upload_addresses(self, upload: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Where parameters, states and scalars lie."""
        rows = [[entry.param, *entry.states, entry.step, entry.extra] for entry in self._entries]
        addresses = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in rows]
        addresses = torch.tensor(addresses, dtype=torch.int64, device="cpu").t().contiguous()
        for slot, index, _, copy in self._staged:
            if slot != GRAD:
                addresses[slot, index] = copy.data_ptr()
        self._addresses = upload(addresses)

    def upload_grads(self, upload: Callable[[torch.Tensor], torch.Tensor], addresses: bytes) -> None:
        """Where the gradients of this step lie."""
        grads = torch.frombuffer(bytearray(addresses), dtype=torch.int64)[self._positions]
        for slot, index, _, copy in self._staged:
            if slot == GRAD:
                grads[index] = copy.data_ptr()
        self._grads = upload(grads)

    @property
    def norm_arguments(self) -> tuple:
        return (self._grads, *self._chunks)

    def update_arguments(self, hyper: torch.Tensor) -> tuple:
        return (self._grads, *self._chunks, self._addresses, self._group_of, hyper, len(self._entries))


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of it: a step of several launches is done or not done."""
    known = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or known is None:
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, known)
    if came:
        signal.raise_signal(signal.SIGINT)


@functools.cache
def _machine(device: torch.device) -> tuple[int, int, bool]:
    """(multiprocessors, threads of a warp, whether it is NVIDIA's)."""
    if device.type == "cpu":
        return 1, 32, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.warp_size, torch.version.hip is None


def _current_stream(device: torch.device) -> int:
    """What identifies the stream that work on a device goes to now."""
    return 0 if device.type == "cpu" else torch.cuda.current_stream(device).stream_id
