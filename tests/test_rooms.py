"""The rooms of the project (docs/design.md): what each may not contain, and which may import which."""

import html
import re
from pathlib import Path

import pytest
import rooms
from mutants import SOURCE_SUFFIXES

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
        "csrc/storage.h csrc/table.h csrc/rows.h csrc/overlap.h",
        [RULE_NAMES, HYPERPARAMETERS, r"torch|Python|py::|cuda", r"#include \"(?!storage\.h|rows\.h|rules/math\.h)"],
    ),
    "the engine knows no formula and no Python": (
        "csrc/cpu/*",
        [RULE_NAMES, HYPERPARAMETERS, r"torch|Python|py::|cuda", r"\b(pow|exp|log)f?\s*\("],
    ),
    "bindings do no arithmetic": (
        "csrc/bindings.cpp csrc/bucket.h csrc/tensor.h csrc/watch.h csrc/torch_abi.h",
        [FORMULAS, RULE_NAMES, HYPERPARAMETERS],
    ),
    "the CUDA engine knows no formula of a rule, no Python and no torch": (
        "csrc/cuda/*",
        [RULE_NAMES, HYPERPARAMETERS, r"torch|Python|py::|\.\./cpu|table\.h", r"\b(pow|exp|log)f?\s*\("],
    ),
    "kernels know nothing of the package": ("kernels/*.py", [r"(import|from) fusedopt"]),
    "the reference knows torch only": ("fusedopt/reference.py", [r"(import|from) (?!torch)"]),
    "the table knows no tensor": ("fusedopt/rules.py", [r"\btorch\b(?!\.optim)"]),
    "options of every class know no class, tensor or rule": (
        "fusedopt/options.py",
        [r"(import|from) fusedopt\.?(?!\.(types|ranges)\b|(types|ranges)\b)", r"\btorch\b", RULE_NAMES, HYPERPARAMETERS],
    ),
    "who shows a rule computes nothing": ("fusedopt/show.py", [r"\btorch\b(?!\.optim)"]),
    "who loads the extension knows no tensor": ("fusedopt/extension.py", [r"\btorch\b"]),
    "classes know their row and the base": (
        "fusedopt/optimizers/*.py",
        [r"backends|data_ptr|_C\b", r"from fusedopt\.(?!optimizer\b|options\b|rules\b|types\b|optimizers\.)"],
    ),
    "schedules, groups and recipes know no engine": (
        "fusedopt/schedules.py fusedopt/param_groups.py fusedopt/recipes.py",
        [
            r"(from|import) fusedopt\.(?!optimizers\b|ranges\b|param_groups\b|sam\b)",
            r"from fusedopt import (?!schedules *$)",
            r"_C\b|data_ptr|\.data\b|\.grad\b",
        ],
    ),
    "which parameters decay is no matter of the optimizer": ("fusedopt/param_groups.py", [r"fusedopt|optim\b"]),
    "engines, plan and step know no rule by name": (
        "fusedopt/[!r]*.py fusedopt/record.py fusedopt/backends/*.py",
        [r"[\"'](sgd|adagrad|rmsprop|adamw?|nadam|lion)[\"']"],
    ),
    "who knows DTensors knows no rule": (
        "fusedopt/dtensor.py",
        [RULE_NAMES, HYPERPARAMETERS, r"\.grad\b|data_ptr"],
    ),
    "the benchmark times what a user calls": (
        "bench/*.py",
        [r"fusedopt\._(?!_)|fusedopt\.(plan|backends|optimizer|clip|rules|errors)\b"],
    ),
}  # fmt: skip


LONGEST = 420  # lines
GROWS_WITH_EVERY_RULE = {"fusedopt/rules.py", "kernels/rules.py"}

SMALL_FLOORS = (("__init__",), ("upper", "beside"), ("folder.__init__",), ("folder.*",), ("lower", "kernels"))
SMALL_PROJECT = {
    "fusedopt/__init__.py": "from fusedopt import upper\nVERSION = 1",
    "fusedopt/upper.py": "import fusedopt.lower, torch\nfrom fusedopt.folder import part, Part",
    "fusedopt/beside.py": "from fusedopt import kernels",
    "fusedopt/folder/__init__.py": "from .part import Part",
    "fusedopt/folder/part.py": "def use():\n    from ..lower import what\n    from fusedopt.kernels import engine",
    "fusedopt/lower.py": "import torch.optim",
    "kernels/engine.py": "",
}


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


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_floors_hold():
    found = rooms.violations()
    assert not found, "\n".join(found)


LOWER, BESIDE, UPPER = (f"fusedopt/{name}.py" for name in ("lower", "beside", "upper"))
PART, NEW = (f"fusedopt/folder/{name}.py" for name in ("part", "new"))
UPWARDS = {  # planted: (files, what is found: line of which file, importing and imported module with their floors)
    "circle": (
        {UPPER: "import fusedopt.lower", LOWER: "\nfrom fusedopt.upper import upper"},
        f"{LOWER}:2: lower (floor 1) imports upper (floor 4)",
    ),
    "in a function": (
        {LOWER: "def use():\n    if True:\n        from fusedopt.upper import Upper"},
        f"{LOWER}:3: lower (floor 1) imports upper (floor 4)",
    ),
    "for types": (
        {LOWER: "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fusedopt.upper import Upper"},
        f"{LOWER}:3: lower (floor 1) imports upper (floor 4)",
    ),
    "from the package": ({LOWER: "from fusedopt import upper"}, f"{LOWER}:1: lower (floor 1) imports upper (floor 4)"),
    "several": ({LOWER: "import torch, fusedopt.upper"}, f"{LOWER}:1: lower (floor 1) imports upper (floor 4)"),
    "relative": ({LOWER: "from . import upper"}, f"{LOWER}:1: lower (floor 1) imports upper (floor 4)"),
    "same floor": ({BESIDE: "from .upper import Upper"}, f"{BESIDE}:1: beside (floor 4) imports upper (floor 4)"),
    "package": ({UPPER: "import fusedopt"}, f"{UPPER}:1: upper (floor 4) imports __init__ (floor 5)"),
    "name in the package": (
        {UPPER: "from fusedopt import VERSION"},
        f"{UPPER}:1: upper (floor 4) imports __init__ (floor 5)",
    ),
    "name in its own folder": (
        {PART: "from fusedopt.folder import Part"},
        f"{PART}:1: folder.part (floor 2) imports folder.__init__ (floor 3)",
    ),
    "module of its own folder": (
        {NEW: "from fusedopt.folder import part"},
        f"{NEW}:1: folder.new (floor 2) imports folder.part (floor 2)",
    ),
}


def test_floors_allow_imports_that_point_down(tmp_path):
    write(tmp_path, SMALL_PROJECT)
    assert rooms.violations(tmp_path, SMALL_FLOORS) == []


@pytest.mark.parametrize("planted", UPWARDS)
def test_floors_notice_an_import_that_does_not_point_down(planted, tmp_path):
    files, found = UPWARDS[planted]
    write(tmp_path, SMALL_PROJECT | files)
    expected = f"{found}, but a module may import only from floors below its own"
    assert rooms.violations(tmp_path, SMALL_FLOORS) == [expected]


def test_floors_notice_a_module_that_is_not_listed_once(tmp_path):
    write(tmp_path, SMALL_PROJECT | {"fusedopt/new.py": "from fusedopt import upper", "fusedopt/other/new.py": ""})
    floors = (*SMALL_FLOORS, ("gone", "empty.*", "folder.part"))
    assert rooms.violations(tmp_path, floors) == [
        "FLOORS lists gone, but there is no such file",
        "FLOORS lists empty.*, but there is no such file",
        "FLOORS lists folder.part twice: on floors 3 and 1",
        "fusedopt/new.py is on no floor: add new to FLOORS in tests/rooms.py",
        "fusedopt/other/new.py is on no floor: add other.new to FLOORS in tests/rooms.py",
    ]


def test_picture_of_the_floors_is_up_to_date():
    picture = re.search(r"<dc:description>(.*?)</dc:description>", rooms.PICTURE.read_text(), flags=re.S)
    assert html.unescape(picture.group(1)) == rooms.describe(), "`make rooms` draws the picture anew"


def test_picture_shows_every_room_and_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in pictures:
        rooms.draw(path)
    drawn = pictures[0].read_text()
    assert drawn == pictures[1].read_text()
    for room in rooms.arrows():
        assert drawn.count(f">{room}</text>") == rooms.PICTURE.read_text().count(f">{room}</text>") == 1


def test_picture_leaves_out_arrows_that_longer_paths_imply(tmp_path):
    write(tmp_path, SMALL_PROJECT)
    assert rooms.arrows(tmp_path, SMALL_FLOORS) == {
        "__init__": ["upper"],
        "upper": ["folder.__init__"],
        "beside": ["kernels"],
        "folder.__init__": ["folder.*"],
        "folder.*": ["kernels", "lower"],
        "lower": [],
        "kernels": [],
    }


def test_picture_has_a_path_for_every_arrow():
    arrows = rooms.arrows()
    rows, links = rooms.cut_into_links(arrows)
    row_of = {node: row for row, nodes in enumerate(rows) for node in nodes}
    assert all(row_of[end] == row_of[start] + 1 for start, end in links)

    def target(node):
        return node if isinstance(node, str) else node[0]

    for room, targets in arrows.items():
        assert sorted(target(end) for start, end in links if start == room) == targets
    assert all(target(end) == start[0] for start, end in links if isinstance(start, tuple))
    for order in rooms.try_orders(rows, links):
        assert [{*nodes} for nodes in order] == [{*nodes} for nodes in rows]


def test_picture_keeps_boxes_apart():
    places = rooms.spread([0.0, 0.0, 100.0, 90.0], [10.0, 20.0, 10.0, 10.0])
    assert places == pytest.approx([-14.5, 14.5, 83.0, 107.0])


def long_files(root: Path) -> list[str]:
    return [
        f"{name} has {lines} lines"
        for folder in ("fusedopt", "csrc", "kernels")
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in SOURCE_SUFFIXES
        and (lines := len(path.read_text().splitlines())) > LONGEST
        and (name := path.relative_to(root).as_posix()) not in GROWS_WITH_EVERY_RULE
    ]


def test_no_file_is_too_long():
    found = long_files(ROOT)
    assert not found, f"{', '.join(found)}; at most {LONGEST}"


def test_a_file_that_is_too_long_is_seen(tmp_path):
    lengths = {"fusedopt/a.py": 420, "csrc/cpu/b.cpp": 421, "kernels/c.py": 422, "kernels/rules.py": 500}
    write(tmp_path, {name: "\n" * lines for name, lines in lengths.items()})
    assert long_files(tmp_path) == ["csrc/cpu/b.cpp has 421 lines", "kernels/c.py has 422 lines"]
