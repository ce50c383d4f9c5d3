"""What came out of a run: the content of summary.json."""

from datetime import datetime, timezone
from typing import Any

from chtconv.sparse_compute import backends
from chtconv.training.run import Run


def summarise(run: Run) -> dict[str, Any]:
    """The summary of a run whose epochs are all done.

    ``test_accuracy``, the headline, is the last epoch's, and so is ``validation_accuracy`` (None without such images).
    Beside them stand the test accuracy of the epoch that was best on the validation images, and the best test epoch,
    which flatters. Accuracies and sparsities are fractions; the earliest epoch wins a tie. ``flops`` are those of
    :meth:`chtconv.training.run.Run.flops`; ``labels`` is a digest of the labels of the data set. ``versions``,
    ``hardware`` and ``commit`` are those of the process that ended the run; ``earlier`` has those of other processes
    that computed part of it, empty where they did not tell.
    """
    metrics, stats = run.metrics, run.topology.stats() if run.topology else None
    seconds = sum(row["seconds"] for row in metrics)
    return {
        **_accuracies(metrics),
        "sparsity": stats["sparsity"] if stats else 0.0,
        "sparsity_all_parameters": _overall_sparsity(run),
        "itop": stats["itop"] if stats else None,
        "flops": run.flops(),
        "evolutions": run.topology.evolutions if run.topology else 0,
        "seconds": seconds,
        "evolution_seconds": sum(row["evolution_seconds"] for row in metrics),
        "evaluation_seconds": sum(row["evaluation_seconds"] for row in metrics),
        "images_per_second": len(run.dataset.train) * len(metrics) / seconds,
        "epochs": len(metrics),
        "steps": metrics[-1]["steps"],
        "seed": run.config.machine.seed,
        "dataset": {
            "name": run.dataset.name,
            "classes": len(run.dataset.classes),
            "train": len(run.dataset.train),
            "validation": len(run.dataset.validation) if run.dataset.validation else 0,
            "test": len(run.dataset.test),
        },
        "labels": run.dataset.labels,
        "layers": layers(run),
        "config": run.config.to_dict(),
        **run.environment,
        "earlier": run.earlier,
        "started": run.started,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def layers(run: Run) -> dict[str, dict[str, Any]]:
    """A row a sparse layer: its shape and links now, and what its evolutions did in total.

    ``removed`` counts links that an evolution took, ``rechosen`` those of them that it gave back at once,
    ``regrown`` those that came where none had been. ``backend`` is the kind of its kernels, with the reason and the
    seconds of its passes in a step that were measured, None where they were not.
    """
    if run.topology is None:
        return {}
    shapes = {name: list(parameter.shape) for name, parameter in run.model.named_parameters()}
    chosen = backends(run.topology)
    rows = {}
    for name, stats in run.topology.stats()["layers"].items():
        own = [record for record in run.records if record["layer"] == name]
        totals = {key: sum(record[key] for record in own) for key in ("removed", "new", "rechosen")}
        rows[name] = {
            "shape": shapes[name],
            "size": stats["size"],
            "links": stats["links"],
            "sparsity": stats["sparsity"],
            "removed": totals["removed"],
            "regrown": totals["new"],
            "rechosen": totals["rechosen"],
            "overlap": totals["rechosen"] / totals["removed"] if totals["removed"] else None,
            "backend": chosen[name].kind,
            "backend_reason": chosen[name].reason,
            "sparse_seconds": chosen[name].sparse_seconds,
            "dense_seconds": chosen[name].dense_seconds,
        }
    return rows


def _accuracies(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    last, best = metrics[-1], max(metrics, key=lambda row: row["test_accuracy"])
    chosen = None
    if last["validation_accuracy"] is not None:
        chosen = max(metrics, key=lambda row: row["validation_accuracy"])
    return {
        "test_accuracy": last["test_accuracy"],
        "test_accuracy_epoch": last["epoch"],
        "validation_accuracy": last["validation_accuracy"],
        "test_accuracy_at_best_validation": chosen and chosen["test_accuracy"],
        "best_validation_epoch": chosen and chosen["epoch"],
        "best_test_accuracy": best["test_accuracy"],
        "best_test_epoch": best["epoch"],
    }


def _overall_sparsity(run: Run) -> float:
    """The share of all parameters, biases and batch norm included, that have no link."""
    absent = sum(int(mask.logical_not().sum()) for mask in run.masks().values())
    return absent / sum(parameter.numel() for parameter in run.model.parameters())
