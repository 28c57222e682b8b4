"""Samples per second from files to normalised batches: ours, a torchvision-style pipeline, albumentations.

    python benchmarks/data.py --data DATA_ROOT --num_classes 11 --ignore_index 11

DATA_ROOT/{train,val}/{images,masks} is read as it is and, with --photos, also as 1920 x 1440 JPEG photos of
quality 90 with PNG masks, made from the first of its pictures. Every pipeline does the same: random zoom 0.5
to 2, window of --size, flip, brightness, contrast and saturation by 0.3, normalisation, batches of 16. Each
has a process of its own, with --threads threads, in interleaved rounds. Ours decodes everything and makes the
first epoch's batches (first pass), or makes them from its cache (later passes); it takes no worker process.
The others take none, or as many as there are threads. albumentations is optional.

Goals, each against a pipeline without workers and with them: later passes 8 times torchvision's rate and 5
times albumentations', on photos 40 times torchvision's; the first pass over photos 2.4 times torchvision's
and 1.2 times albumentations'.
"""

import random
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import machine, options, print_goals, print_table, ratios, rotation, spread, write_json
from torch.utils.data import DataLoader, Dataset
from worker import CONTEXT

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


FIRST, LATER = "ours, first pass", "ours, later passes"
PEERS = {  # name: (data set, with as many workers as threads or with none)
    "torchvision, no worker": (References, False),
    "torchvision, workers": (References, True),
    "albumentations, no worker": (Albumentations, False),
    "albumentations, workers": (Albumentations, True),
}
GOALS = {
    "data as it is": [(LATER, "torchvision", 8.0), (LATER, "albumentations", 5.0)],
    "1920 x 1440 photos": [
        (LATER, "torchvision", 40.0),
        (FIRST, "torchvision", 2.4),
        (FIRST, "albumentations", 1.2),
    ],
}


def make_photos(pairs, folder: Path, count: int) -> None:
    """The first pictures again at 1920 x 1440, as a camera would save them."""
    for split, part in (("train", pairs[:count]), ("val", pairs[:2])):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i, pair in enumerate(part):
            photo = Image.open(pair.image).convert("RGB").resize((1920, 1440), Image.Resampling.BICUBIC)
            photo.save(folder / split / "images" / f"{split}{i}.jpg", quality=90)
            Image.open(pair.mask).resize((1920, 1440), 0).save(folder / split / "masks" / f"{split}{i}.png")


def pipeline(name: str, pairs, encoding, args) -> tuple[Callable[[], None], int]:
    """One pipeline's pass over all samples, and how many it makes."""
    if name in PEERS:
        kind, workers = PEERS[name]
        dataset = kind(pairs, args.size, args.ignore_index)
        loader = DataLoader(
            dataset, BATCH, num_workers=workers and args.threads, persistent_workers=workers > 0
        )
        return lambda: deque(loader, maxlen=0), len(pairs)

    keep_freed_memory()  # as training does
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))

    def decoded() -> SegmentationDataset:
        dataset = SegmentationDataset(
            pairs,
            encoding=encoding,
            image_size=(args.size, args.size),
            ignore_index=args.ignore_index,
            augmentation=Augmentation(scale=ZOOM, color_jitter=JITTER),
            threads=args.threads,
        )
        dataset.use_cache("ram", None)
        dataset.fill_cache()
        return dataset

    def batches(dataset: SegmentationDataset, epochs: int) -> None:
        for epoch in range(epochs):
            for start in range(0, len(pairs), BATCH):
                keys = [(epoch, index) for index in range(start, min(start + BATCH, len(pairs)))]
                dataset.batch(keys)[0].float().sub_(mean).div_(std)

    if name == FIRST:
        return lambda: batches(decoded(), 1), len(pairs)
    kept, epochs = decoded(), max(1, 1024 // len(pairs))
    return lambda: batches(kept, epochs), len(pairs) * epochs


def serve(name: str, pairs, encoding, args, pipe) -> None:
    """Make a pipeline, say whether it is there, then answer each message by samples per second of a pass."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    try:
        run, count = pipeline(name, pairs, encoding, args)
    except ModuleNotFoundError as error:
        pipe.send(f"{error.name} is not installed")
        return
    run()
    pipe.send(None)
    while pipe.recv():
        start = time.perf_counter()
        run()
        pipe.send(count / (time.perf_counter() - start))


def measure(pairs, encoding, args) -> dict[str, list[float] | str]:
    """Samples per second of each pipeline by round, or why it is not measured."""
    pipes, found = {}, {}
    for name in (FIRST, LATER, *PEERS):
        pipe, theirs = CONTEXT.Pipe()
        CONTEXT.Process(target=serve, args=(name, pairs, encoding, args, theirs)).start()
        absent = pipe.recv()
        found[name] = absent or []
        if not absent:
            pipes[name] = pipe
    for _, names in rotation(pipes, args.rounds):
        for name in names:
            pipes[name].send(True)
            found[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    return found


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
    known = dict(num_classes=args.num_classes, ignore_index=args.ignore_index)
    report = check_data(args.data, **known)
    description = machine("torchvision", "Pillow", "numpy", "albumentations")
    found = {"data as it is": measure(report.train[: args.samples], report.encoding, args)}
    if args.photos:
        with tempfile.TemporaryDirectory() as folder:
            make_photos(report.train, Path(folder) / "photos", args.photos)
            photos = check_data(Path(folder) / "photos", **known)
            found["1920 x 1440 photos"] = measure(photos.train, photos.encoding, args)
    rows, goals = [], []
    for data, rates in found.items():
        for name, values in rates.items():
            if isinstance(values, str):
                rows.append((data, name, values, ""))
                continue
            first = ratios(values, rates[next(iter(PEERS))])
            rows.append((data, name, spread(values), spread(first, 1)))
        for ours, other, goal in GOALS[data]:
            for name in (name for name in PEERS if name.startswith(other)):
                if not isinstance(rates[name], str):
                    goals.append((f"{data}: {ours} to {name}", goal, ratios(rates[ours], rates[name]), False))
    print_table(("data", "pipeline", "samples a second", "to torchvision's, no worker"), rows)
    print_goals(goals)
    write_json(args.output, {"settings": vars(args), "machine": description, "samples_per_second": found})


if __name__ == "__main__":
    main()
