"""Images and masks find each other in the layouts and under the names that data sets have."""

import shutil

import numpy as np
import pytest
from PIL import Image

from datasets import DataError, check_data, find_images, left_out, pair_targets, read_mask
from datasets.pairing import Rule

SIZE = (8, 12)


def image(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (*SIZE, 3), np.uint8)).save(path)


def mask(path, number):
    """A mask that says which image it belongs to: so many pixels are class 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.zeros(SIZE, np.uint8)
    ids.flat[: number + 1] = 1
    Image.fromarray(ids).save(path)


def make(root, image_name, mask_name, train=range(1, 7), val=range(7, 10), layout="{split}/{kind}"):
    for split, numbers in (("train", train), ("val", val)):
        for number in numbers:
            image(root / layout.format(split=split, kind="images") / image_name.format(number), number)
            mask(root / layout.format(split=split, kind="masks") / mask_name.format(number), number)
    return root


def numbers_of(pairs):
    """Which masks were found, by their content."""
    return [int(read_mask(pair.mask).sum()) - 1 for pair in pairs]


def by_name(pairs):
    return [int("".join(c for c in pair.image.name.split("!")[-1] if c.isdigit())) for pair in pairs]


NAMES = [  # of images and of masks; the number stands behind the last !, where there are other digits
    ("{}.png", "{}.png"),
    ("{}.jpg", "{}.gif"),
    ("img_{}.png", "mask_{}.png"),
    ("image{}.png", "label{}.png"),
    ("{}_training.tif", "{}_manual.gif"),
    ("{}_sat.jpg", "{}_mask.png"),
    ("aachen!{}_leftImg.png", "aachen!{}_gtFine_labelIds.png"),
    ("scan-{}-t.png", "scan-{}-seg.png"),
    ("{}.jpg", "{}.jpg.png"),
    ("{}.image.png", "{}.label.png"),
    ("x{}y.png", "{}.png"),
    ("{}.png", "a {} b.png"),
    ("Ü{}.png", "mask {} é.png"),
    ("[{}].png", "({}).png"),
]


@pytest.mark.parametrize(("image_name", "mask_name"), NAMES)
@pytest.mark.parametrize(
    ("train", "val"), [(range(1, 7), range(7, 10)), (range(1, 13), range(21, 24)), ([1, 2], [3])]
)
def test_constant_beginnings_and_endings_are_found(tmp_path, image_name, mask_name, train, val):
    make(tmp_path, image_name, mask_name, train, val)
    report = check_data(tmp_path, num_classes=2)
    for pairs, numbers in ((report.train, train), (report.val, val)):
        assert numbers_of(pairs) == by_name(pairs) == sorted(numbers)
    told = [line for line in report.notes if line.startswith("pairs:")]
    assert bool(told) == (image_name.rsplit(".", 1)[0] != mask_name.rsplit(".", 1)[0])
    assert report.describe().startswith("\n".join(report.notes))


@pytest.mark.parametrize(("image_name", "mask_name"), NAMES)
def test_the_rule_of_training_pairs_the_targets_of_other_images(tmp_path, image_name, mask_name):
    report = check_data(make(tmp_path / "data", image_name, mask_name), num_classes=2)
    make(tmp_path / "new", image_name, mask_name, train=[12, 345], val=[])
    mask(tmp_path / "new/train/masks/unrelated.png", 3)
    images = find_images(tmp_path / "new/train/images")
    masks = pair_targets(images, tmp_path / "new/train/masks", "", report.encoding, report.pairing)
    assert [int(read_mask(path).sum()) for path in masks] == [13, SIZE[0] * SIZE[1]]


def test_targets_with_names_of_their_own_are_paired_by_what_differs(tmp_path):
    report = check_data(make(tmp_path / "data", "{}.png", "{}.png"), num_classes=2)
    make(tmp_path / "new", "photo_{}.png", "{}_gt.png")
    images = find_images(tmp_path / "new/train/images")
    masks = pair_targets(images, tmp_path / "new/train/masks", "", report.encoding, report.pairing)
    assert [path.name for path in masks] == [f"{i}_gt.png" for i in range(1, 7)]


def test_a_rule_survives_a_checkpoint():
    rule = Rule("img", "", "mask", "_x")
    assert Rule(**rule.to_dict()) == rule and rule.mask_stem("img_3") == "mask_3_x"
    assert rule.image_stem("mask_3_x") == "img_3" and rule.mask_stem("photo_3") is None


@pytest.mark.parametrize(
    ("endings", "proposed"),
    [
        (("_manual1", "_manual2"), ["_manual1", "_manual2"]),
        (("_gtFine_labelIds", "_gtFine_color"), ["_gtFine_labelIds", "_gtFine_color"]),
        (("-mask", "-edges", "-instances"), ["-mask", "-edges", "-instances"]),
    ],
)
def test_several_masks_per_image_are_refused_with_endings_that_each_work(tmp_path, endings, proposed):
    make(tmp_path, "s{}_x.png", "s{}" + endings[0] + ".png")
    for ending in endings[1:]:
        for path in [*tmp_path.glob(f"*/masks/*{endings[0]}.png")]:
            shutil.copy(path, path.with_name(path.name.replace(endings[0], ending)))
    with pytest.raises(DataError, match="several masks per image") as caught:
        check_data(tmp_path, num_classes=2)
    for suffix in proposed:
        assert f"--mask_suffix {suffix}" in str(caught.value)
        report = check_data(tmp_path, num_classes=2, mask_suffix=suffix)
        assert numbers_of(report.train) == list(range(1, 7))
        assert all(pair.mask.stem.endswith(suffix) for pair in report.train)
        assert f"do not end with {suffix}" in report.notes[0]


@pytest.mark.parametrize("lacking", ["image", "mask"])
@pytest.mark.parametrize(
    "names", [("{}.png", "{}.png"), ("{}_a.png", "{}_b.png"), ("img{}.png", "mask{}.png")]
)
def test_a_missing_partner_is_named(tmp_path, lacking, names):
    make(tmp_path, *names)
    name = names[lacking == "mask"].format(4)
    (tmp_path / "train" / f"{lacking}s" / name).unlink()
    with pytest.raises(DataError, match=f"no {lacking}") as caught:
        check_data(tmp_path, num_classes=2)
    assert names[lacking == "image"].format(4) in str(caught.value)


@pytest.mark.parametrize("names", [("{}.png", "{}.png"), ("{}_leftImg8bit.png", "{}_gtFine.png")])
def test_sub_folders_of_both_are_read(tmp_path, names):
    for city, numbers in (("aachen", (1, 2)), ("bonn", (1, 2, 3))):
        make(tmp_path, f"{city}/{names[0]}", f"{city}/{names[1]}", train=numbers, val=numbers[:1])
    shutil.rmtree(tmp_path / "val/images/bonn")
    shutil.rmtree(tmp_path / "val/masks/bonn")
    image(tmp_path / "val/images/aachen" / names[0].format(9), 99)
    mask(tmp_path / "val/masks/aachen" / names[1].format(9), 9)
    report = check_data(tmp_path, num_classes=2)
    assert len(report.train) == 5 and len(report.val) == 2
    assert all(pair.image.parent.name == pair.mask.parent.name for pair in report.train)
    assert numbers_of(report.train) == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_sub_folders_of_one_alone_are_the_reason(tmp_path, kind):
    make(tmp_path, "{}.png", "{}.png")
    (tmp_path / "train" / kind / "sub").mkdir()
    for path in [*(tmp_path / "train" / kind).glob("*.png")][:3]:
        path.rename(path.parent / "sub" / path.name)
    with pytest.raises(DataError, match=rf"train/{kind} .*has sub-folders with images"):
        check_data(tmp_path, num_classes=2)


def test_the_transposed_layout_is_read(tmp_path):
    make(tmp_path, "{}.png", "{}_m.png", layout="{kind}/{split}")
    report = check_data(tmp_path, num_classes=2)
    assert numbers_of(report.train) == list(range(1, 7)) and numbers_of(report.val) == [7, 8, 9]


@pytest.mark.parametrize("share", [0.2, 0.34, 0.5])
def test_a_flat_folder_is_split_by_share_and_seed(tmp_path, share):
    make(tmp_path, "{}.png", "{}.png", train=range(30), val=[], layout="{kind}")
    first, again, other = (check_data(tmp_path, num_classes=2, val_share=share, seed=s) for s in (0, 0, 1))
    assert len(first.val) == round(30 * share) and len(first.train) == 30 - len(first.val)
    assert first.val == again.val and first.val != other.val
    assert not {pair.image for pair in first.train} & {pair.image for pair in first.val}
    assert f"split: {len(first.train)} to train, {len(first.val)} to validate" in first.describe()


def test_one_more_pair_moves_at_most_one_of_the_others_to_the_other_split(tmp_path):
    make(tmp_path, "{}.png", "{}.png", train=range(20), val=[], layout="{kind}")
    before = {pair.image for pair in check_data(tmp_path, num_classes=2).val}
    make(tmp_path, "{}.png", "{}.png", train=[20], val=[], layout="{kind}")
    after = {pair.image for pair in check_data(tmp_path, num_classes=2).val}
    assert len(before - after) <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_the_smallest_flat_folders(tmp_path, count):
    make(tmp_path, "{}.png", "{}.png", train=range(count), val=[], layout="{kind}")
    if count == 1:
        with pytest.raises(DataError, match="one pair cannot be split"):
            check_data(tmp_path, num_classes=2)
    else:
        report = check_data(tmp_path, num_classes=2)
        assert (len(report.train), len(report.val)) == (1, 1)


def test_val_share_is_refused_where_the_data_has_its_own_split(tmp_path):
    make(tmp_path, "{}.png", "{}.png")
    with pytest.raises(ValueError, match="val_share"):
        check_data(tmp_path, num_classes=2, val_share=0.5)


@pytest.mark.parametrize("form", ["{}", "{}.png", "images/{}.png", "./images/{}.png", "{}.png {}_m.png"])
def test_lists_of_names_split_a_flat_folder(tmp_path, form):
    make(tmp_path, "{}.png", "{}_m.png", train=range(10), val=[], layout="{kind}")
    for name, numbers in (("train", (5, 1, 3)), ("val", (2, 8))):
        text = "\ufeff# from the authors\r\n" if name == "train" else ""
        text += "".join(form.format(number, number) + "\r\n" for number in numbers)
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    report = check_data(tmp_path, num_classes=2)
    assert sorted(numbers_of(report.train)) == [1, 3, 5] and sorted(numbers_of(report.val)) == [2, 8]
    assert "5 on neither list are left out" in report.describe()


@pytest.mark.parametrize(
    ("train", "val", "word"),
    [("1\n2\n77\n", "3\n", "77"), ("1\n", "", "names no image"), ("1\n", None, "stands without val.txt")],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, train, val, word):
    make(tmp_path, "{}.png", "{}.png", train=range(5), val=[], layout="{kind}")
    for name, text in (("train", train), ("val", val)):
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(DataError, match=word):
        check_data(tmp_path, num_classes=2)


def test_a_name_on_both_lists_is_warned_of(tmp_path):
    make(tmp_path, "{}.png", "{}.png", train=range(5), val=[], layout="{kind}")
    (tmp_path / "train.txt").write_text("0\n1\n2\n")
    (tmp_path / "val.txt").write_text("2\n3\n")
    assert any(
        "in train.txt and val.txt" in warning for warning in check_data(tmp_path, num_classes=2).warnings
    )


def test_files_that_are_left_out_are_counted_by_their_ending(tmp_path):
    make(tmp_path, "{}.png", "{}.png")
    for name in ("a.heic", "b.heic", "c.txt", "README", ".hidden", "Thumbs.db"):
        (tmp_path / "train/images" / name).write_bytes(b"x")
    (warning,) = check_data(tmp_path, num_classes=2).warnings
    assert "train/images: left out 4 files (2 .heic, 1 .txt, 1 no ending)" in warning
    assert left_out(tmp_path / "train/images") == "4 files (2 .heic, 1 .txt, 1 no ending)"
    assert left_out(tmp_path / "val/images") == "" == left_out(tmp_path / "train/images/1.png")
    with pytest.raises(DataError, match=r"no image found; it has 2 files \(2 \.heic\)"):
        find_images(tmp_path / "train/images/*.heic")


def test_warnings_are_listed_beside_problems(tmp_path):
    make(tmp_path, "{}.png", "{}.png")
    shutil.copy(tmp_path / "train/images/1.png", tmp_path / "val/images/8.png")
    (tmp_path / "train/images/3.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        check_data(tmp_path, num_classes=3)
    message = str(caught.value)
    assert "unreadable (1)" in message
    assert "warning: 1 images are in train and val (1.png is 8.png" in message
    assert "warning: train: no pixel of class 2" in message


def test_the_fingerprint_is_that_of_the_data_wherever_they_lie(tmp_path, monkeypatch):
    for layout in ("{split}/{kind}", "{kind}"):
        root = make(tmp_path / layout[:3], "{}.png", "{}_m.png", layout=layout)
        first = check_data(root, num_classes=2).fingerprint
        moved = shutil.copytree(root, tmp_path / "else/where" / layout[:3], copy_function=shutil.copyfile)
        assert check_data(moved, num_classes=2).fingerprint == first
        monkeypatch.chdir(moved)
        assert check_data(".", num_classes=2).fingerprint == first
        mask(next(moved.rglob("*_m.png")), 70)
        assert check_data(moved, num_classes=2).fingerprint != first
