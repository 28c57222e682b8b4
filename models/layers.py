"""Pieces that several networks share: convolution blocks, batch norm of pooled maps, checks, weights."""

import difflib
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALLEST_SIDE = 32  # pixels; the encoders halve the picture five times


class PooledBatchNorm2d(nn.BatchNorm2d):
    """Batch norm for maps pooled to 1x1, where a batch of one has no variance to normalise by.

    With one value a channel the running statistics are used, in training too, and stay as they are.
    Any other input is treated exactly as `nn.BatchNorm2d` would.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class AveragePool2d(nn.AdaptiveAvgPool2d):
    """Average over bins x bins parts of a map, floor(i n / b) to ceil((i + 1) n / b) along a side.

    By two matrix products where deterministic algorithms are asked for, as the kernel's gradient is not on a
    GPU, and with `by_products`, for ONNX, which has no such pooling of free sizes.
    """

    def __init__(self, bins: int) -> None:
        super().__init__(bins)
        self.by_products = False

    def forward(self, x: Tensor) -> Tensor:
        """Average (N, C, H, W) to (N, C, bins, bins)."""
        plain = not (self.by_products or torch.are_deterministic_algorithms_enabled())
        if plain or self.output_size == 1:  # which is a mean
            return super().forward(x)
        rows, columns = (self._parts(length, x) for length in x.shape[-2:])
        return rows @ x @ columns.T / (rows.sum(1)[:, None] * columns.sum(1))

    def _parts(self, length: int, like: Tensor) -> Tensor:
        """(bins, length): 1 for the places of each part, else 0."""
        part = torch.arange(self.output_size, device=like.device)[:, None]
        place = torch.arange(length, device=like.device)
        low = part * length // self.output_size
        high = ((part + 1) * length + self.output_size - 1) // self.output_size
        return ((place >= low) & (place < high)).to(like.dtype)


class PooledConvBNReLU(nn.Sequential):
    """Average over bins x bins parts of the map, 1x1 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, bins: int) -> None:
        super().__init__(
            AveragePool2d(bins),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            PooledBatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class InnerConv2d(nn.Conv2d):
    """A convolution padded to keep height and width, without the taps that see padding alone.

    Of a kernel that is larger than its map these are many, and torch's gradient of their weights is wrong in
    bfloat16 on a CPU (2.10 to 2.14; 7x7 on maps of one or two rows). Result and gradients are those of all
    taps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        padding = kernel // 2 * dilation
        super().__init__(in_channels, out_channels, kernel, 1, padding, dilation, groups, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, in_channels, H, W)."""
        middle, apart = self.kernel_size[0] // 2, self.dilation[0]
        if not torch.compiler.is_exporting():  # an exported graph must not branch on a size
            down, across = (min(middle, (side - 1) // apart) for side in x.shape[-2:])
            if min(down, across) < middle:
                rows, columns = (slice(middle - seen, middle + seen + 1) for seen in (down, across))
                weight, padding = self.weight[:, :, rows, columns], (down * apart, across * apart)
                return F.conv2d(x, weight, self.bias, 1, padding, apart, self.groups)
        return super().forward(x)


class AtrousConv2d(InnerConv2d):
    """A 3x3 convolution with its taps `dilation` positions apart.

    One channel a group goes by `AtrousDepthwise` on a CPU.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, dilation, groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, in_channels, H, W)."""
        depthwise = x.is_cpu and self.groups == self.in_channels == self.out_channels
        if torch.compiler.is_exporting() or not (depthwise and 1 < self.dilation[0] < max(x.shape[-2:])):
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            x, weight = (each.to(torch.get_autocast_dtype("cpu")) for each in (x, weight))
        x = AtrousDepthwise.apply(x, weight, self.dilation[0])
        return x if self.bias is None else x + self.bias[:, None, None]


class AtrousDepthwise(torch.autograd.Function):
    """A 3x3 convolution of each channel by itself, with its taps `dilation` positions apart.

    Torch's own on CPUs (2.10 to 2.14) is up to ten times slower, and in bfloat16 the gradient of its weights
    is wrong without a word, up to 1e36, on channels_last maps of 32 x 32 and more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        """Convolve (N, C, H, W) by (C, 1, 3, 3)."""
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return _convolve_apart(x, weight, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Gradients of x, as a convolution by the turned weights, and of each tap, as a sum of products."""
        x, weight = ctx.saved_tensors
        grad_x = _convolve_apart(grad, weight.flip(2, 3), ctx.dilation) if ctx.needs_input_grad[0] else None
        taps = []
        for row, column in itertools.product((-ctx.dilation, 0, ctx.dilation), repeat=2):
            (to_rows, rows), (to_columns, columns) = map(_overlap, x.shape[-2:], (row, column))
            products = grad[:, :, to_rows, to_columns] * x[:, :, rows, columns]
            taps.append(products.sum((0, 2, 3), dtype=torch.promote_types(x.dtype, torch.float32)))
        return grad_x, torch.stack(taps, dim=1).view_as(weight), None


def _convolve_apart(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The convolution, as a plain one of dilation x dilation maps, each of every so many rows and columns."""
    number, channels, height, width = x.shape
    rows, columns = -(-height // dilation), -(-width // dilation)
    x = pad_end(x, rows * dilation - height, columns * dilation - width).permute(0, 2, 3, 1)
    x = x.reshape(number, rows, dilation, columns, dilation, channels).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)  # (N x dilation², C, rows, columns)
    x = F.conv2d(x, weight, padding=1, groups=channels).permute(0, 2, 3, 1)
    x = x.reshape(number, dilation, dilation, rows, columns, channels).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(number, rows * dilation, columns * dilation, channels).permute(0, 3, 1, 2)
    return x[..., :height, :width].contiguous(memory_format=torch.channels_last)


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Along one side, the places from which a tap moved by `shift` sees the map, and those that it sees."""
    places = range(length)[max(0, -shift) : max(0, length - shift)]
    return slice(places.start, places.stop), slice(places.start + shift, places.stop + shift)


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; padded so that stride 1 keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, dilation: int = 1) -> None:
        if dilation > 1:
            conv = AtrousConv2d(in_channels, out_channels, dilation)
        else:
            conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class SeparableConvBNReLU(nn.Sequential):
    """A 3x3 convolution a channel, then a 1x1 over the channels, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__(
            AtrousConv2d(in_channels, in_channels, dilation, groups=in_channels),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            ConvBNReLU(in_channels, out_channels, kernel=1),
        )


class MergingConv2d(nn.Conv2d):
    """A 3x3 convolution of several maps at once: a fine one, and coarse ones resized to its height and width.

    Resizing and convolving are linear and may change places: the nine taps are applied to a coarse map, as
    1x1 convolutions, and two small matrix products resize, shift and sum what they give. The result is that
    of the plain way, but for rounding, at a tenth or less of its multiplications for the coarse channels.

    Args:
        in_channels: of each map, in the order of the weights.
        out_channels: of the result.
        fine: which of the maps is the fine one, from 0.

    Shape:
        maps (N, in_channels[i], h_i, w_i) → (N, out_channels, H, W), height and width of the fine one.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, fine: int) -> None:
        super().__init__(sum(in_channels), out_channels, 3, padding=1, bias=False)
        self.parts, self.fine = list(in_channels), fine

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Merge a list of maps."""
        if torch.compiler.is_exporting():  # the products are written out for one size
            return super().forward(concatenated(maps, self.fine))
        weights, fine = self.weight.split(self.parts, dim=1), maps[self.fine]
        merged = F.conv2d(fine, weights[self.fine], self.bias, padding=1)
        for index, (x, weight) in enumerate(zip(maps, weights, strict=True)):
            if index != self.fine:
                merged = merged + _spread(x, weight, fine.shape[-2:])
        return merged


def _spread(x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
    """Resize (N, K, h, w) to `size` (H, W) and convolve it by (out, K, 3, 3): (N, out, H, W)."""
    number, _, height, width = x.shape
    rows, columns = size
    taps = weight.permute(3, 2, 0, 1).flatten(0, 2)[..., None, None]  # (3 across x 3 down x out, K, 1, 1)
    x = F.conv2d(x, taps).permute(0, 2, 3, 1)  # (N, h, w, 3 across x 3 down x out)
    x = _tap_weights(width, columns, x) @ x.reshape(number * height, 3 * width, -1)
    x = x.view(number, height, columns, 3, -1).transpose(2, 3)  # (N, h, 3 down, W, out)
    x = _tap_weights(height, rows, x) @ x.reshape(number, 3 * height, -1)
    return x.view(number, rows, columns, -1).permute(0, 3, 1, 2)


def _tap_weights(coarse: int, fine: int, like: Tensor) -> Tensor:
    """Along one side, what each place of the fine map takes of each place of the coarse one, tap by tap.

    Returns:
        (fine, coarse x 3): bilinear weights seen from one place before, at, and behind; 0 beyond the edge.
    """
    each = torch.eye(coarse, device=like.device)
    resized = F.interpolate(each[None], size=fine, mode="linear", align_corners=False)[0].T
    return F.pad(resized, (0, 0, 1, 1)).unfold(0, 3, 1).flatten(1).to(like.dtype)


class MergingConvBNReLU(nn.Sequential):
    """`MergingConv2d`, batch norm, ReLU; takes a list of maps."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, fine: int) -> None:
        super().__init__(
            MergingConv2d(in_channels, out_channels, fine=fine),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def concatenated(maps: Sequence[Tensor], fine: int) -> Tensor:
    """Maps one behind the other, each resized to the height and width of the one at `fine`."""
    return torch.cat([x if x is maps[fine] else resize(x, like=maps[fine]) for x in maps], dim=1)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize `x` bilinearly to the height and width of `like` (half-pixel centres: `align_corners=False`)."""
    resized = F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
    return _resized_back_fast(resized)


class Upsample(nn.Upsample):
    """Twice the height and width, bilinearly; see `resize`."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge (N, C, H, W)."""
        return _resized_back_fast(super().forward(x))


def _resized_back_fast(x: Tensor) -> Tensor:
    """A resized map whose gradient comes back as a whole.

    Where it was one of several that were concatenated, it has a part of the channels of their gradient. In
    channels_last torch brings such a part to the smaller size by a way that takes six times as long.
    """

    def whole(grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=torch.channels_last) if grad.stride(1) == 1 else grad

    if x.requires_grad and not torch.compiler.is_compiling():
        x.register_hook(whole)
    return x


def pad_even(x: Tensor) -> Tensor:
    """Add a row or column of zeros after the last where its number is odd, so that halving drops none."""
    height, width = x.shape[-2:]  # not `height % 2`, of which export cannot tell that a map keeps a place
    return pad_end(x, 2 * ((height + 1) // 2) - height, 2 * ((width + 1) // 2) - width)


def pad_end(x: Tensor, rows: int, columns: int) -> Tensor:
    """Add rows and columns of zeros after the last."""
    if torch.compiler.is_exporting() or rows or columns:  # an exported graph must not branch on a size
        x = F.pad(x, [0, columns, 0, rows])
    return x


def crop(x: Tensor, size: torch.Size) -> Tensor:
    """Cut the rows and columns of `x` beyond the height and width of `size`."""
    height, width = size[-2:]
    if torch.compiler.is_exporting():  # a slice is a view, and export would fix sizes to know its strides
        x = x.index_select(2, torch.arange(height, device=x.device))
        return x.index_select(3, torch.arange(width, device=x.device))
    return x[..., :height, :width]


def check_images(images: Tensor, in_channels: int) -> None:
    """Raise ValueError for a batch that no network here can take."""
    if images.dim() != 4 or images.shape[1] != in_channels:
        raise ValueError(
            f"images must be (N, {in_channels}, H, W) for this model; got {tuple(images.shape)}. "
            f"Build the model with the images' in_channels, or convert the images."
        )
    height, width = images.shape[-2:]
    if height < SMALLEST_SIDE or width < SMALLEST_SIDE:
        raise ValueError(
            f"images must be at least {SMALLEST_SIDE} pixels high and wide; got {height} x {width}. "
            f"Enlarge or pad them first."
        )


def check_numbers(num_classes: int, in_channels: int, dropout: float, base_channels: int = 1) -> None:
    """Raise ValueError for a count or a probability out of range."""
    counts = {"num_classes": num_classes, "in_channels": in_channels, "base_channels": base_channels}
    for name, value in counts.items():
        least = 2 if name == "num_classes" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            hint = "Count the background as a class." if name == "num_classes" else "Give a larger number."
            raise ValueError(f"{name} must be a whole number of {least} or more; got {value!r}. {hint}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout!r}. Give 0 to leave it out.")


def check_choice(
    name: str, value: object, choices: Collection[object], remedy: str = "Choose one of these."
) -> None:
    """Raise ValueError, with the near name or else the remedy, unless `value` is one of `choices`."""
    if value not in list(choices):  # a mistaken list cannot be looked up in a dict
        names = [str(choice) for choice in choices]
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else remedy
        raise ValueError(f"{name} must be one of {', '.join(names)}; got {value!r}. {hint}")


def init_weights(module: nn.Module, mode: str = "fan_out") -> None:
    """Give a network its initial weights: He normal convolutions, zero biases; batch norm stays at 1 and 0.

    Args:
        module: changed in place.
        mode: "fan_out" as in torchvision's ResNet and VGG, or "fan_in" as in He et al. 2015. Depthwise
            convolutions always take "fan_in" (nine values): torch counts their outgoing ones wrongly.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            fan = "fan_in" if layer.groups > 1 else mode
            if not layer.weight.is_meta:  # drawing there would import the compiler, which takes a second
                nn.init.kaiming_normal_(layer.weight, mode=fan, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_scores(conv: nn.Conv2d) -> None:
    """Let the last convolution of a head start with small scores: deviation 0.01, zero bias."""
    if not conv.weight.is_meta:  # as in `init_weights`
        nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
