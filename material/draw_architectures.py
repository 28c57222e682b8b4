"""Draw the five networks as SVG files beside this one: `python material/draw_architectures.py`.

The numbers in the drawings (channels, strides, kernels, rates, parameters) are read from the built model: one
pass over a 512-pixel image on torch's meta device, which computes nothing, with a hook on every module. Only
positions on the page are written here. A network that you add needs no drawing. tests/test_material.py fails
when a model has changed and its drawing has not.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from models import build_model

SIDE = 512  # pixels of the traced image; a feature map of S pixels has stride SIDE / S
CLASSES = 21
INK, FAINT, LINE, EDGE = "#262a30", "#6d747d", "#555c66", "#e3e6ea"
ARROWS = {"flow": LINE, "skip": "#4a86c2", "pool": "#c65a49", "up": "#3f8f6a"}
COLORS = {
    "image": "#a3abb5", "encoder": "#5b93cc", "pool": "#d9705f", "copy": "#b4d0ec", "context": "#9377bd",
    "decoder": "#5faf8a", "scores": "#e5a04a",
}  # fmt: skip
BINS = ("pool", "scores", "encoder", "decoder")  # colors of the four pooling branches


class Traced:
    """A built model, and for each module its input and output as (channels, stride)."""

    def __init__(self, name, **options):
        self.inputs, self.outputs = {}, {}
        with torch.device("meta"):
            self.model = build_model(name, CLASSES, **options)
            for key, module in self.model.named_modules():
                module.register_forward_hook(partial(self.note, key))
            self.model(torch.empty(2, 3, SIDE, SIDE))
        self.parameters = f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters"
        self.backbone = getattr(getattr(self.model, "backbone", None), "name", "")

    def note(self, key, module, args, output):
        """Record the shapes of a module's first input and of its output."""
        output = output[0] if isinstance(output, tuple) else output  # logits before auxiliary ones
        for shapes, x in ((self.inputs, args[0]), (self.outputs, output)):
            if x.dim() == 4:
                shapes[key] = x.shape[1], SIDE / x.shape[-1]

    def convs(self, key):
        """Return the convolutions inside a module, in order."""
        return [m for m in self.model.get_submodule(key).modules() if isinstance(m, nn.Conv2d)]

    def words(self, key):
        """Describe a module by its convolution with the largest receptive field."""
        conv = max(self.convs(key), key=lambda m: (m.kernel_size, m.dilation))
        rate = f", rate {conv.dilation[0]}" if conv.dilation[0] > 1 else ""
        return f"conv {conv.kernel_size[0]}×{conv.kernel_size[1]}{rate}"


class Box:
    """The position of a drawn part: edges and center of its front, and the far edge of its side."""

    def __init__(self, left, top, width, height, depth=0.0):
        self.left, self.right, self.top, self.bottom = left, left + width, top, top + height
        self.side = self.right + depth
        self.x, self.y = left + width / 2, top + height / 2


class Sheet:
    """A page of feature maps as slabs: wider for more channels, taller for a higher resolution."""

    def __init__(self, height, title, subtitle, thickness=2.2):
        self.height, self.thickness, self.parts = height, thickness, []
        self.plate(0.5, 0.5, 999, height - 1, 12, "#fff", EDGE)
        self.text(28, 40, title, 22, anchor="start", bold=True)
        self.text(28, 62, subtitle, 13, FAINT, "start")

    def text(self, x, y, words, size=12, color=INK, anchor="middle", bold=False):
        """Draw words, if any, with their baseline at y."""
        style = f'font-size="{size}" fill="{color}" text-anchor="{anchor}"' + ' font-weight="600"' * bold
        if words:
            self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{words}</text>')

    def caption(self, x, y, name, *remarks):
        """Draw a name, with remarks in the lines under it."""
        self.text(x, y, name)
        for number, words in enumerate(remarks, 1):
            self.text(x, y + 16 * number, words, 12, FAINT)

    def plate(self, x, y, width, height, radius, color, edge="none"):
        """Draw a rectangle from its upper left corner."""
        size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} fill="{color}" stroke="{edge}"/>')

    def panel(self, x, y, width, height, title):
        """Draw a tinted background for a part of the network."""
        self.plate(x, y, width, height, 10, "#f5f6f8", EDGE)
        self.text(x + 16, y + 24, title, 14, FAINT, "start", bold=True)

    def polygon(self, points, color):
        """Draw a filled face."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{points}" fill="{color}" stroke="#fff" stroke-width=".7"/>')

    def wide(self, channels):
        """Return the width of a slab, which grows slower than the channels."""
        return self.thickness * channels**0.42

    def slab(self, x, y, shape, color, label=None, below="", count=1, gap=4):
        """Draw a feature map of (channels, stride), its left edge at x, its middle at y.

        `color` may be a list of (color, channels) side by side. The label is the number of channels unless
        given. `count` slabs, `gap` pixels apart, are drawn for as many convolutions; they make one box.
        """
        channels, stride = shape
        height = 130 * stride**-0.4
        top, bottom, shift = y - height / 2, y + height / 2, 0.10 * height
        left = x
        for _ in range(count):
            for name, share in [(color, channels)] if isinstance(color, str) else color:
                right, back, paint = left + self.wide(channels) * share / channels, top - shift, COLORS[name]
                lid = [(left, top), (left + shift, back), (right + shift, back), (right, top)]
                self.polygon(lid, mixed(paint, 255, 0.35))
                self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], paint)
                left = right
            side = [(right, top), (right + shift, back), (right + shift, bottom - shift), (right, bottom)]
            self.polygon(side, mixed(paint, 0, 0.22))
            left = right + gap
        box = Box(x, top, right - x, height, shift)
        self.text(box.x + shift / 2, back - 6, str(channels) if label is None else label)
        self.text(box.x, bottom + 16, below, 12, FAINT)
        return box

    def line(self, points, color=LINE, more=""):
        """Draw a line through the points."""
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.5"{more}/>')

    def arrow(self, points, style="flow", dashed=False, words=""):
        """Draw a line with a head, and words over its first horizontal part."""
        self.line(points, ARROWS[style], ' stroke-dasharray="5 4"' * dashed + f' marker-end="url(#{style})"')
        if words:
            (x0, y), (x1, _) = points[:2] if points[0][1] == points[1][1] else points[1:3]
            self.text((x0 + x1) / 2, y - 6, words, 12, FAINT)

    def join(self, one, other, style="flow", dashed=False, words=""):
        """Draw a horizontal arrow from one box to the next on its right."""
        self.arrow([(one.side + 2, other.y), (other.left - 3, other.y)], style, dashed, words)
        return other

    def finished(self, key):
        """Return the page as text, with a legend at the bottom: "style: words", separated by bars.

        A style is a color, or that of an arrow after its shaft: "->up", "-->skip".
        """
        x, y = 28, self.height - 24
        for entry in key.split(" | "):
            style, words = entry.split(": ", 1)
            if style in COLORS:
                self.plate(x, y - 11, 13, 13, 3, COLORS[style])
                x += 20
            else:
                self.arrow([(x, y - 4), (x + 26, y - 4)], style.strip("->"), "--" in style)
                x += 34
            self.text(x, y, words, 12, FAINT, "start")
            x += round(6.3 * len(words)) + 22
        heads = (
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0.8L8 4L0 7.2z" fill="{color}"/></marker>'
            for name, color in ARROWS.items()
        )
        page = f'viewBox="0 0 1000 {self.height}" width="1000" height="{self.height}"'
        fonts = 'font-family="Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {page} {fonts}>'
        return "\n".join([start, *heads, *self.parts, "</svg>\n"])


def mixed(color, toward, share):
    """Mix a color (#rrggbb) with black (0) or white (255)."""
    values = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (toward - value) * share):02x}" for value in values)


def stride_name(shape):
    """Return the size of a feature map relative to the image."""
    return f"1/{shape[1]:g}"


def draw_unet():
    """Draw UNet as the U of its paper: down on the left, up on the right, copies straight across."""
    net = Traced("unet")
    title = f"Ronneberger et al., 2015 · {net.parameters} · a slab for each 3×3 convolution"
    page = Sheet(668, "UNet", title, 1.75)
    rows = {1: 178, 2: 318, 4: 432, 8: 524, 16: 598}
    for stride, y in rows.items():
        page.text(30, y + 4, stride_name((0, stride)), 13, FAINT, "start")
    boxes, before = {}, page.slab(80, rows[1], net.inputs[""], "image")
    for level in range(1, 6):
        shape, convs = net.outputs[f"encoder{level}"], net.convs(f"encoder{level}")
        y, x = rows[shape[1]], before.right + (32 if level == 1 else 28)
        box = boxes[level] = page.slab(x, y, shape, "encoder", count=len(convs))
        if level == 1:
            page.join(before, box)
        else:
            turn = before.right - 8
            page.arrow([(turn, before.bottom + 3), (turn, y), (box.left - 3, y)], "pool")
        before = box
    for level in range(4, 0, -1):
        shape, joined = net.outputs[f"decoder{level}"], net.inputs[f"decoder{level}.conv"]
        y, turn, skip = rows[shape[1]], before.side + 26, net.outputs[f"encoder{level}"][0]
        x, rise = turn - 0.75 * page.wide(joined[0]), joined[0] - skip
        merged = page.slab(x, y, joined, [("copy", skip), ("decoder", rise)], f"{skip} + {rise}")
        count = len(net.convs(f"decoder{level}.conv"))
        box = page.join(merged, page.slab(merged.side + 22, y, shape, "decoder", count=count))
        page.arrow([(boxes[level].side + 3, y), (merged.left - 3, y)], "skip", dashed=True)
        page.arrow([(before.side + 2, before.y), (turn, before.y), (turn, merged.bottom + 3)], "up")
        before = box
    page.join(before, page.slab(before.side + 36, rows[1], net.outputs["classifier"], "scores"))
    page.text(before.side + 17, rows[1] - 8, net.words("classifier").removeprefix("conv "), 11, FAINT)
    return page.finished(
        "encoder: encoder | copy: copied | decoder: decoder | scores: class scores | "
        "->pool: max pooling 2×2 | ->up: transposed convolution 2×2 | -->skip: copy and concatenate"
    )


def resnet_row(page, net, y, gap):
    """Draw the image, the stem and the four stages of a ResNet."""
    boxes, x = [], 44
    for name in ("image", "stem", "layer1", "layer2", "layer3", "layer4"):
        key = {"image": "", "stem": "backbone.conv1"}.get(name, f"backbone.{name}")
        shape = net.outputs[key] if key else net.inputs[key]
        boxes.append(page.slab(x, y, shape, "encoder" if key else "image"))
        if key:
            page.join(*boxes[-2:])
        rate = max(conv.dilation[0] for conv in net.convs(key)) if key else 1
        remarks = [stride_name(shape), f"rate {rate}" * (rate > 1)]
        page.caption(boxes[-1].x, boxes[0].bottom + 22, name, *remarks)
        x = boxes[-1].side + gap
    return boxes


def draw_deeplabv3plus():
    """Draw DeepLabv3+ in two rows: encoder and ASPP above, decoder below."""
    net = Traced("deeplabv3plus")
    page = Sheet(640, "DeepLabv3+", f"Chen et al., 2018 · {net.backbone} · {net.parameters}")
    page.panel(20, 78, 960, 290, "Encoder")
    page.panel(20, 384, 960, 206, "Decoder")
    y = 223
    stages = resnet_row(page, net, y, 26)
    atrous = [f"aspp.atrous.{i}" for i in range(len(net.model.aspp.atrous))]
    branches = ["aspp.conv1x1", *atrous, "aspp.image_pooling"]
    page.line([(stages[-1].side + 2, y), (506, y)])
    for i, key in enumerate(branches):
        middle = y + 48 * (i - 2)
        page.plate(532, middle - 15, 132, 30, 6, COLORS["context"])
        page.text(598, middle + 4.5, "image pooling" if "pooling" in key else net.words(key), 13, "#fff")
        page.arrow([(506, y), (506, middle), (530, middle)])
        page.line([(664, middle), (692, middle), (692, y)])
    bands = [("context", net.outputs[key][0]) for key in branches]
    concat = page.slab(730, y, net.inputs["aspp.project"], bands, below="concatenate")
    page.arrow([(692, y), (concat.left - 3, y)])
    out = net.outputs["aspp.project"]
    context = page.join(concat, page.slab(872, y, out, "context"), words=net.words("aspp.project"))

    y, turn, shape = 502, stages[2].x, net.outputs["low_level"]
    low_level = page.slab(turn + 88, y, shape, "encoder", below=stride_name(shape))
    down = [(turn, stages[2].bottom + 70), (turn, y), (low_level.left - 3, y)]
    page.arrow(down, "skip", words=net.words("low_level"))
    bands = [("context", out[0]), ("encoder", shape[0])]
    merged = page.slab(452, y, (out[0] + shape[0], shape[1]), bands, "", "concatenate")
    page.join(low_level, merged, "skip")
    page.text(merged.side + 6, merged.top - 4, f"{out[0]} + {shape[0]}", anchor="start")
    x, level = merged.x + 4, 410
    drop = [(context.x, context.bottom + 4), (context.x, level), (x, level), (x, merged.top - 11)]
    page.arrow(drop, words=f"upsample ×{out[1] / shape[1]:g}")
    words = f"2 × {net.words('refine')}"  # fuse and refine
    convs = page.slab(596, y, net.outputs["refine"], "decoder", below=words, count=2, gap=6)
    page.join(merged, convs)
    shape, last = net.outputs["classifier"], net.outputs[""]
    coarse = page.slab(740, y, shape, "scores", below=stride_name(shape))
    page.join(convs, coarse, words=net.words("classifier"))
    scores = page.slab(910, y, last, "scores", below=stride_name(last))
    page.join(coarse, scores, words=f"upsample ×{shape[1]:g}")
    return page.finished(
        "encoder: residual stages | context: atrous spatial pyramid pooling (ASPP) | "
        "decoder: decoder | scores: class scores | ->skip: low-level features"
    )


def draw_pspnet():
    """Draw PSPNet with its pooling branches, and the auxiliary head that training uses."""
    net = Traced("pspnet", aux=True)
    title = f"Zhao et al., 2017 · {net.backbone} · {net.parameters}"
    page = Sheet(580, "PSPNet", title, 1.8)
    page.panel(436, 70, 262, 400, "Pyramid pooling")
    y = 268
    stages = resnet_row(page, net, y, 22)
    deep, shape = stages[-1], net.outputs["backbone.layer4"]
    bands = [("encoder", shape[0])]
    for i, middle in enumerate((131, 217, 325, 411)):
        cells, key = net.model.ppm[i][0].output_size, f"ppm.{i}"
        side = 46 / cells
        for cell in range(cells**2):
            x, top = 480 + side * (cell % cells), middle - 23 + side * (cell // cells)
            page.plate(x, top, side, side, 0, COLORS[BINS[i]], "#fff")
        page.text(503, middle + 37, f"{cells}×{cells}", 12, FAINT)
        page.arrow([(452, y), (452, middle), (477, middle)])
        narrow = net.outputs[key][0]
        wide = page.slab(626, middle, (narrow, shape[1]), BINS[i])
        page.arrow([(529, middle), (wide.left - 3, middle)], words=net.words(key))
        page.text(578, middle + 16, "upsample", 12, FAINT)
        page.line([(wide.side + 2, middle), (682, middle), (682, y)])
        bands.append((BINS[i], narrow))
    concat = page.join(deep, page.slab(718, y, net.inputs["fuse"], bands, below="concatenate"))
    words, last = net.words("fuse"), net.outputs[""]
    conv = page.join(concat, page.slab(818, y, net.outputs["fuse"], "decoder", below=words))
    coarse = page.join(conv, page.slab(876, y, net.outputs["classifier"], "scores"))
    scores = page.slab(950, y, last, "scores", below=stride_name(last))
    page.join(coarse, scores, words=f"×{net.outputs['classifier'][1]:g}")
    turn, y = stages[4].x, 502
    aux = page.slab(turn + 54, y, net.outputs["aux_classifier.0"], "decoder")
    page.arrow([(turn, stages[0].bottom + 64), (turn, y), (aux.left - 3, y)], dashed=True)
    side = page.join(aux, page.slab(aux.side + 26, y, net.outputs["aux_classifier"], "scores"), dashed=True)
    page.text(side.side + 12, y + 4, "auxiliary scores, in training only", 12, FAINT, "start")
    return page.finished("encoder: dilated residual stages | decoder: convolution | scores: class scores")


def vgg_stages(net):
    """Return, for each VGG stage, its feature map, its number of convolutions, and its map after pooling."""
    stages, count = [], 0
    for i, layer in enumerate(net.model.backbone.features):
        if isinstance(layer, nn.Conv2d):
            count, shape = count + 1, net.outputs[f"backbone.features.{i}"]
        elif isinstance(layer, nn.MaxPool2d):
            stages.append((shape, count, (shape[0], shape[1] * layer.kernel_size)))
            count = 0
    return stages


def draw_fcn():
    """Draw FCN-8s: VGG from left to right above, the sums of scores from right to left below."""
    net = Traced("fcn", backbone="vgg16")
    title = f"Long et al., 2015 · {net.backbone} · {net.parameters} · a slab for each convolution"
    page = Sheet(600, "FCN-8s", title, 2.05)
    y, below = 190, 450
    image = page.slab(44, y, net.inputs[""], "image", below="image")
    before, pools = image, {}
    for i, (shape, count, pooled) in enumerate(vgg_stages(net), 1):
        box = page.join(before, page.slab(before.side + 29, y, shape, "encoder", count=count, gap=3))
        before = pools[f"pool{i}"] = page.slab(box.side + 5, y, pooled, "pool", "")
        page.caption(before.x, 282, f"pool{i}", stride_name(pooled))
    for key in ("fc6", "fc7"):
        before = page.join(before, page.slab(before.side + 29, y, net.outputs[key], "context"))
        page.caption(before.x, 282, key, net.words(key))
    shape, x = net.outputs["score_fr"], before.x
    score = page.slab(x - 6, below, shape, "scores", below=stride_name(shape))
    page.arrow([(x, 308), (x, score.top - 26)])
    page.text(x + 8, 350, net.words("score_fr"), 12, FAINT, "start")
    after = score.left - 3
    for key, upscore in (("pool4", "upscore2"), ("pool3", "upscore_pool4")):
        x, shape = pools[key].x, net.outputs[f"score_{key}"]
        small = page.slab(x - 5, 372, shape, "scores", "")
        page.text(small.left - 8, 376, f"{shape[0]}, {stride_name(shape)}", 12, FAINT, "end")
        page.arrow([(x, 308), (x, small.top - 10)], "skip")
        page.text(x + 8, 322, net.words(f"score_{key}"), 12, FAINT, "start")
        page.arrow([(x, small.bottom + 3), (x, below - 14)], "skip")
        page.plate(x - 12, below - 12, 24, 24, 12, "#fff", LINE)
        page.text(x, below + 6, "+", 18)
        factor = net.model.get_submodule(upscore).factor
        page.arrow([(after, below), (x + 15, below)], "up", words=f"×{factor}")
        after = x - 15
    shape = net.outputs[""]
    scores = page.slab(image.left, below, shape, "scores", below=stride_name(shape))
    page.arrow([(after, below), (scores.side + 3, below)], "up", words=f"×{net.model.upscore.factor}")
    return page.finished(
        "encoder: convolutions 3×3 | pool: max pooling | context: former fully connected layers | "
        "scores: class scores | ->skip: skip | ->up: learned upsampling"
    )


def draw_segnet():
    """Draw SegNet as an hourglass, with the pooling indices below."""
    net = Traced("segnet")
    title = f"Badrinarayanan et al., 2015 · {net.parameters} · a slab for each 3×3 convolution"
    page = Sheet(430, "SegNet", title, 1.4)
    y, stages = 190, vgg_stages(net)
    before = page.slab(36, y, net.inputs[""], "image")
    pools = []
    for shape, count, pooled in stages:
        words = stride_name(shape)
        box = page.slab(before.side + 12, y, shape, "encoder", below=words, count=count, gap=3)
        before = page.slab(box.side + 4, y, pooled, "pool", "")
        pools.append(before)
    for level in range(5, 0, -1):
        shape, convs = net.inputs[f"decoder{level}"], net.convs(f"decoder{level}")
        convs += net.convs("classifier") if level == 1 else []
        unpooled = page.slab(before.side + (24 if level == 5 else 12), y, shape, "copy", "")
        x = unpooled.side + 4
        for i, conv in enumerate(convs):
            color = "scores" if level == 1 and conv is convs[-1] else "decoder"
            label = None if i == len(convs) // 2 else ""
            box = page.slab(x, y, (conv.out_channels, shape[1]), color, label)
            x = box.right + 3
        page.text((unpooled.side + box.right) / 2 + 2, box.bottom + 16, stride_name(shape), 12, FAINT)
        pool, drop = pools[level - 1], 292 + 18 * (5 - level)
        down, up = [(pool.x, pool.bottom + 3), (pool.x, drop)], unpooled.x
        page.arrow([*down, (up, drop), (up, unpooled.bottom + 4)], "pool", dashed=True)
        before = box
    return page.finished(
        "encoder: encoder (VGG16) | pool: max pooling 2×2 | "
        "copy: unpooled: values at the maxima, else zeros | "
        "decoder: decoder | scores: class scores | -->pool: pooling indices"
    )


DRAWINGS = {
    "unet": draw_unet, "deeplabv3plus": draw_deeplabv3plus, "pspnet": draw_pspnet, "fcn": draw_fcn,
    "segnet": draw_segnet,
}  # fmt: skip

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(), encoding="utf-8")
