"""Batches: order, flips, crops and normalisation, against loops that do them one image at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chtconv.data import Batches, ImageSet
from chtconv.data import batches as module
from chtconv.data.batches import crop_images, flip_images
from chtconv.errors import ConfigurationError
from chtconv.randomness import generator

MEAN = torch.tensor([0.5, 0.25, 0.125])
STD = torch.tensor([0.25, 0.5, 1.0])


@pytest.fixture
def images() -> ImageSet:
    """Twenty-three images whose labels are their numbers, so that a batch tells which images it holds."""
    pixels = torch.randint(256, (23, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return ImageSet(pixels, torch.arange(23))


def batches(images: ImageSet, **options) -> Batches:
    return Batches(images, **{"mean": MEAN, "std": STD, "batch_size": 4, "seed": 14, **options})


def whole_epoch(source: Batches, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    parts = list(source.epoch(index))
    return torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts])


def normalised(pixels: torch.Tensor) -> np.ndarray:
    return (pixels.numpy() / 255 - MEAN.numpy()[:, None, None]) / STD.numpy()[:, None, None]


def test_evaluation_keeps_the_order_and_changes_nothing(images):
    pixels, labels = whole_epoch(batches(images, seed=None, flip=True, crop=2), index=3)
    assert labels.tolist() == list(range(23))
    np.testing.assert_allclose(pixels.numpy(), normalised(images.images), atol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(4, [4] * 5 + [3]), (23, [23]), (100, [23]), (1, [1] * 23)])
@pytest.mark.parametrize("seed", [14, None])
def test_the_last_partial_batch_is_kept(images, size, expected, seed):
    source = batches(images, batch_size=size, seed=seed)
    assert [len(labels) for _, labels in source.epoch(0)] == expected
    assert len(source) == len(expected)


def test_an_epoch_is_a_permutation_with_the_right_images(images):
    pixels, labels = whole_epoch(batches(images))
    assert sorted(labels.tolist()) == list(range(23))
    assert labels.tolist() != list(range(23))
    np.testing.assert_allclose(pixels.numpy(), normalised(images.images[labels]), atol=1e-6)


def test_epochs_and_seeds_differ_and_repeat(images):
    def order(seed, index):
        return whole_epoch(batches(images, seed=seed), index)[1].tolist()

    assert order(14, 5) == order(14, 5)
    assert order(14, 5) != order(14, 6)
    assert order(14, 5) != order(15, 5)


def test_the_order_comes_from_the_generator_of_that_name(images):
    expected = torch.randperm(23, generator=generator(14, "order", 2))
    assert torch.equal(whole_epoch(batches(images, flip=True), 2)[1], expected)


def test_an_epoch_needs_no_replay(images):
    source = batches(images, flip=True, crop=1)
    for index in range(3):
        replayed = whole_epoch(source, index)
    fresh = whole_epoch(batches(images, flip=True, crop=1), 2)
    assert torch.equal(replayed[0], fresh[0])
    assert torch.equal(replayed[1], fresh[1])


def test_batches_do_not_move_the_global_generator(images):
    before = torch.random.get_rng_state()
    whole_epoch(batches(images, flip=True, crop=1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("options", [{"flip": True}, {"crop": 2}, {"flip": True, "crop": 3}, {"batch_size": 7}])
def test_augmentation_and_batch_size_leave_the_order(images, options):
    assert torch.equal(whole_epoch(batches(images))[1], whole_epoch(batches(images, **options))[1])


def flips_of_fifty_images(crop: int = 0, index: int = 0) -> torch.Tensor:
    """Which of fifty images with a white left half have it on the right; a crop by one pixel cannot hide that."""
    halves = torch.zeros(50, 3, 8, 8, dtype=torch.uint8)
    halves[..., :4] = 255
    pixels, _ = whole_epoch(batches(ImageSet(halves, torch.arange(50)), flip=True, crop=crop), index)
    return pixels[:, 0, 4, 1] < pixels[:, 0, 4, 6]


def test_flips_stay_when_crops_are_added():
    plain, cropped = flips_of_fifty_images(crop=0), flips_of_fifty_images(crop=1)
    assert torch.equal(plain, cropped)
    assert 0 < plain.sum() < 50


def test_flips_differ_from_epoch_to_epoch():
    assert not torch.equal(flips_of_fifty_images(index=0), flips_of_fifty_images(index=1))


def test_each_image_is_flipped_by_itself_about_half_of_the_time(images):
    many = ImageSet(images.images[:1].repeat(2000, 1, 1, 1), torch.arange(2000))
    pixels, _ = whole_epoch(batches(many, flip=True, batch_size=500))
    plain = torch.from_numpy(normalised(images.images[0])).float()
    same = torch.isclose(pixels, plain, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(pixels, plain.flip(-1), atol=1e-5).flatten(1).all(1)
    assert (same ^ mirrored).all()
    # Five standard deviations of a fair coin thrown 2,000 times, and of neighbours that agree.
    assert abs(mirrored.sum().item() - 1000) < 112
    assert abs((mirrored[1:] == mirrored[:-1]).sum().item() - 1000) < 112


def test_all_windows_occur_and_black_pads_before_normalisation():
    dot = torch.zeros(400, 3, 3, 3, dtype=torch.uint8)
    dot[:, :, 1, 1] = 255
    pixels, _ = whole_epoch(batches(ImageSet(dot, torch.arange(400)), crop=1))
    white, black = (1 - MEAN) / STD, -MEAN / STD
    places = (pixels == pixels.amax(dim=(2, 3), keepdim=True))[:, 0].flatten(1).int().argmax(1)
    assert sorted(set(places.tolist())) == list(range(9))
    torch.testing.assert_close(pixels.amax(dim=(2, 3)), white.expand(400, 3))
    torch.testing.assert_close(pixels.amin(dim=(2, 3)), black.expand(400, 3))
    assert torch.isclose(pixels, black[:, None, None]).sum() == 400 * 3 * 8


def slow_crop(images: np.ndarray, offsets: np.ndarray, padding: int) -> np.ndarray:
    _, channels, height, width = images.shape
    windows = np.zeros_like(images)
    for number, (top, left) in enumerate(offsets):
        for channel in range(channels):
            for row in range(height):
                for column in range(width):
                    y, x = row + top - padding, column + left - padding
                    if 0 <= y < height and 0 <= x < width:
                        windows[number, channel, row, column] = images[number, channel, y, x]
    return windows


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 4),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_crop_against_a_loop(count, height, width, padding, seed):
    random = np.random.default_rng(seed)
    images = random.integers(1, 256, (count, 3, height, width), dtype=np.uint8)
    offsets = random.integers(0, 2 * padding + 1, (count, 2))
    cropped = crop_images(torch.from_numpy(images), torch.from_numpy(offsets), padding)
    np.testing.assert_array_equal(cropped.numpy(), slow_crop(images, offsets, padding))


def test_flip_against_numpy(images):
    mirrored = torch.arange(23) % 3 == 0
    expected = images.images.numpy().copy()
    expected[::3] = expected[::3, :, :, ::-1]
    np.testing.assert_array_equal(flip_images(images.images, mirrored).numpy(), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("options", [{}, {"flip": True, "crop": 1}, {"seed": None}])
def test_types_and_memory_format(images, memory_format, options):
    pixels, labels = next(batches(images, memory_format=memory_format, **options).epoch(0))
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert pixels.shape == (4, 3, 5, 4)
    assert pixels.is_contiguous(memory_format=memory_format)


def test_the_images_themselves_are_never_written(images):
    before = images.images.clone()
    for seed in (14, None):
        for pixels, labels in batches(images, seed=seed, flip=True, crop=1).epoch(0):
            pixels.zero_()
            labels.clone().zero_()
    assert torch.equal(images.images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_made_on_the_device_of_the_images(images):
    on_device = ImageSet(images.images.cuda(), images.labels.cuda())
    pixels, labels = whole_epoch(batches(on_device))
    assert pixels.is_cuda
    assert labels.is_cuda
    expected, order = whole_epoch(batches(images, flip=True, crop=1))
    pixels, labels = whole_epoch(batches(on_device, flip=True, crop=1))
    assert torch.equal(labels.cpu(), order)
    torch.testing.assert_close(pixels.cpu(), expected)


def test_chance_is_drawn_on_the_cpu_and_moved(images, monkeypatch):
    purposes = []

    def on_the_cpu(seed, *purpose):
        purposes.append(purpose)
        return generator(seed, *purpose)

    monkeypatch.setattr(module, "generator", on_the_cpu)
    elsewhere = ImageSet(images.images.to("meta"), images.labels.to("meta"))
    for draw in batches(elsewhere, flip=True, crop=1).draws(3):
        assert {tensor.device.type for tensor in draw} == {"meta"}
    assert purposes == [("order", 3), ("augment", 3)]


def test_batches_for_evaluation_are_not_drawn(images):
    with pytest.raises(ConfigurationError, match="seed=None: batches for evaluation are not drawn"):
        next(batches(images, seed=None).draws(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size must be at least 1 image, not 0"), ({"crop": -1}, "crop must be.*not -1")],
)
def test_values_out_of_range(images, options, message):
    with pytest.raises(ConfigurationError, match=message):
        batches(images, **options)


def test_no_images():
    nothing = ImageSet(torch.zeros(0, 3, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="no images"):
        batches(nothing)
