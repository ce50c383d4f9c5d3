"""Which columns are taken, and which labels are accepted."""

import datasets
import pytest

from chtconv.data import load_dataset
from chtconv.data.columns import Records, number_classes
from chtconv.data.sources import read_source
from chtconv.errors import ConfigurationError


@pytest.mark.parametrize("names", [("image", "label"), ("img", "labels"), ("photo", "fine_label"), ("img", "kind")])
def test_columns_are_found_by_type_or_name(names, tmp_path, write_parquet):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [0, 1], names=names)
    assert load_dataset(str(tmp_path)).train.labels.tolist() == [0, 1]


def test_fine_label_is_taken_before_coarse_label(tmp_path, write_parquet):
    coarse = {"coarse_label": (datasets.ClassLabel(names=["animal"]), [0, 0])}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [1, 0], names=("img", "fine_label"), more=coarse)
    data = load_dataset(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [1, 0]


def test_image_column_by_its_fields(tmp_path, write_parquet):
    fields = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [0, 1], names=("photo", "label"), image_feature=fields)
    assert len(load_dataset(str(tmp_path)).train) == 2


def test_image_column_of_plain_bytes(tmp_path, write_parquet, picture):
    for split in ("train", "test"):
        write_parquet(
            tmp_path / f"{split}.parquet",
            [0, 1],
            images=[picture(0), picture(1)],
            image_feature=datasets.Value("binary"),
        )
    assert len(load_dataset(str(tmp_path)).train) == 2


def test_missing_image_column_lists_those_found(tmp_path, write_parquet):
    write_parquet(
        tmp_path / "train.parquet", [0], images=["a"], names=("text", "label"), image_feature=datasets.Value("string")
    )
    write_parquet(tmp_path / "test.parquet", [0])
    with pytest.raises(ConfigurationError, match=r"split 'train' has no image column.*its columns are 'text', 'label'"):
        load_dataset(str(tmp_path))


def test_missing_label_column_lists_those_found(tmp_path, write_parquet):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [0], names=("image", "age"), classes=None)
    with pytest.raises(ConfigurationError, match=r"split 'train' has no label column.*its columns are 'image', 'age'"):
        load_dataset(str(tmp_path))


def test_two_image_columns(tmp_path, write_parquet, picture):
    second = {"right": (datasets.Image(), [{"bytes": picture(5), "path": None}])}
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [0], names=("left", "label"), more=second)
    with pytest.raises(ConfigurationError, match="several image columns: 'left', 'right'"):
        load_dataset(str(tmp_path))


def test_numbers_in_the_image_column(folder, write_parquet):
    write_parquet(folder / "train.parquet", [0, 1], images=[1, 2], image_feature=datasets.Value("int64"))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_dataset(str(folder))


def test_csv_without_images_lists_its_columns(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("width,height\n1,2\n")
    with pytest.raises(ConfigurationError, match="its columns are 'width', 'height'"):
        load_dataset(str(tmp_path))


def test_split_without_rows(folder, write_parquet):
    write_parquet(folder / "test.parquet", [])
    with pytest.raises(ConfigurationError, match=r"split 'test' has no images"):
        load_dataset(str(folder))


def numbered(train, test, classes=None):
    blank = {"bytes": b"", "path": None}
    sets = [Records(name, [blank] * len(labels), labels, classes) for name, labels in (("a", train), ("b", test))]
    names, *numbers = number_classes(*sets)
    return names, *(number.tolist() for number in numbers)


def test_strings_are_numbered_in_sorted_order():
    assert numbered(["owl", "ant", "owl"], ["owl"]) == (("ant", "owl"), [1, 0, 1], [1])


def test_integers_are_numbers_already():
    assert numbered([2, 0, 1], [1, 1]) == (("0", "1", "2"), [2, 0, 1], [1, 1])


def test_a_class_may_have_no_images_at_all():
    assert numbered([0, 2], [2], classes=("x", "y", "z")) == (("x", "y", "z"), [0, 2], [2])


@pytest.mark.parametrize(
    ("train", "test", "classes", "message"),
    [
        ([1, 2], [1], None, "must be 0 to n - 1.*from 1 to 2"),
        ([0, 10**15], [0], None, f"from 0 to {10**15}"),
        ([-1, 0, 1], [0], None, "from -1 to 1"),
        ([0, 1], [0, 2], None, "set b, row 1: label 2 is none of the 2 classes"),
        ([0, 1, 2], [0], ("x", "y"), "set a, row 2: label 2 is none of the 2 classes"),
        ([0, 1], [0, -1], ("x", "y"), "set b, row 1: label -1 is none"),
        ([0, None], [0], ("x", "y"), "set a, row 1: label None"),
        ([0, None], [0], None, "set a, row 1: label None"),
        ([None], [0], None, "set a, row 0: label None"),
        ([0, 1], [None], None, "set b, row 0: label None"),
        ([0, "cat"], [0], None, "set a, row 1: label 'cat'; accepted: all integers, or all strings"),
        ([0.5], [0], None, "label 0.5"),
        ([[0, 1]], [0], None, r"label \[0, 1\]"),
        ([[0, 1]], [0], ("x", "y"), r"label \[0, 1\]"),
        (["ant"], ["bee"], None, "label 'bee' is none of the 1 classes"),
        ([0, 0], [0, 1], ("x", "y"), "set b, row 1: no training image has the class 'y'"),
    ],
)
def test_labels_that_are_refused(train, test, classes, message):
    with pytest.raises(ConfigurationError, match=message):
        numbered(train, test, classes)


def test_unlabelled_test_split_of_a_file(folder, write_parquet):
    write_parquet(folder / "test.parquet", [-1, -1])
    with pytest.raises(ConfigurationError, match=r"split 'test', row 0 \(0.png\): label -1"):
        load_dataset(str(folder))


def test_class_names_come_from_the_source(folder):
    train, _ = read_source(str(folder))
    assert train.classes == ("cat", "dog")
