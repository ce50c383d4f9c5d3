"""Models to compile, and whether the compiled ones compute the same."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from chtconv.sparse_compute.inference import SparseModel, compile_sparse, load_compiled

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def trained(model: nn.Module, sparsity: float = 0.8, seed: int = 0) -> nn.Module:
    """A model in eval mode with sparse weights, and statistics unlike those of a fresh one."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, WEIGHTED):
            weight = module.weight.data
            active = torch.rand(weight.shape, generator=draw) >= sparsity
            weight.copy_(torch.randn(weight.shape, generator=draw) * active)
            weight.mul_(math.sqrt(2 * len(weight) / max(1, int(active.sum()))))
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, least, most in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=draw) * (most - least) + least)
    return model.eval()


def same(actual: object, expected: object, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, relative to the largest number."""
    if isinstance(expected, Tensor):
        assert type(actual) is Tensor
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        assert float((actual - expected).abs().max()) <= tolerance * scale
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            same(actual[key], expected[key], tolerance)
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected)
        for one, other in zip(actual, expected, strict=True):
            same(one, other, tolerance)
    else:
        assert actual == expected


def identical(actual: object, expected: object) -> None:
    """Equal bit for bit."""
    same(actual, expected, 0.0)


@torch.no_grad()
def check(model: nn.Module, *inputs: tuple[Tensor, ...], path: Path | None = None, **options: object) -> SparseModel:
    """A model compiled, compared on all inputs, and once more when it was saved and loaded."""
    compiled = compile_sparse(model, **options)
    loaded = None
    if path is not None:
        compiled.save(path)
        loaded = load_compiled(path)
        assert loaded.backends == compiled.backends
    for each in inputs:
        # In-place operations of the model may change its inputs, and ours must not.
        expected = model(*(x.clone() for x in each))
        before = [x.clone() for x in each]
        actual = compiled(*each)
        same(actual, expected)
        assert all(torch.equal(x, y) for x, y in zip(each, before, strict=True))
        if loaded is not None:
            identical(loaded(*each), actual)
    return compiled


class Forward(nn.Module):
    """Some layers, with a forward of the test's own."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.head, self.relu = nn.Linear(4, 5), nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)
