"""Atomic writes on the file systems that people have."""

import errno
import os

import pytest

from utils.checkpoint import TEMPORARY, sweep, write_atomic, write_text


def failing_for_folders(number):
    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_folder_that_cannot_be_flushed_is_passed_over(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing_for_folders(number))
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_another_failure_to_flush_a_folder_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing_for_folders(errno.EIO))
    with pytest.raises(OSError, match=r"a\.txt"):
        write_text(tmp_path / "a.txt", "whole")


@pytest.mark.parametrize("stem", ["x" * 251, "照" * 83, "ü" * 125])
def test_names_as_long_as_the_file_system_takes_are_written(tmp_path, stem):
    path = tmp_path / f"{stem}.txt"
    write_text(path, "whole")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_half_written_files_are_swept_and_others_are_not(tmp_path):
    names = []

    def killed(file):
        names.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.txt", killed)
    assert names[0].startswith(".") and names[0].endswith(TEMPORARY) and not [*tmp_path.iterdir()]
    for name in (names[0], "kept.txt"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
