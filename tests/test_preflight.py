"""What a user's folder may hold: each oddity is refused with its file named, or handled rightly."""

import contextlib
import json
import os
import shutil
import struct
import sys
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from datasets import DataError, check_data, find_images, pair_targets
from datasets.folder import SegmentationDataset

SIZE = (24, 32)
IDS = np.indices(SIZE).sum(0) // 12 % 3  # three classes in stripes
HUGE = np.uint64(2**64 - 1)
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
EXIF_TURNED = 6


def image_of(seed=0, size=SIZE, mode="RGB"):
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = size if bands == 1 else (*size, bands)
    return Image.frombytes(
        mode, size[::-1], np.random.default_rng(seed).integers(0, 256, shape, np.uint8).tobytes()
    )


def save_mask(path, ids=IDS, **options):
    Image.fromarray(np.asarray(ids).astype(np.uint8)).save(path, **options)


def replace(old, new):
    """A new file in the place of an old one, which goes."""
    old.unlink()
    return new


def each_mask(root, save):
    """Save all masks anew by `save(path without suffix, ids)`."""
    for path in [*root.glob("*/masks/*")]:
        path.unlink()
        save(path.with_suffix(""), IDS)


@pytest.fixture
def root(tmp_path):
    """Three images to train, two to validate, all valid."""
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for i in range(count):
            image_of(10 * count + i).save(tmp_path / "data" / split / "images" / f"p{i}.png")
            save_mask(tmp_path / "data" / split / "masks" / f"p{i}.png")
    return tmp_path / "data"


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def colour_png(path, ids, colours=COLOURS, mode="RGB"):
    Image.fromarray(np.array(colours, np.uint8)[ids]).convert(mode).save(f"{path}.png")


def palette_png(path, ids, colours=COLOURS):
    mask = Image.fromarray(ids.astype(np.uint8))
    mask.putpalette([value for colour in colours for value in colour])
    mask.save(f"{path}.png")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-60])


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def jpeg_photo(root, **options):
    path = replace(root / "train/images/p0.png", root / "train/images/p0.jpg")
    image_of(5, (240, 320)).save(path, **options)
    save_mask(root / "train/masks/p0.png", np.zeros((240, 320)))
    return path


def mixed_binary(root):
    each_mask(root, lambda path, ids: save_mask(f"{path}.png", ids > 0))
    save_mask(root / "val/masks/p1.png", (IDS > 0) * 255)


def smooth(path, ids):
    large = Image.fromarray(((ids > 0) * 255).astype(np.uint8)).resize((320, 240))
    large.resize((32, 24), Image.Resampling.BICUBIC).rotate(3, Image.Resampling.BILINEAR).save(f"{path}.png")


def two_pages(path):
    image_of().save(path, save_all=True, append_images=[image_of(1)])


def turned_photo(root):
    image_of().save(root / "train/images/p0.png", exif=exif(EXIF_TURNED))


def np_image(root, array):
    np.save(replace(root / "train/images/p0.png", root / "train/images/p0.npy"), array)


def np_mask(root, array):
    np.save(replace(root / "train/masks/p0.png", root / "train/masks/p0.npy"), array)


def only_ignored(root):
    save_mask(root / "train/masks/p1.png", np.full(SIZE, 255))


def suffixed(root):
    for path in [*root.glob("*/masks/*")]:
        path.rename(path.with_stem(path.stem + "_gt"))


def wide_png(path, ids):
    """An RGB PNG of 16 bits a channel, which Pillow reads but cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.repeat(ids[..., None], 3, axis=2))
    head = struct.pack(">IIBBBBB", *ids.shape[::-1], 16, 2, 0, 0, 0)
    with open(f"{path}.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data)
            file.write(struct.pack(">I", zlib.crc32(name + data)))


def glassy_png(path, ids):
    alpha = np.full(ids.shape, 255, np.uint8)
    alpha[:, ::2] = 128  # class 2 would be 1
    Image.fromarray(np.stack([ids.astype(np.uint8), alpha], axis=2)).save(f"{path}.png")


def save_wide(path, ids):
    Image.fromarray(ids.astype(np.uint16)).save(path)


REFUSED = {  # what is wrong: (how to make it, settings, what the message must name)
    "no such root": (lambda r: shutil.rmtree(r), {}, ["data_root", "is not a folder"]),
    "no val folder": (lambda r: shutil.rmtree(r / "val"), {}, ["val/images"]),
    "no masks folder": (lambda r: shutil.rmtree(r / "train/masks"), {}, ["train/masks"]),
    "empty split": (
        lambda r: [p.unlink() for p in r.glob("val/*/*")],
        {},
        ["val/images", "holds no image"],
    ),
    "image without mask": (
        lambda r: (r / "train/masks/p1.png").unlink(),
        {},
        ["train/images/p1.png", "no mask"],
    ),
    "mask without image": (lambda r: (r / "val/images/p0.png").unlink(), {}, ["val/masks/p0.png"]),
    "unexpected suffix of most": (
        lambda r: (suffixed(r), (r / "train/masks/p1_gt.png").unlink()),
        {},
        ["set --mask_suffix _gt", "p0_gt.png"],
    ),
    "suffix that is not there": (
        lambda r: None,
        {"mask_suffix": "_mask"},
        ["train/images/p0.png", "p0_mask"],
    ),
    "two images of a stem": (
        lambda r: image_of().save(r / "train/images/p1.jpg"),
        {},
        ["p1.jpg", "same stem"],
    ),
    "two masks of a stem": (lambda r: save_mask(r / "train/masks/p1.bmp"), {}, ["p1.png", "p1.bmp"]),
    "empty image file": (
        lambda r: (r / "train/images/p0.png").write_bytes(b""),
        {},
        ["images/p0.png", "0 bytes"],
    ),
    "empty mask file": (
        lambda r: (r / "val/masks/p0.png").write_bytes(b""),
        {},
        ["val/masks/p0.png", "0 bytes"],
    ),
    "text as image": (
        lambda r: (r / "train/images/p2.png").write_text("hello"),
        {},
        ["p2.png", "is not a"],
    ),
    "other format": (
        lambda r: image_of().save(r / "train/images/p0.png", format="PPM"),
        {},
        ["images/p0.png"],
    ),
    "short PNG": (lambda r: cut_short(r / "train/images/p1.png"), {}, ["images/p1.png", "cannot be read"]),
    "short mask": (lambda r: cut_short(r / "val/masks/p1.png"), {}, ["val/masks/p1.png", "cannot be read"]),
    "short JPEG": (lambda r: cut_short(jpeg_photo(r)), {}, ["p0.jpg", "truncated"]),
    "flipped byte": (lambda r: flip_byte(r / "train/images/p1.png"), {}, ["images/p1.png", "cannot be read"]),
    "dangling link": (
        lambda r: os.symlink("nowhere", replace(r / "val/images/p0.png", r / "val/images/p0.png")),
        {},
        ["p0"],
    ),
    "sizes differ": (
        lambda r: image_of(size=(20, 32)).save(r / "val/images/p1.png"),
        {},
        ["p1.png", "24 x 32", "20 x 32"],
    ),
    "mask is turned": (lambda r: save_mask(r / "train/masks/p0.png", IDS.T), {}, ["p0.png", "is rotated"]),
    "EXIF turns the image": (turned_photo, {}, ["p0.png", "EXIF"]),
    "value outside": (
        lambda r: save_mask(r / "val/masks/p1.png", IDS + (IDS == 2) * 5),
        {},
        ["val/masks/p1.png", "7 ("],
    ),
    "nothing but ignored": (
        lambda r: [save_mask(p, np.full(SIZE, 255)) for p in r.glob("val/masks/*")],
        {},
        ["val/masks/p0.png", "all pixels of val are ignored"],
    ),
    "ids from 1": (lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", i + 1)), {}, ["1=0,2=1,3=2"]),
    "0/255, three classes": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", (i > 0) * 255)),
        {"ignore_index": 254},
        ["255"],
    ),
    "unnamed values": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", i * 60)),
        {},
        ["0=0,60=1,120=2"],
    ),
    "wide ids": (lambda r: np_mask(r, IDS.astype(np.int32) * 70000), {}, ["p0.npy", "70000"]),
    "negative ids": (lambda r: np_mask(r, IDS.astype(np.int16) - 1), {}, ["p0.npy", "-1"]),
    "unnamed colours": (lambda r: each_mask(r, colour_png), {}, ["#ff0000", "class_colors", "#000000=0"]),
    "undeclared colour": (
        lambda r: (each_mask(r, colour_png), colour_png(r / "val/masks/p0", IDS, ((9, 9, 9), *COLOURS[1:]))),
        {"class_colors": COLOURS},
        ["val/masks/p0.png", "#090909"],
    ),
    "colours, mapped values": (
        lambda r: each_mask(r, colour_png),
        {"labels": "0=0,1=1,2=2"},
        ["hold colours"],
    ),
    "one class, two colours": (
        lambda r: each_mask(r, colour_png),
        {"class_colors": (COLOURS[0],) * 3},
        ["nothing stands for class"],
    ),
    "JPEG 0/255": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.jpg", (i > 0) * 255, quality=60)),
        {"num_classes": 2},
        ["p0.jpg", "stray values", "near", "snap"],
    ),
    "JPEG ids": (
        lambda r: save_mask(replace(r / "val/masks/p0.png", r / "val/masks/p0.jpg"), IDS * 0),
        {},
        ["p0.jpg", "is a JPEG"],
    ),
    "JPEG colours": (
        lambda r: each_mask(r, lambda p, i: Image.fromarray(np.array(COLOURS, np.uint8)[i]).save(f"{p}.jpg")),
        {"class_colors": COLOURS},
        ["p0.jpg", "stray values"],
    ),
    "poor JPEG of the declared colours": (
        lambda r: each_mask(
            r, lambda p, i: Image.fromarray(np.array(COLOURS, np.uint8)[i]).save(f"{p}.jpg", quality=20)
        ),
        {"class_colors": COLOURS},
        ["p0.jpg", "stray values", "snap"],
    ),
    "smooth edges": (lambda r: each_mask(r, smooth), {"num_classes": 2}, ["p0.png", "stray values", "near"]),
    "snap of class ids": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", i * 60)),
        {"labels": "snap"},
        ["snap:0=0,60=1"],
    ),
    "snap of a whole class": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", i * 120)),
        {"labels": "snap:0=0,255=1", "num_classes": 2},
        ["120", "too common"],
    ),
    "palettes differ": (
        lambda r: (each_mask(r, palette_png), palette_png(r / "val/masks/p1", IDS, COLOURS[::-1])),
        {},
        ["palettes differ"],
    ),
    "0/1 and 0/255": (mixed_binary, {"num_classes": 2}, ["255 may be a class"]),
    "map lacks a class": (lambda r: None, {"labels": "0=0,1=1"}, ["class 2"]),
    "map names too many": (lambda r: None, {"labels": "0=0,1=1,2=3"}, ["class 3"]),
    "map lacks a value": (
        lambda r: save_mask(r / "val/masks/p0.png", IDS + 1),
        {"labels": "0=0,1=1,2=2"},
        ["val/masks/p0.png", "3 ("],
    ),
    "ignored id is a class": (lambda r: None, {"ignore_index": 1}, ["ignore_index is 1"]),
    "fractions in a mask": (lambda r: np_mask(r, IDS / 2), {}, ["p0.npy", "whole numbers"]),
    "mask of four dimensions": (lambda r: np_mask(r, IDS[None, None]), {}, ["p0.npy", "shape"]),
    "floats beyond 1": (lambda r: np_image(r, np.full((*SIZE, 3), 7.5)), {}, ["p0.npy", "0..1"]),
    "not a number": (lambda r: np_image(r, np.full((*SIZE, 3), np.nan)), {}, ["p0.npy", "0..1"]),
    "channels first": (lambda r: np_image(r, np.zeros((3, *SIZE), np.uint8)), {}, ["p0.npy", "transpose"]),
    "too few channels": (lambda r: None, {"in_channels": 5}, ["p0.png", "has 3 channels"]),
    "pickled npy": (lambda r: np_image(r, np.array([{}], object)), {}, ["p0.npy", "cannot be read"]),
    "two pages": (
        lambda r: two_pages(replace(r / "val/images/p0.png", r / "val/images/p0.tif")),
        {},
        ["p0.tif", "2 pages"],
    ),
    "colours among ids": (lambda r: colour_png(r / "val/masks/p0", IDS), {}, ["colours"]),
    "huge ids": (
        lambda r: np_mask(r, np.where(IDS == 1, HUGE, IDS.astype(np.uint64))),
        {},
        ["huge"],
    ),
    "infinite ids": (
        lambda r: np_mask(r, np.where(IDS == 2, np.inf, IDS * 255.0)),
        {"num_classes": 2, "labels": "snap:0=0,255=1"},
        ["p0.npy", "huge"],
    ),
    "a image of wide integers": (
        lambda r: np_image(r, np.random.default_rng(0).integers(0, 256, (*SIZE, 3))),
        {},
        ["p0.npy", "int64", "uint8"],
    ),
    "JPEG ids in a TIFF": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.tif", i, compression="jpeg")),
        {},
        ["p0.tif", "JPEG"],
    ),
    "lossy WebP behind a colour profile": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.webp", i > 1, icc_profile=bytes(3000))),
        {},
        ["p0.webp", "lossy WebP"],
    ),
    "ids of 16 bits a channel": (lambda r: each_mask(r, wide_png), {}, ["p0.png", "16 bits per channel"]),
    "half transparent ids": (lambda r: each_mask(r, glassy_png), {}, ["p0.png", "half transparent"]),
    "JPEG ids among palettes": (
        lambda r: (
            each_mask(r, palette_png),
            save_mask(replace(r / "val/masks/p0.png", r / "val/masks/p0.jpg"), IDS * 0),
        ),
        {},
        ["p0.jpg", "is a JPEG"],
    ),
    "JPEG ids by a map": (
        lambda r: save_mask(replace(r / "val/masks/p0.png", r / "val/masks/p0.jpg"), IDS * 0),
        {"labels": "0=0,1=1,2=2"},
        ["p0.jpg", "is a JPEG"],
    ),
    "0/255 and ignored, three classes": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", (i > 0) * 255)),
        {},
        ["--num_classes 2", "num_classes 3", "255 ("],
    ),
    "16-bit values among colours": (
        lambda r: (each_mask(r, colour_png), save_wide(r / "val/masks/p0.png", IDS * 1000)),
        {"class_colors": COLOURS},
        ["val/masks/p0.png", "beyond 0..255"],
    ),
    "16-bit values among colours, snapped": (
        lambda r: (each_mask(r, colour_png), save_wide(r / "val/masks/p0.png", (IDS > 5) + 1000)),
        {"class_colors": ((255, 255, 255), *COLOURS), "num_classes": 4, "labels": "snap"},
        ["val/masks/p0.png", "beyond 0..255"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_data_names_the_culprit_and_says_everything_at_once(root, what):
    spoil, settings, named = REFUSED[what]
    spoil(root)
    with pytest.raises(DataError) as caught:
        check_data(root, **{"num_classes": 3, **settings})
    message = str(caught.value)
    assert all(part in message for part in named), message
    assert "Traceback" not in message and message.count("\n") < 60


def test_mask_values_without_a_class_come_with_what_to_do(root):
    each_mask(root, lambda path, ids: save_mask(f"{path}.png", ids * 60))
    with pytest.raises(DataError) as caught:
        check_data(root, num_classes=3)
    *_, fix = str(caught.value).split(" | ")
    assert "set this" in fix and "--labels '0=0,60=1,120=2'" in fix


@pytest.mark.parametrize("spread", [palette_png, lambda path, ids: save_mask(f"{path}.png", ids)])
@pytest.mark.parametrize(
    "values, settings, fixes",
    [
        ((0, 1, 5), {"num_classes": 2}, [{"ignore_index": 5}, {"labels": "0=0,1=1,5=ignore"}]),
        ((0, 1, 2, 3, 7, 255), {"num_classes": 4}, [{"labels": "0=0,1=1,2=2,3=3,7=ignore,255=ignore"}]),
        ((*range(20), 30), {"num_classes": 20}, [{"ignore_index": 30}]),
    ],
)
def test_the_fix_for_values_without_a_class_works_as_written(root, values, settings, fixes, spread):
    wide = np.array(values)[np.indices(SIZE).sum(0) % len(values)]
    colours = [(i, 255 - i, 0) for i in range(256)]
    each_mask(root, lambda path, _: spread(path, wide, *[colours] * (spread is palette_png)))
    with pytest.raises(DataError) as caught:
        check_data(root, **settings)
    written = [f"--{name} {value!r}" for fix in fixes for name, value in fix.items()]
    assert f"| set {' or '.join(written)}, or fix the masks" in str(caught.value)
    for fix in fixes:
        assert check_data(root, **settings, **fix).class_pixels["train"].all()


def test_a_lone_stray_value_is_to_be_fixed_first(root):
    save_mask(root / "val/masks/p1.png", IDS + (IDS == 2) * 5)
    with pytest.raises(
        DataError, match=r"\| fix it, or set --ignore_index 7 or --labels '0=0,1=1,2=2,7=ignore'"
    ):
        check_data(root, num_classes=3)


MANY_COLOURS = [(r, g, b) for r in (0, 255) for g in (0, 128, 255) for b in (0, 255)]
OTHERS = ((230, 25, 75), (60, 180, 75), (255, 225, 25))


@pytest.mark.parametrize("labels", ["auto", "snap"])
@pytest.mark.parametrize(
    "held, declared, ids",
    [
        (MANY_COLOURS[:4], ((0, 0, 0), *OTHERS), np.indices(SIZE).sum(0) % 4),
        (
            MANY_COLOURS[:4],
            ((0, 0, 0), *OTHERS),
            (np.indices(SIZE) % 20 < 4).all(0) * np.indices(SIZE)[1] % 4,
        ),
        (MANY_COLOURS, [(20 * i, 100, 10 * i) for i in range(12)], np.indices(SIZE).sum(0) % 12),
    ],
    ids=["four", "four on much background", "twelve"],
)
def test_class_colours_of_other_masks_are_told_once_with_a_map_that_works(root, held, declared, ids, labels):
    each_mask(root, lambda path, _: colour_png(path, ids, held))
    settings = {"num_classes": len(held), "class_colors": declared}
    with pytest.raises(DataError, match="class_colors are not the colours that the masks hold") as caught:
        check_data(root, labels=labels, **settings)
    message = str(caught.value)
    assert "1 problem found" in message and "smoothing" not in message
    start = message.split("--labels '")[1].split("'")[0]
    assert check_data(root, **settings, labels=start).class_pixels["train"].all()


@pytest.mark.parametrize("class_colors", [None, ((1, 2, 3), *OTHERS[:2])])
@pytest.mark.parametrize("suffix, quality", [("jpg", 95), ("jpg", 75), ("png", 100)])
def test_a_map_to_start_from_for_damaged_colours_joins_shades_and_snaps(root, suffix, quality, class_colors):
    ids = np.indices((96, 128)).sum(0) // 40 % 3
    noise = np.random.default_rng(0).integers(0, 12, (*ids.shape, 3))

    def save(path, _):
        colours = np.abs(np.array(COLOURS)[ids] - (suffix == "png") * noise).astype(np.uint8)
        Image.fromarray(colours).save(f"{path}.{suffix}", quality=quality, subsampling=0)

    each_mask(root, save)
    for path in root.glob("*/images/*"):
        image_of(int(path.stem[1:]) + len(str(path.parent)), ids.shape).save(path)
    with pytest.raises(DataError, match="--labels 'snap:") as caught:
        check_data(root, num_classes=3, class_colors=class_colors)
    start = str(caught.value).split("--labels '")[1].split("'")[0]
    assert start.count("=") - start.count("=ignore") == 3
    report = check_data(root, num_classes=3, class_colors=class_colors, labels=start)
    shares = report.class_pixels["train"] / report.class_pixels["train"].sum()
    own = np.bincount(ids.ravel())[[0, 2, 1]] / ids.size  # by colour: black, blue, red
    assert np.abs(shares - own).max() < 0.02


def test_no_snap_is_advised_between_class_ids(root):
    ids = np.arange(IDS.size).reshape(SIZE) % 16
    ids[0, :10] = range(20, 30)  # one pixel each
    save_mask(root / "val/masks/p0.png", ids)
    with pytest.raises(DataError, match="10 stray values") as caught:
        check_data(root, num_classes=16)
    assert "set labels to snap" not in str(caught.value)


def test_classes_that_a_small_set_lacks_are_no_wrong_class_colours(root):
    each_mask(root, lambda path, ids: colour_png(path, ids % 2))
    report = check_data(root, num_classes=5, class_colors=COLOURS + OTHERS[:2])
    assert report.class_pixels["train"].tolist()[2:] == [0, 0, 0]
    colour_png(root / "val/masks/p0", IDS % 2 * (np.arange(SIZE[1]) > 0), ((9, 9, 9), COLOURS[1]))
    with pytest.raises(DataError, match=r"outside the classes \(1\):\n  val/masks/p0.png"):
        check_data(root, num_classes=5, class_colors=COLOURS + OTHERS[:2])


@pytest.mark.parametrize("class_colors", [None, ((1, 2, 3), *OTHERS[:2])])
def test_the_file_that_is_unlike_the_others_is_named(root, class_colors):
    colour_png(root / "train/masks/p2", IDS)
    with pytest.raises(DataError, match=r"masks in colour: 1, others: 4; look at train/masks/p2\.png"):
        check_data(root, num_classes=3, class_colors=class_colors)
    each_mask(root, colour_png)
    for name in ("val/masks/p0", "val/masks/p1"):
        palette_png(root / name, IDS)
    with pytest.raises(DataError, match=r"masks in colour: 3, others: 2; look at val/masks/p0\.png"):
        check_data(root, num_classes=3, class_colors=class_colors)
    each_mask(root, colour_png)
    with pytest.raises(DataError) as caught:
        check_data(root, num_classes=3, class_colors=class_colors)
    assert "in colour" not in str(caught.value)


def test_ids_among_declared_colours_are_not_to_be_ignored(root):
    colour_png(root / "train/masks/p2", IDS)
    with pytest.raises(DataError) as caught:
        check_data(root, num_classes=3, class_colors=COLOURS)
    assert "masks in colour: 1, others: 4; look at train/masks/p2.png" in str(caught.value)
    assert "#010101=ignore" not in str(caught.value)


def test_many_clean_values_without_a_class_are_not_called_damaged(root):
    ids = np.indices(SIZE).sum(0) % 12
    each_mask(root, colour_png)
    colour_png(root / "val/masks/p0", ids, MANY_COLOURS)
    with pytest.raises(DataError, match=r"outside the classes \(1\):\n  val/masks/p0.png") as caught:
        check_data(root, num_classes=3, class_colors=COLOURS)
    assert "smoothing" not in str(caught.value)


def grey_photo(root, mode, suffix=".png", **options):
    image_of(3, mode=mode).save(
        replace(root / "train/images/p0.png", root / f"train/images/p0{suffix}"), **options
    )


def rename(root, old, new):
    (root / old).rename(root / new)


def turned_pair(root):
    image_of(size=(32, 24)).save(root / "train/images/p0.png", exif=exif(EXIF_TURNED))


def turned_both(root):
    turned_pair(root)
    turned = Image.fromarray(IDS.astype(np.uint8)).transpose(Image.Transpose.ROTATE_90)
    turned.save(root / "train/masks/p0.png", exif=exif(EXIF_TURNED))


def strange_name(root, name):
    for kind in ("images", "masks"):
        rename(root, f"train/{kind}/p0.png", f"train/{kind}/{name}.png")


def clear_background(path, ids):
    rgba = np.concatenate([np.array(COLOURS, np.uint8)[ids], (ids > 0)[..., None] * np.uint8(255)], axis=2)
    rgba[ids == 0, :3] = 77  # what lies under full transparency is not seen
    Image.fromarray(rgba).save(f"{path}.png")


def binary(root, save=save_mask):
    each_mask(root, lambda path, ids: save(f"{path}.png", (ids > 0) * 255))


HANDLED = {  # what is odd: (how to make it, settings, ids of the first training mask, part of a warning)
    "nothing": (lambda r: None, {}, IDS, None),
    "palette masks": (lambda r: each_mask(r, palette_png), {}, IDS, None),
    "palette in another order": (
        lambda r: each_mask(r, palette_png),
        {"class_colors": COLOURS[::-1]},
        IDS,
        "palette index 0",
    ),
    "palette by colour": (
        lambda r: each_mask(r, palette_png),
        {"labels": "#0000ff=0,#ff0000=1,#000000=2"},
        2 - IDS,
        None,
    ),
    "0/255": (binary, {"num_classes": 2}, IDS > 0, None),
    "JPEG 0/255, snapped": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.jpg", (i > 0) * 255, quality=90)),
        {"num_classes": 2, "labels": "snap"},
        IDS > 0,
        None,
    ),
    "JPEG colours, snapped": (
        lambda r: each_mask(
            r,
            lambda p, i: Image.fromarray(np.array(COLOURS, np.uint8)[i]).save(
                f"{p}.jpg", quality=95, subsampling=0
            ),
        ),
        {"class_colors": COLOURS, "labels": "snap"},
        IDS,
        None,
    ),
    "one bit": (
        lambda r: each_mask(r, lambda p, i: Image.fromarray(i > 0).save(f"{p}.png")),
        {"num_classes": 2},
        IDS > 0,
        None,
    ),
    "bool npy": (
        lambda r: each_mask(r, lambda p, i: np.save(f"{p}.npy", i > 0)),
        {"num_classes": 2},
        IDS > 0,
        None,
    ),
    "int64 npy": (lambda r: np_mask(r, IDS), {}, IDS, None),
    "float npy of whole numbers": (lambda r: np_mask(r, IDS[..., None].astype(np.float32)), {}, IDS, None),
    "16-bit values": (
        lambda r: each_mask(r, lambda p, i: Image.fromarray((i * 1000).astype(np.uint16)).save(f"{p}.png")),
        {"labels": "0=0,1000=1,2000=2"},
        IDS,
        None,
    ),
    "32-bit TIFF": (
        lambda r: each_mask(r, lambda p, i: Image.fromarray(i.astype(np.int32)).save(f"{p}.tiff")),
        {},
        IDS,
        None,
    ),
    "values by map": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.png", i * 60)),
        {"labels": "0=1,60=0,120=ignore", "num_classes": 2},
        np.array([1, 0, 255])[IDS],
        None,
    ),
    "two values, one class": (lambda r: None, {"labels": "0=0,1=1,2=1", "num_classes": 2}, IDS > 0, None),
    "ids in RGB": (
        lambda r: each_mask(r, lambda p, i: colour_png(p, i, ((0,) * 3, (1,) * 3, (2,) * 3))),
        {},
        IDS,
        None,
    ),
    "colours": (lambda r: each_mask(r, colour_png), {"class_colors": COLOURS}, IDS, None),
    "colours by map": (
        lambda r: each_mask(r, colour_png),
        {"labels": "#0000FF=0, #ff0000=1, #000000=ignore", "num_classes": 2},
        np.array([255, 1, 0])[IDS],
        None,
    ),
    "colours, one ignored": (
        lambda r: each_mask(r, colour_png),
        {"class_colors": COLOURS[:2], "labels": "#0000ff=ignore", "num_classes": 2},
        np.array([0, 1, 255])[IDS],
        None,
    ),
    "black and white": (
        lambda r: each_mask(r, lambda p, i: colour_png(p, i, ((0,) * 3, (255,) * 3, (255,) * 3))),
        {"num_classes": 2},
        IDS > 0,
        None,
    ),
    "transparent background": (
        lambda r: each_mask(r, clear_background),
        {"class_colors": COLOURS},
        IDS,
        None,
    ),
    "ignored at 11": (
        lambda r: save_mask(r / "train/masks/p0.png", np.where(IDS == 1, 11, IDS)),
        {"ignore_index": 11},
        np.where(IDS == 1, 11, IDS),
        None,
    ),
    "ignored at -1": (lambda r: np_mask(r, IDS), {"ignore_index": -1}, IDS, None),
    "upper case": (lambda r: rename(r, "train/images/p0.png", "train/images/p0.PNG"), {}, IDS, None),
    "mask suffix": (suffixed, {"mask_suffix": "_gt"}, IDS, None),
    "mask suffix, found": (suffixed, {}, IDS, None),
    "one mask all ignored": (only_ignored, {}, IDS, "1 of 3 masks are ignored everywhere"),
    "a stem that is a pattern": (lambda r: strange_name(r, "[a-z]*(1)?"), {}, IDS, None),
    "dots and umlauts": (lambda r: strange_name(r, "à la.v2.jpg ü"), {}, IDS, None),
    "system files": (
        lambda r: [
            (r / "train/images" / n).write_bytes(b"x") for n in ("._p0.png", ".DS_Store", "Thumbs.db")
        ],
        {},
        IDS,
        None,
    ),
    "other files": (lambda r: (r / "val/masks/notes.txt").write_text("x"), {}, IDS, "notes.txt"),
    "grey image": (lambda r: grey_photo(r, "L"), {}, IDS, None),
    "palette image": (lambda r: image_of(3).quantize(16).save(r / "train/images/p0.png"), {}, IDS, None),
    "RGBA image": (lambda r: grey_photo(r, "RGBA"), {}, IDS, None),
    "grey with alpha": (lambda r: grey_photo(r, "LA"), {}, IDS, None),
    "16-bit image": (
        lambda r: Image.fromarray(np.full(SIZE, 4000, np.uint16)).save(r / "train/images/p0.png"),
        {},
        IDS,
        None,
    ),
    "CMYK JPEG": (lambda r: grey_photo(r, "CMYK", ".jpg"), {}, IDS, None),
    "WebP": (lambda r: grey_photo(r, "RGB", ".webp"), {}, IDS, None),
    "BMP": (lambda r: grey_photo(r, "RGB", ".BMP"), {}, IDS, None),
    "phone's double image": (
        lambda r: grey_photo(r, "RGB", ".jpg", format="MPO", save_all=True, append_images=[image_of(4)]),
        {},
        IDS,
        None,
    ),
    "EXIF, mask as seen": (turned_pair, {}, IDS, None),
    "EXIF on both": (turned_both, {}, IDS, None),
    "EXIF upside down": (lambda r: image_of().save(r / "train/images/p0.png", exif=exif(3)), {}, IDS, "EXIF"),
    "float image": (lambda r: np_image(r, np.random.default_rng(0).random((*SIZE, 3))), {}, IDS, None),
    "grey npy": (lambda r: np_image(r, np.zeros(SIZE, np.uint16)), {}, IDS, None),
    "class not in val": (
        lambda r: [save_mask(p, IDS % 2) for p in r.glob("val/masks/*")],
        {},
        IDS,
        "val: no pixel of class 2",
    ),
    "class not in train": (
        lambda r: [save_mask(p, IDS % 2) for p in r.glob("train/masks/*")],
        {},
        IDS % 2,
        "train: no pixel of class 2",
    ),
    "same image in both": (
        lambda r: shutil.copy(r / "train/images/p1.png", r / "val/images/p0.png"),
        {},
        IDS,
        "train and val",
    ),
    "one pixel": (
        lambda r: (
            image_of(size=(1, 1)).save(r / "train/images/p0.png"),
            save_mask(r / "train/masks/p0.png", [[2]]),
        ),
        {},
        [[2]],
        None,
    ),
    "lossless WebP": (
        lambda r: each_mask(r, lambda p, i: save_mask(f"{p}.webp", i, lossless=True)),
        {},
        IDS,
        None,
    ),
    "0/255 drawn the other way round": (
        binary,
        {"num_classes": 2, "class_colors": ((255, 255, 255), (0, 0, 0))},
        IDS > 0,
        "value 0 shows #000000",
    ),
}


@pytest.mark.parametrize("what", HANDLED)
def test_odd_data_gives_the_right_labels(root, what):
    make, settings, ids, warning = HANDLED[what]
    make(root)
    settings = {"num_classes": 3, **settings}
    report = check_data(root, **settings)
    assert [part for part in report.warnings if warning is None or warning not in part] == []
    assert bool(report.warnings) == (warning is not None)
    ignore_index = settings.get("ignore_index", 255)
    how = {"encoding": report.encoding, "image_size": SIZE, "ignore_index": ignore_index, "evaluation": True}
    dataset = SegmentationDataset(report.train, threads=1, **how)
    image, box, target = dataset.evaluation_item(0)
    assert np.array_equal(target.numpy(), np.asarray(ids).astype(target.numpy().dtype))
    assert image.shape == (3, *SIZE) and (box.original_height, box.original_width) == np.asarray(ids).shape
    valid = np.asarray(ids)[np.asarray(ids) != ignore_index]
    assert report.class_pixels["train"].sum() > 0 and np.isin(valid, range(settings["num_classes"])).all()


def test_pixels_are_counted_a_class_and_an_image(root):
    save_mask(root / "train/masks/p0.png", np.where(IDS == 2, 255, 0))
    report = check_data(root, num_classes=3)
    own = np.bincount(IDS.ravel())
    zeros = (IDS != 2).sum()
    assert report.class_pixels["train"].tolist() == [2 * own[0] + zeros, 2 * own[1], 2 * own[2]]
    assert report.class_image_pixels.tolist() == [2 * IDS.size + zeros, 2 * IDS.size, 2 * IDS.size]


def test_many_problems_are_cut_a_kind_and_counted(root):
    for i in range(20):
        save_mask(root / f"train/masks/lone{i}.png")
    (root / "val/images/p0.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_data(root, num_classes=3)
    message = str(caught.value)
    assert "no image (20)" in message and "and 15 more" in message and "unreadable (1)" in message


def test_second_check_reads_no_file_and_sees_a_changed_one(root, tmp_path, monkeypatch):
    memory = tmp_path / "memory"
    first = check_data(root, num_classes=3, cache_dir=memory)
    monkeypatch.setattr("datasets.scan._look_at_image", lambda *a, **k: pytest.fail("a known file was read"))
    second = check_data(root, num_classes=3, cache_dir=memory)
    assert second.fingerprint == first.fingerprint and second.describe() == first.describe()
    save_mask(root / "train/masks/p0.png", IDS * 0 + 9)
    with pytest.raises(DataError, match="9 "):
        check_data(root, num_classes=3, cache_dir=memory)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train/images/p0.png": 3}', '{"a": {"stamp": 1}}'])
def test_broken_memory_is_learned_anew(root, tmp_path, content):
    first = check_data(root, num_classes=3, cache_dir=tmp_path)
    for path in tmp_path.glob("check-*.json"):
        path.write_text(content)
    assert check_data(root, num_classes=3, cache_dir=tmp_path).fingerprint == first.fingerprint
    assert len(json.loads(path.read_text())) == 10


def test_fingerprint_follows_content_and_not_place_or_time(root, tmp_path):
    first = check_data(root, num_classes=3).fingerprint
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    for path in moved.glob("*/*/*"):
        os.utime(path, (1, 1))
    assert check_data(moved, num_classes=3).fingerprint == first
    save_mask(moved / "val/masks/p0.png", IDS[::-1])
    changed = check_data(moved, num_classes=3).fingerprint
    assert {part for part in first if first[part] != changed[part]} == {"validation files"}


def test_nothing_is_written_beside_the_data(root, tmp_path):
    before = sorted(root.rglob("*"))
    check_data(root, num_classes=3, cache_dir=tmp_path / "memory")
    assert sorted(root.rglob("*")) == before


def test_progress_sees_every_file(root):
    seen = []

    def progress(items, total, description):
        seen.append((total, description))
        yield from items

    check_data(root, num_classes=3, progress=progress)
    assert seen == [(10, "checking data")]


def test_targets_are_paired_by_stem_and_checked(root):
    report = check_data(root, num_classes=3)
    images = find_images(root / "val/images")
    masks = pair_targets(images, root / "val/masks", "", report.encoding)
    assert [path.name for path in masks] == ["p0.png", "p1.png"]
    save_mask(root / "val/masks/p1.png", IDS + 4)
    with pytest.raises(DataError, match=r"p1\.png.*value"):
        pair_targets(images, root / "val/masks", "", report.encoding)
    (root / "val/masks/p0.png").unlink()
    with pytest.raises(DataError, match=r"no p0\.\*"):
        pair_targets(images, root / "val/masks", "", report.encoding)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        pair_targets(images, root / "elsewhere", "", report.encoding)


@pytest.mark.parametrize("labels", ["auto", "snap"])
def test_little_is_remembered_of_a_lossy_mask(root, tmp_path, labels):
    noise = np.random.default_rng(0).integers(0, 60, (*SIZE, 3))
    (tmp_path / "memory").mkdir()

    def save(path, ids):
        Image.fromarray(np.abs(np.array(COLOURS)[ids] - noise).astype(np.uint8)).save(f"{path}.png")

    each_mask(root, save)
    with contextlib.suppress(DataError):
        check_data(root, num_classes=3, class_colors=COLOURS, labels=labels, cache_dir=tmp_path / "memory")
    (memory,) = (tmp_path / "memory").iterdir()
    stats = json.loads(memory.read_text())["train/masks/p0.png"]["stats"]
    assert len(stats["keys"]) <= (3 if labels == "snap" else 512)
    assert labels == "auto" or sum(stats["counts"]) == IDS.size


def test_a_target_of_lossy_ids_is_refused(root):
    report = check_data(root, num_classes=3)
    save_mask(replace(root / "val/masks/p0.png", root / "val/masks/p0.jpg"), IDS * 0)
    with pytest.raises(DataError, match=r"p0\.jpg.*is a JPEG"):
        pair_targets(find_images(root / "val/images"), root / "val/masks", "", report.encoding)


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_that_look_alike_are_paired_however_their_accents_are_written(root, forms):
    for kind, form in zip(("images", "masks"), forms, strict=True):
        for old in (root / "val" / kind).iterdir():
            old.rename(old.with_name(unicodedata.normalize(form, f"Straße é {old.stem}ü_é.png")))
    suffix = unicodedata.normalize(forms[0], "_é")
    for image in (root / "val/images").iterdir():
        image.rename(image.with_stem(image.stem.removesuffix(suffix)))
    for path in (root / "train/masks").iterdir():
        path.rename(path.with_stem(path.stem + "_é"))
    report = check_data(root, num_classes=3, mask_suffix=suffix)
    assert len(report.val) == 2
    images = find_images(root / "val/images")
    masks = pair_targets(images, root / "val/masks", suffix, report.encoding)
    assert masks == [pair.mask for pair in report.val]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_a_name_that_is_no_utf8_is_refused(root):
    for kind in ("images", "masks"):
        folder = os.fsencode(root / "train" / kind)
        os.rename(folder + b"/p0.png", folder + b"/\xfcbung.png")
    with pytest.raises(DataError, match=r"train/images/.bung\.png.*rename"):
        check_data(root, num_classes=3)


def test_more_classes_than_a_damaged_mask_has_colours_are_counted_and_strays_among_them_found(tmp_path):
    ids = np.tile(np.arange(600, dtype=np.uint16), (8, 1))
    ids[:, :520] = np.arange(520)
    for split in ("train", "val"):
        for kind, array in (("images", np.zeros((8, 600, 3), np.uint8)), ("masks", ids)):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / split / kind / "a.png")
    found = check_data(tmp_path, num_classes=600, ignore_index=65535)
    assert (found.class_pixels["train"] == 8).all()
    ids[0, 599] = 700
    Image.fromarray(ids).save(tmp_path / "train" / "masks" / "a.png")
    with pytest.raises(DataError, match="700"):
        check_data(tmp_path, num_classes=600, ignore_index=65535)


def test_files_that_swap_their_names_are_looked_at_again(tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for name, value in (("0", 0), ("1", 1)):
            Image.fromarray(np.full((40, 40, 3), 50 + value, np.uint8)).save(
                tmp_path / split / f"images/{name}.png"
            )
            np.save(tmp_path / split / "masks" / f"{name}.npy", np.full((40, 40), value, np.uint8))
    masks = tmp_path / "train" / "masks"
    for path in masks.iterdir():  # as an archive leaves them
        os.utime(path, (1e9, 1e9))
    before = check_data(tmp_path, num_classes=2, cache_dir=tmp_path / "cache")
    for one, other in (("0", "x"), ("1", "0"), ("x", "1")):
        (masks / f"{one}.npy").rename(masks / f"{other}.npy")
    after = check_data(tmp_path, num_classes=2, cache_dir=tmp_path / "cache")
    assert before.fingerprint["training files"] != after.fingerprint["training files"]
    assert before.train[0].stamp != after.train[0].stamp


def test_of_a_mask_that_holds_thousands_of_values_few_are_remembered(tmp_path):
    depth = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)  # taken for a mask
    for split in ("train", "val"):
        for kind, array in (("images", np.zeros((256, 256, 3), np.uint8)), ("masks", depth)):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / "data" / split / kind / "a.png")
    (tmp_path / "cache").mkdir()
    with pytest.raises(DataError, match="expects ids"):
        check_data(tmp_path / "data", num_classes=2, cache_dir=tmp_path / "cache")
    (memory,) = (tmp_path / "cache").iterdir()
    assert memory.stat().st_size < 20_000
