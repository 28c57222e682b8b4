"""What goes wrong while a run goes on: it ends with a message and its code, and what was saved is whole."""

import errno
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import doors
import pytest
import torch

import train
from models import read_checkpoint
from utils import checkpoint as files
from utils.cli import Fail, end_with
from utils.run_folder import find_run

pytestmark = pytest.mark.usefixtures("undrawn")

fcntl = pytest.importorskip("fcntl", reason="the locks of POSIX")
resource = pytest.importorskip("resource", reason="the limits and signals of POSIX")


def at_step(number, fault):
    """Let `fault` happen as the step of this number begins, counted over the whole run."""
    original = train.train_step

    def step(run, *args):
        if run.schedule.position == number:
            fault(run)
        return original(run, *args)

    return step


def child(config, log, number, fault, environment):
    """Train in a process and a process group of its own, whose console is the file `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgid(0, 0)
    os.chdir(log.parent)
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as where `child` is main
    os.environ.update(environment)
    if "RANK" in environment:  # several at once; one alone must add up in the order of the unbroken run
        torch.set_num_threads(1)
    if fault:
        train.train_step = at_step(number, fault)
    try:
        end_with(lambda: train.main(config))
    finally:
        os.seteuid(os.getuid())  # see read_only


def start_child(config, log, number=0, fault=None, **environment):
    process = doors.CONTEXT.Process(target=child, args=(config, log, number, fault, environment))
    process.start()
    return process


def ended(process):
    process.join(60)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def met(monkeypatch, config, number, fault):
    """Train in this process until `fault` ends it; what it says then."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_step(number, fault))
        with pytest.raises(Fail) as caught:
            train.main(config)
    assert caught.value.code == 1
    return str(caught.value)


def unbroken(settings, kept={}):  # noqa: B006  (one run for all tests: the data is the same in each)
    """The checkpoints of a run that nothing happens to."""
    if not kept:
        folder = train.main(settings(run_name="unbroken")).folder
        kept.update({name: read_checkpoint(folder / name)["model"] for name in ("last.pt", "best.pt")})
    return kept


def assert_same(settings, folder):
    for name, weights in unbroken(settings).items():
        found = read_checkpoint(folder / name)["model"]
        assert all(torch.equal(value, found[key]) for key, value in weights.items())
    assert (folder / "log.csv").read_text().count("\n") == 3
    assert (folder / "report.png").exists()


# --- the disk ---


def full(run):
    """No file may be larger than half a checkpoint, as where the disk has no more room than that."""
    half = (run.folder / "last.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))


def read_only(run):
    """The folder becomes one that this user cannot write to."""
    if os.geteuid():
        run.folder.chmod(0o500)
    else:
        os.seteuid(65534)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(full, "File too large"), (read_only, "Permission denied")],
    ids=["full", "read-only"],
)
def test_a_disk_that_takes_no_more_ends_the_run_and_leaves_the_checkpoint(
    settings, tmp_path, monkeypatch, fault, words
):
    tmp_path.chmod(0o755)
    config = settings(data_root="data", output_dir="runs")  # so that another user finds the way, too
    process = start_child(config, tmp_path / "log", 4, fault)
    assert ended(process) == 1
    monkeypatch.chdir(tmp_path)
    said = (tmp_path / "log").read_text()
    for part in ("error: ", words, "'runs/run/last.pt'", "continue with --resume runs/run"):
        assert part in said.splitlines()[-1]
    assert "Traceback" not in said
    Path("runs/run").chmod(0o700)
    assert {path.name for path in Path("runs/run").glob("*.pt")} == {"last.pt", "best.pt"}
    assert read_checkpoint("runs/run/last.pt")["progress"]["epoch"] == 1
    assert_same(settings, train.main(settings(data_root="data", output_dir="runs", resume="runs/run")).folder)


def test_a_disk_that_is_full_at_any_write_costs_nothing(settings, tmp_path, monkeypatch):
    flush, moment, folder = os.fsync, 0, None
    while folder is None or not (folder / "report.png").exists():
        moment += 3
        left = [moment]

        def no_room(handle, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(handle)

        saved = folder is not None and (folder / "last.pt").exists()
        folder = folder if saved else tmp_path / "runs" / f"run_{moment}"
        config = settings(run_name=folder.name, resume=str(folder) if saved else None)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", no_room)
            try:
                train.main(config)
            except Fail as fail:
                assert fail.code == 1
                assert "No space left on device" in str(fail)
        for path in folder.glob("*.pt"):
            read_checkpoint(path)
    assert moment > 10
    assert_same(settings, folder)


# --- memory, data, and the processes that load it ---


def raising(error):
    def fault(run):
        raise error

    return fault


@pytest.mark.parametrize(
    "fault",
    [
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        raising(MemoryError()),
        raising(OSError(errno.ENOMEM, "Cannot allocate memory")),
        lambda run: torch.empty(2**60, dtype=torch.uint8),  # a real one, of the CPU
    ],
    ids=["gpu", "python", "system", "cpu"],
)
def test_out_of_memory_names_the_peak_what_helps_and_that_nothing_was_saved(settings, monkeypatch, fault):
    said = met(monkeypatch, settings(batch_size=6, accumulate=2, amp="off"), 0, fault)
    for words in ("out of memory on cpu", " GiB", "accumulate 3, amp bf16", "base_channels", "start again"):
        assert words in said
    assert "--resume" not in said


def test_a_run_out_of_memory_can_be_resumed(settings, monkeypatch):
    said = met(monkeypatch, settings(), 4, raising(MemoryError()))
    folder = Path(settings().output_dir) / "run"
    assert f"continue with --resume {folder}" in said
    assert f"--init_from {folder / 'last.pt'}" in said
    assert_same(settings, train.main(settings(resume=str(folder))).folder)


def test_an_image_that_vanishes_while_a_run_goes_on_is_named(settings, data, monkeypatch):
    image = data / "train" / "images" / "p5.png"
    said = met(monkeypatch, settings(cache="off"), 0, lambda run: image.unlink())
    assert str(image) in said
    assert "start again" in said


def test_a_loading_process_that_is_killed_ends_the_run_with_a_message(settings, monkeypatch):
    def kill_worker(run):
        (worker,) = run.data.loader._workers._iterator._workers
        worker.kill()
        time.sleep(5)  # it is noticed at once

    said = met(monkeypatch, settings(cache="off", num_workers=1), 3, kill_worker)
    assert "DataLoader worker" in said
    assert "num_workers" in said
    assert "--resume" in said


def terminate_all(run):
    """From outside, as torchrun does: what the main process sends its workers take in another way."""
    subprocess.run(["kill", "-s", "TERM", "--", f"-{os.getpgid(0)}"], start_new_session=True, check=True)
    time.sleep(0.3)  # a worker that died of it would be noticed now


def test_a_signal_to_the_whole_group_loses_no_step(settings, tmp_path):
    process = start_child(settings(cache="off", num_workers=1), tmp_path / "log", 4, terminate_all)
    assert ended(process) == 143
    folder = Path(settings().output_dir) / "run"
    said = (tmp_path / "log").read_text()
    assert f"error: stopped; continue with --resume {folder}" in said
    assert "Traceback" not in said
    assert read_checkpoint(folder / "last.pt")["progress"]["step"] == 2
    assert_same(settings, train.main(settings(resume=str(folder))).folder)


# --- several processes ---


def start_ranks(config, tmp_path, number=0, faults=(None, None)):
    """What torchrun does, without its seconds of start: two processes that find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start_child(
            config, tmp_path / f"log{rank}", number, fault, RANK=str(rank), LOCAL_RANK=str(rank), **place
        )
        for rank, fault in enumerate(faults)
    ]


def die(run):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(run):
    raise Fail("it does not work", 1)


@pytest.mark.parametrize(("dead", "fault", "code"), [(0, die, -signal.SIGKILL), (1, fail, 1)])
def test_where_one_of_two_processes_ends_the_other_says_so_and_the_run_goes_on_with_one(
    settings, tmp_path, dead, fault, code
):
    faults = [None, None]
    faults[dead] = fault
    started = time.monotonic()
    ranks = start_ranks(settings(), tmp_path, 4, faults)
    codes = [ended(process) for process in ranks]
    assert time.monotonic() - started < 60
    assert (codes[dead], codes[1 - dead]) == (code, 1)
    said = (tmp_path / f"log{1 - dead}").read_text()
    folder = Path(settings().output_dir) / "run"
    assert "error: another process of this run has ended or hangs" in said
    assert f"continue with --resume {folder}" in said
    assert "Traceback" not in said
    train.main(settings(resume=str(folder)))
    assert read_checkpoint(folder / "last.pt")["schedule"]["position"] == 6
    assert (folder / "report.png").exists()


def test_an_error_that_all_processes_meet_is_printed_by_one(settings, tmp_path):
    ranks = start_ranks(settings(data_root=str(tmp_path / "nowhere")), tmp_path, 0, [None, None])
    assert [ended(process) for process in ranks] == [2, 2]
    first, second = ((tmp_path / f"log{rank}").read_text() for rank in (0, 1))
    assert "error: " in first and "nowhere" in first
    assert "error" not in second


def test_more_processes_than_a_batch_has_images_are_refused_before_anything_is_written(settings, tmp_path):
    ranks = start_ranks(settings(batch_size=1), tmp_path, 0, [None, None])
    assert [ended(process) for process in ranks] == [2, 2]
    said = (tmp_path / "log0").read_text()
    assert "error: 6 samples in batches of 1 cannot be shared by 2 processes" in said
    assert "Traceback" not in said and not (Path(settings().output_dir) / "run").exists()


def stop_in_validation(run):
    """A signal comes while the next image is validated."""
    original = run.data.val.evaluation_item

    def item(index):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(index)

    run.data.val.evaluation_item = item


def test_a_run_of_one_process_goes_on_with_two_and_a_signal_to_one_stops_both(
    settings, tmp_path, monkeypatch
):
    met(monkeypatch, settings(epochs=3), 4, raising(MemoryError()))
    folder = Path(settings().output_dir) / "run"
    ranks = start_ranks(settings(resume=str(folder)), tmp_path, 4, (None, stop_in_validation))
    assert [ended(process) for process in ranks] == [143, 143]
    progress = read_checkpoint(folder / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 3)
    assert "stopped; continue" in (tmp_path / "log0").read_text()
    said = (tmp_path / "log1").read_text().splitlines()
    assert all(line.startswith("[Gloo]") for line in said)  # an older torch greets; what happened, one says
    ranks = start_ranks(settings(resume=str(folder)), tmp_path)
    assert [ended(process) for process in ranks] == [0, 0]
    assert (folder / "log.csv").read_text().count("\n") == 4
    assert (folder / "report.png").exists()


@pytest.mark.parametrize("times", [2, 4])  # in training, and in validation
def test_a_signal_between_asking_the_processes_and_hearing_them_is_not_lost(settings, monkeypatch, times):
    ask, left = train.distributed.largest, [times]

    def largest(numbers):
        agreed = ask(numbers)
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGTERM)
        return agreed

    monkeypatch.setattr(train.distributed, "largest", largest)
    with pytest.raises(Fail) as caught:
        train.main(settings())
    assert caught.value.code == 143


# --- resuming ---


def test_a_run_that_is_stopped_while_it_validates_goes_on_as_if_it_had_not(settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_step(2, stop_in_validation))
        with pytest.raises(Fail) as caught:
            train.main(settings())
    assert caught.value.code == 143
    folder = Path(settings().output_dir) / "run"
    assert read_checkpoint(folder / "last.pt")["progress"]["step"] == 3
    assert_same(settings, train.main(settings(resume=str(folder))).folder)
    rows = (folder / "log.csv").read_text().splitlines()
    assert float(dict(zip(rows[0].split(","), rows[1].split(","), strict=True))["images_per_second"]) == 0


def test_a_run_that_dies_before_its_last_row_is_written_has_it_after_resuming(settings, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train.main(settings(epochs=1, run_name="short"))
    with monkeypatch.context() as patch:
        patch.setattr("utils.run_report.write_csv", no_room)
        with pytest.raises(Fail, match="No space left"):
            train.main(settings(epochs=1))
    folder = Path(settings().output_dir) / "run"
    train.main(settings(resume=str(folder)))
    assert (folder / "log.csv").read_text().count("\n") == 2


def test_a_run_that_stopped_early_is_finished(settings):
    folder = train.main(settings(epochs=50, early_stop=1, learning_rate=1e-9, warmup_steps=0)).folder
    with pytest.raises(Fail, match="is finished after 2 epochs"):
        train.main(settings(resume=str(folder)))


def test_a_finished_run_that_is_given_more_epochs_is_unfinished_until_they_are_done(settings, monkeypatch):
    folder = train.main(settings(scheduler="none")).folder
    more = settings(epochs=3, scheduler="none", resume=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", at_step(7, raising(MemoryError())))
        with pytest.raises(Fail, match="out of memory"):
            train.main(more, {"epochs": 3})
    assert train.main(settings(resume="auto")).folder == folder
    assert (folder / "log.csv").read_text().count("\n") == 4


def test_a_run_begun_without_gradient_scaling_goes_on_with_it(settings, monkeypatch):
    """As one of the CPU's does on a GPU that has fp16 alone."""
    met(monkeypatch, settings(), 4, raising(MemoryError()))
    built = train.build_run

    def scaled(*args):
        run = built(*args)
        run.scaler = torch.amp.GradScaler("cpu")
        return run

    monkeypatch.setattr(train, "build_run", scaled)
    folder = train.main(settings(resume="auto")).folder
    assert read_checkpoint(folder / "last.pt")["scaler"]["scale"] > 0


def test_a_checkpoint_with_foreign_code_is_refused_by_resume_and_the_code_does_not_run(settings, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    torch.save({"format": 1, "config": Payload()}, folder / "last.pt")
    with pytest.raises(Fail, match="can be opened safely") as caught:
        train.main(settings(resume=str(folder)))
    assert caught.value.code == 2
    assert not (tmp_path / "ran").exists()


def test_runs_started_at_once_have_each_its_folder(settings, tmp_path):
    processes = [start_child(settings(run_name=None, epochs=1), tmp_path / f"log{i}") for i in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "runs").glob("*/report.png"))) == 3


def test_a_run_that_another_process_trains_is_not_resumed(settings, tmp_path):
    process = start_child(settings(epochs=100_000), tmp_path / "log")
    folder = tmp_path / "runs" / "run"
    while not (folder / "last.pt").exists() and process.is_alive():
        time.sleep(0.02)
    try:
        with pytest.raises(Fail, match="another process is training in"):
            train.main(settings(resume=str(folder)))
        with pytest.raises(Fail, match="has no unfinished run that is not running"):
            train.main(settings(resume="auto"))
    finally:
        process.kill()  # which leaves its lock's file, but no lock
    process.join()
    assert (folder / ".lock").exists() and find_run("auto", folder.parent) == folder


def look_for_a_lock(path):
    with open(path) as file:
        fcntl.lockf(file, fcntl.LOCK_SH)
        print("looking", flush=True)
        time.sleep(60)


def test_two_that_ask_at_once_whether_a_run_is_at_work_do_not_take_each_other_for_it(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("last.pt", ".lock"):  # as a killed run leaves them
        (tmp_path / "run" / name).touch()
    process = doors.fork(look_for_a_lock, (tmp_path / "run" / ".lock",), tmp_path / "log")
    try:
        while not (tmp_path / "log.out").exists() or not (tmp_path / "log.out").read_text():
            time.sleep(0.01)
        assert find_run("auto", tmp_path) == tmp_path / "run"
    finally:
        process.kill()


def test_a_run_name_that_is_taken_is_refused_with_what_can_be_done(settings, tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    go_on = f", or continue it with --resume {folder}"
    for written, way in ((None, ""), ("last.pt", go_on), ("report.png", "")):
        if written:
            (folder / written).touch()
        with pytest.raises(Fail, match=f"'run' exists in .*. Choose another, or leave it out{way}$"):
            train.main(settings())


# --- numbers ---


def poison(run):
    next(run.model.parameters()).data.fill_(torch.nan)


def poison_after(run):
    """The step itself has a finite loss, its update has not."""
    original = run.schedule.step

    def step():
        original()
        poison(run)

    run.schedule.step = step


def test_a_loss_that_is_not_finite_is_told_with_the_rate_of_its_step_and_resumed_before_it(
    settings, monkeypatch
):
    said = met(monkeypatch, settings(), 4, poison)
    rate = 0.002 * (1 - 2 / 4) ** 0.9  # poly, after two steps of warm-up
    assert f"not finite in epoch 2, step 2 (learning rate {rate:.3g}, torch." in said
    folder = Path(settings().output_dir) / "run"
    assert_same(settings, train.main(settings(resume=str(folder))).folder)


def test_weights_that_are_not_finite_are_never_saved(settings, monkeypatch):
    said = met(monkeypatch, settings(), 5, poison_after)
    assert "are not finite after step 6" in said
    folder = Path(settings().output_dir) / "run"
    assert_same(settings, train.main(settings(resume=str(folder))).folder)
