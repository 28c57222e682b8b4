"""Every layout of pixels that a file may declare is read exactly or refused by name."""

import itertools
from io import BytesIO

import numpy as np
import pytest
from image_files import chunk, write_png, write_tiff
from PIL import Image

from datasets import DataError, read_image, read_mask
from datasets.large import LargeImage, read_size
from datasets.reading import decode_image

RNG = np.random.default_rng(0)
H, W = 11, 19
SHAPES = {1: (H, W), 2: (H, W, 2), 3: (H, W, 3), 4: (H, W, 4), 6: (H, W, 6)}


def noise(dtype, samples=1, bits=None):
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        steps = RNG.integers(0, 256, SHAPES[samples]) + RNG.uniform(-0.3, 0.3, SHAPES[samples])
        return (steps / 255).clip(0, 1).astype(dtype)  # none near the edge of a rounding
    top = 2 ** (bits or min(8 * dtype.itemsize, 16)) - 1
    return RNG.integers(0, min(top, np.iinfo(dtype).max) + 1, SHAPES[samples]).astype(dtype)


def scaled(array, bits=None):
    """What the network sees of stored values, computed in another way."""
    array = array if array.ndim == 3 else array[..., None]
    if array.dtype == np.uint8 and not bits:
        return array
    top = 1 if array.dtype.kind == "f" else 2 ** (bits or 16) - 1
    return np.floor(array.astype(np.longdouble) * 255 / top + 0.5).astype(np.uint8)


def assert_read(path, expected, in_channels=None):
    """All ways to read an image give `expected`, (H, W, C) uint8, or values next to a rounding edge."""
    channels = in_channels or expected.shape[2]
    seen = read_image(path, channels)
    assert seen.dtype == np.uint8 and seen.shape == expected.shape
    assert np.array_equal(seen, expected)
    with LargeImage(path, channels) as image:
        assert np.array_equal(np.concatenate([rows for _, rows in image.strips(4)]), expected)
    assert read_size(path) == expected.shape[:2]


def assert_refused(path, *words, in_channels=3):
    with pytest.raises(DataError) as caught:
        read_image(path, in_channels)
    message = str(caught.value)
    assert path.name in message and all(word in message for word in words), message
    assert "cannot be read" not in message  # which would not name the kind


# --- TIFF ---

STORAGE = {
    "one strip": {},
    "strips": {"rows_per_strip": 3},
    "tiles": {"tile": (16, 16)},
    "big-endian": {"order": ">"},
    "BigTIFF": {"big": True},
    "big-endian BigTIFF": {"big": True, "order": ">"},
    "deflate": {"compression": 8},
    "old deflate, strips": {"compression": 32946, "rows_per_strip": 4},
    "LZW, strips": {"compression": 5, "rows_per_strip": 4},
    "PackBits, tiles": {"compression": 32773, "tile": (16, 16)},
    "deflate, predictor": {"compression": 8, "predictor": 2, "rows_per_strip": 5},
    "LZW, predictor, tiles": {"compression": 5, "predictor": 2, "tile": (16, 16)},
    "big-endian, predictor": {"compression": 8, "predictor": 2, "order": ">"},
}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("planar", [1, 2])
def test_a_tiff_of_any_type_band_count_and_storage_is_read_exactly(tmp_path, storage, planar):
    for dtype, samples in itertools.product(("u1", "u2", "i2", "i4", "u4", "f4", "f8"), (1, 3, 4, 6)):
        options = STORAGE[storage] | {"planar": planar, "photometric": 2 if samples in (3, 4) else 1}
        if options.get("predictor") == 2 and dtype[0] == "f":
            options["predictor"] = 3
        array = noise(dtype, samples)
        path = write_tiff(tmp_path / f"{dtype}x{samples}.tif", array, **options)
        assert_read(path, scaled(array))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 10, 12, 14])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("compression", [1, 8])
def test_a_tiff_of_packed_bits_is_spread_over_the_range_that_it_declares(
    tmp_path, bits, samples, compression
):
    array = noise("u2", samples, bits)
    options = {"bits": bits, "photometric": 2 if samples == 3 else 1, "compression": compression}
    path = write_tiff(tmp_path / "a.tif", array, **options)
    assert_read(path, scaled(array, bits))


@pytest.mark.parametrize("storage", ["one strip", "deflate", "tiles", "LZW, strips"])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_reversed_bits_in_bytes_are_put_right(tmp_path, storage, dtype, samples):
    array = noise(dtype, samples)
    options = {"photometric": 2 if samples > 1 else 1, "fill_order": 2} | STORAGE[storage]
    assert_read(write_tiff(tmp_path / "a.tif", array, **options), scaled(array))


@pytest.mark.parametrize(("dtype", "bits"), [("u1", 1), ("u1", 2), ("u1", 4), ("u1", 8), ("u2", 16)])
@pytest.mark.parametrize("compression", [1, 5, 8])
def test_an_image_that_counts_from_white_is_inverted(tmp_path, dtype, bits, compression):
    array = noise(dtype, bits=bits)
    path = write_tiff(tmp_path / "a.tif", array, photometric=0, bits=bits, compression=compression)
    assert_read(path, scaled(2**bits - 1 - array.astype("u2"), bits))


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_an_extra_sample_is_kept_where_four_channels_are_asked_for_and_never_multiplied_away(
    tmp_path, dtype, planar, kind
):
    array = noise(dtype, 4)
    path = write_tiff(tmp_path / "a.tif", array, photometric=2, extra=[kind], planar=planar)
    bands = scaled(array)
    assert_read(path, bands)
    expected = bands[..., :3]
    if kind == 2:  # straight alpha: on black
        black = Image.new("RGB", (W, H))
        black.paste(Image.fromarray(expected), mask=Image.fromarray(bands[..., 3]))
        expected = np.asarray(black)
    assert_read(path, expected, in_channels=3)


@pytest.mark.parametrize("extra", [None, [0], [1], [2]])
def test_grey_with_an_extra_sample_is_two_bands(tmp_path, extra):
    array = noise("u1", 2)
    path = write_tiff(tmp_path / "a.tif", array, extra=extra)
    assert_read(path, array)
    if extra == [1]:
        assert_read(path, array[..., :1], in_channels=1)
    if extra in (None, [0]):
        assert_refused(path, "2 bands", "in_channels 2", in_channels=1)


@pytest.mark.parametrize("samples", [3, 4, 6])
def test_bands_are_not_taken_for_colours(tmp_path, samples):
    path = write_tiff(tmp_path / "a.tif", noise("u2", samples), extra=[0] * (samples - 1))
    assert_refused(path, f"{samples} bands", f"in_channels {samples}", ".npy", in_channels=1)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((H, W), np.nan, "f4"), ["nan", "0..1"]),
        (np.full((H, W), 1.5, "f8"), ["1.5", "0..1"]),
        (np.full((H, W), -1, "i2"), ["-1", "0..65535"]),
        (np.full((H, W, 3), 70000, "u4"), ["70000", "0..65535"]),
        (np.full((H, W), -3, "i1"), ["signed 8-bit"]),
        (np.full((H, W), 3, "i1"), ["signed 8-bit"]),
    ],
)
def test_values_without_a_range_are_refused(tmp_path, array, words):
    path = write_tiff(tmp_path / "a.tif", array, photometric=2 if array.ndim == 3 else 1)
    assert_refused(path, *words)


UNREAD = {
    "CIE Lab": (noise("u1", 3), {"photometric": 8}, "CIE L*a*b*"),
    "YCbCr": (noise("u1", 3), {"photometric": 6}, "YCbCr"),
    "CMYK of 16 bits": (noise("u2", 4), {"photometric": 5}, "CMYK"),
    "colour filters": (noise("u2"), {"photometric": 32803}, "colour filter array"),
    "linear raw": (noise("u2", 3), {"photometric": 34892}, "linear raw"),
    "complex": (noise("f4"), {"sample_format": 6}, "sample format 6"),
    "unknown compression": (noise("u1"), {"compression": 1, "photometric": 77}, "photometric 77"),
    "palette of 16 bits": (noise("u2"), {"photometric": 3}, "palette"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_kind_that_is_not_read_is_refused_by_its_name_with_what_is(tmp_path, kind):
    array, options, name = UNREAD[kind]
    path = write_tiff(tmp_path / "a.tif", array, **options)
    assert_refused(path, "kind that is not read", name, ".npy (H, W, C)")


@pytest.mark.parametrize("compression", [6, 34712, 34887, 99])
def test_a_compression_that_is_not_read_is_refused_by_its_name(tmp_path, compression):
    path = write_tiff(tmp_path / "a.tif", noise("u1", 3), photometric=2)
    data = path.read_bytes()
    path.write_bytes(
        data.replace(
            b"\x03\x01\x03\0\x01\0\0\0\x01\0", b"\x03\x01\x03\0\x01\0\0\0" + compression.to_bytes(2, "little")
        )
    )
    assert_refused(path, "kind that is not read", "compression", ".npy (H, W, C)")


def test_bands_of_different_bits_are_refused(tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise("u1", 3), photometric=2)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x08\0\x08\0\x08\0", b"\x08\0\x08\0\x10\0"))
    assert_refused(path, "differ in bits")


@pytest.mark.parametrize("cut", [0.3, 0.9])
@pytest.mark.parametrize("compression", [1, 5, 8, 32773])
def test_a_tiff_with_too_few_bytes_is_refused(tmp_path, cut, compression):
    array = np.zeros((64, 64, 6), np.uint16)
    path = write_tiff(tmp_path / "a.tif", array, compression=compression, rows_per_strip=8)
    data = bytearray(path.read_bytes())
    strip = data.index(b"\0" * 8 if compression == 1 else data[8:16], 8)
    del data[strip + int(cut * 500) : strip + 500]  # offsets point beyond, or into other strips
    path.write_bytes(bytes(data[: int(len(data) * cut)]))
    with pytest.raises(DataError, match=r"a\.tif"):
        read_image(path, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_tiff_of_many_bands_is_put_upright(tmp_path, orientation):
    array = noise("u2", 6)
    path = write_tiff(tmp_path / "a.tif", array, orientation=orientation)
    upright = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.swapaxes(0, 1),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(array),
    }[orientation]
    assert_read(path, scaled(upright))
    assert read_size(path, upright=False) == (H, W)


@pytest.mark.parametrize("subfile", [1, 4, 5])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_reduced_copies_and_masks_of_a_geotiff_are_not_bands(tmp_path, subfile, dtype):
    array = noise(dtype, 3)
    half = (array[::2, ::2].copy(), {"subfile": subfile})
    path = write_tiff(tmp_path / "a.tif", array, half, half, photometric=2)
    assert_read(path, scaled(array))
    ids = noise("u1")
    path = write_tiff(tmp_path / "mask.tif", ids, (ids[::2, ::2].copy(), {"subfile": subfile}))
    assert np.array_equal(read_mask(path), ids)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_grey_pages_as_many_as_channels_are_read_as_bands(tmp_path, dtype):
    array = noise(dtype, 6)
    path = write_tiff(tmp_path / "a.tif", *np.moveaxis(array, 2, 0))
    assert_read(path, scaled(array))
    assert_refused(path, "6 pages" if dtype == "" else "6", in_channels=3)


def test_pages_of_different_sizes_are_refused(tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise("u1"), noise("u1")[:5])
    assert_refused(path, "2 pages", "one size", in_channels=2)


TIFF_MASKS = [
    ("u1", {}),
    ("u2", {}),
    ("i2", {}),
    ("i4", {}),
    ("u4", {}),
    ("f4", {}),
    ("i1", {}),
    ("u1", {"planar": 2}),
    ("u2", {"tile": (16, 16)}),
    ("u1", {"bits": 3}),
    ("u2", {"bits": 12}),
    ("u2", {"order": ">", "compression": 5}),
]


@pytest.mark.parametrize(("dtype", "options"), TIFF_MASKS)
def test_ids_in_a_tiff_come_as_they_are_stored(tmp_path, dtype, options):
    ids = RNG.integers(0, 7, (H, W)).astype(dtype)
    assert np.array_equal(read_mask(write_tiff(tmp_path / "a.tif", ids, **options)), ids)


@pytest.mark.parametrize(("dtype", "bits"), [("u1", 4), ("u1", 8), ("u2", 16)])
def test_ids_that_count_from_white_are_refused(tmp_path, dtype, bits):
    path = write_tiff(tmp_path / "a.tif", noise(dtype, bits=bits), photometric=0, bits=bits)
    with pytest.raises(DataError, match=r"a\.tif.*WhiteIsZero"):
        read_mask(path)


@pytest.mark.parametrize("array", [noise("u1", 6), noise("u2", 3), noise("u1", 2), noise("u1", 4)])
def test_a_mask_of_several_bands_is_refused(tmp_path, array):
    path = write_tiff(tmp_path / "a.tif", array, photometric=2 if array.shape[2] in (3, 4) else 1)
    with pytest.raises(DataError, match=r"a\.tif.*(channels|bits per channel)"):
        read_mask(path)


# --- PNG ---

PNG_LAYOUTS = [
    (depth, color, samples)
    for color, samples, depths in (
        (0, 1, (1, 2, 4, 8, 16)),
        (2, 3, (8, 16)),
        (4, 2, (8, 16)),
        (6, 4, (8, 16)),
    )
    for depth in depths
]


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize(("depth", "color", "samples"), PNG_LAYOUTS)
def test_a_png_of_any_depth_and_colour_type_is_read_exactly(tmp_path, depth, color, samples, interlace):
    array = noise("u2" if depth == 16 else "u1", samples, depth)
    gamma = {"before": b"\0\0\0\x04gAMA\0\0\xb1\x8f\x0b\xfca\x05"}
    for filters in ((0,), (1, 2, 3, 4)):
        path = write_png(
            tmp_path / "a.png", array, depth, color, interlace=interlace, filters=filters, **gamma
        )
        assert_read(path, scaled(array, depth if depth != 8 else None))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(("color", "samples"), [(0, 1), (2, 3), (6, 4)])
def test_a_rotated_png_of_16_bits_is_put_upright(tmp_path, orientation, color, samples):
    array = noise("u2", samples)
    tags = Image.Exif()
    tags[0x0112] = orientation
    content = tags.tobytes()[6:]  # without "Exif" and two zeros
    path = write_png(tmp_path / "a.png", array, 16, color, before=chunk(b"eXIf", content))
    turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]
    assert_read(path, scaled(np.rot90(array, turns)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_black_whatever_its_depth(tmp_path, depth):
    array = noise("u2", bits=depth)
    clear = int(array[3, 4])
    path = write_png(tmp_path / "a.png", array, depth, transparent=clear.to_bytes(2, "big"))
    expected = scaled(np.where(array == clear, 0, array), depth)
    assert_read(path, expected, in_channels=1)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_is_black(tmp_path, depth):
    array = noise("u2", 3, depth)
    path = write_png(tmp_path / "a.png", array, depth, 2, transparent=array[3, 4].astype(">u2").tobytes())
    expected = scaled(array, depth).copy()
    expected[3, 4] = 0
    assert_read(path, expected)
    assert read_image(path, 4)[3, 4, 3] == 0 and (read_image(path, 4)[..., 3] == 255).sum() == H * W - 1


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [None, b"\xff\x00", b"\x80"])
def test_a_palette_png_is_read_by_its_colours(tmp_path, depth, transparent):
    indices = noise("u1", bits=min(depth, 6))
    palette = RNG.integers(0, 256, (2 ** min(depth, 6), 3))
    path = write_png(tmp_path / "a.png", indices, depth, 3, palette=palette, transparent=transparent)
    expected = palette[indices]
    alpha = np.full(len(palette), 255)
    alpha[: len(transparent or b"")] = list(transparent or b"")
    alpha = alpha[indices][..., None]
    expected = np.floor(expected * alpha / 255 + 0.5).astype(np.uint8)
    assert_read(path, expected)
    assert np.array_equal(read_mask(path), indices)
    assert np.array_equal(read_mask(path, as_colours=True), palette[indices])


@pytest.mark.parametrize("color", [2, 6])
def test_a_mask_of_wide_colours_is_refused(tmp_path, color):
    path = write_png(tmp_path / "a.png", noise("u2", 3 if color == 2 else 4), 16, color)
    with pytest.raises(DataError, match=r"a\.png.*16 bits per channel"):
        read_mask(path)


def test_wide_ids_in_a_png_come_as_they_are(tmp_path):
    ids = noise("u2")
    assert np.array_equal(read_mask(write_png(tmp_path / "a.png", ids, 16)), ids)


# --- every mode and format that Pillow writes ---

MODES = (
    "1",
    "L",
    "P",
    "LA",
    "PA",
    "La",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "F",
)
LOSSLESS = {
    "png": {},
    "tif": {},
    "tif lzw": {"compression": "tiff_lzw"},
    "tif deflate": {"compression": "tiff_adobe_deflate"},
    "tif packbits": {"compression": "packbits"},
    "bmp": {},
    "gif": {},
    "webp": {"lossless": True, "exact": True},
}


def image_of(mode):
    if mode in ("I;16", "I;16B"):
        return Image.frombytes(mode, (W, H), noise("u2").tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(noise("u2").astype("i4") if mode == "I" else noise("f4"))
    samples = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(noise("u1") > 99)
    image = Image.frombytes(mode, (W, H), noise("u1", samples).tobytes())
    if mode in ("P", "PA"):
        image.putpalette(RNG.integers(0, 256, 768).tolist())
    return image


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", LOSSLESS)
def test_what_pillow_writes_in_any_mode_is_read_exactly_or_refused(tmp_path, mode, form):
    image = image_of(mode)
    path = tmp_path / f"a.{form.split()[0]}"
    try:
        image.save(path, **LOSSLESS[form])
    except (OSError, KeyError, ValueError):
        pytest.skip(f"Pillow writes no {form} of mode {mode}")
    bands = np.asarray(image if mode != "PA" else image.convert("RGBA"))
    bands = bands.astype(np.uint8) * 255 if mode == "1" else bands
    if mode == "P" or path.suffix == ".gif":
        bands = np.asarray(image.convert("RGB" if mode == "P" else image.mode))
    try:
        pixels, _, _ = decode_image(path)
    except DataError as error:
        assert mode in ("PA", "LAB", "YCbCr", "HSV", "La", "RGBa") and "not read" in str(error)
        return
    stored = Image.open(path)
    if path.suffix in (".gif", ".webp", ".bmp") or mode in ("RGBa", "La", "HSV", "YCbCr"):
        bands = np.asarray(stored.convert("RGBA" if stored.has_transparency_data else "RGB"))  # of 8 bits
    if mode == "CMYK":
        bands = np.asarray(stored.convert("RGB"))
    expected = scaled(bands, 16 if bands.dtype.itemsize > 1 and bands.dtype.kind != "f" else None)
    channels = expected.shape[2]
    assert np.array_equal(read_image(path, channels), expected), (mode, form, stored.mode)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(noise("u1", 3)) for _ in range(3)]
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.apng", {"format": "PNG"})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(read_image(tmp_path / name), np.asarray(frames[0]))
    masks = [Image.fromarray(noise("u1", bits=1) * 255) for _ in range(2)]
    masks[0].save(tmp_path / "a.gif", save_all=True, append_images=masks[1:])
    assert np.array_equal(read_image(tmp_path / "a.gif", 1)[..., 0], np.asarray(masks[0]))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_a_gif_mask_is_read(tmp_path, mode):
    ids = noise("u1", bits=1)
    mask = Image.fromarray(ids * 255).convert("1") if mode == "1" else Image.fromarray(ids * 255)
    if mode == "P":
        mask = Image.fromarray(ids)
        mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.save(tmp_path / "a.gif")
    raw = read_mask(tmp_path / "a.gif", as_colours=True)
    assert np.array_equal(raw if raw.ndim == 2 else raw[..., 0], ids * 255)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "JPG"])
def test_a_jpeg_of_any_ending_is_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise("u1", 3)).save(path, "JPEG")
    assert np.array_equal(read_image(path), np.asarray(Image.open(path)))


def test_inverted_inks_of_a_jpeg_are_seen_as_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg")[8, 8].astype(int) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("photometric", ["RGB", "YCbCr", "L"])
def test_a_jpeg_in_a_tiff_is_read(tmp_path, photometric):
    mode = "RGB" if photometric == "YCbCr" else photometric
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    image = Image.fromarray(smooth).convert(mode)
    image.save(tmp_path / "a.tif", compression="jpeg", quality=98)
    assert (
        np.abs(read_image(tmp_path / "a.tif", len(image.getbands())).astype(int)[..., 0] - smooth).max() < 8
    )


@pytest.mark.parametrize("compression", ["tiff_ccitt", "group3", "group4"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_fax_is_read(tmp_path, compression, photometric):
    bits = noise("u1", bits=1)
    Image.fromarray(bits > 0).save(tmp_path / "a.tif", compression=compression, tiffinfo={262: photometric})
    stored = np.asarray(Image.open(tmp_path / "a.tif"))
    assert np.array_equal(read_image(tmp_path / "a.tif", 1)[..., 0], stored * np.uint8(255))


def bmp(mode, alpha):
    file = BytesIO()
    image_of(mode).save(file, "BMP")
    data = bytearray(file.getvalue())
    return bytes(data)


def test_the_undeclared_byte_of_a_bmp_is_no_alpha(tmp_path):
    pixels = noise("u1", 4)
    data = bytearray(bmp("RGB", False)[:54])
    data[28:30] = (32).to_bytes(2, "little")
    (tmp_path / "a.bmp").write_bytes(bytes(data) + pixels[::-1].tobytes())
    assert np.array_equal(read_image(tmp_path / "a.bmp"), pixels[..., 2::-1])
    assert_refused(tmp_path / "a.bmp", "BMP", "fourth channel", in_channels=4)


# --- alpha that means nothing ---


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_that_is_zero_everywhere_does_not_make_an_image_black(tmp_path, suffix, mode):
    bands = noise("u1", len(mode))
    bands[..., -1] = 0
    path = tmp_path / f"a.{suffix}"
    try:
        Image.frombytes(mode, (W, H), bands.tobytes()).save(path, **LOSSLESS.get(suffix, {}))
    except OSError:
        pytest.skip("not written")
    assert_read(
        path, np.asarray(Image.frombytes(mode, (W, H), bands.tobytes()).convert("RGB")), in_channels=3
    )
    bands[H - 1, W - 1, -1] = 255  # seen nowhere else
    Image.frombytes(mode, (W, H), bands.tobytes()).save(path, **LOSSLESS.get(suffix, {}))
    expected = np.zeros((H, W, 3), np.uint8)
    expected[-1, -1] = bands[-1, -1, :3] if mode == "RGBA" else bands[-1, -1, 0]
    assert_read(path, expected, in_channels=3)
