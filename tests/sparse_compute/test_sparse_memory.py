"""Memory that tensors of the sparse kernels leave for the next ones."""

import gc
import os
import threading

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
