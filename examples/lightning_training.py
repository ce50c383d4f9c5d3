"""Trains a sparse network with Lightning, and resumes it from a Lightning checkpoint.

    pip install lightning
    python examples/lightning_training.py

All it takes is the call of ``chtconv.sparsify`` in ``configure_optimizers``: masks are kept and the topology evolves
by hooks on the optimizer that you hand to Lightning, so there is no callback. Clipping, accumulation of gradients
and schedulers work as ever. The masks go with the checkpoint by two of Lightning's own hooks.
"""

import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import chtconv
from chtconv.data import load_dataset


class SparseDigits(lightning.LightningModule):
    """A small convolutional network for handwritten digits, 90 % sparse in all of its convolutions.

    Args:
        total_steps: length of the whole training in optimizer steps, the same when it is resumed.
        interval: optimizer steps between two evolutions of the topology.
    """

    def __init__(self, total_steps: int, interval: int = 10) -> None:
        super().__init__()
        self.total_steps = total_steps
        self.interval = interval
        self.topology: chtconv.Topology | None = None
        self.resumed: dict[str, Any] | None = None
        self.network = nn.Sequential(
            *(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer and its schedule, as in any Lightning module, and in between the topology."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        # Lightning loads weights before it asks for optimizers: with the saved state sparsify keeps their masks.
        self.topology = chtconv.sparsify(
            self.network,
            optimizer,
            sparsity=0.9,
            interval=self.interval,
            total_steps=self.total_steps,
            state=self.resumed,
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """The loss of a batch of images and labels."""
        images, labels = batch
        loss = functional.cross_entropy(self.network(images), labels)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts masks, counters and records beside the weights."""
        checkpoint["topology"] = self.topology.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the state for ``configure_optimizers``, which Lightning calls later."""
        self.resumed = checkpoint["topology"]


def digits(batch_size: int = 128) -> DataLoader:
    """Batches of the embedded digits, 8 x 8 pixels, from 0 to 1."""
    train = load_dataset("digits", image_size=8).train
    return DataLoader(TensorDataset(train.images / 255, train.labels), batch_size, drop_last=True)


def fit(model: SparseDigits, epochs: int, resume: Path | None = None, **options: Any) -> lightning.Trainer:
    """Trains up to so many epochs, from the start or from a checkpoint; ``options`` go to Lightning's trainer."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, digits(), ckpt_path=resume, weights_only=True)
    return trainer


def report(model: SparseDigits, trainer: lightning.Trainer) -> None:
    """Prints what was reached."""
    loss, stats = trainer.callback_metrics["loss"], model.topology.stats()
    print(
        f"step {trainer.global_step}: loss {loss:.3f}, {stats['evolutions']} evolutions, "
        f"{stats['links']} links, {stats['sparsity']:.1%} sparse"
    )


def main() -> None:
    """Half of a training, a checkpoint, and the other half with a new model."""
    lightning.seed_everything(0)
    epochs = 6
    steps = epochs * len(digits())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "half.ckpt")
        model = SparseDigits(steps)
        trainer = fit(model, epochs // 2)
        trainer.save_checkpoint(checkpoint)
        report(model, trainer)

        model = SparseDigits(steps)
        trainer = fit(model, epochs, resume=checkpoint)
        report(model, trainer)


if __name__ == "__main__":
    main()
