"""Tables of the benchmarks: the latest line of each in results/benchmarks.jsonl."""

from collections.abc import Callable
from functools import partial
from typing import Any

from layout import ROOT, cell, markdown, quartiles, read

from chtconv.comparison.cell import METHOD_NAMES


def lines_of(benchmark: str, file: str = "benchmarks.jsonl") -> list[dict[str, Any]]:
    """The lines of a benchmark, the latest one last."""
    return [line for line in read(file) if line["benchmark"] == benchmark]


def evolution() -> str:
    """The latest benchmark: each action as a part of the dense step of its round."""
    lines = lines_of("evolution")
    if not lines:
        return ""
    rows = [
        [name, f"{row['seconds']:.3f}", f"{row['ratio']:.3f}", f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"]
        for name, row in lines[-1]["rows"].items()
    ]
    return markdown(["action", "seconds", "of a dense step", "quartiles"], rows)


def link_prediction() -> str:
    """The latest benchmark of link prediction: ratios of times, with their goals."""
    lines = lines_of("link_prediction")
    if not lines:
        return ""
    rows = [
        [row["name"], f"{row['ratio']:.3g}", f"{row['low']:.3g} to {row['high']:.3g}", f"{row['seconds']:.3g}"]
        for row in lines[-1]["rows"]
    ]
    notes = [f"{row['name']}: {row['note']}." for row in lines[-1]["rows"] if row["note"]]
    table = markdown(["times compared", "ratio (median)", "range", "seconds of the first"], rows)
    return "\n\n".join([table, *notes])


def stages() -> str:
    """Where the time of an evolution goes, on each graph; from the latest benchmark of link prediction that says so."""
    lines = lines_of("link_prediction")
    latest = [found for line in lines if (found := [row for row in line["rows"] if "stages" in row])][-1:]
    if not latest:
        return ""
    totals = [sum(row["stages"].values()) for row in latest[0]]
    body = [
        [stage, *(f"{row['stages'][stage] / total:.1%}" for row, total in zip(latest[0], totals, strict=True))]
        for stage in latest[0][0]["stages"]
    ]
    ideal = ["(the products, at the machine's own GEMM rate)", *(f"{row['ratio']:.1%}" for row in latest[0])]
    seconds = ["seconds, profiled", *(f"{total:.3g}" for total in totals)]
    header = ["stage of an evolution", *(f"{row['graph']} graph" for row in latest[0])]
    return markdown(header, [*body, ideal, seconds])


def training_step() -> str:
    """The latest benchmark of training steps: masked beside dense ones, and what the methods add to 100 of them."""
    lines = lines_of("training_step")
    if not lines:
        return ""
    line = lines[-1]
    batches, held = line["configuration"]["batches"], line["bytes_per_weight"]
    steps = [
        [f"{name}, batch {batches[name.split(',')[0]]}", f"{row['dense_seconds']:.3f}"]
        + [quartiles(row[key]) if key in row else "" for key in ("chtconv", "rigl-torch")]
        for name, row in line["steps"].items()
    ]
    each = [[held[key][when] for key in held] for when in ("between_evolutions", "before_an_evolution")]
    for name, values in zip(("extra bytes a weight", "the same, before an evolution of RigL"), each, strict=True):
        steps.append([name, "", *(f"{value:.0f}" for value in values), *[""] * (2 - len(values))])
    narrow = line["configuration"]["evolutions"]["narrow_width"]
    evolutions = [
        [METHOD_NAMES.get(name, name)]
        + [quartiles(row[key]) if key in row else "" for key in ("evolution", "last_step")]
        + [quartiles(row[key], ".2f", 100) for key in ("overhead", "by_evolution", "narrow_overhead")]
        + [f"{100 * row['narrow_real']:.2f}"]
        for name, row in line["evolutions"].items()
    ]
    header = ["method", "evolution / dense step", "step before it / masked step", "added, %", "by evolution, %"]
    return "\n\n".join([
        markdown(["masked step / dense step", "dense, seconds", "chtconv", "rigl-torch"], steps),
        markdown([*header, f"width {narrow:g}: composed, %", "measured, %"], evolutions),
    ])  # fmt: skip


def distributed() -> str:
    """The latest benchmark of several ranks: an evolution that is shared out among them, and one that is not."""
    lines = lines_of("distributed")
    if not lines:
        return ""
    rows = []
    for name, row in lines[-1]["rows"].items():
        method, _, width = name.partition(", ")
        ratio = (
            f"{row['sharing']['ratio']:.2f} ({row['sharing']['ratio_low']:.2f} to {row['sharing']['ratio_high']:.2f})"
        )
        times = [f"{row[way]:.3f}" for way in ("by itself", "checked", "shared")]
        rows.append([f"{METHOD_NAMES[method]}, {width}", *times, "" if method == "rigl" else ratio])
    return markdown(["seconds of an evolution", "alone", "checked", "shared", "shared / checked"], rows)


def checkpoint() -> str:
    """The latest sizes of checkpoints: the sparse file as a part of that of torch.save."""
    lines = lines_of("checkpoint")
    if not lines:
        return ""
    rows = [
        [f"{float(sparsity):.0%}", *(f"{each['save_sparse'] / each['torch.save']:.1%}" for each in row.values())]
        for sparsity, row in lines[-1]["rows"].items()
    ]
    return markdown(["sparsity", *(f"VGG16, {name}" for name in next(iter(lines[-1]["rows"].values())))], rows)


# Columns of the parts of benchmarks/sparse_compute.py: header -> field of a row.
SPARSE_COLUMNS = {
    "training": {
        "training step": "name", "sparse layers": "sparse_layers", "seconds": "seconds", "of dense": "of_dense",
        "of dense that keeps memory": "of_keeping", "goal": "goal", "second goal": "then",
    },
    "inference": {
        "inference": "name", "sparse layers": "sparse_layers", "seconds": "seconds", "of dense": "of_dense",
        "of dense, folded": "of_folded", "goal": "goal", "second goal": "then",
    },
    "resnet": {
        "training step of ResNet-18": "name", "sparse layers": "sparse_layers", "seconds": "seconds",
        "of dense": "of_dense", "of dense that keeps memory": "of_keeping",
    },
    "memory": {
        "peak of a training step": "name", "sparse layers": "sparse_layers", "MB": "megabytes", "of dense": "of_dense",
    },
    "baselines": {
        "training step": "name", "sparse layers": "sparse_layers", "seconds": "seconds", "of dense": "of_dense",
        "of dense that keeps memory": "of_keeping",
    },
    "masks": {
        "links": "name", "empty slices": "empty_slices", "convolutions, seconds": "convolutions_seconds",
        "of dense ones": "convolutions", "of random ones": "of_random", "step, seconds": "seconds",
        "of a dense step": "of_dense",
    },
}  # fmt: skip
PASSES = ("forward", "input gradient", "weight gradient")


def sparse_line(part: str, file: str = "benchmarks.jsonl") -> dict[str, Any]:
    """The latest line of a part of the benchmark of sparse convolutions; empty where there is none."""
    lines = [line for line in lines_of("sparse_compute", file) if line["configuration"]["part"] == part]
    return lines[-1] if lines else {}


def sparse_table(part: str, file: str = "benchmarks.jsonl") -> str:
    """A part of the benchmark of sparse convolutions, without the columns that its latest line has no values for."""
    rows = sparse_line(part, file).get("rows", [])
    known = {name for row in rows for name, value in row.items() if value is not None}
    columns = {header: field for header, field in SPARSE_COLUMNS[part].items() if field in known}
    body = [[cell(row.get(field)) for field in columns.values()] for row in rows]
    return markdown(list(columns), body) if rows else ""


def sparse_layers() -> str:
    """Times of the passes of each layer as parts of the dense ones, by sparsity; dense ones in milliseconds."""
    rows = {(row["layer"], row["pass"], row["sparsity"]): row for row in sparse_line("layers").get("rows", [])[:-1]}
    if not rows:
        return ""
    sparsities = sorted({sparsity for _, _, sparsity in rows} - {0.0})
    body = []
    for layer in dict.fromkeys(layer for layer, _, _ in rows):
        for each in PASSES:
            dense = rows.get((layer, each, 0.0))
            if dense:
                found = [rows[layer, each, sparsity] for sparsity in sparsities]
                spent = [f"{1000 * row['seconds']:.2f}" for row in (dense, *found)]
                body.append([f"{layer}, {each}", *spent, *(quartiles(row["ratio"], ".2f") for row in found)])
    header = ["convolution, pass", "dense, ms", *(f"{each:.0%}, ms" for each in sparsities)]
    return markdown([*header, *(f"{each:.0%} / dense" for each in sparsities)], body)


def sparse_roofline() -> str:
    """What the processor can do, and how much of it the passes of the layers use at 90 %."""
    rows = sparse_line("layers").get("rows", [])
    if not rows:
        return ""
    most = rows[-1]["limits"]
    threads = sparse_line("layers")["configuration"]["threads"]
    by_cycle = {
        f"multiply-adds a cycle of a core, {name}": f"{most[key] / most['hertz'] / threads:.2f}"
        for name, key in {
            "numbers in registers": "peak",
            "one from the first-level cache": "from first-level cache",
            "one from the second-level cache": "from second-level cache",
            "one from memory": "from memory",
        }.items()
    }
    limits = {"cycles a second of a core": f"{most['hertz'] / 1e9:.2f}e9"} | by_cycle
    limits |= {"bytes a second from memory, all cores": f"{most['bytes of memory'] / 1e9:.1f}e9"}
    points = [row for row in rows if row.get("sparsity") == 0.9 and "intensity" in row]
    fields = ("intensity", "per_cycle", "of_peak", "of_memory")
    body = [[f"{row['layer']}, {row['pass']}", *(f"{row[field]:.2f}" for field in fields)] for row in points]
    header = ["convolution, pass, 90%", "multiply-adds a byte", "multiply-adds a cycle", "of their peak"]
    return "\n\n".join([
        markdown(["limit of the processor, measured", ""], [list(each) for each in limits.items()]),
        markdown([*header, "of the bytes of memory"], body),
    ])  # fmt: skip


def sparse_plot() -> str:
    """The plot, where it was drawn."""
    name = "sparse_compute.png"
    drawn = any(map(sparse_line, ("training", "layers"))) and (ROOT / "results" / name).exists()
    return f"![Times against sparsity, and the roofline](../results/{name})" if drawn else ""


# Rows of the parts of benchmarks/sparse_compute.py that the README shows: what it is, beside what, part, row, ratio.
GLANCE = [
    ("training step, 70% sparse", "dense step that keeps memory", "training", "vgg16: 70%, auto", "of_keeping"),
    ("training step, 90% sparse", "dense step that keeps memory", "training", "vgg16: 90%, auto", "of_keeping"),
    ("training step, 95% sparse", "dense step that keeps memory", "training", "vgg16: 95%, auto", "of_keeping"),
    ("inference, 90% sparse", "dense", "inference", "vgg16, batch 64: 90%, compile_sparse", "of_dense"),
]


def at_a_glance() -> str:
    """What the README shows of the latest benchmarks: the time of each as a part of that of what it stands beside."""
    rows = []
    for what, beside, part, name, ratio in GLANCE:
        rows += [
            [what, beside, quartiles(row[ratio], ".2f")]
            for row in sparse_line(part).get("rows", [])
            if row["name"] == name
        ]
    for line in lines_of("evolution")[-1:]:
        row = line["rows"]["evolution, CHTs, CH3-L3n"]
        spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        rows.append(["an evolution of CHTs, 70% sparse", "dense training step", spread])
    for line in lines_of("link_prediction")[-1:]:
        (row,) = [row for row in line["rows"] if row["name"].startswith("explicit sparse graph")]
        spread = f"1 / {row['ratio']:,.0f} (1 / {row['high']:,.0f} to 1 / {row['low']:,.0f})"
        rows.append(["link scores, 64 to 64 channels, 3x3 at 32x32", "SciPy on the explicit sparse graph", spread])
    return markdown(["time of", "beside", "ratio"], rows) if rows else ""


def training() -> str:
    """Images a second of whole training steps: the latest line of each device, width, precision and optimizer."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines_of("training"):
        key = tuple(line["configuration"].get(name) for name in ("device", "width", "precision", "optimizer"))
        latest[key] = line
    if not latest:
        return ""
    rows, together, updates = [], [], []
    for line in latest.values():
        title = f"width {line['configuration']['width']:g}, {line['configuration']['precision']}"
        *ways, product = line["rows"]
        for row in ways:
            values = [row.get(key) for key in ("sparse_layers", "of_plain", "of_keeping", "of_matrix_rate")]
            rows.append([f"{title}: {row['name']}", f"{row['images_per_second']:.0f}", *map(cell, values)])
        rows.append([f"{title}: {product['name']}", f"{product['flops_a_second'] / 1e12:.2f} TFLOP/s", *[""] * 4])
        for row in line["updates"]:
            name = f"width {line['configuration']['width']:g}: {row['name']}"
            updates.append([name, f"{1000 * row['seconds']:.1f}", cell(row.get("of_plain"))])
        for row in line["at_once"]:
            rate = f"{row['images_per_second']:.0f}"
            together.append([f"{title}: {row['name']}", rate, cell(row.get("of_one"))])
    header = ["training steps", "images a second", "sparse layers", "times the plain loop", "the same, keeping memory"]
    tables = [markdown([*header, "of the matrix rate"], rows)]
    if updates:
        tables.append(markdown(["optimizer step", "ms", "of plain"], updates))
    if together:
        tables.append(markdown(["runs", "images a second, together", "times one run"], together))
    return "\n\n".join(tables)


# By name.
TABLES: dict[str, Callable[[], str]] = {
    "at_a_glance": at_a_glance,
    "evolution": evolution,
    "link_prediction": link_prediction,
    "stages": stages,
    "training_step": training_step,
    "distributed": distributed,
    "checkpoint": checkpoint,
    "training": training,
    "sparse_plot": sparse_plot,
    "sparse_layers": sparse_layers,
    "sparse_roofline": sparse_roofline,
    **{f"sparse_{part}": partial(sparse_table, part) for part in SPARSE_COLUMNS},
    "sparse_training_avx2": partial(sparse_table, "training", "benchmarks-avx2.jsonl"),
}
