"""Draw the five networks as SVG files beside this one: `python material/draw_architectures.py`.

The numbers in the drawings (channels, strides, kernels, rates, parameters) are read off the built model: one
pass over a 512-pixel picture on torch's meta device, which computes nothing, with a hook on every module.
Only where things stand on the page is written here. tests/test_material.py fails when a model has changed
and its drawing has not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from models import build_model

SIDE = 512  # pixels of the traced picture; a map of S pixels has stride SIDE / S
CLASSES = 21
INK, FAINT, LINE = "#262a30", "#6d747d", "#555c66"
ARROWS = {"flow": LINE, "skip": "#4a86c2", "pool": "#c65a49", "up": "#3f8f6a"}
COLORS = {
    "image": "#a3abb5",
    "encoder": "#5b93cc",
    "pool": "#d9705f",
    "copy": "#b4d0ec",
    "context": "#9377bd",
    "decoder": "#5faf8a",
    "scores": "#e5a04a",
}
BINS = ("#d9705f", "#e5a04a", "#5b93cc", "#5faf8a")  # of the pyramid's four stages


class Traced:
    """A built model, and for each of its modules the maps that go in and out as (channels, stride)."""

    def __init__(self, name, **options):
        self.outputs, self.inputs = {}, {}
        with torch.device("meta"):
            self.model = build_model(name, CLASSES, **options)
            for key, module in self.model.named_modules():
                module.register_forward_hook(
                    lambda module, args, output, key=key: self.note(key, args, output)
                )
            self.model(torch.empty(2, 3, SIDE, SIDE))
        self.parameters = f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters"
        self.backbone = getattr(getattr(self.model, "backbone", None), "name", "")

    def note(self, key, args, output):
        """Keep the shapes of a module's first input and output, if they are maps."""
        output = output[0] if isinstance(output, tuple) else output  # logits before auxiliary ones
        for place, value in ((self.inputs, args[0]), (self.outputs, output)):
            if isinstance(value, torch.Tensor) and value.dim() == 4:
                place[key] = value.shape[1], SIDE / value.shape[-1]

    def convs(self, key):
        """The convolutions inside a module, in order."""
        return [m for m in self.model.get_submodule(key).modules() if isinstance(m, nn.Conv2d)]

    def words(self, key):
        """What a module does to its map, by its convolution that sees furthest."""
        conv = max(self.convs(key), key=lambda m: (m.kernel_size, m.dilation))
        rate = f", rate {conv.dilation[0]}" if conv.dilation[0] > 1 else ""
        return f"conv {conv.kernel_size[0]}×{conv.kernel_size[1]}{rate}"


class Box:
    """Where something stands: its front's edges and centre, and the far edge of its side."""

    def __init__(self, left, top, width, height, depth=0.0):
        self.left, self.right, self.top, self.bottom = left, left + width, top, top + height
        self.side = self.right + depth
        self.x, self.y = left + width / 2, top + height / 2


class Sheet:
    """A page on which maps are slabs: the wider the more channels, the taller the finer."""

    def __init__(self, width, height, title, subtitle, unit=130, thickness=2.2):
        self.width, self.height, self.unit, self.thickness = width, height, unit, thickness
        self.parts = []
        self.text(28, 40, title, 22, anchor="start", bold=True)
        self.text(28, 62, subtitle, 13, FAINT, anchor="start")

    def text(self, x, y, words, size=12, color=INK, anchor="middle", bold=False):
        """Words with their foot at y."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
            f"{words}</text>"
        )

    def polygon(self, points, color):
        """A filled face."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{points}" fill="{color}" stroke="#fff" stroke-width=".7"/>')

    def wide(self, shape):
        """The width of a slab: more channels, wider, though far from in proportion."""
        return self.thickness * shape[0] ** 0.42

    def slab(self, x, y, shape, color, label=None, below=""):
        """A map, its left edge at x, its middle at y; `color` may list (color, channels) side by side."""
        channels, stride = shape
        height = self.unit * stride**-0.4
        shift = 0.10 * height
        bands = color if isinstance(color, list) else [(COLORS.get(color, color), channels)]
        left, top, bottom = x, y - height / 2, y + height / 2
        for band, count in bands:
            right = left + self.wide(shape) * count / channels
            self.polygon(
                [(left, top), (left + shift, top - shift), (right + shift, top - shift), (right, top)],
                mixed(band, 255, 0.35),
            )
            self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], band)
            left = right
        self.polygon(
            [(left, top), (left + shift, top - shift), (left + shift, bottom - shift), (left, bottom)],
            mixed(band, 0, 0.22),
        )
        box = Box(x, top, left - x, height, shift)
        label = str(channels) if label is None else label
        if label:
            self.text(box.x + shift / 2, top - shift - 6, label)
        if below:
            self.text(box.x, bottom + 16, below, 12, FAINT)
        return box

    def row(self, x, y, slabs, gap):
        """Slabs from left to right, joined by arrows; each a tuple of slab()'s last arguments."""
        boxes = []
        for slab in slabs:
            box = self.slab(x, y, *slab)
            if boxes:
                self.join(boxes[-1], box)
            boxes.append(box)
            x = box.side + gap
        return boxes

    def stack(self, x, y, shape, color, count, gap=4):
        """So many slabs close together, one a convolution, as one box."""
        boxes = []
        for _ in range(count):
            boxes.append(self.slab(x, y, shape, color, ""))
            x = boxes[-1].right + gap
        first, last = boxes[0], boxes[-1]
        depth = last.side - last.right
        box = Box(first.left, first.top, last.right - first.left, first.bottom - first.top, depth)
        self.text(box.x + depth / 2, box.top - depth - 6, str(shape[0]))
        return box

    def label(self, x, y, words, color="context", width=132):
        """A rounded plate with words on it, its left edge at x."""
        self.plate(x, y - 15, width, 30, 6, COLORS[color])
        self.text(x + width / 2, y + 4.5, words, 13, "#fff")
        return Box(x, y - 15, width, 30)

    def plus(self, x, y):
        """A circled plus."""
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="12" fill="#fff" stroke="{LINE}" stroke-width="1.6"/>'
            f'<path d="M{x - 6:.1f} {y:.1f}h12M{x:.1f} {y - 6:.1f}v12" stroke="{LINE}" stroke-width="1.6"/>'
        )
        return Box(x - 12, y - 12, 24, 24)

    def line(self, points, color=LINE, more=""):
        """A bent line through the points."""
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.5"{more}/>')

    def join(self, one, other, style="flow", dashed=False, words=""):
        """A level arrow from one thing to the next on its right."""
        self.arrow([(one.side + 2, other.y), (other.left - 3, other.y)], style, dashed, words)

    def arrow(self, points, style="flow", dashed=False, words="", at=None):
        """A bent line with a head; words stand over its first level part, or begin at a place."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.line(points, ARROWS[style], f'{dash} marker-end="url(#{style})"')
        if words and at:
            self.text(*at, words, 12, FAINT, "start")
        elif words:
            (x0, y), (x1, _) = points[:2] if points[0][1] == points[1][1] else points[1:3]
            self.text((x0 + x1) / 2, y - 6, words, 12, FAINT)

    def plate(self, x, y, width, height, radius, color, edge="none"):
        """A rectangle by its upper left corner."""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" '
            f'fill="{color}" stroke="{edge}"/>'
        )

    def panel(self, x, y, width, height, title):
        """A tinted ground for a part of the network."""
        self.plate(x, y, width, height, 10, "#f5f6f8", "#e3e6ea")
        self.text(x + 16, y + 24, title, 14, FAINT, "start", bold=True)

    def key(self, entries):
        """The legend at the foot: "style: words" divided by bars; a style is a colour or an arrow's."""
        x, y = 28, self.height - 24
        for entry in entries.split(" | "):
            style, words = entry.split(": ", 1)
            if style in COLORS:
                self.plate(x, y - 11, 13, 13, 3, COLORS[style])
                x += 20
            else:
                self.arrow([(x, y - 4), (x + 26, y - 4)], style.strip("->"), "--" in style)
                x += 34
            self.text(x, y, words, 12, FAINT, "start")
            x += round(6.3 * len(words)) + 22

    def svg(self):
        """The page as text."""
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0.8L8 4L0 7.2z" fill="{color}"/></marker>'
            for name, color in ARROWS.items()
        )
        width, height, lines = self.width, self.height, "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">\n'
            f"<defs>{heads}</defs>\n"
            f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12" fill="#fff" '
            f'stroke="#e3e6ea"/>\n{lines}\n</svg>\n'
        )


def mixed(color, toward, share):
    """A colour (#rrggbb) moved toward black (0) or white (255)."""
    values = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (toward - value) * share):02x}" for value in values)


def stride_name(shape):
    """Say how much smaller than the picture a map is."""
    return f"1/{shape[1]:g}"


def draw_unet():
    """Draw UNet as the U of its paper: down on the left, up on the right, copies straight across."""
    net = Traced("unet")
    title = f"Ronneberger et al., 2015 · {net.parameters} · a slab for each 3×3 convolution"
    page = Sheet(1000, 668, "UNet", title, thickness=1.75)
    rows = {1: 178, 2: 318, 4: 432, 8: 524, 16: 598}
    for stride, y in rows.items():
        page.text(30, y + 4, stride_name((0, stride)), 13, FAINT, "start")
    image = page.slab(80, rows[1], net.inputs[""], "image")
    boxes, before = {}, image
    for level in range(1, 6):
        shape = net.outputs[f"enc{level}"]
        y, x = rows[shape[1]], before.right + (32 if level == 1 else 28)
        box = boxes[level] = page.stack(x, y, shape, "encoder", len(net.convs(f"enc{level}")))
        if level == 1:
            page.join(image, box)
        else:
            turn = before.right - 8
            page.arrow([(turn, before.bottom + 3), (turn, y), (box.left - 3, y)], "pool")
        before = box
    for level in range(4, 0, -1):
        shape, joined = net.outputs[f"dec{level}"], net.inputs[f"dec{level}.conv"]
        skip, y = net.outputs[f"enc{level}"][0], rows[shape[1]]
        turn = before.side + 26
        bands = [(COLORS["copy"], skip), (COLORS["decoder"], joined[0] - skip)]
        merged = page.slab(turn - 0.75 * page.wide(joined), y, joined, bands, f"{skip} + {joined[0] - skip}")
        convs = len(net.convs(f"dec{level}.conv"))
        box = page.stack(merged.side + 22, y, shape, "decoder", convs)
        page.join(merged, box)
        page.arrow([(boxes[level].side + 3, y), (merged.left - 3, y)], "skip", dashed=True)
        page.arrow([(before.side + 2, before.y), (turn, before.y), (turn, merged.bottom + 3)], "up")
        before = box
    scores = page.slab(before.side + 36, rows[1], net.outputs["head"], "scores")
    page.join(before, scores)
    page.text(before.side + 17, rows[1] - 8, net.words("head").removeprefix("conv "), 11, FAINT)
    page.key(
        "encoder: encoder | copy: copied | decoder: decoder | scores: class scores | "
        "->pool: max pooling 2×2 | ->up: transposed convolution 2×2 | -->skip: copy and concatenate"
    )
    return page.svg()


def resnet_row(page, net, y, gap):
    """The picture, the stem and the four stages of a ResNet."""
    keys = ["backbone.conv1", *(f"backbone.layer{i}" for i in range(1, 5))]
    shapes = [net.inputs[""], *(net.outputs[key] for key in keys)]
    names = ["image", "stem", "layer1", "layer2", "layer3", "layer4"]
    boxes = page.row(44, y, [(shape, "encoder" if i else "image") for i, shape in enumerate(shapes)], gap)
    for box, key, name, shape in zip(boxes, ["", *keys], names, shapes, strict=True):
        page.text(box.x, boxes[0].bottom + 22, name)
        page.text(box.x, boxes[0].bottom + 38, stride_name(shape), 12, FAINT)
        rate = max(conv.dilation[0] for conv in net.convs(key)) if key else 1
        if rate > 1:
            page.text(box.x, boxes[0].bottom + 54, f"rate {rate}", 12, FAINT)
    return boxes


def draw_deeplabv3plus():
    """Draw DeepLabv3+ in two storeys: encoder and ASPP above, decoder below."""
    net = Traced("deeplabv3plus")
    page = Sheet(1000, 640, "DeepLabv3+", f"Chen et al., 2018 · {net.backbone} · {net.parameters}")
    page.panel(20, 78, 960, 290, "Encoder")
    page.panel(20, 384, 960, 206, "Decoder")
    y = 223
    stages = resnet_row(page, net, y, 26)
    branches = ["aspp.point", *(f"aspp.atrous.{i}" for i in range(len(net.model.aspp.atrous))), "aspp.pool"]
    joined, out = net.inputs["aspp.project"], net.outputs["aspp.project"]
    for i, key in enumerate(branches):
        middle = y + 48 * (i - 2)
        plate = page.label(532, middle, "image pooling" if key == "aspp.pool" else net.words(key))
        page.arrow([(stages[-1].side + 2, y), (506, y), (506, middle), (plate.left - 2, middle)])
        page.line([(plate.right, middle), (692, middle), (692, y)])
    bands = [(COLORS["context"], net.outputs[key][0]) for key in branches]
    concat = page.slab(730, y, joined, bands, below="concatenate")
    page.arrow([(692, y), (concat.left - 3, y)])
    context = page.slab(872, y, out, "context")
    page.join(concat, context, words=net.words("aspp.project"))

    y, fine_shape = 502, net.outputs["fine"]
    merged_shape = (out[0] + fine_shape[0], fine_shape[1])  # of the two maps that the decoder takes
    turn = stages[2].x
    fine = page.slab(turn + 88, y, fine_shape, "encoder", below=stride_name(fine_shape))
    down = [(turn, stages[2].bottom + 70), (turn, y), (fine.left - 3, y)]
    page.arrow(down, "skip", words=net.words("fine"))
    bands = [(COLORS["context"], out[0]), (COLORS["encoder"], fine_shape[0])]
    merged = page.slab(452, y, merged_shape, bands, "", "concatenate")
    page.text(merged.side + 6, merged.top - 4, f"{out[0]} + {fine_shape[0]}", anchor="start")
    page.join(fine, merged, "skip")
    x, level = merged.x + 4, 410
    drop = [(context.x, context.bottom + 4), (context.x, level), (x, level), (x, merged.top - 11)]
    page.arrow(drop, words=f"upsample ×{out[1] / merged_shape[1]:g}")
    convs = page.stack(596, y, net.outputs["decoder.1"], "decoder", len(net.model.decoder), gap=6)
    page.text(convs.x, convs.bottom + 16, f"{len(net.model.decoder)} × {net.words('decoder')}", 12, FAINT)
    page.join(merged, convs)
    shape = net.outputs["head"]
    coarse = page.slab(740, y, shape, "scores", below=stride_name(shape))
    page.join(convs, coarse, words=net.words("head"))
    scores = page.slab(910, y, net.outputs[""], "scores", below=stride_name(net.outputs[""]))
    page.join(coarse, scores, words=f"upsample ×{shape[1]:g}")
    page.key(
        "encoder: residual stages | context: atrous spatial pyramid pooling (ASPP) | "
        "decoder: decoder | scores: class scores | ->skip: fine map"
    )
    return page.svg()


def draw_pspnet():
    """Draw PSPNet with its pyramid opened, and the auxiliary head that training uses."""
    net = Traced("pspnet", aux=True)
    title = f"Zhao et al., 2017 · {net.backbone} · {net.parameters}"
    page = Sheet(1000, 580, "PSPNet", title, thickness=1.8)
    page.panel(436, 70, 262, 400, "Pyramid pooling")
    y = 268
    stages = resnet_row(page, net, y, 22)
    deep, shape = stages[-1], net.outputs["backbone.layer4"]
    for i, middle in enumerate((131, 217, 325, 411)):
        cells, key = net.model.pyramid.stages[i][0].output_size, f"pyramid.stages.{i}"
        side = 46 / cells
        for place in range(cells**2):
            x, top = 480 + side * (place % cells), middle - 23 + side * (place // cells)
            page.plate(x, top, side, side, 0, BINS[i], "#fff")
        page.text(503, middle + 37, f"{cells}×{cells}", 12, FAINT)
        page.arrow([(deep.side + 2, y), (452, y), (452, middle), (477, middle)])
        narrow = net.outputs[key][0]
        wide = page.slab(626, middle, (narrow, shape[1]), BINS[i])
        page.arrow([(529, middle), (wide.left - 3, middle)], words=net.words(key))
        page.text(578, middle + 16, "upsample", 12, FAINT)
        page.line([(wide.side + 2, middle), (682, middle), (682, y)])
    joined = net.inputs["head"]
    bands = [(COLORS["encoder"], shape[0])]
    bands += [(color, net.outputs[f"pyramid.stages.{i}"][0]) for i, color in enumerate(BINS)]
    concat = page.slab(718, y, joined, bands, below="concatenate")
    page.join(deep, concat)
    head = net.outputs["head.0"]
    conv = page.slab(818, y, head, "decoder", below=net.words("head.0"))
    page.join(concat, conv)
    coarse = page.slab(876, y, net.outputs["head"], "scores")
    page.join(conv, coarse)
    scores = page.slab(950, y, net.outputs[""], "scores", below=stride_name(net.outputs[""]))
    page.join(coarse, scores, words=f"×{net.outputs['head'][1]:g}")
    turn, y, narrow = stages[4].x, 502, net.outputs["aux.0"]
    aux = page.slab(turn + 54, y, narrow, "decoder")
    page.arrow([(turn, stages[0].bottom + 64), (turn, y), (aux.left - 3, y)], dashed=True)
    side = page.slab(aux.side + 26, y, net.outputs["aux"], "scores")
    page.join(aux, side, dashed=True)
    page.text(side.side + 12, y + 4, "auxiliary scores, in training only", 12, FAINT, "start")
    page.key("encoder: dilated residual stages | decoder: convolution | scores: class scores")
    return page.svg()


def vgg_stages(net):
    """Of each VGG stage: its map, its number of convolutions, and its map after pooling."""
    stages, count = [], 0
    for i, layer in enumerate(net.model.backbone.features):
        if isinstance(layer, nn.Conv2d):
            count, shape = count + 1, net.outputs[f"backbone.features.{i}"]
        elif isinstance(layer, nn.MaxPool2d):
            stages.append((shape, count, (shape[0], shape[1] * layer.kernel_size)))
            count = 0
    return stages


def draw_fcn():
    """Draw FCN-8s: VGG from left to right above, the sums of scores back to the left below."""
    net = Traced("fcn")
    title = f"Long et al., 2015 · {net.backbone} · {net.parameters} · a slab for each convolution"
    page = Sheet(1000, 600, "FCN-8s", title, thickness=2.05)
    y, below = 190, 450
    image = page.slab(44, y, net.inputs[""], "image", below="image")
    before, pools = image, {}
    for i, (shape, count, pooled) in enumerate(vgg_stages(net), 1):
        box = page.stack(before.side + 29, y, shape, "encoder", count, gap=3)
        page.join(before, box)
        before = pools[f"pool{i}"] = page.slab(box.side + 5, y, pooled, "pool", "")
        page.text(before.x, 282, f"pool{i}")
        page.text(before.x, 298, stride_name(pooled), 12, FAINT)
    for key in ("fc6", "fc7"):
        shape = net.outputs[key]
        box = page.slab(before.side + 29, y, shape, "context")
        page.text(box.x, 282, key)
        page.text(box.x, 298, net.words(key), 12, FAINT)
        page.join(before, box)
        before = box
    shape, x = net.outputs["score"], before.x
    score = page.slab(x - 6, below, shape, "scores", below=stride_name(shape))
    page.arrow([(x, 308), (x, score.top - 26)], words=net.words("score"), at=(x + 8, 350))
    after = score.left - 3
    for key in ("pool4", "pool3"):
        x, factor, shape = (
            pools[key].x,
            net.model.get_submodule(f"up_to_{key}").factor,
            net.outputs[f"score_{key}"],
        )
        small, total = page.slab(x - 5, 372, shape, "scores", ""), page.plus(x, below)
        page.text(small.left - 8, 376, f"{shape[0]}, {stride_name(shape)}", 12, FAINT, "end")
        page.arrow([(x, 308), (x, small.top - 10)], "skip", words=net.words(f"score_{key}"), at=(x + 8, 322))
        page.arrow([(x, small.bottom + 3), (x, total.top - 2)], "skip")
        page.arrow([(after, below), (total.right + 3, below)], "up", words=f"×{factor}")
        after = total.left - 3
    scores = page.slab(
        image.left, below, net.outputs[""], "scores", str(CLASSES), stride_name(net.outputs[""])
    )
    page.arrow([(after, below), (scores.side + 3, below)], "up", words=f"×{net.model.up_to_image.factor}")
    page.key(
        "encoder: convolutions 3×3 | pool: max pooling | context: former fully connected layers | "
        "scores: class scores | ->skip: skip | ->up: learned upsampling"
    )
    return page.svg()


def draw_segnet():
    """Draw SegNet as an hourglass, pooling indices passing below."""
    net = Traced("segnet")
    title = f"Badrinarayanan et al., 2015 · {net.parameters} · a slab for each 3×3 convolution"
    page = Sheet(1000, 430, "SegNet", title, thickness=1.4)
    y, stages = 190, vgg_stages(net)
    before = page.slab(36, y, net.inputs[""], "image")
    pools = []
    for shape, count, pooled in stages:
        box = page.stack(before.side + 12, y, shape, "encoder", count, gap=3)
        page.text(box.x, box.bottom + 16, stride_name(shape), 12, FAINT)
        before = page.slab(box.side + 4, y, pooled, "pool", "")
        pools.append(before)
    for level in range(5, 0, -1):
        shape, convs = net.inputs[f"decoder{level}"], net.convs(f"decoder{level}")
        unpooled = page.slab(before.side + (24 if level == 5 else 12), y, shape, "copy", "")
        x = unpooled.side + 4
        for i, conv in enumerate(convs):
            scores = level == 1 and i == len(convs) - 1
            out = conv.out_channels, shape[1]
            box = page.slab(
                x, y, out, "scores" if scores else "decoder", str(out[0]) if i == len(convs) // 2 else ""
            )
            x = box.right + 3
        page.text((unpooled.side + box.right) / 2 + 2, box.bottom + 16, stride_name(shape), 12, FAINT)
        pool, drop = pools[level - 1], 292 + 18 * (5 - level)
        path = [
            (pool.x, pool.bottom + 3),
            (pool.x, drop),
            (unpooled.x, drop),
            (unpooled.x, unpooled.bottom + 4),
        ]
        page.arrow(path, "pool", dashed=True)
        before = box
    page.key(
        "encoder: encoder (VGG16) | pool: max pooling 2×2 | "
        "copy: unpooled: maxima back in place, zeros elsewhere | "
        "decoder: decoder | scores: class scores | -->pool: pooling indices"
    )
    return page.svg()


DRAWINGS = {
    "unet": draw_unet,
    "deeplabv3plus": draw_deeplabv3plus,
    "pspnet": draw_pspnet,
    "fcn": draw_fcn,
    "segnet": draw_segnet,
}


def write(folder):
    """Write one SVG a network."""
    for name, draw in DRAWINGS.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
