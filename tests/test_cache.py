"""Samples with and without a cache are equal to the bit, and no broken entry is ever trusted."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_datasets import INDICES, equal, make_pairs, save

from datasets import Augmentation, Encoding, cache
from datasets.cache import SampleCache, open_cache
from datasets.folder import SegmentationDataset

SIZES = [(40, 50), (30, 61), (64, 48), (33, 33)]
KEYS = [(epoch, index) for epoch in (0, 1) for index in range(4)]


def dataset_of(pairs, **options):
    options = {"resize": "stretch", "encoding": INDICES, "threads": 1, **options}
    augmentation = Augmentation(scale=(0.6, 1.8), rotate=10, color_jitter=0.3)
    return SegmentationDataset(pairs, image_size=(32, 40), augmentation=augmentation, **options)


def forget(pairs):
    """Take the files away, so that only a cache can answer."""
    for pair in pairs:
        pair.image.unlink()
        pair.mask.unlink()


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("setting", ["ram", "disk"])
@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_samples_are_equal_with_and_without_a_cache(tmp_path, resize, setting, evaluation):
    pairs = make_pairs(tmp_path, SIZES)
    plain = dataset_of(pairs, resize=resize, evaluation=evaluation)
    cached = dataset_of(pairs, resize=resize, evaluation=evaluation)
    cached.use_cache(setting, tmp_path / "cache")
    if not evaluation:
        expected = plain.batch(KEYS)
        assert equal(cached.batch(KEYS), expected)  # filled as it is used
        forget(pairs)
        assert equal(cached.batch(KEYS), expected)
        return
    items = [plain.evaluation_item(i) for i in range(4)]
    for _ in range(2):
        for item, again in zip(items, map(cached.evaluation_item, range(4)), strict=True):
            assert torch.equal(item[0], again[0]) and item[1] == again[1] and torch.equal(item[2], again[2])
        if pairs[0].image.exists():
            forget(pairs)


def test_ids_that_need_more_than_a_byte_are_kept(tmp_path):
    wide = Encoding("indices", 5, -100, tuple((i, i) for i in range(5)))
    pairs = make_pairs(tmp_path, SIZES)
    plain, cached = (
        dataset_of(pairs, encoding=wide, ignore_index=-100, resize="letterbox") for _ in range(2)
    )
    cached.use_cache("ram", None)
    cached.batch(KEYS)
    assert equal(cached.batch(KEYS), plain.batch(KEYS)) and cached.batch(KEYS)[1].min() == -100


def test_a_cache_on_disk_serves_the_next_run_and_is_filled_with_a_bar(tmp_path):
    pairs = make_pairs(tmp_path, SIZES)
    seen = []
    first = dataset_of(pairs, threads=2)
    assert "samples-" in first.use_cache("disk", tmp_path / "cache")
    first.fill_cache(progress=lambda items, total, text: seen.append((total, text)) or items)
    expected = first.batch(KEYS)
    forget(pairs)
    second = dataset_of(pairs)
    second.use_cache("disk", tmp_path / "cache")
    second.fill_cache(progress=lambda *_: pytest.fail("all is there"))
    assert equal(second.batch(KEYS), expected) and seen == [(4, "decoding images")]


@pytest.mark.parametrize("change", ["stamp", "image_size", "encoding", "resize", "order"])
def test_a_cache_of_other_samples_is_not_found(tmp_path, change):
    pairs = make_pairs(tmp_path, SIZES)
    first = dataset_of(pairs)
    first.use_cache("disk", tmp_path / "cache")
    first.fill_cache()
    other = dataset_of(pairs)
    if change == "stamp":
        other.pairs[1] = type(pairs[1])(
            *[getattr(pairs[1], n) for n in ("image", "mask", "height", "width")], (99,)
        )
    elif change == "image_size":
        other.image_size = (32, 48)
    elif change == "encoding":
        other.encoding = Encoding("values", 5, 255, tuple((i, 4 - i) for i in range(5)))
    elif change == "resize":
        other.resize = "letterbox"
    else:
        other.pairs.reverse()
    other.use_cache("disk", tmp_path / "cache")
    assert not any(index in other.cache for index in range(4))


@pytest.mark.parametrize(
    "damage", ["flip", "zeros", "half", "longer", "empty", "no state", "state of another"]
)
def test_a_broken_entry_is_made_anew(tmp_path, damage):
    pairs = make_pairs(tmp_path, SIZES)
    first = dataset_of(pairs)
    first.use_cache("disk", tmp_path / "cache")
    expected = first.batch(KEYS)
    samples, state = (next((tmp_path / "cache").glob(f"*/{name}.bin")) for name in ("samples", "state"))
    data = bytearray(samples.read_bytes())
    if damage == "flip":
        data[100] ^= 1
    elif damage == "zeros":
        data[: len(data) // 2] = bytes(len(data) // 2)
    changed = {"half": data[: len(data) // 2], "longer": data + b"x", "empty": b""}.get(damage, data)
    samples.write_bytes(changed)
    if damage == "no state":
        state.unlink()
    elif damage == "state of another":
        state.write_bytes(state.read_bytes()[8:16] * 4)
    second = dataset_of(pairs)
    second.use_cache("disk", tmp_path / "cache")
    assert equal(second.batch(KEYS), expected)
    third = dataset_of(pairs)
    third.use_cache("disk", tmp_path / "cache")
    third.batch(KEYS)
    forget(pairs)
    assert equal(third.batch(KEYS), expected)


def test_a_writer_killed_between_bytes_and_state_leaves_a_missing_entry(tmp_path):
    kept = SampleCache([4, 4], tmp_path / "c")
    kept._write(0, 0, np.array([1, 2, 3, 4], np.uint8))
    assert 0 not in kept and SampleCache([4, 4], tmp_path / "c").get(0) is None


def test_many_threads_and_processes_fill_one_cache(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from datasets.cache import SampleCache\n"
        f"c = SampleCache([1000] * 50, Path({str(tmp_path / 'c')!r}))\n"
        "for i in range(50):\n"
        "    entry = c.get(i)\n"
        "    assert entry is None or (entry == i).all()\n"
        "    c.put(i, [np.full(1000, i, np.uint8)])\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent) for _ in range(2)
    ]
    here = SampleCache([1000] * 50, tmp_path / "c")
    put = lambda: [here.put(i, [np.full(1000, i, np.uint8)]) for i in range(50)]  # noqa: E731
    threads = [threading.Thread(target=put) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [other.wait() for other in others] == [0, 0]
    assert all((here.get(i) == i).all() for i in range(50))
    assert all((SampleCache([1000] * 50, tmp_path / "c").get(i) == i).all() for i in range(50))


def test_workers_that_are_forked_share_a_cache_in_memory():
    kept = SampleCache([8, 8])
    pid = os.fork()
    if pid == 0:
        kept.put(1, [np.arange(8, dtype=np.uint8)])
        os._exit(0)
    os.waitpid(pid, 0)
    assert kept.get(1).tolist() == list(range(8)) and kept.get(0) is None


def test_workers_that_are_forked_fill_one_cache_on_disk(tmp_path):
    """An open file has one place, which they would share."""
    kept = SampleCache([500] * 4000, tmp_path / "c")
    workers = []
    for rank in range(4):
        workers.append(os.fork())
        if workers[-1] == 0:
            for i in range(rank, 4000, 4):
                kept.put(i, [np.full(500, i % 251, np.uint8)])
            os._exit(0)
    for pid in workers:
        os.waitpid(pid, 0)
    again = SampleCache([500] * 4000, tmp_path / "c")
    assert all(i in again and (again.get(i) == i % 251).all() for i in range(4000))


def test_an_entry_cannot_be_written_to_and_a_cache_can_be_sent(tmp_path):
    for folder in (None, tmp_path / "c"):
        kept = SampleCache([3], folder)
        kept.put(0, [np.array([1, 2, 3], np.uint8)])
        with pytest.raises(ValueError):
            kept.get(0)[0] = 9
        sent = pickle.loads(pickle.dumps(kept)).get(0)
        assert sent is None if folder is None else sent.tolist() == [1, 2, 3]


def test_a_disk_that_fills_up_ends_the_cache_and_not_the_run(tmp_path, monkeypatch):
    pairs = make_pairs(tmp_path, SIZES)
    expected = dataset_of(pairs).batch(KEYS)
    cached = dataset_of(pairs)
    cached.use_cache("disk", tmp_path / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SampleCache, "_write", full)
    assert equal(cached.batch(KEYS), expected) and cached.cache.full


def usage(monkeypatch, free, memory=10**12):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(cache, "_free_memory", lambda: memory)


def test_the_place_is_chosen_by_size_and_said_in_one_line(tmp_path, monkeypatch):
    large = cache.SMALL + 1
    usage(monkeypatch, free=10 * large)
    assert open_cache("off", tmp_path, "a" * 64, [9])[0] is None
    assert open_cache("auto", tmp_path, "a" * 64, [9])[0].folder is None
    kept, line = open_cache("auto", tmp_path, "a" * 64, [large])
    assert kept.folder == tmp_path / ("samples-" + "a" * 24) and str(kept.folder) in line
    usage(monkeypatch, free=large)
    assert open_cache("auto", tmp_path, "b" * 64, [large])[1].endswith("has too little space)")
    usage(monkeypatch, free=large, memory=large)
    kept, line = open_cache("auto", tmp_path, "b" * 64, [large])
    assert kept is None and "do not fit" in line and "\n" not in line
    assert open_cache("disk", tmp_path, "b" * 64, [large])[0] is None
    (tmp_path / "file").write_text("")
    assert "cannot be written" in open_cache("disk", tmp_path / "file", "b" * 64, [9])[1]


def test_the_least_recently_used_cache_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_bytes_in", lambda folder: 1000 if folder.exists() else 0)
    for i, name in enumerate("abc"):
        (tmp_path / f"samples-{name * 24}").mkdir()
        os.utime(tmp_path / f"samples-{name * 24}", (i, i))
    usage(monkeypatch, free=1000)  # half of 1000 + 3 x 1000 is for caches
    open_cache("disk", tmp_path, "d" * 64, [1000])
    assert sorted(path.name[8] for path in tmp_path.iterdir()) == ["c", "d"]


def test_a_cache_in_use_is_never_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_bytes_in", lambda folder: 1000 if folder.exists() else 0)
    usage(monkeypatch, free=2000)
    train, _ = open_cache("disk", tmp_path, "a" * 64, [1000])
    (tmp_path / f"samples-{'c' * 24}").mkdir()  # of an earlier run; not enough is won by sweeping it
    val, line = open_cache("disk", tmp_path, "b" * 64, [1100])
    assert val is None and "has too little space" in line and "decoded each time" in line
    val, _ = open_cache("disk", tmp_path, "b" * 64, [1000])
    assert train.folder.exists() and val.folder.exists()
    assert not (tmp_path / f"samples-{'c' * 24}").exists()


def test_an_image_is_decoded_once_in_its_life(tmp_path):
    pairs = make_pairs(tmp_path, SIZES)
    cached = dataset_of(pairs)
    cached.use_cache("ram", None)
    before = cached.batch(KEYS[:4])
    for pair in pairs:
        save(pair.image, np.zeros((pair.height, pair.width, 3), np.uint8))
    assert equal(cached.batch(KEYS[:4]), before)
