"""Memory that tensors of the sparse kernels leave for the next ones."""

import gc
import mmap
import os
import random
import threading
import weakref

import pytest
import torch

from chtconv.sparse_compute.memory import SMALLEST, empty, release_memory

LARGE = (3, SMALLEST // 4)


@pytest.fixture(autouse=True)
def _nothing_kept():
    release_memory()
    yield
    release_memory()


def test_memory_is_used_again_once_nothing_refers_to_it():
    tensor = empty(LARGE, torch.float32)
    address, view = tensor.data_ptr(), tensor[1:]
    del tensor
    other = empty(LARGE, torch.float32)
    assert other.data_ptr() != address
    assert view.data_ptr() == address + 4 * LARGE[1]
    del view
    gc.collect()
    assert empty(LARGE, torch.float32).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), LARGE, (2, 3, 5, 7, 16), (1, SMALLEST + 1)])
def test_it_is_an_ordinary_tensor(dtype, shape):
    tensor = empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
    tensor.fill_(1)
    assert torch.equal(tensor, torch.ones(shape, dtype=dtype))
    assert tensor.data_ptr() % 64 == 0 or not tensor.numel()


def test_what_is_kept_can_be_given_back():
    tensor = empty(LARGE, torch.float32)
    assert release_memory() == 0
    del tensor
    assert release_memory() >= 4 * LARGE[0] * LARGE[1]
    assert release_memory() == 0


class Live:
    """Tensors of this test, and what they take and took at most."""

    def __init__(self):
        self._tensors, self.most = {}, 0

    def open(self, name, units):
        self._tensors[name] = empty((units * SMALLEST // 4,), torch.float32)
        self.most = max(self.most, sum(each.nbytes for each in self._tensors.values()))

    def close(self, name):
        del self._tensors[name]


def training(live, sizes):
    """Outputs are kept until their gradients have been made, which live two at a time."""
    for number, size in enumerate(sizes):
        live.open(number, size)
    live.open("gradient", sizes[-1])
    for number, size in reversed(list(enumerate(sizes))):
        live.open("next", size)
        live.close("gradient")
        live.open("gradient", size)
        live.close("next")
        live.close(number)
    live.close("gradient")


def inference(live, sizes):
    """Outputs live until the next layer has its own."""
    live.open(0, sizes[0])
    for number, size in enumerate(sizes[1:], 1):
        live.open(number, size)
        live.close(number - 1)
    live.close(len(sizes) - 1)


class System:
    """What is asked of the system, and what it has not got back."""

    def __init__(self, make):
        self._make, self.calls, self._blocks = make, 0, weakref.WeakSet()

    def __call__(self, number, size, **options):
        self.calls += 1
        block = self._make(number, size, **options)
        self._blocks.add(block)
        return block

    def bytes(self):
        return sum(map(len, self._blocks))


@pytest.fixture
def system(monkeypatch):
    made = System(mmap.mmap)
    monkeypatch.setattr(mmap, "mmap", made)
    return made


@pytest.mark.parametrize("loop", [training, inference])
@pytest.mark.parametrize("sizes", [[8, 8, 4, 4, 2, 2, 1], [3, 5, 4, 7, 6], list(range(4, 20))])
def test_what_has_the_same_sizes_every_time_soon_needs_nothing_new(system, loop, sizes):
    live = Live()
    for _ in range(3):
        loop(live, sizes)
    before = system.calls
    for _ in range(3):
        loop(live, sizes)
    assert system.calls == before > 0


@pytest.mark.parametrize("loop", [training, inference])
def test_what_is_kept_stays_bounded_where_sizes_vary(system, loop):
    live, draw = Live(), random.Random(0)
    for _ in range(60):
        loop(live, [draw.randint(1, 40) for _ in range(5)])
        assert system.bytes() <= 2 * live.most
    release_memory()
    assert system.bytes() == 0


def test_kept_and_in_use_together_are_never_more_than_twice_the_most_in_use(system):
    live, draw, held = Live(), random.Random(0), []
    for number in range(400):
        if len(held) > draw.randint(0, 12):
            live.close(held.pop(draw.randrange(len(held))))
        else:
            held.append(number)
            live.open(number, draw.choice([1, 2, 3, 5, 9, 20, 33]))
        assert system.bytes() <= 2 * live.most


def test_tensors_may_end_while_memory_is_asked_for(monkeypatch):
    """As the garbage collector has it, at any moment and in the same thread."""
    held, make = [empty(LARGE, torch.float32) for _ in range(3)], mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *args, **options: (held.clear(), make(*args, **options))[1])
    more = empty((5, SMALLEST), torch.float32)
    assert not held
    assert release_memory() == 3 * LARGE[0] * 4 * LARGE[1]
    del more
    assert release_memory() == 5 * 4 * SMALLEST


def test_threads_never_share():
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            tensor = empty(LARGE, torch.float32).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on Unix")
def test_what_a_forked_process_writes_is_its_own():
    tensor = empty(LARGE, torch.float32).fill_(1)
    child = os.fork()
    if not child:
        memoryview(tensor.numpy()).cast("B")[:4] = b"\xff" * 4
        os._exit(0)
    os.waitpid(child, 0)
    assert tensor[0, 0] == 1
