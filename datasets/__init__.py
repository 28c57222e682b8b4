"""From a user's folder to training batches.

A picture's way, each stop usable alone: reading (file to array) → labels (mask values to class ids) →
preflight (every file checked and counted once) → transforms (fitting, random moves) → warp (doing them) →
cache (decoded, resized samples) → folder (the data set) → sampling (order, shards, batches). What is named
here needs numpy and Pillow only; what makes tensors is imported from `datasets.folder` and
`datasets.sampling`.
"""

from .finding import find_images, left_out
from .labels import Encoding, parse_labels
from .pairing import Pair, pair_targets
from .preflight import DataReport, check_data
from .reading import read_image, read_mask
from .samples import DataError
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
    "left_out",
    "mean_std",
    "pair_targets",
    "parse_labels",
    "read_image",
    "read_mask",
]
