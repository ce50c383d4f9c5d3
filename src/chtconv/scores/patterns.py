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

from chtconv.cache import cached
from chtconv.scores.cases import constants, input_cases, mean_weights
from chtconv.scores.rule import Rule

MAX_POSITIONS = 9


class PatternTable(NamedTuple):
    """Constants of a geometry and predictor.

    Attributes:
        values_XJ: contribution to the target ``j``, a pattern and a disabled position of it: S rows for slices with
            each pattern, then L rows for the mean weights of the outputs of the kernel.
        targets_J: index of each target in a flattened [S, K].
        both_SL: 1 where both positions are active in a pattern.
    """

    values_XJ: Tensor
    targets_J: Tensor
    both_SL: Tensor


@lru_cache(maxsize=64)
def pattern_table(rule: Rule, device: torch.device) -> PatternTable:
    """The table of a rule: 5.5 MB in float32 for 3x3, built once in a fraction of a second, and kept on disk.

    Args:
        rule: geometry of at most 9 positions, predictor and arithmetic.
        device: where it will be used.
    """
    K = rule.geometry.positions
    assert K <= MAX_POSITIONS
    bits_SK = (torch.arange(2**K, device=device)[:, None] >> torch.arange(K, device=device) & 1).to(rule.dtype)
    targets_J = (bits_SK == 0).flatten().nonzero().flatten()
    shape = (2**K + K * K, len(targets_J))
    values_XJ = cached(repr(rule), shape, rule.dtype, lambda: _values(rule, bits_SK.T.contiguous(), targets_J))
    both_SL = (bits_SK[:, :, None] * bits_SK[:, None, :]).flatten(1)
    return PatternTable(values_XJ.to(device), targets_J, both_SL)


def _values(rule: Rule, bits_KS: Tensor, targets_J: Tensor) -> Tensor:
    K, S = bits_KS.shape
    device, dtype = bits_KS.device, rule.dtype
    # Pairs of slices: pattern of the one that contributes (q) and of the one that is scored (s).
    gram_LX = torch.einsum("rs,tq->rtqs", bits_KS, bits_KS).reshape(K * K, S * S)
    degree_KX = bits_KS[:, :, None].expand(K, S, S).reshape(K, S * S)
    mean_LX = mean_weights(gram_LX, degree_KX, constants(input_cases, rule.geometry, device, dtype), rule)
    slices_SSK = torch.einsum("pkqs,kq->qsp", mean_LX.view(K, K, S, S), bits_KS)
    # An output contributes to position p of a pattern through each of its active positions q.
    outputs_LSK = torch.einsum("px,qs->pqsx", torch.eye(K, device=device, dtype=dtype), bits_KS)
    return torch.cat([slices_SSK.flatten(1), outputs_LSK.reshape(K * K, S * K)])[:, targets_J].contiguous()


def codes(links_OCK: Tensor) -> Tensor:
    """The pattern of every slice as a number below 2^K: int64 [O, C]."""
    bit_K = 2 ** torch.arange(links_OCK.shape[2], device=links_OCK.device)
    # Below 512, so the product is exact in every type.
    return (links_OCK @ bit_K.to(links_OCK.dtype)).long()


def histograms(code_OC: Tensor, patterns: int, dtype: torch.dtype) -> Tensor:
    """How many slices of each kernel have each pattern: [O, S]; exact in float32 up to 2^24 slices."""
    counts = torch.zeros(len(code_OC) * patterns, device=code_OC.device, dtype=dtype)
    # In one dimension, where torch has a deterministic sum on every device.
    ones = torch.ones((), device=code_OC.device, dtype=dtype).expand(code_OC.numel())
    return counts.index_add_(0, _rows(code_OC, patterns), ones).view(-1, patterns)


def look_up(by_target_OJ: Tensor, code_OC: Tensor, table: PatternTable) -> Tensor:
    """The values of each slice's own pattern: [O, C, K]; 0 at active positions."""
    O, C = code_OC.shape
    patterns = len(table.both_SL)
    K = patterns.bit_length() - 1
    by_pattern = by_target_OJ.new_zeros(O, patterns * K).index_copy_(1, table.targets_J, by_target_OJ)
    return by_pattern.view(-1, K).index_select(0, _rows(code_OC, patterns)).view(O, C, K)


def _rows(code_OC: Tensor, patterns: int) -> Tensor:
    """Index of each slice's kernel and pattern in a flattened [O, S]."""
    return (code_OC + torch.arange(len(code_OC), device=code_OC.device)[:, None] * patterns).flatten()
