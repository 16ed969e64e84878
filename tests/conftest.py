"""Set-up for all tests."""

import contextlib
import ctypes
import os
import signal
import sys

import pytest

# tests/gpu.py sets it: then kernels are compiled, for the GPU that is there.
if "FUSEDOPT_TEST_GPU" not in os.environ:
    with contextlib.suppress(ImportError):  # without Triton its backend's tests are skipped
        import triton_interpreter  # noqa: F401  before all that may import Triton
    import cuda_emulator  # noqa: F401

import torch
from helpers import BACKENDS, CLASSES_ON

from fusedopt import backends

with contextlib.suppress(ValueError):  # in another thread than the main one
    # A process that a shell starts in the background ignores interrupts, which some tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


def pytest_collection_modifyitems(config, items):
    left_out = [item for item in items if _is_left_out(getattr(getattr(item, "callspec", None), "params", {}))]
    config.hook.pytest_deselected(items=left_out)
    ids = {id(item) for item in left_out}
    items[:] = [item for item in items if id(item) not in ids]


def _is_left_out(params):
    classes = CLASSES_ON.get(params.get("on_backend"))
    if classes is None:
        return False
    names = [str(params[key]).partition("(")[0] for key in ("spec", "case", "base") if key in params]
    return params.get("dtype", torch.float32) != torch.float32 or any(name not in classes for name in names)


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
