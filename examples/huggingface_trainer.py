"""Trains a sparse ResNet with the Trainer of Hugging Face transformers, and resumes it from a checkpoint.

    pip install 'transformers[torch]'
    python examples/huggingface_trainer.py

All it takes is one call of ``chtconv.sparsify`` before the trainer is made: the trainer gets the model and its
optimizer by ``optimizers=(optimizer, scheduler)``, and masks are kept and the topology evolves by hooks on them.
Clipping, accumulation of gradients and mixed precision work as ever.

The trainer's checkpoints hold what it knows: model, optimizer, scheduler. The callback here has nothing to do with
training: it writes the topology into each checkpoint's folder, so that training can go on from there.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import chtconv
from chtconv.data import ImageSet, load_dataset

TOPOLOGY = "topology.pt"


class SaveTopology(TrainerCallback):
    """Writes masks, counters and records beside the model of each checkpoint."""

    def __init__(self, topology: chtconv.Topology) -> None:
        self.topology = topology

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the trainer after it has written a checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        torch.save(self.topology.state_dict(), folder / TOPOLOGY)


def examples(split: ImageSet) -> list[dict[str, Tensor]]:
    """Images with pixels from 0 to 1, and labels, by the names that the model's ``forward`` expects."""
    return [
        {"pixel_values": image, "labels": label} for image, label in zip(split.images / 255, split.labels, strict=True)
    ]


def build(folder: Path, total_steps: int, interval: int = 10, **arguments: Any) -> tuple[Trainer, chtconv.Topology]:
    """A trainer of a small ResNet that is 90 % sparse in all of its convolutions; the whole of chtconv is in here.

    Args:
        folder: where checkpoints go.
        total_steps: length of the whole training in optimizer steps, the same when it is resumed.
        interval: optimizer steps between two evolutions of the topology.
        arguments: for ``TrainingArguments``.
    """
    config = ResNetConfig(
        num_labels=10,
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    model = ResNetForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=total_steps)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.9, interval=interval, total_steps=total_steps)
    digits = load_dataset("digits", image_size=16)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=total_steps,
            per_device_train_batch_size=128,
            dataloader_drop_last=True,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=examples(digits.train),
        eval_dataset=examples(digits.test),
        optimizers=(optimizer, scheduler),
        callbacks=[SaveTopology(topology)],
    )
    return trainer, topology


def resume(trainer: Trainer, topology: chtconv.Topology, checkpoint: Path) -> None:
    """Goes on from a checkpoint to the end: the topology loads its own file, the trainer all others."""
    topology.load_state_dict(torch.load(checkpoint / TOPOLOGY, weights_only=True))
    trainer.train(resume_from_checkpoint=str(checkpoint))


def report(trainer: Trainer, topology: chtconv.Topology) -> None:
    """Prints what was reached."""
    loss, stats = trainer.evaluate()["eval_loss"], topology.stats()
    print(
        f"step {trainer.state.global_step}: loss {loss:.3f} on the test set, {stats['evolutions']} evolutions, "
        f"{stats['links']} links, {stats['sparsity']:.1%} sparse"
    )


def main() -> None:
    """A training with a checkpoint at its middle, and its second half once more, from the checkpoint."""
    steps = 60
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        trainer, topology = build(Path(folder), steps, save_steps=steps // 2)
        report(trainer, topology)
        trainer.train()
        report(trainer, topology)

        trainer, topology = build(Path(folder), steps, save_steps=steps // 2)
        resume(trainer, topology, Path(folder, f"checkpoint-{steps // 2}"))
        report(trainer, topology)


if __name__ == "__main__":
    main()
