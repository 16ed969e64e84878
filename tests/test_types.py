"""The public API under strict type checkers: tests/typed/use.py has no error, each mistake of tests/typed/misuse.py is found.

`basedpyright` is pyright as a wheel: pyright's own package fetches the program from npm when it first runs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TYPED = ROOT / "tests/typed"
pytestmark = pytest.mark.xdist_group("type checkers")


def pyright(folder):
    """(file, line) of each error."""
    options = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(options))
    for path in TYPED.glob("*.py"):  # apart, as tests/ would be imported from
        shutil.copy(path, folder)
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(folder)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "{" in run.stdout, run.stdout + run.stderr
    found = json.loads(run.stdout[run.stdout.index("{") :])["generalDiagnostics"]
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1): one["message"]
        for one in found
        if one["severity"] == "error"
    }


def mypy(folder):
    """The same."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(folder), *TYPED.glob("*.py")],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode in (0, 1) and "rror" in run.stdout, run.stdout + run.stderr
    lines = re.findall(r"(\w+\.py):(\d+): error: (.*)", run.stdout)
    return {(file, int(line)): message for file, line, message in lines}


@pytest.mark.parametrize("checker", [pyright, mypy], ids=lambda checker: checker.__name__)
def test_public_api_is_typed_strictly(checker, tmp_path):
    found = checker(tmp_path)
    lines = (TYPED / "misuse.py").read_text().splitlines()
    mistakes = {("misuse.py", number) for number, line in enumerate(lines, 1) if line.endswith("# mistake")}
    assert len(mistakes) == 13
    assert found.keys() == mistakes, {place: found.get(place) for place in found.keys() ^ mistakes}
