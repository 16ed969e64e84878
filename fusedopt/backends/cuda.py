"""The CUDA C++ kernels (csrc/cuda/): a shared object of its own, loaded only when asked for, so that it cannot break the rest.

Compiled for the host (tests/simt/), the same object works on tensors in host memory: how it is tested where no GPU is.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import sys
from collections.abc import Hashable
from ctypes import POINTER, c_char_p, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch

from fusedopt.backends import device, tables
from fusedopt.entry import Entry
from fusedopt.extension import build_command
from fusedopt.formats import FORMATS
from fusedopt.rules import RULES

LIBRARY = Path(__file__).parent.parent / "_cuda.so"
RECORD = LIBRARY.with_suffix(".txt")  # what setup.py wrote: "built for ... by ...", or "not built: " and why
DRIVER = "libcuda.so.1"
SCALARS_ON_DEVICE = True


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """One with C's fields, "type name;" each: pointers, or int32_t."""
    kinds = [field.rsplit(" ", 1) for field in fields.split(";") if field]
    types = [(field, c_void_p if "*" in kind else {"int32_t": c_int32}[kind]) for kind, field in kinds]
    return type(name, (ctypes.Structure,), {"_fields_": types})


class Library:
    """The loaded object, and what it says of itself.

    Raises:
        OSError: it does not load.
        RuntimeError, AttributeError, KeyError, ValueError: it is of another version of fusedopt.
    """

    def __init__(self, path: Path):
        self._functions = functions = ctypes.CDLL(str(path))
        functions.fusedopt_cuda_interface.restype = c_char_p
        facts = [line.split(" ", 1) for line in functions.fusedopt_cuda_interface().decode().splitlines()]
        known = dict(facts)
        self.is_on_host = known["memory"] == "host"
        self.chunk = int(known["chunk"])
        self.norm_arguments = _structure("NormArguments", known["norm"])
        self.update_arguments = _structure("UpdateArguments", known["update"])
        self.formats = self._formats([text.split() for kind, text in facts if kind == "format"])
        rules = [text.split(" ", 3) for kind, text in facts if kind == "rule"]
        self.rules = {name: index for index, (name, *_) in enumerate(rules)}
        theirs = {
            (name.split("_")[0], int(num_states), int(num_sums), hyper) for name, num_states, num_sums, hyper in rules
        }
        ours = {(rule.name, len(rule.states), rule.num_sums, " ".join(rule.hyper)) for rule in RULES.values()}
        if theirs != ours:
            raise RuntimeError(f"it differs in the rule {min(theirs ^ ours)[0]!r}")
        for what, structure, names in (
            ("norm", self.norm_arguments, tables.NORM_ARGUMENTS | {"formats", "is_norm_double"}),
            ("update", self.update_arguments, tables.UPDATE_ARGUMENTS | {"formats"}),
        ):
            if {name for name, _ in structure._fields_} != names:
                raise RuntimeError(f"the arguments of its {what} differ")
        launch = [c_int32, c_int32, c_void_p]  # blocks, device, stream
        for name, *arguments in (
            ("num_devices", POINTER(c_int32)),
            ("num_blocks", c_int32, c_int32, c_int32, POINTER(c_int32)),
            ("norm", POINTER(self.norm_arguments), *launch),
            ("update", c_int32, c_int32, POINTER(self.update_arguments), *launch),
        ):
            function = getattr(functions, f"fusedopt_cuda_{name}")
            function.restype, function.argtypes = c_char_p, arguments

    @staticmethod
    def _formats(rows: list[list[str]]) -> dict[str, int]:
        """Name -> index of each format that it has a codec for and the package knows."""
        for name, dtype, aux_dtype, per_aux, takes_random in rows:
            facts = dtype, None if aux_dtype == "-" else aux_dtype, int(per_aux), takes_random == "1"
            if name in FORMATS and FORMATS[name].facts != facts:
                raise RuntimeError(f"it differs in the format {name!r}")
        indices = {name: index for index, (name, *_) in enumerate(rows) if name in FORMATS}
        missing = {name for name, known in FORMATS.items() if known.is_plain} - indices.keys()
        if missing:
            raise RuntimeError(f"it lacks the format {min(missing)!r}")
        return indices

    def call(self, name: str, *arguments: Any) -> None:
        """Raises RuntimeError with the CUDA call that failed, and why."""
        problem = getattr(self._functions, f"fusedopt_cuda_{name}")(*arguments)
        if problem is not None:
            raise RuntimeError(f"CUDA: {problem.decode()}")

    def count(self, name: str, *arguments: Any) -> int:
        """What a function counts."""
        result = c_int32()
        self.call(name, *arguments, ctypes.byref(result))
        return result.value


@functools.cache
def _load() -> tuple[Library | None, str]:
    """(the library, or None where it cannot be used; what was found)."""
    if not LIBRARY.exists():
        return None, _why_not_built()
    build = f"{build_command('FUSEDOPT_BUILD_CUDA=1')} builds it anew"
    try:
        library = Library(LIBRARY)
    except OSError as error:
        return None, f"built, but does not load: {error} ({build})"
    except (RuntimeError, AttributeError, KeyError, ValueError) as error:
        return None, f"built from another version of fusedopt: {error} ({build})"
    has_record = _record().startswith("built ") and not library.is_on_host
    text = f"built and loads ({_record().removeprefix('built ')})" if has_record else "built and loads"
    try:
        count = library.count("num_devices")
    except RuntimeError as error:
        return None, f"{text}, but {error} ({_what_helps_to_see_a_gpu()})"
    return (library, text) if count else (None, f"{text}, but CUDA has no device ({_what_helps_to_see_a_gpu()})")


def _record() -> str:
    """What setup.py wrote about the build; empty if it wrote nothing."""
    try:
        return " ".join(RECORD.read_text().split())
    except OSError:
        return ""


def _why_not_built() -> str:
    """The reason, and what to do."""
    if sys.platform == "darwin":
        return "not built: there is no CUDA for macOS"
    if torch.version.hip is not None:
        return "not built: it serves NVIDIA GPUs, and this torch is one for AMD GPUs, which the backend 'triton' serves"
    record = _record() or "not built"
    if record.startswith("built "):
        record = f"not built: {LIBRARY.name} is missing"
    return f"{record} ({build_command('FUSEDOPT_BUILD_CUDA=1')} builds it, or fails and shows what is missing)"


def _what_helps_to_see_a_gpu() -> str:
    """What to do where CUDA finds no device, or does not work at all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all GPUs: unset it"
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return (
            f"the NVIDIA driver's {DRIVER} was not found: install the driver; "
            "a container must be started with access to the GPU, as with `docker run --gpus all`"
        )
    version = c_int32()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or not version.value:
        return f"{DRIVER} is not that of a working NVIDIA driver: `nvidia-smi` must list a GPU"
    newest = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return (
        f"`nvidia-smi` must list a GPU; the driver supports CUDA {newest} and older, so if nvcc was newer, update the driver, "
        f"or set CUDA_HOME to a toolkit of CUDA {newest} or older, and {build_command('FUSEDOPT_BUILD_CUDA=1')} uses it"
    )


def found() -> str:
    """What there is, for who asks."""
    return _load()[1]


def unavailable(where: torch.device | None = None) -> str | None:
    """Why the kernels cannot be used here, or None."""
    library, text = _load()
    if library is None:
        return text
    if where is None or library.is_on_host:
        return None
    return _problem_on(torch.cuda.current_device() if where.index is None else where.index)


@functools.cache
def _problem_on(index: int) -> str | None:
    """Why the kernels do not run on that device, or None: they are compiled for some generations of GPUs."""
    try:
        _load()[0].count("num_blocks", -1, 0, index)
    except RuntimeError as error:
        capabilities = {torch.cuda.get_device_capability(other) for other in range(torch.cuda.device_count())}
        archs = ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
        build = build_command(f"FUSEDOPT_CUDA_ARCHS={shlex.quote(archs)} FUSEDOPT_BUILD_CUDA=1")
        build = f"if not for this GPU, {build} builds it for the GPUs of this machine"
        return f"{error}; the CUDA part was {_record() or 'built'}; {build}"
    return None


def formats() -> frozenset[str]:
    """Names of the storage formats that the kernels have codecs for."""
    library = _load()[0]
    return frozenset() if library is None else frozenset(library.formats)


def supports(where: torch.device, is_asked_for: bool = False) -> bool:
    """Whether they take tensors of that device; compiled for the host only for who asks for it."""
    if where.type != "cpu":
        return where.type == "cuda"
    library = _load()[0] if is_asked_for else None
    return library is not None and library.is_on_host


class Bucket(device.Bucket):
    """Entries in one table for each kernel; a table has any dtypes."""

    def key(self, entry: Entry) -> Hashable:
        return entry.variant, entry.compute_dtype

    def kernels(self, entries: list[Entry]) -> tables.Kernels:
        return Kernels(entries)


class Kernels(tables.Kernels):
    def __init__(self, entries: list[Entry]):
        self._library = library = _load()[0]
        self.chunk = library.chunk
        first = entries[0]
        self._index = first.param.tensor.device.index or 0
        self._kernel = library.rules[first.variant], int(first.compute_dtype == torch.float64)
        chunks = max(tables.num_chunks(entries, self.chunk), 1)
        self.norm_programs = min(chunks, library.count("num_blocks", -1, 0, self._index))
        self._update_programs = min(chunks, library.count("num_blocks", *self._kernel, self._index))
        columns = []
        for entry in entries:
            stored = [
                slot or entry.param for slot in (*entry.slots, *entry.scalars)
            ]  # what is not stored has no format
            names = [tables.grad_format(entry).name, *(slot.format.name for slot in stored)]
            columns.append([library.formats[name] for name in names])
        self.tables = {"formats": torch.tensor(columns, dtype=torch.int32, device="cpu").t().contiguous()}
        self._norm_arguments = _Filled(library.norm_arguments)
        self._update_arguments = _Filled(library.update_arguments)

    def norm(self, arguments: dict[str, Any], stream: int) -> None:
        is_norm_double = int(arguments["norm"].dtype == torch.float64)
        values = self._norm_arguments.with_(arguments, is_norm_double=is_norm_double)
        self._library.call("norm", values, self.norm_programs, self._index, stream)

    def update(self, arguments: dict[str, Any], stream: int) -> None:
        values = self._update_arguments.with_(arguments)
        self._library.call("update", *self._kernel, values, self._update_programs, self._index, stream)


class _Filled:
    """A structure of arguments, most of which stay the same from launch to launch."""

    def __init__(self, structure: type[ctypes.Structure]):
        self._values = structure()
        self._known: dict[str, Any] = {}  # also keeps tensors alive, whose place another one could take

    def with_(self, arguments: dict[str, Any], **more: int) -> ctypes.Structure:
        """The structure with these values, tensors as their addresses."""
        known = self._known
        for name, value in (*arguments.items(), *more.items()):
            if name not in known or known[name] is not value:
                known[name] = value
                setattr(self._values, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        return self._values
