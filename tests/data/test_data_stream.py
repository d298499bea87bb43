"""Streamed batches equal the arrays they are cut from, in memory or decoded on the way."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest

from pmoe_jax import data
from pmoe_jax.data import gtsrb, records, stream
from pmoe_jax.errors import PmoeError


def test_batches_follow_the_order():
    digits = data.load("digits")
    rng = np.random.default_rng(0)
    order = rng.permutation(1437)[:1400].reshape(7, 2, 100)  # steps, members, batch
    asked = []

    def draws():
        for indices in order:
            asked.append(len(asked))
            yield indices

    got = stream.batches(digits.train_images, digits.train_labels, draws(), prefetch=2)
    first = next(got)
    assert len(asked) == 3  # one in use, two ahead
    for batch, indices in zip([first, *got], order, strict=True):
        np.testing.assert_array_equal(batch.indices, indices)
        np.testing.assert_array_equal(batch.images, digits.train_images[indices])
        np.testing.assert_array_equal(batch.labels, digits.train_labels[indices])
        assert batch.images.dtype == np.uint8 and batch.images.shape == (2, 100, 32, 32, 3)


def test_memory_map(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    (batch,) = stream.batches(mapped, np.arange(20), [np.array([3, 19, 3])])
    np.testing.assert_array_equal(batch.images, images[[3, 19, 3]])


@pytest.mark.parametrize("prepare", [False, True])
def test_lazy_images(make, tmp_path, prepare):
    source = make.write_folder(tmp_path / "k", make.gtsrb_files("kaggle"))
    if prepare:
        source = data.prepare("gtsrb", source, tmp_path / "tfds")
    whole, lazy = data.load("gtsrb", source), data.load("gtsrb", source, decode_up_to=0)
    assert not isinstance(lazy.train_images, np.ndarray)
    assert lazy.image_shape == whole.image_shape
    assert lazy.train_images.shape == whole.train_images.shape and len(lazy.train_images) == 12
    for index in (5, slice(2, 9, 3), np.array([[1, 0], [11, 1]]), np.arange(12) % 2 == 0):
        np.testing.assert_array_equal(lazy.train_images[index], whole.train_images[index])
    assert lazy.fingerprint() == whole.fingerprint()
    assert data.describe(lazy) == data.describe(whole)
    order = [np.array([4, 2]), np.array([0, 11])]
    pair = (lazy.train_images, lazy.train_labels)
    for batch in stream.batches(*pair, order, threads=2):
        np.testing.assert_array_equal(batch.images, whole.train_images[batch.indices])
    held = [data.load("gtsrb", source, decode_up_to=limit, heldout=0.5) for limit in (None, 0)]
    assert held[0].fingerprint() == held[1].fingerprint()
    assert len(held[1].heldout_images) == 6


def test_errors_reach_the_consumer(make, tmp_path):
    files = {**make.gtsrb_files("kaggle"), "Train/7/00007_00001_00002.png": b"x"}
    source = make.write_folder(tmp_path, files)
    lazy = data.load("gtsrb", source, decode_up_to=0)
    batches = stream.batches(lazy.train_images, lazy.train_labels, [np.array([0]), np.array([11])])
    assert len(next(batches).images) == 1
    with pytest.raises(PmoeError, match=r"00007_00001_00002\.png"):
        next(batches)
    whole = data.load("gtsrb", source, skip_corrupt=True)
    lazy = data.load("gtsrb", source, decode_up_to=0, skip_corrupt=True)
    assert isinstance(lazy.train_images, records.LazyImages) and len(lazy.train_images) == 11
    assert lazy.fingerprint() == whole.fingerprint() and lazy.notes == whole.notes
    assert "skipped 1 corrupt train images" in lazy.notes[0]


@pytest.mark.parametrize("kind", ["gtsrb", "prepared", "folder"])
def test_what_is_too_large_is_lazy(make, tmp_path, kind):
    files = make.gtsrb_files("kaggle")
    name, pixels = "gtsrb", 15 * 32 * 32 * 3  # of training and test images
    if kind == "folder":
        grey = np.zeros((32, 32), np.uint8)
        name, files = (
            "folder",
            {f"{c}/{i}.png": make.png(grey + i) for c in "abc" for i in range(5)},
        )
    source = make.write_folder(tmp_path / "source", files)
    if kind == "prepared":
        source = data.prepare("gtsrb", source, tmp_path / "tfds")
    loaded = data.load(name, source, decode_up_to=pixels)
    assert isinstance(loaded.train_images, np.ndarray)
    loaded = data.load(name, source, decode_up_to=pixels - 1)
    assert isinstance(loaded.train_images, records.LazyImages)


class TwoAtOnce(records.Recipe):
    """Decodes only while another thread does; notes who does."""

    barrier = threading.Barrier(2, timeout=30)
    threads: ClassVar[set[str]] = set()

    def __call__(self, record):
        self.threads.add(threading.current_thread().name)
        self.barrier.wait()
        return super().__call__(record)


def test_a_few_threads_decode(make, tmp_path, monkeypatch):
    source = make.write_folder(tmp_path, make.gtsrb_files("kaggle"))
    train, _, _ = gtsrb.read(source, 2**30)
    with ThreadPoolExecutor(2, "decode") as pool:
        monkeypatch.setattr(records, "_decoders", lambda: pool)
        images = records.LazyImages(train, TwoAtOnce(32))[:4]
    expected = [records.Recipe(32)(record) for record in train[:4]]
    np.testing.assert_array_equal(images, expected)
    assert len(TwoAtOnce.threads) == 2 and all(n.startswith("decode") for n in TwoAtOnce.threads)


def test_stopping_early():
    digits = data.load("digits")
    batches = stream.batches(
        digits.train_images, digits.train_labels, (np.arange(9) for _ in range(10**9))
    )
    next(batches)
    batches.close()
    assert list(batches) == []
