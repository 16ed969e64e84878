"""Both ends of the stated version ranges: for each row an environment of its own, the project installed in it, and its tests.

    python -m tests.versions               all rows
    python -m tests.versions oldest        those whose names contain this word, or one of several

A row names a Python and exact packages. Environments are made in runs/versions and kept: a second run installs nothing anew. A
row whose Python or packages cannot be had is reported as "not run", with the reason, and counts as a failure.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs/versions"
TESTS = (
    "test_torch_contract.py",
    "test_drop_in.py",
    "test_checkpoints.py",
    "test_clip.py",
    "test_device.py",
    "test_sam.py",
    "test_triton.py",
)
BUILD = ("setuptools>=77", "pybind11>=3", "wheel")


@dataclass(frozen=True)
class Row:
    """One environment. Triton is installed apart, without its dependencies: each torch pins another version of it."""

    name: str
    python: str
    torch: str
    triton: str
    others: tuple[str, ...]


ROWS = (
    Row("oldest", "3.10", "torch==2.6.0", "triton==3.6.0",
        ("numpy==1.26.0", "pytest==8.0.0", "pytest-xdist==3.5.0", "hypothesis==6.100.0")),
    Row("newest", "3.13", "torch", "triton", ("numpy", "pytest<9.2", "pytest-xdist", "hypothesis")),
)  # fmt: skip


class NotRun(Exception):
    """Why a row's environment cannot be made."""


def find_python(version: str) -> str:
    """The interpreter of that version: by its name, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for candidate in (*sorted(pyenv.glob(f"{version}.*/bin/python")), shutil.which(f"python{version}"), sys.executable):
        answer = "import sys; print('%d.%d' % sys.version_info[:2])"
        if candidate and run([str(candidate), "-c", answer]).stdout.strip() == version:
            return str(candidate)
    raise NotRun(f"no Python {version} here")


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def install(python: Path, *arguments: str, **environment: str) -> None:
    result = run([str(python), "-m", "pip", "install", "--quiet", *arguments], **environment)
    if result.returncode != 0:
        errors = [line for line in result.stdout.splitlines() if line.startswith("ERROR")]
        raise NotRun((errors or result.stdout.splitlines() or ["pip failed"])[-1])


def environment_of(row: Row) -> Path:
    """Its Python, with everything installed."""
    folder = FOLDER / row.name.replace(" ", "-")
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        made = run([find_python(row.python), "-m", "venv", "--clear", str(folder)])
        if made.returncode != 0:
            raise NotRun(made.stdout.strip().splitlines()[-1])
        install(python, row.torch)
        install(python, *BUILD, *row.others)
        install(python, "--no-deps", row.triton)
        (folder / "complete").touch()
    return python


def test(row: Row, more: list[str]) -> tuple[str, str]:
    """(versions, result) of a row."""
    python = environment_of(row)
    # Of a copy, because each row builds an extension of its own beside the sources.
    copy = FOLDER / f"{row.name.replace(' ', '-')}-copy"
    shutil.rmtree(copy, ignore_errors=True)
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"]).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), listed):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    install(python, "--no-build-isolation", "--no-deps", "--editable", str(copy), FUSEDOPT_REQUIRE_CPU="1")
    names = (
        "import platform, torch, numpy, triton; print('Python', platform.python_version(), 'torch', torch.__version__, "
        "'Triton', triton.__version__, 'NumPy', numpy.__version__)"
    )
    versions = run([str(python), "-c", names]).stdout.strip().splitlines()[-1]
    print(f"{row.name}: {versions} …", flush=True)
    tests = [f"tests/{name}" for name in TESTS]
    result = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", *tests, *more],
        cwd=copy, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    (FOLDER / f"{row.name.replace(' ', '-')}.log").write_text(result.stdout)
    return versions, (re.findall(r"^=*\s*(\d+ .* in .*?)\s*=*$", result.stdout, flags=re.M) or ["no tests ran"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--pytest", default="", help="options for pytest, as one text")
    options = parser.parse_args()
    rows = [row for row in ROWS if not options.words or any(word in row.name for word in options.words)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines, is_ok = [], bool(rows)
    for row in rows:
        try:
            versions, result = test(row, options.pytest.split())
        except NotRun as reason:
            versions, result = f"Python {row.python} {row.torch} {row.triton}", f"not run: {reason}"
        is_ok &= "passed" in result and "failed" not in result and "error" not in result
        lines.append(f"| {row.name} | {versions} | {result} |")
    print("| row | versions | result |\n|---|---|---|", *lines, sep="\n")
    return 0 if is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
