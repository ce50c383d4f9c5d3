import pytest
import torch
from hypothesis import given
from oracles import geometries
from torch import nn

from chtconv.errors import ConfigurationError
from chtconv.geometry import Axis, Geometry


@given(geometry=geometries())
def test_output_size_is_that_of_torch(geometry):
    if not geometry.axes:
        assert geometry.output_size == ()
        return
    n = len(geometry.axes)
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1](
        1,
        1,
        tuple(axis.kernel for axis in geometry.axes),
        stride=tuple(axis.stride for axis in geometry.axes),
        padding=tuple(axis.padding[0] for axis in geometry.axes),
        dilation=tuple(axis.dilation for axis in geometry.axes),
    )
    assert layer(torch.zeros(1, 1, *geometry.input_size)).shape[2:] == geometry.output_size


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
        ({"kernel": (3, 3), "input_size": 2}, r"output would have size \(0, 0\)"),
        ({"kernel": (3, 3), "input_size": (8, 0)}, r"input_size=\(8, 0\)"),
        ({"kernel": (3, 3), "input_size": (8, 8, 8)}, "has 3 entries; the kernel has 2"),
        ({"kernel": (3, 3), "input_size": 8, "stride": 0}, "stride=0"),
        ({"kernel": (3, 3), "input_size": 8, "dilation": -1}, "dilation=-1"),
        ({"kernel": (3, 3), "input_size": 8, "padding": -1}, "padding=-1"),
        ({"kernel": (3, 3), "input_size": 8, "padding": "sama"}, "padding='sama'"),
        ({"kernel": (3, 3), "input_size": 8, "padding": "same", "stride": 2}, "needs stride 1"),
    ],
)
def test_impossible_geometries_are_named(arguments, message):
    kernel, size = arguments.pop("kernel"), arguments.pop("input_size")
    with pytest.raises(ConfigurationError, match=message):
        Geometry.of(kernel, size, **arguments)
