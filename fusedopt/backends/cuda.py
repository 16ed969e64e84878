"""The CUDA C++ part: a shared object of its own, loaded only when asked for, so that it can never break the CPU part."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent.parent / "_cuda.so"


@functools.cache
def devices() -> tuple[int, str]:
    """(number of CUDA devices the built object sees, or -1; what it or the loader says)."""
    if not LIBRARY.exists():
        return -1, "not built (FUSEDOPT_BUILD_CUDA=1 with nvcc builds it)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return -1, f"built, but does not load: {error}"
    message = ctypes.c_char_p()
    count = library.fusedopt_cuda_device_count(ctypes.byref(message))
    text = message.value.decode() if message.value else ""
    return (count, "built and loads") if count >= 0 else (-1, f"built and loads, but CUDA says: {text}")


def unavailable() -> str | None:
    """Why not: this version has no CUDA kernels, only the build and loading of their object."""
    return "this version has no CUDA kernels yet"


def supports(device: torch.device, is_asked_for: bool = False) -> bool:
    """Whether it takes tensors of that device."""
    return device.type == "cuda"
