"""The benchmark checks before it times, and writes what it says."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch

import fusedopt
from bench import __main__ as bench_main
from bench import choose, choose_page, step
from bench import sparse as bench_sparse
from bench.peers import PEERS, RULES, TORCH_FUSED, Contestant
from examples import train_gpt

SHAPES = [(33, 65), (1021,), (7,)]
BENCH = Path(bench_main.__file__).parent


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(step.WORKLOADS, "10x1m", SHAPES)


def bench(*arguments) -> int:
    """Exit status of ``python -m bench``."""
    try:
        return bench_main.main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return exit_.code


def test_gpt2_is_gpt2():
    """148 tensors, 124,439,808 parameters: the head is the embedding."""
    sizes = [torch.Size(shape).numel() for shape in step.WORKLOADS["gpt2-124m"]]
    assert (len(sizes), sum(sizes)) == (148, 124_439_808)


def test_json_holds_every_figure_of_every_row(tmp_path):
    out = tmp_path / "cpu.json"
    names = ["AdamW", "NAdam", "Lion"]
    assert bench("cpu", "--workloads", "10x1m", "--rules", *names, "--repeats", 3, "--out", out) == 0
    written = json.loads(out.read_text())
    assert str(BENCH.parent) not in out.read_text()
    assert set(written) == {"schema", "machine", "results"}
    about = written["machine"]
    assert about["torch"] == torch.__version__ and about["threads"] >= 1
    assert {
        "cpu",
        "cores",
        "memory_gib",
        "python",
        "fusedopt",
        "commit",
        "modified",
        "freed_memory_kept",
        "date",
    } <= set(about)
    rows = {(row["rule"], row["clip"]): row for row in written["results"]}
    assert set(rows) == {("AdamW", True), ("AdamW", False), ("NAdam", False), ("Lion", False)}
    assert set(rows["AdamW", True]["ratio"]) == {"torch fused", "torch foreach"}
    assert set(rows["NAdam", False]["ratio"]) == {"torch foreach"} and rows["Lion", False]["ratio"] == {}
    for row in written["results"]:
        others = row["cores_used_by_others"]  # counted in ticks of 10 ms, of which so short a run has few
        assert others is None or 0 <= others <= 4 * os.cpu_count()
        assert row["params"] == 33 * 65 + 1021 + 7
        assert all(len(samples) == 3 and min(samples) > 0 for samples in row["step_ms"].values())
        assert set(row["check"]) == set(row["ratio"]) and all(0 <= part <= 1 for part in row["check"].values())
        for name, samples in row["step_ms"].items():
            assert row["min_ms"][name] == min(samples) <= row["median_ms"][name] == sorted(samples)[1]
            assert row["spread"][name] >= 0 and row["us_per_tensor"][name] > 0
    assert rows["AdamW", True]["bytes_per_param"] == rows["AdamW", False]["bytes_per_param"] + 4
    assert rows["AdamW", True]["targets"]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_tables_are_checked_and_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_sparse, "TABLES", {"tiny": (5000, 3), "tinier": (50, 3)})
    out = tmp_path / "sparse.json"
    assert bench("sparse", "--repeats", 2, "--out", out) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["workload"], row["rule"]) for row in rows] == [
        (f"sparse, {table}", rule) for table in ("tiny", "tinier") for rule in ("SGD", "Adagrad", "Adam")
    ]
    for row in rows:
        assert set(row["step_ms"]) == {"fusedopt", "torch sparse"} and 0 <= row["check"]["torch sparse"] <= 1
        assert [target["what"] for target in row["targets"]] == [">= 3x torch sparse"]


def test_wrong_sparse_contestant_is_not_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_sparse, "TABLES", {"tiny": (50, 3)})
    monkeypatch.setitem(bench_sparse.RULES, "Adam", (fusedopt.SGD, torch.optim.SparseAdam, 32))
    assert bench("sparse", "--repeats", 1, "--out", tmp_path / "sparse.json") == 1
    assert "tiny, Adam: torch sparse differs from ours" in capsys.readouterr().err


def test_share_of_bandwidth_is_measured_on_large_workloads(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "LARGE", 1000)
    monkeypatch.setattr(bench_main.report, "LARGE", 1000)
    monkeypatch.setattr(step, "ADD_ELEMENTS", 1000)
    out = tmp_path / "cpu.json"
    assert bench("cpu", "--workloads", "10x1m", "--rules", "Lion", "--repeats", 2, "--out", out) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert len(row["add_gb_s"]) == 2 and row["bandwidth_share"] > 0
    assert [target["what"] for target in row["targets"]] == [">= 95 % of in-place add"]


def test_disturbed_row_is_not_judged():
    result = step.run("10x1m", RULES["AdamW"], True, list(PEERS["cpu"]), rounds=1, block_ms=0.1)
    for others, verdicts in ((None, {True, False}), (0.0, {True, False}), (1.0, {None})):
        result.cores_used_by_others = others
        found = bench_main.report.targets(result)
        assert found and {met for _, _, met in found} <= verdicts


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("clip", [False, True])
def test_every_contestant_computes_what_ours_does(name, clip):
    result = step.run("10x1m", RULES[name], clip, list(PEERS["cpu"]), rounds=1, block_ms=0.1)
    assert result.check or RULES[name].twin is None


def _altered(**change):
    """torch fused, but for one thing."""
    return lambda rule, params, clip, lr: TORCH_FUSED.make(rule, params, *({"clip": clip, "lr": lr} | change).values())


def _other_norm(rule, params, clip, lr):
    optimizer = torch.optim.AdamW(params, lr=lr, **rule.kwargs)

    def clip_and_step():
        torch.nn.utils.clip_grad_norm_(params, 1.1)
        optimizer.step()

    return clip_and_step


@pytest.mark.parametrize(
    "clip, make",
    [
        pytest.param(False, _altered(lr=1.02e-3), id="lr"),
        pytest.param(True, _altered(lr=1.02e-3), id="lr, clipped"),
        pytest.param(True, _altered(clip=False), id="does not clip"),
        pytest.param(True, _other_norm, id="clips to another norm"),
        pytest.param(False, lambda rule, params, *rest: TORCH_FUSED.make(rule, params[:-1], *rest), id="one left out"),
    ],
)
@pytest.mark.parametrize("workload", ["10x1m", "1000x1"])
def test_wrong_contestant_is_not_timed(workload, clip, make, monkeypatch):
    monkeypatch.setattr(step, "time_blocks", None)
    with pytest.raises(step.CheckFailed, match=f"{workload}, AdamW, .*wrong differs from ours"):
        step.run(workload, RULES["AdamW"], clip, [Contestant("wrong", make)], rounds=1)


def test_wrong_contestant_costs_its_rows_and_status_1(monkeypatch, capsys, tmp_path):
    """Others are timed and kept."""

    def wrong_adamw(rule, params, clip, lr):
        return TORCH_FUSED.make(rule, params, clip, 2 * lr if rule.name == "AdamW" else lr)

    monkeypatch.setitem(PEERS, "cpu", (Contestant("wrong", wrong_adamw),))
    out = tmp_path / "cpu.json"
    options = "--workloads", "10x1m", "--rules", "AdamW", "Adam", "--repeats", 1, "--out", out
    assert bench("cpu", *options) == 1
    assert "10x1m, AdamW, without clip: wrong differs from ours" in capsys.readouterr().err
    assert {result["rule"] for result in json.loads(out.read_text())["results"]} == {"Adam"}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["cpu", "--rules", "Adamax"], "Adamax"),
        (["cpu", "--workloads", "huge"], "huge"),
        (["tpu"], "tpu"),
        (["sparse", "--rules", "SGD"], "--workloads and --rules"),
        (["cpu", "--repeats", "0"], "--repeats must be at least 1"),
        (["cpu", "--out", "no/such/folder/cpu.json"], "no/such/folder"),
        (["cpu", "--workloads", "1000x64", "--rules", "SGD"], "10x1m"),
    ],
)
def test_bad_arguments_exit_with_status_2_and_one_line(arguments, named, capsys):
    assert bench(*arguments) == 2
    message = capsys.readouterr().err
    assert named in message and message.startswith("bench: ") and message.count("\n") == 1


def test_kept_results_are_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_main, "RESULTS", tmp_path)
    first = bench_main.default_path("cpu", whole=True)
    first.write_text("kept")
    second = bench_main.default_path("cpu", whole=True)
    assert second.name == f"{first.stem}-2.json"
    assert bench_main.arguments(["cpu", "--quick"]).out.name == f"{first.stem}-quick.json"


def test_uses_nothing_private():
    for path in BENCH.glob("*.py"):
        assert not re.search(
            r"fusedopt\._(?!_)|fusedopt\.(plan|backends|optimizer|clip|rules|errors)\b", path.read_text()
        )


def test_picture_of_the_schedules_shows_every_one_and_is_the_same_each_time(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from bench import schedules

    assert {*schedules.PANELS} == {*fusedopt.schedules.__all__}
    kept = schedules.PICTURE.read_text()
    pictures = []
    for name in ("a.svg", "b.svg"):
        monkeypatch.setattr(schedules, "PICTURE", tmp_path / name)
        assert bench("schedules") == 0
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
    for picture in (kept, pictures[0]):
        assert all(f">{title}</text>" in picture for title in schedules.PANELS)
    assert max(schedules.factors(schedules.PANELS["warmup_cosine"][""])) == 1
    capsys.readouterr()
    assert bench("schedules", "--quick") == 2
    assert capsys.readouterr().err == "bench: schedules takes no arguments, got --quick\n"


def test_choose_measures_every_row_and_writes_what_it_prints(tmp_path, capsys, threads):
    """The same weights and batches for all, the lr chosen by another seed and other data, states as in the table of rules."""
    out = tmp_path / "choose.json"
    assert bench("choose", "--quick", "--out", out) == 0
    results = json.loads(out.read_text())
    assert choose_page.tables(results) in capsys.readouterr().out
    assert str(BENCH.parent) not in out.read_text()
    budget, timing = choose.QUICK, results["timing"]
    for task in choose.TASKS:
        rows = results["tasks"][task]
        assert [*rows] == [*choose.ALL]
        for name, row in rows.items():
            lrs = choose.grid(choose.ALL[name], task, budget)
            assert [lr for lr, _ in row["validation"]] == lrs and row["lr"] in lrs
            assert tuple(run["seed"] for run in row["test"]) == budget.seeds and budget.tuning_seed not in budget.seeds
            assert all(run["loss"] > 0 for run in row["test"])
        for number in range(len(budget.seeds)):
            assert len({row["test"][number]["curve"][0] for row in rows.values()}) == 1  # before the first step
        assert rows["AdamW"]["test"][0]["curve"][0] != rows["AdamW"]["test"][1]["curve"][0]
        assert len({row["test"][0]["loss"] for row in rows.values()}) > len(choose.ROWS) / 2
        threads(1)
        row, seeds = rows["AdamW"], (budget.tuning_seed, budget.seeds[0])
        for seed, part, loss in zip(
            seeds, ("validation", "test"), (row["validation"][0][1], row["test"][0]["loss"]), strict=True
        ):
            again = choose.train(choose.Training("AdamW", task, row["lr"], seed, budget.steps[task], part))
            assert again["loss"] == loss
    assert all(0 <= run["accuracy"] <= 1 for row in results["tasks"]["digits"].values() for run in row["test"])
    assert [*timing["ms_per_million_params"]] == [*choose.ROWS, choose.REFERENCE]
    assert all(len(ms) == budget.rounds and min(ms) > 0 for ms in timing["ms_per_million_params"].values())
    for name, row in choose.ROWS.items():
        optimizer = row.cls([torch.nn.Parameter(torch.zeros(1))], **row.options)
        kept = sum(state is not None for state in optimizer.rule.stored(optimizer.param_groups[0]))
        expected = 4 * (kept + isinstance(optimizer, fusedopt.SAM))
        assert expected <= timing["state_bytes_per_param"][name] < expected + 0.1, name  # and counts of steps


def test_choose_has_a_row_of_every_optimizer():
    public = {getattr(fusedopt, name) for name in fusedopt.__all__}
    classes = {cls for cls in public if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)}
    assert {row.cls for row in choose.ROWS.values()} == classes and len(classes) >= 12
    for row in choose.VARIANTS.values():
        assert row.variant_of in choose.ROWS


def test_every_row_takes_as_many_gradients():
    plan = choose.planned(choose.FULL, lambda row, task: [row.lr[task]], choose.FULL.seeds, "test")
    assert len(plan) == len(choose.ALL) * len(choose.TASKS) * len(choose.FULL.seeds)
    for training in plan:
        row = choose.ALL[training.row]
        assert training.steps * row.gradients == choose.FULL.steps[training.task] * row.budget


@pytest.mark.parametrize(
    "row, task, recipe, given",
    [
        ("AdamW", "gpt", fusedopt.recipes.transformer_pretraining, {"warmup_steps": 30}),
        ("SGD with momentum", "digits", fusedopt.recipes.image_from_scratch, {}),
    ],
)
def test_choose_trains_by_the_recipe(row, task, recipe, given):
    data, steps = choose.task(task), choose.FULL.steps[task]
    model = data.model()
    ours = choose.optimizer_of(choose.ROWS[row], model, data, 0.01, steps)
    theirs = recipe(model, steps, lr=0.01, **given)
    assert type(ours[0]) is type(theirs.optimizer) and ours[0].max_grad_norm == theirs.optimizer.max_grad_norm
    for mine, other in zip(ours[0].param_groups, theirs.optimizer.param_groups, strict=True):
        assert mine == other
    for _ in range(steps + 1):
        assert ours[1].get_last_lr() == theirs.scheduler.get_last_lr()
        for optimizer, scheduler in (ours, theirs):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("row", ["AdamW", "RAdam"])
def test_without_warmup_the_first_step_takes_the_peak(row):
    data = choose.task("gpt")
    for name, part in ((row, 1 / 30), (f"{row} without warmup", 1.0)):
        _, scheduler = choose.optimizer_of(choose.ALL[name], data.model(), data, 0.01, 300)
        assert scheduler.get_last_lr() == pytest.approx([0.01 * part] * 2)


def test_parts_of_the_data_share_nothing():
    images = torch.cat([images.flatten(1) for images, _ in choose.task("digits").parts.values()])
    assert len(images) == 1797 == len(images.unique(dim=0))
    parts = choose.task("gpt").parts
    text, _ = train_gpt.read_text(choose.task("gpt").args)
    assert torch.equal(parts["train"], text) and len(parts["validation"]) + len(parts["test"]) > len(text) / 20
    assert not torch.equal(parts["validation"][:1000], parts["test"][:1000])


def test_best_lr_edge_and_losses_that_are_not_finite():
    assert choose.best_lr([(0.1, None), (0.3, 2.0), (1.0, 1.5), (3.0, None)]) == 1.0
    assert choose.finite(float("nan")) is None and choose.finite(float("inf")) is None
    result = {"validation": [[0.1, 3.0], [1.0, 2.0], [10.0, None]], "lr": 1.0, "test": [{"loss": 1.0}, {"loss": 2.0}]}
    assert choose_page.loss_of(result) == "1.500 ± 0.707 (1)"
    assert choose_page.loss_of({**result, "lr": 0.1}) == "1.500 ± 0.707 (0.1†)"
    assert choose_page.loss_of({**result, "test": [{"loss": 1.0}, {"loss": None}]}) == "not finite (1)"


def test_page_on_choosing_holds_the_tables_of_its_results_and_their_picture(tmp_path, monkeypatch):
    page = choose_page.PAGE.read_text()
    link = choose_page.MARKED.search(page).group(2)
    source = choose_page.PAGE.parent / link
    results = json.loads(source.read_text())
    assert choose_page.marked(results, link) in page
    assert results["schema"] == choose.SCHEMA and set(results["tasks"]["gpt"]) == {*choose.ALL}
    assert results["budget"] == json.loads(choose.as_json(dataclasses.asdict(choose.FULL)))

    copy = tmp_path / "docs" / "choosing.md"
    copy.parent.mkdir()
    copy.write_text(page.replace(choose_page.marked(results, link), choose_page.marked(results, "old.json")))
    monkeypatch.setattr(choose_page, "PAGE", copy)
    pictures = [choose_page.PICTURE.read_text()]
    for name in ("a.svg", "b.svg"):
        monkeypatch.setattr(choose_page, "PICTURE", tmp_path / name)
        assert bench("choose", "--page", source) == 0
        pictures.append((tmp_path / name).read_text())
    assert copy.read_text().count(f"{Path(link).name} -->\n") == 1 and "old.json" not in copy.read_text()
    assert pictures[1] == pictures[2]
    for picture in pictures:
        assert all(f">{name}</text>" in picture for name in (*choose.ROWS, *choose_page.WARMED))


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--page", "no.json"], "no file no.json"),
        (["--page", "x", "--quick"], "neither"),
        (["--out", "no/x.json"], "no/x.json"),
    ],
)
def test_bad_arguments_of_choose_exit_with_status_2_and_one_line(arguments, named, capsys):
    assert bench("choose", *arguments) == 2
    message = capsys.readouterr().err
    assert named in message and message.startswith("bench: ") and message.count("\n") == 1
