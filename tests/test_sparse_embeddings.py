"""examples/sparse_embeddings.py: it learns, and agrees with torch.optim."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "sparse_embeddings.py"
spec = importlib.util.spec_from_file_location("sparse_embeddings", EXAMPLE)
sparse_embeddings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sparse_embeddings)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_it_learns_and_agrees_with_torch(capsys):
    results = sparse_embeddings.main(
        ["--rows", "20000", "--width", "16", "--steps", "40", "--batch-size", "16", "--lr", "0.03"]
    )
    losses, _, right = results["fusedopt.Adam, sparse"]
    theirs, _, _ = results["torch SparseAdam + Adam"]
    assert losses[0] > 1.9 and sum(losses[-10:]) / 10 < 0.9 * losses[0] and right > 0.3  # by chance: 0.125
    assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) < 0.01  # eps is in another place
    assert capsys.readouterr().out.count("ms an optimizer step") == 3


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        sparse_embeddings.main(["--steps", "0"])
    assert "must be at least 1" in capsys.readouterr().err
