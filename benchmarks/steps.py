"""A whole training step, loss and optimizer included: ours against the same network run the plain way.

    python benchmarks/steps.py --models unet segnet --rounds 5

Batches of 4 pictures of 256 x 256. The cases, each in a process of its own, in interleaved rounds:
- ours: train.py's own step with its default settings, on a uint8 batch;
- off: the same with --amp off, strict float32;
- plain: the same network in float32, contiguous, each convolution computed whole (dilated ones, and those of
  several maps after these are resized and concatenated), with torch's cross entropy,
  segmentation_models.pytorch's DiceLoss and torch's Adam, on a batch that is normalised already;
- bf16: as plain, but with bf16 autocast and channels_last;
- smp, smp_bf16: segmentation_models.pytorch's DeepLabV3Plus of the same backbone in these two ways, beside
  our separable one;
- eager, eager_smp, eager_torchvision: our network as it is, that one, and torchvision's deeplabv3_resnet50,
  in float32 and channels_last, with cross entropy alone, fused SGD and freed memory kept; only where
  `--cases` asks for them. Rates are compared by multiply-adds that do not fall on padding: torchvision's
  dilations of 12, 24 and 36 on a map of 32 x 32 mostly do, and oneDNN skips those.
Floating-point work is the forward pass's by torch's counter, times three. The limit is the rate of torch.mm
in each round; a row's share is of that in its own precision. (The library's float32 product is slower than
its best float32 convolution, so that shares above 1 are possible there.)

Goals: ours 2.8 times faster than plain for UNet, SegNet and FCN, 2.0 for every other network, 1.25 times
faster than bf16, the separable one 2.0 times faster than smp; off 1.3 times faster than plain for UNet and
PSPNet, 1.15 for DeepLabv3+; 0.72 of the bf16 rate for UNet, SegNet and FCN, 0.5 with ResNet50, 0.45 with
ResNet18; under 1,000 page faults a step after the second, and under 2 % of its time in the kernel. In eager
float32 each network reaches torchvision's rate, and the separable one is no slower than smp's.
"""

from __future__ import annotations

from contextlib import ExitStack, closing

from timing import machine, options, print_goals, print_table, ratios, rotation, spread, write_json
from worker import NETWORKS, WAYS, Case, Worker, product_rates

VGG_LIKE = ("unet", "segnet", "fcn", "fcn_vgg16")


def measure(network: str, args) -> dict[str, dict]:
    """Each case's `ready` and, round by round, what it answered; with the machine's rates under `limit`."""
    workers, found, limits = {}, {}, []
    with ExitStack() as stack:
        for name in args.cases:
            if "smp" in name and not network.startswith("separable"):
                continue
            case = Case(network, size=args.size, batch=args.batch, classes=args.classes, **WAYS[name])
            worker = stack.enter_context(closing(Worker(case)))
            found[name] = {**worker.ready, "rounds": []}
            if "absent" not in worker.ready:
                workers[name] = worker
        for _, names in rotation(workers, args.rounds):
            limits.append(product_rates(args.product))
            for name in names:
                found[name]["rounds"].append(workers[name].steps(args.steps))
    return {"limit": limits, "cases": found}


def column(found: dict, case: str, key: str) -> list[float]:
    """One value of a case by round; empty where the case was not measured."""
    return [one[key] for one in found["cases"].get(case, {}).get("rounds", [])]


def shares(found: dict, case: str) -> list[float]:
    """The part of the machine's own rate that a case reached, by round."""
    about = found["cases"][case]
    rates = [limit[about["precision"]] for limit in found["limit"]]
    return [about["work"] / s / rate for s, rate in zip(column(found, case, "seconds"), rates, strict=True)]


def rows_of(network: str, found: dict) -> list[tuple]:
    rows = []
    plain = column(found, "plain", "seconds")
    for case, about in found["cases"].items():
        if "absent" in about:
            rows.append((network, case, about["absent"], *[""] * 5))
            continue
        seconds = column(found, case, "seconds")
        rows.append(
            (
                network,
                case,
                spread([1000 * value for value in seconds]),
                spread(ratios(plain, seconds), 2) if plain else "",
                spread([about["work"] / value / 1e9 for value in seconds]),
                spread(shares(found, case), 2),
                spread(column(found, case, "faults")),
                spread([100 * value for value in column(found, case, "kernel")], 1),
            )
        )
    return rows


def goals_of(network: str, found: dict) -> list[tuple]:
    vgg = network in VGG_LIKE
    faster = [
        ("ours", "plain", 2.8 if vgg else 2.0),
        ("ours", "bf16", 1.25),
        ("ours", "smp", 2.0),
        ("eager", "eager_smp", 1.0),
    ]
    if network.startswith(("unet", "pspnet", "deeplab")):
        faster.append(("off", "plain", 1.15 if network.startswith("deeplab") else 1.3))
    goals = []
    for one, other, goal in faster:
        below, above = column(found, one, "seconds"), column(found, other, "seconds")
        if above and below:
            goals.append((f"{network}: {one} faster than {other}", goal, ratios(above, below), False))
    if column(found, "ours", "seconds"):
        share = 0.72 if vgg else 0.5 if network.endswith("50") else 0.45
        kernel = [100 * value for value in column(found, "ours", "kernel")]
        goals += [
            (f"{network}: ours, share of the limit", share, shares(found, "ours"), False),
            (f"{network}: ours, page faults a step", 1000, column(found, "ours", "faults"), True),
            (f"{network}: ours, % of the time in the kernel", 2, kernel, True),
        ]
    theirs = column(found, "eager_torchvision", "seconds")
    if theirs and column(found, "eager", "seconds"):
        about = found["cases"]
        work = about["eager"]["multiply_adds"] / about["eager_torchvision"]["multiply_adds"]
        rate = [work * value for value in ratios(theirs, column(found, "eager", "seconds"))]
        goals.append((f"{network}: eager, rate / torchvision's", 1.0, rate, False))
    return goals


def main() -> None:
    parser = options(__doc__, "steps")
    parser.add_argument("--models", nargs="*", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--cases", nargs="*", choices=WAYS, default=list(WAYS)[:6], metavar="NAME")
    parser.add_argument("--steps", type=int, default=1, help="of each case in a round")
    parser.add_argument("--size", type=int, default=256, help="height and width of the pictures, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=12)
    parser.add_argument("--product", type=int, default=4096, help="side of the matrices")
    args = parser.parse_args()

    description = machine("segmentation-models-pytorch", "torchvision")
    networks = {network: measure(network, args) for network in args.models}
    limits = [limit for found in networks.values() for limit in found["limit"]]
    for dtype in ("float32", "bfloat16"):
        rate = spread([limit[dtype] / 1e9 for limit in limits])
        print(f"limit: torch.mm {args.product}, {dtype}: {rate} GFLOP/s")
    cases = [about for found in networks.values() for about in found["cases"].values() if "loss" in about]
    losses = ", ".join(sorted({about["loss"] for about in cases}))
    print(f"batch {args.batch}, {args.size} pixels, {args.rounds} rounds of {args.steps}; losses: {losses}")
    print_table(
        ("network", "case", "ms a step", "plain's time / its", "GFLOP/s", "share of the limit")
        + ("page faults", "kernel time, %"),
        [row for network, found in networks.items() for row in rows_of(network, found)],
    )
    print_goals([goal for network, found in networks.items() for goal in goals_of(network, found)])
    write_json(args.output, {"settings": vars(args), "machine": description, "networks": networks})


if __name__ == "__main__":
    main()
