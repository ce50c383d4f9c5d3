"""Coming and going: states loaded in any order, misuse, copies, and leaving."""

import copy
import itertools
import pickle

import pytest
import torch
from support import assert_nothing_off_the_mask, small_network, train
from torch import nn

import chtconv
from chtconv.enforcement.bits import accumulate, bits_of, matching, rescaled, unless_zeroed
from chtconv.errors import ConfigurationError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
MODEL, OPTIMIZER, TOPOLOGY = "model", "optimizer", "topology"


def run_and_save(kind="adam"):
    """A run in its middle: its states, and its weights ten steps on."""
    model, optimizer, topology = start(kind)
    train(model, optimizer, 5)
    states = {MODEL: model.state_dict(), OPTIMIZER: optimizer.state_dict(), TOPOLOGY: topology.state_dict()}
    states = copy.deepcopy(states)
    train(model, optimizer, 5, seed=1)
    return states, model, topology


def start(kind="adam", seed=3):
    torch.manual_seed(seed)
    model = small_network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, optimizer, chtconv.sparsify(model, optimizer, sparsity=0.7, method="set", interval=2, seed=4)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("order", list(itertools.permutations((MODEL, OPTIMIZER, TOPOLOGY))), ids="-".join)
def test_states_loaded_in_any_order_continue_the_run(order, kind):
    states, whole, topology = run_and_save(kind)
    parts = dict(zip((MODEL, OPTIMIZER, TOPOLOGY), start(kind, seed=5), strict=True))
    for part in order:
        parts[part].load_state_dict(copy.deepcopy(states[part]))
    train(parts[MODEL], parts[OPTIMIZER], 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts[MODEL].parameters(), strict=True))
    assert all(torch.equal(mask, parts[TOPOLOGY].masks[name]) for name, mask in topology.masks.items())


@pytest.mark.parametrize("early", [(MODEL,), (MODEL, OPTIMIZER), (OPTIMIZER,)], ids="-".join)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_loaded_before_sparsify_are_an_error_that_says_what_to_do(kind, early):
    """By then sparsify has cut them to masks of its own, and what the saved masks need is gone."""
    states, _, _ = run_and_save(kind)
    model = small_network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    parts = {MODEL: model, OPTIMIZER: optimizer}
    for part in early:
        parts[part].load_state_dict(copy.deepcopy(states[part]))
    topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method="set", interval=2, seed=5)
    for part in {MODEL, OPTIMIZER} - set(early):
        parts[part].load_state_dict(copy.deepcopy(states[part]))
    topology.load_state_dict(copy.deepcopy(states[TOPOLOGY]))
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: of its .* Give sparsify the state"):
        train(model, optimizer, 1)
    topology.enforce()
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_rate_may_be_another_one_when_training_goes_on(kind):
    """Off the mask Rprop has the rate of the step that it was taken in."""
    before = start(kind)
    train(*before[:2], 5)
    before[1].param_groups[0]["lr"] *= 0.1
    model, optimizer, topology = after = start(kind, seed=5)
    for new, old in zip(after, before, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    optimizer.param_groups[0]["lr"] *= 10
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)


def test_masks_alone_can_be_taken_over_when_one_says_so():
    states, _, _ = run_and_save()
    model, optimizer, topology = start(seed=5)
    topology.load_state_dict(states[TOPOLOGY])
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: .* \(model\.load_state_dict\), or call"):
        topology.evolve()
    topology.enforce()
    assert torch.equal(topology.masks["0.weight"], states[TOPOLOGY]["masks"]["0.weight"])
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)


@pytest.mark.parametrize("how", ["step", "evolve"])
def test_weights_of_another_topology_without_their_masks_are_an_error(how):
    states, _, _ = run_and_save()
    torch.manual_seed(0)
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method="set", seed=9)
    before = {name: mask.clone() for name, mask in topology.masks.items()}
    model.load_state_dict(states[MODEL])
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: the weights that were loaded are not zero off"):
        topology.evolve() if how == "evolve" else train(model, optimizer, 1)
    assert all(torch.equal(mask, topology.masks[name]) for name, mask in before.items())
    topology.load_state_dict(states[TOPOLOGY])
    train(model, optimizer, 1)


@pytest.mark.parametrize("method", ["static", "set"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("after", [0, 3])
def test_weights_that_somebody_wrote_are_masked_before_the_next_step(kind, method, after):
    model = small_network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    topology = chtconv.sparsify(model, optimizer, sparsity=0.7, method=method, interval=100)
    train(model, optimizer, after)
    for module in model:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(model.get_parameter(name)[~mask].all() for name, mask in topology.masks.items())
    written = {name: model.get_parameter(name).detach().clone() for name in topology.masks}
    for group in optimizer.param_groups:
        group["lr"] = 1e-9
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)
    for name, mask in topology.masks.items():
        assert torch.allclose(model.get_parameter(name)[mask], written[name][mask], atol=1e-6)


def test_a_fresh_optimizer_or_one_of_another_kind_may_go_on_from_the_weights():
    states, _, _ = run_and_save("adam")
    model, optimizer, topology = start("sgd", seed=5)
    model.load_state_dict(states[MODEL])
    topology.load_state_dict(states[TOPOLOGY])
    train(model, optimizer, 3)
    assert_nothing_off_the_mask(topology, model, optimizer)


def test_a_new_optimizer_goes_on_with_the_topology_of_the_old_one():
    model, optimizer, topology = start("sgd")
    train(model, optimizer, 5)
    topology.detach()
    optimizer, before = OPTIMIZERS["adam"](model.parameters()), topology
    topology = chtconv.sparsify(
        model, optimizer, sparsity=0.7, method="set", interval=2, seed=4, state=before.state_dict()
    )
    assert all(torch.equal(mask, before.masks[name]) for name, mask in topology.masks.items())
    train(model, optimizer, 5, after=lambda: assert_nothing_off_the_mask(topology, model, optimizer))
    assert (topology.step_count, topology.evolutions, before.evolutions) == (10, 5, 2)


def test_optimizer_state_of_a_dense_run_is_cut_at_once_when_training_goes_on():
    dense = small_network()
    dense_optimizer = torch.optim.Adam(dense.parameters(), amsgrad=True)
    train(dense, dense_optimizer, 2)
    model = small_network()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.8)
    optimizer.load_state_dict(copy.deepcopy(dense_optimizer.state_dict()))
    assert optimizer.state[model[0].weight]["exp_avg"][~topology.masks["0.weight"]].any()
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)


def test_optimizers_that_do_not_train_the_layers_and_layers_that_are_sparse_already():
    model = small_network()
    with pytest.raises(ConfigurationError, match="layer 0: no optimizer holds its weight; pass the one that trains it"):
        chtconv.sparsify(model, torch.optim.SGD(model[7].parameters()))
    with pytest.raises(ConfigurationError, match="layer 3: no optimizer holds its weight"):
        chtconv.sparsify(model, torch.optim.SGD(model[:3].parameters()))
    optimizer = torch.optim.SGD(model.parameters())
    for wrong in ("sgd", [], [optimizer, None]):
        with pytest.raises(ConfigurationError, match="accepted is an optimizer of torch, or a list of them"):
            chtconv.sparsify(model, wrong)
    topology = chtconv.sparsify(model, optimizer)
    with pytest.raises(ConfigurationError, match="layer 0 is sparse already; call detach"):
        chtconv.sparsify(model, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    topology.detach()
    assert not optimizer._optimizer_step_post_hooks


def test_a_layer_that_is_never_called_is_named_and_can_be_left_out():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, images):
            return self.used(images)

    model = Unused()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, method="cht", interval=1)
    masks = topology.masks
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"layer unused\.weight: its input size is unknown.*leave the layer"):
        optimizer.step()
    assert all(torch.equal(mask, topology.masks[name]) for name, mask in masks.items())
    topology.detach()
    topology = chtconv.sparsify(model, optimizer, method="cht", interval=1, layers=["used"])
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert topology.evolutions == 1


def hooks_and_attributes(model, optimizer):
    found = [key for module in model.modules() for key in vars(module) if "chtconv" in key]
    for module in model.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_load_state_dict_post_hooks"):
            found += list(getattr(module, name))
    for parameter in model.parameters():
        found += list(parameter._backward_hooks or ()) + list(parameter._post_accumulate_grad_hooks or ())
    for name, value in vars(optimizer).items():
        if name.endswith("_hooks"):
            found += list(value)
    return found


@pytest.mark.parametrize("method", ["chts", "snfs", "static"])
@pytest.mark.parametrize("make", [torch.optim.SGD, type("Mine", (torch.optim.SGD,), {})])
def test_detach_leaves_no_hook_and_no_attribute(make, method):
    model = small_network()
    optimizer = make(model.parameters(), lr=0.1)
    topology = chtconv.sparsify(model, optimizer, method=method, interval=1, stop=9, sparsity=0.8)
    train(model, optimizer, 2)
    model.eval()(torch.randn(1, 3, 8, 8))
    assert len(hooks_and_attributes(model, optimizer)) > 8
    topology.detach()
    assert not hooks_and_attributes(model, optimizer)
    masks, evolutions = topology.masks, topology.evolutions
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    train(model.train(), optimizer, 1)
    assert all(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    assert topology.evolutions == evolutions
    topology.detach()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_plain_models_that_train_densely_and_leave_the_original_alone(duplicate):
    model, optimizer, topology = start()
    train(model, optimizer, 3)
    other, other_optimizer = duplicate((model, optimizer))
    masks, weights = topology.masks, [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, other.parameters(), strict=True))
    train(other, other_optimizer, 3)
    assert topology.step_count == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert other.get_parameter("0.weight")[~masks["0.weight"]].any()
    again = chtconv.sparsify(other, other_optimizer, sparsity=0.7, method="set", interval=1)
    train(other, other_optimizer, 2)
    assert_nothing_off_the_mask(again, other, other_optimizer)
    train(model, optimizer, 1)
    assert topology.evolutions == 2


@pytest.mark.parametrize("backend", ["sparse", "dense"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_keep_the_hooks_of_others_and_nothing_of_ours(duplicate, backend):
    model, optimizer, topology = start()
    chtconv.accelerate(model, topology, backend=backend)
    for module in (model[0], model[3]):
        module.register_forward_pre_hook(double_by_keyword, with_kwargs=True)
    train(model, optimizer, 1)
    assert b"chtconv" not in pickle.dumps(model)
    other, images = duplicate(model), torch.randn(2, 3, 8, 8)
    assert len(hooks_and_attributes(other, torch.optim.SGD(other.parameters()))) == 2
    assert torch.allclose(other.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)
    assert torch.allclose(duplicate(other)(images), other(images))


def double_by_keyword(module, args, kwargs):
    return tuple(2 * each for each in args), kwargs


@pytest.mark.parametrize("take", [copy.deepcopy, copy.copy])
def test_a_copy_of_a_layer_that_was_changed_is_what_it_was_changed_to(take):
    model, *_ = start()
    layer = take(model[0])
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    assert (copy.deepcopy(layer).weight == 1).all()


@pytest.mark.filterwarnings("ignore")
def test_tools_that_take_modules_apart_find_plain_ones_in_a_copy():
    model, optimizer, _ = start()
    train(model, optimizer, 1)
    images = torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(model.eval())
    expected, groups = other(images), [["0", "1", "2"], ["3", "4"]]
    assert torch.allclose(torch.jit.script(other)(images), expected, atol=1e-6)
    assert torch.allclose(torch.ao.quantization.fuse_modules(other, groups)(images), expected, atol=1e-5)
    # This one copies by itself.
    assert torch.allclose(torch.ao.quantization.fuse_modules(model, groups)(images), expected, atol=1e-5)


def test_the_dense_gradient_of_a_step():
    """By hand: two micro-batches, a mask, and a factor that only what was masked has seen."""
    mask, first, second = torch.tensor([True, True, False]), torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
    bits = bits_of(mask, first)
    dense = accumulate(None, first, bits)
    # The second lands on what is left of the first.
    dense = accumulate(dense, first * mask + second, bits)
    assert dense.tolist() == [11, 22, 33]
    assert rescaled(dense, torch.tensor([5.5, 11, 0]), bits).tolist() == [5.5, 11, 16.5]
    assert rescaled(dense, dense * mask, bits).tolist() == dense.tolist()
    assert rescaled(torch.tensor([0.0, 0, 7]), torch.zeros(3), bits).tolist() == [0, 0, 7]
    infinite = torch.tensor([float("inf"), 1, float("nan")])
    assert rescaled(infinite, torch.zeros(3), bits).tolist() == [0, 0, 0]
    assert unless_zeroed(infinite, torch.zeros(3)).tolist() == [0, 0, 0]
    assert torch.equal(unless_zeroed(dense, torch.tensor([0.0, 1, 0])), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_follow_type_and_layout_and_remove_what_multiplication_would_keep(dtype):
    mask = torch.rand(2, 3, 4, 5) < 0.5
    like = torch.empty(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)
    bits = matching(bits_of(mask, torch.empty(2, 3, 4, 5)), like)
    assert (bits.element_size(), bits.stride()) == (like.element_size(), like.stride())
    assert matching(bits, like) is bits
    assert torch.equal(bits != 0, mask)
    for value in (float("nan"), float("inf"), -0.0, -1.0):
        values = torch.full_like(like, value)
        chtconv.enforcement.bits.apply_bits(values, bits)
        assert torch.equal(values[~mask], torch.zeros_like(values[~mask]))
        assert not torch.signbit(values[~mask]).any()
        assert torch.equal(values[mask].isnan(), torch.full_like(values[mask], value).isnan())
