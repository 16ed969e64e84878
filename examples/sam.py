"""Train a small network on handwritten digits with SGD, and with SAM around the same SGD, and compare.

    pip install fusedopt scikit-learn rich
    python examples/sam.py                  # 1,797 real images that come with scikit-learn; 20 seconds on a CPU
    python examples/sam.py --adaptive --rho 0.5

Both take the same number of gradients: SAM takes two a step, so it makes half as many steps. Each line is the mean over --seeds
runs. "sharpness" is what SAM lowers: how much the training loss rises on the way to the worst point at the distance 0.05.
"""

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import fusedopt


def load_data(seed):
    """(images, labels) to train on, a third of all, and the rest to test with."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(labels) // 3], order[len(labels) // 3 :]
    return (images[train], labels[train]), (images[test], labels[test])


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def sharpness(model, images, labels):
    """The rise of the loss along the ascent of SAM."""
    probe = fusedopt.SAM(model.parameters(), rho=0.05)
    probe.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    probe.first_step(zero_grad=True)
    with torch.no_grad():
        rise = F.cross_entropy(model(images), labels) - loss
    probe.restore()  # the weights are what they were, bit for bit
    return float(rise)


def train(args, is_sam, seed):
    """(test loss, test accuracy, sharpness)"""
    torch.manual_seed(seed)
    model = make_model()
    (images, labels), (test_images, test_labels) = load_data(seed)
    options = dict(lr=args.lr, momentum=0.9, weight_decay=1e-4)
    if is_sam:
        optimizer = fusedopt.SAM(model.parameters(), fusedopt.SGD, rho=args.rho, adaptive=args.adaptive, **options)
    else:
        optimizer = fusedopt.SGD(model.parameters(), **options)
    steps = args.gradients // 2 if is_sam else args.gradients
    scheduler = fusedopt.schedules.warmup_cosine(optimizer, steps, steps // 20, min_lr_ratio=0.0)
    for _ in range(steps):
        batch = torch.randint(len(labels), (args.batch,))

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            return loss

        optimizer.step(closure)  # SAM calls it twice
        scheduler.step()
    with torch.no_grad():
        logits = model(test_images)
    accuracy = (logits.argmax(1) == test_labels).float().mean()
    return float(F.cross_entropy(logits, test_labels)), float(accuracy), sharpness(model, images, labels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradients", type=int, default=1000, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--adaptive", action="store_true", help="ASAM")
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a network is slower with more
    table = Table("optimizer", "test loss", "test accuracy", "sharpness")
    for is_sam in (False, True):
        runs = [train(args, is_sam, seed) for seed in range(args.seeds)]
        loss, accuracy, sharp = (statistics.mean(values) for values in zip(*runs, strict=True))
        name = ("ASAM" if args.adaptive else "SAM") + "(SGD)" if is_sam else "SGD"
        table.add_row(name, f"{loss:.3f}", f"{accuracy:.1%}", f"{sharp:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
