"""The Triton kernels (kernels/, installed as fusedopt.kernels): tensors on a GPU of NVIDIA or AMD, no compiler at install time.

With TRITON_INTERPRET=1 they run on tensors in host memory instead, in Triton's interpreter: slow, and how they are tested.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Hashable, Iterator
from typing import Any

import torch

from fusedopt.backends import device, tables
from fusedopt.entry import Entry
from fusedopt.rules import Rule

SCALARS_ON_DEVICE = True
OLDEST = (3, 6)  # version of Triton: the kernels pass tuples


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def constant(format: Any) -> Any:
    """A row of `kernels.storage.FORMATS` as a kernel takes it: before Triton 3.9 the compiler looks into a tuple for types."""
    import triton.language as tl

    return format if is_interpreted() else tl.constexpr(format)


@functools.cache
def _load() -> tuple[Any, str | None]:
    """(the kernels, None), or (None, the reason why there are none)."""
    try:
        import triton

        found = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
        if found < OLDEST:
            return None, f"Triton {triton.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
        from fusedopt import kernels
        from fusedopt.kernels import engine, rules, storage  # noqa: F401
    except Exception as error:  # whatever it is, other backends must go on
        return None, f"Triton cannot be imported: {' '.join(str(error).split())}"
    return kernels, None


def version() -> str:
    """That of Triton, where the kernels can be used."""
    import triton

    return f"{triton.__version__}{', interpreted (TRITON_INTERPRET=1)' if is_interpreted() else ''}"


def unavailable(where: torch.device | None = None) -> str | None:
    """Why the kernels cannot be used here, or None."""
    return _load()[1]


def formats() -> frozenset[str]:
    """Names of the storage formats that the kernels have codecs for."""
    kernels = _load()[0]
    return frozenset() if kernels is None else frozenset(kernels.storage.FORMATS)


def supports(where: torch.device, is_asked_for: bool = False) -> bool:
    """Whether they take tensors of that device; in the interpreter only for who asks for it."""
    return is_asked_for and where.type == "cpu" if is_interpreted() else where.type == "cuda"


class Bucket(device.Bucket):
    """Entries in one table for each combination of kernel and formats."""

    def key(self, entry: Entry) -> Hashable:
        stored = [slot and slot.format.name for slot in (*entry.slots, *entry.scalars)]
        return entry.variant, tables.grad_format(entry).name, *stored

    def kernels(self, entries: list[Entry]) -> tables.Kernels:
        return Kernels(self._rule, entries[0], tables.num_chunks(entries, _load()[0].engine.CHUNK))


class Kernels(tables.Kernels):
    """Compiled at the first launch for a rule, the states it keeps, and formats: those of an entry, which all others share."""

    tables: dict[str, torch.Tensor] = {}  # noqa: RUF012

    def __init__(self, rule: Rule, entry: Entry, num_chunks: int):
        import triton.language as tl

        kernels = _load()[0]
        self._engine = engine = kernels.engine
        self.chunk = engine.CHUNK
        processors, *machine = _machine(entry.param.tensor.device)
        wanted = min(num_chunks, processors * engine.PROGRAMS_PER_PROCESSOR)
        self.norm_programs = self._update_programs = max(wanted, 1)
        known = kernels.storage.FORMATS
        grad, slots = known[tables.grad_format(entry).name], [slot and known[slot.format.name] for slot in entry.slots]
        written = [slot.format.dtype for slot in (entry.param, *entry.states) if slot is not None]
        itemsizes = [dtype.itemsize for dtype in (*written, tables.grad_format(entry).dtype)]
        self._norm_options = {
            "GRAD": constant(grad),
            **engine.launch_options(engine.global_norm, itemsizes[-1:], *machine),
        }
        self._param = constant(slots[tables.PARAM])
        of_rule = {
            name.upper(): getattr(kernels.rules, f"{name}_{rule.name}", None)
            for name in ("prepare", "measure", "adapt")
        }
        self._options = dict(
            **of_rule, UPDATE=getattr(kernels.rules, rule.name), NUM_SUMS=rule.num_sums, NUM_HYPER=len(rule.hyper),
            STORES=tuple(state is not None for state in entry.states), FORMATS=tuple(map(constant, slots)),
            GRAD=constant(grad), SCALARS=tuple(known[scalar.format.name].dtype for scalar in entry.scalars),
            DTYPE=tl.float64 if entry.compute_dtype == torch.float64 else tl.float32,
            **engine.launch_options(engine.update, itemsizes, *machine),
        )  # fmt: skip
        before = [engine.measure, engine.add_up] if rule.num_sums else []
        self._update_kernels = [*before, engine.update]

    def norm(self, arguments: dict[str, Any], stream: int) -> None:
        arguments = dict(arguments)
        is_final = bool(arguments.pop("is_final"))
        num_partials = 1 << (arguments["num_partials"] - 1).bit_length()
        is_weighted = isinstance(arguments["weights"], torch.Tensor)
        if not is_weighted:
            arguments["weights"] = None
        self._engine.global_norm[(self.norm_programs,)](
            **arguments, IS_FINAL=is_final, NUM_PARTIALS=num_partials, PARAM=self._param if is_weighted else None,
            **self._norm_options,
        )  # fmt: skip

    def _launches(self, arguments: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The kernels of an update, in order, with what each of them takes."""
        values = {"sums": None, **arguments, **self._options}
        for kernel in self._update_kernels:
            taken = {*kernel.arg_names, "num_warps", "enable_fp_fusion", "maxnreg"}
            yield kernel, {name: value for name, value in values.items() if name in taken}

    def prepare_update(self, arguments: dict[str, Any]) -> None:
        """Compiles them."""
        for kernel, values in self._launches(arguments):
            kernel.warmup(**values, grid=(self._update_programs,))

    def update(self, arguments: dict[str, Any], stream: int) -> None:
        for kernel, values in self._launches(arguments):
            kernel[(self._update_programs,)](**values)


@functools.cache
def _machine(where: torch.device) -> tuple[int, int, int | None]:
    """(multiprocessors, threads of a warp, NVIDIA's compute capability: 90 for 9.0; None if it is another's)."""
    if where.type == "cpu":
        return 1, 32, None
    properties = torch.cuda.get_device_properties(where)
    capability = 10 * properties.major + properties.minor if torch.version.hip is None else None
    return properties.multi_processor_count, properties.warp_size, capability
