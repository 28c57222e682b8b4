"""Every setting that a message of the data check proposes works when it is followed literally."""

import re
import shlex

import numpy as np
import pytest
from image_files import write_png
from PIL import Image

from config import Config
from datasets import DataError, check_data
from datasets.folder import SegmentationDataset
from utils.cli import parse

RNG = np.random.default_rng(0)
SIZE = (24, 32)
COLOURS = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (200, 200, 0), (0, 0, 128), (90, 90, 90)], np.uint8)


def blocks(classes, seed):
    """Class ids in blocks of 4 x 4, each class of another size, all present."""
    weights = np.arange(2, classes + 2) / np.arange(2, classes + 2).sum()
    ids = np.random.default_rng(seed).choice(classes, (6, 8), p=weights)
    ids.flat[:classes] = range(classes)
    return np.kron(ids, np.ones((4, 4), int))


def make(root, save, classes, masks=6):
    """Four pairs to train, two to validate; `save(path without suffix, ids, number)`. All ids, in order."""
    every = []
    for number in range(masks):
        split = "train" if number < masks - 2 else "val"
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
        ids = blocks(classes, number)
        image = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
        Image.fromarray(image).save(root / split / "images" / f"p{number}.png")
        save(str(root / split / "masks" / f"p{number}"), ids, number)
        every.append(ids)
    return np.stack(every)


def harvest(message):
    """Every proposed set of settings in a message: runs of --flag value, as words of a command line."""
    found = re.findall(r"(?:--[a-z_]+(?: (?:'[^']*'|(?!or\b|--)[^\s,;|()]+))+ ?)+", message)
    return [shlex.split(text) for text in found]


def settings_of(words, **given):
    """The settings that check_data takes, read as train.py reads its command line."""
    flags = []
    for name, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if f"--{name}" not in words:
            flags += [f"--{name}", *map(str, values)]
    config = parse(Config, [*flags, *words], "").settings
    return config.pick("num_classes", "ignore_index", "labels", "class_colors", "mask_suffix", "in_channels")


def proposals(root, **given):
    """The message of a refusal and its proposals, each followed: (flags, report)."""
    start = settings_of([], **given)
    with pytest.raises(DataError) as caught:
        check_data(root, **start)
    message = str(caught.value)
    words = harvest(message)
    assert words, message
    return message, [(" ".join(each), check_data(root, **settings_of(each, **given))) for each in words]


def shares(report):
    pixels = sum(report.class_pixels.values())
    return (pixels / pixels.sum()).tolist()


def truth(ids, table):
    """Fractions of classes by a table from drawn ids to classes; None ignores."""
    classes = max(value for value in table if value is not None) + 1
    counts = np.zeros(classes)
    for id_, value in enumerate(table):
        if value is not None:
            counts[value] += (ids == id_).sum()
    return (counts / counts.sum()).tolist()


def grey(values, dtype=np.uint8):
    values = np.array(values)

    def save(path, ids, number):
        raw = values[ids]
        if raw.min() < 0 or dtype in (np.int16, np.int32):
            np.save(f"{path}.npy", raw.astype(dtype if dtype != np.uint8 else np.int16))
        else:
            Image.fromarray(raw.astype(dtype)).save(f"{path}.png")

    return save


def coloured(colours):
    return lambda path, ids, number: Image.fromarray(np.array(colours, np.uint8)[ids]).save(f"{path}.png")


def palette(path, ids, number, colours=COLOURS):
    """A palette in another order in every file."""
    order = np.roll(np.arange(ids.max() + 1), number)
    write_png(f"{path}.png", np.argsort(order)[ids], 8, 3, palette=colours[order])


def channel(values, position, alpha=None):
    values = np.array(values, np.uint8)

    def save(path, ids, number):
        bands = np.zeros((*ids.shape, 3), np.uint8)
        bands[..., position] = values[ids]
        if alpha is not None:
            bands = np.dstack([bands, np.full(ids.shape, alpha, np.uint8)])
        Image.fromarray(bands).save(f"{path}.png")

    return save


def instances(most, dtype=np.uint16, void=None):
    """Class 1 as numbered objects, other numbers in each file."""

    def save(path, ids, number):
        numbers = np.random.default_rng(number).integers(1, most + 1, ids.shape)
        raw = np.where(ids == 1, numbers, 0)
        raw[0, :6] = [0, 1, 2, 3, most, 0]
        if void is not None:
            raw[1] = void
        Image.fromarray(raw.astype(dtype)).save(f"{path}.png")

    return save


KINDS = {  # what the masks hold: (how they are saved, ids drawn, settings, true class of each id)
    "void -1": (grey([-1, 0, 1, 2]), 4, {"num_classes": 3}, [None, 0, 1, 2]),
    "void -100": (grey([-100, 0, 1, 2, 3]), 5, {"num_classes": 4}, [None, 0, 1, 2, 3]),
    "void -1, as int32": (grey([-1, 0, 1], np.int32), 3, {"num_classes": 2}, [None, 0, 1]),
    "0 void, 3 classes": (grey(range(4)), 4, {"num_classes": 3}, [None, 0, 1, 2]),
    "0 void, 5 classes": (grey(range(6)), 6, {"num_classes": 5}, [None, 0, 1, 2, 3, 4]),
    "0 void, 2 classes": (grey(range(3)), 3, {"num_classes": 2}, [None, 0, 1]),
    "0 void, 20 classes": (grey(range(21)), 21, {"num_classes": 20}, [None, *range(20)]),
    "0 void, 255 ignored too": (grey([0, 1, 2, 3, 255]), 5, {"num_classes": 3}, [None, 0, 1, 2, None]),
    "one class more": (grey(range(4)), 4, {"num_classes": 3}, [0, 1, 2, 3]),
    "six more": (grey(range(8)), 8, {"num_classes": 2}, list(range(8))),
    "last one void": (grey(range(4)), 4, {"num_classes": 3}, [0, 1, 2, None]),
    "last of eleven void": (grey(range(12)), 12, {"num_classes": 11}, [*range(11), None]),
    "void 99": (grey([0, 1, 2, 99]), 4, {"num_classes": 3}, [0, 1, 2, None]),
    "void 254 beside 255": (grey([0, 1, 2, 254, 255]), 5, {"num_classes": 3}, [0, 1, 2, None, None]),
    "ids from 1": (grey([1, 2, 3]), 3, {"num_classes": 3}, [0, 1, 2]),
    "ids from 1, one lacking": (grey([1, 3, 4]), 3, {"num_classes": 4}, [0, 2, 3]),
    "ids from 1 and 255": (grey([1, 2, 3, 255]), 4, {"num_classes": 3}, [0, 1, 2, None]),
    "steps of 60": (grey([0, 60, 120]), 3, {"num_classes": 3}, [0, 1, 2]),
    "steps of 60 and void 0": (grey([0, 60, 120, 180]), 4, {"num_classes": 3}, [None, 0, 1, 2]),
    "steps of 60, one class more": (grey([0, 60, 120, 180]), 4, {"num_classes": 3}, [0, 1, 2, 3]),
    "steps, rarest void": (grey([70, 0, 140, 210]), 4, {"num_classes": 3}, [None, 0, 1, 2]),
    "steps of 1000": (grey([0, 1000, 2000], np.uint16), 3, {"num_classes": 3}, [0, 1, 2]),
    "fewer than classes": (grey([0, 120]), 2, {"num_classes": 3}, [0, 1]),
    "black and white, 3 classes": (grey([0, 255]), 2, {"num_classes": 3}, [0, 1]),
    "100 and 200": (grey([100, 200]), 2, {"num_classes": 2}, [0, 1]),
    "instances to 6": (instances(6), 2, {"num_classes": 2}, "instances"),
    "instances to 300": (instances(300), 2, {"num_classes": 2}, "instances"),
    "instances to 5000": (instances(5000), 2, {"num_classes": 2}, "instances"),
    "instances in bytes": (instances(40, np.uint8), 2, {"num_classes": 2}, "instances"),
    "instances and void": (instances(40, np.uint8, void=255), 2, {"num_classes": 2}, "instances, void"),
    "colours, as many": (coloured(COLOURS[:3]), 3, {"num_classes": 3}, [0, 2, 1]),
    "colours and black void": (coloured(COLOURS[:4]), 4, {"num_classes": 3}, [None, 1, 0, 2]),
    "colours and rarest void": (coloured(COLOURS[[3, 0, 1, 2]]), 4, {"num_classes": 3}, [None, 0, 2, 1]),
    "colours, one class more": (coloured(COLOURS[:4]), 4, {"num_classes": 3}, [0, 2, 1, 3]),
    "colours, three more": (coloured(COLOURS[:6]), 6, {"num_classes": 3}, "all"),
    "colours, fewer": (coloured(COLOURS[:2]), 2, {"num_classes": 3}, [0, 1]),
    "colours of another set": (
        coloured(COLOURS[:3]), 3, {"num_classes": 3, "class_colors": ["9,9,9", "1,2,3", "7,7,7"]}, [0, 2, 1],
    ),
    "colours, map lacks one": (
        coloured(COLOURS[:3]), 3, {"num_classes": 3, "labels": "#000000=0,#800000=1"}, [0, 1, 2],
    ),
    "colours, map lacks a void": (
        coloured(COLOURS[:4]), 4, {"num_classes": 3, "labels": "#000000=0,#800000=1,#008000=2"},
        [0, 1, 2, None],
    ),
    "palettes differ": (palette, 3, {"num_classes": 3}, [0, 2, 1]),
    "palettes differ, black void": (palette, 4, {"num_classes": 3}, [None, 1, 0, 2]),
    "palettes differ, two": (palette, 2, {"num_classes": 2}, [0, 1]),
    "ids in red": (channel([0, 1, 2, 3], 0), 4, {"num_classes": 4}, [0, 1, 2, 3]),
    "ids in red with gaps, opaque": (channel([0, 1, 3, 7], 0, 255), 4, {"num_classes": 8}, "gaps"),
    "ids in green": (channel([0, 1, 2], 1), 3, {"num_classes": 3}, [0, 1, 2]),
    "ids in blue with a gap": (channel([0, 2, 4], 2), 3, {"num_classes": 5}, "gaps of 2"),
    "ids in red, invisible": (channel([0, 1, 2], 0, 0), 3, {"num_classes": 3}, [0, 1, 2]),
    "map lacks a class": (grey(range(3)), 3, {"num_classes": 3, "labels": "0=0,1=1"}, [0, 1, 2]),
    "map lacks a value": (
        grey(range(4)), 4, {"num_classes": 3, "labels": "0=0,1=1,2=2"}, [0, 1, 2, None],
    ),
    "map of values, one void": (
        grey([0, 50, 100, 150]), 4, {"num_classes": 3, "labels": "0=0,50=1,100=2"}, [0, 1, 2, None],
    ),
}  # fmt: skip


def expected_shares(kind, ids, table):
    if kind.startswith("instances"):
        ids = ids.copy()
        ids[:, 0, :6] = [0, 1, 1, 1, 1, 0]
        kept = np.delete(ids, 1, axis=1) if table.endswith("void") else ids
        return truth(kept, [0, 1])
    if table == "gaps":
        return truth(ids, [0, 1, 3, 7])
    if table == "gaps of 2":
        return truth(ids, [0, 2, 4])
    if table == "all":  # in ascending order of colours
        packed = [int.from_bytes(bytes(colour), "big") for colour in COLOURS]
        return truth(ids, np.argsort(np.argsort(packed)).tolist())
    return truth(ids, table)


@pytest.mark.parametrize("kind", KINDS)
def test_every_proposal_works_and_one_gives_the_true_classes(tmp_path, kind):
    save, classes, settings, table = KINDS[kind]
    ids = make(tmp_path, save, classes)
    message, followed = proposals(tmp_path, **settings)
    expected = expected_shares(kind, ids, table)
    found = [shares(report) for _, report in followed]
    assert any(len(f) >= len(expected) and np.allclose(f[: len(expected)], expected) for f in found), message
    for flags, report in followed:  # the files are read as the counts promise
        options = {"encoding": report.encoding, "image_size": SIZE, "evaluation": True, "threads": 1}
        options["ignore_index"] = report.encoding.ignore_index
        dataset = SegmentationDataset(report.train, **options)
        for index in range(len(dataset)):
            dataset.evaluation_item(index)
        assert flags in message.replace("'", "") or "'" in message


@pytest.mark.parametrize("kind", KINDS)
def test_each_proposal_says_the_class_shares_that_it_gives(tmp_path, kind):
    save, classes, settings, _ = KINDS[kind]
    make(tmp_path, save, classes)
    message, followed = proposals(tmp_path, **settings)
    told = re.findall(r"class shares ([\d.%, ]+)", message)
    if told and "5000" not in kind:  # of thousands of values the commonest are counted
        shown = [", ".join(f"{share:.1%}" for share in shares(report)[:8]) for _, report in followed]
        assert [text.strip(" ,") for text in told] == shown[: len(told)]


def test_255_in_some_masks_and_1_in_others_has_both_readings(tmp_path):
    def save(path, ids, number):
        Image.fromarray((ids * (255 if number % 2 else 1)).astype(np.uint8)).save(f"{path}.png")

    ids = make(tmp_path, save, 2)
    message, followed = proposals(tmp_path, num_classes=2)
    assert len(followed) == 2
    both, without = (shares(report) for _, report in followed)
    assert np.allclose(both, truth(ids, [0, 1])) and without[1] < both[1]


@pytest.mark.parametrize("classes", [2, 3])
def test_a_jpeg_of_black_and_white_or_colours_is_read_with_the_snap_that_is_offered(tmp_path, classes):
    colours = np.array([(0, 0, 0), (255, 255, 255), (0, 0, 255)], np.uint8)

    def save(path, ids, number):
        large = np.kron(colours[ids], np.ones((5, 5, 1), np.uint8))
        Image.fromarray(large).save(f"{path}.jpg", quality=70, subsampling=0)
        Image.fromarray(large).save(path.replace("masks", "images") + ".png")

    ids = make(tmp_path, save, classes)
    message, followed = proposals(tmp_path, num_classes=classes)
    expected = sorted(truth(ids, list(range(classes))))  # the order of damaged colours is chance
    assert any(np.allclose(sorted(shares(report)), expected, atol=0.01) for _, report in followed), message


@pytest.mark.parametrize("values", [(0, 5, 7), (0, 1, 2), (2, 0, 1), (0, 255), (3, 7)])
@pytest.mark.parametrize("plain", [0, 2])
def test_a_palette_of_greys_is_read_by_its_greys(tmp_path, values, plain):
    """What a PNG optimiser makes of class ids; every second file may be as it was."""

    def save(path, ids, number):
        greys = np.array(values, np.uint8)
        if plain and number % plain:
            Image.fromarray(greys[ids]).save(f"{path}.png")
        else:
            order = np.roll(np.arange(len(values)), number)
            write_png(
                f"{path}.png", np.argsort(order)[ids], 2, 3, palette=np.repeat(greys[order], 3).reshape(-1, 3)
            )

    ids = make(tmp_path, save, len(values))
    report = check_data(tmp_path, num_classes=2 if 255 in values else 8)
    table = [0, 1] if 255 in values else values
    expected = truth(ids, table)
    assert np.allclose(shares(report)[: len(expected)], expected)
    dataset = SegmentationDataset(report.train, encoding=report.encoding, image_size=SIZE, evaluation=True)
    for index in range(4):
        assert np.array_equal(dataset.evaluation_item(index)[2].numpy(), np.array(table)[ids[index]])


def test_palettes_that_differ_are_read_by_the_colours_of_class_colors(tmp_path):
    ids = make(tmp_path, palette, 3)
    report = check_data(tmp_path, num_classes=3, class_colors=COLOURS[:3].tolist())
    assert np.allclose(shares(report), truth(ids, [0, 1, 2]))


def test_optimised_palettes_that_contradict_full_ones_are_not_mixed(tmp_path):
    """Index 1 of an optimised file is index 2 of the others."""

    def save(path, ids, number):
        present = np.array([0, 2]) if number == 3 else np.arange(3)
        kept = np.where(ids == 1, 2, ids) if number == 3 else ids
        indices = np.searchsorted(present, kept)
        write_png(f"{path}.png", indices, 8, 3, palette=COLOURS[present])

    make(tmp_path, save, 3)
    with pytest.raises(DataError, match="palettes differ"):
        check_data(tmp_path, num_classes=3)


def test_masks_in_the_alpha_channel_are_refused_by_name(tmp_path):
    def save(path, ids, number):
        bands = np.zeros((*ids.shape, 4), np.uint8)
        bands[..., 3] = ids * 255
        Image.fromarray(bands).save(f"{path}.png")

    make(tmp_path, save, 2)
    with pytest.raises(DataError, match="alpha channel"):
        check_data(tmp_path, num_classes=2)


def test_the_hint_about_rare_classes_is_a_command_that_is_accepted(tmp_path):
    def save(path, ids, number):
        rare = np.zeros(SIZE, np.uint8)
        rare[0, :4] = 1
        Image.fromarray(rare).save(f"{path}.png")

    make(tmp_path, save, 2)
    text = check_data(tmp_path, num_classes=2).describe()
    words = harvest(next(line for line in text.split("\n") if line.startswith("hint")))
    assert words == [["--joint_ce", "weighted_ce"], ["--loss", "weighted_ce"]]
    for each in words:
        assert parse(Config, each, "").settings.weighting == "auto"


def test_more_than_255_classes_are_told_an_ignore_index_that_works(tmp_path):
    ids = make(tmp_path, grey(np.arange(300), np.uint16), 40)
    with pytest.raises(Exception, match="or to 65535 if they have none"):
        parse(Config, ["--num_classes", "300"], "")
    for value in ("65535", "-1"):
        report = check_data(tmp_path, **settings_of(["--ignore_index", value], num_classes=300))
        assert np.allclose(shares(report)[:40], truth(ids, list(range(40))))


def test_ignoring_0_is_answered_with_a_map_that_works(tmp_path):
    ids = make(tmp_path, grey(range(4)), 4)
    with pytest.raises(Exception, match="If 0 is void") as caught:
        parse(Config, ["--num_classes", "3", "--ignore_index", "0"], "")
    (words,) = harvest(str(caught.value))
    report = check_data(tmp_path, **settings_of(words, num_classes=3))
    assert np.allclose(shares(report), truth(ids, [None, 0, 1, 2]))
