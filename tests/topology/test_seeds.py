"""One seed, one run: the same bits again, the same start for all methods, and the same bits after an interruption."""

import copy
import itertools

import numpy as np
import pytest
import torch
from support import FROM, mixed_network, small_network, sparse, train

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(method):
    def run(seed):
        torch.manual_seed(5)
        options = {"sparsity": 0.7, "method": method, "interval": 2, "stop": 7, "layers": ["*"]}
        model, optimizer, topology = sparse(mixed_network(), seed=seed, **options)
        train(model, optimizer, 6)
        return topology.masks, [p.detach().clone() for p in model.parameters()], topology.records

    (masks, weights, records), (again, same, recorded), (other, _, _) = run(0), run(0), run(1)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert records == recorded
    # Gradual pruning from a dense start draws nothing.
    assert any(not torch.equal(masks[name], other[name]) for name in masks) == (method != "gmp")


@pytest.mark.parametrize("same", [np.int64, np.uint8, torch.tensor])
def test_equal_whole_numbers_are_the_same_seed(same):
    masks, again = (sparse(seed=seed, sparsity=np.float32(0.7))[2].masks for seed in (3, same(3)))
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


@pytest.mark.parametrize("seed", ["3", 3.0, None, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(ConfigurationError, match=f"seed={seed!r}: accepted is a whole number"):
        sparse(seed=seed)


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
def test_methods_of_one_seed_start_from_the_same_masks_whatever_was_drawn_before(allocation):
    """Methods that start from another density do so when they are told to start from this one."""
    starts = {}
    for method in METHODS:
        if (method, allocation) == ("snfs", "kernel"):
            continue
        torch.rand(len(starts) + 1)
        start = {"initial_sparsity": 0.6, "stop": 1000} if method in FROM else {}
        sparsity = 0.8 if method in FROM else 0.6
        starts[method] = sparse(
            mixed_network(), method=method, seed=14, sparsity=sparsity, allocation=allocation, layers=["*"], **start
        )[2].masks
    for masks in starts.values():
        assert all(torch.equal(masks[name], starts["static"][name]) for name in masks)
    assert len(starts["static"]) == 6


def test_initial_masks_do_not_depend_on_which_other_layers_are_sparse():
    torch.manual_seed(0)
    every, one = sparse(seed=3)[2].masks, sparse(seed=3, layers=["3"])[2].masks
    assert torch.equal(every["3.weight"], one["3.weight"])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_and_resumed_continues_with_the_same_bits(method):
    """At step 5 of 10, with evolutions every 2 steps to the end, in several orders of loading."""

    def start():
        torch.manual_seed(3)
        model = small_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return sparse(model, optimizer, sparsity=0.7, method=method, interval=2, stop=10, seed=4)

    model, optimizer, topology = start()
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), topology.state_dict()))
    train(model, optimizer, 5, seed=1)
    every = list(itertools.permutations(range(3)))
    for order in every if method in ("snfs", "chtss") else every[::3]:
        resumed = start()
        for i in order:
            resumed[i].load_state_dict(copy.deepcopy(saved[i]))
        train(resumed[0], resumed[1], 5, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed[0].parameters(), strict=True))
        assert all(torch.equal(topology.masks[n], m) for n, m in resumed[2].masks.items())
        assert topology.records == resumed[2].records
        assert topology.stats() == resumed[2].stats()
        assert topology.step_count == resumed[2].step_count == 10


@pytest.mark.parametrize("method", METHODS)
def test_a_state_goes_around_bit_for_bit(method):
    model, optimizer, topology = sparse(method=method, sparsity=0.7, interval=2, stop=8)
    train(model, optimizer, 5)
    state = topology.state_dict()
    other_model, other_optimizer, other = sparse(method=method, sparsity=0.7, interval=2, stop=8, seed=9)
    other_model.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(copy.deepcopy(state))
    assert_equal(state, other.state_dict())


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    else:
        assert one == other


@pytest.mark.parametrize("method", ["static", "set", "rigl", "snfs", "mest", "gmp", "cht", "chts"])
def test_a_dense_run_and_sparsity_zero_give_the_same_bits(method):
    def run(is_sparse):
        torch.manual_seed(2)
        model = mixed_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        if is_sparse:
            topology = chtconv.sparsify(
                model, optimizer, sparsity=0.0, method=method, interval=1, stop=9, layers=["*"], zeta=0.5
            )
        train(model, optimizer, 4)
        assert not is_sparse or topology.evolutions == (0 if method == "static" else 4)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_exact_scores_evolve_to_the_same_masks_with_any_number_of_threads():
    masks = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model, _, topology = sparse(method="chts", sparsity=0.7, exact=True, interval=10**9)
            model(torch.zeros(1, 3, 8, 8))
            for _ in range(3):
                topology.evolve()
            masks.append(topology.masks)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
