"""fusedopt.schedules: each lr is its formula's, peak and floor are reached, a resumed run goes on as if it never stopped."""

import doctest
import functools
import math
import warnings

import numpy as np
import pytest
import torch
from helpers import SPECS, assert_same_bits, make_params, set_grads

import fusedopt
from fusedopt import schedules

TOTAL = 53
PEAKS = 0.3, 0.07
FLOOR = 0.15

# Formulas, of the step t = 1, 2, …; a warmup of 0 is one of 1.


def cosine(t, w):
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (t - w) / (TOTAL - w))) / 2


def line(t, w):
    return FLOOR + (1 - FLOOR) * (TOTAL - t) / (TOTAL - w)


def cooldown(shape):
    return lambda t, w: FLOOR + (1 - FLOOR) * shape((t - (TOTAL - 17)) / 17) if t > TOTAL - 17 else 1


# name: (how it is made, the factor after the warmup, whether there is a total)
SCHEDULES = {
    "warmup_cosine": (lambda opt, w: schedules.warmup_cosine(opt, TOTAL, w, FLOOR), cosine, True),
    "linear": (lambda opt, w: schedules.linear(opt, TOTAL, w, FLOOR), line, True),
    "1-sqrt": (
        lambda opt, w: schedules.warmup_stable_decay(opt, TOTAL, w, 17, FLOOR),
        cooldown(lambda x: 1 - x**0.5),
        True,
    ),
    "linear decay": (
        lambda opt, w: schedules.warmup_stable_decay(opt, TOTAL, w, 17, FLOOR, "linear"),
        cooldown(lambda x: 1 - x),
        True,
    ),
    "inverse_sqrt": (lambda opt, w: schedules.inverse_sqrt(opt, max(w, 1)), lambda t, w: math.sqrt(w / t), False),
    "step": (lambda opt, w: schedules.step(opt, 19, 0.3, w), lambda t, w: 0.3 ** ((t - 1) // 19), False),
}
MAKERS = {name: make for name, (make, *_) in SCHEDULES.items()}
MAKERS["one_cycle"] = lambda opt, w: schedules.one_cycle(opt, TOTAL, w, min_lr_ratio=FLOOR)
every_schedule = pytest.mark.parametrize("name", MAKERS)


def two_groups(cls=fusedopt.AdamW, **options):
    first, *rest = make_params(((13, 7), (5,), ()))
    groups = [{"params": [first], "lr": PEAKS[0]}, {"params": rest, "lr": PEAKS[1]}]
    return cls(groups, **{"lr": 1.0, **options})


@functools.cache
def straight_run(name, cls=fusedopt.AdamW, **options):
    """Its lrs and its last parameters."""
    optimizer = two_groups(cls, **options)
    lrs = run(optimizer, MAKERS[name](optimizer, 7), TOTAL + 20)
    return lrs, [param for group in optimizer.param_groups for param in group["params"]]


def run(optimizer, scheduler, steps, first=0):
    """Steps with random gradients; the lrs of each."""
    lrs = []
    for t in range(first, first + steps):
        lrs.append([float(group["lr"]) for group in optimizer.param_groups])
        assert [float(lr) for lr in scheduler.get_last_lr()] == lrs[-1]
        set_grads([param for group in optimizer.param_groups for param in group["params"]], t)
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize("warmup", [0, 1, 7, 19])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_lr_is_the_formula_of_its_step(name, warmup):
    """Of each group by its own peak, which is reached to the bit; so is the floor, at the last step, and for good."""
    make, factor, has_total = SCHEDULES[name]
    optimizer = two_groups()
    lrs = run(optimizer, make(optimizer, warmup), TOTAL + 40)
    warmup = max(warmup, 1)
    for t, both in enumerate(lrs, 1):
        expected = t / warmup if t <= warmup else FLOOR if has_total and t >= TOTAL else factor(t, warmup)
        assert both == pytest.approx([peak * expected for peak in PEAKS], rel=1e-13), t
    assert lrs[0][0] > 0
    assert lrs[warmup - 1] == [*PEAKS]
    if has_total:
        assert all(both == [peak * FLOOR for peak in PEAKS] for both in lrs[TOTAL - 1 :])


@pytest.mark.parametrize("name", ["warmup_cosine", "linear"])
def test_training_of_one_step_takes_the_peak(name):
    """So does the last step of a warmup that is all of training; the floor is for steps after it."""
    for total, warmup in ((1, 0), (1, 1), (3, 3)):
        optimizer = two_groups()
        lrs = run(optimizer, getattr(schedules, name)(optimizer, total, warmup, FLOOR), total + 2)
        assert lrs[total - 1] == [*PEAKS]
        assert lrs[total] == lrs[total + 1] == [peak * FLOOR for peak in PEAKS]


def test_one_cycle_is_two_half_cosines():
    optimizer, warmup = two_groups(), 17
    lrs = run(optimizer, schedules.one_cycle(optimizer, TOTAL, warmup, 0.2, FLOOR), TOTAL + 40)
    for t, both in enumerate(lrs, 1):
        low, part = (0.2, (t - 1) / (warmup - 1)) if t <= warmup else (FLOOR, (TOTAL - t) / (TOTAL - warmup))
        factor = low + (1 - low) * (1 - math.cos(math.pi * part)) / 2 if t < TOTAL else FLOOR
        assert both == pytest.approx([peak * factor for peak in PEAKS], rel=1e-12), t


def test_one_cycle_reaches_its_peak_to_the_bit():
    """These are numbers for which total * (warmup / total) is less than warmup, and the peak would be missed by a bit."""
    for total, warmup, peak in ((43, 31, 3e-4), (50, 29, 3e-4), (52, 15, 3e-4), (58, 31, 3e-4), (75, 55, 3e-4)):
        optimizer = torch.optim.SGD(make_params(((3,),)), lr=peak)
        scheduler = schedules.one_cycle(optimizer, total, warmup, min_lr_ratio=0.1)
        optimizer.step()
        for _ in range(warmup - 1):
            scheduler.step()
        assert scheduler.get_last_lr() == [peak], (total, warmup)


def test_one_cycle_ends_at_zero_if_asked_to():
    optimizer = two_groups()
    assert run(optimizer, schedules.one_cycle(optimizer, 9, 3, min_lr_ratio=0), 12)[8:] == [[0, 0]] * 4


def test_one_cycle_moves_momentum_against_the_lr():
    warmup = 17
    for cls, options in (
        (fusedopt.SGD, {"momentum": 0.8}),
        (fusedopt.RMSprop, {"momentum": 0.8}),
        (fusedopt.AdamW, {"betas": (0.8, 0.97)}),
        (fusedopt.NAdam, {"betas": (0.8, 0.97)}),
        (torch.optim.Adam, {"betas": (0.8, 0.97)}),
    ):
        optimizer = two_groups(cls, **options)
        scheduler = schedules.one_cycle(optimizer, TOTAL, warmup, momentum_range=(0.6, 0.9))
        for t in range(1, TOTAL + 20):
            part = (t - 1) / (warmup - 1) if t <= warmup else max(0, TOTAL - t) / (TOTAL - warmup)
            expected = 0.9 - 0.3 * (1 - math.cos(math.pi * part)) / 2
            for group in optimizer.param_groups:
                assert (group["betas"][0] if "betas" in options else group["momentum"]) == pytest.approx(expected), t
                assert "betas" not in options or group["betas"][1] == 0.97
            run(optimizer, scheduler, 1, t)


@pytest.mark.parametrize(
    "cls, options, given",
    [
        pytest.param(fusedopt.SGD, {}, (0.85, 0.95), id="SGD without momentum"),
        pytest.param(torch.optim.SGD, {}, (0.85, 0.95), id="torch's SGD without momentum"),
        pytest.param(fusedopt.RMSprop, {}, (0.85, 0.95), id="RMSprop without momentum"),
        pytest.param(fusedopt.Adam, {"betas": (0.0, 0.99)}, (0.85, 0.95), id="Adam without momentum"),
        pytest.param(fusedopt.Lion, {}, (0.85, 0.95), id="Lion"),
        pytest.param(fusedopt.Adagrad, {}, (0.85, 0.95), id="Adagrad"),
        pytest.param(fusedopt.AdamW, {}, None, id="not asked to"),
    ],
)
def test_one_cycle_leaves_momentum_alone(cls, options, given):
    optimizer = two_groups(cls, **options)
    before = [(group.get("betas"), group.get("momentum")) for group in optimizer.param_groups]
    scheduler = schedules.one_cycle(optimizer, 9, 4, momentum_range=given)
    for t in range(12):
        run(optimizer, scheduler, 1, t)
        assert [(group.get("betas"), group.get("momentum")) for group in optimizer.param_groups] == before
    assert all("momentum_buffer" not in state for state in optimizer.state.values())


def test_one_cycle_moves_only_the_groups_that_have_momentum():
    optimizer = two_groups(fusedopt.SGD)
    optimizer.param_groups[1]["momentum"] = 0.9
    scheduler = schedules.one_cycle(optimizer, 9, 4)
    run(optimizer, scheduler, 3)
    assert [group["momentum"] for group in optimizer.param_groups] == [0, pytest.approx(0.85)]


TORCH = ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "RAdam", "Rprop"]


@every_schedule
@pytest.mark.parametrize(
    "cls",
    [*(spec.cls for spec in SPECS), *(getattr(torch.optim, name) for name in TORCH)],
    ids=lambda cls: cls.__module__,
)
def test_every_optimizer_takes_every_schedule_without_a_warning(cls, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = two_groups(cls)
        assert run(optimizer, MAKERS[name](optimizer, 7), 9) == straight_run(name)[0][:9]


@every_schedule
@pytest.mark.parametrize("stop", [3, 7, 43, TOTAL, TOTAL + 9])
def test_resumed_run_is_the_run_that_never_stopped(name, stop, tmp_path):
    """Parameters and lrs to the bit; the checkpoint loads with weights_only."""
    for cls, options in ((fusedopt.AdamW, {}), (fusedopt.SGD, {"momentum": 0.9}), (fusedopt.Lion, {})):
        lrs, straight = straight_run(name, cls, **options)
        stopped = two_groups(cls, **options)
        scheduler = MAKERS[name](stopped, 7)
        run(stopped, scheduler, stop)
        params = [param for group in stopped.param_groups for param in group["params"]]
        torch.save((params, stopped.state_dict(), scheduler.state_dict()), tmp_path / "checkpoint.pt")

        resumed = two_groups(cls, **options)
        scheduler = MAKERS[name](resumed, 7)
        params, *states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        now = [param for group in resumed.param_groups for param in group["params"]]
        with torch.no_grad():
            for param, saved in zip(now, params, strict=True):
                param.copy_(saved)
        resumed.load_state_dict(states[0])
        scheduler.load_state_dict(states[1])
        assert run(resumed, scheduler, TOTAL + 20 - stop, stop) == lrs[stop:]
        assert_same_bits(now, straight)


@pytest.mark.parametrize("name", MAKERS)
def test_checkpoint_holds_the_numbers_of_the_schedule(name):
    """A schedule made with other numbers goes on by those of the checkpoint, as torch's schedulers do."""
    optimizer = two_groups()
    scheduler = MAKERS[name](optimizer, 7)
    run(optimizer, scheduler, 5)
    checkpoint = optimizer.state_dict(), scheduler.state_dict()
    expected = run(optimizer, scheduler, 20, 5)

    other = two_groups()
    scheduler = MAKERS[name](other, 11)
    other.load_state_dict(checkpoint[0])
    scheduler.load_state_dict(checkpoint[1])
    assert run(other, scheduler, 20, 5) == expected


@every_schedule
@pytest.mark.parametrize("cls", [fusedopt.AdamW, torch.optim.AdamW])
def test_lr_that_is_a_tensor_stays_that_tensor(name, cls):
    lr = torch.tensor(0.3, dtype=torch.float64)
    optimizer = cls(make_params(((13, 7), (5,))), lr=lr, foreach=False)
    scheduler = MAKERS[name](optimizer, 7)
    numbers = cls(make_params(((13, 7), (5,))), lr=0.3, foreach=False)
    same = MAKERS[name](numbers, 7)
    for t in range(TOTAL + 2):
        assert optimizer.param_groups[0]["lr"] is lr
        assert run(optimizer, scheduler, 1, t)[0] == pytest.approx(run(numbers, same, 1, t)[0], rel=1e-13)


BAD = [
    *(
        (name, {**arguments, argument: value}, f"{argument} must be an integer >= {low}, got {value!r}")
        for name, arguments, lowest in (
            ("warmup_cosine", {"total_steps": 9, "warmup_steps": 2}, {"total_steps": 1, "warmup_steps": 0}),
            ("linear", {"total_steps": 9, "warmup_steps": 2}, {"total_steps": 1, "warmup_steps": 0}),
            (
                "warmup_stable_decay",
                {"total_steps": 9, "warmup_steps": 2, "decay_steps": 3},
                {"total_steps": 1, "warmup_steps": 0, "decay_steps": 1},
            ),
            ("inverse_sqrt", {"warmup_steps": 2}, {"warmup_steps": 1}),
            ("step", {"step_size": 9, "warmup_steps": 2}, {"step_size": 1, "warmup_steps": 0}),
            ("one_cycle", {"total_steps": 9, "warmup_steps": 2}, {"total_steps": 3, "warmup_steps": 2}),
        )
        for argument, low in lowest.items()
        for value in (low - 1, -3, 2.0, "2", None, True)
    ),
    *(
        (name, {**arguments, argument: value}, f"{argument} must be {what}")
        for name, arguments, argument in (
            ("warmup_cosine", {"total_steps": 9, "warmup_steps": 2}, "min_lr_ratio"),
            ("linear", {"total_steps": 9, "warmup_steps": 2}, "min_lr_ratio"),
            ("warmup_stable_decay", {"total_steps": 9, "warmup_steps": 2, "decay_steps": 3}, "min_lr_ratio"),
            ("step", {"step_size": 9}, "gamma"),
            ("one_cycle", {"total_steps": 9, "warmup_steps": 2}, "min_lr_ratio"),
            ("one_cycle", {"total_steps": 9, "warmup_steps": 2}, "initial_lr_ratio"),
        )
        for value, what in (
            (-0.1, "in [0, 1], got -0.1"),
            (1.1, "in [0, 1], got 1.1"),
            (math.nan, "in [0, 1], got nan"),
            ("0.1", "a number, got '0.1'"),
            (None, "a number, got None"),
            (True, "a number, got True"),
        )
    ),
    ("warmup_cosine", {"total_steps": 9, "warmup_steps": 10}, "warmup_steps must be at most total_steps, got 10 > 9"),
    ("linear", {"total_steps": 9, "warmup_steps": 10}, "warmup_steps must be at most total_steps, got 10 > 9"),
    (
        "warmup_stable_decay",
        {"total_steps": 9, "warmup_steps": 5, "decay_steps": 5},
        "warmup_steps + decay_steps must be at most total_steps, got 5 + 5 > 9",
    ),
    (
        "warmup_stable_decay",
        {"total_steps": 9, "warmup_steps": 2, "decay_steps": 3, "decay": "sqrt"},
        "decay must be '1-sqrt' or 'linear', got 'sqrt'",
    ),
    ("step", {"step_size": 9, "warmup_steps": 10}, "warmup_steps must be at most step_size, got 10 > 9"),
    ("one_cycle", {"total_steps": 9, "warmup_steps": 9}, "warmup_steps must be less than total_steps, got 9 >= 9"),
    ("one_cycle", {"total_steps": 9, "warmup_steps": 2, "initial_lr_ratio": 0}, "initial_lr_ratio must be above 0"),
    *(
        ("one_cycle", {"total_steps": 9, "warmup_steps": 2, "momentum_range": value}, f"momentum_range{what}")
        for value, what in (
            (0.9, " must be two numbers, got 0.9"),
            ((0.9,), " must be two numbers, got (0.9,)"),
            ((0.95, 0.85), " must rise and be in [0, 1), got (0.95, 0.85)"),
            ((0.85, 1), " must rise and be in [0, 1), got (0.85, 1)"),
            ((0.85, "1"), "[1] must be a number, got '1'"),
        )
    ),
]


@pytest.mark.parametrize("name, arguments, message", BAD)
def test_bad_argument_is_named_and_nothing_changes(name, arguments, message):
    optimizer = two_groups()
    before = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with pytest.raises(ValueError) as error:
        getattr(schedules, name)(optimizer, **arguments)
    assert str(error.value) == message
    after = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    assert after == before


def test_integers_of_numpy_and_torch_are_integers():
    """And are saved as Python's, which weights_only loads."""
    optimizer = two_groups()
    scheduler = schedules.warmup_cosine(optimizer, np.int64(9), torch.tensor(2), torch.tensor(0.5))
    (saved, _) = scheduler.state_dict()["lr_lambdas"]
    assert {name: type(value) for name, value in saved.items() if name != "decay"} == {
        "total_steps": int,
        "warmup_steps": int,
        "decay_steps": int,
        "min_lr_ratio": float,
    }


def test_every_schedule_is_documented_by_an_example_that_runs():
    result = doctest.testmod(schedules)
    assert result.failed == 0 and result.attempted >= 4 * len(schedules.__all__)
    for name in schedules.__all__:
        for heading in ("Args:", "Returns:", "Raises:", "Example:", "Reference:"):
            assert heading in getattr(schedules, name).__doc__, f"{name}: {heading}"
