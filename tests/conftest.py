"""Set-up for all tests."""

import ctypes
import sys

import pytest
import torch
from helpers import BACKENDS

from fusedopt import backends

if sys.platform == "linux":
    # Keep freed memory instead of returning it to the kernel: page faults were most of the time of the parity tests.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def pytest_generate_tests(metafunc):
    if "on_backend" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("only_on")
        metafunc.parametrize("on_backend", marker.args if marker else BACKENDS, indirect=True)


@pytest.fixture
def on_backend(request, monkeypatch):
    """The backend that optimizers of this test get, unless they ask for one themselves."""
    reason = backends.BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    monkeypatch.setenv("FUSEDOPT_BACKEND", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets torch's number of threads; the old number comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
