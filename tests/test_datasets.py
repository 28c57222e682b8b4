"""Reading files, samples, order and loaders."""

import os
import pickle
import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import (
    Augmentation,
    DataError,
    Encoding,
    Pair,
    find_images,
    finding,
    fit,
    folder,
    read_image,
    read_mask,
    reading,
)
from datasets.folder import SegmentationDataset
from datasets.reading import load_fitted, load_image
from datasets.sampling import Loader, epoch_batches

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), np.uint8)
GREY = RGB[..., 0]
INDICES = Encoding("indices", 5, 255, (*((i, i) for i in range(5)), (255, 255)))


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def make_pairs(folder, sizes, num_classes=5):
    pairs = []
    for i, size in enumerate(sizes):
        y, x = np.indices(size)
        ids = (y // 5 + x // 7 + i) % num_classes
        image = np.stack([ids * 40, y * 255 // size[0], x * 255 // size[1]], axis=2).astype(np.uint8)
        paths = save(folder / f"{i}.jpg", image, quality=95), save(folder / f"{i}.png", ids.astype(np.uint8))
        pairs.append(Pair(*paths, *size, stamp=(i,)))
    return pairs


def make_dataset(folder, sizes=((40, 50), (30, 61), (64, 48), (40, 50), (33, 33), (90, 70)), **options):
    options = {
        "augmentation": Augmentation(scale=(0.6, 1.8), rotate=10, color_jitter=0.3),
        "threads": 1,
        **options,
    }
    return SegmentationDataset(make_pairs(folder, sizes), encoding=INDICES, image_size=(32, 40), **options)


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))


# Reading


def test_modes_are_brought_to_three_channels(tmp_path):
    same = {"RGB": RGB, "grey": np.repeat(GREY[..., None], 3, 2)}
    assert np.array_equal(read_image(save(tmp_path / "a.png", RGB)), same["RGB"])
    assert np.array_equal(read_image(save(tmp_path / "b.TIF", GREY)), same["grey"])
    assert np.array_equal(read_image(save(tmp_path / "c.png", GREY, "LA")), same["grey"])
    assert np.array_equal(read_image(save(tmp_path / "d.bmp", RGB)), same["RGB"])
    assert np.array_equal(read_image(save(tmp_path / "e.webp", RGB, lossless=True)), same["RGB"])
    wide = GREY.astype(np.uint16) * 257
    assert np.array_equal(read_image(save(tmp_path / "f.png", wide)), same["grey"])
    assert np.array_equal(
        read_image(save(tmp_path / "g.png", GREY > 99)), np.repeat((GREY > 99)[..., None] * 255, 3, 2)
    )
    cmyk = read_image(save(tmp_path / "h.jpg", np.full((16, 16, 3), (200, 30, 30), np.uint8), "CMYK"))
    assert np.abs(cmyk.astype(int) - (200, 30, 30)).max() < 12
    palette = Image.fromarray(RGB).quantize(200)
    palette.save(tmp_path / "i.png")
    assert np.array_equal(read_image(tmp_path / "i.png"), np.asarray(palette.convert("RGB")))


def test_transparency_shows_black(tmp_path):
    rgba = np.dstack([RGB, np.full(GREY.shape, 255, np.uint8)])
    rgba[3, 4, 3] = 0
    seen = read_image(save(tmp_path / "a.png", rgba))
    assert (seen[3, 4] == 0).all() and np.array_equal(np.delete(seen, 3, 0), np.delete(RGB, 3, 0))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    assert np.array_equal(read_image(save(tmp_path / "a.png", ramp), 1)[0, :, 0], np.arange(256))
    assert np.array_equal(
        read_image(save(tmp_path / "a.tiff", ramp.astype(np.int32)), 1)[0, :, 0], np.arange(256)
    )


@pytest.mark.parametrize("channels, expected", [(1, GREY), (2, None), (4, None), (6, None)])
def test_arrays_come_as_they_are(tmp_path, channels, expected):
    array = RNG.integers(0, 256, (5, 6, channels), np.uint8)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read_image(tmp_path / "a.npy", channels), array)
    np.save(tmp_path / "a.npy", array / 255)
    assert np.array_equal(read_image(tmp_path / "a.npy", channels), array)


def test_pages_of_a_tiff_are_channels_when_they_are_as_many(tmp_path):
    bands = [Image.fromarray(RNG.integers(0, 256, (5, 6), np.uint8)) for _ in range(5)]
    bands[0].save(tmp_path / "a.tif", save_all=True, append_images=bands[1:])
    assert np.array_equal(read_image(tmp_path / "a.tif", 5), np.stack(bands, axis=2))


def test_four_channels_keep_alpha_and_add_an_opaque_one(tmp_path):
    rgba = np.dstack([RGB, GREY])
    assert np.array_equal(read_image(save(tmp_path / "a.png", rgba), 4), rgba)
    assert (read_image(save(tmp_path / "b.png", RGB), 4)[..., 3] == 255).all()


def test_four_inks_are_colours_and_no_alpha(tmp_path):
    inks = read_image(save(tmp_path / "a.tif", np.full((4, 4, 3), 255, np.uint8), "CMYK"), 4)
    assert (inks == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotates_image_and_mask_as_viewers_do(tmp_path, orientation):
    stored = np.zeros((8, 16), np.uint8)
    stored[:4] = 200
    tags = Image.Exif()
    tags[0x0112] = orientation
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T,
              6: np.rot90(stored, -1), 7: stored[::-1, ::-1].T, 8: np.rot90(stored)}[orientation]  # fmt: skip
    save(tmp_path / "a.png", stored, exif=tags)
    save(tmp_path / "a.jpg", stored.repeat(20, 0).repeat(20, 1), exif=tags)
    assert np.array_equal(read_image(tmp_path / "a.png", 1)[..., 0], turned)
    assert np.array_equal(read_mask(tmp_path / "a.png"), turned)
    reduced = load_image(tmp_path / "a.jpg", 1, reduce_to=lambda _: turned.shape)[0][..., 0]
    assert (
        reduced.shape < (320, 320)
        and np.abs(
            reduced[::3, ::3].astype(int)
            - np.asarray(Image.fromarray(turned).resize(reduced.shape[::-1], 0))[::3, ::3]
        ).mean()
        < 20
    )


def test_a_large_jpeg_is_decoded_small_but_never_too_small(tmp_path):
    path = save(tmp_path / "a.jpg", np.full((400, 600, 3), 90, np.uint8))
    assert load_image(path, 3, reduce_to=lambda _: (100, 100))[0].shape == (100, 150, 3)
    assert load_image(path, 3, reduce_to=lambda _: (101, 100))[0].shape == (200, 300, 3)
    full, box = fit(read_image(path), (64, 64), "letterbox")
    small, same_box, _ = load_fitted(path, 3, (64, 64), "letterbox")
    assert box == same_box and np.abs(full.astype(int) - small).max() <= 1


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides", [(513, 513), (1025, 777), (1281, 963)])
def test_a_jpeg_decoded_small_lies_where_its_full_image_does(tmp_path, sides, orientation, resize):
    stored = np.zeros(sides, np.uint8)
    stored[sides[0] * 7 // 8 :] = 120  # both edges far from the corner from which the decoder counts
    stored[:, sides[1] * 7 // 8 :] += 120
    tags = Image.Exif()
    tags[0x0112] = orientation
    paths = [save(tmp_path / name, stored, quality=98, exif=tags) for name in ("a.png", "a.jpg")]
    (full, box, _), (small, same_box, decoded) = (load_fitted(path, 1, (64, 64), resize) for path in paths)
    assert box == same_box and decoded.size < stored.size
    wrong = full[..., 0].astype(float) - small[..., 0]
    assert max(abs(wrong[32].sum()), abs(wrong[:, 32].sum())) / 120 < 0.05  # by so many pixels an edge is off


def test_an_image_above_the_limit_is_refused_by_name(tmp_path, monkeypatch):
    path = save(tmp_path / "large.png", RGB)
    monkeypatch.setattr(reading, "MAX_PIXELS", 203)
    with pytest.raises(DataError, match=r"large\.png.*12 x 17.*limit is 203"):
        read_image(path)
    monkeypatch.setattr(reading, "MAX_PIXELS", 204)
    assert read_image(path).shape == RGB.shape


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_images_are_found_by_file_folder_and_pattern_in_natural_order(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("img10.JPG", "img2.png", "more/img1.webp", ".hidden.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    names = lambda found: [path.name for path in found]  # noqa: E731
    assert names(find_images(tmp_path)) == ["img2.png", "img10.JPG"]
    assert names(find_images(tmp_path, recursive=True)) == ["img2.png", "img10.JPG", "img1.webp"]
    assert names(find_images(str(tmp_path / "img*"))) == ["img2.png", "img10.JPG"]
    assert names(find_images(tmp_path / "img2.png")) == ["img2.png"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images(tmp_path / "nowhere")
    for nothing in ("notes.txt", "*.tga"):
        with pytest.raises(DataError, match="no image found"):
            find_images(tmp_path / nothing)


# Samples


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path, resize):
    dataset = make_dataset(tmp_path, resize=resize)
    keys = [(epoch, index) for epoch in (0, 3) for index in range(6)]
    images, masks = dataset.batch(keys)
    assert images.shape == (12, 3, 32, 40) and images.dtype == masks.dtype == torch.uint8
    threads = make_dataset(tmp_path, resize=resize, threads=3)
    assert equal(threads.batch(keys[::-1]), (images.flip(0), masks.flip(0)))
    alone = pickle.loads(pickle.dumps(dataset))[(3, 4)]
    assert equal(alone, (images[10], masks[10])) and not torch.equal(images[10], images[4])
    assert not torch.equal(make_dataset(tmp_path, resize=resize, seed=1)[(3, 4)][0], images[10])


def test_threads_leave_torch_as_many_as_it_had(tmp_path):
    before = torch.get_num_threads()
    make_dataset(tmp_path, threads=3).batch([(0, 0), (0, 1)])
    assert torch.get_num_threads() == before


def test_no_thread_outlives_its_batch(tmp_path):
    """One that did would slow each of the network's operations."""
    make_dataset(tmp_path, threads=3).batch([(0, 0), (0, 1), (0, 2)])
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("samples")]


def test_small_cached_samples_need_no_thread(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path, threads=3)
    dataset.use_cache("ram", None)
    keys = [(0, index) for index in range(6)]
    first = dataset.batch(keys)
    monkeypatch.setattr(folder, "ThreadPoolExecutor", lambda *_, **__: pytest.fail("a thread"))
    assert equal(dataset.batch(keys), first)


@pytest.mark.parametrize("resize", ["stretch", "letterbox", "crop"])
def test_evaluation_gives_the_whole_image_and_the_mask_at_its_own_size(tmp_path, resize):
    dataset = make_dataset(tmp_path, resize=resize, evaluation=True)
    for index, pair in enumerate(dataset.pairs):
        image, box, target = dataset.evaluation_item(index)
        assert target.shape == (pair.height, pair.width) == (box.original_height, box.original_width)
        assert np.array_equal(target, read_mask(pair.mask))
        assert np.array_equal(image.permute(1, 2, 0), load_fitted(pair.image, 3, (32, 40), resize)[0])


def test_wide_ids_give_wide_masks(tmp_path):
    wide = Encoding("indices", 5, -100, (*((i, i) for i in range(5)),))
    dataset = SegmentationDataset(
        make_pairs(tmp_path, [(20, 20)]), encoding=wide, image_size=(32, 32), ignore_index=-100,
        augmentation=Augmentation(scale=(0.5, 0.5)), threads=1,
    )  # fmt: skip
    _, masks = dataset.batch([(0, 0)])
    assert masks.dtype == torch.int64 and set(masks.unique().tolist()) == {-100, 0, 1, 2, 3, 4}


def test_a_mask_that_changed_since_the_check_is_refused_by_name(tmp_path):
    dataset = make_dataset(tmp_path)
    save(dataset.pairs[1].mask, np.full((30, 61), 77, np.uint8))
    with pytest.raises(DataError, match=r"1\.png.*77.*changed"):
        dataset.batch([(0, 1)])


# Order


def test_every_sample_comes_once_an_epoch_whatever_the_sizes():
    for trial in range(400):
        rng = np.random.default_rng(trial)
        count, size, world = int(rng.integers(1, 60)), int(rng.integers(1, 20)), int(rng.integers(1, 5))
        if min(count, size) < world:
            with pytest.raises(ValueError, match="processes"):
                epoch_batches(count, size, 0, 0, world)
            continue
        whole = epoch_batches(count, size, 7, trial, world)
        assert all(batch[rank::world] for batch in whole for rank in range(world))
        assert sorted(sum(whole, [])) == list(range(count))
        assert all(len(batch) == size for batch in whole[:-2]) and len(whole[-1]) < size + world
        assert len(whole) == 1 or 2 * len(whole[-1]) >= size or world > 1


def test_processes_share_the_batches_that_one_would_make():
    assert epoch_batches(47, 8, 3, 5, 2) == epoch_batches(47, 8, 3, 5)
    assert [len(batch) for batch in epoch_batches(5, 2, 0, 0)] == [2, 2, 1]
    assert [len(batch) for batch in epoch_batches(5, 2, 0, 0, 2)] == [2, 3]


def test_order_changes_with_seed_and_epoch_and_repeats():
    orders = {tuple(epoch_batches(30, 30, seed, epoch)[0]) for seed in (0, 1) for epoch in range(5)}
    assert len(orders) == 10 and epoch_batches(30, 7, 1, 2) == epoch_batches(30, 7, 1, 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(tmp_path, workers):
    dataset = make_dataset(tmp_path)
    here, there = Loader(dataset), Loader(dataset, num_workers=workers)
    for epoch in (0, 1):
        batches = epoch_batches(6, 2, 0, epoch)
        whole = list(here.epoch(batches, epoch))
        assert all(
            equal(made, dataset.batch([(epoch, i) for i in batch]))
            for made, batch in zip(whole, batches, strict=True)
        )
        for start in (0, 2):
            rest = list(there.epoch(batches, epoch, start))
            assert len(rest) == 3 - start and all(
                equal(a, b) for a, b in zip(rest, whole[start:], strict=True)
            )
    first = next(there.epoch(batches, 1))  # left in the middle
    assert equal(first, whole[0]) and equal(next(there.epoch(batches, 1, 1)), whole[1])
    there.close()


def test_workers_ignore_interrupts_and_live_on_between_epochs(tmp_path):
    loader = Loader(make_dataset(tmp_path), num_workers=1)
    batches = epoch_batches(6, 2, 0, 0)
    list(loader.epoch(batches, 0))
    (worker,) = loader._workers._iterator._workers
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(loader.epoch(batches, 1))) == 3
    assert loader._workers._iterator._workers[0].pid == worker.pid and worker.is_alive()
    loader.close()


@pytest.mark.slow
def test_workers_that_are_spawned_make_the_same_batches(tmp_path):
    dataset = make_dataset(tmp_path)
    dataset.use_cache("ram", None)
    keys = [(0, 1), (0, 2)]
    how = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=[keys], **how)
    assert equal(next(iter(loader)), dataset.batch(keys))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_data_loader_takes_the_data_set_by_index(tmp_path, workers):
    assert datasets.SegmentationDataset is SegmentationDataset and "SegmentationDataset" in datasets.__all__
    dataset = make_dataset(tmp_path)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=workers)
    for dataset.epoch in (0, 3):
        whole, rest = loader
        assert equal(whole, dataset.batch([(dataset.epoch, index) for index in range(4)]))
        assert equal(rest, dataset.batch([(dataset.epoch, index) for index in (4, 5)]))
        assert whole[0].shape == (4, 3, *dataset.image_size) and whole[0].dtype == torch.uint8
        assert whole[1].shape == (4, *dataset.image_size)
    assert equal(dataset[-1], dataset[(3, 5)]) and len([*dataset]) == 6


def test_names_that_count_alike_have_one_order_whatever_the_folder_says(tmp_path):
    names = ["A.jpg", "a.jpg", "scene01_1.png", "scene1_01.png", "scene1_2.png"]
    paths = [tmp_path / name for name in names]
    assert finding.in_natural_order(paths) == finding.in_natural_order(paths[::-1]) == paths


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_linked_folders_are_searched_once_and_loops_end(tmp_path):
    for name in ("data/sub", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "elsewhere/a.png", RGB)
    save(tmp_path / "data/sub/b.png", RGB)
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/latest").symlink_to(tmp_path / "data/sub")
    (tmp_path / "data/sub/loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data/sub")
    found = find_images(tmp_path / "data", recursive=True)
    assert found == [tmp_path / "data/link/a.png", tmp_path / "data/sub/b.png"]  # not data/latest/b.png
    assert [path.name for path in find_images(tmp_path / "data/link")] == ["a.png"]


def test_brackets_of_a_folder_that_exists_are_no_pattern(tmp_path):
    folder = tmp_path / "photos [2024]"
    (folder / "b[1]").mkdir(parents=True)
    paths = [save(folder / name, RGB) for name in ("a.png", "b[1]/c1.png")]
    assert find_images(folder / "*.png") == paths[:1]
    assert find_images(folder / "b[1]/c[0-9].png") == paths[1:]
    assert find_images(folder / "**/*.png") == paths
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_images(folder / "missing.png")


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_of_a_rotated_image_is_that_of_its_array(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.new("RGB", (50, 30), (200, 10, 10)).save(path, exif=exif)
    array, size, _ = load_image(path, 3)
    assert array.shape[:2] == size == ((30, 50) if orientation < 5 else (50, 30))
