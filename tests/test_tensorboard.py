"""Curves of a topology, read back from the event file."""

import gc
import sys
import threading
from collections import OrderedDict

import pytest
from torch.utils.hooks import RemovableHandle

from chtconv.errors import ConfigurationError
from chtconv.tensorboard import log_to


class Evolving:
    """What log_to asks of a topology; evolves by hand."""

    def __init__(self):
        self.records, self.callbacks, self.evolutions = [], OrderedDict(), 0

    def stats(self):
        layers = {
            "0.weight": {"shape": [8, 3, 3, 3], "links": 54, "density": 0.25, "itop": 0.3 + 0.1 * self.evolutions},
            "features.3.weight": {"density": 0.5, "flops": {"dense": 800, "sparse": 400.0}},
        }
        overall = {"density": 0.3, "method": "cht", "exact": False, "seed": None}
        return overall | {"evolutions": self.evolutions, "step": 10 * self.evolutions, "layers": layers}

    def on_evolution(self, callback):
        handle = RemovableHandle(self.callbacks)
        self.callbacks[handle.id] = callback
        return handle

    def evolve(self):
        row = {"evolution": self.evolutions, "step": 10 * self.evolutions + 10, "layer": "0.weight"}
        row |= {"overlap": 0.5 / (1 + self.evolutions), "zero_scores": 0.75, "density": 99.0}
        self.records.append(row)
        self.evolutions += 1
        for callback in self.callbacks.values():
            callback(self)


@pytest.fixture
def board():
    return pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")


def curves(folder):
    """The curves in a folder: tag -> [(step, value), ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def near(*points):
    return [(step, pytest.approx(value)) for step, value in points]


def test_every_number_of_the_whole_and_of_each_layer_over_optimizer_steps(board, tmp_path):
    topology = Evolving()
    with board.SummaryWriter(tmp_path) as writer:
        log_to(topology, writer)
        topology.evolve()
        topology.evolve()
    assert curves(tmp_path) == {
        "topology/density": near((10, 0.3), (20, 0.3)),
        "topology/evolutions": near((10, 1), (20, 2)),
        "topology.links/0.weight": near((10, 54), (20, 54)),
        "topology.density/0.weight": near((10, 0.25), (20, 0.25)),
        "topology.itop/0.weight": near((10, 0.4), (20, 0.5)),
        "topology.overlap/0.weight": near((10, 0.5), (20, 0.25)),
        "topology.zero_scores/0.weight": near((10, 0.75), (20, 0.75)),
        "topology.density/features.3.weight": near((10, 0.5), (20, 0.5)),
        "topology.flops.dense/features.3.weight": near((10, 800), (20, 800)),
        "topology.flops.sparse/features.3.weight": near((10, 400), (20, 400)),
    }


def test_a_path_is_enough_and_can_be_read_while_the_training_goes_on(board, tmp_path):
    topology = Evolving()
    log_to(topology, tmp_path / "run", prefix="mine")
    assert not curves(tmp_path / "run")
    topology.evolve()
    assert curves(tmp_path / "run")["mine.itop/0.weight"] == near((10, 0.4))


def test_remove_ends_it(board, tmp_path):
    topology = Evolving()
    handle = log_to(topology, str(tmp_path))
    topology.evolve()
    handle.remove()
    topology.evolve()
    assert curves(tmp_path)["topology/density"] == near((10, 0.3))


def test_a_writer_made_here_ends_with_the_topology(board, tmp_path):
    before = threading.active_count()
    topology = Evolving()
    log_to(topology, tmp_path)
    assert threading.active_count() > before
    del topology
    gc.collect()
    assert threading.active_count() == before


def test_a_folder_without_tensorboard_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'chtconv\[tensorboard\]'"):
        log_to(Evolving(), tmp_path)


def test_something_that_writes_no_scalars():
    with pytest.raises(ConfigurationError, match="writer=3: accepted is a SummaryWriter, or the path"):
        log_to(Evolving(), 3)
