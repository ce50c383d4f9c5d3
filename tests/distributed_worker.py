"""What a rank does in the tests of several ranks; tests/test_distributed.py starts it by torchrun.

Each case is a function that every rank runs, and that saves what it found for the tests to compare. Networks are in
float64, where sums over ranks and sums over a batch agree far beyond what decides about links.
"""

import contextlib
import copy
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

import chtconv
from chtconv.enforcement.sharding import whole
from chtconv.errors import ConfigurationError
from chtconv.methods import METHODS
from chtconv.topology import evolution

STEPS, INTERVAL, BATCH = 7, 2, 12
# One of them starts from something else than zero. (Rprop cannot step over shards: torch refuses an assignment.)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.3),
}
FRESH = {("adagrad", "sum"): 0.3}


def network():
    """Ordinary, grouped and transposed convolutions; numbers of kernels that 2 and 3 ranks cut unequally, or not."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 1, 3),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).double()


def sparsify(model, optimizer, method, **options):
    settings = {"sparsity": 0.6, "zeta": 0.4, "interval": INTERVAL, "total_steps": 2 * STEPS, "seed": 5}
    return chtconv.sparsify(model, optimizer, method=method, **settings | options)


def batches(steps, size=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.randn(BATCH, 3, size, size, generator=draw, dtype=torch.float64)
        yield images, torch.randint(4, (BATCH,), generator=draw)


def train(model, optimizer, steps=STEPS, rank=0, world=1, seed=0, clip=None, parts=1):
    """Steps over this rank's part of each batch, taken in so many parts, of which only the last is reduced."""
    for images, labels in batches(steps, seed=seed):
        mine = list(zip(images[rank::world].chunk(parts), labels[rank::world].chunk(parts), strict=True))
        optimizer.zero_grad()
        for index, (some_images, some_labels) in enumerate(mine):
            last = index == len(mine) - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if hasattr(model, "no_sync") and not last else contextlib.nullcontext():
                (nn.functional.cross_entropy(model(some_images), some_labels) / len(mine)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def plain(names):
    return {name.removeprefix("module."): value for name, value in names.items()}


def run(
    method, rank=0, world=1, wrap=lambda model: model, optimizer="sgd", clip=None, parts=1, sharing=True, **options
):
    """Trains; what the topology was after each evolution, and at the end."""
    model = wrap(network())
    optimizer_name, optimizer = optimizer, OPTIMIZERS[optimizer](model.parameters())
    topology = sparsify(model, optimizer, method, **options)
    topology._ranks.sharing = sharing
    history = [plain(topology.masks)]
    topology.on_evolution(lambda each: history.append(plain(each.masks)))
    train(model, optimizer, rank=rank, world=world, clip=clip, parts=parts)
    nothing_off_the_mask(topology, model, optimizer, optimizer_name)
    return {
        "history": history,
        "weights": weights(model),
        "records": [row | {"layer": row["layer"].removeprefix("module.")} for row in topology.records],
        "stats": {key: value for key, value in topology.stats().items() if key != "layers"},
    }


def weights(model):
    return plain({name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()})


def nothing_off_the_mask(topology, model, optimizer, optimizer_name="sgd"):
    parameters = dict(model.named_parameters())
    assert any(not mask.all() for mask in topology.masks.values())
    for name, mask in topology.masks.items():
        weight, off = parameters[name], ~mask
        assert whole(weight)[mask].any()
        assert not whole(weight)[off].any(), f"weight {name}"
        assert not whole(weight.grad)[off].any(), f"gradient {name}"
        states = {key: value for key, value in optimizer.state[weight].items() if value.shape == weight.shape}
        assert states
        for key, value in states.items():
            assert (whole(value)[off] == FRESH.get((optimizer_name, key), 0)).all(), f"state {key} of {name}"


def ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def fsdp(**options):
    def wrap(model):
        from torch.distributed.fsdp import fully_shard

        for child in model:
            if any(True for _ in child.parameters()):
                fully_shard(child, **options)
        return fully_shard(model, **options)

    return wrap


def refusal(action):
    """The message of the error that the action ends in."""
    try:
        action()
    except ConfigurationError as error:
        return str(error)
    return "nothing was refused"


def tampered(rank, world, wrap):
    model = wrap(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    topology = sparsify(model, optimizer, "chts")
    train(model, optimizer, 1, rank, world)
    before = topology.masks
    layer = topology._layers[1]
    if rank == world - 1:
        layer.put_mask(layer.mask.roll(1, 0))
    message = refusal(topology.evolve)
    layer.put_mask(before[layer.name])
    after = topology.masks
    assert topology.evolutions == 0
    assert all(torch.equal(before[name], after[name]) for name in before)
    topology.evolve()
    return {"message": message, "masks": plain(topology.masks)}


def divided(rank, world):
    """Layers that this rank regrew in one evolution, with and without sharing."""
    regrow, done = evolution._regrow, []

    def noted(each):
        done.append(each.layer.name)
        return regrow(each)

    found = {}
    evolution._regrow = noted
    for method in ("chts", "set", "rigl"):
        for sharing in (True, False):
            model = network()
            topology = sparsify(model, OPTIMIZERS["sgd"](model.parameters()), method)
            topology._ranks.sharing = sharing
            topology.capture_gradients()
            model(next(batches(1))[0]).sum().backward()
            done.clear()
            topology.evolve()
            found[method, sharing] = list(done)
    evolution._regrow = regrow
    return found


def disagreeing(rank, world):
    """Ranks that are given other seeds, weights, or numbers of steps."""
    seeds = refusal(lambda: sparsify(model := network(), OPTIMIZERS["sgd"](model.parameters()), "set", seed=rank))
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    topology = sparsify(model, optimizer, "set")
    with torch.no_grad():
        model[2].weight.mul_(1 + rank * torch.rand(model[2].weight.shape, dtype=torch.float64))
    values = refusal(topology.evolve)
    if rank:
        topology.step()
    return {"seeds": seeds, "weights": values, "steps": refusal(topology.evolve)}


def alone(rank, world):
    """Each process has a model of its own."""
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    topology = sparsify(model, optimizer, "rigl", seed=rank, distributed=False)
    train(model, optimizer, STEPS - rank)
    groups = [distributed.new_group([each]) for each in range(world)]
    twin, third = network(), network()
    other = sparsify(twin, OPTIMIZERS["sgd"](twin.parameters()), "rigl", seed=rank, distributed=groups[rank])
    return {
        "evolutions": topology.evolutions,
        "masks": topology.masks,
        "size": other._ranks.size,
        "refused": refusal(lambda: sparsify(third, OPTIMIZERS["sgd"](third.parameters()), "set", distributed="yes")),
    }


def crops(rank, world):
    """Other sizes of input on each rank, and a layer that rank 0 does not call."""
    model = ddp(find_unused_parameters=True)(Branches())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    histories = {}
    for method in ("chts", "rigl", "snfs", "mest"):
        topology = sparsify(model, optimizer, method, interval=1)
        draw = torch.Generator().manual_seed(rank)
        for _ in range(3):
            optimizer.zero_grad()
            images = torch.randn(4, 3, 6 + 2 * rank, 7 + rank, generator=draw, dtype=torch.float64)
            model(images, second=rank == 1).square().mean().backward()
            optimizer.step()
        histories[method] = {"masks": topology.masks, "sizes": [layer.input_size for layer in topology._layers]}
        nothing_off_the_mask(topology, model, optimizer)
        topology.detach()
    return histories


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv2d(3, 6, 3, padding=1, dtype=torch.float64)
        self.second = nn.Conv2d(3, 6, 3, dtype=torch.float64)

    def forward(self, images, second):
        return self.second(images) if second else self.first(images)


def saved(rank, world, wrap, method):
    """Half of a training on several ranks: the state to go on from."""
    model = wrap(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    topology = sparsify(model, optimizer, method)
    train(model, optimizer, 5, rank, world)
    momenta = {name: whole(optimizer.state[p]["momentum_buffer"]).clone() for name, p in model.named_parameters()}
    return {"weights": weights(model), "momenta": plain(momenta), "topology": topology.state_dict()}


def resumed(half, method, rank=0, world=1, wrap=lambda model: model):
    """The other half, from a state of any number of ranks."""
    from chtconv.enforcement.sharding import local, local_part

    model = wrap(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    topology = sparsify(model, optimizer, method)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.removeprefix("module.")
            local(parameter).copy_(local_part(half["weights"][name], parameter))
            buffer = torch.zeros_like(parameter)
            local(buffer).copy_(local_part(half["momenta"][name], parameter))
            optimizer.state[parameter]["momentum_buffer"] = buffer
    topology.load_state_dict(half["topology"])
    train(model, optimizer, 4, rank, world, seed=1)
    nothing_off_the_mask(topology, model, optimizer)
    return {"masks": plain(topology.masks), "weights": weights(model), "step": topology.step_count}


def refused(rank, world):
    """Weights that are cut in a way that masks cannot follow."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def linear():
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

    def attempt(model, kind=torch.optim.SGD, **options):
        optimizer = kind(model.parameters(), lr=0.1)
        return refusal(lambda: sparsify(model, optimizer, "set", layers=[nn.Linear], **options))

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel()}
    both = fully_shard(parallelize_module(linear(), mesh["tensor"], plan), mesh=mesh["data"])
    return {
        "tensor_parallel": attempt(parallelize_module(linear(), mesh["tensor"], plan)),
        "both": attempt(both),
        "alone": attempt(fully_shard(linear()), distributed=False),
        "lbfgs": attempt(fully_shard(linear()), torch.optim.LBFGS),
        "part": attempt(fully_shard(linear(), mesh=mesh["data"])),
        "fsdp1": attempt(FullyShardedDataParallel(linear(), use_orig_params=True, device_id=torch.device("cpu"))),
    }


def hybrid(rank, world):
    """A mesh of two axes: copies of what is sharded."""
    from torch.distributed.device_mesh import init_device_mesh

    names = ("copy", "shard")

    return {
        "copies": run("rigl", rank, world, fsdp(mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=names))),
        "shards": run("rigl", rank, world, fsdp(mesh=init_device_mesh("cpu", (1, world), mesh_dim_names=names))),
    }


def columns(rank, world):
    """Shards along another axis than the first, where it is divisible."""
    from torch.distributed.tensor import Shard

    def wrap(model):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % 2 == 0 else None)

    return run("snfs", rank, world, wrap)


def checkpoint(rank, world):
    """What torch has for states of sharded models; it takes a step of its own, so that there is optimizer state."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start():
        model = fsdp()(network())
        optimizer = OPTIMIZERS["adam"](model.parameters())
        return model, optimizer, sparsify(model, optimizer, "rigl")

    model, optimizer, topology = start()
    train(model, optimizer, 5, rank, world)
    states = copy.deepcopy((*get_state_dict(model, optimizer), topology.state_dict()))
    train(model, optimizer, 4, rank, world, seed=1)
    again, its_optimizer, its_topology = start()
    set_state_dict(again, its_optimizer, model_state_dict=states[0], optim_state_dict=states[1])
    its_topology.load_state_dict(states[2])
    train(again, its_optimizer, 4, rank, world, seed=1)
    return [(each.masks, weights(of), each.step_count) for each, of in ((topology, model), (its_topology, again))]


def skipped(rank, world, wrap):
    """A backward pass whose gradients are thrown away leaves no trace in those that are kept."""
    model = wrap(network())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    topology = sparsify(model, optimizer, "rigl", interval=1)
    for images, labels in batches(1, seed=9):
        (100 * nn.functional.cross_entropy(model(images), labels)).backward()
    train(model, optimizer, 2, rank, world)
    return plain(topology.masks)


CASES = {
    **{f"ddp-{method}": lambda r, w, m=method: run(m, r, w, ddp()) for method in METHODS},
    **{
        f"ddp-unshared-{m}": lambda r, w, m=m: run(m, r, w, ddp(), sharing=False)
        for m in ("set", "chts", "chtss", "cht")
    },
    "ddp-view": lambda r, w: run("rigl", r, w, ddp(gradient_as_bucket_view=True)),
    "ddp-static-graph": lambda r, w: run("rigl", r, w, ddp(static_graph=True)),
    "ddp-unused": lambda r, w: run("rigl", r, w, ddp(find_unused_parameters=True)),
    "ddp-parts": lambda r, w: run("rigl", r, w, ddp(), parts=3),
    "ddp-parts-view": lambda r, w: run("snfs", r, w, ddp(gradient_as_bucket_view=True), parts=3),
    "ddp-clip": lambda r, w: run("granet", r, w, ddp(), clip=0.1, optimizer="adam"),
    "ddp-together": lambda r, w: run("granet", r, w, ddp(), allocation="model"),
    "fsdp-together": lambda r, w: run("granet", r, w, fsdp(), allocation="model"),
    "ddp-tampered": lambda r, w: tampered(r, w, ddp()),
    "ddp-skipped": lambda r, w: skipped(r, w, ddp()),
    **{f"ddp-saved-{m}": lambda r, w, m=m: saved(r, w, ddp(), m) for m in ("chts", "snfs", "rigl")},
    "divided": divided,
    "disagreeing": disagreeing,
    "alone": alone,
    "crops": crops,
    **{f"fsdp-{method}": lambda r, w, m=method: run(m, r, w, fsdp()) for method in METHODS},
    **{f"fsdp-{o}": lambda r, w, o=o: run("rigl", r, w, fsdp(), optimizer=o) for o in ("adam", "adagrad")},
    "fsdp-kept": lambda r, w: run("rigl", r, w, fsdp(reshard_after_forward=False)),
    "fsdp-parts": lambda r, w: run("rigl", r, w, fsdp(), parts=3),
    "fsdp-clip": lambda r, w: run("granet", r, w, fsdp(), clip=0.1, optimizer="adam"),
    "fsdp-tampered": lambda r, w: tampered(r, w, fsdp()),
    "fsdp-skipped": lambda r, w: skipped(r, w, fsdp()),
    **{f"fsdp-saved-{m}": lambda r, w, m=m: saved(r, w, fsdp(), m) for m in ("chts", "snfs", "rigl")},
    "checkpoint": checkpoint,
    "refused": refused,
    "hybrid": hybrid,
    "columns": columns,
}
# In torch 2.6 FSDP2 fails on a CPU by itself: its streams have no events.
SHARDS = hasattr(torch.cpu.Stream, "record_event")
UNEQUAL = ("ddp-rigl", "ddp-chts", "fsdp-chts", "fsdp-snfs", "fsdp-rigl", "fsdp-set")


def sharded(case):
    """Whether the case needs FSDP2."""
    return case.startswith("fsdp-") or case in ("checkpoint", "refused", "hybrid", "columns")


def main(folder, names):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.set_num_threads(1)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    cases = dict(CASES)
    for half in sorted(Path(folder).glob("half-*.pt")):
        method, state = half.stem.removeprefix("half-"), torch.load(half)
        cases[f"ddp-resumed-{method}"] = lambda r, w, m=method, s=state: resumed(s, m, r, w, ddp())
        cases[f"fsdp-resumed-{method}"] = lambda r, w, m=method, s=state: resumed(s, m, r, w, fsdp())
    for name, case in cases.items():
        if (names and name not in names) or (sharded(name) and not SHARDS):
            continue
        try:
            found = case(rank, world)
        except Exception:
            # Other ranks may wait for this one: end them all, with the reason.
            (Path(folder) / f"error-{world}-{rank}.txt").write_text(f"{name}\n{traceback.format_exc()}")
            raise
        torch.save(found, Path(folder) / f"{name}-{world}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
