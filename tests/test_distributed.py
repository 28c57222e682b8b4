"""Several processes are one run: the same scores, the same steps, one writer."""

import importlib.util
import os
import signal
import time

import doors
import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

import train
from datasets import check_data
from models import read_checkpoint
from utils import distributed
from utils.sync_batchnorm import convert_sync_batchnorm


def score_and_step(config, out):
    """What torchrun's environment makes of one process: a validation, and the steps of an epoch."""
    processes = distributed.read_processes()
    report = check_data(config.data_root, num_classes=2)
    distributed.join(processes, torch.device("cpu"))
    model = train.build_network(config, fresh=True)
    run = train.build_run(config, report, torch.device("cpu"), torch.float32, model, processes)
    found = train.evaluate(run, train.averaged_weights(run))
    with pytest.MonkeyPatch.context() as patch:  # batch norm as a fixed scale: statistics differ by process
        patch.setattr(train, "set_train_mode", lambda run: run.model.eval())
        train.train_one_epoch(run)
    sums = run.progress.sums
    if processes.is_main:
        found = {"counts": found.counts, "each": found.image_iou}
        torch.save({**found, "sums": sums, "model": run.model.state_dict()}, out)
    distributed.leave()


def start_two(function, arguments, folder):
    """Call a function in two processes that find each other as torchrun's do; return them when they end."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store exists already
    started = [
        doors.fork(function, arguments, folder / rank, **shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"
    ]
    for process in started:
        process.join(120)
    return started


def test_two_processes_score_and_step_as_one_does(settings, tmp_path):
    config = settings(batch_size=4, loss="ce", amp="off", accumulate=1, learning_rate=0.01)
    score_and_step(config, tmp_path / "one.pt")
    processes = start_two(score_and_step, (config, tmp_path / "two.pt"), tmp_path)
    for rank, process in enumerate(processes):
        assert process.exitcode == 0, (tmp_path / f"{rank}.err").read_text()
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert torch.equal(one["counts"], two["counts"])
    assert one["each"] == two["each"]
    for name, value in one["sums"].items():
        assert abs(value - two["sums"][name]) < 1e-4
    for name, value in one["model"].items():
        assert torch.allclose(value.float(), two["model"][name].float(), atol=1e-4), name


def test_ctrl_c_on_the_readmes_torchrun_saves_and_one_process_says_how_to_go_on(data, tmp_path):
    launch = "--rdzv_backend c10d --rdzv_endpoint localhost:0 --nproc_per_node 2 train.py"
    readme = (doors.ROOT / "README.md").read_text(encoding="utf-8")
    assert "\ntorchrun --nproc_per_node 2 train.py\n" in readme
    small = "--num_classes 2 --image_size 32 --base_channels 4 --batch_size 4 --cache off --num_workers 1"
    run = f"--data_root {data} --output_dir {tmp_path}/runs --run_name run --epochs 10000"
    command = [importlib.util.find_spec("torch.distributed.run").origin, *f"{launch} {small} {run}".split()]
    launcher = doors.start(command, doors.ROOT, tmp_path / "log", OMP_NUM_THREADS="1")
    printed = tmp_path / "log.out"
    while launcher.is_alive() and not (printed.exists() and "Epoch 2/" in printed.read_text()):
        time.sleep(0.05)
    assert launcher.is_alive(), (tmp_path / "log.err").read_text()
    os.kill(launcher.pid, signal.SIGINT)
    launcher.join(60)
    said, last = (tmp_path / "log.err").read_text(), tmp_path / "runs" / "run" / "last.pt"
    assert said.count(f"error: stopped; continue with --resume {last.parent}") == 1
    assert said.count("stopping after this step") == 1
    assert "Traceback" not in said.split("error: stopped")[0]  # behind it comes torchrun's own
    assert read_checkpoint(last)["progress"]["epoch"] >= 1


def batch_norm_step(x, grad, out):
    """Forward, gradients and running statistics of this process's part of a batch of five."""
    processes = distributed.read_processes()
    distributed.join(processes, torch.device("cpu"))
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    norm = convert_sync_batchnorm(nn.Sequential(norm))
    part = slice(0, 2) if processes.is_main else slice(2, 5)  # parts of different sizes
    if processes.world_size == 1:
        part = slice(None)
    own = x[part].clone().requires_grad_()
    y = norm(own)
    y.backward(grad[part])
    weight, bias = norm[0].weight.grad, norm[0].bias.grad
    distributed.sum_over(weight, bias)
    found = {"y": y.detach(), "x": own.grad, "weight": weight, "bias": bias}
    torch.save(found | norm.state_dict(), f"{out}.{processes.rank}.pt")
    distributed.leave()


def test_batch_norm_over_two_processes_is_that_of_one_over_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    x, grad = torch.randn(5, 3, 6, 7) * 3 + 100, torch.randn(5, 3, 6, 7)  # a mean far from 0
    batch_norm_step(x, grad, tmp_path / "one")
    processes = start_two(batch_norm_step, (x, grad, tmp_path / "two"), tmp_path)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "0.err").read_text()
    whole = torch.load(tmp_path / "one.0.pt", weights_only=True)
    parts = [torch.load(tmp_path / f"two.{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name in ("y", "x"):
        assert torch.allclose(torch.cat([part[name] for part in parts]), whole[name], atol=1e-4), name
    for name in sorted(whole.keys() - {"y", "x"}):
        for part in parts:
            assert torch.allclose(part[name].float(), whole[name].float(), rtol=1e-4, atol=1e-4), name
