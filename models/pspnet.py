"""PSPNet: a dilated ResNet whose last map is joined by averages over the whole picture and its parts."""

from torch import Tensor, nn

from .backbones import ResNet
from .layers import (
    ConvBNReLU,
    MergingConvBNReLU,
    PooledConvBNReLU,
    check_choice,
    check_images,
    check_numbers,
    init_scores,
    init_weights,
    resize,
)

HEAD_CHANNELS = 512
BINS = (1, 2, 3, 6)  # the picture as one part, 2x2, 3x3 and 6x6 parts


class PyramidPooling(nn.Module):
    """Average a map over 1, 4, 9 and 36 parts, and bring each average to a quarter of the channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            PooledConvBNReLU(in_channels, in_channels // len(BINS), bins) for bins in BINS
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (N, C, h, w) to itself and four maps (N, C/4, bins, bins)."""
        return [x, *(stage(x) for stage in self.stages)]


class PSPNet(nn.Module):
    """PSPNet: each position is judged in the light of the scene and of its quarter, ninth and 36th.

    Paper: Pyramid Scene Parsing Network (Zhao et al., 2017), https://arxiv.org/abs/1612.01105. A dilated
    ResNet gives one fine, deep map; averages of it over ever smaller parts say what scene this is; a 3x3
    convolution decides from both. An auxiliary head on layer3 (loss weight 0.4) helps the deep encoder train.
    Route: image 1/1 → layer1 1/4, layer2 1/8, layer3 and layer4 1/output_stride → pyramid 1x1, 2x2, 3x3,
    6x6 (a quarter of the channels each) → merged with layer4 by 3x3 (512) → logits 1/output_stride → 1/1;
    aux: layer3 → 3x3 (a quarter of its channels) → logits → 1/1.
    Differs from the paper: torchvision's 7x7 stem where the authors' release has three 3x3 convolutions; the
    convolution that loses its stride keeps the dilation before it, where theirs dilates the whole stage;
    half-pixel centres where it aligns corners, so that sizes need not be 8k+1.
    Initial weights: He normal (fan out), batch norm 1 and 0, classifiers normal with deviation 0.01.
    Parameters (RGB, 21 classes, with aux): resnet18 16,319,018, resnet34 26,427,178, resnet50 48,957,802,
    resnet101 67,949,930; without aux resnet50 46,592,597, resnet101 65,584,725.

    Args:
        num_classes: channels of the logits, 2 or more.
        in_channels: channels of the images.
        backbone: resnet18, resnet34, resnet50 or resnet101.
        output_stride: 8 (the paper's) or 16 (a quarter of the work).
        aux: add the auxiliary head; in training mode the result is then (logits, aux_logits).
        dropout: probability of zeroing a whole channel before each classifier, in training.

    Shape:
        images (N, in_channels, H, W), H and W at least 32 → logits (N, num_classes, H, W), and in training
        mode with `aux` a pair of such logits.

    Raises:
        ValueError: an argument out of its range or choices; images of other channels, or too small.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        backbone: str = "resnet50",
        output_stride: int = 8,
        aux: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_numbers(num_classes, in_channels, dropout)
        check_choice("output_stride", output_stride, (8, 16))
        self.in_channels = in_channels
        self.backbone = ResNet(backbone, in_channels, output_stride)
        *_, middle_channels, deep_channels = self.backbone.out_channels
        self.pyramid = PyramidPooling(deep_channels)
        parts = (deep_channels, *[deep_channels // len(BINS)] * len(BINS))
        merge = MergingConvBNReLU(parts, HEAD_CHANNELS, fine=0)
        self.head = classifier(merge, HEAD_CHANNELS, num_classes, dropout)
        self.aux = None
        if aux:
            width = middle_channels // 4
            self.aux = classifier(ConvBNReLU(middle_channels, width), width, num_classes, dropout)
        init_weights(self.pyramid)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of `images`; in training mode with `aux`, the pair (logits, aux_logits)."""
        check_images(images, self.in_channels)
        _, _, middle, deep = self.backbone(images)  # both 1/output_stride
        logits = resize(self.head(self.pyramid(deep)), like=images)
        if self.aux is None or not self.training:
            return logits
        return logits, resize(self.aux(middle), like=images)


def classifier(block: nn.Module, width: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return a head: a block that gives `width` channels, dropout of channels, 1x1 to the classes."""
    head = nn.Sequential(block, nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, kernel_size=1))
    init_weights(head)
    init_scores(head[-1])
    return head
