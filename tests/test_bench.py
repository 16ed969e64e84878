"""The benchmark checks before it times, and writes what it says."""

import json
import os

import pytest
import torch

from bench import __main__ as bench_main
from bench import step
from bench.peers import PEERS, RULES, TORCH_FUSED, Contestant

SHAPES = [(33, 65), (1021,), (7,)]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(step.WORKLOADS, "10x1m", SHAPES)


def test_json_holds_every_figure_of_every_row(tmp_path):
    out = tmp_path / "cpu.json"
    names = ["AdamW", "NAdam", "Lion"]
    assert bench_main.main(["cpu", "--workloads", "10x1m", "--rules", *names, "--rounds", "3", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["machine"]["threads"] >= 1
    rows = {(row["rule"], row["clip"]): row for row in written["results"]}
    assert set(rows) == {("AdamW", True), ("AdamW", False), ("NAdam", False), ("Lion", False)}
    assert set(rows["AdamW", True]["ratio"]) == {"torch fused", "torch foreach"}
    assert set(rows["NAdam", False]["ratio"]) == {"torch foreach"} and rows["Lion", False]["ratio"] == {}
    for row in written["results"]:
        assert 0 <= row["cores_used_by_others"] <= os.cpu_count()
        assert row["params"] == 33 * 65 + 1021 + 7
        assert all(len(samples) == 3 and min(samples) > 0 for samples in row["step_ms"].values())
    assert rows["AdamW", True]["bytes_per_param"] == rows["AdamW", False]["bytes_per_param"] + 4
    assert rows["AdamW", True]["targets"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clip", [False, True])
def test_every_contestant_computes_what_ours_does(name, clip):
    peers = [peer for peer in PEERS["cpu"] if peer.make(RULES[name], [torch.nn.Parameter(torch.ones(1))], clip, 0.0)]
    assert peers or RULES[name].twin is None
    step.check(RULES[name], clip, peers, SHAPES)


@pytest.mark.parametrize("clip", [False, True])
def test_wrong_contestant_is_not_timed(clip, monkeypatch, capsys, tmp_path):
    wrong = Contestant("wrong", lambda rule, params, clip, lr: TORCH_FUSED.make(rule, params, clip, 1.02 * lr))
    with pytest.raises(step.CheckFailed, match="wrong differs from ours"):
        step.check(RULES["AdamW"], clip, [wrong], SHAPES)
    monkeypatch.setitem(PEERS, "cpu", (wrong,))
    out = tmp_path / "cpu.json"
    assert bench_main.main(["cpu", "--workloads", "10x1m", "--rounds", "1", "--out", str(out)]) == 1
    assert "not timed" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "arguments", [["cpu", "--rules", "Adamax"], ["cpu", "--workloads", "huge"], ["tpu"], ["cpu", "--rounds", "0"]]
)
def test_bad_arguments_exit_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench_main.main(arguments)
    assert exit_.value.code == 2
    assert arguments[-1] in capsys.readouterr().err or arguments[-1] == "0"
