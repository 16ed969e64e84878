"""Everything that a machine with a GPU can show, in one go: the tests marked gpu, then the quick benchmark.

    python -m tests.gpu [--out FOLDER] [--minutes 9]

Writes FOLDER/gpu.json and FOLDER/gpu.txt anew after every stage, so that what was found is there whatever ends the run.
"""

import argparse
import json
import os
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
    from fusedopt.backends import triton

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
        "triton": triton.unavailable() or triton.version(),
    }


def stages(folder):
    """(name, command, minutes at most): the first ones must leave time for the others."""
    python = [sys.executable, "-m"]
    return (
        ("tests", [*python, "pytest", "-q", "-m", "gpu", "--tb=short", f"--junitxml={folder / 'tests.xml'}"], 5),
        ("benchmark", [*python, "bench", "cuda", "--quick", "--out", str(folder / "bench.json")], 3),
    )


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
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            try:
                status = process.wait(max(left, 1))
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
