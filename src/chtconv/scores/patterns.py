"""Slices by their pattern: for kernels of up to 9 positions the scores of a slice depend on its pattern alone.

In a given kernel, two slices with the same K-bit pattern have the same scores. What one slice contributes to another
depends on nothing but their two patterns, so it is a constant of the geometry: for 3x3 a table of a few megabytes.
The sum over inputs is then one matrix product, of the histograms of patterns with the table, and a look-up.

Shapes: O kernels, C slices, K positions, L = K · K pairs of them, S = 2^K patterns, J targets.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from chtconv.cache import cached, sources
from chtconv.scores import predictors
from chtconv.scores.cases import constants, input_cases, mean_weights
from chtconv.scores.predictors import Predictor
from chtconv.scores.rule import Rule
from chtconv.selection import in_chunks

MAX_POSITIONS = 9
# Of all code that a table depends on, and read with it: an editor may change a file while the process runs.
_SOURCES = sources("chtconv.scores", "chtconv.layers")


class PatternTable(NamedTuple):
    """Constants of a geometry and predictor.

    Attributes:
        values_XJ: contribution to the target ``j``, a position and a pattern in which it is disabled: S rows for
            slices with each pattern, then L rows for the mean weights of the outputs of the kernel.
        targets_J: index of each target in a flattened [K, S].
        both_SL: 1 where both positions are active in a pattern.
    """

    values_XJ: Tensor
    targets_J: Tensor
    both_SL: Tensor


@lru_cache(maxsize=64)
def pattern_table(rule: Rule, predictor: Predictor, device: torch.device) -> PatternTable:
    """The table of a rule: 5.5 MB in float32 for 3x3, built once in a fraction of a second.

    It is kept on disk, too, unless the predictor is none of ours: nothing says then what code it is.

    Args:
        rule: geometry of at most 9 positions, name of the predictor, and arithmetic.
        predictor: what goes by that name.
        device: where it will be used.
    """
    K = rule.geometry.positions
    assert K <= MAX_POSITIONS
    bits_SK = (torch.arange(2**K, device=device)[:, None] >> torch.arange(K, device=device) & 1).to(rule.dtype)
    targets_J = (bits_SK.T == 0).flatten().nonzero().flatten()
    shape = (2**K + K * K, len(targets_J))

    def build() -> Tensor:
        return _values(rule, bits_SK.T.contiguous(), targets_J)

    known = _SOURCES is not None and getattr(predictor, "__module__", None) == predictors.__name__
    values_XJ = build() if not known else cached(f"{rule!r}/{_SOURCES}", shape, rule.dtype, build)
    both_SL = (bits_SK[:, :, None] * bits_SK[:, None, :]).flatten(1)
    return PatternTable(values_XJ.to(device), targets_J, both_SL)


def _values(rule: Rule, bits_KS: Tensor, targets_J: Tensor) -> Tensor:
    K, S = bits_KS.shape
    device, dtype = bits_KS.device, rule.dtype
    # Pairs of slices: pattern of the one that contributes (q) and of the one that is scored (s).
    gram_LX = torch.einsum("rs,tq->rtqs", bits_KS, bits_KS).reshape(K * K, S * S)
    degree_KX = bits_KS[:, :, None].expand(K, S, S).reshape(K, S * S)
    mean_LX = mean_weights(gram_LX, degree_KX, constants(input_cases, rule.geometry, device, dtype), rule)
    slices_SKS = torch.einsum("pkqs,kq->qps", mean_LX.view(K, K, S, S), bits_KS)
    # An output contributes to position p of a pattern through each of its active positions q.
    outputs_LKS = torch.einsum("px,qs->pqxs", torch.eye(K, device=device, dtype=dtype), bits_KS)
    return torch.cat([slices_SKS.flatten(1), outputs_LKS.reshape(K * K, K * S)])[:, targets_J].contiguous()


def codes(mask_OCK: Tensor) -> Tensor:
    """The pattern of every slice of a bool mask as a number below 2^K: int64 [O, C].

    >>> codes(torch.tensor([[[True, False, True], [False, True, False]]]))
    tensor([[5, 2]])
    """
    bits_KOC = mask_OCK.mT.contiguous().view(torch.uint8).transpose(0, 1)
    low_OC = bits_KOC[0].clone()
    for k, bits_OC in enumerate(bits_KOC[1:8], start=1):
        low_OC.add_(bits_OC, alpha=1 << k)
    code_OC = low_OC.long()
    for k, bits_OC in enumerate(bits_KOC[8:], start=8):
        code_OC.add_(bits_OC, alpha=1 << k)
    return code_OC


def histograms(code_OC: Tensor, patterns: int, dtype: torch.dtype) -> Tensor:
    """How many slices of each kernel have each pattern: [O, S]; exact in float32 up to 2^24 slices."""
    counts = torch.zeros(len(code_OC) * patterns, device=code_OC.device, dtype=dtype)
    # In one dimension, where torch has a deterministic sum on every device.
    ones = torch.ones((), device=code_OC.device, dtype=dtype).expand(code_OC.numel())
    return counts.index_add_(0, _rows(code_OC, patterns), ones).view(-1, patterns)


def look_up(by_target_OJ: Tensor, code_OC: Tensor, table: PatternTable) -> Tensor:
    """The values of each slice's own pattern: [O, C, K], stored position by position; 0 at active positions."""
    O, C = code_OC.shape
    patterns = len(table.both_SL)
    K = patterns.bit_length() - 1
    scores_OKC = by_target_OJ.new_empty(O, K, C)
    # Some kernels at once, and the same zeros for all of them.
    chunks = in_chunks(scores_OKC.flatten(1))
    at_once = min(O, chunks[0].stop) if chunks else 0
    by_pattern = by_target_OJ.new_zeros(at_once, K * patterns)
    for some in chunks:
        code_O1C = code_OC[some, None]
        kernels = len(code_O1C)
        own = by_pattern[:kernels].scatter_(1, table.targets_J.expand(kernels, -1), by_target_OJ[some])
        torch.gather(own.view(kernels, K, patterns), 2, code_O1C.expand(-1, K, -1), out=scores_OKC[some])
    return scores_OKC.mT


def _rows(code_OC: Tensor, patterns: int) -> Tensor:
    """Index of each slice's kernel and pattern in a flattened [O, S]."""
    return (code_OC + torch.arange(len(code_OC), device=code_OC.device)[:, None] * patterns).flatten()
