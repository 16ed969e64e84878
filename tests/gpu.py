"""Everything that a machine with a GPU can show, in one go: the tests marked gpu, the quick benchmark, compute-sanitizer.

    python -m tests.gpu [--out FOLDER] [--minutes 7.5]

Writes FOLDER/gpu.json, gpu.txt (its summary), bench.json and log.txt after every stage, so that what was found is there
whatever ends the run.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
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


@dataclass
class Stage:
    """One command, with its variables of the environment, and the minutes it may take at most."""

    name: str
    command: list[str]
    minutes: float
    environment: dict[str, str] = field(default_factory=dict)


def stages(folder):
    """In the order of what they tell. Together they may take as long as the whole."""
    python = [sys.executable, "-m"]
    tests = [*python, "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    yield Stage("tests", [*tests, "-k", "not small_configuration"], 3.5)
    yield Stage("benchmark", [*python, "bench", "cuda", "--quick", "--out", str(folder / "bench.json")], 1.5)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        checked = (
            [sanitizer, "--tool", tool, "--report-api-errors", "no"]
            if tool == "memcheck"
            else [sanitizer, "--tool", tool]
        )
        if tool in ("racecheck", "synccheck"):  # the others must see what torch's kernels write
            checked += ["--kernel-name", "kns=fusedopt"]
        # Allocated apart, so that what lies beside a tensor is nobody's.
        yield Stage(
            tool, [*checked, *tests, "-k", "small_configuration and cuda"], 0.6, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )


def findings(log):
    """How many reports of a sanitizer are about our kernels."""
    return len(re.findall(r"^=+ .*\bat .*fusedopt", log, re.M))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=7.5)
    options = parser.parse_args(arguments)
    import torch

    from fusedopt.backends import cuda

    if not torch.cuda.is_available():
        print("gpu: torch sees no GPU here", file=sys.stderr)
        return 2
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    report = {"machine": machine(), "stages": {}}
    (folder / "log.txt").write_text("")
    for stage in stages(folder):
        began = time.monotonic()
        status, log = run(stage, min(60 * stage.minutes, end - began))
        found = {"status": status, "seconds": round(time.monotonic() - began, 1), "findings": findings(log)}
        report["stages"][stage.name] = {**found, "log": log.splitlines()[-60:]}
        with open(folder / "log.txt", "a") as file:
            file.write(f"==== {stage.name}\n{log}\n")
        results = folder / "bench.json"
        if stage.name == "benchmark" and results.exists():
            report["stages"]["benchmark"]["results"] = json.loads(results.read_text())
        (folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        summary = [f"{key:<14} {value}" for key, value in report["machine"].items()]
        for name, found in report["stages"].items():
            header = f"== {name}: status {found['status']}, {found['seconds']} s, findings {found['findings']}"
            summary += ["", header, *found["log"]]
        (folder / "gpu.txt").write_text("\n".join(summary) + "\n")
    print((folder / "gpu.txt").read_text())
    failed = [name for name, found in report["stages"].items() if found["status"] != 0 or found["findings"]]
    if cuda.unavailable() is not None:
        failed.append(f"backend cuda: {cuda.unavailable()}")
    print("failed:", ", ".join(failed) or "nothing")
    return int(bool(failed))


def run(stage, seconds):
    """(exit status or what happened instead, what it printed)."""
    environment = {
        **os.environ,
        "FUSEDOPT_TEST_GPU": "1",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
        **stage.environment,
    }
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return "not there", str(error)
        try:
            status = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            status = "no time left"
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it found
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        file.seek(0)
        return status, file.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
