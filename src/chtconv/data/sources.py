"""Where the name of a data set leads: into the package, to a folder, or to the Hugging Face Hub.

All three are read by the ``datasets`` library, which is imported when a data set is first asked for.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from chtconv.data.columns import Records, read_records
from chtconv.errors import ConfigurationError, unknown

EMBEDDED = "digits"
_EXAMPLES = (EMBEDDED, "uoft-cs/cifar10", "uoft-cs/cifar100")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_TEST_SPLITS = ("test", "validation", "valid")


def read_source(name: str) -> tuple[Records, Records]:
    """The records of the training and of the test split.

    ``digits`` is the embedded data set, even where there is a folder of that name (``./digits`` is the folder);
    then comes any folder that exists; then ``OWNER/NAME`` on the Hub. A split ``validation`` is the test split of
    a source without ``test``, and is otherwise ignored.

    Raises:
        ConfigurationError: the name leads nowhere, or to something that cannot be read.

    >>> train, test = read_source("digits")
    >>> len(train.images), len(test.images)
    (1437, 360)
    """
    if name == EMBEDDED:
        with as_file(files("chtconv.data") / EMBEDDED) as folder:
            return _read_folder(folder, name)
    path = os.path.expanduser(name)  # unlike pathlib's, these functions do not raise for names no file can have
    if os.path.isdir(path):
        return _read_folder(Path(path).resolve(), name)
    if os.path.isfile(path):
        raise ConfigurationError(f"data set {name!r} is a file: give the folder that holds it")
    if _HUB_ID.fullmatch(name):
        return _read_hub(name)
    if "/" in name or "\\" in name or name.startswith(("~", ".")):
        raise ConfigurationError(f"data set {name!r}: there is no such folder")
    advice = "So is any other Hub id (OWNER/NAME) and any folder (./FOLDER)."
    raise ConfigurationError(f"{unknown('data set', name, _EXAMPLES)} {advice}")


def is_local(name: str) -> bool:
    """Whether a data set is embedded or a folder, so that reading it fetches nothing.

    >>> is_local("digits"), is_local("uoft-cs/cifar10")
    (True, False)
    """
    return name == EMBEDDED or os.path.isdir(os.path.expanduser(name))


def _read_folder(folder: Path, name: str) -> tuple[Records, Records]:
    """Read a local folder as a stream, straight from its files.

    A stream needs no conversion to Arrow in the user's cache, which would double the data on the disk, need a
    writable home, and could be stale; the builder's lock file goes to a temporary folder for the same reason.
    """
    for letter in "[*?":  # the library takes it for a pattern, and finds nothing or what is beside
        if letter in str(folder):
            raise ConfigurationError(
                f"data set {name!r}: give a folder without {letter!r} in its path, which is {folder}"
            )
    import datasets

    parquet: list[str] = []
    with _quiet(), tempfile.TemporaryDirectory() as cache:
        try:
            if not any(folder.iterdir()):
                raise ConfigurationError(f"data set {name!r}: the folder is empty")
            builder = datasets.load_dataset_builder(str(folder), cache_dir=cache)
            listed = builder.config.data_files or {}
            used = _files(listed, name)
            if builder.name == "imagefolder" and not any("metadata." in os.path.basename(file) for file in used):
                _check_depth(listed, builder.EXTENSIONS, name)
            parquet = [file for file in used if file.endswith(".parquet")]
            splits = builder.as_streaming_dataset()
            _check_class_names(parquet, cache)
            return _read_splits(splits, name)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever the library and its Parquet, image and metadata readers may raise
            blame = _broken_file(parquet, cache)
            raise ConfigurationError(f"data set {name!r} cannot be read: {blame}{_reason(error)}") from error


def _read_hub(name: str) -> tuple[Records, Records]:
    """Read a data set of the Hub from the user's Hugging Face cache, into which it is fetched the first time."""
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # connection, authorisation, unknown id, scripts, configurations, full disk
        raise ConfigurationError(
            f"data set {name!r} could not be fetched from the Hugging Face Hub, and there is no folder of that name "
            f"here. Check the id and the network, or give a local folder with its files. ({_reason(error)})"
        ) from error
    try:
        return _read_splits(splits, name)
    except ConfigurationError:
        raise
    except Exception as error:  # a column that holds no images, whatever it is called
        raise ConfigurationError(f"data set {name!r} cannot be read: {_reason(error)}") from error


def _read_splits(splits: Mapping[str, Any], name: str) -> tuple[Records, Records]:
    """Choose the splits and read them."""
    found = ", ".join(map(repr, splits))
    if "train" not in splits:
        raise ConfigurationError(f"data set {name!r} has no split 'train'; its splits are {found}")
    test = next((split for split in _TEST_SPLITS if split in splits), None)
    if test is None:
        layout = "FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, or train-*.parquet and test-*.parquet"
        raise ConfigurationError(f"data set {name!r} has no split 'test'; its splits are {found}. A folder: {layout}")
    return read_records(name, "train", splits["train"]), read_records(name, test, splits[test])


def _files(splits: Mapping[str, Sequence[str]], name: str) -> list[str]:
    """All files of a folder; the library goes by words such as "train" and "test" anywhere in their paths."""
    found: dict[str, str] = {}
    for split, file in [(str(split), str(file)) for split, listed in splits.items() for file in listed]:
        if found.setdefault(file, split) != split:
            raise ConfigurationError(
                f"data set {name!r}: {file} is in both {found[file]!r} and {split!r}, "
                "by the words in its path; accepted are classes and files that are not called like a split"
            )
    return list(found)


def _check_depth(splits: Mapping[str, Sequence[str]], endings: Sequence[str], name: str) -> None:
    """Refuse images that lie deeper than others: the library takes the folder that they are in for their class."""
    for split, listed in splits.items():
        first: dict[Path, str] = {}
        for file in (str(file) for file in listed if str(file).lower().endswith(tuple(endings))):
            first.setdefault(Path(file).parent.parent, file)
        if len(first) > 1:
            one, other, *_ = first.values()
            raise ConfigurationError(
                f"data set {name!r}: the folders of {one} and of {other} would both be classes of {str(split)!r}; "
                f"accepted is FOLDER/{split}/CLASS/*.png, nothing deeper"
            )


def _check_class_names(parquet: Sequence[str], cache: str) -> None:
    """Refuse files whose numbers stand for different classes: the library takes the first file's names for all."""
    import datasets

    first: dict[str, tuple[str, list[str]]] = {}
    for file in parquet:
        for column, feature in _open_parquet(file, cache).features.items():
            if not isinstance(feature, datasets.ClassLabel):
                continue
            other, names = first.setdefault(column, (file, feature.names))
            if names != feature.names:
                raise ConfigurationError(
                    f"the numbers of column {column!r} stand for different classes: {_shortened(names)} in {other}, "
                    f"{_shortened(feature.names)} in {file}"
                )


def _broken_file(parquet: Sequence[str], cache: str) -> str:
    """Name the first file that cannot be read to its end; the library's own messages often do not."""
    for file in parquet:
        try:
            for _ in _open_parquet(file, cache).with_format("arrow").iter(1000):
                pass
        except Exception:
            return f"{file} is broken: "
    return ""


def _open_parquet(file: str, cache: str) -> Any:
    import datasets

    return datasets.Dataset.from_parquet(file, streaming=True, cache_dir=cache)


def _shortened(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _reason(error: Exception) -> str:
    """The last cause of an error, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's progress bars and log lines: what goes wrong is told once, by the error."""
    from datasets import utils

    bars = not utils.are_progress_bars_disabled()
    level = utils.logging.get_verbosity()
    utils.disable_progress_bars()
    utils.logging.set_verbosity(utils.logging.CRITICAL)
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if bars:
            utils.enable_progress_bars()
