"""Small data sets and runs that several tests start from."""

import os
import sys
from contextlib import contextmanager

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import pytest
from PIL import Image

from config import Config
from utils import visualize

os.fsync = lambda handle: None  # a twentieth of the time, more on a slow disk; no test loses power


@pytest.fixture(scope="session", autouse=True)
def warm_doors():
    """As the first test begins, and captured like it."""
    if "doors" in sys.modules:  # some test of this session uses it
        sys.modules["doors"].warm_up()


def write_pair(root, split, stem, rng, size=(48, 40), ignore=255):
    """A grey picture with a bright square, and its mask: 0 ground, 1 square, one ignored pixel."""
    height, width = size
    picture = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(2, height - 20), rng.integers(2, width - 20)
    picture[top : top + 16, left : left + 16] += 140
    mask[top : top + 16, left : left + 16] = 1
    mask[0, 0] = ignore
    for folder, array in (("images", picture), ("masks", mask)):
        (root / split / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / split / folder / f"{stem}.png")


def write_data(folder):
    """Six training and three validation pictures of several sizes, two classes."""
    rng = np.random.default_rng(0)
    for split, sizes in (("train", [(48, 40)] * 5 + [(60, 70)]), ("val", [(48, 40), (40, 64), (50, 50)])):
        for number, size in enumerate(sizes):
            write_pair(folder, split, f"p{number}", rng, size)
    return folder


def small_settings(data, runs):
    """Make a Config of a small, quick run on that data; any setting can be given."""

    def make(**changes):
        small = dict(
            data_root=str(data),
            output_dir=str(runs),
            run_name="run",
            num_classes=2,
            image_size=32,
            base_channels=4,
            epochs=2,
            batch_size=2,
            warmup_steps=2,
        )
        return Config(**{**small, **changes})

    return make


@pytest.fixture
def data(tmp_path):
    """Pictures that the test may change."""
    return write_data(tmp_path / "data")


@pytest.fixture
def settings(data, tmp_path):
    """Small settings on that data."""
    return small_settings(data, tmp_path / "runs")


@contextmanager
def without_drawing():
    """For runs whose numbers alone are looked at: drawing takes half of their time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_report"):
            patch.setattr(visualize, name, lambda *_, **__: Image.new("RGB", (1, 1)))
        yield


@pytest.fixture
def undrawn():
    """The same, for all runs of a test."""
    with without_drawing():
        yield


@pytest.fixture
def narrow_fcn(monkeypatch):
    """FCN with 32 channels in fc6 and fc7 instead of 4096, which make 100 million weights."""
    monkeypatch.setattr("models.fcn.FC_CHANNELS", 32)


@pytest.fixture(scope="session")
def kept_settings(tmp_path_factory):
    """Small settings on data that no test changes, for runs that several tests look at."""
    folder = tmp_path_factory.mktemp("kept")
    return small_settings(write_data(folder / "data"), folder / "runs")
