"""fusedopt works wherever torch does: without its extension, with a broken or foreign one, without or with any triton."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from test_build import build_wheel

import fusedopt
from fusedopt import _C, backends
from fusedopt.backends import cpu, watch
from fusedopt.checks import MAX_DIMS

ROOT = Path(__file__).parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def run(script, *arguments, path=ROOT, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("FUSEDOPT_")}
    env |= {"PYTHONPATH": f"{path}{os.pathsep}{ROOT / 'tests'}", **environment}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=path, env=env, capture_output=True, text=True
    )


# ---- an extension that cannot be used ------------------------------------------------------------------------------


def absent(package):
    (package / f"_C{SUFFIX}").unlink()


def not_an_object(package):
    (package / f"_C{SUFFIX}").write_bytes(b"not an object")


def symbol_missing(package):
    """Linked to a function that this Python, or a library of this machine, does not have."""
    code = (package / f"_C{SUFFIX}").read_bytes()
    assert b"\0PyErr_Occurred\0" in code
    (package / f"_C{SUFFIX}").write_bytes(code.replace(b"\0PyErr_Occurred\0", b"\0PyErr_Occurrex\0"))


def of_another_python(package):
    (package / f"_C{SUFFIX}").rename(package / "_C.cpython-38-x86_64-linux-gnu.so")


def of_another_interface(package):
    with (package / "_C.pyi").open("a") as file:
        file.write("\ndef newer() -> None: ...\n")


def of_another_table(package):
    """A scalar in another place would be taken for another hyperparameter, without any error."""
    text = (package / "rules.py").read_text()
    assert '("lr", "momentum", "dampening"' in text
    (package / "rules.py").write_text(text.replace('("lr", "momentum", "dampening"', '("lr", "dampening", "momentum"'))


def of_other_formats(package):
    text = (package / "formats.py").read_text()
    assert "_plain(torch.float16)," in text
    (package / "formats.py").write_text(text.replace("_plain(torch.float16),", ""))


BROKEN = {
    absent: "the C++ extension was not built (",
    not_an_object: "the C++ extension does not load: ",
    symbol_missing: "undefined symbol: PyErr_Occurrex",
    of_another_python: f"built for another Python: _C.cpython-38-x86_64-linux-gnu.so, not _C{SUFFIX}",
    of_another_interface: "built from another version of fusedopt: its interface is",
    of_another_table: "built from another version of fusedopt: it differs in the rule 'sgd'",
    of_other_formats: "built from another version of fusedopt: it differs in the format 'float16'",
}

# One process for all, since importing torch is what takes time; a child for each.
REPORTER = """
import contextlib, io, json, os, sys, warnings
import torch

def report(folder):
    # An editable install would find its own extension for a copy that has none.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
    sys.path.insert(0, folder)
    import fusedopt
    from fusedopt import __main__, backends
    from fusedopt.backends import cpu
    assert fusedopt.__file__.startswith(folder)
    found = {"reason": cpu.unavailable(), "picked": backends.explain(torch.device("cpu"))[0]}
    for backend in ("reference", "auto", "auto"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer = fusedopt.AdamW([torch.nn.Parameter(torch.ones(3))], backend=backend)
        found.setdefault("warnings", []).append([f"{w.filename}: {w.message}" for w in caught])
    try:
        fusedopt.SGD([torch.nn.Parameter(torch.ones(3))], backend="cpu")
    except RuntimeError as error:
        found["error"] = str(error)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        found["status"] = __main__.main(["doctor"])
    found["doctor"] = output.getvalue()
    from cases import CASES, check_parity
    for case in CASES if "wheel" in folder else CASES[:1]:
        check_parity(case, torch.float32, torch.float32, sizes=(1, 33, 257), steps=3, max_grad_norm=25.0)
    return found

for folder in sys.argv[1:]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        with os.fdopen(writer, "w") as file:
            file.write(json.dumps(report(folder)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        print(file.read())
    os.wait()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each crippled copy of the package says of itself, by name; "wheel" was built without a compiler."""
    folders = []
    for cripple in BROKEN:
        folder = tmp_path_factory.mktemp(cripple.__name__)
        package = folder / "fusedopt"
        shutil.copytree(ROOT / "fusedopt", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(_C.__file__, package / f"_C{SUFFIX}")
        cripple(package)
        folders.append(folder)
    folder = tmp_path_factory.mktemp("wheel")
    result, wheels = build_wheel(folder / "build", CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    shutil.unpack_archive(wheels[0], folder, "zip")
    folders.append(folder)

    result = run(REPORTER, *folders, path=folder)
    lines = result.stdout.splitlines()
    assert len(lines) == len(folders) and all(lines), result.stderr
    return dict(zip([*(cripple.__name__ for cripple in BROKEN), "wheel"], map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    "name, expected", [*((f.__name__, said) for f, said in BROKEN.items()), ("wheel", BROKEN[absent])]
)
@pytest.mark.xdist_group("crippled copies")
def test_unusable_extension_is_a_reason_and_a_slower_backend(reports, name, expected):
    """And its results keep the bound of the parity tests: the reporter would have failed."""
    report = reports[name]
    reason = report["reason"]
    assert expected in reason and "\n" not in reason
    assert f"`FUSEDOPT_REQUIRE_CPU=1 {sys.executable} -m pip install --force-reinstall" in reason
    assert report["picked"] == "reference"
    assert report["error"] == f"backend='cpu' cannot be used: {reason}"
    assert report["status"] == 0
    assert f"not cpu: {reason}" in report["doctor"] and "CPU kernels  none" in report["doctor"]


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process")
@pytest.mark.xdist_group("alone")
def test_groups_of_tests_share_a_process(request):
    """Some releases of pytest and pytest-xdist do not get along: all still passes, but takes minutes longer."""
    assert request.node.nodeid.endswith("@alone")


@pytest.mark.xdist_group("crippled copies")
def test_fallback_is_said_once_at_the_users_own_line_and_never_to_who_chose_it(reports):
    chosen, first, second = reports["absent"]["warnings"]
    assert not chosen and not second
    reason = reports["absent"]["reason"]
    expected = f"<string>: fusedopt updates parameters on cpu by its slow backend 'reference'; not 'cpu': {reason}"
    assert first == [expected]


def test_cpu_without_any_of_the_instruction_sets_falls_back(monkeypatch):
    monkeypatch.setattr(_C, "available_isas", list)
    monkeypatch.setattr(backends, "warn_of_fallback", lambda device_type: None)
    assert "none of the instruction sets" in cpu.unavailable()
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fusedopt.SGD([param], lr=0.5)
    optimizer.step()
    assert param.tolist() == [0.5] * 3
    assert type(optimizer._plans.kept["step"].buckets[0]).__module__ == "fusedopt.backends.reference"


def test_plan_and_engine_take_the_same_number_of_dimensions():
    assert _C.max_dims == MAX_DIMS


# ---- torch ---------------------------------------------------------------------------------------------------------


def test_fast_way_of_reading_tensors_is_found():
    """Python attributes serve as well, only slower, which would go unnoticed."""
    assert watch.reads_by_abi


# ---- triton --------------------------------------------------------------------------------------------------------


USE = """
import sys, warnings
if sys.argv[1] == "absent":
    sys.modules["triton"] = None
else:
    sys.path.insert(0, sys.argv[1])
import torch
warnings.simplefilter("error")
import fusedopt
param = torch.nn.Parameter(torch.ones(2))
param.grad = torch.ones(2)
fusedopt.SGD([param], lr=0.5).step()
print(param.tolist(), fusedopt.backends.cpu.unavailable())
"""


@pytest.mark.parametrize("kind", ["absent", "broken"])
def test_neither_triton_nor_a_gpu_is_needed_and_nothing_is_said(kind, tmp_path):
    """A triton that raises anything but ImportError is torch's own end: torch.optim.SGD(...) fails of it."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        "raise ImportError('libcuda.so.1: cannot open shared object file')"
    )
    result = run(USE, "absent" if kind == "absent" else tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.stdout.strip() == "[0.5, 0.5] None", result.stderr
