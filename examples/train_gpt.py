"""Train a small byte-level GPT with fusedopt, and next to it the same GPT with torch.optim, and compare the two.

    pip install fusedopt rich matplotlib
    python examples/train_gpt.py                          # AdamW on the source of Python's standard library
    python examples/train_gpt.py --text book.txt --optimizer lion --steps 1000
    python examples/train_gpt.py --save-every 200         # if it was stopped:
    python examples/train_gpt.py --resume runs/train_gpt/step200.pt

The folder --out (runs/train_gpt) receives the checkpoints, the loss curves as a picture and the results as JSON.
A resumed run ends with the same bits as one that never stopped (on a GPU only if torch's kernels are deterministic).

Two places differ from the same training with torch.optim. Each is marked with "was:".
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import fusedopt

matplotlib.use("Agg")  # needs no display
from matplotlib import pyplot

OPTIMIZERS = {  # name: class, default learning rate, default weight decay, arguments, arguments for torch only
    "adamw": ("AdamW", 3e-4, 0.1, {"betas": (0.9, 0.95)}, {"fused": True}),
    "adam": ("Adam", 3e-4, 0.0, {"betas": (0.9, 0.95)}, {"fused": True}),
    "amsgrad": ("AdamW", 3e-4, 0.1, {"betas": (0.9, 0.95), "amsgrad": True}, {"fused": True}),
    "nadam": ("NAdam", 3e-4, 0.1, {"betas": (0.9, 0.95), "decoupled_weight_decay": True}, {}),
    "lion": ("Lion", 1e-4, 0.3, {}, {}),
    "rmsprop": ("RMSprop", 2e-4, 0.0, {"alpha": 0.95}, {}),
    "adagrad": ("Adagrad", 2e-3, 0.0, {}, {"fused": True}),
    "sgd": ("SGD", 0.05, 1e-4, {"momentum": 0.9, "nesterov": True}, {"fused": True}),
}
# What a resumed run may do differently from the run it continues.
FREE = {"text", "device", "backend", "threads", "out", "resume", "save_every", "no_compare"}


def fail(message):
    """End with one line that says what to change."""
    print(f"train_gpt.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Decoder-only transformer over bytes; calling it with inputs and targets returns the mean cross entropy."""

    def __init__(self, layers, width, heads, context):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        x = self.blocks(self.token(x) + self.position[: x.shape[1]])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), y.flatten())


def make_optimizer(model, args, ours):
    """fusedopt's optimizer, or (ours=False) the same one of torch.optim, with its schedule; the recipe serves both."""
    cls, _, _, options, torch_only = OPTIMIZERS[args.optimizer]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "warmup_steps": max(1, args.steps // 20), **options}
    if ours:
        # was: settings |= {"optimizer": torch.optim.AdamW, "max_grad_norm": None, "fused": True}
        settings |= {"optimizer": getattr(fusedopt, cls), "max_grad_norm": args.max_grad_norm, "backend": args.backend}
    else:
        settings |= {"optimizer": getattr(torch.optim, cls), "max_grad_norm": None, **torch_only}
    return fusedopt.recipes.transformer_pretraining(model, args.steps, **settings)


def windows(text, starts, args):
    """Inputs and targets: the bytes from each start on, and the same bytes one further."""
    window = text[starts[:, None] + torch.arange(args.context + 1)].long().to(args.device)
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def validate(model, text, args):
    """Mean loss over at most 64 evenly spaced windows: always the same ones, so that runs can be compared."""
    starts = torch.linspace(0, len(text) - args.context - 1, 64, dtype=torch.float64).long().unique()
    parts = starts.split(args.batch_size)
    return sum(model(*windows(text, part, args)).item() * len(part) for part in parts) / len(starts)


def now(args):
    if args.device.type == "cuda":
        torch.cuda.synchronize(args.device)
    return time.perf_counter()


def save(state, path):
    """Write a checkpoint under another name and rename it, so that an interrupted write leaves no broken file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


class Run:
    """A model in training, with fusedopt's optimizer or torch's, and what was measured of it."""

    def __init__(self, args, ours, resumed):
        torch.manual_seed(args.seed)
        self.args, self.ours = args, ours
        self.model = GPT(args.layers, args.width, args.heads, args.context).to(args.device)
        self.optimizer, self.scheduler = make_optimizer(self.model, args, ours)
        self.library = "fusedopt" if ours else "torch.optim"
        self.measured = {"name": f"{self.library}.{type(self.optimizer).__name__}"}
        self.measured.update(loss=[], grad_norm=[], step_ms=[], optimizer_ms=[], validation=[])
        if resumed:
            if not ours:  # torch takes this from the checkpoint, which is fusedopt's
                for group in resumed["optimizer"]["param_groups"]:
                    group.update(OPTIMIZERS[args.optimizer][4])
            for name in ("model", "optimizer", "scheduler"):
                getattr(self, name).load_state_dict(resumed[name])

    def state_dict(self):
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}

    def step(self, inputs, targets):
        """One step of training; returns what there is to say about it."""
        lr = self.scheduler.get_last_lr()[0]
        began = now(self.args)
        self.optimizer.zero_grad()
        loss = self.model(inputs, targets)
        loss.backward()
        backward_done = now(self.args)
        if self.ours:
            # was: grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()  # clips too
            grad_norm = self.optimizer.grad_norm
        else:
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
        ended = now(self.args)
        self.scheduler.step()

        step_seconds, optimizer_seconds = ended - began, ended - backward_done
        self.measured["loss"].append(loss.item())
        self.measured["grad_norm"].append(grad_norm.item())
        self.measured["step_ms"].append(1e3 * step_seconds)
        self.measured["optimizer_ms"].append(1e3 * optimizer_seconds)
        return (
            f"loss {loss.item():.3f} grad {grad_norm.item():.2f} lr {lr:.1e} "
            f"{inputs.numel() / step_seconds:,.0f} tok/s optimizer {optimizer_seconds / step_seconds:.0%}"
        )


def train(args, runs, training_text, validation_text, resumed, console):
    """Train on the same data in the same order; in turns, so that a busy moment of the machine slows all runs alike."""
    data_order = torch.Generator().manual_seed(args.seed)
    first = 0
    if resumed:
        first = resumed["step"]
        data_order.set_state(resumed["data_order"])

    def due(step, every):
        return step % every == 0 or step == args.steps

    columns = "{task.description}", BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as progress:
        bars = [progress.add_task(run.library, total=args.steps, completed=first, status="") for run in runs]
        for step in range(first + 1, args.steps + 1):
            starts = torch.randint(len(training_text) - args.context, (args.batch_size,), generator=data_order)
            inputs, targets = windows(training_text, starts, args)
            for run, bar in zip(runs, bars, strict=True):
                status = run.step(inputs, targets)
                progress.update(bar, completed=step, status=status)
                if not console.is_terminal and due(step, 20):
                    print(f"{step}/{args.steps} {run.library:11} {status}", flush=True)
                if due(step, 100):
                    validation = validate(run.model, validation_text, args)
                    run.measured["validation"].append((step, validation))
                    print(f"{step}/{args.steps} {run.library:11} validation loss {validation:.3f}", flush=True)
            if due(step, args.save_every or args.steps):
                state = {"settings": args.settings, "step": step, "data_order": data_order.get_state()}
                save({**state, **runs[0].state_dict()}, args.out / f"step{step}.pt")


def report(args, runs, console):
    """Print what was measured, side by side, and write the loss curves and the results into the folder args.out."""
    runs = [run.measured for run in runs]
    ours, theirs = runs[0], runs[1] if len(runs) > 1 else None
    for run in runs:
        run["median_optimizer_ms"] = statistics.median(run["optimizer_ms"])
        run["optimizer_share"] = run["median_optimizer_ms"] / statistics.median(run["step_ms"])
    last = min(20, len(ours["loss"]))
    table = Table("", *(run["name"] for run in runs))
    table.add_row(
        f"train loss of the last {last} steps", *(f"{statistics.fmean(run['loss'][-last:]):.4f}" for run in runs)
    )
    table.add_row("validation loss", *(f"{run['validation'][-1][1]:.4f}" for run in runs))
    table.add_row("clip + optimizer step, median", *(f"{run['median_optimizer_ms']:.2f} ms" for run in runs))
    table.add_row("its share of the training step", *(f"{run['optimizer_share']:.1%}" for run in runs))

    figure, (top, bottom) = pyplot.subplots(2, sharex=True, figsize=(8, 7), height_ratios=(2, 1), layout="constrained")
    steps = range(args.steps - len(ours["loss"]) + 1, args.steps + 1)
    for run, style in zip(runs, ("-", "--"), strict=False):
        (curve,) = top.plot(steps, run["loss"], style, label=run["name"], linewidth=1)
        top.plot(*zip(*run["validation"], strict=True), "o", color=curve.get_color())
    top.set(ylabel="loss (dots: validation)")
    top.legend()
    bottom.set(xlabel="step", ylabel="gradient norm before clipping")
    results = {"settings": args.settings, "threads": torch.get_num_threads(), "ours": ours, "torch": theirs}
    if theirs:
        table.caption = f"torch.optim with {OPTIMIZERS[args.optimizer][4] or 'its defaults'}, after clip_grad_norm_"
        difference = [abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=True)]
        results["max_loss_difference"] = max(difference)
        results["speedup"] = theirs["median_optimizer_ms"] / ours["median_optimizer_ms"]
        table.add_row("largest difference of the train losses", f"{max(difference):.1e}")
        table.add_row("time of torch / time of fusedopt", f"{results['speedup']:.2f}")
        bottom.set(ylabel="|difference of the train losses|")
    bottom.plot(steps, difference if theirs else ours["grad_norm"], linewidth=1)
    figure.savefig(args.out / "loss.png", dpi=120)
    pyplot.close(figure)
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    console.print(table)
    print(f"Wrote loss.png, results.json and step{args.steps}.pt in {args.out}")


def read_text(args):
    """The training part and the held-out last twentieth of the text, as tensors of bytes."""
    try:
        if args.text:
            text = args.text.read_bytes()
            text.decode()
        else:
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        fail(f"cannot read the text {error.filename}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--text {args.text} is not UTF-8 text: {error.reason} at byte {error.start}")
    needed = 20 * (args.context + 1)
    if len(text) < needed:
        fail(f"the text has {len(text)} bytes; with --context {args.context} at least {needed} are needed")
    args.settings["text_crc32"] = zlib.crc32(text)
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return text[: len(text) * 19 // 20], text[len(text) * 19 // 20 :]


def read_checkpoint(args):
    try:
        state = torch.load(args.resume, map_location="cpu", weights_only=True)
        step, settings = state["step"], dict(state["settings"])
    except OSError as error:
        fail(f"cannot read --resume {args.resume}: {error.strerror}")
    except Exception:  # torch.load raises many kinds for a file of another format
        fail(f"--resume {args.resume} is not a checkpoint of this program")
    for name, value in args.settings.items():
        if settings.get(name) != value:
            fail(f"--resume {args.resume} was made with {name} {settings.get(name)}, not {value}")
    if step >= args.steps:
        fail(f"--resume {args.resume} has done all of its {step} steps")
    return state


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    add, default = parser.add_argument, "(%(default)s)"
    add("--text", type=Path, metavar="FILE", help="UTF-8 text (the source of Python's standard library)")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help=default)
    add("--lr", type=float, help="highest learning rate (one that suits the optimizer)")
    add("--weight-decay", type=float, help="of the matrices (one that suits the optimizer)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradients to it; inf: do not " + default)
    add("--steps", type=int, default=500, help=default)
    add("--batch-size", type=int, default=4, help="sequences per step " + default)
    add("--context", type=int, default=32, help="bytes per sequence " + default)
    add("--layers", type=int, default=4, help=default)
    add("--width", type=int, default=384, help=default)
    add("--heads", type=int, default=6, help=default)
    add("--seed", type=int, default=0, help="of the weights and of the order of the data " + default)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N " + default)
    add("--backend", help="of fusedopt (the best one for the device)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("--out", type=Path, metavar="DIR", default="runs/train_gpt", help="for all that is written " + default)
    add("--resume", type=Path, metavar="FILE", help="checkpoint to continue from; the other settings must be the same")
    add("--save-every", type=int, metavar="STEPS", help="between checkpoints (only one, at the end)")
    add("--no-compare", action="store_true", help="train with fusedopt only")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and name not in ("seed", "weight_decay") and not value > 0:
            fail(f"--{name.replace('_', '-')} must be above 0, got {value}")
    _, lr, weight_decay, _, _ = OPTIMIZERS[args.optimizer]
    args.lr = lr if args.lr is None else args.lr
    args.weight_decay = weight_decay if args.weight_decay is None else args.weight_decay
    args.settings = {name: value for name, value in vars(args).items() if name not in FREE}
    if args.width % args.heads:
        fail(f"--width {args.width} is not divisible by --heads {args.heads}")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed must be from 0 to 2**63 - 1, got {args.seed}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} is not available: {str(error).splitlines()[0]}")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device must be cpu, cuda or cuda:N, not {args.device}")
    args.device = device
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.json").touch()
    except OSError as error:
        fail(f"cannot write into --out {args.out}: {error.strerror}")
    try:  # find out now, not after reading the text, whether the backend serves the device
        probe = nn.Linear(1, 1).to(args.device)
        probe(torch.ones(1, 1, device=args.device)).sum().backward()
        optimizer, _ = make_optimizer(probe, args, ours=True)
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        fail(error)
    return args


def main(argv=None):
    try:
        args = parse_args(argv)
        training_text, validation_text = read_text(args)
        resumed = read_checkpoint(args) if args.resume else None
        console = Console()
        runs = [Run(args, True, resumed)]
        if not hasattr(torch.optim, OPTIMIZERS[args.optimizer][0]):
            print(f"torch.optim has no {OPTIMIZERS[args.optimizer][0]}, so there is nothing to compare with.")
        elif not args.no_compare:
            runs.append(Run(args, False, resumed))
        size = sum(p.numel() for p in runs[0].model.parameters())
        print(f"{size / 1e6:.1f} million parameters, {len(training_text) / 1e6:.1f} MB of text, on {args.device}")
        train(args, runs, training_text, validation_text, resumed, console)
        report(args, runs, console)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
