"""Whole processes, from start to exit: one epoch and its validation, ours against two usual ways.

    python benchmarks/train.py --data camvid --num_classes 11 --ignore_index 11 --pictures 64 16
    python benchmarks/train.py --data camvid --num_classes 11 --ignore_index 11 --all \
        --network separable_resnet18

All train on the same pictures, resized to --size, in batches of 4, the same network with random weights (our
class; `lightning_smp`: segmentation_models.pytorch's DeepLabV3Plus of the same backbone):
- ours: train.py with its defaults, which flip pictures at random, in a new output folder;
- lightning: a LightningModule in the manner of segmentation_models.pytorch's examples: albumentations resize,
  flip and normalise; cross entropy and DiceLoss; get_stats of every batch; Adam; Lightning's own defaults;
- script, script_amp: a loop in the manner of milesial/Pytorch-UNet: Pillow resizes, no augmentation; RMSprop,
  cross entropy and Dice over softmax and one-hot, clipped gradients, channels_last; validation by Dice, at
  the epoch's end alone; in float32 and with its autocast on.
--workers is the number of the others' loader processes; on two cores none was faster than two. The peers need
segmentation-models-pytorch, lightning and albumentations; without one the row says so.

Goals: on 64 + 16 CamVid pictures 2.2 times faster than lightning, on all of them 2.6; 2.4 times faster than
script, 1.3 times faster than script_amp.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from timing import interleave, machine, options, print_goals, print_table, ratios, spread, write_json
from worker import NETWORKS, Case

CASES = {  # what each needs beside torch
    "ours": (),
    "lightning": ("lightning", "segmentation_models_pytorch", "albumentations"),
    "lightning_smp": ("lightning", "segmentation_models_pytorch", "albumentations"),
    "script": (),
    "script_amp": (),
}
GOALS = {"lightning": 2.2, "lightning_smp": 2.2, "script": 2.4, "script_amp": 1.3}
GOAL_OF_ALL = 2.6  # against lightning


def network(args, maker: str = "ours"):
    return Case(args.network, maker=maker, classes=args.num_classes).build()


def files(args, split: str) -> list[tuple[Path, Path]]:
    folder = Path(args.data) / split
    return list(zip(sorted((folder / "images").iterdir()), sorted((folder / "masks").iterdir()), strict=True))


def lightning(args, maker: str) -> None:
    import albumentations as A
    import cv2
    import lightning.pytorch as pl
    import numpy as np
    import segmentation_models_pytorch as smp
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    class Pictures(Dataset):
        def __init__(self, split, moves):
            self.files, self.moves = files(args, split), A.Compose(moves)

        def __len__(self):
            return len(self.files)

        def __getitem__(self, index):
            image, mask = self.files[index]
            image = cv2.cvtColor(cv2.imread(str(image)), cv2.COLOR_BGR2RGB)
            made = self.moves(image=image, mask=np.array(Image.open(mask)))
            return made["image"].transpose(2, 0, 1), made["mask"].astype("int64")

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network(args, maker)
            self.dice = smp.losses.DiceLoss("multiclass", ignore_index=args.ignore_index)
            self.cross_entropy = torch.nn.CrossEntropyLoss(ignore_index=args.ignore_index)
            self.outputs = {"train": [], "valid": []}

        def step(self, batch, stage):
            images, masks = batch
            logits = self.model(images)
            if isinstance(logits, tuple):
                logits = logits[0]
            loss = self.cross_entropy(logits, masks) + self.dice(logits, masks)
            ids = logits.softmax(1).argmax(1)
            stats = smp.metrics.get_stats(
                ids, masks, "multiclass", args.ignore_index, num_classes=args.num_classes
            )
            self.outputs[stage].append(stats)
            return loss

        def epoch_end(self, stage):
            stats = [torch.cat(parts) for parts in zip(*self.outputs[stage], strict=True)]
            for reduction in ("micro", "micro-imagewise"):
                score = smp.metrics.iou_score(*stats, reduction=reduction)
                self.log(f"{stage}_{reduction}_iou", score, prog_bar=True)
            self.outputs[stage].clear()

        def training_step(self, batch, _):
            return self.step(batch, "train")

        def validation_step(self, batch, _):
            return self.step(batch, "valid")

        def on_train_epoch_end(self):
            self.epoch_end("train")

        def on_validation_epoch_end(self):
            self.epoch_end("valid")

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=2e-4)

    size = A.Resize(args.size, args.size)
    shared = dict(batch_size=args.batch, num_workers=args.workers)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=args.folder, log_every_n_steps=1)
    trainer.fit(
        Model(),
        DataLoader(Pictures("train", [size, A.HorizontalFlip(), A.Normalize()]), shuffle=True, **shared),
        DataLoader(Pictures("val", [size, A.Normalize()]), **shared),
    )


def script(args, amp: bool) -> None:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from tqdm import tqdm

    class Pictures(Dataset):
        def __init__(self, split):
            self.files = files(args, split)

        def __len__(self):
            return len(self.files)

        def __getitem__(self, index):
            image, mask = (Image.open(path) for path in self.files[index])
            image = np.asarray(image.convert("RGB").resize((args.size, args.size), Image.Resampling.BICUBIC))
            mask = np.asarray(mask.resize((args.size, args.size), Image.Resampling.NEAREST))
            ids = np.full(mask.shape, args.ignore_index, np.int64)
            for value in range(args.num_classes):
                ids[mask == value] = value
            image = image.transpose(2, 0, 1) / 255.0
            return torch.as_tensor(image.copy()).float(), torch.as_tensor(ids)

    def dice_of(probabilities, masks):  # (N, C, H, W) each
        overlap = 2 * (probabilities * masks).sum((-1, -2))
        total = probabilities.sum((-1, -2)) + masks.sum((-1, -2))
        total = torch.where(total == 0, overlap, total)
        return ((overlap + 1e-6) / (total + 1e-6)).mean()

    def one_hot(masks):
        known = masks.masked_fill(masks == args.ignore_index, 0)
        return F.one_hot(known, args.num_classes).permute(0, 3, 1, 2).float()

    def moved(batch):
        return batch[0].to("cpu", torch.float32, memory_format=torch.channels_last), batch[1].to("cpu")

    shared = dict(batch_size=args.batch, num_workers=args.workers)
    training = DataLoader(Pictures("train"), shuffle=True, **shared)
    validation = DataLoader(Pictures("val"), drop_last=True, **shared)
    model = network(args).to(memory_format=torch.channels_last)
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999, foreach=True
    )
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=5)
    criterion = torch.nn.CrossEntropyLoss(ignore_index=args.ignore_index)
    model.train()
    with tqdm(total=len(training.dataset), unit="img") as bar:
        for batch in training:
            images, masks = moved(batch)
            with torch.autocast("cpu", enabled=amp):
                logits = model(images)
                if isinstance(logits, tuple):
                    logits = logits[0]
                loss = criterion(logits, masks)
                loss += 1 - dice_of(F.softmax(logits, dim=1).float(), one_hot(masks))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.update(len(images))
            bar.set_postfix(loss=loss.item())
    model.eval()
    score = 0.0
    with torch.no_grad(), torch.autocast("cpu", enabled=amp):
        for batch in tqdm(validation, unit="batch"):
            images, masks = moved(batch)
            ids = model(images).argmax(dim=1)
            score += dice_of(one_hot(ids)[:, 1:], one_hot(masks)[:, 1:])
    scheduler.step(score / max(1, len(validation)))
    torch.save(model.state_dict(), Path(args.folder) / "checkpoint.pth")


def command_of(case: str, args) -> list[str]:
    if case != "ours":
        return [sys.executable, __file__, "--run", case, json.dumps(vars(args))]
    flags = {
        "data_root": args.data,
        "num_classes": args.num_classes,
        "ignore_index": args.ignore_index,
        "image_size": args.size,
        "batch_size": args.batch,
        "epochs": 1,
        "output_dir": args.folder,
        **NETWORKS[args.network],
    }
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [sys.executable, str(ROOT / "train.py"), *words]


def run(case: str, args, folder: Path) -> None:
    """One process, in a folder of its own."""
    given = argparse.Namespace(**{**vars(args), "folder": tempfile.mkdtemp(dir=folder)})
    done = subprocess.run(command_of(case, given), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} ended with exit code {done.returncode}\n{done.stderr}")
    shutil.rmtree(given.folder)  # checkpoints are large


def some_pictures(args, folder: Path) -> str:
    """Copy the first pictures of each split; returns the folder."""
    for split, count in zip(("train", "val"), args.pictures, strict=True):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for image, mask in files(args, split)[:count]:
            shutil.copy(image, folder / split / "images")
            shutil.copy(mask, folder / split / "masks")
    return str(folder)


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        case, args = sys.argv[2], argparse.Namespace(**json.loads(sys.argv[3]))
        if case.startswith("script"):
            script(args, amp=case == "script_amp")
        else:
            lightning(args, "smp" if case == "lightning_smp" else "ours")
        return
    parser = options(__doc__, "train", rounds=3)
    parser.add_argument("--data", default=str(ROOT / "mock_data"))
    parser.add_argument("--num_classes", type=int, default=4)
    parser.add_argument("--ignore_index", type=int, default=255)
    parser.add_argument("--pictures", type=int, nargs=2, default=[64, 16], help="to train and to validate")
    parser.add_argument("--all", action="store_true", help="all pictures")
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    rows, cases = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        args.data = str(Path(args.data).absolute()) if args.all else some_pictures(args, folder / "data")
        for case in args.cases:
            absent = [name for name in CASES[case] if importlib.util.find_spec(name) is None]
            if absent:
                rows.append((case, f"not measured: {', '.join(absent)} not installed", ""))
            elif case != "lightning_smp" or args.network.startswith("separable"):
                cases[case] = lambda case=case: run(case, args, folder)
        seconds = interleave(cases, args.rounds, warmup=0)
        counts = [len(files(args, split)) for split in ("train", "val")]
    description = machine("segmentation-models-pytorch", "lightning", "albumentations")
    ours, goals = seconds.get("ours", []), []
    for case, values in seconds.items():
        faster = ratios(values, ours) if ours else []
        rows.append((case, spread(values, 1), spread(faster, 2) if faster else ""))
        if faster and case in GOALS:
            goal = GOAL_OF_ALL if args.all and case.startswith("lightning") else GOALS[case]
            goals.append((f"ours faster than {case}", goal, faster, False))
    print(f"{args.network}, {counts[0]} + {counts[1]} pictures, {args.size} pixels, {args.rounds} rounds")
    print_table(("process", "seconds", "its time / ours"), rows)
    print_goals(goals)
    settings = {**vars(args), "pictures": counts}
    write_json(args.output, {"settings": settings, "machine": description, "seconds": seconds})


if __name__ == "__main__":
    main()
