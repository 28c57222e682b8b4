"""PSPNet: a dilated ResNet with pyramid pooling over 1x1, 2x2, 3x3 and 6x6 grids."""

from torch import Tensor, nn

from .backbones import ResNet
from .checks import check_choice, check_images, check_numbers
from .layers import (
    ConcatConvBNReLU,
    ConvBNReLU,
    PooledConvBNReLU,
    init_classifier,
    init_weights,
    resize,
    upsample_concat_conv,
)

HEAD_CHANNELS = 512
BINS = (1, 2, 3, 6)  # side of each pooling grid


class PSPNet(nn.Module):
    """PSPNet: pools context over 1x1, 2x2, 3x3 and 6x6 grids.

    Paper: Pyramid Scene Parsing Network (Zhao et al., 2017), https://arxiv.org/abs/1612.01105. A dilated
    ResNet gives deep features of high resolution; their averages over ever smaller regions describe the
    scene; a 3x3 convolution combines both. An auxiliary head on layer3 (loss weight 0.4) helps to train the
    deep encoder.
    Route: image 1/1 → layer1 1/4, layer2 1/8, layer3 and layer4 1/output_stride → pooled to 1x1, 2x2, 3x3,
    6x6 (a quarter of the channels each) → upsampled and concatenated with layer4 → 3x3 (512) → logits
    1/output_stride → 1/1; aux: layer3 → 3x3 (a quarter of its channels) → logits → 1/1.
    Differs from the paper: torchvision's 7x7 stem where the authors' release has three 3x3 convolutions; the
    convolution that loses its stride keeps the dilation before it, where theirs dilates the whole stage;
    half-pixel centers where it aligns corners, so that sizes need not be 8k+1.
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
        _, _, layer3_channels, channels = self.backbone.out_channels
        bin_channels = channels // len(BINS)
        self.ppm = nn.ModuleList(PooledConvBNReLU(channels, bin_channels, bins) for bins in BINS)
        self.fuse = ConcatConvBNReLU(channels + len(BINS) * bin_channels, HEAD_CHANNELS)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(HEAD_CHANNELS, num_classes, kernel_size=1)
        for part in (self.fuse, self.classifier):
            init_weights(part)
        init_classifier(self.classifier)
        self.aux_classifier = auxiliary_head(layer3_channels, num_classes, dropout) if aux else None
        init_weights(self.ppm)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits of `images`; in training mode with `aux`, the pair (logits, aux_logits)."""
        check_images(images, self.in_channels)
        _, _, layer3, x = self.backbone(images)  # both 1/output_stride
        pooled = [branch(x) for branch in self.ppm]  # (N, C/4, b, b) for b = 1, 2, 3, 6
        # upsample the pooled maps, concatenate them with x, apply a 3x3 convolution
        x = upsample_concat_conv([x, *pooled], self.fuse, like=x)  # (N, 512, h, w)
        logits = resize(self.classifier(self.dropout(x)), like=images)
        if self.aux_classifier is None or not self.training:
            return logits
        return logits, resize(self.aux_classifier(layer3), like=images)


def auxiliary_head(in_channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return a 3x3 convolution to a quarter of the channels, dropout of channels, and a 1x1 classifier."""
    channels = in_channels // 4
    block, classifier = ConvBNReLU(in_channels, channels), nn.Conv2d(channels, num_classes, kernel_size=1)
    head = nn.Sequential(block, nn.Dropout2d(dropout), classifier)
    init_weights(head)
    init_classifier(classifier)
    return head
