"""Builds the extension: no torch needed, one object file per CPU instruction set, CUDA apart and only where nvcc is.

Where the extension cannot be built the install still succeeds: fusedopt then works by its slow reference, and says so.
A part that is left out is reported in three places, because pip hides the output of a build that succeeds: on the
terminal, in the wheel's build tag ("2.without_cuda"), and in fusedopt/_cuda.txt, which fusedopt.backends.cuda reads.

Environment:
    FUSEDOPT_REQUIRE_CPU 1: fail instead; so does `setup.py build_ext`, which asks for the extension (default: 0)
    FUSEDOPT_BUILD_CUDA  auto (default: build it if nvcc is found) | 0 | 1 (fail without nvcc)
    FUSEDOPT_CUDA_ARCHS  compute capabilities, as "8.0;9.0+PTX"; else TORCH_CUDA_ARCH_LIST; else 8.0, 9.0, 10.0
    CUDA_HOME, CUDA_PATH where to look for bin/nvcc before PATH; if neither is set, /usr/local/cuda and /opt/cuda come last
    MAX_JOBS             compilers at a time (default: the number of cores)
    FUSEDOPT_SANITIZE    for tests only (make sanitize): address,undefined or thread, as for the compiler's -fsanitize
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
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
SOURCES = [
    "csrc/bindings.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/norm.cpp",
    "csrc/cpu/update.cpp",
    *ISA_FLAGS,
]
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
# Where installers put the CUDA toolkit, although they do not add its programs to PATH.
TOOLKITS = ["/usr/local/cuda", "/opt/cuda"]
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
fusedopt: the C++ extension could not be built. Installing WITHOUT it:
everything works, by pure PyTorch, but SLOWLY.
It takes a C++17 compiler (GCC 11 or newer, or Clang 12 or newer) and Python's headers.
FUSEDOPT_REQUIRE_CPU=1 makes this an error, and pip then shows the compiler's output.
{"*" * 100}
"""
NO_NVCC = (
    "nvcc was not found: not under CUDA_HOME or CUDA_PATH, not on PATH, and, if neither of the two is set, "
    f"not in {' or '.join(TOOLKITS)}. Install the CUDA toolkit, or set CUDA_HOME to its folder"
)
WITHOUT_CUDA = """
fusedopt: Installing WITHOUT the CUDA kernels: {problem}.
The other backends are not affected. FUSEDOPT_BUILD_CUDA=1 makes this an error, and pip then shows the whole output.
FUSEDOPT_BUILD_CUDA=0 leaves the kernels out without this message.
"""


def tell(message):
    """Prints a message, to the terminal too: pip shows what a build prints only if it fails, or with -v."""
    print(message, file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        return
    # Must not hold up the build: a terminal may stop a background process that writes to it (stty tostop), or be full.
    with contextlib.suppress(OSError, ValueError):  # there is no terminal; or this is not the main thread
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        try:
            terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
            with open(terminal, "w") as file:
                file.write(message)
        finally:
            signal.signal(signal.SIGTTOU, before or signal.SIG_DFL)


def num_jobs():
    """How many compilers may run at a time."""
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def find_nvcc():
    """Path of nvcc, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    search = [str(Path(home) / "bin") for home in homes]
    search += os.environ.get("PATH", os.defpath).split(os.pathsep)
    if not homes:  # who names a toolkit does not want another one
        search += [f"{home}/bin" for home in TOOLKITS]
    return shutil.which("nvcc", path=os.pathsep.join(search))


def cuda_choice():
    """The value of FUSEDOPT_BUILD_CUDA."""
    return switch("FUSEDOPT_BUILD_CUDA", "auto", "0", "1")


def run_nvcc(nvcc, *arguments):
    """What nvcc prints.

    Raises:
        OSError: it does not run.
        ValueError: it fails; the message is the first error that it reports, since later ones often follow from it.
    """
    result = subprocess.run(
        [nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if result.returncode != 0:
        print(result.stdout)
        lines = result.stdout.splitlines()
        errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line)]
        raise ValueError([*errors, *lines[-1:], f"{nvcc} ends with status {result.returncode}"][0].strip())
    return result.stdout


def cuda_arch_flags(nvcc):
    """-gencode flags for the wanted compute capabilities that this nvcc knows, with PTX of the newest.

    Raises:
        OSError, ValueError: it does not run, or knows none of them.
    """
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", run_nvcc(nvcc, "--list-gpu-arch"))}
    text = os.environ.get("FUSEDOPT_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    wanted = {int(major) * 10 + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", text)}
    archs = sorted(wanted & known)
    if not archs:
        raise ValueError(f"none of the CUDA architectures {text!r} is known to {nvcc}, which knows {sorted(known)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildExt(build_ext):
    """Per-file flags, in parallel; OpenMP where the compiler has it; then the CUDA object.

    Every build leaves its files in build_lib. For `--inplace` and editable installs, setuptools then has them copied.
    """

    def files(self):
        """Names of the files that a build makes in the package, or leaves out."""
        return [Path(self.get_ext_filename("fusedopt._C")).name, "_cuda.so", "_cuda.txt"]

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        for name in self.files():  # those of an earlier build
            target.with_name(name).unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.build_cpu(ext, target)
        except (BaseError, CCompilerError) as error:
            if not ext.optional:
                raise
            target.unlink(missing_ok=True)
            print(error, file=sys.stderr)
            tell(FALLBACK)
        self.build_cuda(target.with_name("_cuda.so"))

    def copy_extensions_to_source(self):
        """Copies what was built into the source tree, and links the Triton kernels to where the package looks for them."""
        for name in self.files():
            built, copy = Path(self.build_lib, "fusedopt", name), ROOT / "fusedopt" / name
            copy.unlink(missing_ok=True)  # a running process may have it mapped: no writing to that
            if built.exists():
                shutil.copy2(built, copy)
        kernels = ROOT / "fusedopt" / "kernels"
        if not kernels.exists():
            # Only the Triton backend needs the link, and in editable installs not even that.
            with contextlib.suppress(OSError):
                kernels.unlink(missing_ok=True)
                kernels.symlink_to(Path("..", "kernels"))

    def get_output_mapping(self):
        """What was built -> its copy in the source tree; a strict editable install makes its links from that."""
        if not self.inplace:
            return {}
        built = [Path(self.build_lib, "fusedopt", name) for name in self.files()]
        return {str(path): str(ROOT / "fusedopt" / path.name) for path in built if path.exists()}

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

    def build_cuda(self, target):
        """Builds the CUDA part, and writes down how, or why not.

        It is a shared object of its own, its runtime linked in, so that it can never break the CPU part.
        """
        problem = None
        if cuda_choice() == "0":
            outcome = "not built: FUSEDOPT_BUILD_CUDA=0 was set"
        else:
            try:
                outcome = f"built {self.compile_cuda(target)}"
            except (OSError, ValueError) as error:
                problem = str(error)
                outcome = f"not built: {problem}"
        if problem and cuda_choice() == "1":
            sys.exit(problem)
        if problem and sys.platform != "darwin":  # there is no CUDA for macOS
            tell(WITHOUT_CUDA.format(problem=problem))
        target.with_suffix(".txt").write_text(f"{outcome}\n")

    def compile_cuda(self, target):
        """Returns what it was compiled for and by, in words.

        Raises:
            OSError, ValueError: nvcc is missing or fails.
        """
        nvcc = find_nvcc()
        if nvcc is None:
            raise ValueError(NO_NVCC)
        sources = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
        try:
            archs = cuda_arch_flags(nvcc)
            command = [*CUDA_FLAGS, "-shared", "-cudart=static", f"--threads={num_jobs()}", *archs]
            command += ["-o", str(target), *sources]
            print(" ".join([nvcc, *command]), flush=True)
            print(run_nvcc(nvcc, *command), end="")
            version = re.search(r"release ([\d.]+)", run_nvcc(nvcc, "--version"))
        except (OSError, ValueError) as error:
            target.unlink(missing_ok=True)
            raise ValueError(f"nvcc could not build the CUDA part: {error}") from error
        numbers = [re.sub(r".*=sm_(\d+)(\d)$", r"\1.\2", flag) for flag in archs if "=sm_" in flag]
        return f"for GPUs of compute capability {', '.join(numbers)} by nvcc {version[1] if version else '?'} ({nvcc})"


class BdistWheel(bdist_wheel):
    """Says in the wheel's build tag whether a part is missing: pip and other installers show the name of a wheel.

    Of two wheels that fit, installers take the one with the higher number, so this is the more complete one.
    """

    def run_command(self, command):
        super().run_command(command)
        if command == "build" and self.build_number is None:
            build_ext = self.get_finalized_command("build_ext")
            has = [Path(build_ext.build_lib, "fusedopt", name).exists() for name in build_ext.files()]
            has_cpp, has_cuda = has[:2]
            missing = ["cpp"] * (not has_cpp) + ["cuda"] * (not has_cuda and sys.platform != "darwin")
            text = f"without_{'_and_'.join(missing)}" if missing else "complete"
            self.build_number = f"{2 * has_cpp + has_cuda}.{text}"


def check_nvcc():
    """Ends the program if the CUDA part is demanded without nvcc: before anything is compiled."""
    if cuda_choice() == "1" and find_nvcc() is None:
        sys.exit(f"FUSEDOPT_BUILD_CUDA=1, but {NO_NVCC}. FUSEDOPT_BUILD_CUDA=0 builds without CUDA.")


is_required = switch("FUSEDOPT_REQUIRE_CPU", "0", "1") == "1" or "build_ext" in sys.argv
if {"bdist_wheel", "editable_wheel", "build_ext"} & {*sys.argv}:
    check_nvcc()

setup(
    ext_modules=[Pybind11Extension("fusedopt._C", SOURCES, depends=HEADERS, optional=not is_required)],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
