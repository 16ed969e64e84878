"""Train a classifier over a large table of embeddings, of which a step touches a few rows, and compare with torch.optim.

    pip install fusedopt
    python examples/sparse_embeddings.py                  # some 20 s on two cores
    python examples/sparse_embeddings.py --rows 4000000   # a sparse step takes as long

From a snippet of Python's standard library it guesses the package that it is from, as fastText would: the mean of the
embeddings of its hashed character n-grams, and one linear layer. It is trained three times from one start: by one
fusedopt.Adam, by torch.optim's SparseAdam for the table with Adam for the layer, and with dense gradients.
"""

import argparse
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fusedopt

SNIPPET = 120  # characters
NGRAMS = (2, 3, 4, 5)
NUM_PACKAGES = 8


def packages():
    """(name, text) of the largest packages of the standard library, tests aside: bytes in a tensor."""
    found = []
    for folder in Path(sysconfig.get_path("stdlib")).iterdir():
        if folder.is_dir() and folder.name not in ("site-packages", "test", "idlelib"):
            text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
            found.append(
                (folder.name, torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0))
            )
    found = sorted(found, key=lambda pair: (-len(pair[1]), pair[0]))[:NUM_PACKAGES]
    if len(found) < 2 or len(found[-1][1]) < 10 * SNIPPET:
        sys.exit("sparse_embeddings.py: this Python comes without the source of its standard library")
    return found


def batch(texts, size, num_rows, generator, last=False):
    """Rows of the table for random snippets, (size, n-grams), and their packages; ``last``: from the part not trained on."""
    labels = torch.randint(len(texts), (size,), generator=generator)
    snippets = []
    for label in labels.tolist():
        border = len(texts[label]) * 9 // 10
        low, high = (border, len(texts[label])) if last else (0, border)
        start = low + int(torch.randint(high - low - SNIPPET, (1,), generator=generator))
        snippets.append(texts[label][start : start + SNIPPET])
    text = torch.stack(snippets).long()
    rows = []
    for n in NGRAMS:
        value = torch.full((size, SNIPPET - n + 1), n)
        for k in range(n):
            value = (value * 1_000_003 + text[:, k : SNIPPET - n + 1 + k]) % 2_147_483_647
        rows.append(value % num_rows)
    return torch.cat(rows, dim=1), labels


class Classifier(nn.Module):
    """Mean of embeddings, then a linear layer; calling it with rows and labels returns the mean cross entropy."""

    def __init__(self, num_rows, width, num_labels, sparse):
        super().__init__()
        self.table = nn.EmbeddingBag(num_rows, width, mode="mean", sparse=sparse)
        self.head = nn.Linear(width, num_labels)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, rows, labels):
        return F.cross_entropy(self.head(self.table(rows)), labels)


def train(make_optimizers, sparse, texts, args):
    """(loss of every step, median milliseconds of an optimizer step, share of held-out snippets that are right)"""
    torch.manual_seed(0)
    model = Classifier(args.rows, args.width, len(texts), sparse)
    optimizers = make_optimizers(model, args.lr)
    generator = torch.Generator().manual_seed(1)
    losses, times = [], []
    for _ in range(args.steps):
        loss = model(*batch(texts, args.batch_size, args.rows, generator))
        loss.backward()
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(loss.item())
    rows, labels = batch(texts, 1000, args.rows, generator, last=True)
    with torch.no_grad():
        guesses = model.head(model.table(rows)).argmax(dim=1)
    return losses, statistics.median(times[1:] or times), (guesses == labels).float().mean().item()


def ours(model, lr):
    return [fusedopt.Adam(model.parameters(), lr=lr, sparse="lazy")]


def torch_sparse(model, lr):
    return [torch.optim.SparseAdam(model.table.parameters(), lr=lr), torch.optim.Adam(model.head.parameters(), lr=lr)]


def dense(model, lr):
    return [fusedopt.Adam(model.parameters(), lr=lr)]


RUNS = {
    "fusedopt.Adam, sparse": (ours, True),
    "torch SparseAdam + Adam": (torch_sparse, True),
    "fusedopt.Adam, dense": (dense, False),
}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=500_000, help="of the table (default: %(default)s)")
    parser.add_argument("--width", type=int, default=32, help="of a row (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="snippets (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.rows, args.width, args.batch_size, args.steps) < 1:
        parser.error("--rows, --width, --batch-size and --steps must be at least 1")

    found = packages()
    print(f"packages: {', '.join(name for name, _ in found)}; table {args.rows:,} x {args.width}")
    results = {}
    for name, (make_optimizers, sparse) in RUNS.items():
        losses, milliseconds, right = results[name] = train(make_optimizers, sparse, [text for _, text in found], args)
        shown = " ".join(f"{losses[step]:.3f}" for step in sorted({round(k * (len(losses) - 1) / 4) for k in range(5)}))
        print(
            f"{name:24} loss {shown}, {100 * right:.0f} % of new snippets right, {milliseconds:.2f} ms an optimizer step"
        )
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
