"""``python -m fusedopt doctor``: what was found, what is picked for each device, and why nothing faster. ``show``: a rule."""

import platform
import sys

import torch

import fusedopt
from fusedopt import backends
from fusedopt.backends import cuda, triton, watch
from fusedopt.extension import _C
from fusedopt.show import show

USAGE = """usage: python -m fusedopt doctor       what is installed, what each device gets, and why nothing faster
       python -m fusedopt show RULE    a rule, such as adam or AdamW: its row of the table, its formula in all languages
"""


def doctor() -> None:
    kernels = "none"
    if _C:
        isas = ", ".join(name + (" (used)" if name == _C.isa() else "") for name in _C.available_isas())
        threads = "OpenMP" if _C.has_openmp else "plain threads (built without OpenMP)"
        reading = (
            "torch's C ABI" if watch.reads_by_abi else "Python attributes (slower: this torch's C ABI lacks something)"
        )
        kernels = f"{isas}; {threads}; tensors read through {reading}"
    print(
        f"fusedopt     {fusedopt.__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"CPU kernels  {kernels}")
    print(f"CUDA part    {cuda.found()}")
    print(f"Triton       {triton.unavailable() or triton.version()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    for name in devices:
        picked, passed_over = backends.explain(torch.device(name.split(" ")[0]))
        print(f"{name:<12} {picked}")
        for faster, reason in passed_over.items():
            print(f"{'':<12}   not {faster}: {reason}")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["doctor"]:
            doctor()
            return 0
        case ["show", name]:
            return show(name)
    print(USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
