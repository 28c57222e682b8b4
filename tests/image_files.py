"""Writers of TIFF and PNG files in layouts that Pillow does not write."""

import lzma
import struct
import zlib
from pathlib import Path

import numpy as np

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def pack_bits(values, bits):
    """(rows, numbers) as bytes, most significant bit first, each row from a new byte on."""
    places = (values.astype(np.int64)[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    return np.packbits(places.reshape(len(values), -1), axis=1).tobytes()


def lzw(data):
    """TIFF's LZW."""
    table, codes, word = {bytes([i]): i for i in range(256)}, [(256, 9)], b""
    for i in range(len(data)):
        longer = data[i - len(word) : i + 1] if word else data[i : i + 1]
        if longer in table:
            word = longer
            continue
        codes.append((table[word], max(9, (len(table) + 2).bit_length())))
        table[longer] = len(table) + 2
        word = data[i : i + 1]
        if len(table) > 4000:
            codes.append((table[word], 12))
            codes.append((256, 12))
            table, word = {bytes([i]): i for i in range(256)}, b""
    if word:
        codes.append((table[word], max(9, (len(table) + 2).bit_length())))
    codes.append((257, max(9, (len(table) + 3).bit_length())))
    bits = "".join(format(code, f"0{width}b") for code, width in codes)
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def pack_literals(data):
    """PackBits without runs."""
    parts = [data[i : i + 128] for i in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


COMPRESSORS = {1: bytes, 5: lzw, 8: zlib.compress, 32946: zlib.compress, 32773: pack_literals,
               34925: lambda data: lzma.compress(data, lzma.FORMAT_XZ)}  # fmt: skip


def encode_block(block, bits, order, predictor):
    """(rows, columns, samples) as the bytes of a strip or tile, before compression."""
    rows, columns, samples = block.shape
    if bits not in (8, 16, 32, 64):
        return pack_bits(block.reshape(rows, -1), bits)
    if predictor == 3:
        size = block.dtype.itemsize
        planes = block.astype(f">f{size}").reshape(rows, columns * samples).view(np.uint8)
        planes = planes.reshape(rows, columns * samples, size).swapaxes(1, 2).reshape(rows, -1, samples)
        block = np.concatenate([planes[:, :1], np.diff(planes, axis=1)], axis=1)
    elif predictor == 2:
        whole = block.view(f"u{block.dtype.itemsize}")
        block = np.concatenate([whole[:, :1], np.diff(whole, axis=1)], axis=1)
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def page_tags(array, blob, *, photometric=1, extra=None, planar=1, compression=1, predictor=1, order="<",
              tile=None, rows_per_strip=None, fill_order=1, bits=None, sample_format=None, subfile=0,
              orientation=1, colormap=None):  # fmt: skip
    """Append the pixels of one page to `blob`; its tags as {number: (type, values)}."""
    array = array[..., None] if array.ndim == 2 else array
    height, width, samples = array.shape
    bits = bits or 8 * array.dtype.itemsize
    rows, columns = tile or (rows_per_strip or height, width)
    offsets, counts = [], []
    for plane in np.moveaxis(array, 2, 0)[..., None] if planar == 2 else [array]:
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                block = plane[top : top + rows, left : left + columns]
                if tile:
                    missing = rows - block.shape[0], columns - block.shape[1]
                    block = np.pad(block, [(0, missing[0]), (0, missing[1]), (0, 0)])
                data = COMPRESSORS[compression](
                    encode_block(np.ascontiguousarray(block), bits, order, predictor)
                )
                offsets.append(len(blob))
                counts.append(len(data))
                blob += data.translate(REVERSED) if fill_order == 2 else data
                blob += b"\0" * (len(blob) % 2)
    kind = sample_format or {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags = {254: (4, [subfile]), 256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * samples),
            259: (3, [compression]), 262: (3, [photometric]), 266: (3, [fill_order]), 274: (3, [orientation]),
            277: (3, [samples]), 284: (3, [planar]), 317: (3, [predictor]),
            339: (3, [kind] * samples)}  # fmt: skip
    if tile:
        tags |= {322: (4, [columns]), 323: (4, [rows]), 324: (4, offsets), 325: (4, counts)}
    else:
        tags |= {273: (4, offsets), 278: (4, [rows]), 279: (4, counts)}
    if extra is not None:
        tags[338] = (3, list(extra))
    if colormap is not None:
        tags[320] = (3, list(colormap))
    return tags


def write_tiff(path, *pages, order="<", big=False, **options):
    """A TIFF or BigTIFF; each page is an array (H, W) or (H, W, samples), or (array, its own options)."""
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 0) if big else (42, 0)))
    blob, last = bytearray(mark + head), 8 if big else 4
    count, entry, room = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    for page in pages:
        array, own = page if isinstance(page, tuple) else (page, {})
        tags = page_tags(array, blob, order=order, **{**options, **own})
        start = len(blob)
        size = struct.calcsize(order + count) + len(tags) * (room * 2 + 4) + room
        body, beyond = b"", b""
        for tag, (kind, values) in sorted(tags.items()):
            raw = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
            body += struct.pack(order + entry, tag, kind, len(values))
            if len(raw) > room:
                body += struct.pack(order + ("Q" if big else "I"), start + size + len(beyond))
                beyond += raw + b"\0" * (len(raw) % 2)
            else:
                body += raw.ljust(room, b"\0")
        struct.pack_into(order + ("Q" if big else "I"), blob, last, start)
        last = start + size - room
        blob += struct.pack(order + count, len(tags)) + body + b"\0" * room + beyond
    Path(path).write_bytes(bytes(blob))
    return path


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def write_png(
    path, array, depth, color=0, *, palette=None, transparent=None, interlace=False, filters=(0,), before=b""
):
    """A PNG of sample values (H, W) or (H, W, samples) of any depth and colour type."""
    array = array[..., None] if array.ndim == 2 else array
    unit = max(1, array.shape[2] * depth // 8)
    steps = ADAM7 if interlace else ((0, 0, 1, 1),)
    parts = [array[y::down, x::right] for x, y, right, down in steps]
    raw = b"".join(_filtered(part, depth, unit, filters) for part in parts if part.size)
    data = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", *array.shape[1::-1], depth, color, 0, 0, interlace)) + before
    )
    if palette is not None:
        data += chunk(b"PLTE", bytes(np.array(palette, np.uint8)))
    if transparent is not None:
        data += chunk(b"tRNS", transparent)
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + data + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )
    return path


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _filtered(part, depth, unit, filters):
    rows = [np.frombuffer(pack_bits(row.reshape(1, -1), depth), np.uint8).astype(int) for row in part]
    lines, above = [], np.zeros(len(rows[0]), int)
    for number, row in enumerate(rows):
        left, upper_left = (np.concatenate([np.zeros(unit, int), line])[: len(row)] for line in (row, above))
        guess = left + above - upper_left
        near = np.abs(guess - left), np.abs(guess - above), np.abs(guess - upper_left)
        paeth = np.select(
            [(near[0] <= near[1]) & (near[0] <= near[2]), near[1] <= near[2]], [left, above], upper_left
        )
        kind = filters[number % len(filters)]
        predicted = (0, left, above, (left + above) // 2, paeth)[kind]
        lines.append(bytes([kind]) + bytes(((row - predicted) % 256).astype(np.uint8)))
        above = row
    return b"".join(lines)
