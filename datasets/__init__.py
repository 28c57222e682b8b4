"""From a user's folder to training batches.

The steps, each usable alone: finding (files) → reading (file to array, with tiff, png and samples for what
Pillow does not decode exactly; large for images in strips) → labels (mask values to class ids) → layout and
pairing (which mask belongs to which image) → scan, infer and preflight (every file checked and counted once)
→ fitting (to the network's input) → augment (random transforms) → warp (resampling) → cache (decoded, resized
samples) → folder (the data set) → sampling (order, shards, batches). Only what makes tensors needs torch,
which is imported when it is used.
"""

from typing import Any

from .augment import Augmentation
from .finding import find_images, left_out
from .fitting import Box, fit, mean_std
from .labels import Encoding, parse_labels
from .pairing import Pair, pair_targets
from .preflight import DataReport, check_data
from .reading import read_image, read_mask
from .samples import DataError

__all__ = [
    "Augmentation",
    "Box",
    "DataError",
    "DataReport",
    "Encoding",
    "Pair",
    "SegmentationDataset",
    "check_data",
    "find_images",
    "fit",
    "left_out",
    "mean_std",
    "pair_targets",
    "parse_labels",
    "read_image",
    "read_mask",
]


def __getattr__(name: str) -> Any:
    if name == "SegmentationDataset":
        from .folder import SegmentationDataset

        return SegmentationDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
