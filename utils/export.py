"""A network as a file that runs without this code: a `torch.export` program (.pt2) or ONNX (.onnx).

Its input `images` is uint8 (N, C, H, W), as read from a file; normalization is included, batch norm folded.
Batch, height and width are free, from 33 pixels per side. The written program is run on several sizes and
compared with the network; a program from elsewhere is never loaded.
"""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checkpoint import write_atomic
from utils.inference import normalize

SMALLEST = 33  # pixels per side of the images that a program takes
SIZES = ((1, 64, 64), (3, 96, 128), (2, 33, 47), (1, 160, 90))  # (batch, height, width) that are compared
OLDEST_TORCH = (2, 14)  # 2.10 restricts exported networks to sizes that pool evenly
ONNX_PACKAGES = ("onnx", "onnxscript")


class Exportable(nn.Module):
    """A network preceded by its normalization.

    Shape:
        images (N, C, H, W) uint8 → logits (N, num_classes, H, W) float32.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, list(mean), list(std)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images as they are read."""
        return self.model(normalize(images, self.mean, self.std, torch.contiguous_format))


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        ValueError: the ending is neither .pt2 nor .onnx, or packages are not installed.
        FileExistsError: the file exists.
        FileNotFoundError: the folder does not exist.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"export must end in .pt2 or .onnx; got {path}. The ending decides the format")
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ValueError(
            f"export needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, whose programs take any size; got "
            f"{torch.__version__}. Install a newer torch"
        )
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(
            f"export to ONNX needs the packages {' and '.join(ONNX_PACKAGES)}; {' and '.join(missing)} not "
            f"installed. Install with: pip install {' '.join(ONNX_PACKAGES)} onnxruntime; or export to .pt2"
        )
    if path.exists():
        raise FileExistsError(f"export: {path} exists. Remove it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"export: no folder {path.parent}. Create it first")


def export(
    model: nn.Module,
    path: Path,
    *,
    fold: Callable[[nn.Module, int], nn.Module],
    mean: Sequence[float],
    std: Sequence[float],
    info: dict[str, Any],
) -> float | None:
    """Write `model`, and compare the written program with it on `SIZES`.

    Args:
        model: in eval mode, on the CPU; it is not changed.
        path: ending in .pt2 or .onnx; see `check_target`.
        fold: `models.fold_batch_norm`.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        info: plain values that are stored in the file, as JSON under `info`.

    Returns:
        The largest difference between the file's logits and the network's, relative to the largest logit;
        None if nothing that is installed can run the file.
    """
    network = Exportable(model, mean, std).eval()
    folded = Exportable(fold(copy.deepcopy(model), len(mean)), mean, std).eval()
    example = (torch.zeros(2, len(mean), 64, 96, dtype=torch.uint8),)
    sides = {2: torch.export.Dim("height", min=SMALLEST), 3: torch.export.Dim("width", min=SMALLEST)}
    shapes = {"images": {0: torch.export.Dim("batch"), **sides}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the internals of export
        program = torch.export.export(folded, example, dynamic_shapes=shapes)
        if path.suffix == ".pt2":
            extra = {"info.json": json.dumps(info)}
            write_atomic(path, lambda file: torch.export.save(program, file, extra_files=extra))
            run: Callable[[Tensor], Tensor] | None = program.module()
        else:
            run = write_onnx(program, example, path, info)
    return largest_difference(network, run, len(mean)) if run else None


def write_onnx(
    program: torch.export.ExportedProgram, example: tuple, path: Path, info: dict[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """Write ONNX with the weights inside; return a function that runs it if onnxruntime is installed."""
    names = {"input_names": ["images"], "output_names": ["logits"]}
    proto = torch.onnx.export(program, example, **names, dynamo=True, verbose=False).model_proto
    proto.metadata_props.add(key="info", value=json.dumps(info))
    content = proto.SerializeToString()
    write_atomic(path, lambda file: file.write(content))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@torch.no_grad()
def largest_difference(network: nn.Module, run: Callable[[Tensor], Tensor], channels: int) -> float:
    """Return the largest difference of two functions over `SIZES`, relative to the largest logit."""
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for count, *size in SIZES:
        images = torch.randint(256, (count, channels, *size), dtype=torch.uint8, generator=generator)
        expected = network(images)
        worst = max(worst, float((run(images) - expected).abs().max() / expected.abs().max()))
    return worst
