"""The CUDA kernels compiled for the host (tests/simt/), so that backend="cuda" runs on tensors in host memory.

Imported before any optimizer is made; without a C++ compiler the backend stays what it is, and its tests are skipped.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from fusedopt.backends import cuda

ROOT = Path(__file__).parent.parent
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing",
    "-Wall", "-Wno-unknown-pragmas",
)  # fmt: skip


def build(flags=FLAGS):
    """Path of the object, compiled anew if a source has changed."""
    headers = [
        *ROOT.glob("csrc/cuda/*"),
        *ROOT.glob("csrc/rules/*"),
        ROOT / "csrc/storage.h",
        *ROOT.glob("tests/simt/*"),
    ]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(headers):
        digest.update(path.read_bytes())
    target = ROOT / "build" / f"cuda_on_host_{digest.hexdigest()[:12]}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        for old in target.parent.glob("cuda_on_host_*.so"):
            old.unlink()
        sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "tests/simt/simt.cpp"]
        unfinished = target.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, *flags, f"-I{ROOT / 'tests/simt'}", "-x", "c++", *sources, "-o", unfinished]
        subprocess.run(command, check=True)
        unfinished.replace(target)  # at once, as another process may be waiting for it
    return target


def fail(call, after=0):
    """Lets that CUDA call fail, after so many that succeed; None: none."""
    ctypes.CDLL(str(cuda.LIBRARY)).simt_fail(None if call is None else call.encode(), after)


if shutil.which(os.environ.get("CXX", "c++")):
    cuda.LIBRARY = build()
