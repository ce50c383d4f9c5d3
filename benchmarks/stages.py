"""Where the time of an evolution goes: by stage, measured with torch's profiler.

Functions of the package are given a name while they are measured; the time of an operation belongs to the innermost
named function that it runs in. Dense products and top-k are stages of their own wherever they run.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

PRODUCTS, TOP_K, MEANS = "link prediction: products", "top-k", "link prediction: mean weights"
OPERATIONS = {"aten::mm": PRODUCTS, "aten::bmm": PRODUCTS, "aten::baddbmm_": PRODUCTS, "aten::topk": TOP_K}
# Module, attribute and stage; a function inside another one takes its time out of that one's.
NAMED = (
    ("chtconv.topology.topology", "Topology.evolve", "enforcement"),
    ("chtconv.topology.topology", "evolve", "regrowth: keys and choice"),
    ("chtconv.topology.evolution", "choose_removed", "removal"),
    ("chtconv.enforcement.sparse_layer", "disabled_scores", "link prediction: patterns, look-up and the rest"),
    ("chtconv.scores.kernel_graph", "mean_weights", MEANS),
    ("chtconv.scores.layer_graph", "mean_weights", MEANS),
    ("chtconv.topology.evolution", "tied_scores", "record"),
    ("chtconv.topology.record", "Record.add", "record"),
)
STAGES = (
    "removal", PRODUCTS, MEANS, "link prediction: patterns, look-up and the rest", "regrowth: keys and choice", TOP_K,
    "enforcement", "record",
)  # fmt: skip
_MARK = "stage: "


def named(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    """The function under the name of a stage."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + stage):
            return function(*args, **kwargs)

    return call


@contextmanager
def naming() -> Iterator[None]:
    """Gives the functions of every stage its name."""
    with ExitStack() as stack:
        for module, path, stage in NAMED:
            owner: Any = import_module(module)
            *outer, attribute = path.split(".")
            for name in outer:
                owner = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, attribute, named(getattr(owner, attribute), stage)))
        yield


def stage_of(event: FunctionEvent) -> str | None:
    """The stage that an event belongs to; None outside of all."""
    around: FunctionEvent | None = event
    while around is not None and not around.name.startswith(_MARK):
        around = around.cpu_parent
    if around is None:
        return None
    stage = around.name.removeprefix(_MARK)
    # Products with the sparse constants of a geometry go by the same names as the dense ones.
    return stage if stage == MEANS else OPERATIONS.get(event.name, stage)


def seconds_by_stage(evolve: Callable[[], object], before: Callable[[], object], rounds: int) -> dict[str, float]:
    """Mean seconds of each stage of an evolution.

    Args:
        evolve: calls ``Topology.evolve``, looked up anew: it is another function while it is measured.
        before: is called before each evolution and not measured, such as a training step.
        rounds: number of evolutions.
    """
    spent: dict[str, float] = defaultdict(float)
    with naming():
        for _ in range(rounds):
            before()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                evolve()
            for event in profiler.events():
                stage = stage_of(event)
                if stage is not None:
                    spent[stage] += event.self_cpu_time_total / 1e6 / rounds
    assert set(spent) <= set(STAGES)
    return {stage: spent[stage] for stage in STAGES}
