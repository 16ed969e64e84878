"""The build's switches, what is packaged and what a build says; and the choice of instruction set at run time."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import mutants
import pytest
import torch
from cases import CASES, DTYPES, can_mix_dtypes, random_grads, random_params, set_grad

import fusedopt
from fusedopt import _C, backends, extension
from fusedopt.backends import cuda

ROOT = Path(__file__).parent.parent


EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def run(*command, cwd=ROOT, **environment):
    """Runs a command apart from the terminal in which the tests run, which would be told what a build leaves out."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEDOPT_", "CUDA_"))}
    return subprocess.run(
        command, cwd=cwd, env={**env, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        start_new_session=True,
    )  # fmt: skip


def copy_project(folder):
    """Copies the sources, without what was built from them."""
    built = (".*", "build", "dist", "*.so", "_cuda.txt", "*.egg-info", "__pycache__", "runs", "results")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*built))
    (folder / "fusedopt/kernels").unlink(missing_ok=True)  # a link, where the project was built in place
    return folder


def build_wheel(folder, **environment):
    """(the finished process, the wheels it made), with nothing written elsewhere than to the folder."""
    folder.mkdir(exist_ok=True)
    result = run(
        sys.executable, "setup.py", "egg_info", "-e", str(folder), "build", "-b", str(folder / "build"),
        "bdist_wheel", "-b", str(folder / "bdist"), "-d", str(folder / "dist"),
        **{"FUSEDOPT_BUILD_CUDA": "0", **environment},
    )  # fmt: skip
    return result, [*(folder / "dist").glob("*.whl")]


@pytest.fixture
def fake(tmp_path):
    """Makes a program that writes down how it is called, makes its output file, and fails if `fails_if` holds."""

    def make(name, fails_if="false", says=""):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f"""#!/bin/sh
echo "$@" >> {tmp_path}/{name}.log
if {fails_if}; then echo '{name} gives up' >&2; exit 1; fi
printf '{says}'
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
"""
        )
        program.chmod(0o755)
        return str(program)

    return make


def has(*words):
    """Shell: whether one of the words is among the arguments."""
    return " || ".join(f'case "$*" in *{word}*) true;; *) false;; esac' for word in words)


# ---- no compiler, half a compiler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fails_if", [has("-c"), has("x86_64_v3.cpp", "baseline.cpp"), has("bindings.o")])
def test_failed_compile_ends_in_a_pure_python_install_that_says_so(tmp_path, fake, fails_if):
    compiler = fake("c++", f"{fails_if}")
    result, wheels = build_wheel(tmp_path / "wheel", CC=compiler, CXX=compiler)
    assert result.returncode == 0, result.stderr
    assert "Installing WITHOUT it" in result.stderr and "FUSEDOPT_REQUIRE_CPU=1" in result.stderr
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert "fusedopt/reference.py" in names and not any(name.endswith(".so") for name in names)


def test_failed_compile_is_an_error_where_the_extension_is_required(tmp_path):
    result, wheels = build_wheel(tmp_path / "a", CC="false", CXX="false", FUSEDOPT_REQUIRE_CPU="1")
    assert result.returncode != 0 and not wheels
    result = run(
        sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path), CC="false", CXX="false"
    )
    assert result.returncode != 0, "who asks for build_ext asks for the extension"


def test_make_requires_the_extension():
    installs = [line for line in run("make", "-n", "-B", "test").stdout.splitlines() if "--editable" in line]
    assert installs and all("FUSEDOPT_REQUIRE_CPU=1" in line for line in installs)


def test_make_check_names_tests_that_exist():
    command = run("make", "-n", "check").stdout
    files = set(re.findall(r"tests/(test_\w+\.py)", command))
    words = set(re.findall(r"[\w.-]+", re.search(r'-k "(.*?)"', command)[1])) - {"or", "and", "not", "cpu-AdamW"}
    functions = "\n".join(
        re.findall(r"^def (test_\w+)", "".join((ROOT / "tests" / name).read_text() for name in files), re.M)
    )
    assert {word for word in words if word not in functions} <= files and "cpu-AdamW" in command


def test_compiler_without_openmp_builds_without_it(tmp_path, fake):
    compiler = fake("c++", has("-fopenmp"))
    result, wheels = build_wheel(tmp_path / "wheel", CC=compiler, CXX=compiler)
    assert result.returncode == 0 and "building without OpenMP" in result.stdout
    assert any(
        name.startswith("fusedopt/_C.") and name.endswith(".so") for name in zipfile.ZipFile(wheels[0]).namelist()
    )


# ---- CUDA ----------------------------------------------------------------------------------------------------------


NVCC_LIST = "compute_80\\ncompute_90\\n"


@pytest.mark.parametrize(
    "nvcc",
    [
        dict(fails_if="true"),
        dict(fails_if=has("-shared"), says=NVCC_LIST),
        dict(says="compute_20\\n"),
    ],
    ids=["does not run", "does not compile", "knows no architecture"],
)
def test_broken_nvcc_costs_the_cuda_part_only_unless_it_is_demanded(tmp_path, fake, nvcc):
    compiler = fake("c++")
    fake("nvcc", **nvcc)
    for choice, status in (("auto", 0), ("1", 1)):
        result = run(
            sys.executable, "setup.py", "build_ext", "-b", str(tmp_path / choice), "-t", str(tmp_path),
            CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path), FUSEDOPT_BUILD_CUDA=choice,
        )  # fmt: skip
        assert result.returncode == status, result.stderr
        said = result.stdout + result.stderr
        assert "nvcc could not build the CUDA part" in said and "Traceback" not in said
        assert not list(tmp_path.rglob("_cuda.so"))
    assert list((tmp_path / "auto").rglob("_C.*.so"))
    record = (tmp_path / "auto/fusedopt/_cuda.txt").read_text()
    assert record.startswith("not built: nvcc could not build the CUDA part: ")
    assert record.split(": ", 1)[1].strip() in said, "the reason, in one line"


def test_working_nvcc_builds_the_cuda_part(tmp_path, fake):
    compiler = fake("c++")
    fake("nvcc", says=NVCC_LIST)
    result, wheels = build_wheel(
        tmp_path / "wheel", CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path), FUSEDOPT_BUILD_CUDA="auto"
    )
    assert result.returncode == 0, result.stderr
    assert "fusedopt/_cuda.so" in zipfile.ZipFile(wheels[0]).namelist()


def test_demanding_cuda_without_nvcc_fails_before_compiling(tmp_path):
    result = run(
        sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path),
        FUSEDOPT_BUILD_CUDA="1", PATH=str(tmp_path), CUDA_HOME=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 1
    assert "FUSEDOPT_BUILD_CUDA=1, but nvcc was not found" in result.stderr
    assert "FUSEDOPT_BUILD_CUDA=0" in result.stderr
    assert not list(tmp_path.rglob("*.o"))


@pytest.mark.parametrize("name, values", [("FUSEDOPT_BUILD_CUDA", "auto, 0 or 1"), ("FUSEDOPT_REQUIRE_CPU", "0 or 1")])
def test_unknown_value_of_a_switch_is_refused(name, values):
    result = run(sys.executable, "setup.py", "build_ext", **{name: "yes"})
    assert result.returncode == 1
    assert f"{name} must be {values}, got 'yes'" in result.stderr


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.6;9.0+PTX"}, ["sm_86", "sm_90", "compute_90"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.6", "FUSEDOPT_CUDA_ARCHS": "9.0, 10.0 99.9"}, ["sm_90", "sm_100", "compute_100"]),
    ],
)
def test_architectures_are_those_asked_for_that_nvcc_knows(tmp_path, variables, expected):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_90\\ncompute_100\\ncompute_120\\n'\n")
    nvcc.chmod(0o755)
    script = (
        "import setuptools; setuptools.setup = lambda **kwargs: None; import setup; print(*setup.cuda_arch_flags('%s'))"
    )
    result = run(sys.executable, "-c", script % nvcc, **variables)
    assert [flag.split(",code=")[1] for flag in result.stdout.split()] == expected, result.stderr


def test_cuda_part_that_does_not_load_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(b"not an object")
    for library, expected in ((broken, "does not load"), (tmp_path / "missing.so", "not built")):
        monkeypatch.setattr(cuda, "LIBRARY", library)
        cuda._load.cache_clear()
        assert expected in cuda.found() and expected in cuda.unavailable()
    cuda._load.cache_clear()


def test_installed_cuda_part_is_of_this_version():
    """Python knows its arguments and rules; what it lacks here is a GPU at most."""
    if not (extension.FOLDER / "_cuda.so").exists():
        pytest.skip("the CUDA part was not built")
    found = run(sys.executable, "-c", "from fusedopt.backends import cuda; print(cuda.found())").stdout
    assert found.startswith("built and loads")


# ---- the sdist -----------------------------------------------------------------------------------------------------

is_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="git does not know this tree, e.g. an unpacked sdist"
)
# Run where a wheel is unpacked or a tree built in place. The editable install that the tests run in must not help out.
REPORT = """
import importlib.util, json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import fusedopt
from fusedopt import extension
from fusedopt.backends import cuda
kernels = importlib.util.find_spec("fusedopt.kernels")
print(json.dumps([fusedopt.__file__, kernels and kernels.origin, extension.problem, cuda.found()]))
"""


def report(folder):
    """(why the C++ extension cannot be used, what the CUDA part says, where the Triton kernels are) of the package there."""
    result = run(sys.executable, "-c", REPORT, cwd=folder)
    assert result.returncode == 0, result.stderr
    package, kernels, problem, cuda_part = json.loads(result.stdout)
    assert Path(package).is_relative_to(folder)
    return problem, cuda_part, kernels


def build_by(hook, sources, target, **environment):
    """Calls the build backend in a folder with sources, as pip does without build isolation."""
    script = f"import setuptools.build_meta as backend; backend.{hook}({str(target)!r})"
    result = run(sys.executable, "-c", script, cwd=sources, **environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (package,) = target.glob("fusedopt-*")
    return package


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built in a copy in which there is everything that must not be in it."""
    folder = tmp_path_factory.mktemp("sdist")
    mutants.make_copy(folder / "copy")
    for name in (
        "fusedopt/_cuda.so", "fusedopt/_cuda.txt", f"fusedopt/{EXTENSION}", "tests/__pycache__/cases.cpython-311.pyc",
        "bench/results/cpu-quick.json", "build/cuda_on_host_0.so", "runs/gpu/gpu.json",
    ):  # fmt: skip
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "copy" / name).touch()
    (folder / "copy/fusedopt/kernels").symlink_to("../kernels")
    return build_by("build_sdist", folder / "copy", folder)


@is_checkout
@pytest.mark.xdist_group("sdist")
def test_sdist_holds_what_git_tracks(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("fusedopt.egg-info/")}
    assert set(mutants.project_files(others=False)) - names == set()
    assert names - made - set(mutants.project_files()) == set()


def has_nvcc():
    """Whether setup.py finds it."""
    script = "import setuptools; setuptools.setup = lambda **kwargs: None; import setup; print(setup.find_nvcc())"
    return run(sys.executable, "-c", script).stdout.strip() != "None"


# Stands in for nvcc: needs the same sources, and compiles them for the host as the tests' emulator does.
NVCC_ON_HOST = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) echo compute_90 ;;
  *--version*) echo "release 0.0" ;;
  *)
    while [ "$1" != -o ]; do shift; done
    target=$2; shift 2
    exec c++ -std=c++17 -O0 -fPIC -shared -w -Itests/simt -x c++ "$@" tests/simt/simt.cpp -o "$target" ;;
esac
"""


@is_checkout
@pytest.mark.xdist_group("sdist")
def test_wheel_made_from_the_sdist_has_every_part(sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path)
    (sources,) = tmp_path.glob("fusedopt-*")
    environment = {"FUSEDOPT_REQUIRE_CPU": "1", "FUSEDOPT_BUILD_CUDA": "1", "FUSEDOPT_CUDA_ARCHS": "9.0"}
    if not has_nvcc():
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/nvcc").write_text(NVCC_ON_HOST)
        (tmp_path / "bin/nvcc").chmod(0o755)
        environment["CUDA_HOME"] = str(tmp_path)
    wheel = build_by("build_wheel", sources, tmp_path / "dist", **environment)
    assert wheel.name.startswith(f"fusedopt-{fusedopt.__version__}-3.complete-")
    modules = [name for name in mutants.project_files() if re.match(r"(fusedopt|kernels)/.*\.(py|pyi|typed)$", name)]
    expected = {re.sub("^kernels/", "fusedopt/kernels/", name) for name in modules}
    expected |= {f"fusedopt/headers/{header.name}" for header in (ROOT / "csrc/rules").iterdir()}
    expected |= {f"fusedopt/{name}" for name in (EXTENSION, "_cuda.so", "_cuda.txt")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected

    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    problem, cuda_part, kernels = report(tmp_path / "installed")
    assert kernels == str(tmp_path / "installed/fusedopt/kernels/__init__.py")
    assert problem is None
    assert cuda_part.startswith("built and loads")
    shown = run(sys.executable, "-m", "fusedopt", "show", "lion", cwd=tmp_path / "installed")
    assert (
        shown.stdout == run(sys.executable, "-m", "fusedopt", "show", "lion").stdout and "struct Lion" in shown.stdout
    )
    if has_nvcc():
        assert cuda_part.startswith("built and loads (for GPUs of compute capability 9.0 by nvcc ")


# ---- in place ------------------------------------------------------------------------------------------------------


def built_files(package):
    return sorted(path.name for path in package.iterdir() if path.name.startswith(("_C.cpython", "_cuda.")))


def test_source_tree_built_in_place_has_every_part(tmp_path, fake):
    compiler = fake("c++")
    fake("nvcc", says=NVCC_LIST)
    copy = copy_project(tmp_path / "copy")
    environment = dict(CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path))
    for choice, cuda_files in (("1", ["_cuda.so", "_cuda.txt"]), ("0", ["_cuda.txt"])):
        result = run(
            sys.executable, "setup.py", "build_ext", "--inplace", cwd=copy, FUSEDOPT_BUILD_CUDA=choice, **environment
        )
        assert result.returncode == 0, result.stderr
        assert built_files(copy / "fusedopt") == [EXTENSION, *cuda_files]
    problem, cuda_part, kernels = report(copy)
    assert kernels == str(copy / "fusedopt/kernels/__init__.py")
    assert "does not load" in problem, "the fake compiler's file was found"
    assert cuda_part.startswith("not built: FUSEDOPT_BUILD_CUDA=0 was set (`FUSEDOPT_BUILD_CUDA=1 ")
    # And a wheel has what was built for it, not what lies in the tree.
    wheel = build_by("build_wheel", copy, tmp_path / "dist", FUSEDOPT_BUILD_CUDA="1", **environment)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fusedopt/_cuda.so", "fusedopt/kernels/engine.py"} <= {*names} and len(names) == len({*names})


@pytest.mark.parametrize("way", ["build", "editable_wheel", "strict"])
def test_nothing_of_an_earlier_build_survives_one_that_leaves_it_out(tmp_path, fake, way):
    """A strict editable install makes a folder of links to what was built, without which it would find nothing."""
    copy = copy_project(tmp_path / "copy")
    fake("nvcc", says=NVCC_LIST)
    command = {"build": ["build", "--build-lib", "lib"], "strict": ["editable_wheel", "--mode=strict"]}.get(way, [way])
    package = {"build": copy / "lib/fusedopt", "editable_wheel": copy / "fusedopt"}
    for compiler, choice, expected in (
        (fake("c++"), "1", [EXTENSION, "_cuda.so", "_cuda.txt"]),
        ("false", "1", ["_cuda.so", "_cuda.txt"]),
        ("false", "0", ["_cuda.txt"]),
    ):
        result = run(
            sys.executable, "setup.py", *command, cwd=copy,
            CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path), FUSEDOPT_BUILD_CUDA=choice,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        folders = [package[way]] if way in package else [*copy.glob("build/__editable__*/fusedopt")]
        assert [built_files(folder) for folder in folders] == [expected]


# ---- what a build and an install say -------------------------------------------------------------------------------


IN_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"


@pytest.mark.parametrize(
    "broken, says, tag",
    [
        (
            "nvcc",
            "Installing WITHOUT the CUDA kernels: nvcc could not build the CUDA part: nvcc gives up",
            "2.without_cuda",
        ),
        ("c++", "the C++ extension could not be built. Installing WITHOUT it", "1.without_cpp"),
    ],
    ids=["nvcc", "c++"],
)
def test_pip_says_what_it_leaves_out(tmp_path, fake, broken, says, tag):
    """Without -v: on the terminal, and where there is none at least in the name of the wheel."""
    compiler = fake("c++", "true" if broken == "c++" else "false")
    fake("nvcc", has("-shared") if broken == "nvcc" else "false", says=NVCC_LIST)
    copy = copy_project(tmp_path / "copy")
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(copy), "--target"]
    environment = dict(CC=compiler, CXX=compiler, CUDA_HOME=str(tmp_path))
    with_terminal = run(
        sys.executable, "-c", IN_TERMINAL, *install, str(tmp_path / "a"), cwd=tmp_path, COLUMNS="999", **environment
    )
    without = run(*install, str(tmp_path / "b"), cwd=tmp_path, **environment)
    for result in (with_terminal, without):
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"filename=fusedopt-{fusedopt.__version__}-{tag}-cp" in result.stdout
    assert says in with_terminal.stdout
    assert says not in without.stdout + without.stderr, "pip hides it: else the terminal need not be told"


def test_left_out_on_purpose_is_not_reported(tmp_path, fake):
    compiler = fake("c++")
    result, wheels = build_wheel(tmp_path / "wheel", CC=compiler, CXX=compiler, FUSEDOPT_BUILD_CUDA="0")
    assert "WITHOUT" not in result.stdout + result.stderr and "2.without_cuda" in wheels[0].name


def test_first_error_of_nvcc_is_the_reason(tmp_path, fake):
    """Later ones follow from it, and the last line often only counts them."""
    said = "ptxas info: 0 bytes\\nx.cu(1): error: cause\\nx.cu(2): error: effect\\n2 errors detected\\n"
    fake("nvcc", f"printf '{said}' && false || {has('-shared')}", says=NVCC_LIST)
    script = (
        "import setuptools; setuptools.setup = lambda **kwargs: None; import setup; setup.run_nvcc('%s', '-shared')"
    )
    result = run(sys.executable, "-c", script % (tmp_path / "bin/nvcc"))
    assert result.stderr.strip().endswith("ValueError: x.cu(1): error: cause")


@pytest.mark.parametrize("is_named", [False, True])
def test_nvcc_is_found_where_toolkits_are_installed(tmp_path, fake, is_named):
    """Although it is not on PATH; but who names a toolkit does not get another one."""
    nvcc = fake("nvcc")
    script = (
        "import setuptools; setuptools.setup = lambda **kwargs: None; import setup; "
        "assert '/usr/local/cuda' in setup.TOOLKITS; setup.TOOLKITS = ['%s']; print(setup.find_nvcc())"
    )
    named = {"CUDA_HOME": str(tmp_path / "other")} if is_named else {}
    result = run(sys.executable, "-c", script % tmp_path, PATH=str(tmp_path), **named)
    assert result.stdout.strip() == ("None" if is_named else nvcc), result.stderr


@pytest.mark.parametrize("is_source_tree", [True, False])
def test_printed_commands_build_what_is_missing(tmp_path, fake, is_source_tree):
    """Those of the C++ extension and of the CUDA part, run as they are; here nothing may be downloaded or really installed."""
    compiler = fake("c++")
    fake("nvcc", says=NVCC_LIST)
    copy = copy_project(tmp_path / "copy")
    package = copy
    if not is_source_tree:
        package = tmp_path / "installed"
        _, (wheel,) = build_wheel(tmp_path / "wheel", CC="false", CXX="false")
        shutil.unpack_archive(wheel, package, "zip")
    problem, cuda_part, _ = report(package)
    assert "was not built (" in problem and "not built" in cuda_part
    for said, file in ((problem, EXTENSION), (cuda_part, "_cuda.so")):
        assert ("in the folder of fusedopt's sources" in said) != is_source_tree
        (command,) = re.findall(r"`(.*?)`", said)
        for name in built_files(package / "fusedopt"):  # each command builds both
            (package / "fusedopt" / name).unlink()
        result = run(
            "sh", "-c", command, cwd=tmp_path if is_source_tree else copy, CC=compiler, CXX=compiler,
            CUDA_HOME=str(tmp_path), PIP_NO_BUILD_ISOLATION="0", PIP_UPGRADE="1",
            PIP_TARGET=str(tmp_path / "target" if is_source_tree else package),
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert file in built_files(package / "fusedopt")
    problem, cuda_part, _ = report(package)
    assert "does not load" in problem and "does not load" in cuda_part, "the fake compilers' files are found"
    assert f"`{command}` builds it anew" in cuda_part


BUILT_BEFORE = "built for GPUs of compute capability 7.5 by nvcc 12.4 (/usr/bin/nvcc)"


@pytest.mark.parametrize(
    "record, expected",
    [
        (None, "not built (`FUSEDOPT_BUILD_CUDA=1 "),
        ("not built: nvcc was not found: ...", "not built: nvcc was not found: ... (`FUSEDOPT_BUILD_CUDA=1 "),
        (BUILT_BEFORE, "not built: _cuda.so is missing (`FUSEDOPT_BUILD_CUDA=1 "),
    ],
)
def test_reason_for_a_missing_cuda_part_is_what_the_build_wrote_down(tmp_path, monkeypatch, record, expected):
    """In doctor's line, in the error of backend="cuda", and in the warning that a GPU is served by a slow backend."""
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(cuda, "RECORD", tmp_path / "_cuda.txt")
    if record is not None:
        cuda.RECORD.write_text(record + "\n")
    cuda._load.cache_clear()
    backends.warn_of_fallback.cache_clear()
    try:
        assert cuda.found().startswith(expected)
        with pytest.raises(RuntimeError, match=re.escape(f"backend='cuda' cannot be used: {cuda.found()}")):
            backends.resolve("cuda")
        monkeypatch.setattr(backends.triton, "unavailable", lambda where=None: "no Triton")
        with pytest.warns(UserWarning, match=re.escape(f"not 'cuda': {cuda.found()}")):
            backends.warn_of_fallback("cuda")
    finally:
        cuda._load.cache_clear()
        backends.warn_of_fallback.cache_clear()


def test_no_command_is_printed_where_none_helps(tmp_path, monkeypatch):
    """There is no nvcc for macOS, and none that compiles for AMD's GPUs."""
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cuda.so")
    for owner, name, value, expected in (
        (torch.version, "hip", "7.0", "this torch is one for AMD GPUs"),
        (sys, "platform", "darwin", "there is no CUDA for macOS"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert expected in cuda._why_not_built() and "`" not in cuda._why_not_built()


@pytest.mark.parametrize(
    "code, visible, expected",
    [
        (None, None, "libcuda.so.1 was not found: install the driver"),
        ("*version = 12040; return 0;", None, "the driver supports CUDA 12.4 and older"),
        ("return 34;", None, "is not that of a working NVIDIA driver"),
        ("*version = 12040; return 0;", "", "CUDA_VISIBLE_DEVICES='' hides all GPUs: unset it"),
        ("*version = 12040; return 0;", "-1", "CUDA_VISIBLE_DEVICES='-1' hides all GPUs: unset it"),
        ("*version = 12040; return 0;", "GPU-5f", "the driver supports CUDA 12.4 and older"),
    ],
)
def test_what_helps_where_cuda_sees_no_gpu(tmp_path, monkeypatch, code, visible, expected):
    monkeypatch.setattr(cuda, "DRIVER", str(tmp_path / "libcuda.so.1"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if code is not None:
        source = f'extern "C" int cuDriverGetVersion(int* version) {{ {code} }}'
        compile_ = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-x", "c++", "-", "-o", cuda.DRIVER]
        subprocess.run(compile_, input=source, text=True, check=True)
    assert expected in cuda._what_helps_to_see_a_gpu()


def test_command_for_another_gpu_names_it(tmp_path, monkeypatch):
    class Library:
        def count(self, *arguments):
            raise RuntimeError("CUDA: cudaLaunchKernel: no kernel image is available for execution on the device")

    monkeypatch.setattr(cuda, "RECORD", tmp_path / "_cuda.txt")
    cuda.RECORD.write_text(BUILT_BEFORE)
    monkeypatch.setattr(cuda, "_load", lambda: (Library(), "built and loads"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(12, 0), (8, 9), (12, 0)][index])
    cuda._problem_on.cache_clear()
    try:
        said = cuda._problem_on(0)
    finally:
        cuda._problem_on.cache_clear()
    assert BUILT_BEFORE in said and "`FUSEDOPT_CUDA_ARCHS='8.9;12.0' FUSEDOPT_BUILD_CUDA=1 " in said


# ---- instruction sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _C.available_isas())
def test_instruction_set_can_be_forced(isa):
    result = run(sys.executable, "-c", "import fusedopt; print(fusedopt._C.isa())", FUSEDOPT_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_unavailable_instruction_set_is_refused_with_the_ones_there_are():
    result = run(sys.executable, "-c", "import fusedopt", FUSEDOPT_CPU_ISA="x86_64_v9")
    assert result.returncode == 1
    assert f"it has {', '.join(_C.available_isas())}" in result.stderr


@pytest.mark.parametrize("isa", _C.available_isas()[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_gives_the_same_bits(case, isa):
    """Odd sizes, so that what is body for one is tail for another; clipped, so that the norm is part of it.

    In memory order, and where the gradient's strides differ, or both have gaps, through tiles gathered by index.
    """
    layouts = {
        "dense": (lambda flat: flat, lambda flat: flat),
        "transposed": (lambda flat: flat[:-1].unflatten(0, (-1, 2)), lambda flat: flat[:-1].view(2, -1).t()),
        "gaps": (lambda flat: flat[::2], lambda flat: flat[::2]),
    }

    def train(name, dtypes, layout, sizes):
        assert _C.set_isa(name)
        of_param, of_grad = layouts[layout]
        flats = random_params(sizes, dtypes[0])
        params = [torch.nn.Parameter(of_param(flat.detach())) for flat in flats]
        optimizer = case.make(params, max_grad_norm=10.0)
        for step in range(3):
            for param, flat in zip(params, random_grads(sizes, dtypes[1], step), strict=True):
                set_grad(param, of_grad(flat))
            optimizer.step()
        states = [
            value.flatten().double()
            for state in optimizer.state.values()
            for value in state.values()
            if value.dim() > 0
        ]
        return [torch.cat(flats).detach(), torch.cat(states) if states else None, optimizer.grad_norm]

    widest = _C.available_isas()[0]
    same = [(dtype, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    several_chunks, short = (1021, 33, 7, 32771), (523, 33, 7)
    runs = [(dtypes, "dense", several_chunks) for dtypes in same]
    runs += [(dtypes, "dense", short) for dtypes in DTYPES if dtypes[0] != dtypes[1] and can_mix_dtypes()]
    runs += [(dtypes, layout, short) for dtypes in same for layout in ("transposed", "gaps")]
    try:
        for train_args in runs:
            for ours, others in zip(train(widest, *train_args), train(isa, *train_args), strict=True):
                assert ours is others is None or torch.equal(ours, others), train_args
    finally:
        _C.set_isa(widest)


def test_bits_are_compared_on_more_than_one_instruction_set():
    """What a machine without AVX2 would use runs everywhere, so it is always among those compared."""
    if platform.machine() in ("x86_64", "AMD64"):
        assert _C.available_isas()[-1] == "x86_64_v2"


def test_doctor_says_what_is_used_and_why():
    result = run(sys.executable, "-m", "fusedopt", "doctor")
    assert result.returncode == 0
    assert f"{_C.isa()} (used)" in result.stdout
    assert "not cuda: does not work on cpu" in result.stdout
    assert run(sys.executable, "-m", "fusedopt", "heal").returncode == 2
