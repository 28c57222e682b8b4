"""Decoded, resized samples kept as raw bytes, in memory or in a mapped file: each image is decoded once.

A cache is keyed by everything that its samples depend on, so that an outdated one is never used, only
removed. Each entry has a checksum that is written after it and tested before its first use: a half-written
or damaged entry counts as missing and is made again. Several processes may fill a cache at the same time;
they write the same bytes.
"""

import mmap
import os
import shutil
import weakref
import zlib
from pathlib import Path

import numpy as np

DONE = 1 << 32  # beside the checksum in an entry's state: the entry was written
SMALL = 256 * 2**20  # bytes that are decoded in seconds: not worth a file
FILES = ("samples.bin", "state.bin")
IN_USE = weakref.WeakSet()  # disk caches opened by this process, which must not remove each other


class SampleCache:
    """Byte strings of known lengths by index.

    Without a folder for its files everything is kept in memory, shared with workers that are forked later.
    """

    def __init__(self, lengths: list[int], folder: Path | None = None):
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.folder = folder
        self.full = False
        self._tested = np.zeros(len(lengths), bool)  # checksums are tested once per process
        self._samples = np.frombuffer(self._map(FILES[0], int(self.offsets[-1])), np.uint8)
        self._state = np.frombuffer(self._map(FILES[1], 8 * len(lengths)), np.uint64)

    def _map(self, name: str, size: int) -> mmap.mmap:
        if self.folder is None:
            return mmap.mmap(-1, size)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / name, "a+b") as file:
            if file.tell() not in (0, size):
                file.truncate(0)  # another file, or damaged: zeros mean "not done"
            file.truncate(size)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)

    def __reduce__(self):
        return SampleCache, (np.diff(self.offsets), self.folder)

    def __contains__(self, index: int) -> bool:
        return int(self._state[index]) >= DONE

    def get(self, index: int) -> np.ndarray | None:
        """Return the bytes of an entry, read-only; None if it is missing or damaged."""
        if index not in self:
            return None
        entry = self._samples[self.offsets[index] : self.offsets[index + 1]]
        if not self._tested[index]:
            if zlib.crc32(entry) != int(self._state[index]) - DONE:
                return None
            self._tested[index] = True
        entry.flags.writeable = False
        return entry

    def put(self, index: int, parts: list[np.ndarray]) -> None:
        """Store an entry; once the disk is full, store nothing more."""
        if self.full:
            return
        data = np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts])
        assert len(data) == self.offsets[index + 1] - self.offsets[index]
        try:
            self._write(0, int(self.offsets[index]), data)
            self._write(1, 8 * index, np.array([zlib.crc32(data) + DONE], np.uint64))
        except OSError:
            self.full = True

    def _write(self, which: int, offset: int, data: np.ndarray) -> None:
        """Write to memory, or to a file.

        Not through a file's map, where a full disk would end the process instead of raising an error; and to
        a newly opened file, because forked processes share the position in an open one.
        """
        if self.folder is None:
            memory = (self._samples, self._state)[which].view(np.uint8)
            memory[offset : offset + data.nbytes] = data.view(np.uint8)
            return
        with open(self.folder / FILES[which], "r+b") as file:
            file.seek(offset)
            file.write(data)


def open_cache(
    setting: str, cache_dir: str | Path | None, key: str, lengths: list[int]
) -> tuple[SampleCache | None, str]:
    """Open the cache that `setting` asks for.

    Args:
        setting: auto (memory if small, else the disk, else memory if it fits, else none), ram, disk or off.
        cache_dir: folder of all disk caches; None: no disk.
        key: hexadecimal digest of everything that the samples depend on.
        lengths: bytes of each sample.

    Returns:
        (cache or None, one line that says what was chosen and why)
    """
    total = sum(lengths)
    size = f"{total / 2**30:.1f} GiB" if total >= 2**30 else f"{total / 2**20:.0f} MiB"
    if setting == "off" or not total:
        return None, "cache: off, images are decoded each time"
    if setting == "ram" or (setting == "auto" and total <= min(SMALL, _free_memory() // 2)):
        return SampleCache(lengths), f"cache: {size} in memory"
    why = "no cache_dir"
    if cache_dir is not None:
        folder = Path(cache_dir) / f"samples-{key[:24]}"
        try:
            if _make_room(folder, total):
                cache = SampleCache(lengths, folder)
                os.utime(folder)  # the least recently used are removed first
                IN_USE.add(cache)
                return cache, f"cache: {size} in {folder}"
            why = f"{cache_dir} has too little space"
        except OSError as error:
            why = f"{cache_dir} cannot be written ({error.strerror})"
    if setting == "auto" and total <= _free_memory() // 2:
        return SampleCache(lengths), f"cache: {size} in memory ({why})"
    return None, f"cache: off, {size} do not fit ({why}); images are decoded each time"


def _make_room(folder: Path, total: int) -> bool:
    """Remove old caches that are not in use until all fit in half of the disk space that they leave.

    Returns False, and removes nothing, if they cannot.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    others = [path for path in folder.parent.glob("samples-*") if path.is_dir() and path != folder]
    used = {path: _bytes_in(path) for path in others}
    budget = (shutil.disk_usage(folder.parent).free + sum(used.values()) + _bytes_in(folder)) // 2
    kept = {cache.folder: int(cache.offsets[-1]) for cache in IN_USE if cache.folder in used}
    used |= kept  # their size once filled
    if total + sum(kept.values()) > budget:
        return False
    for oldest in sorted(used.keys() - kept, key=lambda path: path.stat().st_mtime):
        if total + sum(used.values()) > budget:
            shutil.rmtree(oldest, ignore_errors=True)
            del used[oldest]
    return True


def _bytes_in(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk; sparse files count what is written."""
    sizes = [path.stat() for path in folder.glob("*.bin")]
    return sum(getattr(size, "st_blocks", size.st_size // 512) * 512 for size in sizes)


def _free_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 2**30  # unknown: assume what any training machine has
