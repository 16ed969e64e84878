"""Everything that a machine with a GPU can show, in one go: the tests marked gpu, the quick benchmark, compute-sanitizer.

    python -m tests.gpu [--out FOLDER] [--minutes 9]

Writes FOLDER/gpu.json and FOLDER/gpu.txt anew after every stage, so that what was found is there whatever ends the run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def machine():
    """What was tested, and on what."""
    import torch

    from bench import report
    from fusedopt.backends import cuda, triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        **report.machine(),
        "capability": list(torch.cuda.get_device_capability()),
        "driver": driver,
        "cuda": torch.version.cuda,
        "cuda part": cuda.found(),
        "triton": triton.unavailable() or triton.version(),
    }


def stages(folder):
    """(name, command, minutes at most): the first ones must leave time for the others."""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-q", "-m", "gpu", "--tb=short", "tests/test_gpu.py"]
    yield "tests", [*tests, f"--junitxml={folder / 'tests.xml'}", "-k", "not small_configuration"], 4.5
    yield "benchmark", [*python, "bench", "cuda", "--quick", "--out", str(folder / "bench.json")], 2
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        # Of torch's kernels nothing is asked, and Triton's are another compiler's.
        checked = [sanitizer, "--tool", tool, "--kernel-name", "kns=fusedopt", "--error-exitcode", "3", *tests]
        yield tool, [*checked, "-p", "no:cacheprovider", "-k", "small_configuration and cuda"], 1


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9)
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU here", file=sys.stderr)
        return 2
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    report = {"machine": machine(), "stages": {}}
    environment = {**os.environ, "FUSEDOPT_TEST_GPU": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    for name, command, minutes in stages(folder):
        log = folder / f"{name}.log"
        began = time.monotonic()
        left = min(60 * minutes, end - began)
        with open(log, "w") as file:
            try:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            except OSError as error:
                file.write(f"{error}\n")
                process = None
            try:
                status = "not there" if process is None else process.wait(max(left, 1))
            except subprocess.TimeoutExpired:
                status = "no time left"
                process.send_signal(signal.SIGINT)  # pytest then writes what it found
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
        lines = log.read_text(errors="replace").splitlines()
        report["stages"][name] = {
            "status": status, "seconds": round(time.monotonic() - began, 1), "log": lines[-60:],
        }  # fmt: skip
        results = folder / "bench.json"
        if name == "benchmark" and results.exists():
            report["stages"][name]["results"] = json.loads(results.read_text())
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        summary = [f"{key:<14} {value}" for key, value in report["machine"].items()]
        for stage, found in report["stages"].items():
            summary += ["", f"== {stage}: status {found['status']}, {found['seconds']} s", *found["log"]]
        (folder / "gpu.txt").write_text("\n".join(summary) + "\n")
    print((folder / "gpu.txt").read_text())
    return int(any(found["status"] != 0 for found in report["stages"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
