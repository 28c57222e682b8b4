"""The path of a GPU, as far as a machine without one can test it: choices, arguments, copies, loading."""

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import predict
import train
from datasets import sampling
from datasets.sampling import Loader, evaluation_items, make_loader, prefetch
from models import prepare_for_inference
from utils import device as devices
from utils import distributed, monitor
from utils.checkpoint import flush_to_disk, write_atomic
from utils.distributed import Processes
from utils.ema import Ema
from utils.inference import Predictor, image_logits, normalize
from utils.monitor import Monitor, Progress, StopSignal
from utils.sync_batchnorm import SyncBatchNorm2d, convert_sync_batchnorm

CUDA, MPS, CPU = torch.device("cuda", 0), torch.device("mps"), torch.device("cpu")


# --- device, precision, threads ---


def test_a_process_computes_on_the_gpu_of_its_local_rank_and_makes_it_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device = devices.pick_device("cuda", Processes(rank=3, world_size=4, local_rank=3, local_world_size=4))
    assert device == current[0] == torch.device("cuda", 3)


def test_one_gpu_named_for_several_processes_is_refused():
    with pytest.raises(ValueError, match="names one GPU for 2 processes. Use device 'cuda'"):
        devices.pick_device("cuda:1", Processes(world_size=2))


@pytest.mark.parametrize(("amp", "allowed"), [("off", False), ("tf32", True), ("bf16", True)])
def test_amp_off_is_float32_in_convolutions_and_in_products_alike(amp, allowed, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    before = torch.backends.cudnn.allow_tf32
    try:
        devices.set_backends(False, amp, CUDA)
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert chosen == ["high" if allowed else "highest"]
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_a_precision_of_cuda_gpus_alone():
    assert devices.pick_precision("tf32", CUDA) == torch.float32
    with pytest.raises(ValueError, match="amp tf32 needs a CUDA GPU"):
        devices.pick_precision("tf32", CPU)


@pytest.mark.parametrize(
    ("local_world_size", "environment", "threads"),
    [(1, "1", None), (2, "1", 4), (3, "1", 2), (16, "1", 1), (2, "6", None)],
)
def test_processes_of_one_machine_share_its_cores(local_world_size, environment, threads, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(devices, "available_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    devices.set_threads(Processes(world_size=16, local_world_size=local_world_size))
    assert chosen == ([] if threads is None else [threads])


def test_maps_are_contiguous_on_mps_and_channels_last_elsewhere():
    formats = [devices.memory_format(True, device) for device in (CUDA, CPU, MPS)]
    assert formats == [torch.channels_last, torch.channels_last, torch.contiguous_format]
    assert devices.memory_format(False, CUDA) == torch.contiguous_format


@pytest.mark.parametrize(
    ("device", "pinned", "asynchronous"), [(CUDA, True, True), (CUDA, False, False), (MPS, True, False)]
)
def test_only_a_copy_from_pinned_memory_to_cuda_does_not_wait(device, pinned, asynchronous):
    asked = []
    tensor = SimpleNamespace(
        is_pinned=lambda: pinned, to=lambda device, non_blocking: asked.append((device, non_blocking))
    )
    devices.to_device(tensor, device)
    assert asked == [(device, asynchronous)]


def test_the_constants_of_normalization_are_made_once_per_device(monkeypatch):
    images, looks = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ([0.1, 0.2, 0.35], [0.2, 0.2, 0.2])
    with torch.inference_mode():
        first = normalize(images, *looks, torch.channels_last)
    monkeypatch.setattr(torch, "tensor", None)  # making them again would fail
    second = normalize(images, *looks, torch.channels_last)
    assert torch.equal(first, second)
    (second * nn.Parameter(torch.ones(()))).sum().backward()  # not inference tensors


# --- loading ---


class Samples(torch.utils.data.Dataset):
    """A data set of which the loader is told what it asks for."""

    cache, sample_bytes = object(), 2**20

    def __init__(self, resamples=False, cached=True):
        self.resamples, self.cache = resamples, object() if cached else None


@pytest.mark.parametrize(
    ("device", "cores", "resamples", "cached", "workers"),
    [
        ("cpu", 16, True, False, 0),
        ("cuda", 16, False, True, 0),
        ("cuda", 16, True, True, 15),
        ("cuda", 16, False, False, 15),
        ("cuda", 64, True, True, 16),
        ("cuda", 1, True, True, 1),
        ("mps", 8, True, True, 7),
    ],
)
def test_worker_processes_make_what_one_thread_cannot(device, cores, resamples, cached, workers, monkeypatch):
    monkeypatch.setattr(sampling.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    assert make_loader(Samples(resamples, cached), None, 16, device, cores).num_workers == workers


def test_systems_without_a_folder_of_shared_memory_have_no_limit(monkeypatch):
    monkeypatch.setattr(sampling, "SHARED_MEMORY", "/no/such/folder")
    assert make_loader(Samples(True, cached=False), None, 64, "cuda", 9).num_workers == 8


@pytest.mark.skipif(not os.path.isdir(sampling.SHARED_MEMORY), reason="shared memory as Linux has it")
def test_small_shared_memory_allows_fewer_workers_and_refuses_more_with_what_helps(monkeypatch):
    monkeypatch.setattr(sampling.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))  # docker's
    assert make_loader(Samples(True), None, 4, "cuda", 16).num_workers == 5  # 12 MiB each
    assert make_loader(Samples(True), None, 16, "cuda", 16).num_workers == 1
    assert make_loader(Samples(True), None, 64, "cuda", 16).num_workers == 0
    with pytest.raises(ValueError, match="num_workers 8 needs 96 MiB of shared memory.*Use num_workers 0"):
        make_loader(Samples(), 8, 4, "cpu", 16)


def test_batches_for_a_gpu_are_pinned_and_made_ahead(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    dataset = SimpleNamespace(batch=lambda keys: (torch.tensor(keys), torch.zeros(len(keys))))
    loader = Loader(dataset, pin_memory=True)
    batches = list(loader.epoch([[1, 2], [0]], epoch=3))
    assert [images.tolist() for images, _ in batches] == [[[3, 1], [3, 2]], [[3, 0]]]
    assert len(pinned) == 4


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_prefetching_keeps_the_order_and_makes_no_more_than_it_is_told(threads):
    made, highest = [], 0

    def make(item):
        time.sleep(0.002 * (item % 3))
        made.append(item)
        return item

    for done, item in enumerate(prefetch(make, range(12), threads, ahead=3)):
        assert item == done
        highest = max(highest, len(made) - done)
    assert len(made) == 12
    assert highest <= (4 if threads else 1) + 1


def test_prefetching_raises_the_error_of_an_item_in_its_place():
    items = prefetch(lambda item: 1 // item, [1, 0, 1], threads=2, ahead=2)
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_validation_images_read_ahead_are_the_same_in_the_same_order(settings):
    config = settings()
    report = train.check(config)
    run = train.build_run(config, report, CPU, torch.float32, train.build_network(config, fresh=True))
    batches = [[0, 2], [], [1]]
    plain, ahead = (list(evaluation_items(run.data.val, batches, threads)) for threads in (0, 3))
    assert [len(items) for items in ahead] == [2, 0, 1]
    for one, other in zip(sum(plain, []), sum(ahead, []), strict=True):
        assert torch.equal(one[0], other[0]) and one[1] == other[1] and torch.equal(one[2], other[2])


def test_windows_go_through_the_network_in_batches_of_the_given_size():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.sizes = nn.Conv2d(3, 2, 1), []

        def forward(self, x):
            self.sizes.append(len(x))
            return self.conv(x)

    model = Watched().eval()
    predictor = Predictor(model, mean=[0.5] * 3, std=[0.2] * 3, batch_size=6)
    box = SimpleNamespace(top=0, left=0, height=32, width=320, original_height=32, original_width=320)
    (logits,) = image_logits(
        predictor, [torch.zeros(3, 32, 320, dtype=torch.uint8)], [box], (32, 32), overlap=0
    )
    assert logits.shape == (1, 2, 32, 320)
    assert model.sizes == [6, 4]


# --- training ---


def test_the_average_walks_no_state_dict_and_its_counters_are_the_models_own(monkeypatch):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = Ema(model, decay=0.5)
    monkeypatch.setattr(nn.Module, "state_dict", None)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[1].num_batches_tracked += 7
    before = ema.weights["0.weight"].clone()
    ema.update()
    decay = min(0.5, 2 / 11)
    assert torch.allclose(ema.weights["0.weight"], decay * before + (1 - decay) * 3.0)
    assert ema.weights["1.num_batches_tracked"] == 7


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_averaged_at_the_last_part_of_a_batch_alone_also_where_it_is_compiled(
    settings, monkeypatch, compiled
):
    config = settings(batch_size=4, accumulate=2)
    run = train.build_run(
        config, train.check(config), CPU, torch.float32, train.build_network(config, fresh=True)
    )
    if compiled:
        run.forward = lambda images: run.parallel(images)  # what torch.compile returns is no wrapper
    asked = []
    averaging = distributed.averaging
    monkeypatch.setattr(
        distributed,
        "averaging",
        lambda model, enabled: asked.append((model, enabled)) or averaging(model, enabled),
    )
    train.train_step(run, *run.data.train.batch([(0, index) for index in range(4)]), 0, 0)
    assert asked == [(run.parallel, False), (run.parallel, True)]


def test_convolutions_are_tuned_for_the_size_of_training_and_not_in_validation(settings):
    config = settings()
    run = train.build_run(
        config, train.check(config), CPU, torch.float32, train.build_network(config, fresh=True)
    )
    train.set_train_mode(run)
    assert torch.backends.cudnn.benchmark
    train.evaluate(run, train.averaged_weights(run))
    assert not torch.backends.cudnn.benchmark


def a_monitor(save_every_minutes=0.0):
    schedule = SimpleNamespace(position=0, total_steps=10)
    return Monitor(Progress(), schedule, CPU, Processes(), save_every_minutes)


def test_a_large_checkpoint_is_not_written_after_every_short_epoch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    watched = a_monitor(save_every_minutes=10)
    assert watched.save_due()
    with watched.saving():
        now[0] += 8.0  # seconds
    watched.clock.seconds |= {"saving": 8.0, "step": 20.0}
    assert not watched.save_due()
    watched.clock.seconds["step"] = 400.0
    assert watched.save_due()
    watched.clock.seconds["step"] = 20.0
    now[0] += 601.0
    assert watched.save_due()


def test_a_run_in_another_thread_than_the_main_one_sets_no_signal_handlers(settings):
    results, errors = [], []

    def call():
        try:
            results.append(train.main(settings(epochs=1)))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert not errors
    assert (results[0].folder / "report.png").exists()
    with StopSignal() as signal:
        assert signal.number == 0


def test_a_batch_is_computed_in_as_many_parts_as_asked_for_or_as_it_has_images(settings, monkeypatch):
    config = settings(batch_size=6, accumulate=3)
    run = train.build_run(
        config, train.check(config), CPU, torch.float32, train.build_network(config, fresh=True)
    )
    sizes, forward = [], run.forward
    run.forward = lambda images: sizes.append(len(images)) or forward(images)
    images, masks = run.data.train.batch([(0, index) for index in range(4)])
    train.train_step(run, images, masks, 0, 0)
    assert sizes == [2, 1, 1]
    sizes.clear()
    monkeypatch.setattr(train.distributed, "largest", lambda numbers: [-2])  # another process has 2 images
    train.train_step(run, images, masks, 0, 0)
    assert sizes == [2, 2]


def test_one_process_keeps_the_batch_norm_that_takes_a_batch_of_one(settings):
    config = settings(model="deeplabv3plus", base_channels=16, backbone="resnet18", sync_batchnorm=True)
    model = train.place_model(train.build_network(config, fresh=True), config, CPU, Processes())
    assert model.train()(torch.zeros(1, 3, 32, 32)).shape == (1, 2, 32, 32)


def test_several_processes_neither_broadcast_buffers_in_each_step_nor_copy_gradients(monkeypatch):
    asked = {}

    class Wrapper(nn.Module):
        def __init__(self, model, *, forward_sync_buffers=None, **options):
            super().__init__()
            asked.update(options, forward_sync_buffers=forward_sync_buffers)

    monkeypatch.setattr(distributed, "DistributedDataParallel", Wrapper)
    model = nn.Linear(1, 1)
    assert distributed.wrap(model, Processes(), CUDA) is model
    distributed.wrap(model, Processes(world_size=2), CUDA)
    assert asked == {"device_ids": [0], "gradient_as_bucket_view": True, "forward_sync_buffers": False}


def test_a_compiled_network_is_told_that_the_batch_size_varies(settings, monkeypatch):
    config = settings()
    run = train.build_run(
        config, train.check(config), CPU, torch.float32, train.build_network(config, fresh=True)
    )
    run.config, marked = settings(compile=True), []
    monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda x, axis: marked.append((x.shape, axis)))
    train.train_step(run, *run.data.train.batch([(0, 0), (0, 1)]), 0, 0)
    assert marked == [((2, 3, 32, 32), 0)]


@pytest.mark.parametrize(("device", "cores", "threads"), [(CPU, 16, 2), (CUDA, 16, 8), (CUDA, 4, 4)])
def test_a_gpu_is_fed_by_more_threads_in_prediction(device, cores, threads, monkeypatch):
    monkeypatch.setattr(predict, "available_cores", lambda: cores)
    assert predict.default_workers(device) == threads


def test_files_of_a_prediction_are_flushed_once_at_the_end_with_each_folder_once(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        write_atomic(path, lambda file: file.write(b"x"), sync=False)
    assert not flushed
    flush_to_disk([*paths, *paths, tmp_path / "gone.txt"])
    assert len(flushed) == (3 if os.name == "posix" else 2)


# --- synchronized batch norm ---


def test_without_other_processes_synchronized_batch_norm_is_batch_norm_and_has_its_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x, names = torch.randn(2, 3, 8, 8), list(model.state_dict())
    expected = model(x)
    model[1].reset_running_stats()
    converted = convert_sync_batchnorm(model)
    assert type(converted[1]) is SyncBatchNorm2d and list(converted.state_dict()) == names
    assert torch.equal(converted(x), expected)


def test_synchronized_batch_norm_is_folded_for_prediction():
    torch.manual_seed(0)
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        model[1].running_var.fill_(2.5)
    folded = prepare_for_inference(model, device=CPU, dtype=torch.float32)
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
