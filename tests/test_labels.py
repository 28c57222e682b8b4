"""Mask values to class ids and back."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from datasets.labels import Encoding, MaskStats, parse_labels
from datasets.reading import read_mask
from datasets.readings import choose_encoding

RNG = np.random.default_rng(0)


def stats(raw):
    keys, counts = np.unique(raw, return_counts=True)
    return MaskStats("grey", keys.tolist(), counts.tolist())


def encoding(kind="values", table=((0, 0), (1, 1), (255, 255)), num_classes=2, ignore_index=255, **more):
    return Encoding(kind, num_classes, ignore_index, table, **more)


def test_what_is_ignored_decides_no_file_type_and_no_palette():
    ids = np.array([[0, 1]])
    for ignored in (-1, 1000, 2**31 - 1):
        own = encoding(table=tuple(sorted(((0, 0), (1, 1), (ignored, ignored)))), ignore_index=ignored)
        assert own.decode(ids).mode == "L" and (np.asarray(own.decode(ids)) == ids).all()
    masks = [MaskStats("palette", [0, 1], [50, 50], [0, 0xFF0000])]
    found, _ = choose_encoding(masks, 2, ignore_index=2**31 - 1)
    assert found.kind == "palette" and len(found.palette) == 2
    assert found.decode(ids).getpalette()[3:6] == [255, 0, 0]


@pytest.mark.parametrize(
    "text, snap, colours, table",
    [
        ("auto", False, False, {}),
        (" Snap ", True, False, {}),
        ("0=0,128=1, 255 = ignore", False, False, {0: 0, 128: 1, 255: None}),
        ("snap:0=0,255=1", True, False, {0: 0, 255: 1}),
        ("-1=ignore,0=0,70000=1,", False, False, {-1: None, 0: 0, 70000: 1}),
        ("#000000=0,#Ff0000=1", False, True, {0: 0, 0xFF0000: 1}),
    ],
)
def test_the_setting_is_read(text, snap, colours, table):
    parsed = parse_labels(text)
    assert (parsed.snap, parsed.colours, dict(parsed.table)) == (snap, colours, table)


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "empty"),
        ("snap:", "empty"),
        ("automatic", "'automatic'"),
        ("0=0,x=1", "'x=1'"),
        ("0=0;1=1", "'0=0;1=1'"),
        ("0=-1", "'0=-1'"),
        ("0=void", "'0=void'"),
        ("#ff=1", "'#ff=1'"),
        ("0=0,0=1", "0 twice"),
        ("0=0,#000001=1", "mixes"),
        ("99999999=0", "99999999"),
    ],
)
def test_a_setting_that_is_none_is_refused_with_its_part_named(text, named):
    with pytest.raises(ValueError, match=r"^labels") as caught:
        parse_labels(text)
    assert named in str(caught.value)


def test_reading_the_setting_needs_no_torch():
    code = "import sys, datasets; datasets.parse_labels('auto'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


ENCODINGS = [
    encoding("indices", ((0, 0), (1, 1), (255, 255))),
    encoding("palette", ((0, 0), (1, 1), (255, 255)), palette=(0x102030, 0xFF0000, *[0] * 254)),
    encoding("binary", ((0, 0), (255, 1))),
    encoding("values", ((7, 1), (128, 255), (250, 0))),
    encoding("values", ((0, 0), (1000, 1), (65535, 255))),
    encoding("colours", ((0, 0), (0x00FF80, 1), (0xFFFFFF, 255))),
    encoding("indices", tuple((i, i) for i in range(300)), num_classes=300, ignore_index=-1),
]


@pytest.mark.parametrize("known", ENCODINGS, ids=lambda known: f"{known.kind}-{len(known.table)}")
def test_what_is_decoded_and_saved_is_encoded_again_to_the_same_ids(known, tmp_path):
    present = np.array([id_ for _, id_ in known.table])
    ids = RNG.choice(present, (9, 11)).astype(known.dtype)
    known.decode(ids).save(tmp_path / "mask.png")
    raw = read_mask(tmp_path / "mask.png", known.as_colours)
    again = known.encode(raw)
    assert again.dtype == known.dtype and np.array_equal(again, ids)
    if known.kind == "palette":
        assert Image.open(tmp_path / "mask.png").getpalette()[:6] == [0x10, 0x20, 0x30, 255, 0, 0]


@pytest.mark.parametrize("known", ENCODINGS, ids=lambda known: f"{known.kind}-{len(known.table)}")
def test_an_encoding_survives_a_checkpoint_and_another_process(known):
    known.encode(
        np.full((1, 1), known.table[0][0], np.int64)
        if not known.as_colours
        else np.zeros((1, 1, 3), np.uint8)
    )
    assert Encoding.from_dict(json.loads(json.dumps(known.to_dict()))) == known
    assert pickle.loads(pickle.dumps(known)) == known and len(pickle.dumps(known)) < 10_000


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("snap", [False, True])
def test_look_up_equals_a_loop_over_all_values(dtype, snap):
    for trial in range(20):
        raws = sorted(np.random.default_rng(trial).choice(256, 5, replace=False).tolist())
        known = encoding(table=tuple((raw, i % 3) for i, raw in enumerate(raws)), num_classes=3, snap=snap)
        raw = np.random.default_rng(trial).integers(0, 256, (7, 8)).astype(dtype)
        if not snap:
            raw = np.array(raws, dtype)[raw % 5]
        expected = [min(known.table, key=lambda row: abs(row[0] - int(value)))[1] for value in raw.ravel()]
        assert known.encode(raw).ravel().tolist() == expected


def test_a_colour_off_by_one_is_refused_or_snapped():
    table = ((0x000000, 0), (0xFF0000, 1))
    raw = np.array([[[0, 0, 0], [254, 1, 0]]], np.uint8)
    with pytest.raises(ValueError, match=r"#fe0100 \(1 px\)"):
        encoding("colours", table).encode(raw)
    assert encoding("colours", table, snap=True).encode(raw).tolist() == [[0, 1]]


@pytest.mark.parametrize("value", [-70000, -1, 2, 254, 256, 65535, 10**8])
def test_an_unknown_value_of_any_size_is_refused(value):
    with pytest.raises(ValueError, match=rf"value {value} \(1 px\)"):
        encoding().encode(np.array([[0, value]], np.int64))


def test_decode_refuses_an_id_without_value():
    with pytest.raises(ValueError, match=r"\[2\]"):
        encoding("binary", ((0, 0), (255, 1))).decode(np.array([[0, 2]]))


@pytest.mark.parametrize(
    "values, num_classes, ignore_index, kind",
    [
        ([0, 1, 2], 3, 255, "indices"),
        ([0, 2, 255], 3, 255, "indices"),
        ([0], 2, 255, "indices"),
        ([0, 11], 11, 11, "indices"),
        ([0, 255], 2, 255, "binary"),
        ([0, 255], 2, 254, "binary"),
        ([0, 1, 255], 2, 255, "indices"),
        ([0, 1, 400], 401, -100, "indices"),
    ],
)
def test_the_encoding_is_found_from_all_values(values, num_classes, ignore_index, kind):
    masks = [stats([[value]]) for value in values]  # no mask alone would tell
    if kind == "indices" and values == [0, 1, 255]:
        masks = [stats([values])]
    found, _ = choose_encoding(masks, num_classes, ignore_index)
    assert found.kind == kind
    assert found.describe().endswith("255 → 1" if kind == "binary" else f"{ignore_index} ignored")


def test_values_that_damage_cannot_explain_are_not_taken_for_damage():
    raw = np.r_[np.zeros(500), np.full(400, 255), np.full(100, 120)]
    with pytest.raises(ValueError, match=r"120 \(10\.0%\)"):
        choose_encoding([stats(raw.astype(int))], 2, 254, "snap")


def test_a_few_strays_do_not_change_what_the_masks_are():
    found, _ = choose_encoding([stats(np.r_[0:5, 9])], 5, 255)
    assert found.kind == "indices" and 9 not in dict(found.table)


def test_a_map_to_start_from_keeps_every_class_that_has_its_own_value():
    masks = [stats(np.r_[np.repeat(np.arange(1, 13), 9), 0])]  # 0 is the rarest
    with pytest.raises(
        ValueError, match=r"(?s)nothing stands for class 0.*'0=0,1=1,.*,10=10,11=ignore,12=ignore'"
    ):
        choose_encoding(masks, 11, 255, "11=ignore")


def test_class_ids_are_never_snapped():
    """They lie 1 apart: a stray one is no damaged one."""
    found, _ = choose_encoding([stats([[0, 1, 2]])], 3, 255, "snap")
    with pytest.raises(ValueError, match="value 7"):
        found.encode(np.array([[0, 7]]))
