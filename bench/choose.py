"""``python -m bench choose``: every optimizer of fusedopt trains two small models on real data; its memory; its time.

Both tasks take parameter groups, clipping and schedule of their recipe: `fusedopt.recipes.transformer_pretraining` and
`image_from_scratch`. The lr of each optimizer is that of its grid whose validation loss is lowest in a run with one seed; the
figures are those of other seeds on test data. Grid, steps and seeds are the same for all. A training runs in one thread, so
that its losses are the same on any number of cores.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import sklearn
import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fusedopt
from bench import report, step
from examples import train_gpt

SCHEMA = 1
CURVE_POINTS = 20  # of the training loss: means over as many equal parts of a run
REFERENCE = "in-place add"
WORKLOAD, BLOCK_MS = "10x1m", 20  # of the timing
BETAS = {"betas": (0.9, 0.95)}  # as the recipe for transformers, for all with Adam's two averages
DECOUPLED = {"decoupled_weight_decay": True}


@dataclass(frozen=True)
class Row:
    """One optimizer as it takes part, and what the literature says of it.

    ``lr`` is the middle of the grid, by task. ``weight_decay`` is the recipe's 0.1 where it is decoupled (three times that for
    Lion, as its paper says), 1e-4 for SGD (He et al. 2016), and 0 where it would be divided by the root of Adam's average.
    """

    name: str
    cls: type
    options: dict[str, Any]
    weight_decay: float
    lr: dict[str, float]
    adaptive: str
    momentum: str
    best_for: str  # and the source
    gradients: int = 1  # a step
    budget: int = 1  # gradients that a training may take, in times those of the other rows
    has_warmup: bool = True
    variant_of: str = ""


SGD = Row(
    "SGD with momentum", fusedopt.SGD, {"momentum": 0.9}, 1e-4, dict(gpt=0.1, digits=0.1), "no", "yes",
    "convolutional networks for images (He et al. 2016)",
)  # fmt: skip
ADAMW = Row(
    "AdamW", fusedopt.AdamW, BETAS, 0.1, dict(gpt=3e-3, digits=1e-2), "yes", "yes",
    "transformers, from scratch and fine-tuned (Loshchilov & Hutter 2019)",
)  # fmt: skip
RADAM = Row(
    "RAdam", fusedopt.RAdam, BETAS | DECOUPLED, 0.1, dict(gpt=3e-3, digits=1e-2), "yes", "yes",
    "Adam without a warmup to tune (Liu et al. 2020)",
)  # fmt: skip
SAM_SGD = Row(
    "SAM(SGD)", fusedopt.SAM, {"base": fusedopt.SGD, **SGD.options}, SGD.weight_decay, SGD.lr, "no", "yes",
    "generalisation of image models (Foret et al. 2021)", gradients=2,
)  # fmt: skip
SAM_ADAMW = Row(
    "SAM(AdamW)", fusedopt.SAM, {"base": fusedopt.AdamW, **BETAS}, ADAMW.weight_decay, ADAMW.lr, "yes", "yes",
    "vision transformers on little data (Chen et al. 2022)", gradients=2,
)  # fmt: skip
ROWS = {
    row.name: row
    for row in (
        Row("SGD", fusedopt.SGD, {}, 1e-4, dict(gpt=1.0, digits=0.3), "no", "no", "no memory to spare (Bottou et al. 2018)"),
        SGD,
        Row(
            "Adagrad", fusedopt.Adagrad, {}, 0, dict(gpt=1e-2, digits=0.1), "yes", "no",
            "sparse features and embeddings (Duchi et al. 2011)",
        ),
        Row(
            "RMSprop", fusedopt.RMSprop, {"alpha": 0.95}, 0, dict(gpt=3e-3, digits=1e-2), "yes", "optional",
            "recurrent networks (Graves 2013), deep Q-learning (Mnih et al. 2015)",
        ),
        Row(
            "Adam", fusedopt.Adam, BETAS, 0, dict(gpt=3e-3, digits=1e-2), "yes", "yes",
            "recurrent networks; a first try (Kingma & Ba 2015)",
        ),
        Row(
            "AMSGrad", fusedopt.AdamW, BETAS | {"amsgrad": True}, 0.1, dict(gpt=3e-3, digits=1e-2), "yes", "yes",
            "rare large gradients, on which Adam need not converge (Reddi et al. 2018)",
        ),
        ADAMW,
        Row(
            "NAdam", fusedopt.NAdam, BETAS | DECOUPLED, 0.1, dict(gpt=3e-3, digits=1e-2), "yes", "Nesterov",
            "as Adam, with Nesterov momentum (Dozat 2016)",
        ),
        RADAM,
        Row(
            "Lion", fusedopt.Lion, {}, 0.3, dict(gpt=1e-3, digits=3e-3), "sign", "yes",
            "half of AdamW's memory; large batches (Chen et al. 2023)",
        ),
        Row(
            "Adan", fusedopt.Adan, {}, 0.1, dict(gpt=1e-2, digits=3e-2), "yes", "Nesterov",
            "vision transformers in fewer epochs (Xie et al. 2022)",
        ),
        Row(
            "LAMB", fusedopt.LAMB, BETAS, 0.1, dict(gpt=3e-2, digits=3e-2), "yes, and by tensor", "yes",
            "batches of many thousands (You et al. 2020)",
        ),
        Row(
            "StableAdamW", fusedopt.StableAdamW, {}, 0.1, dict(gpt=3e-3, digits=1e-2), "yes", "yes",
            "low precision, spikes of the loss (Wortsman et al. 2023)",
        ),
        SAM_SGD,
        SAM_ADAMW,
    )
}  # fmt: skip
VARIANTS = {  # with one thing changed; memory and time are the row's own
    row.name: row
    for row in (
        replace(ADAMW, name="AdamW without warmup", variant_of="AdamW", has_warmup=False),
        replace(RADAM, name="RAdam without warmup", variant_of="RAdam", has_warmup=False),
        replace(SAM_SGD, name="SAM(SGD), twice the gradients", variant_of="SAM(SGD)", budget=2),
        replace(SAM_ADAMW, name="SAM(AdamW), twice the gradients", variant_of="SAM(AdamW)", budget=2),
    )
}
ALL = ROWS | VARIANTS


@dataclass(frozen=True)
class Budget:
    """What every row gets."""

    steps: dict[str, int]  # by task; gradients, where a step takes several
    grid: tuple[float, ...]  # times the middle lr of the row, in order
    seeds: tuple[int, ...]
    rounds: int  # of the timing
    tuning_seed: int = 0


FULL = Budget({"gpt": 300, "digits": 150}, (0.1, 0.3, 1.0, 3.0, 10.0), (1, 2, 3), rounds=15)
QUICK = Budget({"gpt": 2, "digits": 2}, (1.0,), (1, 2), rounds=2)


class Gpt:
    """A byte-level GPT of 0.08M parameters on the source of Python's standard library; the held-out files are halved."""

    max_grad_norm, min_lr_ratio = 1.0, 0.1  # those of the recipe
    warmup = 0.1  # of the steps; the recipe's 0.8 % would be two

    def __init__(self):
        self.args = SimpleNamespace(text=None, context=32, batch_size=8, device=torch.device("cpu"), settings={})
        training, held_out = train_gpt.read_text(self.args)
        half = len(held_out) // 2
        self.parts = {"train": training, "validation": held_out[:half], "test": held_out[half:]}

    def model(self) -> nn.Module:
        return train_gpt.GPT(layers=2, width=48, heads=4, context=self.args.context)

    def batch(self, order: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        text = self.parts["train"]
        starts = torch.randint(len(text) - self.args.context, (self.args.batch_size,), generator=order)
        return train_gpt.windows(text, starts, self.args)

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(inputs, targets)

    def measure(self, model: nn.Module, part: str) -> dict[str, float]:
        return {"loss": train_gpt.validate(model, self.parts[part], self.args)}


class Digits:
    """A small convolutional network on scikit-learn's digits, 8×8 images: 500 to train, 297 to choose the lr, 1000 to test."""

    max_grad_norm, min_lr_ratio, warmup = None, 0.0, 5 / 90  # those of the recipe
    batch_size = 50

    def __init__(self):
        digits = load_digits()
        shuffled = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.images, dtype=torch.float32)[shuffled, None] / 16
        targets = torch.tensor(digits.target)[shuffled]
        names, sizes = ("train", "validation", "test"), (500, 297, 1000)
        self.parts = dict(zip(names, zip(images.split(sizes), targets.split(sizes), strict=True), strict=True))

    def model(self) -> nn.Module:
        def block(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

        return nn.Sequential(*block(1, 8), *block(8, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))

    def batch(self, order: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = self.parts["train"]
        chosen = torch.randint(len(images), (self.batch_size,), generator=order)
        return images[chosen], targets[chosen]

    def loss(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(inputs), targets)

    @torch.no_grad()
    def measure(self, model: nn.Module, part: str) -> dict[str, float]:
        images, targets = self.parts[part]
        outputs = model.eval()(images)
        accuracy = (outputs.argmax(1) == targets).float().mean()
        return {"loss": F.cross_entropy(outputs, targets).item(), "accuracy": accuracy.item()}


TASKS = {"gpt": Gpt, "digits": Digits}


@functools.cache
def task(name: str) -> Gpt | Digits:
    """Read once a process."""
    return TASKS[name]()


@dataclass(frozen=True)
class Training:
    """One training, and on which part of the data its model is measured."""

    row: str
    task: str
    lr: float
    seed: int
    steps: int
    part: str


def optimizer_of(row: Row, model: nn.Module, data: Gpt | Digits, lr: float, steps: int) -> tuple[Any, Any]:
    """Optimizer and scheduler as the task's recipe makes them; by hand, since recipes take no SAM."""
    groups = fusedopt.param_groups_weight_decay(model, row.weight_decay)
    optimizer = row.cls(groups, lr=lr, max_grad_norm=data.max_grad_norm, **row.options)
    warmup_steps = round(data.warmup * steps) if row.has_warmup else 0
    return optimizer, fusedopt.schedules.warmup_cosine(optimizer, steps, warmup_steps, data.min_lr_ratio)


def train(training: Training) -> dict[str, Any]:
    """Loss and accuracy of the trained model, and the curve of its training loss.

    Weights and batches follow from the seed alone, so that they are the same for all rows.
    """
    data = task(training.task)
    torch.manual_seed(training.seed)
    order = torch.Generator().manual_seed(training.seed)
    model = data.model()
    optimizer, scheduler = optimizer_of(ALL[training.row], model, data, training.lr, training.steps)
    losses = []
    for _ in range(training.steps):
        batch = data.batch(order)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = data.loss(model, *batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())  # SAM calls it twice
        scheduler.step()
    curve = [part.mean().item() for part in torch.tensor(losses).tensor_split(min(CURVE_POINTS, len(losses)))]
    measured = data.measure(model, training.part)
    return {**{name: finite(value) for name, value in measured.items()}, "curve": [*map(finite, curve)]}


def finite(value: float) -> float | None:
    """With four digits after the point; for NaN and infinity None, which JSON can say."""
    return round(value, 4) if math.isfinite(value) else None


def planned(budget: Budget, lrs: Callable[[Row, str], list[float]], seeds: Iterable[int], part: str) -> list[Training]:
    """The trainings of all rows, each at the lrs that ``lrs(row, task)`` gives."""
    return [
        Training(row.name, name, lr, seed, max(1, budget.steps[name] * row.budget // row.gradients), part)
        for name in TASKS
        for row in ALL.values()
        for lr in lrs(row, name)
        for seed in seeds
    ]


def grid(row: Row, name: str, budget: Budget) -> list[float]:
    return [float(f"{factor * row.lr[name]:.1g}") for factor in budget.grid]


def best_lr(losses: list[tuple[float, float | None]]) -> float:
    """Of (lr, loss) the lr with the lowest loss; one that is not finite is higher than all others."""
    return min(losses, key=lambda pair: math.inf if pair[1] is None else pair[1])[0]


def bytes_made(act: Callable[[], Any]) -> int:
    """Of the tensors that a call leaves behind, all that Python knows of: SAM keeps some that are in no ``state``."""
    gc.freeze()  # get_objects will not see what is there already
    act()
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor):
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    gc.unfreeze()
    return sum(storages.values())


def step_of(row: Row, params: list[nn.Parameter]) -> Callable[[], Any]:
    """One clipped step along the gradients there are; of SAM ascent and step, without the gradient between them."""
    optimizer = row.cls(params, lr=1e-4, weight_decay=row.weight_decay, max_grad_norm=1.0, **row.options)
    if row.gradients == 1:
        return optimizer.step

    def both_steps():
        optimizer.first_step()
        optimizer.second_step()

    return both_steps


def time_steps(rounds: int) -> dict[str, Any]:
    """Memory and time of a clipped float32 step of every row, and in-place add of as many elements, in turn in each round."""
    start, grads = step.make_data(tuple(step.WORKLOADS[WORKLOAD]), "cpu")
    params = [nn.Parameter(value.clone()) for value in start]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    numel = sum(param.numel() for param in params)
    steps, state_bytes = {}, {}
    for row in ROWS.values():
        steps[row.name] = step_of(row, params)
        state_bytes[row.name] = bytes_made(steps[row.name]) / numel
    target, addend = (torch.ones(numel) for _ in range(2))
    steps[REFERENCE] = functools.partial(target.add_, addend)
    counts = {name: max(1, round(BLOCK_MS / step.time_blocks(one, 1, "cpu"))) for name, one in steps.items()}
    ms = {name: [] for name in steps}
    before = step.cpu_seconds()
    for _ in progress(range(rounds), "timing a step"):
        for name, one in steps.items():
            ms[name].append(step.time_blocks(one, counts[name], "cpu") / numel * 1e6)
    return {
        "state_bytes_per_param": state_bytes,
        "ms_per_million_params": ms,
        "params": numel,
        "threads": torch.get_num_threads(),
        "cores_used_by_others": step.cores_used_by_others(before),
    }


def progress(work: Iterable, what: str, total: int | None = None) -> Iterable:
    return track(work, what, total, transient=True, disable=not sys.stderr.isatty())


def run(budget: Budget) -> dict[str, Any]:
    """All that the page shows, and every sample of it."""
    began = time.perf_counter()
    timing = time_steps(budget.rounds)
    rows = {name: {row: {"validation": [], "test": []} for row in ALL} for name in TASKS}
    with concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:

        def measure(plan: list[Training], what: str) -> Iterable[tuple[Training, dict[str, Any]]]:
            return zip(plan, progress(pool.map(train, plan), what, len(plan)), strict=True)

        plan = planned(budget, lambda row, name: grid(row, name, budget), [budget.tuning_seed], "validation")
        for training, outcome in measure(plan, "choosing the lr"):
            rows[training.task][training.row]["validation"].append((training.lr, outcome["loss"]))
        for row in itertools.chain(*(of_task.values() for of_task in rows.values())):
            row["lr"] = best_lr(row["validation"])
        plan = planned(budget, lambda row, name: [rows[name][row.name]["lr"]], budget.seeds, "test")
        for training, outcome in measure(plan, "testing"):
            rows[training.task][training.row]["test"].append({"seed": training.seed, **outcome})
    return {
        "schema": SCHEMA,
        "machine": {**report.machine(), "scikit-learn": sklearn.__version__},
        "seconds": round(time.perf_counter() - began),
        "budget": asdict(budget),
        "text_crc32": task("gpt").args.settings["text_crc32"],
        "options": {row.name: {"weight_decay": row.weight_decay, **row.options} for row in ALL.values()},
        "timing": timing,
        "tasks": rows,
    }


def as_json(results: dict[str, Any]) -> str:
    """Lists of numbers on one line each; classes by their names."""
    text = json.dumps(results, indent=1, default=lambda cls: cls.__name__)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda numbers: re.sub(r"\s+", " ", numbers.group()), text) + "\n"
