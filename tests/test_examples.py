"""The examples do what they say: sparse training, evolution and resuming under other people's training loops."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import assert_nothing_off_the_mask

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def lightning_training(monkeypatch):
    pytest.importorskip("lightning", reason="Lightning is not installed", exc_type=ImportError)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what the example sets is undone
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "lightning_training.py")))


@pytest.fixture
def huggingface_trainer(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    pytest.importorskip("accelerate", reason="the trainer of transformers needs accelerate", exc_type=ImportError)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "huggingface_trainer.py")))


def assert_trained(topology, model, optimizer, *, steps, evolved_at):
    assert topology.step_count == steps
    assert topology.evolutions == len(evolved_at)
    assert sorted({row["step"] for row in topology.records}) == evolved_at
    assert_nothing_off_the_mask(topology, model, optimizer)
    for name, mask in topology.masks.items():
        links = mask.flatten(1).sum(1)
        assert (links == round(0.1 * mask[0].numel())).all(), name
        # Zeros off the mask say something only where training moves what is on it, new links included.
        assert (dict(model.named_parameters())[name] != 0).sum() > 0.9 * links.sum(), name


def assert_same(topology, model, other_topology, other_model):
    assert topology.records == other_topology.records
    assert (topology.step_count, topology.evolutions) == (other_topology.step_count, other_topology.evolutions)
    assert all(torch.equal(mask, other_topology.masks[name]) for name, mask in topology.masks.items())
    state, other = model.state_dict(), other_model.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


def printed(name, capsys, words="loss"):
    """Runs an example as a script; step, loss, evolutions and links of every line that it prints."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    lines = re.findall(
        rf"^step (\d+): {words} ([\d.]+).*?, (\d+) evolutions, (\d+) links", capsys.readouterr().out, re.M
    )
    return [(int(step), float(loss), int(evolutions), int(links)) for step, loss, evolutions, links in lines]


@pytest.mark.parametrize(("options", "steps"), [({}, 22), ({"accumulate_grad_batches": 3}, 8)])
def test_lightning_counts_optimizer_steps(lightning_training, options, steps):
    model = lightning_training.SparseDigits(total_steps=steps, interval=2)
    # Accumulated gradients are also applied after the last of the 11 batches of an epoch.
    trainer = lightning_training.fit(model, epochs=2, **options)
    assert trainer.global_step == steps
    evolved_at = list(range(2, steps * 3 // 4, 2))
    assert_trained(model.topology, model.network, trainer.optimizers[0], steps=steps, evolved_at=evolved_at)
    assert trainer.callback_metrics["loss"] < 2.2


def test_a_resumed_lightning_training_ends_with_the_same_bits(lightning_training, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        return lightning_training.SparseDigits(total_steps=22, interval=3)

    straight, first, second = start(0), start(0), start(1)
    lightning_training.fit(straight, epochs=2)
    lightning_training.fit(first, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    assert first.topology.step_count == 11
    trainer = lightning_training.fit(second, epochs=2, resume=tmp_path / "half.ckpt")
    assert_trained(second.topology, second.network, trainer.optimizers[0], steps=22, evolved_at=[3, 6, 9, 12, 15])
    assert_same(straight.topology, straight.network, second.topology, second.network)


def test_the_lightning_example_as_a_script(lightning_training, capsys):
    half, end = printed("lightning_training.py", capsys)
    assert (half[0], end[0]) == (33, 66)
    assert (half[2], end[2]) == (3, 4)
    assert half[3] == end[3]
    assert end[1] < half[1] < 2.2


@torch.no_grad()
def loss_of_a_batch(trainer):
    """In training mode, since the running means of batch norm are far behind after a dozen steps."""
    trainer.model.train()
    return trainer.model(**trainer.data_collator(trainer.train_dataset[:256])).loss.item()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_the_trainer_of_transformers_counts_optimizer_steps(huggingface_trainer, options, tmp_path):
    trainer, topology = huggingface_trainer.build(tmp_path, 12, interval=2, save_strategy="no", **options)
    before = loss_of_a_batch(trainer)
    trainer.train()
    assert trainer.state.global_step == 12
    assert_trained(topology, trainer.model, trainer.optimizer.optimizer, steps=12, evolved_at=[2, 4, 6, 8])
    assert loss_of_a_batch(trainer) < before / 2


def test_a_resumed_training_of_transformers_ends_with_the_same_bits(huggingface_trainer, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        return huggingface_trainer.build(tmp_path, 16, interval=3, save_steps=8)

    straight, topology = start(0)
    straight.train()
    resumed, other = start(1)
    huggingface_trainer.resume(resumed, other, tmp_path / "checkpoint-8")
    assert_trained(other, resumed.model, resumed.optimizer.optimizer, steps=16, evolved_at=[3, 6, 9])
    assert_same(topology, straight.model, other, resumed.model)


def test_the_transformers_example_as_a_script(huggingface_trainer, capsys):
    start, end, again = printed("huggingface_trainer.py", capsys)
    assert (start[0], start[2]) == (0, 0)
    assert (end[0], end[2]) == (60, 4)
    assert end[1] < start[1] / 2
    assert again == end
