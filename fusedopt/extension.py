"""Loads the compiled extension, once, or says why it cannot be used. Without it everything works, by the reference."""

from __future__ import annotations

import hashlib
import importlib
import shlex
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from fusedopt.formats import FORMATS
from fusedopt.rules import RULES

FOLDER = Path(__file__).parent
INTERFACE = FOLDER / "_C.pyi"


def build_command(variables: str) -> str:
    """The command that builds a missing part of this package, and where to run it; the variables make a failure an error."""
    install = f"{variables} {shlex.quote(sys.executable or 'python3')} -m pip install"
    tree = FOLDER.parent
    # In a source tree another install would not change what is imported here.
    if (tree / "setup.py").exists() and (tree / "csrc").exists():
        return f"`{install} --no-deps --editable {shlex.quote(str(tree))}`"
    return f"in the folder of fusedopt's sources, `{install} --force-reinstall --no-deps --no-cache-dir .`"


def _load() -> tuple[Any, str | None]:
    """(the extension, None), or (None, the reason)."""
    try:
        module = importlib.import_module("fusedopt._C")
    except Exception as error:  # whatever it is, importing fusedopt must not fail of it
        found = sorted(path.name for path in FOLDER.glob("_C.*") if path.suffix in (".so", ".pyd"))
        if any(name.removeprefix("_C") in EXTENSION_SUFFIXES for name in found):
            reason = f"the C++ extension does not load: {' '.join(str(error).split())}"
        elif found:
            reason = (
                f"the C++ extension was built for another Python: {', '.join(found)}, not _C{EXTENSION_SUFFIXES[0]}"
            )
        else:
            reason = "the C++ extension was not built"
    else:
        difference = _difference(module)
        if difference is None:
            return module, None
        reason = f"the C++ extension was built from another version of fusedopt: {difference}"
    return None, f"{reason} ({build_command('FUSEDOPT_REQUIRE_CPU=1')} builds it, or fails and shows what is missing)"


def _difference(module: Any) -> str | None:
    """What tells an extension that this Python code is not made for; it may compute something else without an error."""
    if INTERFACE.exists():  # frozen programs leave it out
        expected = hashlib.sha256(INTERFACE.read_bytes()).hexdigest()[:12]  # as in setup.py
        built = getattr(module, "interface", "unknown")
        if built != expected:
            return f"its interface is {built}, not {expected}"
    kernels = {(name.split("_")[0], *facts) for name, (_, *facts) in module.rules.items()}
    table = {(rule.name, " ".join(rule.hyper), len(rule.states), rule.num_sums) for rule in RULES.values()}
    if kernels != table:
        return f"it differs in the rule {min(kernels ^ table)[0]!r}"
    codecs = {(name, *facts) for name, (_, *facts) in module.formats.items()}
    formats = {(row.name, *row.facts) for row in FORMATS.values()}
    if codecs != formats:
        return f"it differs in the format {min(name for name, *_ in codecs ^ formats)!r}"
    return None


_C, problem = _load()
