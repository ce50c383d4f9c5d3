"""The training step: the bits of a plain loop, and those of an eager step where it is recorded and repeated."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_recorder import Recorder
from torch import Tensor
from torch.nn import functional

from chtconv.data.batches import flip_images
from chtconv.enforcement.stepping import Stepping
from chtconv.errors import ConfigurationError
from chtconv.randomness import generator
from chtconv.training import Config, loop, train
from chtconv.training.config import Machine
from chtconv.training.device import check_machine, reproducible, seed_dropout
from chtconv.training.progress import Progress
from chtconv.training.run import Run, prepare
from chtconv.training.schedule import learning_rate
from chtconv.training.step import WARM_UP, Step

CPU = torch.device("cpu")
EPOCHS = 3
ADAM = {"optimizer": "adam", "lr": 1e-3}


@pytest.fixture
def small() -> Config:
    """Four batches of 50 digits an epoch and one of 37, an evolution at every third step."""
    values = {"width": 1 / 16, "head": 16, "epochs": EPOCHS, "batch_size": 50, "threads": 1, "backend": "dense"}
    values |= {"device": "cpu"}
    return Config().replace(**values, validation=1200, crop=0, flip=True, evolutions_per_epoch=5 / 3, stop_fraction=1.0)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    with reproducible(CPU, 1):
        yield


def in_a_plain_loop(config: Config) -> Run:
    """The loop that one would write, without :class:`chtconv.training.step.Step`."""
    run, optimisation = prepare(config), config.optimisation
    data, images = run.dataset, run.dataset.train
    mean, std = (value.double().view(1, 3, 1, 1) for value in (data.mean, data.std))
    steps = -(-len(images) // config.data.batch_size)
    run.model.train()
    for epoch in range(EPOCHS):
        seed_dropout(config.machine.seed, epoch, CPU)
        order = torch.randperm(len(images), generator=generator(config.machine.seed, "order", epoch))
        mirrored = torch.rand(len(images), generator=generator(config.machine.seed, "augment", epoch)) < 0.5
        for step in range(steps):
            some = slice(step * config.data.batch_size, (step + 1) * config.data.batch_size)
            pixels = flip_images(images.images[order[some]], mirrored[some])
            pixels = pixels.to(torch.float32, memory_format=torch.channels_last)
            batch = torch.addcmul((-mean / std).float(), pixels, (1 / (255 * std)).float())
            run.optimizer.param_groups[0]["lr"] = learning_rate(epoch * steps + step, steps, optimisation)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.machine.precision == "bf16"):
                logits = run.model(batch)
            loss = functional.cross_entropy(logits.float(), images.labels[order[some]])
            run.optimizer.zero_grad()
            loss.backward()
            run.optimizer.step()
    return run


class Trained:
    """Epochs of the training loop; where the optimizer is fused, with the learning rate in a tensor, as on a GPU."""

    def __init__(self, config: Config, *, recorded: bool = False, state: Any = None) -> None:
        self.run = run = prepare(config)
        if config.machine.optimizer_kernel == "fused":
            for group in run.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"])
        self.recorder = Recorder(self.changing)
        self.scores: list[Any] = []
        if recorded:
            parts = run.model, run.optimizer, run.topology, run.batches, CPU, config.machine.precision
            run.step = Step(*parts, self.recorder)
        if state is not None:
            run.load_state_dict(copy.deepcopy(state))

    def train(self, epochs: int = EPOCHS) -> "Trained":
        for _ in range(epochs):
            self.scores.append(loop._train_epoch(self.run, Progress())[0])
            self.run.epoch += 1
        return self

    def changing(self) -> list[Tensor]:
        states = [value for state in self.run.optimizer.state.values() for value in state.values()]
        return [*self.run.model.parameters(), *self.run.model.buffers(), *(x for x in states if isinstance(x, Tensor))]


def assert_same_bits(one: Run, two: Run) -> None:
    for mine, theirs in ((one.weights(), two.weights()), (one.masks(), two.masks())):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name
    assert one.records == two.records


@pytest.mark.parametrize("values", [{"precision": "bf16"}, {"method": "rigl"} | ADAM], ids=str)
def test_steps_have_the_bits_of_a_plain_loop(small: Config, values: dict[str, Any]) -> None:
    config = small.replace(**values)
    assert_same_bits(Trained(config).train().run, in_a_plain_loop(config))


FORMS = [{"precision": "bf16"}, {"method": "rigl"}, {"method": "dense"} | ADAM, {"method": "snfs"}]


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate on another device is never looked at; see the first lines of this method."""
    monkeypatch.setattr(Stepping, "_only_fills_state", lambda *_: False)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("values", FORMS, ids=str)
def test_recorded_steps_have_the_bits_of_eager_ones(small: Config, values: dict[str, Any]) -> None:
    config = small.replace(optimizer_kernel="fused", **values)
    eager, recorded = Trained(config).train(), Trained(config, recorded=True).train()
    assert_same_bits(eager.run, recorded.run)
    assert eager.scores == recorded.scores
    whole = [step for step in range(1, 16) if step % 5 and step > WARM_UP]
    # Evolutions are at 3, 6, 9 and 12; the averages of SNFS want the dense gradient of every step.
    expected = {"dense": len(whole), "snfs": 0}.get(config.topology.method, sum(step % 3 > 0 for step in whole))
    assert (recorded.run.step.replays, recorded.recorder.recordings) == (expected, min(1, expected))
    assert eager.run.step.replays == 0
    one, two = eager.run.topology, recorded.run.topology
    if one is not None and two is not None:
        assert one.step_count == two.step_count == 15
        assert one.stats() == two.stats()


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_what_was_recorded_is_forgotten_when_a_state_is_loaded(small: Config) -> None:
    config = small.replace(optimizer_kernel="fused", **ADAM)
    whole, first = Trained(config, recorded=True).train(), Trained(config, recorded=True).train(2)
    state = copy.deepcopy(first.run.state_dict())
    first.train(1)
    first.run.load_state_dict(copy.deepcopy(state))
    assert_same_bits(whole.run, first.train(1).run)
    assert first.recorder.recordings == 2
    assert_same_bits(whole.run, Trained(config, recorded=True, state=state).train(1).run)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_what_moved_is_recorded_anew(small: Config) -> None:
    config = small.replace(optimizer_kernel="fused", method="set")
    eager, recorded = Trained(config).train(), Trained(config, recorded=True)
    assert recorded.run.topology is not None
    for layer in recorded.run.topology._layers[:1]:
        recorded.run.topology.on_evolution(lambda _, layer=layer: setattr(layer, "bits", layer.bits.clone()))
    assert_same_bits(eager.run, recorded.train().run)
    assert recorded.recorder.recordings == 4


def test_evolution_changes_masks_in_place(small: Config) -> None:
    run = Trained(small).train(1).run
    assert run.topology is not None
    before, masks = [bits.data_ptr() for bits in run.topology.mask_bits], run.topology.masks
    run.topology.evolve()
    assert [bits.data_ptr() for bits in run.topology.mask_bits] == before
    assert any(not torch.equal(mask, masks[name]) for name, mask in run.topology.masks.items())


def test_the_time_of_an_evolution_is_that_of_the_optimizer_step(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    assert loop._train_epoch(prepare(small), Progress())[1] == 1.0


def test_a_fused_run_resumes_bit_for_bit(small: Config, tmp_path: Any, stop: Any) -> None:
    config = small.replace(optimizer_kernel="fused", epochs=2, **ADAM)
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=stop(epochs=1))
    train(config, tmp_path / "parts", resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_the_learning_rate_is_recorded_as_it_was(small: Config, tmp_path: Any) -> None:
    config = small.replace(epochs=1)
    train(config, tmp_path)
    row = (tmp_path / "metrics.jsonl").read_text()
    assert f'"learning_rate": {learning_rate(4, 5, config.optimisation)}' in row


@pytest.mark.parametrize(
    ("values", "device", "message"),
    [
        ({"precision": "tf32"}, "cpu", "precision='tf32': only a GPU has it; accepted on a CPU are 'float32' and"),
        ({"step": "captured"}, "cpu", "step='captured': only a GPU has CUDA graphs; accepted on a CPU is 'eager'"),
        (
            {"step": "captured", "optimizer_kernel": "plain"},
            "cuda",
            "optimizer_kernel='plain': a captured step would repeat its first learning rate; accepted are 'auto' and",
        ),
    ],
)
def test_what_a_device_cannot_do_is_refused(values: dict[str, str], device: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_machine(Machine(**values), torch.device(device))


def test_a_run_is_refused_before_anything_is_loaded(small: Config, tmp_path: Any) -> None:
    with pytest.raises(ConfigurationError, match="step='captured'"):
        train(small.replace(step="captured", dataset="no/such"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("values", FORMS, ids=str)
def test_captured_steps_have_the_bits_of_eager_ones_on_a_gpu(small: Config, values: dict[str, Any]) -> None:
    runs = {}
    for step in ("eager", "captured"):
        config = small.replace(device="cuda", step=step, **{"backend": "auto"} | values)
        with reproducible(torch.device("cuda"), 1, config.machine.precision):
            runs[step] = run = prepare(config)
            for run.epoch in range(EPOCHS):
                loop._train_epoch(run, Progress())
    assert_same_bits(runs["eager"], runs["captured"])
    assert (runs["captured"].step.replays > 0) == (values.get("method") != "snfs")
