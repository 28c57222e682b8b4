"""Samples per second from files to normalised batches: ours, a torchvision-style pipeline, albumentations.

    python benchmarks/data.py --data DATA_ROOT --num_classes 11 --ignore_index 11

DATA_ROOT/{train,val}/{images,masks} is read as it is and, with --photos, also as 1920 x 1440 JPEG photos of
quality 90 with PNG masks, made from the first of its pictures. Every pipeline does the same: random zoom 0.5
to 2, window of --size, flip, brightness, contrast and saturation by 0.3, normalisation, batches of 16. Ours
runs in this process on --threads threads, once decoding everything (first pass) and once from its cache
(later passes); the others run in this process and in as many loader workers. albumentations is optional.
"""

import random
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import interleave, machine, options, print_table, ratios, spread, write_json
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

from datasets import Augmentation, check_data, mean_std
from datasets.folder import SegmentationDataset
from utils.device import keep_freed_memory

BATCH = 16
ZOOM, JITTER = (0.5, 2.0), 0.3
MEAN, STD = mean_std(3)


class References(Dataset):
    """As torchvision's references/segmentation: PIL, RandomResize, flip, pad, RandomCrop, ColorJitter."""

    def __init__(self, pairs, size, ignore_index):
        from torchvision.transforms import ColorJitter

        self.pairs, self.size, self.ignore_index = pairs, size, ignore_index
        self.jitter = ColorJitter(JITTER, JITTER, JITTER)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        image, mask = Image.open(self.pairs[index].image).convert("RGB"), Image.open(self.pairs[index].mask)
        side = int(self.size * random.uniform(*ZOOM))
        image = F.resize(image, [side, side], antialias=True)
        mask = F.resize(mask, [side, side], InterpolationMode.NEAREST)
        if random.random() < 0.5:
            image, mask = F.hflip(image), F.hflip(mask)
        missing = max(0, self.size - side)
        image, mask = (
            F.pad(image, [0, 0, missing, missing]),
            F.pad(mask, [0, 0, missing, missing], self.ignore_index),
        )
        top, left = (random.randint(0, max(0, side - self.size)) for _ in range(2))
        image, mask = (
            F.crop(image, top, left, self.size, self.size),
            F.crop(mask, top, left, self.size, self.size),
        )
        image = F.normalize(F.to_tensor(self.jitter(image)), MEAN, STD)
        return image, torch.as_tensor(np.array(mask), dtype=torch.int64)


class Albumentations(Dataset):
    """The same moves by albumentations, pictures decoded by OpenCV."""

    def __init__(self, pairs, size, ignore_index):
        import albumentations as A

        self.pairs = pairs
        self.moves = A.Compose(
            [
                A.Resize(size, size),
                A.RandomScale((ZOOM[0] - 1, ZOOM[1] - 1), p=1),
                A.PadIfNeeded(size, size, border_mode=0, fill_mask=ignore_index),
                A.RandomCrop(size, size),
                A.HorizontalFlip(),
                A.ColorJitter(JITTER, JITTER, JITTER, 0, p=1),
                A.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        import cv2

        image = cv2.cvtColor(cv2.imread(str(self.pairs[index].image)), cv2.COLOR_BGR2RGB)
        mask = cv2.imread(str(self.pairs[index].mask), cv2.IMREAD_UNCHANGED)
        made = self.moves(image=image, mask=mask)
        return torch.from_numpy(made["image"]).permute(2, 0, 1), torch.from_numpy(made["mask"]).long()


def make_photos(pairs, folder: Path, count: int) -> None:
    """The first pictures again at 1920 x 1440, as a camera would save them."""
    for split, part in (("train", pairs[:count]), ("val", pairs[:2])):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i, pair in enumerate(part):
            photo = Image.open(pair.image).convert("RGB").resize((1920, 1440), Image.Resampling.BICUBIC)
            photo.save(folder / split / "images" / f"{split}{i}.jpg", quality=90)
            Image.open(pair.mask).resize((1920, 1440), 0).save(folder / split / "masks" / f"{split}{i}.png")


def measure(pairs, encoding, args) -> dict[str, list[float]]:
    """Samples per second of each pipeline, by round."""
    indices = list(range(len(pairs)))
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    ours = dict(
        encoding=encoding,
        image_size=(args.size, args.size),
        ignore_index=args.ignore_index,
        augmentation=Augmentation(scale=ZOOM, color_jitter=JITTER),
        threads=args.threads,
    )
    plain, cached = SegmentationDataset(pairs, **ours), SegmentationDataset(pairs, **ours)
    cached.use_cache("ram", None)
    cached.fill_cache()

    def run(dataset, repeat=1):
        for epoch in range(repeat):
            for start in range(0, len(pairs), BATCH):
                images, _ = dataset.batch([(epoch, index) for index in indices[start : start + BATCH]])
                images.float().sub_(mean).div_(std)

    def consume(loader):
        for _ in loader:
            pass

    repeat = max(1, 1024 // len(pairs))
    cases = {"ours, first pass": lambda: run(plain), "ours, later passes": lambda: run(cached, repeat)}
    peers = {"torchvision references": References}
    try:
        import albumentations  # noqa: F401

        peers["albumentations"] = Albumentations
    except ImportError:
        print("albumentations: not measured, it is not installed")
    for name, kind in peers.items():
        dataset = kind(pairs, args.size, args.ignore_index)
        for workers in (0, args.threads):
            loader = DataLoader(dataset, BATCH, num_workers=workers, persistent_workers=workers > 0)
            cases[f"{name}, {workers} workers"] = lambda loader=loader: consume(loader)
    seconds = interleave(cases, args.rounds)
    made = {name: len(pairs) * (repeat if "later" in name else 1) for name in cases}
    return {name: [made[name] / value for value in values] for name, values in seconds.items()}


def main() -> None:
    parser = options(__doc__, "data")
    parser.add_argument("--data", default="mock_data")
    parser.add_argument("--num_classes", type=int, default=4)
    parser.add_argument("--ignore_index", type=int, default=255)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--photos", type=int, default=32, help="how many large photos to make; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as training does
    known = dict(num_classes=args.num_classes, ignore_index=args.ignore_index)
    report = check_data(args.data, **known)
    results = {"machine": machine("torchvision", "Pillow", "numpy", "albumentations"), "settings": vars(args)}
    results["data as it is"] = measure(report.train[: args.samples], report.encoding, args)
    if args.photos:
        with tempfile.TemporaryDirectory() as folder:
            make_photos(report.train, Path(folder) / "photos", args.photos)
            photos = check_data(Path(folder) / "photos", **known)
            results["1920 x 1440 photos"] = measure(photos.train, photos.encoding, args)
    rows = []
    for data in list(results)[2:]:
        theirs = [values for name, values in results[data].items() if name.startswith("torchvision")]
        best = max(theirs, key=statistics.median)
        for name, values in results[data].items():
            rows.append([data, name, spread(values), spread(ratios(values, best), 1)])
    print_table(["data", "pipeline", "samples/s: median (lowest..highest)", "to torchvision's best"], rows)
    write_json(args.output, results)


if __name__ == "__main__":
    main()
