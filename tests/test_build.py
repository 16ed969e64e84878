"""The build's switches, and the choice of instruction set at run time."""

import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from cases import CASES, DTYPES, can_mix_dtypes, random_grads, random_params, set_grad

from fusedopt import _C, extension
from fusedopt.backends import cuda

ROOT = Path(__file__).parent.parent


def run(*command, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEDOPT_", "CUDA_"))}
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True)


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
