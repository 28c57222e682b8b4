"""From a user's folder to training batches.

The steps, each usable alone: finding (files) → reading (file to array, with tiff, png and samples for what
Pillow does not decode exactly; large for images in strips) → labels (mask values to class ids) → layout and
pairing (which mask belongs to which image) → scan, infer and preflight (every file checked and counted once)
→ transforms (fitting, random augmentation) → warp (resampling) → cache (decoded, resized samples) → folder
(the data set) → sampling (order, shards, batches). The names exported here need numpy and Pillow only; the
modules that make tensors are imported from `datasets.folder` and `datasets.sampling`.
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
