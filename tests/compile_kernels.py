"""What compilers make of the GPU kernels, for GPUs that need not be there: registers, spills, wide accesses.

    python -m tests.compile_kernels            of every Triton kernel compiled for the usual targets, and of the CUDA kernels
                                               in the installed object
    python -m tests.compile_kernels --all      Triton's for all targets, every pair of dtypes
    python -m tests.compile_kernels --write    and keeps it as tests/compiled_kernels.json
    python -m tests.compile_kernels --states FORMAT
                                               only of updates whose states are stored in that format

A process of its own, because the kernels are either compiled or interpreted, which is decided when they are imported.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TABLE = Path(__file__).with_name("compiled_kernels.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MORE_TARGETS = ("sm_86", "sm_89", "sm_120", "gfx90a", "gfx1100")
# Of a parameter and its gradient.
DTYPES = ("fp32", "bf16", "fp16", "fp64")


def variants(targets):
    """(target, kernel, stores, parameter, gradient) of every compilation.

    A kernel is called as in kernels/engine.py, after a rule's name where it is one of a rule; an update by the rule's name
    alone, "from source" where it reads parameters elsewhere, in another format than it writes, and "states" with the format of
    its states where that is not the one that is computed in.
    """
    from fusedopt.kernels.storage import FORMATS
    from fusedopt.rules import RULES

    narrow = [name for name in FORMATS if name not in ("float32", "float64")]

    for target, param, grad in itertools.product(targets, DTYPES, DTYPES):
        if grad == "fp64" != param or (param != grad and target != "sm_90"):
            continue
        if param == grad:
            yield target, "global_norm", (), param, grad
            yield target, "weighted global_norm", (), param, grad
        for rule in RULES.values():
            choices = [(True,) if state.option is None else (False, True) for state in rule.states]
            for stores in itertools.product(*choices):
                yield target, rule.name, stores, param, grad
                if target == "sm_90" and rule.optimizers and param == grad in ("bf16", "fp16"):
                    yield target, f"{rule.name} from source", stores, param, grad
                if rule.num_sums and param == grad:
                    yield target, f"{rule.name} measure", stores, param, grad
                if target == "sm_90" and rule.optimizers and any(stores) and param == grad in ("fp32", "bf16"):
                    for name in narrow:
                        yield target, f"{rule.name} states {name}", stores, param, grad
    for target in targets:
        yield target, "add_up", (), "fp32", "fp32"


def usual_variants():
    """Those that `make test` compiles, as each takes a second: every rule for each target in float32, for one target in
    bfloat16 and float64 too; the rest for Adam and the norms.
    """
    for variant in variants(TARGETS):
        target, kernel, _, param, grad = variant
        if " states " in kernel and kernel.split()[0] not in ("adam", "lion"):
            continue
        dtypes = ("fp32", "bf16", "fp64") if target == "sm_90" else ("fp32",)
        is_of_any = kernel.split()[0] in ("adam", "global_norm") and (target == "sm_90" or param in ("fp32", "bf16"))
        if is_of_any or (param == grad in dtypes and not kernel.endswith("source")):
            yield variant


def name_of(target, kernel, stores, param, grad):
    kept = "".join("x" if stored else "-" for stored in stores)
    return " ".join(filter(None, [target, kernel, kept, param if param == grad else f"{param}/{grad}"]))


def compile_variant(variant):
    """(its name, what the compiler made of it)."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusedopt.backends.triton import constant
    from fusedopt.kernels import engine, rules, storage
    from fusedopt.rules import RULES

    target, kernel, stores, param, grad = variant
    names = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}
    formats = storage.FORMATS | {dtype: storage.FORMATS[name] for dtype, name in names.items()}
    computed = "fp64" if param == "fp64" else "fp32"
    is_cuda = target.startswith("sm_")
    warp_size = 64 if target.startswith("gfx9") else 32
    name, *what = kernel.split()
    of_states = what[1] if what[:1] == ["states"] else computed
    states = [of_states if stored else None for stored in stores]
    slots = [computed if what == ["from", "source"] else param, param, *states]
    written = [] if kernel.endswith("global_norm") else [dtype for dtype in slots[1:] if dtype]
    itemsizes = [formats[dtype].dtype.primitive_bitwidth // 8 for dtype in (*written, grad)]
    rule = RULES.get(name)
    function = getattr(engine, kernel.split()[-1], engine.update)
    options = engine.launch_options(function, itemsizes, warp_size, int(target[3:]) if is_cuda else None)
    constants = {name: options.pop(name) for name in ("BLOCK", "CHUNK")}
    constants |= {"GRAD": constant(formats[grad]), "PARAM": constant(formats[param]), "STORES": stores}
    constants |= {"FORMATS": tuple(constant(formats.get(dtype)) for dtype in slots), "DTYPE": formats[computed].dtype}
    constants |= {"IS_FINAL": True, "NUM_PARTIALS": 2048, "NUM_SUMS": 2}
    if kernel == "global_norm":
        constants |= {"weights": None, "PARAM": None}
    if rule:
        constants |= {part.upper(): getattr(rules, f"{part}_{name}", None) for part in ("prepare", "measure", "adapt")}
        constants |= {
            "UPDATE": getattr(rules, name), "NUM_HYPER": len(rule.hyper), "NUM_SUMS": rule.num_sums,
            "SCALARS": (tl.float32, formats[computed].dtype)[: 1 + (rule.extra is not None)],
        }  # fmt: skip
        if not rule.num_sums:
            constants["sums"] = None
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    pointers = {
        "grads": "*i64", "entry_of": "*i32", "index_of": "*i32", "numel": "*i64", "addresses": "*i64", "group_of": "*i32",
        "seeds": "*i32",
        "hyper": "*fp64", "partials": "*fp64", "ticket": "*i32", "max_norm": "*fp64", "previous": "*fp64",
        "grad_scale": "*fp32", "found_inf": "*fp32", "norm": "*fp32", "control": "*fp64", "skipped": "*i64",
        "weights": "*i64", "first_chunk": "*i32", "partial_sums": "*fp64", "sums": "*fp64",
    }  # fmt: skip
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in function.arg_names}
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_cuda else GPUTarget("hip", target, warp_size)
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if signature[name][0] == "*"
    }
    compiled = triton.compile(ASTSource(function, signature, constants, aligned), target=gpu, options=options)
    return name_of(*variant), _cuda_facts(compiled) if is_cuda else _hip_facts(compiled)


def tool(name):
    """One of NVIDIA's binary tools; the Triton package has them."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def _cuda_facts(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([tool(name), *arguments, file.name], capture_output=True, text=True, check=True).stdout
            for name, arguments in (("nvdisasm", []), ("cuobjdump", ["-res-usage"]))
        )
    return _facts_of_code(code, *re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())


def _facts_of_code(code, registers, stack):
    return {
        "registers": int(registers),
        "spilled": int(stack) + len(re.findall(r"\b(?:LDL|STL)", code)),
        "wide_loads": len(re.findall(r"\bLDG?\.E\.\S*128", code)),
        "wide_stores": len(re.findall(r"\bSTG?\.E\.\S*128", code)),
    }


def nvcc_version():
    """That of the nvcc a build would take, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\S+),", text).group(1)


def cuda_kernels(path):
    """(name, code, what the compiler made of it) of every kernel in an object that nvcc made, for each of its targets."""
    by_target = {}
    for option in ("-sass", "-res-usage"):
        text = subprocess.run([tool("cuobjdump"), option, path], capture_output=True, text=True, check=True).stdout
        # Code for a target begins with a line that names it; virtual code, which has no registers, is left out.
        for part in re.split(r"(?m)^Fatbin (?=elf code|ptx code)", text):
            target = re.search(r"(?m)^arch = (\S+)", part)
            if target and part.startswith("elf code"):
                for function in re.split(r"Function\s*:?\s*(?=_Z)", part)[1:]:
                    symbol, body = re.match(r"(\w+):?(.*)", function, flags=re.S).groups()
                    by_target.setdefault((target.group(1), symbol), {})[option] = body
    names = subprocess.run(
        ["c++filt"], input="\n".join(symbol for _, symbol in by_target), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for ((target, _), of_kernel), name in zip(by_target.items(), names, strict=True):
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", of_kernel["-res-usage"]).groups()
        rule = re.search(r"(update|measure)<fusedopt::(.+), \w+>\(", name)
        what = {"update": "", "measure": " measure"}
        short = f"{rule.group(2)}{what[rule.group(1)]}" if rule else "add_up" if "of_each" in name else "global_norm"
        short = f"{target} {short}"
        yield short, of_kernel["-sass"], _facts_of_code(of_kernel["-sass"], registers, stack)


def _hip_facts(compiled):
    code = compiled.asm["amdgcn"]

    def number(field):
        return int(re.search(rf"\.{field}:\s*(\d+)", code).group(1))

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("private_segment_fixed_size"),  # scalars spill into registers
        "wide_loads": len(re.findall(r"\b(?:global|flat|buffer)_load_(?:dwordx4|b128)", code)),
        "wide_stores": len(re.findall(r"\b(?:global|flat|buffer)_store_(?:dwordx4|b128)", code)),
    }


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="for all targets, every pair of dtypes")
    parser.add_argument("--states", metavar="FORMAT", help="only updates whose states are stored in that format")
    parser.add_argument("--write", action="store_true", help=f"keep the result as {TABLE.name}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from fusedopt.backends import cuda

    todo = [*variants((*TARGETS, *MORE_TARGETS))] if options.all else [*usual_variants()]
    if options.states:
        todo = [variant for variant in todo if variant[1].endswith(f" states {options.states}")]
    with ProcessPoolExecutor(options.jobs) as pool:
        result = {f"triton {triton.__version__}": dict(pool.map(compile_variant, todo, chunksize=4))}
    if cuda.LIBRARY.exists() and not options.states:
        result[f"nvcc {nvcc_version()}"] = {name: facts for name, _, facts in cuda_kernels(cuda.LIBRARY)}
    if options.json:
        print(json.dumps(result))
    else:
        for compiler, kernels in result.items():
            print(compiler)
            for name, values in kernels.items():
                print(f"  {name:<44}", *(f"{key} {value:<4}" for key, value in values.items()))
    if options.write:
        blocks = []
        for compiler, kernels in result.items():
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in kernels.items())
            blocks.append(f"  {json.dumps(compiler)}: {{\n{lines}\n  }}")
        TABLE.write_text("{\n" + ",\n".join(blocks) + "\n}\n")
    spilling = [name for kernels in result.values() for name, facts in kernels.items() if facts["spilled"]]
    if spilling:
        parser.exit(1, f"registers are spilled in {', '.join(spilling)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
