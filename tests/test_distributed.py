"""Several processes are one run: the same scores, the same steps, one writer."""

import importlib.util
import os
import signal
import time

import doors
import torch
from torch.distributed import TCPStore

import train
from datasets import check_data
from datasets.sampling import epoch_batches
from models import read_checkpoint
from utils import distributed


def score_and_step(config, out):
    """What torchrun's environment makes of one process: a validation, and the steps of an epoch."""
    processes = distributed.read_processes()
    report = check_data(config.data_root, num_classes=2)
    distributed.join(processes, torch.device("cpu"))
    model = train.build_network(config, fresh=True)
    run = train.build_run(config, report, torch.device("cpu"), torch.float32, model, processes)
    found = train.evaluate(run, train.averaged_weights(run))
    run.model.eval()  # batch norm as a fixed scale: its statistics are each process's own
    sums = {}
    order = (len(run.data.train), config.batch_size, config.seed, 0)
    for step, batch in enumerate(epoch_batches(*order, processes.world_size)):
        own = batch[processes.rank :: processes.world_size]
        images, masks = run.data.train.batch([(0, index) for index in own])
        terms = train.train_step(run, images, masks, 0, step)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value
    sums = train.over_processes(run, sums)
    if processes.is_main:
        found = {"counts": found.counts, "each": found.image_iou}
        torch.save({**found, "sums": sums, "model": run.model.state_dict()}, out)
    distributed.leave()


def test_two_processes_score_and_step_as_one_does(settings, tmp_path):
    config = settings(batch_size=4, loss="ce", amp="off", accumulate=1, learning_rate=0.01)
    score_and_step(config, tmp_path / "one.pt")
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun has it: the store is there already
    started = []
    for rank in "01":
        place = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        started.append(doors.fork(score_and_step, (config, tmp_path / "two.pt"), tmp_path / rank, **place))
    for rank, process in enumerate(started):
        process.join(120)
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
