"""The options of every class: each one's name, type, default and meaning, said once.

A constructor takes them as ``**options: Unpack[OptimizerOptions]`` (or of `SparseOptions`) and passes them on; type checkers
read that. `describe` writes them out in its signature and docstring, for ``help()`` and everything else that reads those.
"""

import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypedDict, get_args, get_type_hints

from typing_extensions import Unpack

from fusedopt.ranges import number
from fusedopt.types import Backend, Nonfinite, Sparse

NONFINITE: tuple[Nonfinite, ...] = get_args(Nonfinite)
SPARSE_MODES: tuple[Sparse | None, ...] = (None, "lazy")


class Option(NamedTuple):
    """What the type of an option does not say."""

    default: Any
    meaning: str


# The types are strings so that signatures show them by name, as they show those of a class's own arguments.
class OptimizerOptions(TypedDict, total=False):
    """Options of the whole optimizer that every class takes."""

    max_grad_norm: Annotated[
        "float | None",
        Option(None, "clip the global 2-norm of all gradients to this inside every step; None: do not clip."),
    ]
    nonfinite: Annotated[
        "Nonfinite",
        Option(
            "propagate",
            'with a NaN or infinite gradient norm, ``"propagate"`` it, ``"skip"`` the step or raise an ``"error"``.',
        ),
    ]
    backend: Annotated[
        "Backend | None",
        Option(
            None,
            '``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"``, ``"reference"``; None: FUSEDOPT_BACKEND, else ``"auto"``.',
        ),
    ]


class SparseOptions(OptimizerOptions, total=False):
    """Those of classes that take sparse gradients."""

    sparse: Annotated[
        "Sparse | None",
        Option(
            None,
            '``"lazy"`` takes sparse gradients (COO) whatever the options: the rule is then applied to the rows they touch '
            "alone; the others stand still, with their states and their decay. None: only where that is exact.",
        ),
    ]


@functools.cache
def options_of(kind: type[OptimizerOptions]) -> dict[str, Option]:
    """The options of one kind, by name."""
    return {name: get_args(hint)[1] for name, hint in get_type_hints(kind, include_extras=True).items()}


# All of them, and their defaults. As a key of a group they would have no effect, and are refused there.
OPTIMIZER_OPTIONS = {name: option.default for name, option in options_of(SparseOptions).items()}


def describe(cls: type) -> None:
    """Writes the options out in the signature of a class's own constructor and in the Args of its docstring."""
    constructor: Any = cls.__dict__.get("__init__")
    try:
        annotation = constructor.__annotations__.get("options")
    except (AttributeError, NameError):  # no function; or, from Python 3.14 on, a name that is not defined yet
        return
    for kind in (OptimizerOptions, SparseOptions):
        if annotation in (Unpack[kind], f"Unpack[{kind.__name__}]"):  # with postponed annotations, a string
            constructor.__signature__ = _written_out(inspect.signature(constructor), kind)
            # Types here: the names in the strings need not be known where the class is.
            del constructor.__annotations__["options"]
            constructor.__annotations__.update(get_type_hints(kind))
            cls.__doc__ = cls.__doc__ and _with_args(cls.__doc__, kind)


def _written_out(signature: inspect.Signature, kind: type[OptimizerOptions]) -> inspect.Signature:
    """A signature with the options in place of ``**options``."""
    names = {name: hint.__origin__.__forward_arg__ for name, hint in kind.__annotations__.items()}
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=names[name])
        for name, option in options_of(kind).items()
    ]
    return signature.replace(parameters=[*own, *added])


def _with_args(docstring: str, kind: type[OptimizerOptions]) -> str:
    """A docstring whose section Args ends with the options."""
    section = re.search(r"^( *)Args:.*?(?=\n\s*\n|\s*\Z)", docstring, re.M | re.S)
    if section is None:
        return docstring
    entry, further = section[1] + " " * 4, section[1] + " " * 8
    entries = [
        textwrap.fill(f"{name}: {option.meaning}", 120, initial_indent=entry, subsequent_indent=further)
        for name, option in options_of(kind).items()
    ]
    return "\n".join([docstring[: section.end()], *entries]) + docstring[section.end() :]


def taken(cls: type, given: Mapping[str, Any], takes_sparse: bool) -> dict[str, Any]:
    """The options of an optimizer of some class, those that are not given at their defaults.

    Raises:
        TypeError: one is given that the class does not take.
    """
    known = options_of(SparseOptions if takes_sparse else OptimizerOptions)
    for name in given:
        if name not in known:
            takers = [base for base in cls.__mro__ if hasattr(base.__dict__.get("__init__"), "__signature__")]
            raise TypeError(f"{[*takers, cls][0].__qualname__}.__init__() got an unexpected keyword argument {name!r}")
    return {name: given.get(name, option.default) for name, option in known.items()}


# ---- their values ----------------------------------------------------------------------------------------------


def check_max_grad_norm(max_grad_norm: float | None) -> float | None:
    """The limit of every step as a float; None stays None.

    Raises:
        ValueError: zero, which configurations use for "off", negative, NaN or not a number.
    """
    if max_grad_norm is None:
        return None
    value = number("max_grad_norm", max_grad_norm)
    if value == 0:
        raise ValueError(
            f"max_grad_norm must be > 0, got {max_grad_norm} (it would zero every gradient); pass None to disable clipping"
        )
    if not value > 0:
        raise ValueError(f"max_grad_norm must be > 0 (inf: compute the norm, do not clip), got {max_grad_norm}")
    return value


def check_max_norm(name: str, max_norm: float) -> float:
    """The limit of one clip as a float.

    Raises:
        ValueError: negative, NaN or not a number.
    """
    value = number(name, max_norm)
    if not value >= 0:
        raise ValueError(f"{name} must be >= 0 (inf: compute the norm, do not clip), got {max_norm}")
    return value


def check_nonfinite(value: Nonfinite) -> Nonfinite:
    """The same value.

    Raises:
        ValueError: none of `NONFINITE`.
    """
    if value not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(map(repr, NONFINITE))}, got {value!r}")
    return value


def check_sparse(value: Sparse | None) -> Sparse | None:
    """The same value.

    Raises:
        ValueError: none of `SPARSE_MODES`.
    """
    if not any(value is mode or (isinstance(value, str) and value == mode) for mode in SPARSE_MODES):
        raise ValueError(f"sparse must be None or 'lazy', got {value!r}")
    return value
