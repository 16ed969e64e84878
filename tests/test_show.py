"""``python -m fusedopt show``: every rule's row and formulas, in any terminal, with and without rich, by any of its names."""

import re
from pathlib import Path

import pytest

from fusedopt import __main__, show
from fusedopt.rules import RULES

ROOT = Path(__file__).parent.parent
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)


def shown(capsys, name):
    """What is printed, without colours."""
    assert __main__.main(["show", name]) == 0
    return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)


@pytest.fixture(params=["plain", "rich"])
def terminal(request, monkeypatch, capsys):
    """Sets the width of standard output, which is a terminal if rich is to be used."""
    if request.param == "rich":
        pytest.importorskip("rich")
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm-256color")
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def without_spaces(text):
    return "".join(text.split())


@every_rule
def test_narrow_terminal_shows_the_formulas_below_each_other(rule, terminal, capsys):
    terminal(130)
    printed = shown(capsys, rule.name)
    places = [printed.index(f"---- {title} ----\n") for title in show.formulas(rule)]
    assert places == sorted(places)
    for title, text in show.formulas(rule).items():
        assert text in "\n".join(line.rstrip() for line in printed.splitlines()), title


@every_rule
def test_wide_terminal_shows_the_formulas_side_by_side(rule, terminal, capsys):
    terminal(220)
    lines = shown(capsys, rule.name).splitlines()
    assert max(map(len, lines)) <= 220
    (heading,) = (i for i, line in enumerate(lines) if line.count("----") == 6)
    starts = [lines[heading].index(f"---- {title} ----") for title in show.formulas(rule)]
    for start, end, (title, text) in zip(starts, [*starts[1:], None], show.formulas(rule).items(), strict=True):
        column = [line[start:end] for line in lines[heading + 1 :]]
        assert without_spaces("".join(column)) == without_spaces(text), title
        assert all(line[:start].endswith("  ") for line in lines[heading + 1 :] if start and line[start:].strip())


def functions_of(path):
    """name -> source of the functions of a file, which two empty lines separate."""
    blocks = (ROOT / path).read_text().rstrip().split("\n\n\n")
    return {found[1]: block for block in blocks if (found := re.search(r"^def (\w+)\(", block, re.M))}


@every_rule
def test_formulas_are_what_the_files_hold(rule):
    reference, header, triton = show.formulas(rule).values()
    assert header == (ROOT / f"csrc/rules/{rule.name}.h").read_text().rstrip()
    of_triton = [
        f"prepare_{rule.name}",
        rule.name,
        *(f"{part}_{rule.name}" for part in ("measure", "adapt") if rule.num_sums),
    ]
    for text, path, wanted in (
        (reference, "fusedopt/reference.py", [rule.name]),
        (triton, "kernels/rules.py", of_triton),
    ):
        functions = functions_of(path)
        called = set(re.findall(r"\b(_[a-z]\w+)\(", text))  # their private functions, and those of these
        assert text == "\n\n".join(block for name, block in functions.items() if name in {*wanted, *called})


@every_rule
def test_row_is_shown(rule, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    printed = shown(capsys, rule.name).partition("\n---- ")[0]
    for words in (
        rule.name,
        rule.paper,
        ", ".join(rule.hyper),
        *(state.name for state in rule.states),
        *rule.own_options,
    ):
        assert words in printed
    for name in rule.optimizers:
        assert re.search(rf"^options of {name} .*\blr=.*max_grad_norm=None", printed, re.M)


@pytest.mark.parametrize(
    "name, rule",
    [*((name, rule.name) for rule in RULES.values() for name in rule.optimizers), ("SAM", "sam"), ("adamw", "adam")],
)
def test_class_names_its_rule(name, rule, capsys):
    assert shown(capsys, name) == shown(capsys, rule)


def test_unknown_rule_is_answered_by_the_known_ones(capsys):
    assert __main__.main(["show", "adamx"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "no rule is called 'adamx'" in printed.err
    assert all(name in printed.err for rule in RULES.values() for name in (rule.name, *rule.optimizers))


@pytest.mark.parametrize("arguments", [[], ["show"], ["heal"], ["show", "adam", "lion"]])
def test_wrong_arguments_are_answered_by_the_usage(arguments, capsys):
    assert __main__.main(arguments) == 2
    assert "python -m fusedopt show RULE" in capsys.readouterr().err
