"""Set-up for all tests."""

import ctypes
import sys

import pytest
import torch

if sys.platform == "linux":
    # Keep freed memory instead of returning it to the kernel: page faults were most of the time of the parity tests.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


@pytest.fixture
def threads():
    """Sets torch's number of threads; the old number comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
