"""From a user's folder to training batches.

A picture's way, each stop usable alone: reading (file to array) → labels (mask values to class ids) →
preflight (every file checked and counted once) → transforms (fitting, random moves) → warp (doing them) →
cache (decoded, resized samples) → folder (the data set) → sampling (order, shards, batches). What is named
here needs numpy and Pillow only; what makes tensors is imported from `datasets.folder` and
`datasets.sampling`.
"""

from .labels import Encoding, parse_labels
from .pairing import Pair, pair_truth
from .preflight import DataReport, check_data
from .reading import DataError, find_images, read_image, read_mask
from .transforms import Augmentation, Box, fit, mean_std

__all__ = [
    "Augmentation",
    "Box",
    "DataError",
    "DataReport",
    "Encoding",
    "Pair",
    "check_data",
    "find_images",
    "fit",
    "mean_std",
    "pair_truth",
    "parse_labels",
    "read_image",
    "read_mask",
]
