"""The folder of a run: what is in it, who may write to it, and how a run is found again.

==================== ================================================================
config.json          every value of the configuration, by its name
metrics.jsonl        a line an epoch
evolution.jsonl      a line a layer and evolution
checkpoint.pt        the last whole epoch; only until the run is complete
model.safetensors    weights under the model's own names
masks.safetensors    bool masks under the names of their weights
summary.json         what came out; written last, so that a run that has one is complete
==================== ================================================================
"""

import contextlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from chtconv.errors import ConfigurationError
from chtconv.files import StorageError, locked, remove_partial, write_atomically, write_json, write_jsonl
from chtconv.training.config import DENSE, Config, dataset_name

CONFIG: Final = "config.json"
METRICS: Final = "metrics.jsonl"
EVOLUTION: Final = "evolution.jsonl"
CHECKPOINT: Final = "checkpoint.pt"
MODEL: Final = "model.safetensors"
MASKS: Final = "masks.safetensors"
SUMMARY: Final = "summary.json"
FILES: Final = (CONFIG, METRICS, EVOLUTION, CHECKPOINT, MODEL, MASKS, SUMMARY)

Rows: TypeAlias = list[dict[str, Any]]
# In the folder of a run that is being replaced: all of it is there.
_WHOLE: Final = "whole"


class RunFolder:
    """The files of one run under ``path``, which need not exist yet."""

    def __init__(self, path: Path | str) -> None:
        self.path: Final = Path(path)

    def holds_run(self) -> bool:
        """Whether any file of a run is there."""
        return any((self.path / name).exists() for name in FILES)

    def has_checkpoint(self) -> bool:
        """Whether there is a whole epoch to go on from."""
        return (self.path / CHECKPOINT).exists()

    def is_complete(self) -> bool:
        """Whether the run ended, and its summary is there."""
        return (self.path / SUMMARY).exists()

    def epochs(self) -> int:
        """Epochs that its table has; 0 where there is none that can be read."""
        try:
            return len((self.path / METRICS).read_bytes().splitlines())
        except OSError:
            return 0

    def stored_config(self) -> Config:
        """The configuration that the run was started with.

        Raises:
            ConfigurationError: if it is missing, or no configuration of a run.
        """
        return Config.from_dict(self._read_json(CONFIG))

    def stored_summary(self) -> dict[str, Any]:
        """The summary of a complete run.

        Raises:
            ConfigurationError: if it is missing or cannot be read.
        """
        return self._read_json(SUMMARY)

    def check(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        """Refuse what may not be done here, before anything is computed or written.

        Raises:
            ConfigurationError: if the folder holds a run and neither ``resume`` nor ``overwrite`` is given, holds
                none or another one to resume, or files that are no run's to overwrite.
        """
        if resume and overwrite:
            raise ConfigurationError("--resume goes on with a run and --overwrite replaces it: give one of them")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigurationError(f"{self.path} is a file: --out must name a folder")
        if resume and not self.holds_run():
            raise ConfigurationError(f"{self.path} holds no run to resume: leave out --resume to start one")
        if not self.holds_run():
            return
        if resume:
            self._check_same(config)
        elif not overwrite:
            raise ConfigurationError(
                f"{self.path} already holds a run: --resume goes on with it, --overwrite replaces it, "
                "--out names another folder"
            )
        elif (self.path / CONFIG).exists():
            self.stored_config()  # a config.json that no run wrote stands for files that no run may delete

    @contextlib.contextmanager
    def opened(self, config: Config, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Make the folder, hold its lock, and take everything back if not one epoch was kept.

        Raises:
            ConfigurationError: as :meth:`check`, and if another process holds the folder.
            StorageError: if the folder cannot be made.
        """
        self.check(config, resume=resume, overwrite=overwrite)
        created = self._make()
        try:
            with locked(self.path):
                if overwrite or not self.holds_run():
                    self._settle()  # a process that was killed while it replaced a run could not
                self.check(config, resume=resume, overwrite=overwrite)
                try:
                    if overwrite:
                        self._move(self.path, self._aside)
                        (self._aside / _WHOLE).touch()
                    write_json(self.path / CONFIG, config.to_dict())
                    yield
                finally:
                    self._settle()
        finally:
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    @property
    def _aside(self) -> Path:
        """Where a run waits that is being overwritten, until the new one has something to keep."""
        return self.path / ".replaced"

    def _settle(self) -> None:
        """Keep the run that is here if there is something to keep; otherwise the one that it was to replace."""
        whole = self._aside / _WHOLE
        if self._aside.is_dir() and not whole.exists():
            self._move(self._aside, self.path)  # it was cut short on its way there, or back
        elif not self.has_checkpoint() and not self.is_complete():
            self.remove(*FILES)
            whole.unlink(missing_ok=True)
            self._move(self._aside, self.path)
        # Under another name at once: what is left of it may not be taken for a run that was cut short.
        gone = self.path / ".discarded"
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._aside, gone)
        shutil.rmtree(gone, ignore_errors=True)
        remove_partial(self.path)

    def _move(self, source: Path, target: Path) -> None:
        if source.is_dir():
            target.mkdir(exist_ok=True)
            for name in FILES:
                if (source / name).exists():
                    os.replace(source / name, target / name)

    def save_epoch(self, state: Mapping[str, Any], metrics: Rows, records: Rows) -> None:
        """Keep an epoch: the checkpoint first, since the two tables can be written again from it."""
        # Through memory: torch's own writer answers a full disk with an internal error.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(self.path / CHECKPOINT, buffer.getvalue())
        self.save_tables(metrics, records)

    def save_tables(self, metrics: Rows, records: Rows) -> None:
        """Write both tables whole: on resuming, this cuts them back to the checkpoint's epoch."""
        write_jsonl(self.path / METRICS, metrics)
        write_jsonl(self.path / EVOLUTION, records)

    def load_checkpoint(self, device: torch.device) -> dict[str, Any]:
        """The state of the last whole epoch, its tensors on ``device``.

        Raises:
            ConfigurationError: if it cannot be read; only tensors and plain values are, never code.
        """
        path = self.path / CHECKPOINT
        try:
            with zipfile.ZipFile(path) as file:  # torch writes checksums, and does not look at them
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # whatever a reader may make of any bytes
            # torch's own message advises to load it in a way that runs what is in it.
            raise ConfigurationError(
                f"{path} is damaged or no checkpoint; without {self.path} the run starts anew"
            ) from error
        if not isinstance(state, dict):
            raise ConfigurationError(f"{path} is no checkpoint of a run; without {self.path} the run starts anew")
        return state

    def finish(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], summary: dict[str, Any]) -> None:
        """Write the results, the summary last, and drop the checkpoint."""
        write_atomically(self.path / MODEL, _safetensors(weights))
        write_atomically(self.path / MASKS, _safetensors(masks))
        write_json(self.path / SUMMARY, summary)
        self.remove(CHECKPOINT)

    def remove(self, *names: str) -> None:
        """Delete those of the run's files that are there."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _make(self) -> list[Path]:
        absent = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the folder {self.path}: {error.strerror}") from error
        return absent

    def is_of(self, config: Config) -> bool:
        """Whether the run that is kept here has this configuration, wherever its data set lies now."""
        try:
            return not _differences(config, self.stored_config())
        except ConfigurationError:
            return False

    def _check_same(self, config: Config) -> None:
        try:
            stored = self.stored_config()
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}; without {self.path} the run starts anew") from error
        if differences := _differences(config, stored):
            words = ", ".join(f"{name} {mine!r} instead of {stored!r}" for name, (mine, stored) in differences.items())
            raise ConfigurationError(f"the run in {self.path} was started with another configuration: {words}")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot read {path}: {error}") from error
        if not isinstance(value, dict):
            raise ConfigurationError(f"{path} holds no table of names and values")
        return value


def _differences(config: Config, stored: Config) -> dict[str, tuple[Any, Any]]:
    """The values in which a configuration differs from that of a run which it may go on with."""
    differences = config.differences(stored)
    if dataset_name(config.data.dataset) == dataset_name(stored.data.dataset):
        differences.pop("dataset", None)  # it may have moved; the checkpoint knows its labels
    return differences


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # Plain layout: a reader in another language knows no channels_last.
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def default_out(config: Config) -> Path:
    """Where a run goes if no folder is named: below ``runs``, by data set, network, method, sparsity and seed.

    >>> default_out(Config()).as_posix()
    'runs/digits-vgg16-chts-0.9-seed0'
    """
    topology = config.topology
    dataset = re.sub(r"[^\w.-]+", "_", Path(config.data.dataset).resolve().name) or "data"
    sparsity = 0.0 if topology.method == DENSE else topology.sparsity
    return Path("runs") / f"{dataset}-{config.network.model}-{topology.method}-{sparsity:g}-seed{config.machine.seed}"
