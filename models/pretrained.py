"""Load public classification weights into a network's backbone, and report which fitted."""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from .checkpoint import check_weights, read_file


@dataclass(frozen=True)
class PretrainedReport:
    """The result of `load_pretrained`.

    Attributes:
        loaded: names in the network that now have public weights.
        adapted: those of them that were fitted to `in_channels`.
        left_over: names in the source that the network does not have: the classifier.
        missing: names in the network that public weights could have filled but the source does not have.
    """

    loaded: tuple[str, ...]
    adapted: tuple[str, ...]
    left_over: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        for label in ("adapted", "left_over", "missing"):
            names = getattr(self, label)
            if names:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                text += f"; {len(names)} {label.replace('_', ' ')} ({shown})"
        return text


def load_pretrained(model: nn.Module, source: str | Path) -> PretrainedReport:
    """Load torchvision's classification weights, or a file of them, into `model.backbone`.

    If `in_channels` is not 3, the first convolution is adapted: for one channel the three are summed, so that
    a gray image gives the same features as in color; else they are repeated, RGBRG..., times 3 / in_channels.
    FCN also fills fc6 and fc7 from the classifier. Weights of a VGG without batch norm fit one with it, whose
    norms are then not changed. Nothing is changed unless every convolution of the backbone fits.

    Args:
        model: a network of this package, changed in place.
        source: "imagenet" for torchvision's IMAGENET1K_V1 (from its cache or downloaded), or the path of a
            state dict with torchvision's names; they may have a prefix (`module.`, `backbone.`, `encoder.`),
            and the state dict may be an entry `state_dict` or `model` of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the network has no backbone, the file is damaged or of another architecture, or the public
            weights cannot be downloaded.
    """
    if not hasattr(model, "backbone"):
        raise ValueError(
            f"{type(model).__name__.lower()} has no backbone for public weights; got {source!r}. "
            f"Set pretrained to none."
        )
    backbone = model.backbone.name
    public = str(source) == "imagenet"
    content = fetch_imagenet(backbone) if public else read_file(source, "file of weights", legacy=True)
    for entry in ("state_dict", "model_state_dict", "model"):  # of a training checkpoint
        content = content[entry] if isinstance(content.get(entry), dict) else content
    weights = without_prefix(check_weights(content, str(source)), model)

    keys, state = match_names(weights, model), model.state_dict()
    fitting, adapted = fit_shapes({name: weights[key] for name, key in keys.items()}, model, source)
    report = PretrainedReport(tuple(fitting), adapted, *unmatched(weights, keys, model))
    parts = {name.split(".")[0] for name in model.backbone.state_dict()}
    foreign = [key for key in report.left_over if key.split(".")[0] in parts]
    foreign += [name for name in report.missing if name.startswith("backbone.") and state[name].dim() == 4]
    if foreign:
        raise ValueError(
            f"{source} must hold the weights of {backbone}; {foreign[0]!r} is in only one of the two. "
            f"Give weights of the same backbone."
        )
    model.load_state_dict(fitting, strict=False)
    return report


def without_prefix(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights below the prefix in front of the backbone's first name; all of them without one."""
    names = list(model.backbone.state_dict())
    if names[0] in weights:
        return weights
    prefixes = {key.removesuffix(names[0]) for key in weights if key.endswith(f".{names[0]}")}
    if not prefixes:
        return weights
    prefix = max(sorted(prefixes), key=lambda prefix: sum(f"{prefix}{name}" in weights for name in names))
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def match_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Map names in the network to names in `weights`, for all tensors that both have."""
    names = {f"backbone.{key}": key for key in weights}
    if model.backbone.name.endswith("_bn") and not any("running_mean" in key for key in weights):
        layers = model.backbone.named_modules(prefix="backbone")
        convolutions = [name for name, layer in layers if isinstance(layer, nn.Conv2d)]
        plain = [key for key in weights if key.startswith("features.") and key.endswith(".weight")]
        pairs = list(zip(convolutions, plain, strict=False))  # the n-th convolution of a plain VGG to ours
        names = {f"{ours}.{p}": key.replace("weight", p) for ours, key in pairs for p in ("weight", "bias")}
    for old, new in getattr(model, "pretrained_names", {}).items():
        names |= {key.replace(old, new, 1): key for key in weights if key.startswith(old)}
    state = model.state_dict()
    return {name: key for name, key in names.items() if name in state and key in weights}


def unmatched(
    weights: dict[str, Tensor], keys: dict[str, str], model: nn.Module
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names in `weights` that no name in the network has, and those in the network left empty."""
    fillable = ("backbone.", *getattr(model, "pretrained_names", {}).values())
    empty = [name for name in model.state_dict() if name.startswith(fillable) and name not in keys]
    missing = tuple(name for name in empty if "num_batches" not in name)
    return tuple(key for key in weights if key not in keys.values()), missing


def fit_shapes(
    weights: dict[str, Tensor], model: nn.Module, source: str | Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return `weights` by the network's names in its shapes, and the names adapted to `in_channels`."""
    state, fitting, adapted = model.state_dict(), {}, []
    for name, value in weights.items():
        shape = state[name].shape
        if value.dim() == 2 and len(shape) == 4 and value.numel() == shape.numel():
            value = value.reshape(shape)  # a linear layer of the classifier as a convolution
        if value.dim() == 4 and value.shape[1] == 3 != shape[1] == model.in_channels:
            value, adapted = fit_channels(value, shape[1]), [*adapted, name]
        if value.shape != shape:
            raise ValueError(
                f"{source}: {name!r} is {tuple(value.shape)}, but this {model.backbone.name} needs "
                f"{tuple(shape)}. Give weights of the same backbone and width."
            )
        fitting[name] = value
    return fitting, tuple(adapted)


def fit_channels(weight: Tensor, in_channels: int) -> Tensor:
    """Fit the weights of a first convolution on RGB to another number of channels."""
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [index % 3 for index in range(in_channels)]] * (3 / in_channels)


def fetch_imagenet(backbone: str) -> dict[str, Tensor]:
    """Return torchvision's public weights for a backbone, from its cache or downloaded."""
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ValueError(
            "pretrained 'imagenet' needs torchvision, which is not installed. Install it, or give a file."
        ) from error
    weights = get_model_weights(backbone).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # offline, a wrong address, a broken download
        raise ValueError(
            f"pretrained 'imagenet' must download {weights.url}; got {error}. "
            f"Download it elsewhere and give the file's path, or set pretrained to none."
        ) from error
