"""How much smaller a sparse checkpoint is: VGG16 as `save_sparse` writes it, beside `torch.save` of its state dict.

Prints a table and adds a JSON line to results/benchmarks.jsonl.

    python benchmarks/checkpoint.py [--sparsities 0.7 0.9 0.95]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from common import ROOT, append

import chtconv
from chtconv.checkpoint import save_sparse
from chtconv.models import build_model

LAYERS = {"all layers sparse": ["*"], "dense head": None}


def bytes_of_files(sparsity: float, layers: list[str] | None) -> dict[str, int]:
    """Bytes of the file of ``torch.save``, and of the sparse one."""
    model = build_model("vgg16", 10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=sparsity, method="static", layers=layers)
    with tempfile.TemporaryDirectory() as folder:
        dense, sparse = Path(folder, "dense.pt"), Path(folder, "sparse.safetensors")
        torch.save(model.state_dict(), dense)
        save_sparse(model, topology, sparse)
        return {"torch.save": dense.stat().st_size, "save_sparse": sparse.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.7, 0.9, 0.95])
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "benchmarks.jsonl")
    options = parser.parse_args()
    rows = {
        f"{sparsity:g}": {name: bytes_of_files(sparsity, layers) for name, layers in LAYERS.items()}
        for sparsity in options.sparsities
    }
    for sparsity, row in rows.items():
        print(sparsity, {name: f"{each['save_sparse'] / each['torch.save']:.1%}" for name, each in row.items()})
    append(options.results, "checkpoint", {"model": "vgg16", "precision": "float32"}, rows=rows)


if __name__ == "__main__":
    main()
