"""The documents are true: their code runs, their links lead somewhere, the page on adding an optimizer adds one."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BACKENDS
from mutants import MUTANTS, ListError, Mutant
from test_build import copy_project

import fusedopt
from fusedopt.rules import RULES

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Blocks of one page share a namespace, as a reader would type them. CONTRIBUTING's are run below, where they belong."""
    if page == "CONTRIBUTING.md":
        return
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S):
        exec(compile(block, page, "exec"), namespace)


def test_readme_has_blocks_to_run():
    assert len(re.findall(r"^```python", (ROOT / "README.md").read_text(), flags=re.M)) >= 2


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page):
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", (ROOT / page).read_text()):
        assert f"\ndef {name}(" in tests, name


CLASS_MODULES = [*(f"optimizers.{path.stem}" for path in (ROOT / "fusedopt/optimizers").glob("[a-z]*.py")), "sam"]


@pytest.mark.parametrize("module", sorted(CLASS_MODULES))
def test_docstring_examples_run(module):
    result = doctest.testmod(importlib.import_module(f"fusedopt.{module}"))
    assert result.failed == 0 and result.attempted >= 5


@pytest.mark.parametrize("name", [name for rule in RULES.values() for name in rule.optimizers])
def test_every_optimizer_is_public_documented_and_in_the_readme(name):
    cls = getattr(fusedopt, name)
    assert name in fusedopt.__all__
    for heading in ("Args", "State", "Raises", "Example:", "Reference:"):
        assert heading in cls.__doc__, heading
    assert f"`{name}`" in (ROOT / "README.md").read_text()


def test_list_of_mutants_follows_the_code():
    """Every planted bug of tests/mutants.py finds its line, and its test."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        try:
            mutant.find(ROOT)
        except ListError as error:
            pytest.fail(f"{mutant.name}: {error}")
        assert mutant.new != mutant.old, mutant.name
        file, function = mutant.test.split("[")[0].split("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), f"{mutant.name}: {file} has no {function}"


def test_mutant_finds_its_text_in_any_source_of_a_folder(tmp_path):
    files = {"csrc/a.h": "x", "csrc/cpu/b.cpp": "y = 1;", "kernels/k.py": "z", "fusedopt/__pycache__/k.pyc": "z"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "fusedopt" / "kernels").symlink_to(tmp_path / "kernels")
    assert Mutant("a", "csrc", "y = 1", "y = 2", "test").apply(tmp_path) == "csrc/cpu/b.cpp"
    assert (tmp_path / "csrc/cpu/b.cpp").read_text() == "y = 2;"
    assert Mutant("a", "csrc/a.h", "x", "", "test").find(tmp_path) == "csrc/a.h"
    assert Mutant("a", ".", "z", "", "test").find(tmp_path) == "kernels/k.py"  # not again by the link, nor the cache
    for place, text in [("csrc", "y = 1"), ("fusedopt", "z"), ("csrc/a.h", "y"), ("csrc/gone.h", "x")]:
        with pytest.raises(ListError, match=f"{place} has '{text}' 0 times"):
            Mutant("a", place, text, "", "test").find(tmp_path)
    (tmp_path / "csrc/c.cuh").write_text("x")
    with pytest.raises(ListError, match="csrc has 'x' 2 times"):
        Mutant("a", "csrc", "x", "", "test").find(tmp_path)


def test_the_page_on_adding_an_optimizer_and_a_format_adds_them(tmp_path):
    """Applies CONTRIBUTING.md to a copy of the project, builds it there, and runs the tests of the new rule and format."""
    copy = copy_project(tmp_path / "copy")
    page = (ROOT / "CONTRIBUTING.md").read_text()
    steps = re.findall(
        r"^<!-- (new file|insert into) (\S+)(?: before: (.*?))? -->\n```\w+\n(.*?)^```", page, re.M | re.S
    )
    assert sum(kind == "new file" for kind, *_ in steps) == 2
    assert len({path for kind, path, *_ in steps if kind == "insert into"}) == 6 + 3
    for kind, path, anchor, block in steps:
        target = copy / path
        if kind == "new file":
            assert not target.exists()
            target.write_text(block)
        else:
            text = target.read_text()
            assert text.count(anchor) == 1, f"{path}: {anchor!r} occurs {text.count(anchor)} times"
            target.write_text(text.replace(anchor, block + anchor))

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(copy), "FUSEDOPT_BUILD_CUDA": "0"}
        result = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        return result.stdout

    run("setup.py", "-q", "build_ext", "--inplace")
    tests = [f"tests/test_{what}.py" for what in ("formula", "parity", "rooms", "compiled_code", "triton", "options")]
    names = "EmaSGD or emasgd or vectorised or wall or floors"
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", names)
    assert int(re.search(r"(\d+) passed", output).group(1)) > 60
    assert "struct EmaSGD" in run("-m", "fusedopt", "show", "EmaSGD")
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_formats.py", "-k", "int8_block", "-rs")
    passed = int(re.search(r"(\d+) passed", output).group(1))
    assert passed == len(BACKENDS) + 1, output  # each backend, and the reference codec alone
    # In the interpreter much runs that Triton's compiler refuses.
    assert "lion states int8_block" in run("-m", "tests.compile_kernels", "--states", "int8_block")
