"""The build's switches, and the choice of instruction set at run time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, random_grads, random_params

from fusedopt import _C
from fusedopt.backends import cuda

ROOT = Path(__file__).parent.parent


def run(*command, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEDOPT_", "CUDA_"))}
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True)


def test_demanding_cuda_without_nvcc_fails_before_compiling(tmp_path):
    result = run(
        sys.executable, "setup.py", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path),
        FUSEDOPT_BUILD_CUDA="1", PATH=str(tmp_path), CUDA_HOME=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 1
    assert "FUSEDOPT_BUILD_CUDA=1, but nvcc was not found" in result.stderr
    assert "FUSEDOPT_BUILD_CUDA=0" in result.stderr
    assert not list(tmp_path.rglob("*.o"))


def test_unknown_value_of_the_switch_is_refused():
    result = run(sys.executable, "setup.py", "build_ext", FUSEDOPT_BUILD_CUDA="yes")
    assert result.returncode == 1
    assert "must be auto, 0 or 1, got 'yes'" in result.stderr


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
        cuda.devices.cache_clear()
        count, reason = cuda.devices()
        assert count == -1 and expected in reason
    cuda.devices.cache_clear()


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
    """Odd sizes, so that what is body for one is tail for another; clipped, so that the norm is part of it."""
    sizes = (1021, 33, 7, 32771)

    def train(name, dtype):
        assert _C.set_isa(name)
        params = random_params(sizes, dtype)
        optimizer = case.make(params, max_grad_norm=10.0)
        for step in range(3):
            for param, grad in zip(params, random_grads(sizes, dtype, step), strict=True):
                param.grad = grad
            optimizer.step()
        return torch.cat(params).detach(), optimizer.grad_norm

    widest = _C.available_isas()[0]
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            params, norm = train(widest, dtype)
            other_params, other_norm = train(isa, dtype)
            assert torch.equal(params, other_params) and torch.equal(norm, other_norm), dtype
    finally:
        _C.set_isa(widest)


def test_import_does_not_need_triton_or_a_gpu():
    script = "import sys; sys.modules['triton'] = None; import fusedopt; fusedopt.SGD([__import__('torch').ones(1)])"
    assert run(sys.executable, "-c", script, CUDA_VISIBLE_DEVICES="").returncode == 0


def test_doctor_says_what_is_used_and_why():
    result = run(sys.executable, "-m", "fusedopt", "doctor")
    assert result.returncode == 0
    assert f"{_C.isa()} (used)" in result.stdout
    assert "not cuda: does not work on cpu" in result.stdout
    assert run(sys.executable, "-m", "fusedopt", "heal").returncode == 2
