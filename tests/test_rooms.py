"""The walls between the rooms of the project: what each may not contain (docs/design.md)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULE_NAMES = r"(?i)\b(sgd|adagrad|rmsprop|adamw?|nadam|lion|amsgrad)"
HYPERPARAMETERS = r"\b(lr|betas?[12]?|eps|weight_decay|momentum|dampening|alpha)\b"
FORMULAS = r"\b(std::)?(sqrt|pow|exp|log)f?\s*\("

# room: (files, patterns that must not occur in code, and why)
WALLS = {
    "rules know values only": (
        "csrc/rules/[!am]*.h csrc/rules/ad*.h",
        [r"T\s*\*", r"\bfor\s*\(|\bwhile\s*\(", r"\[\w", r"bfloat|float16|uint\d+_t", r"#include <", r"cuda|torch|Python|py::"],
    ),
    "math.h needs the standard library only": ("csrc/rules/math.h", [r"#include (?!<cmath>)", r"\bfor\s*\(", r"\[\w"]),
    "storage and tables know no rule": (
        "csrc/storage.h csrc/plan.h csrc/rows.h",
        [RULE_NAMES, HYPERPARAMETERS, r"torch|Python|py::|cuda", r"#include \"(?!storage\.h|rows\.h|rules/math\.h)"],
    ),
    "the engine knows no formula and no Python": (
        "csrc/cpu/*",
        [RULE_NAMES, HYPERPARAMETERS, r"torch|Python|py::|cuda", r"\b(pow|exp|log)f?\s*\("],
    ),
    "bindings do no arithmetic": ("csrc/bindings.cpp", [FORMULAS, RULE_NAMES, HYPERPARAMETERS]),
    "the CUDA engine knows no formula of a rule, no Python and no torch": (
        "csrc/cuda/*",
        [RULE_NAMES, HYPERPARAMETERS, r"torch|Python|py::|\.\./cpu|plan\.h", r"\b(pow|exp|log)f?\s*\("],
    ),
    "kernels know nothing of the package": ("kernels/*.py", [r"(import|from) fusedopt"]),
    "the reference knows torch only": ("fusedopt/reference.py", [r"(import|from) (?!torch)"]),
    "the table knows no tensor": ("fusedopt/rules.py", [r"\btorch\b(?!\.optim)", r"backends|_C\b"]),
    "options of every class know no class, tensor or rule": (
        "fusedopt/options.py",
        [r"(import|from) fusedopt\.?(?!\.types\b|types\b)", r"\btorch\b", RULE_NAMES, HYPERPARAMETERS],
    ),
    "who shows a rule computes nothing": ("fusedopt/show.py", [r"\btorch\b(?!\.optim)", r"backends|_C\b"]),
    "who loads the extension knows no tensor": ("fusedopt/extension.py", [r"\btorch\b", r"backends|plan\b"]),
    "classes know their row and the base": (
        "fusedopt/optimizers/*.py",
        [r"backends|data_ptr|_C\b", r"from fusedopt\.(?!optimizer\b|options\b|rules\b|types\b|optimizers\.)"],
    ),
    "schedules, groups and recipes know no engine": (
        "fusedopt/schedules.py fusedopt/param_groups.py fusedopt/recipes.py",
        [r"(import|from) .*\b(backends|plan|clip|extension|reference|kernels|_C)\b", r"data_ptr|\.data\b|\.grad\b"],
    ),
    "which parameters decay is no matter of the optimizer": ("fusedopt/param_groups.py", [r"fusedopt|optim\b"]),
    "plan and backends know no class and no rule by name": (
        "fusedopt/plan.py fusedopt/sparse.py fusedopt/backends/*.py",
        [r"fusedopt\.optimizers?\b", r"[\"'](sgd|adagrad|rmsprop|adamw?|nadam|lion)[\"']"],
    ),
    "who knows DTensors knows no rule and no plan": (
        "fusedopt/dtensor.py",
        [r"(import|from) fusedopt", RULE_NAMES, HYPERPARAMETERS, r"\.grad\b|data_ptr"],
    ),
    "the benchmark times what a user calls": (
        "bench/*.py",
        [r"fusedopt\._(?!_)|fusedopt\.(plan|backends|optimizer|clip|rules|errors)\b"],
    ),
}  # fmt: skip


def code_lines(path: Path):
    """(number, line) without comments and docstrings."""
    text = path.read_text()
    if path.suffix == ".py":
        text = re.sub(r'r?""".*?"""', lambda match: "\n" * match.group().count("\n"), text, flags=re.S)
        text = re.sub(r"#.*", "", text)
    else:
        text = re.sub(r"//.*", "", text)
    yield from enumerate(text.splitlines(), 1)


def trespasses(files: str, patterns: list[str]) -> list[str]:
    paths = sorted(path for pattern in files.split() for path in ROOT.glob(pattern) if path.is_file())
    assert paths, f"no file matches {files}"
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}   [{pattern}]"
        for path in paths
        for number, line in code_lines(path)
        for pattern in patterns
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("room", WALLS)
def test_wall_stands(room):
    files, patterns = WALLS[room]
    found = trespasses(files, patterns)
    assert not found, f"{room}:\n" + "\n".join(found)


def test_walls_are_seen_when_crossed(tmp_path, monkeypatch):
    """The check itself can fail."""
    (tmp_path / "csrc/rules").mkdir(parents=True)
    (tmp_path / "csrc/rules/lion.h").write_text("T* param;  // fine here: for (;;)\n")
    monkeypatch.setattr("test_rooms.ROOT", tmp_path)
    files, patterns = WALLS["rules know values only"]
    assert len(trespasses(files, patterns)) == 1
