"""Training steps and inference of a whole network, sparse and dense; see ways.py."""

from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval
from trainees import BATCHES, MODELS, NEVER, Contiguous, Dense, random_batch

import chtconv
from chtconv.models import build_model
from chtconv.sparse_compute import backends
from chtconv.sparse_compute.inference import compile_sparse
from chtconv.sparse_compute.library import library
from chtconv.topology import Topology

SMALL_HEAD = "vgg16, head 512"
MODELS[SMALL_HEAD] = lambda width: build_model("vgg16", 10, seed=0, width=width, head=512)
BATCHES[SMALL_HEAD] = BATCHES["vgg16"]


def sparsified(trainee: Dense, *, sparsity: float, masks: str | None = None, at_random: bool = False) -> Topology:
    """Makes the model of a trainee sparse, with random links, or those of a file.

    Args:
        trainee: its model and optimizer.
        sparsity: where there is no file.
        masks: the file, of a run folder of ``chtconv train``.
        at_random: random links all the same, as many in every layer as the file has.
    """
    if masks is None:
        return chtconv.sparsify(trainee.model, trainee.optimizer, method="static", sparsity=sparsity, interval=NEVER)
    found = safetensors.torch.load_file(masks)
    before = {name: each.detach().clone() for name, each in trainee.model.named_parameters()}
    counts = {name: mask.flatten(1).sum(1) for name, mask in found.items()}
    equal = all(bool((count == count[0]).all()) for count in counts.values())
    topology = chtconv.sparsify(
        trainee.model,
        trainee.optimizer,
        method="static",
        interval=NEVER,
        allocation="kernel" if equal else "layer",
        layers=[name.removesuffix(".weight") for name in found],
        overrides={n.removesuffix(".weight"): {"sparsity": 1 - float(m.float().mean())} for n, m in found.items()},
    )
    if at_random:
        return topology
    state = topology.state_dict()
    for name, mask in found.items():
        state["masks"][name] = mask
        state["layers"][name]["links"] = int(counts[name][0] if equal else counts[name].sum())
        trainee.model.get_parameter(name).data.copy_(before[name] * mask)
    topology.load_state_dict(state)
    topology.enforce()
    return topology


def empty_slices(masks: dict[str, Tensor]) -> float:
    """The share of (kernel, input channel) without a link."""
    slices = [mask.flatten(2).any(2) for mask in masks.values()]
    return 1 - sum(int(each.sum()) for each in slices) / sum(each.numel() for each in slices)


def check_kernels(way: str) -> None:
    """Nothing that is called sparse is timed where all of it would be dense.

    Raises:
        SystemExit: there are no compiled kernels.
    """
    if library() is None:
        raise SystemExit(f"way {way!r}: there are no compiled kernels (docs/building.md); accepted is 'dense'.")


class Training:
    """Training steps: "step".

    Args:
        model: a name in MODELS.
        way: "dense", "sparse" or "auto" (the backends of ``chtconv.accelerate``), or "sparseprop".
        sparsity: of all convolutions; 0 for none.
        width: of the model.
        batch: images; None for the usual number.
        compiled: whether the model is compiled by ``torch.compile``.
        bf16: whether it runs under autocast.
        masks: a file with the links, see :func:`sparsified`.
        at_random: see there.

    Raises:
        SystemExit: there are no compiled kernels for "sparse" and "auto", or "sparse" leaves a layer dense.
    """

    def __init__(
        self,
        model: str,
        way: str,
        sparsity: float = 0.0,
        width: float = 1.0,
        batch: int | None = None,
        compiled: bool = False,
        bf16: bool = False,
        masks: str | None = None,
        at_random: bool = False,
    ) -> None:
        which = (model, "sgd", width)
        self._batch, self._bf16 = random_batch(model, batch), bf16
        self._trainee: Dense
        self.about: dict[str, Any] = {}
        if way == "sparseprop":
            self._trainee = SparsePropTrainee(*which, sparsity=sparsity, images=self._batch[0])
            self.about["sparse_layers"] = self._trainee.sparse_layers
        else:
            self._trainee = Dense(*which)
            topology = None
            if way != "dense":
                check_kernels(way)
                topology = sparsified(self._trainee, sparsity=sparsity, masks=masks, at_random=at_random)
                chtconv.accelerate(self._trainee.model, topology, backend=way)
            if compiled:
                self._trainee.model.compile()
            for _ in range(3):
                self.step()
            if topology is not None:
                self.about |= {"sparse_layers": chosen(topology, way), "empty_slices": empty_slices(topology.masks)}
        self.actions: dict[str, Callable[[], object]] = {"step": self.step}
        self.step()

    def step(self) -> None:
        """Zeroing of gradients, forward, backward, optimizer."""
        trainee, (images, labels) = self._trainee, self._batch
        trainee.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bf16):
            logits = trainee.model(images.to(memory_format=trainee.memory_format))
            loss = functional.cross_entropy(logits, labels)
        loss.backward()
        trainee.optimizer.step()


def chosen(topology: Topology, way: str = "auto") -> str:
    """How many layers are computed sparsely.

    Raises:
        SystemExit: not all of them, where the way is "sparse".
    """
    found = backends(topology)
    dense = [f"{name} ({each.reason})" for name, each in found.items() if each.kind != "sparse"]
    if way == "sparse" and dense:
        raise SystemExit(f"way 'sparse': {', '.join(dense)} would be computed densely; accepted is 'auto'.")
    return f"{len(found) - len(dense)} of {len(found)}"


class SparsePropTrainee(Contiguous):
    """A trainee whose sparse layers are those of SparseProp, as its README does it: where it measured them faster."""

    def __init__(self, *which: Any, sparsity: float, images: Tensor) -> None:
        from sparseprop.utils import swap_modules_with_sparse

        super().__init__(*which)
        sparsified(self, sparsity=sparsity).detach()
        model = swap_modules_with_sparse(self.model, tuple(images.shape))
        names = [type(each).__name__ for each in model.modules()]
        swapped = names.count("SparseConv2d")
        self.sparse_layers = f"{swapped} of {swapped + names.count('Conv2d')}"
        self.model, groups = model, self.optimizer.param_groups[0]
        options = {name: groups[name] for name in ("lr", "momentum", "weight_decay")}
        self.optimizer = torch.optim.SGD(model.parameters(), **options)


class Inference:
    """Forward passes without gradients: "batch".

    Args:
        way: "dense", "contiguous" (the same in that format), "folded" or "folded, contiguous" (the same with batch norm
            in the convolutions), "accelerate", or "compile_sparse".
        sparsity: of all convolutions, for the last two.
        batch: images.
        width: of the model.
        model: a name in MODELS.

    Raises:
        SystemExit: there are no compiled kernels for the last two.
    """

    def __init__(self, way: str, batch: int, sparsity: float = 0.0, width: float = 1.0, model: str = "vgg16") -> None:
        trainee = (Contiguous if "contiguous" in way else Dense)(model, "sgd", width)
        network: nn.Module = trainee.model
        images = random_batch("vgg16", batch)[0].to(memory_format=trainee.memory_format)
        self.about: dict[str, Any] = {}
        topology = None
        if sparsity:
            check_kernels(way)
            topology = sparsified(trainee, sparsity=sparsity)
        network.eval()
        if topology is not None and way == "accelerate":
            chtconv.accelerate(network, topology)
        elif topology is not None:
            network = compile_sparse(network, topology, example=images)
            kinds = list(network.backends.values())[: len(topology.masks)]
            self.about["sparse_layers"] = f"{kinds.count('sparse')} of {len(kinds)}"
        elif way.startswith("folded"):
            network.features = folded(network.features).to(memory_format=trainee.memory_format)

        def run() -> None:
            with torch.no_grad():
                network(images)

        for _ in range(3):
            run()
        if topology is not None and way == "accelerate":
            self.about["sparse_layers"] = chosen(topology)
        self.actions: dict[str, Callable[[], object]] = {"batch": run}


def folded(features: nn.Module) -> nn.Module:
    """A sequence with each batch norm folded into the convolution before it, in eval mode."""
    layers: list[nn.Module] = []
    for layer in features.children():
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()
