"""The end of a run as a person reads it, in at most 100 columns."""

from pathlib import Path
from typing import Any

_ROW = "{:<18}{:>14}{:>21}{:>9}{:>10}{:>10}{:>10}{:>8}"


def report(summary: dict[str, Any], out: Path, next_command: str) -> str:
    """The text for the content of a summary.json, with the folder it lies in and a command to try next."""
    lines = ["", *_accuracy(summary), ""]
    if summary["layers"]:
        lines += [*_layers(summary["layers"]), ""]
    sparsity = f"{summary['sparsity']:.1%} of the sparse layers, {summary['sparsity_all_parameters']:.1%} of all"
    if summary["layers"]:
        lines.append(f"{'sparsity':<16}{sparsity} parameters; {_counted(summary['evolutions'], 'evolution')}")
    if summary["layers"] and not summary["evolutions"] and summary["config"]["method"] != "static":
        lines.append(f"{'':<16}training ended before the first evolution: try more --epochs or --evolutions-per-epoch")
    lines.append(
        f"{'training':<16}{_counted(summary['epochs'], 'epoch')} in {_duration(summary['seconds'])}, "
        f"{summary['images_per_second']:.0f} images/s; "
        f"of these {_duration(summary['evolution_seconds'])} for evolution"
    )
    lines += _measured(summary["layers"])
    lines.append(f"{'files':<16}{out}")
    if summary["layers"]:
        lines.append(f"{'look inside':<16}chtconv explain {out}")
    lines.append(f"{'compare with':<16}{next_command}")
    return "\n".join(lines)


def _accuracy(summary: dict[str, Any]) -> list[str]:
    rows = [("test accuracy", summary["test_accuracy"], f"last epoch ({summary['test_accuracy_epoch']})")]
    if summary["test_accuracy_at_best_validation"] is not None:
        text = f"epoch {summary['best_validation_epoch']}, the best on the validation images"
        rows.append(("", summary["test_accuracy_at_best_validation"], text))
    text = f"epoch {summary['best_test_epoch']}, the best on the test images, which flatters"
    rows.append(("", summary["best_test_accuracy"], text))
    return [f"{title:<16}{accuracy:6.2%}  {text}" for title, accuracy, text in rows]


def _layers(layers: dict[str, dict[str, Any]]) -> list[str]:
    header = _ROW.format("layer", "shape", "links of size", "sparsity", "removed", "regrown", "re-chosen", "kernels")
    body = [_layer(name.removesuffix(".weight"), row) for name, row in layers.items()]
    total: dict[str, Any] = {
        key: sum(row[key] for row in layers.values()) for key in ("links", "size", "removed", "regrown", "rechosen")
    }
    overlap = total["rechosen"] / total["removed"] if total["removed"] else None
    total |= {"shape": [], "sparsity": 1 - total["links"] / total["size"], "overlap": overlap, "backend": ""}
    return [header, *body, _layer("all", total)]


def _layer(name: str, row: dict[str, Any]) -> str:
    overlap = "-" if row["overlap"] is None else f"{row['overlap']:.1%}"
    return _ROW.format(
        name,
        "x".join(map(str, row["shape"])),
        f"{row['links']:,} of {row['size']:,}",
        f"{row['sparsity']:.1%}",
        f"{row['removed']:,}",
        f"{row['regrown']:,}",
        overlap,
        row["backend"],
    ).rstrip()


def _measured(layers: dict[str, dict[str, Any]]) -> list[str]:
    """A line on what the choice of kernels went by, where they were measured."""
    rows = [row for row in layers.values() if row["dense_seconds"] is not None]
    if not rows:
        return []
    chosen, dense = (1000 * sum(row[key] for row in rows) for key in ("sparse_seconds", "dense_seconds"))
    sparse = sum(row["backend"] == "sparse" for row in rows)
    return [
        f"{'kernels':<16}sparse in {sparse} of {_counted(len(layers), 'layer')}; measured in a step: "
        f"{chosen:.3g} ms all sparse, {dense:.3g} ms dense"
    ]


def _counted(count: int, word: str) -> str:
    """A number of things.

    >>> _counted(1, "epoch"), _counted(0, "epoch")
    ('1 epoch', '0 epochs')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> _duration(5.04), _duration(200), _duration(9000)
    ('5.0 s', '3.3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
