"""What the Triton compiler makes of the kernels, and what is Triton's alone. What they compute is tested in test_device.py."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import compile_kernels
import triton
from helpers import in_a_new_process, make_params, same_bits, set_grads

import fusedopt
from fusedopt.kernels import engine

BLOCK = engine.launch_options(engine.update, (4, 4, 4), 32, None)["BLOCK"]
CHUNK = engine.CHUNK


def test_result_does_not_depend_on_the_grid(monkeypatch):
    """As many programs as a GPU has room for, or one: updates to the bit, the norm to the rounding of float64."""
    results = []
    for programs in (1, 2, 64):
        monkeypatch.setattr(engine, "PROGRAMS_PER_PROCESSOR", programs)
        params = make_params(((CHUNK * 3 + 1,), (5,), (BLOCK, 3)))
        set_grads(params, 0)
        optimizer = fusedopt.AdamW(params, backend="triton", max_grad_norm=1.0)
        optimizer.step()
        results.append((optimizer.grad_norm, params))
    for norm, params in results[1:]:
        assert norm == results[0][0]
        assert all(map(same_bits, params, results[0][1]))


# ---- where there is no interpreter, and no Triton ----------------------------------------------------------------


def test_auto_never_picks_the_interpreter():
    assert fusedopt.backends.explain(torch.device("cpu"))[0] == "cpu"


def test_without_triton_all_else_works_and_says_why():
    code = """
import sys; sys.modules["triton"] = None
import torch, fusedopt
from fusedopt import backends
param = torch.nn.Parameter(torch.ones(3)); param.grad = torch.ones(3)
fusedopt.AdamW([param]).step()
print(backends.explain(torch.device("cuda"))[1]["triton"])
"""
    assert "Triton cannot be imported" in in_a_new_process(code, TRITON_INTERPRET=None)


# ---- compiled --------------------------------------------------------------------------------------------------


@functools.cache
def compiled():
    """What the compiler makes of every variant now."""
    command = [sys.executable, "-m", "tests.compile_kernels", "--json"]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])[f"triton {triton.__version__}"]


@pytest.mark.xdist_group("compiled by Triton")
@pytest.mark.parametrize("target", compile_kernels.TARGETS)
def test_every_variant_compiles_without_spills_and_with_wide_accesses(target):
    facts = {name: fact for name, fact in compiled().items() if name.startswith(f"{target} ")}
    assert len(facts) == sum(variant[0] == target for variant in compile_kernels.usual_variants())
    for name, fact in facts.items():
        assert fact["spilled"] == 0, name
        if "add_up" in name:  # of sums, a few numbers a tensor
            continue
        assert fact["wide_loads"] > 0, name
        assert fact["wide_stores"] > 0 or "global_norm" in name or "measure" in name, name  # these two write sums alone


@pytest.mark.xdist_group("compiled by Triton")
def test_registers_are_those_of_the_committed_table():
    """So that a change is seen; `python -m tests.compile_kernels --write` writes it anew."""
    kept = json.loads(compile_kernels.TABLE.read_text())
    compiler = f"triton {triton.__version__}"
    if compiler not in kept:
        pytest.skip(f"the table has not {compiler}")
    assert compiled() == kept[compiler]
