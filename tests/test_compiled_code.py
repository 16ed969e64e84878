"""What the compiler made of the loops, read from the installed extension: vectorised, for every rule and instruction set."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedopt import _C

pytestmark = [
    pytest.mark.xdist_group("compiled code"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 code"),
]

only_of_gcc = pytest.mark.skipif(b"clang version" in Path(_C.__file__).read_bytes(), reason="knows how GCC puts it")

# instruction set: (its widest registers, prefix of its packed instructions)
ISAS = {"x86_64_v2": ("xmm", ""), "x86_64_v3": ("ymm", "v"), "x86_64_v4": ("zmm", "v")}


@pytest.fixture(scope="module")
def functions():
    """Demangled name -> disassembly, of every function in the extension."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)+)", text, flags=re.M))


def loops(functions, isa, name):
    prefix = f"fusedopt::cpu::{isa}::(anonymous namespace)::{name}<"
    found = {key: code for key, code in functions.items() if prefix in key}
    assert found, f"no {name} in {isa}"
    return found


def innermost_loops(code):
    """Their instructions, without the jump back."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"^\s*([0-9a-f]+):\t(.+)$", code, flags=re.M)]
    line_at = {at: line for line, (at, _) in enumerate(lines)}
    for end, (_, text) in enumerate(lines):
        jump = re.match(r"j\w+ +([0-9a-f]+)", text)
        begin = line_at.get(int(jump[1], 16), end + 1) if jump else end + 1
        body = [text for _, text in lines[begin:end]]
        if body and not any(text.startswith("j") for text in body):
            yield body


def count(code, mnemonic, registers):
    return len(re.findall(rf"\b{mnemonic}\s.*%{registers}\d", code))


@pytest.mark.parametrize("isa", ISAS)
def test_every_update_loop_is_vectorised(functions, isa):
    """Packed arithmetic over the widest registers, and as many packed roots and quotients as the scalar tail has."""
    registers, v = ISAS[isa]
    found = loops(functions, isa, "update")
    assert len(found) == 2 * len(_C.rules)
    for name, code in found.items():
        suffix = "d" if ", double>" in name else "s"
        assert count(code, f"{v}mulp{suffix}", registers) >= 2, name
        for operation in ("sqrt", "div"):
            scalars = len(re.findall(rf"\b{v}{operation}s{suffix}\b", code))
            packed = count(code, f"{v}{operation}p{suffix}", registers)
            assert packed >= (1 if scalars else 0), f"{name}: {scalars} scalar {operation}, {packed} packed"


@only_of_gcc
@pytest.mark.parametrize("isa", ISAS)
def test_updates_load_before_they_store(functions, isa):
    """A load that follows a store to the same offset in another page waits for it."""
    registers, v = ISAS[isa]
    tensor = r"\(%r(?!sp\)|bp\)|ip\))"  # an address, but not of the stack or a constant
    for name, code in loops(functions, isa, "update").items():
        num_loops = 0
        for body in innermost_loops(code):
            stores = [bool(re.match(rf"{v}mov[au]p[sd] +%{registers}\d+,.*{tensor}", text)) for text in body]
            if True not in stores:
                continue
            num_loops += 1
            for text, is_store in list(zip(body, stores, strict=True))[stores.index(True) :]:
                assert is_store or not re.search(tensor, text), f"{name}: {text}"
        assert num_loops > 0, name


@pytest.mark.parametrize("isa", ISAS)
def test_rules_with_a_root_have_it_packed(functions, isa):
    """So that the test above cannot pass by finding no root at all."""
    registers, v = ISAS[isa]
    for name, code in loops(functions, isa, "update").items():
        suffix = "d" if ", double>" in name else "s"
        has_root = not re.search(r"fusedopt::(SGD|Lion|SAM)<", name)
        assert (count(code, f"{v}sqrtp{suffix}", registers) > 0) == has_root, name


@only_of_gcc
@pytest.mark.parametrize("isa", ISAS)
def test_what_rules_measure_is_vectorised(functions, isa):
    registers, v = ISAS[isa]
    found = loops(functions, isa, "measure")
    assert len(found) == 2 * sum(num_sums > 0 for *_, num_sums in _C.rules.values())
    for name, code in found.items():
        suffix = "d" if ", double>" in name else "s"
        assert count(code, f"{v}sqrtp{suffix}", registers) > 0 and count(code, f"{v}addpd", registers) > 0, name


@only_of_gcc
@pytest.mark.parametrize("isa", ISAS)
def test_codecs_and_norm_are_vectorised(functions, isa):
    registers, v = ISAS[isa]
    for kind in ("decode", "encode"):
        for name, code in loops(functions, isa, kind).items():
            if "16" in name:
                assert re.search(rf"\b{v}(psll|psrl|pmovzx|por|pand|pternlog)\w*\s.*%{registers}\d", code), name
    for name, code in loops(functions, isa, "sum_of_squares").items():
        # GCC 12 takes half of the AVX-512 register where the values come from 16 bits.
        assert count(code, f"{v}mulpd", "[xyz]mm") >= 8 and count(code, f"{v}addpd", "[xyz]mm") >= 4, name


@only_of_gcc
def test_memory_is_asked_for_before_it_is_needed(functions):
    """GCC drops the calls of a function that only prefetches, and says nothing."""
    refresh = [code for name, code in functions.items() if "Bucket::refresh(" in name]
    rows = [code for name, code in functions.items() if "with_values<" in name]
    for found in (refresh, rows):
        assert any("prefetch" in code for code in found)


def test_large_tables_are_written_past_the_caches(functions):
    assert any("movnt" in code for name, code in functions.items() if "fusedopt::cpu::" in name)


def test_nothing_is_fused_into_multiply_add(functions):
    """Every instruction set rounds after the product: the same bits on every CPU."""
    for isa in ISAS:
        for name, code in loops(functions, isa, "update").items():
            assert not re.search(r"\bvfn?m(add|sub)", code), name


def test_no_symbol_of_one_instruction_set_can_replace_anothers():
    """Only weak symbols are merged by the linker; ours have none."""
    symbols = subprocess.run(["nm", "-C", _C.__file__], capture_output=True, text=True, check=True).stdout
    weak = [
        line
        for line in symbols.splitlines()
        if re.search(r"^[0-9a-f]+ [WVu] fusedopt::(cpu::x86|SGD|Ada|RMS|NAdam|Lion|RAdam|LAMB|Stable|SAM)", line)
    ]
    assert "fusedopt::cpu::x86_64_v4" in symbols
    assert not weak
