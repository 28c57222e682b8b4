"""Several processes are one run: the same scores, the same steps, one writer."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
WORKER = """
import json, sys, torch, train
from config import Config
from datasets import check_data
from datasets.sampling import epoch_batches
from utils import distributed

config = Config(**json.loads(sys.argv[1]))
processes = distributed.read_processes()
report = check_data(config.data_root, num_classes=2)
distributed.join(processes, torch.device("cpu"))
model = train.build_network(config, fresh=True)
run = train.build(config, report, torch.device("cpu"), torch.float32, model, processes)
found = train.evaluate(run, train.averaged_weights(run))
run.model.eval()  # batch norm as a fixed scale: its statistics are each process's own
sums = {}
order = (len(run.train_set), config.batch_size, config.seed, 0)
for step, batch in enumerate(epoch_batches(*order, processes.rank, processes.world_size)):
    images, masks = run.train_set.batch([(0, index) for index in batch])
    terms = train.train_step(run, images, masks, 0, step)
    for name, value in terms.items():
        sums[name] = sums.get(name, 0.0) + value
sums = train.over_processes(run, sums)
if processes.is_main:
    found = {"counts": found.counts, "each": found.picture_iou}
    torch.save({**found, "sums": sums, "model": run.model.state_dict()}, sys.argv[2])
distributed.leave()
"""


def command(processes, *words):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    return [sys.executable, *launcher, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *words]


def start(processes, *words):
    return subprocess.run(command(processes, *words), cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_score_and_step_as_one_does(settings, tmp_path):
    config = settings(batch_size=4, loss="ce", amp="off", accumulate=1, learning_rate=0.01).saved
    found = []
    for processes in (1, 2):
        environment = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        (tmp_path / "worker.py").write_text(environment + WORKER)
        out = tmp_path / f"{processes}.pt"
        done = start(processes, str(tmp_path / "worker.py"), json.dumps(config), str(out))
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert torch.equal(one["counts"], two["counts"])
    assert one["each"] == two["each"]
    for name, value in one["sums"].items():
        assert abs(value - two["sums"][name]) < 1e-4
    for name, value in one["model"].items():
        assert torch.allclose(value.float(), two["model"][name].float(), atol=1e-4), name


def test_torchrun_makes_one_run_with_one_writer(data, tmp_path):
    flags = f"--data_root {data} --output_dir {tmp_path}/runs --run_name run --num_classes 2 --image_size 32"
    done = start(2, "train.py", *flags.split(), "--base_channels", "4", "--epochs", "2", "--batch_size", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Epoch 2/2") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name != ".cache"] == ["run"]
    assert (tmp_path / "runs" / "run" / "report.png").exists()


def test_ctrl_c_on_torchrun_saves_and_says_once_how_to_go_on(data, tmp_path):
    flags = f"--data_root {data} --output_dir {tmp_path}/runs --run_name run --num_classes 2 --image_size 32"
    flags += " --base_channels 4 --epochs 10000 --batch_size 4 --cache off --num_workers 1"
    launcher = subprocess.Popen(
        command(2, "train.py", *flags.split()),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in launcher.stdout:
            if line.startswith("Epoch 2/"):
                break
        launcher.send_signal(signal.SIGINT)
        _, said = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    last = tmp_path / "runs" / "run" / "last.pt"
    assert said.count(f"error: stopped; go on with --resume {last.parent}") == 1
    assert said.count("stopping after this step") == 1
    assert "train.py" not in said.split("error: stopped")[0]  # no traceback of ours
    assert torch.load(last, weights_only=True)["progress"]["epoch"] >= 1
