"""examples/train_gpt.py: it learns, agrees with torch.optim, resumes bit for bit, and explains a user's mistake."""

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedopt.backends import cuda

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_gpt.py"
spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
train_gpt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_gpt)

TINY = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "16", "--batch-size", "4", "--device", "cpu"]
TINY += ["--text", str(EXAMPLE)]


def run(out, *argv):
    """Train the tiny model; returns results.json."""
    assert train_gpt.main([*TINY, "--out", str(out), *map(str, argv)]) == 0
    return json.loads((out / "results.json").read_text())


def error_of(capsys, *argv):
    """The line on stderr of a run that has to end with status 2."""
    with pytest.raises(SystemExit) as exit_info:
        train_gpt.main([*TINY, *map(str, argv)])
    assert exit_info.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("train_gpt.py: "), stderr
    return stderr


def assert_same(a, b, where="checkpoint"):
    """Equal to the last bit, tensor by tensor."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("optimizer", ["adamw", "nadam", "lion", "sgd"])
def test_10_steps_and_10_resumed_steps_are_20_steps(tmp_path, optimizer):
    common = "--steps", 20, "--optimizer", optimizer, "--no-compare"
    straight = run(tmp_path / "straight", *common)
    run(tmp_path / "stopped", *common, "--save-every", 10)
    resumed = run(tmp_path / "resumed", *common, "--resume", tmp_path / "stopped" / "step10.pt")

    assert resumed["ours"]["loss"] == straight["ours"]["loss"][10:]
    assert_same(*(torch.load(tmp_path / name / "step20.pt", weights_only=True) for name in ("straight", "resumed")))


def test_torch_resumes_from_our_checkpoint(tmp_path):
    run(tmp_path, "--steps", 20, "--save-every", 10, "--no-compare")
    results = run(tmp_path, "--steps", 20, "--resume", tmp_path / "step10.pt")
    assert len(results["torch"]["loss"]) == 10
    assert results["max_loss_difference"] < 1e-4


def test_the_loss_goes_down_as_with_torch(tmp_path, capsys):
    results = run(tmp_path, "--steps", 100, "--lr", 3e-3)
    ours, theirs = results["ours"], results["torch"]
    assert 5.3 < ours["loss"][0] < 5.8
    assert ours["validation"][-1][1] < 4
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert ours["grad_norm"][0] == pytest.approx(theirs["grad_norm"][0], rel=1e-5)
    assert results["max_loss_difference"] < 1e-3
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    stdout = capsys.readouterr().out
    for part in ("20/100 fusedopt    loss", "100/100 torch.optim validation loss", "tok/s", "time of torch / time of"):
        assert part in stdout


@pytest.mark.parametrize("optimizer", train_gpt.OPTIMIZERS)
def test_every_optimizer_agrees_with_its_twin(tmp_path, optimizer):
    results = run(tmp_path, "--steps", 3, "--optimizer", optimizer)
    assert len(results["ours"]["loss"]) == 3
    if hasattr(torch.optim, results["ours"]["name"].removeprefix("fusedopt.")):
        assert results["max_loss_difference"] < 1e-4
    else:
        assert results["torch"] is None


def test_the_display_of_a_terminal_shows_the_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    run(tmp_path, "--steps", 3, "--no-compare")
    stdout = capsys.readouterr().out
    assert "3/3" in stdout and "tok/s" in stdout


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "step1.pt"
    train_gpt.save({"step": 1}, path)

    def disk_full(_, file):
        Path(file).write_bytes(b"half a checkpo")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        train_gpt.save({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--text {tmp}/missing.txt", "missing.txt: No such file"),
        ("--text {tmp}", "Is a directory"),
        ("--text {tmp}/binary", "binary is not UTF-8 text: invalid start byte at byte 3"),
        ("--text {tmp}/small", "has 100 bytes; with --context 16 at least 340 are needed"),
        ("--device abacus", "--device abacus is not available"),
        ("--device cuda:99", "--device cuda:99 is not available"),
        ("--device meta", "--device must be cpu, cuda or cuda:N, not meta"),
        ("--backend abacus", "backend must be one of 'auto'"),
        ("--backend cuda", "backend='cuda'"),  # either not on this machine, or not for --device cpu
        ("--optimizer shampoo", "invalid choice: 'shampoo'"),
        ("--steps 0", "--steps must be above 0, got 0"),
        ("--batch-size -1", "--batch-size must be above 0, got -1"),
        ("--steps many", "invalid int value: 'many'"),
        ("--context 0", "--context must be above 0"),
        ("--threads 0", "--threads must be above 0"),
        ("--lr nan", "--lr must be above 0, got nan"),
        ("--max-grad-norm 0", "--max-grad-norm must be above 0"),
        ("--weight-decay -1", "weight_decay"),
        ("--seed -1", "--seed must be from 0"),
        ("--heads 3", "--width 32 is not divisible by --heads 3"),
        ("--resume {tmp}/missing.pt", "missing.pt: No such file"),
        ("--resume {tmp}", "Is a directory"),
        ("--resume {tmp}/small", "small is not a checkpoint"),
        ("--resume {tmp}/other.pt", "other.pt is not a checkpoint"),
        ("--out {tmp}/small/runs", "cannot write into --out"),
        ("--sptes 3", "unrecognized arguments: --sptes"),
    ],
)
def test_a_mistake_is_answered_with_one_line(tmp_path, capsys, monkeypatch, argv, expected):
    monkeypatch.setattr(cuda, "supports", lambda where, is_asked_for=False: where.type == "cuda")  # unlike the emulator
    (tmp_path / "binary").write_bytes(b"abc\xff" * 1000)
    (tmp_path / "small").write_bytes(b"x" * 100)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    argv = [part.format(tmp=tmp_path) for part in argv.split()]
    assert expected in error_of(capsys, "--out", tmp_path / "out", *argv)


def test_resuming_another_run_names_the_difference(tmp_path, capsys):
    run(tmp_path, "--steps", 2, "--save-every", 1, "--no-compare")
    text = tmp_path / "other.txt"
    text.write_text("another text\n" * 1000)
    resume = "--out", tmp_path, "--resume", tmp_path / "step1.pt", "--steps", 2
    assert "made with width 32, not 64" in error_of(capsys, *resume, "--width", 64)
    assert "made with optimizer adamw, not lion" in error_of(capsys, *resume, "--optimizer", "lion")
    assert "made with text_crc32" in error_of(capsys, *resume, "--text", text)
    assert "has done all of its 2 steps" in error_of(capsys, *resume, "--resume", tmp_path / "step2.pt")


def test_the_program_ends_with_status_2_and_no_traceback(tmp_path):
    command = [sys.executable, EXAMPLE, "--text", tmp_path / "missing.txt", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"train_gpt.py: cannot read the text {tmp_path / 'missing.txt'}: No such file or directory\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process")
def test_ctrl_c_ends_with_status_130_and_no_traceback(tmp_path):
    command = [sys.executable, EXAMPLE, *TINY, "--steps", "1000000", "--out", tmp_path]
    # A process started in the background by a shell inherits that Ctrl-C is ignored, and hands that on.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard) as process:
        while "tok/s" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "interrupted\n")
