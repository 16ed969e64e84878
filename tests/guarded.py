"""Memory with a page on either side that may not be touched: a stray access beside a tensor is a crash, not a silence."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Sequence

import torch

PAGE = mmap.PAGESIZE
CANARY = 0xA5
PROT_NONE = 0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """A copy of a tensor that ends, or begins, at a forbidden page; the rest of its own pages holds a canary."""

    def __init__(self, values: torch.Tensor, at_end: bool):
        size = max(values.nbytes, 1)
        pages = -(-size // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self._usable = slice(PAGE, PAGE + pages * PAGE)
        begin = self._usable.stop - size if at_end else PAGE
        self._canaries = slice(PAGE, begin), slice(begin + size, self._usable.stop)
        self._map[self._usable] = bytes([CANARY]) * (pages * PAGE)
        flat = torch.frombuffer(self._map, dtype=values.dtype, count=values.numel(), offset=begin)
        self.tensor = flat.view(values.shape)
        self.tensor.copy_(values)
        address = self.tensor.data_ptr() - begin
        for guard in (address, address + self._usable.stop):
            if _libc.mprotect(guard, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def is_intact(self) -> bool:
        """Whether the canary around the tensor is."""
        return all(set(self._map[part]) <= {CANARY} for part in self._canaries)


def survives(runs: Sequence[Callable[[], object]], names: Sequence[str]) -> None:
    """Makes the runs in a child process.

    Raises:
        AssertionError: one failed, with its traceback, or killed the child, with the signal's name.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        failure = ""
        for name, run in zip(names, runs, strict=True):
            os.write(writer, b".")
            try:
                run()
            except BaseException:
                failure = f"{name}: {traceback.format_exc()}"
                break
        os.write(writer, failure[-4000:].encode())
        os._exit(bool(failure))
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise AssertionError(f"{signal.Signals(os.WTERMSIG(status)).name} in {names[said.count('.') - 1]}")
    assert status == 0, said.lstrip(".")
