"""The CUDA kernels compiled for the host (tests/simt/), so that backend="cuda" runs on tensors in host memory.

Imported, it stands in for the object that nvcc makes; it is compiled when it is first wanted. Without a C++ compiler the
backend stays what it is, and its tests are skipped.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from fusedopt.backends import cuda

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
    "-Wall", "-Wno-unknown-pragmas",
)  # fmt: skip


@functools.cache
def build():
    """Path of the object, compiled anew if a source has changed."""
    read = [*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/rules/*"), ROOT / "csrc/storage.h", *ROOT.glob("tests/simt/*")]
    digest = hashlib.sha256(" ".join([COMPILER, *FLAGS]).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    target = ROOT / "build" / f"cuda_on_host_{digest.hexdigest()[:12]}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        for old in target.parent.glob("cuda_on_host_*.so"):
            old.unlink()
        unfinished = target.with_suffix(f".{os.getpid()}")
        compile_kernel_code(unfinished, *sorted(ROOT.glob("csrc/cuda/*.cu")))
        unfinished.replace(target)  # at once, as another process may be waiting for it
    return target


def compile_kernel_code(target, *sources):
    """Into an object in which kernels run on the host.

    Raises:
        SyntaxError: with what the compiler says.
    """
    simt = Path(__file__).parent / "simt"
    command = [COMPILER, *FLAGS, f"-I{simt}", "-x", "c++", *sources, simt / "simt.cpp", "-o", target]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SyntaxError(result.stderr)


class Built:
    """In the place of a path: what there is when somebody asks."""

    def exists(self):
        return build().exists()

    def __str__(self):
        return str(build())


def fail(call, after=0):
    """Lets that CUDA call fail, after so many that succeed; None: none."""
    ctypes.CDLL(str(build())).simt_fail(None if call is None else call.encode(), after)


if shutil.which(COMPILER):
    cuda.LIBRARY = Built()
