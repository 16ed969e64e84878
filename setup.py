"""Builds the extension: no torch needed, one object file per CPU instruction set, CUDA apart and only where nvcc is.

Where the extension cannot be built the install still succeeds: fusedopt then works by its slow reference, and says so.

Environment:
    FUSEDOPT_REQUIRE_CPU 1: fail instead; so does `setup.py build_ext`, which asks for the extension (default: 0)
    FUSEDOPT_BUILD_CUDA  auto (default: build it if nvcc is found) | 0 | 1 (fail without nvcc)
    FUSEDOPT_CUDA_ARCHS  compute capabilities, as "8.0;9.0+PTX"; else TORCH_CUDA_ARCH_LIST; else 8.0, 9.0, 10.0
    CUDA_HOME, CUDA_PATH where to look for bin/nvcc before PATH
    MAX_JOBS             compilers at a time (default: the number of cores)
    FUSEDOPT_SANITIZE    for tests only (make sanitize): address,undefined or thread, as for the compiler's -fsanitize
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
# sqrt vectorises only without errno; no fused multiply-add, so that every instruction set gives the same bits.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = (
    {
        "csrc/cpu/x86_64_v2.cpp": ["-march=x86-64-v2"],
        "csrc/cpu/x86_64_v3.cpp": ["-march=x86-64-v3"],
        "csrc/cpu/x86_64_v4.cpp": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
    if IS_X86
    else {"csrc/cpu/baseline.cpp": []}
)
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/engine.cpp", *ISA_FLAGS]
# Slow, and stops at the first report. Python's own flags hold -fwrapv, which would make signed overflow defined.
SANITIZE = os.environ.get("FUSEDOPT_SANITIZE")
if SANITIZE:
    FLAGS += [
        f"-fsanitize={SANITIZE}",
        "-fno-sanitize-recover=all",
        "-fno-wrapv",
        "-fno-omit-frame-pointer",
        "-O1",
        "-g1",
    ]
HEADERS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*")) if path.suffix in (".h", ".inl")]
DEFAULT_ARCHS = "8.0;9.0;10.0"
# No fused multiply-add here either: the bits of the CPU.
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# What Python expects of the extension (fusedopt/extension.py).
INTERFACE = hashlib.sha256((ROOT / "fusedopt/_C.pyi").read_bytes()).hexdigest()[:12]


def switch(name, *values):
    """An environment variable's value, the first of `values` if it is not set."""
    value = os.environ.get(name, "").lower() or values[0]
    if value not in values:
        sys.exit(f"{name} must be {', '.join(values[:-1])} or {values[-1]}, got {value!r}")
    return value


FALLBACK = f"""
{"*" * 100}
fusedopt: the C++ extension could not be built (the compiler's output is above). Installing WITHOUT it:
everything works, by pure PyTorch, but SLOWLY. FUSEDOPT_REQUIRE_CPU=1 makes this an error.
It takes a C++17 compiler (GCC 11 or newer, or Clang 12 or newer) and Python's headers.
{"*" * 100}
"""


def num_jobs():
    """How many compilers may run at a time."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def find_nvcc():
    """Path of nvcc, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in [Path(home) / "bin" / "nvcc" for home in homes]:
        if candidate.is_file():
            return str(candidate)
    return shutil.which("nvcc")


def wants_cuda():
    """Path of the nvcc to build the CUDA part with, or None to leave it out."""
    choice = switch("FUSEDOPT_BUILD_CUDA", "auto", "0", "1")
    if choice == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and choice == "1":
        sys.exit(
            "FUSEDOPT_BUILD_CUDA=1, but nvcc was not found: not under CUDA_HOME or CUDA_PATH, and not on PATH. "
            "Install the CUDA toolkit, point CUDA_HOME to it, or set FUSEDOPT_BUILD_CUDA=0 to build without CUDA."
        )
    return nvcc


def cuda_arch_flags(nvcc):
    """-gencode flags for the wanted compute capabilities that this nvcc knows, with PTX of the newest.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: it does not run, or knows none of them.
    """
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    text = os.environ.get("FUSEDOPT_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    wanted = {int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", text)}
    archs = sorted(wanted & known)
    if not archs:
        raise ValueError(f"none of the CUDA architectures {text!r} is known to {nvcc}, which knows {sorted(known)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildExt(build_ext):
    """Per-file flags, in parallel; OpenMP where the compiler has it; then the CUDA object."""

    def build_extension(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        in_place = self.inplace or getattr(self, "editable_mode", False)
        installed = ROOT / "fusedopt" / built.name if in_place else built
        try:
            self.build_cpu(ext, built)
        except (BaseError, CCompilerError):
            if ext.optional:  # setuptools goes on then
                print(FALLBACK, file=sys.stderr)
                installed.unlink(missing_ok=True)  # one of an earlier build
            raise
        cuda_target = installed.with_name("_cuda.so")
        cuda_target.unlink(missing_ok=True)
        nvcc = wants_cuda()
        if nvcc is not None:
            self.build_cuda(nvcc, cuda_target)

    def build_cpu(self, ext, target):
        include_dirs = self.compiler.include_dirs + ext.include_dirs
        openmp = self.openmp_flags()

        def compile_one(source):
            flags = [*FLAGS, f'-DFUSEDOPT_INTERFACE="{INTERFACE}"', *ISA_FLAGS.get(source, openmp)]
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=include_dirs,
                extra_postargs=flags,
                depends=ext.depends,
            )

        with ThreadPoolExecutor(num_jobs()) as pool:
            objects = [obj for objs in pool.map(compile_one, SOURCES) for obj in objs]
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            extra_postargs=openmp + [f"-fsanitize={SANITIZE}"] * bool(SANITIZE),
            target_lang="c++",
            build_temp=self.build_temp,
        )

    def openmp_flags(self):
        """["-fopenmp"] if a program with it compiles and links, else []: then plain threads are used."""
        if SANITIZE == "thread":
            return []  # the OpenMP runtime is not instrumented: every barrier of its would be a race
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "openmp_probe.cpp")
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n")
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(
                    objects, str(Path(folder, "openmp_probe")), extra_postargs=["-fopenmp"], target_lang="c++"
                )
            except CCompilerError as error:
                print(f"building without OpenMP: {error}")
                return []
        return ["-fopenmp"]

    def build_cuda(self, nvcc, target):
        """The CUDA part: a shared object of its own, its runtime linked in, so that it can never break the CPU part."""
        sources = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
        command = [nvcc, *CUDA_FLAGS, "-shared", "-cudart=static", f"--threads={num_jobs()}"]
        try:
            command += [*cuda_arch_flags(nvcc), "-o", str(target), *sources]
            print(" ".join(command))
            subprocess.run(command, check=True)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            message = f"nvcc could not build the CUDA part: {error}"
            if switch("FUSEDOPT_BUILD_CUDA", "auto", "0", "1") == "1":
                sys.exit(message)
            print(f"{message}; going on without it, because FUSEDOPT_BUILD_CUDA is not 1")
            target.unlink(missing_ok=True)


is_required = switch("FUSEDOPT_REQUIRE_CPU", "0", "1") == "1" or "build_ext" in sys.argv
if "bdist_wheel" in sys.argv or "build_ext" in sys.argv:
    wants_cuda()  # fail before compiling anything

setup(
    ext_modules=[Pybind11Extension("fusedopt._C", SOURCES, depends=HEADERS, optional=not is_required)],
    cmdclass={"build_ext": BuildExt},
)
