"""Where names lead, and what is said of names and folders that lead nowhere."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from PIL import Image

from chtconv.data import load_dataset
from chtconv.data.sources import read_source
from chtconv.errors import ConfigurationError


def write_images(folder: Path, classes: tuple[str, ...], picture, size: int = 6) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for copy in range(2):
            (folder / name / f"{copy}.png").write_bytes(picture(10 * number + copy, size=size))


def test_parquet_shards_are_read_in_order(tmp_path, write_parquet):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1, 1])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [1, 0])
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [1])
    train, test = read_source(str(tmp_path))
    assert (train.labels, test.labels) == ([0, 1, 1, 1, 0], [1])
    assert train.classes == ("cat", "dog")


def test_images_by_class(tmp_path, picture):
    write_images(tmp_path / "train", ("dog", "cat"), picture)
    write_images(tmp_path / "test", ("dog", "cat"), picture)
    data = load_dataset(str(tmp_path), image_size=6)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    with Image.open(tmp_path / "train" / "dog" / "1.png") as oracle:
        assert data.train.images[3].permute(1, 2, 0).flatten().tolist() == list(oracle.tobytes())


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("bullet_train", "car", "crash test")])
def test_classes_that_are_called_like_a_split_are_refused(tmp_path, picture, classes):
    """The library would put their images into both splits."""
    for split in ("train", "test"):
        write_images(tmp_path / split, classes, picture)
    with pytest.raises(ConfigurationError, match=r"\.png is in both 'test' and 'train'|\.png is in both 'train' and"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("deeper", ["cat/indoor/x.png", "cat/images/x.png", "cat/a/b/x.png"])
def test_images_below_the_folder_of_their_class_are_refused(tmp_path, picture, deeper):
    """The library would make a class of the folder that they are in, or drop all labels."""
    for split in ("train", "test"):
        write_images(tmp_path / split, ("cat", "dog"), picture)
    path = tmp_path / "train" / deeper
    path.parent.mkdir(parents=True)
    path.write_bytes(picture(1, size=6))
    with pytest.raises(ConfigurationError, match=rf"{deeper}.* classes of 'train'; accepted is FOLDER/train/CLASS/"):
        read_source(str(tmp_path))


def test_relative_folder_without_a_slash(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert len(load_dataset(folder.name).train) == 6


def test_folder_named_digits_needs_a_dot(folder, monkeypatch):
    shutil.copytree(folder, folder / "inner" / "digits")
    monkeypatch.chdir(folder / "inner")
    assert len(load_dataset("digits").train) == 1437
    assert len(load_dataset("./digits").train) == 6


def test_folder_whose_path_holds_the_words_train_and_test(tmp_path, write_parquet):
    inner = tmp_path / "train" / ".test"
    write_parquet(inner / "train.parquet", [0, 1])
    write_parquet(inner / "test.parquet", [1])
    data = load_dataset(str(inner))
    assert (len(data.train), len(data.test)) == (2, 1)


def test_validation_split_is_ignored_beside_a_test_split(folder, write_parquet):
    write_parquet(folder / "validation.parquet", [0] * 5)
    data = load_dataset(str(folder))
    assert (len(data.train), data.validation, len(data.test)) == (6, None, 2)


def test_validation_split_stands_in_for_a_test_split(folder):
    (folder / "test.parquet").rename(folder / "validation.parquet")
    assert load_dataset(str(folder)).test.labels.tolist() == [1, 0]


def test_hub_id_is_asked_of_the_library(folder, tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.mktemp("cache"))
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "test")}
    kept = {split: datasets.Dataset.from_parquet(file, cache_dir=cache) for split, file in files.items()}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or kept)
    data = load_dataset("some-owner/some.name_1")
    assert asked == ["some-owner/some.name_1"]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 1, 0]


def test_hub_data_whose_image_column_holds_numbers(monkeypatch):
    split = datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": split, "test": split})
    with pytest.raises(ConfigurationError, match="data set 'some/numbers' cannot be read: "):
        load_dataset("some/numbers")


def test_hub_id_that_cannot_be_fetched(tmp_path):
    code = "from chtconv.data import load_dataset; load_dataset('uoft-cs/cifar10')"
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert "ConfigurationError: data set 'uoft-cs/cifar10' could not be fetched" in last
    assert "give a local folder" in last


@pytest.fixture
def user_cache(tmp_path_factory, monkeypatch):
    """A stand-in for the user's cache, which must stay untouched."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def test_local_data_needs_no_network_and_no_cache(folder, user_cache, monkeypatch):
    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    began = time.monotonic()
    load_dataset("digits")
    load_dataset(str(folder))
    assert asked == []
    assert list(user_cache.iterdir()) == []
    assert time.monotonic() - began < 10


def test_nothing_is_printed_or_logged_and_settings_of_the_library_stay(folder, capfd, caplog):
    datasets.enable_progress_bars()
    level = datasets.utils.logging.get_verbosity()
    logging.getLogger("datasets").addHandler(caplog.handler)
    try:
        load_dataset(str(folder))
        (folder / "train.parquet").write_bytes(b"")
        with pytest.raises(ConfigurationError):
            load_dataset(str(folder))
        assert not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()
        logging.getLogger("datasets").removeHandler(caplog.handler)
    assert caplog.records == []
    assert datasets.utils.logging.get_verbosity() == level
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digitz", "unknown data set 'digitz': did you mean 'digits'.*any other Hub id.*any folder"),
        ("cifar10", "did you mean 'uoft-cs/cifar10'"),
        ("", "unknown data set ''"),
        ("./nowhere", "'./nowhere': there is no such folder"),
        ("../nowhere/at/all", "there is no such folder"),
        ("/nowhere", "there is no such folder"),
        ("~no-such-user/folder", "there is no such folder"),
        ("long" * 2000, "unknown data set"),
        ("zero\0byte", "unknown data set"),
        ("~/nowhere-at-all", "there is no such folder"),
        ("nowhere/", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
    ],
)
def test_names_that_lead_nowhere(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        load_dataset(name)


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(ConfigurationError, match=r"train.parquet' is a file: give the folder"):
        load_dataset(str(folder / "train.parquet"))


def test_empty_folder(tmp_path):
    with pytest.raises(ConfigurationError, match=f"'{tmp_path}': the folder is empty"):
        load_dataset(str(tmp_path))


def test_folder_of_empty_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=f"'{tmp_path}' cannot be read: .*doesn't contain any data files"):
        load_dataset(str(tmp_path))


def test_folder_of_something_else(tmp_path):
    (tmp_path / "notes.rst").write_text("nothing here")
    with pytest.raises(ConfigurationError, match=f"'{tmp_path}' cannot be read: "):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["a[1]", "a?b", "a*"])
def test_folder_whose_path_is_a_pattern(folder, name):
    shutil.copytree(folder, folder / name)
    with pytest.raises(ConfigurationError, match=r"without '[\[?*]' in its path"):
        load_dataset(str(folder / name))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("train", "has no split 'train'; its splits are 'test'"), ("test", "has no split 'test'; its splits are 'train'")],
)
def test_missing_split(missing, message, folder):
    (folder / f"{missing}.parquet").unlink()
    with pytest.raises(ConfigurationError, match=message):
        load_dataset(str(folder))


def test_images_without_a_split(tmp_path, picture):
    write_images(tmp_path, ("cat", "dog"), picture)
    with pytest.raises(ConfigurationError, match=r"has no split 'test'.*FOLDER/test/CLASS"):
        load_dataset(str(tmp_path))


def empty_file(whole: bytes) -> bytes:
    return b""


def cut_off(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def other_format(whole: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + whole


def page_overwritten(whole: bytes) -> bytes:
    return whole[:4] + b"\xff" * 64 + whole[68:]


@pytest.mark.parametrize("breakage", [empty_file, cut_off, other_format, page_overwritten])
@pytest.mark.parametrize("split", ["train", "test"])
def test_broken_parquet_file_is_named(breakage, split, folder):
    file = folder / f"{split}.parquet"
    file.write_bytes(breakage(file.read_bytes()))
    with pytest.raises(ConfigurationError, match=f"cannot be read: {file} is broken: "):
        load_dataset(str(folder))


def test_numbers_that_stand_for_other_classes_in_the_test_file(folder, write_parquet):
    write_parquet(folder / "test.parquet", [1, 0], classes=("dog", "cat"))
    with pytest.raises(ConfigurationError, match=r"different classes: .*dog, cat in .*test.parquet"):
        load_dataset(str(folder))
