import pytest
import torch
from torch import nn

from chtconv.errors import ConfigurationError
from chtconv.layers.geometry import Axis, Geometry


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_is_that_of_torch(kernel, dilation):
    layer = nn.Conv1d(1, 1, kernel, padding="same", dilation=dilation, bias=False)
    nn.init.ones_(layer.weight)
    (axis,) = Geometry.of((kernel,), 9, padding="same", dilation=dilation).axes
    for x in range(9):
        image = torch.zeros(1, 1, 9)
        image[..., x] = 1
        touched = layer(image).flatten().nonzero().flatten().tolist()
        assert touched == [w for w in range(axis.windows) if x in axis.sees(w).values()]


@pytest.mark.parametrize("size", [32, 33, 224, 1024])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_window_classes_cover_every_window_and_do_not_grow(size, stride):
    axis = Axis(kernel=3, size=size, stride=stride, padding=(1, 1))
    assert sum(times for _, times in axis.window_classes) == axis.windows
    assert len(axis.window_classes) <= 7
    representative, times = max(axis.window_classes, key=lambda entry: entry[1])
    assert all(axis.is_interior(representative + i) for i in range(times))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": (3, 3), "input_size": 2}, "on a size of 2 leaves nothing"),
        ({"kernel": (3, 3), "input_size": (8, 0)}, r"input_size=\(8, 0\)"),
        ({"kernel": (3, 3), "input_size": (8, 8, 8)}, "has 3 entries; the kernel has 2"),
        ({"kernel": (3, 3), "input_size": 8, "stride": 0}, "stride=0"),
        ({"kernel": (3, 3), "input_size": 8, "dilation": -1}, "dilation=-1"),
        ({"kernel": (3, 3), "input_size": 8, "padding": -1}, "padding=-1"),
        ({"kernel": (3, 3), "input_size": 8, "padding": "sama"}, "padding='sama'"),
        ({"kernel": (3, 3), "input_size": 8, "padding": "same", "stride": 2}, "needs stride 1"),
        ({"kernel": (3, 3), "input_size": (8.5, 8)}, "accepted is a whole number"),
        ({"kernel": (3, 3), "input_size": "32"}, "accepted is a whole number"),
        ({"kernel": (3, 3), "input_size": None}, "accepted is a whole number"),
        ({"kernel": (3,), "input_size": 8, "transposed": True, "padding": "same"}, "accepts whole numbers"),
        ({"kernel": (3, 3), "input_size": 8, "padding_mode": "circle"}, "did you mean 'circular'"),
        ({"kernel": (5,), "input_size": 4, "padding": 2, "padding_mode": "circular"}, "no wider than the input"),
        ({"kernel": (3,), "input_size": 8, "transposed": True, "padding_mode": "reflect"}, "accepts 'zeros'"),
        ({"kernel": (3,), "input_size": 8, "transposed": True, "output_padding": 1}, "less than the stride"),
        ({"kernel": (1,), "input_size": 1, "transposed": True, "padding": 1}, "on a size of -1"),
    ],
)
def test_impossible_geometries_are_named(arguments, message):
    kernel, size = arguments.pop("kernel"), arguments.pop("input_size")
    with pytest.raises(ConfigurationError, match=message):
        Geometry.of(kernel, size, **arguments)
