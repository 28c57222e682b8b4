"""benchmarks/gpu.py on a CPU: its time, its child processes, and each measurement at its smallest."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
TASKS = """
import os, signal, time
from children import NotHere

def quick(report, settings, seconds, value=1):
    report({"value": value})

def wrong(report, settings, seconds):
    report({"before": 1})
    raise ValueError("no such thing\\nsecond line")

def absent(report, settings, seconds):
    raise NotHere("not in this version: it")

def ended(report, settings, seconds):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def endless(report, settings, seconds):
    report({"before": 2})
    time.sleep(60)

def greedy(report, settings, seconds):
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
    bytearray(2**33)

def process(report, settings, seconds):
    report({"process": os.getpid()})
"""


@pytest.fixture
def path(monkeypatch):
    """The benchmarks can be imported; last, as some share a name with a script."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])


@pytest.fixture
def settings(path, tmp_path):
    """The smallest settings, on a CPU."""
    from children import Settings

    values = dict(device="cpu", size=32, batch=2, product=32, steps=2, camvid=None, resume=None)
    paths = dict(runs=str(tmp_path / "runs"), output=str(tmp_path / "out.json"), scratch=str(tmp_path))
    return Settings(**values, **paths, network="deeplabv3plus_resnet50")


@pytest.fixture
def small_networks(path, monkeypatch):
    """Narrow networks under the names of the five, and a VGG head of 32 channels."""
    import worker

    small = {
        "unet": dict(model="unet", base_channels=4),
        "segnet": dict(model="segnet", base_channels=4),
        "fcn": dict(model="fcn", backbone="vgg11_bn"),
        "pspnet_resnet50": dict(model="pspnet", backbone="resnet18"),
        "deeplabv3plus_resnet50": dict(model="deeplabv3plus", backbone="resnet18"),
    }
    monkeypatch.setattr("models.fcn.FC_CHANNELS", 32)
    for name, values in small.items():
        monkeypatch.setitem(worker.NETWORKS, name, values)


@pytest.fixture
def measured(settings, small_networks):
    """Call a measurement in this process; returns what it reports."""
    import gpu_forms
    import gpu_steps
    import gpu_training

    def call(function, chosen=settings, **arguments):
        values = {}
        module = next(one for one in (gpu_steps, gpu_forms, gpu_training) if hasattr(one, function))
        getattr(module, function)(report=values.update, settings=chosen, seconds=2.0, **arguments)
        return values

    return call


@pytest.fixture
def on_gpu(settings, monkeypatch):
    """Settings of a CUDA device that the CPU stands in for: what only CUDA has is replaced."""

    class Pretended(type(settings)):
        on_gpu = True

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    return Pretended(**vars(settings))


# --- time, rows, child processes


@pytest.fixture
def session(settings, tmp_path, monkeypatch):
    """A session whose items are made of the tasks above; `with_items` names them."""
    import gpu

    (tmp_path / "tasks_of_a_test.py").write_text(TASKS)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    made = gpu.Session(settings, minutes=1, started=time.monotonic())

    def with_items(**items):
        made_of = {
            name: gpu.Item(10, "", tuple(gpu.Task(one, f"tasks_of_a_test.{one}") for one in tasks))
            for name, tasks in items.items()
        }
        monkeypatch.setattr(gpu, "ITEMS", made_of)
        return made

    yield with_items
    made.end_child()


def rows_of(session):
    return {row["row"]: row for row in json.loads(Path(session.settings.output).read_text())["rows"]}


def test_whatever_happens_to_a_measurement_is_a_row_and_the_next_one_runs(session):
    run = session(first=("quick", "wrong", "absent", "ended", "greedy"), second=("quick",))
    run.work_through(["first", "second"])
    rows = rows_of(run)
    assert [row["status"] for row in rows.values()] == ["done", "failed", "done", "failed", "failed"]
    assert rows["wrong"]["reason"].startswith("ValueError: no such thing")
    assert rows["wrong"]["values"] == {"before": 1}
    assert rows["absent"]["reason"] == "not in this version: it"
    assert "signal 9 (SIGKILL)" in rows["ended"]["reason"]
    assert "last words" in rows["ended"]["reason"]
    assert rows["greedy"]["reason"].startswith("MemoryError")
    assert run.rows[-1]["item"] == "second"
    assert run.rows[-1]["values"] == {"value": 1}


def test_a_measurement_that_outlives_its_time_is_killed_and_leaves_what_it_had(session):
    run = session(one=("endless", "quick"))
    run.deadline = time.monotonic() + 4
    run.work_through(["one"])
    rows = rows_of(run)
    assert rows["endless"]["status"] == "failed"
    assert rows["endless"]["reason"].startswith("stopped: not finished after its")
    assert rows["endless"]["values"] == {"before": 2}
    assert time.monotonic() < run.deadline + 2


def test_items_not_begun_when_the_minutes_are_over_say_so(session):
    run = session(one=("quick",), two=("quick", "wrong"))
    run.deadline = time.monotonic()
    run.work_through(["one", "two"])
    assert [(row["item"], row["status"]) for row in run.rows] == [
        ("one", "out of time"),
        ("two", "out of time"),
        ("two", "out of time"),
    ]


def test_processes_are_shared_until_one_fails_and_not_by_items_that_are_alone(session, monkeypatch):
    import gpu

    run = session(one=("process", "process"), two=("process", "wrong", "process"), alone=("process",) * 2)
    gpu.ITEMS["alone"] = dataclasses.replace(gpu.ITEMS["alone"], alone=True)
    run.work_through(["one", "two", "alone"])
    a, b, c, after_failure, d, e = [row["values"]["process"] for row in run.rows if row["status"] == "done"]
    assert a == b == c
    assert len({a, after_failure, d, e}) == 4


def test_a_killed_child_takes_the_processes_that_it_started_along(settings, session, tmp_path):
    from children import Child, make_context

    (tmp_path / "parents.py").write_text(
        "import subprocess, time\n"
        "def start(report, settings, seconds):\n"
        "    report({'child': subprocess.Popen(['sleep', '60']).pid})\n"
        "    time.sleep(60)\n"
    )
    child, values = Child(make_context(), tmp_path / "log"), {}
    arguments = {"settings": settings, "seconds": 3}
    status, _ = child.run("parents.start", arguments, 3, values)
    assert status == "failed"
    assert not is_running(values["child"])


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_an_interrupt_ends_with_the_rows_so_far(session, settings, monkeypatch, capsys):
    import gpu

    session(limits=("quick",))
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--device", "cpu", "--size", "32", "--output", settings.output]
    )
    monkeypatch.setattr(gpu.Session, "work_through", lambda *_: gpu.interrupt(signal.SIGTERM, None))
    assert gpu.main() == 128 + signal.SIGTERM
    assert json.loads(Path(settings.output).read_text())["rows"][-1]["status"] == "interrupted"


def test_where_a_forked_process_cannot_use_the_device_children_are_spawned(session, monkeypatch):
    import gpu

    run, methods = session(), []

    def measure(self, task, seconds, values):
        methods.append(self.context.get_start_method())
        return ("failed", "CUDA: no fork") if methods == ["forkserver"] else ("done", "")

    monkeypatch.setattr(gpu.Session, "measure", measure)
    assert run.describe() == ""
    assert methods == ["forkserver", "spawn"]


def test_more_time_than_asked_for_is_never_planned(session):
    import gpu

    run = session(one=("quick",), two=("quick",), three=("quick",))
    ends = []
    run.run_item = lambda name, end: ends.append(end)
    run.deadline = time.monotonic() + 30
    run.work_through(list(gpu.ITEMS))
    assert ends == sorted(ends)
    assert ends[0] < run.deadline - 15
    assert ends[-1] == run.deadline


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "step"], ["'step'", "Did you mean 'steps'?"]),
        (["--network", "unett"], ["'unett'", "unet"]),
        (["--minutes", "0"], ["--minutes"]),
        (["--size", "8"], ["--size", "32"]),
        (["--camvid", "nowhere"], ["nowhere", "train/images"]),
        (["--resume", "nowhere"], ["nowhere", "last.pt"]),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line(arguments, words, path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words)


def test_the_items_are_listed(path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list"])
    assert gpu.main() == 0
    listed = capsys.readouterr().out
    assert all(f"| {name} |" in listed for name in gpu.ITEMS)


def test_some_items_are_measured_and_written_with_the_machine(settings, monkeypatch, capsys):
    import gpu

    words = ["--device", "cpu", "--size", "32", "--product", "32", "--output", settings.output]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--only", "waits", "limits"])
    assert gpu.main() == 0
    found = json.loads(Path(settings.output).read_text())
    assert [row["item"] for row in found["rows"]] == ["limits", "waits"]
    assert found["rows"][0]["status"] == "done", found["rows"][0]["reason"]
    assert found["rows"][0]["values"]["mm_bf16_tflops"] > 0
    assert "not on this device" in found["rows"][1]["reason"]
    assert str(ROOT) not in Path(settings.output).read_text()
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"])
    assert "| limits | limits | done |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command_has_a_row_for_every_item(path, tmp_path):
    import gpu

    output = tmp_path / "gpu-cpu.json"
    words = ["--device", "cpu", "--size", "32", "--batch", "1", "--minutes", "0.4", "--output", str(output)]
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *words, "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [*dict.fromkeys(row["item"] for row in rows)] == list(gpu.ITEMS)
    assert {row["status"] for row in rows} <= {"done", "failed", "out of time"}
    assert all(row["reason"] for row in rows if row["status"] == "failed")


@pytest.mark.slow
def test_the_modules_that_children_are_forked_with_do_not_touch_the_cuda_driver(path):
    from children import PRELOADED

    code = (
        "import sys, importlib, torch\n"
        "def touched(*_): raise SystemExit('CUDA driver touched')\n"
        "torch._C._cuda_getDeviceCount = touched\n"
        f"sys.path += [{str(ROOT)!r}, {str(BENCHMARKS)!r}]\n"
        f"for name in {PRELOADED}: importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- measurements


def test_every_task_names_a_function_and_its_arguments(path):
    import importlib
    import inspect

    import gpu

    for item in gpu.ITEMS.values():
        for task in item.tasks:
            module, name = task.function.split(".")
            function = getattr(importlib.import_module(module), name)
            inspect.signature(function).bind(report=None, settings=None, seconds=1.0, **task.arguments)


@pytest.mark.parametrize("network", ["unet", "deeplabv3plus_resnet50", "pspnet_resnet50", "fcn", "segnet"])
def test_a_step_of_each_network_is_timed_and_profiled(network, measured):
    found = measured("steps", network=network)
    assert found["ms_lowest"] <= found["ms"] <= found["ms_highest"]
    assert found["images_per_second"] == pytest.approx(2000 / found["ms"])
    assert found["share_of_mm"] == pytest.approx(found["tflops"] / found["mm_bf16_tflops"])
    assert found["kernels"] > 10
    assert len(found["top"]) == 8
    assert sum(found["kinds"].values()) == pytest.approx(1)


def test_a_step_that_runs_out_of_memory_is_taken_with_half_the_batch(measured, monkeypatch):
    import worker

    real = worker.our_run

    def short_of_memory(case, folder):
        if case.batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(case, folder)

    monkeypatch.setattr(worker, "our_run", short_of_memory)
    found = measured("steps", network="unet")
    assert found["batch"] == 1
    assert "Tried to allocate" in found["batch_2"]


def test_memory_that_is_short_at_a_batch_of_one_is_a_failure(measured, monkeypatch):
    import worker

    def short_of_memory(case, folder):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "our_run", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        measured("steps", network="unet")


def test_a_profiler_that_fails_leaves_the_times(measured, monkeypatch):
    import profiling

    def fail(*_):
        raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(profiling, "profile", fail)
    found = measured("steps", network="unet")
    assert found["ms"] > 0
    assert "CUPTI" in found["profiler"]


@pytest.mark.slow
def test_the_peer_and_our_network_run_in_the_same_loop(measured):
    import gpu

    found = {way: measured("peer", way=way) for way in ("torchvision", "ours", "train.py")}
    ratios = gpu.compare_peers(found)
    assert ratios["ours: times torchvision's images_per_second"] == pytest.approx(
        found["ours"]["images_per_second"] / found["torchvision"]["images_per_second"]
    )
    assert "train.py: times torchvision's tflops" in ratios


def test_peers_without_values_have_no_ratio(path):
    import gpu

    assert gpu.compare_peers({"ours": {"tflops": 1.0}}) == {"goal for tflops": 1.3}
    assert gpu.judge_steps({"unet": {}}) == {}


@pytest.fixture
def forms(monkeypatch):
    """Stands for `models.ops.override`: notes which forms were asked for."""
    import worker

    asked = []

    def op_form(name, fast):
        asked.append((name, fast))
        return nullcontext()

    monkeypatch.setattr(worker, "op_form", op_form)
    return asked


def test_forms_of_an_operator_are_compared_in_a_step(measured, forms):
    found = measured("form_of_step", network="unet", op="unpool")
    assert found["fast faster than plain, times"] == pytest.approx(found["plain_ms"] / found["fast_ms"])
    assert {("unpool", True), ("unpool", False)} <= set(forms)


def test_forms_of_resizing_are_compared_with_float64(measured, forms):
    found = measured("form_of_resize", channels=3, small=128, to=512)
    assert found["products: error"] < 1e-2
    assert 0 < found["interpolate: gradient error"] < 1e-2
    assert ("resize", True) in forms
    assert ("resize_backward", False) in forms


@pytest.mark.parametrize("classes", [12, 150])
def test_losses_are_compared(classes, measured):
    found = measured("form_of_loss", classes=classes)
    assert found["ours faster than torch, times"] > 0


def test_the_losses_that_are_compared_are_equal(settings):
    import gpu_forms
    import worker

    logits, masks = gpu_forms.logits_of(settings, 2, 12)
    ours, torchs = worker.our_loss(True)(logits, masks), gpu_forms.torch_joint_loss(logits, masks)
    assert ours.item() == pytest.approx(torchs.item(), rel=1e-5)


def test_forms_of_the_sums_by_label_agree(measured):
    found = measured("sums_by_label")
    for classes in (12, 21, 150):
        values = found[f"{classes} classes"]
        assert all(value < 1e-5 for name, value in values.items() if name.endswith("error"))


def test_the_moving_average_and_the_layouts_are_timed(measured):
    assert measured("ema_cost", network="unet")["ms"] > 0
    assert measured("layouts", network="unet")["channels_last faster than contiguous, times"] > 0


def test_batches_are_compared_and_one_that_is_too_large_is_told(measured, monkeypatch):
    import worker

    real = worker.our_run

    def short_of_memory(case, folder):
        if case.batch == 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(case, folder)

    monkeypatch.setattr(worker, "our_run", short_of_memory)
    found = measured("batches", network="unet", half=True)
    assert found["batch 1"]["images_per_second"] > 0
    assert "out of memory" in found["batch 8"]["failed"]


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_epochs_are_timed_with_and_without_training(workers, measured):
    way = dict(workers=workers, half=True, cache="auto" if workers is None else "off")
    found = measured("epochs", network="unet", moves="zoom, colour, rotation", **way)
    assert found["images_per_second"] > 0
    assert 0 <= found["waiting_share"] <= 1
    assert found["loader_images_per_second"] > 0


def test_validation_and_prediction_are_timed(measured, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ROOT.joinpath(command[1]).stat())
    found = measured("validation")
    assert found["validation_images_per_second"] > 0
    assert found["prediction_images_per_second"] > 0
    assert found["predict_process_seconds"] > 0


def test_what_a_cpu_has_not_is_said(measured):
    from children import NotHere

    for function, arguments in (("waits", {}), ("compiled", {"network": "unet"})):
        with pytest.raises(NotHere, match="not on this device"):
            measured(function, **arguments)


# --- what only CUDA has, with stand-ins


def test_waits_are_counted_by_the_projects_line(measured, on_gpu, monkeypatch):
    import worker

    real = worker.our_epoch

    def waiting_epoch(run):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return real(run)

    monkeypatch.setattr(worker, "our_epoch", waiting_epoch)
    found = measured("waits", on_gpu)
    assert found["epoch_waits"] == 1
    assert found["validation_waits"] == 0
    assert found["steps"] == 4


def test_a_wait_is_told_with_file_line_and_function(path, monkeypatch):
    import gpu_training

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    found = Counter()

    def wait():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    with gpu_training.counted_waits(found):
        wait()
    line = wait.__code__.co_firstlineno + 2
    assert found == {f"tests/test_benchmarks_gpu.py:{line} wait": 2}


@pytest.mark.slow
def test_a_compiled_step_is_compared_with_an_eager_one(measured, on_gpu, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: real(module, backend="eager"))
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        found = measured("compiled", on_gpu, network="unet", mode=mode)
        assert found["graphs"] > 0
        assert found["times_faster"] == pytest.approx(found["eager_ms"] / found["ms"])
        assert found["smaller_batch_seconds"] > 0
    torch._dynamo.reset()


def test_the_card_and_its_copies_are_described(on_gpu, monkeypatch):
    import gpu_steps

    properties = SimpleNamespace(name="A100", total_memory=2**30, multi_processor_count=1, major=8, minor=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    answer = SimpleNamespace(stdout="A100, 580.1, 400.00 W, 1410 MHz, 1512 MHz, 210 MHz, 30, 1024 MiB\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert gpu_steps.card()["power.limit"] == "400.00 W"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="\n"))
    assert gpu_steps.card()["nvidia_smi"]
    monkeypatch.setattr(gpu_steps, "SIZES", {True: 2**16, False: 2**16})
    assert "pinned_to_device_gb_per_s" in gpu_steps.copy_rates(on_gpu)


def test_events_time_each_call(path, monkeypatch):
    import profiling

    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, after):
            return after.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call():
        clock[0] += 7.0

    assert profiling.call_times(call, 3, "cuda") == [7.0, 7.0, 7.0]
    assert profiling.host_time(call, "cuda") >= 0


def test_a_trace_of_a_gpu_is_summed_by_kernel(path):
    import profiling

    kernels = [("sm90_xmma_fprop", 0, 40), ("sm90_xmma_fprop", 30, 30), ("Memcpy HtoD", 100, 20)]
    trace = {
        "traceEvents": [
            *({"ph": "X", "cat": "kernel", "name": n, "ts": t, "dur": d} for n, t, d in kernels[:2]),
            {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 100, "dur": 20},
            {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step", "ts": 0, "dur": 500},
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernelExC", "ts": 0, "dur": 2},
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 0, "dur": 2},
            {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 0, "dur": 5},
            {"ph": "i", "cat": "kernel", "name": "mark", "ts": 0},
        ]
    }
    found = profiling.parse_trace(trace, 2, profiling.ON_GPU)
    assert found["busy_ms"] == pytest.approx((60 + 20) / 1000 / 2)
    assert found["span_ms"] == pytest.approx(120 / 1000 / 2)
    assert (found["kernels"], found["launches"]) == (1.5, 0.5)
    assert found["top"][0] == {
        "name": "sm90_xmma_fprop",
        "ms": pytest.approx(0.035),
        "calls": 1.0,
        "share": pytest.approx(70 / 90),
    }
    assert found["kinds"]["copies"] == pytest.approx(20 / 90)


def test_a_trace_without_kernels_is_refused(path):
    import profiling

    with pytest.raises(RuntimeError, match="recorded no kernel"):
        profiling.parse_trace({"traceEvents": []}, 1, profiling.ON_GPU)


def test_tests_are_counted_and_failures_end_in_their_last_line(path):
    import gpu_training

    sent = {}
    outcomes = gpu_training.Outcomes(sent.update)

    def phase(name, when, outcome, text=""):
        outcomes.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"tests/a.py::{name}",
                when=when,
                outcome=outcome,
                failed=outcome == "failed",
                longreprtext=text,
                duration=1.0,
            )
        )

    phase("one", "setup", "passed")
    phase("one", "call", "passed")
    phase("one", "teardown", "passed")
    phase("two", "setup", "passed")
    phase("two", "call", "failed", "def two():\nE   assert 1 == 2\nE    +  where\n\ntests/a.py:3: Error")
    phase("two", "teardown", "passed")
    phase("three", "setup", "skipped")
    phase("three", "teardown", "passed")
    assert (sent["passed"], sent["failed"], sent["skipped"]) == (1, 1, 1)
    assert sent["failures"] == {"a.py::two": "+  where"}
    assert sent["slowest"]["a.py::one"] == 3.0


# --- CamVid


def test_epochs_are_planned_so_that_the_schedule_ends_with_the_time(path):
    import gpu_training

    costs = gpu_training.epoch_costs([0.0, 5.0, 8.0, 10.5, 11.5, 13.0, 16.5])
    assert costs == {"start": 5 + 2 + 1, "epoch": 1.0, "validation": 0.5, "end": 2.0}
    epochs, every = gpu_training.planned_epochs(costs, 150)
    taken = costs["start"] + epochs * 1.0 + (epochs // every + 1) * 0.5 + costs["end"]
    assert 110 < taken < 150
    assert gpu_training.planned_epochs(costs, 1) == (1, 1)


def test_a_planning_run_that_was_cut_short_is_refused(path):
    import gpu_training

    with pytest.raises(gpu_training.TooLate, match="5 epochs"):
        gpu_training.epoch_costs([0.0, 1.0, 2.0])


@pytest.fixture
def camvid(measured, settings, tmp_path):
    """Train on a small set in CamVid's form, with a network of four channels."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            conftest.write_pair(data, split, f"p{number}", rng, ignore=11)
    chosen = dataclasses.replace(settings, camvid=str(data), network="unet")

    def train(**changes):
        return measured("camvid", dataclasses.replace(chosen, **changes))

    return train


def test_training_on_camvid_reports_its_scores_and_copies_small_files(camvid, monkeypatch, tmp_path, undrawn):
    import gpu_training

    monkeypatch.setattr(gpu_training, "planned_epochs", lambda *_: (2, 1))
    monkeypatch.setattr(gpu_training, "train_for", without_limit(gpu_training.train_for))
    found = camvid()
    assert found["epochs"] == found["planned_epochs"] == 2
    assert 0 <= found["mean_iou"] <= 1
    assert set(found["iou"]) >= {"sky", "bicyclist"}
    assert found["iou"]["bicyclist"] is None
    written = {path.name for path in tmp_path.iterdir() if path.name.startswith("out-")}
    assert written == {"out-unet-log.csv", "out-unet-report.png"}


def without_limit(train_for):
    return lambda config, seconds: train_for(config, 600)


def test_training_that_is_stopped_can_be_continued(camvid, monkeypatch, tmp_path, undrawn):
    import gpu_training

    import train

    real, steps = train.train_step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 13:  # in the second epoch of the long run: the short one has 10 steps
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(gpu_training, "planned_epochs", lambda *_: (4, 1))
    monkeypatch.setattr(gpu_training, "train_for", without_limit(gpu_training.train_for))
    monkeypatch.setattr(train, "train_step", step)
    found = camvid()
    assert "--resume" in found["stopped"]
    assert found["epochs"] < 4
    (folder,) = (tmp_path / "runs").glob("gpu-unet-*")
    assert camvid(resume=str(folder))["epochs"] == 4


def test_time_that_is_over_before_the_first_step_is_told(settings, camvid, tmp_path, monkeypatch):
    import gpu_training

    import train

    def slow(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # the signal comes within

    monkeypatch.setattr(train, "check_data", slow)
    moments, stopped = gpu_training.train_for(gpu_training.camvid_config(settings, "late"), 600)
    assert len(moments) == 2
    assert "before the first step" in stopped


def test_a_run_that_was_stopped_before_its_first_epoch_has_no_scores(path, tmp_path):
    import gpu_training

    assert gpu_training.scores_of(tmp_path / "log.csv") == {"epochs": 0}
