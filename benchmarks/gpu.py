"""train.py's own step on a GPU in every way it can be run, and how long it waits for data.

    python benchmarks/gpu.py --models unet deeplabv3plus_resnet50 --batch 4 32

Where no CUDA device is, it says so and ends; `--device cpu --size 64 --models unet` runs the same code
without what only CUDA has. The ways: bf16, fp16, float32, bf16 in the contiguous layout, with each other
optimizer, and compiled in torch's modes default and reduce-overhead (CUDA graphs). Each is a process of its
own, in interleaved rounds of `--steps` steps on one pinned uint8 batch. The limit is the rate of torch.mm in
bf16 in each round; floating-point work is the forward pass's by torch's counter, times three. Before the
rounds one step runs in torch's sync debug mode: a call that makes the host wait for the GPU is named. Peak
memory is that of tensors.

With data: epochs of train.py's loop over JPEG photos of 480 x 360, cached (the default) and decoded each
time.

Goal: no step makes the host wait.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from timing import machine, options, print_table, rotation, spread, write_json
from worker import NETWORKS, Case, Worker, product_rates, write_pictures

FIVE = ("unet", "segnet", "fcn", "pspnet_resnet50", "deeplabv3plus_resnet50")
WAYS = {
    "bf16": dict(settings={"amp": "bf16"}),
    "fp16": dict(settings={"amp": "fp16"}),
    "float32": dict(settings={"amp": "off"}),
    "bf16, contiguous": dict(settings={"amp": "bf16", "channels_last": False}),
    "bf16, sgd": dict(settings={"amp": "bf16", "optimizer": "sgd"}),
    "bf16, rmsprop": dict(settings={"amp": "bf16", "optimizer": "rmsprop"}),
    "bf16, compile": dict(settings={"amp": "bf16", "compile": True}),
    "bf16, reduce-overhead": dict(settings={"amp": "bf16"}, compile_mode="reduce-overhead"),
}
CUDA_ALONE = ("fp16", "bf16, compile", "bf16, reduce-overhead")  # on a CPU: refused, or minutes of compiling


def measure(network: str, batch: int, args) -> dict[str, dict]:
    """Each way's `ready` and its answers by round; the limit by round."""
    workers, found, limits = {}, {}, []
    with ExitStack() as stack:
        for way in args.ways:
            case = Case(network, size=args.size, batch=batch, device=args.device, **WAYS[way])
            workers[way] = stack.enter_context(closing(Worker(case)))
            found[way] = {**workers[way].ready, "rounds": []}
        for _, names in rotation(workers, args.rounds):
            limits.append(product_rates(args.product, args.device, args.steps)["bfloat16"])
            for way in names:
                found[way]["rounds"].append(workers[way].steps(args.steps))
    return {"limit": limits, "ways": found}


def row_of(network: str, batch: int, way: str, about: dict, limits: list[float]) -> tuple:
    seconds = [one["seconds"] for one in about["rounds"]]
    rates = [about["work"] / value for value in seconds]
    return (
        network,
        batch,
        way,
        spread([1000 * value for value in seconds], 1),
        spread([batch / value for value in seconds]),
        f"{max(one['peak'] for one in about['rounds']) / 2**30:.2f}",
        spread([rate / limit for rate, limit in zip(rates, limits, strict=True)], 2),
        "yes" if about["fused"] else "no",
        about.get("waits", "not measured") or "nowhere",
    )


def wait_for_data(network: str, args) -> list[tuple]:
    """(network, cache, pictures a second and share of waiting in each epoch but the first)."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_pictures(data, args.pictures, 1, (360, 480), 12, "jpg")
        for cache in ("auto", "off"):
            case = Case(
                network,
                size=args.size,
                batch=args.batch[-1],
                device=args.device,
                settings={"cache": cache},
                data=str(data),
            )
            with closing(Worker(case)) as worker:
                worker.epoch()
                epochs = [worker.epoch() for _ in range(args.rounds)]
            found.append(
                (network, cache, [one["rate"] for one in epochs], [one["waiting"] for one in epochs])
            )
    return found


def main() -> None:
    parser = options(__doc__, "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="*", choices=NETWORKS, default=list(FIVE), metavar="NAME")
    parser.add_argument("--ways", nargs="*", choices=WAYS, metavar="WAY", help=f"of {'; '.join(WAYS)}")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--steps", type=int, default=20, help="of each way in a round")
    parser.add_argument("--product", type=int, default=8192, help="side of the matrices")
    parser.add_argument("--pictures", type=int, default=512, help="of the epochs with data; 0: none")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print(
            "no CUDA device here: nothing measured (--device cpu --size 64 --models unet runs the same code)"
        )
        return
    args.ways = args.ways or [way for way in WAYS if on_gpu or way not in CUDA_ALONE]

    description = machine()
    results, rows, waits = {}, [], []
    for network in args.models:
        for batch in args.batch:
            found = results[f"{network}, batch {batch}"] = measure(network, batch, args)
            for way, about in found["ways"].items():
                rows.append(row_of(network, batch, way, about, found["limit"]))
        if args.pictures:
            waits += wait_for_data(network, args)
    limits = [limit / 1e12 for found in results.values() for limit in found["limit"]]
    where = description["accelerator"] if on_gpu else f"{os.cpu_count()} processors"
    print(f"{where}, {args.size} pixels; limit: torch.mm {args.product} in bf16, {spread(limits, 2)} TFLOP/s")
    print_table(
        ("network", "batch", "way", "ms a step", "pictures/s", "peak GiB", "share of the limit")
        + ("fused optimizer", "waits for the GPU"),
        rows,
    )
    if waits:
        print()
        print_table(
            ("network", "cache", "pictures/s with data", "waiting for data, %"),
            [
                (*names, spread(rates), spread([100 * value for value in shares], 1))
                for *names, rates, shares in waits
            ],
        )
    write_json(
        args.output, {"settings": vars(args), "machine": description, "steps": results, "with data": waits}
    )


if __name__ == "__main__":
    main()
