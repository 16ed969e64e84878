"""``python -m fusedopt show RULE``: a rule's row of the table, and its formula in Python, C++ and Triton, side by side."""

import ast
import importlib.util
import inspect
import itertools
import shutil
import sys
import textwrap
from pathlib import Path

import fusedopt
from fusedopt.rules import RULES, Rule

GAP = "   "
NARROWEST = 64  # characters of a column; where three do not fit, the formulas come one below the other
PACKAGE = Path(__file__).parent


def find_rule(name: str) -> Rule:
    """A rule by its own name or by that of a class.

    Raises:
        KeyError: there is none.
    """
    of_class = {cls.lower(): rule for rule in RULES.values() for cls in rule.optimizers}
    return {**of_class, **RULES}[name.lower()]


def row(rule: Rule) -> list[tuple[str, str]]:
    """The row of the table, in words: (what, values)."""
    states = [
        state.name
        + (f" if {state.option}" if state.option else "")
        + (f", starting at {state.initial}" if state.initial else "")
        + (f", one value per row if {state.per_row}" if state.per_row else "")
        for state in rule.states
    ]
    classes = [f"{cls}, as torch.optim.{twin}" if twin else cls for cls, twin in rule.optimizers.items()]
    lines = [
        ("rule", rule.name),
        ("paper", rule.paper),
        ("classes", "; ".join(classes) or "none of its own"),
        ("states", "; ".join([*states, *["step"] * rule.keeps_step, *[rule.extra] * (rule.extra is not None)])),
        ("scalars", ", ".join(rule.hyper)),
    ]
    if rule.num_sums:
        lines.append(("sums", f"{rule.num_sums} over each tensor, before its update"))
    for cls in rule.optimizers:
        parameters = [*inspect.signature(getattr(fusedopt, cls)).parameters.values()][1:]
        lines.append((f"options of {cls}", ", ".join(f"{each.name}={each.default!r}" for each in parameters)))
    if rule.own_options:
        lines.append(("own options", ", ".join(f"{name}={default}" for name, default in rule.own_options.items())))
    return lines


def formulas(rule: Rule) -> dict[str, str]:
    """The source of the rule in each language, by the name of its file."""
    return {
        "fusedopt/reference.py": _functions(_source("reference.py", "fusedopt/reference.py"), [rule.name]),
        f"csrc/rules/{rule.name}.h": _source(f"headers/{rule.name}.h", f"csrc/rules/{rule.name}.h").rstrip(),
        "kernels/rules.py": _functions(
            _source("kernels/rules.py", "kernels/rules.py"),
            [f"{part}{rule.name}" for part in ("prepare_", "measure_", "adapt_", "")],
        ),
    }


def _source(packaged: str, in_tree: str) -> str:
    """A file's text: from where an install has it, else from the source tree."""
    installed = PACKAGE / packaged
    return (installed if installed.exists() else PACKAGE.parent / in_tree).read_text()


def _functions(source: str, names: list[str]) -> str:
    """The functions of these names, and the private ones that they call, as they are written."""
    known = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    wanted = [name for name in names if name in known]
    for name in wanted:  # grows
        called = {node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)}
        wanted += [other for other in known if other.startswith("_") and other in called and other not in wanted]
    lines = source.splitlines()
    first = {name: min(line.lineno for line in [known[name], *known[name].decorator_list]) for name in wanted}
    return "\n\n".join(
        "\n".join(lines[first[name] - 1 : known[name].end_lineno]) for name in sorted(wanted, key=first.__getitem__)
    )


def show(name: str) -> int:
    """Prints a rule; returns the exit status."""
    try:
        rule = find_rule(name)
    except KeyError:
        classes = [cls for rule in RULES.values() for cls in rule.optimizers]
        print(f"no rule is called {name!r}", file=sys.stderr)
        print(f"rules: {', '.join(RULES)}; or a class: {', '.join(classes)}", file=sys.stderr)
        return 2
    width = shutil.get_terminal_size().columns
    lines = row(rule)
    margin = " " * (2 + max(len(label) for label, _ in lines))
    for label, text in lines:
        print(textwrap.fill(f"{label:{len(margin)}}{text}", max(width, 2 * len(margin)), subsequent_indent=margin))
    print()
    is_rich = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    (_print_highlighted if is_rich else _print_plain)(formulas(rule), width)
    return 0


def _column(width: int) -> int | None:
    """Characters per column, if three fit beside each other."""
    column = (width - 2 * len(GAP)) // 3
    return column if column >= NARROWEST else None


def _print_plain(texts: dict[str, str], width: int) -> None:
    column = _column(width)
    if column is None:
        print("\n\n".join(f"{_heading(title)}\n{text}" for title, text in texts.items()))
        return
    columns = [_folded([_heading(title), *text.splitlines()], column) for title, text in texts.items()]
    for lines in itertools.zip_longest(*columns, fillvalue=""):
        print(GAP.join(f"{line:{column}}" for line in lines).rstrip())


def _folded(lines: list[str], width: int) -> list[str]:
    """Lines of code, continued with a deeper indentation where they do not fit."""
    folded = []
    for line in lines:
        further = " " * (len(line) - len(line.lstrip()) + 4)
        folded += textwrap.wrap(line, width, subsequent_indent=further, break_on_hyphens=False) or [""]
    return folded


def _print_highlighted(texts: dict[str, str], width: int) -> None:
    from rich.console import Console
    from rich.syntax import Syntax
    from rich.table import Column, Table

    console, column = Console(width=width, highlight=False), _column(width)
    parts = {
        title: Syntax(text, Path(title).suffix[1:], theme="ansi_dark", background_color="default", word_wrap=True)
        for title, text in texts.items()
    }
    if column is None:
        for title, part in parts.items():
            console.print(_heading(title), part, "", sep="\n", style="bold")
        return
    table = Table(*(Column(_heading(title), width=column) for title in parts), box=None, padding=(0, len(GAP), 0, 0))
    table.add_row(*parts.values())
    console.print(table)


def _heading(title: str) -> str:
    return f"---- {title} ----"
