"""From images to logits at each image's own size: folding, restoring, sliding windows, averaging."""

import numpy as np
import pytest
import torch
from torch import nn

from datasets.fitting import Box
from models import build_model, prepare_for_inference
from utils.inference import CACHE_BYTES, Predictor, normalize, restore, restored_strips, sliding_blocks

SMALL = {"unet": {"base_channels": 4}, "segnet": {"base_channels": 4}, "fcn": {"backbone": "vgg11_bn"}}
SMALL |= {name: {"backbone": "resnet18"} for name in ("deeplabv3plus", "pspnet")}
HALF = {"mean": [0.5] * 3, "std": [0.2] * 3}


def small_model(name):
    torch.manual_seed(0)
    model = build_model(name, 3, **SMALL[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after training
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def predictor_of(model, dtype=torch.float32, **options):
    """A predictor of a copy that is prepared for inference on the CPU."""
    prepared = prepare_for_inference(model, device=torch.device("cpu"), dtype=dtype)
    return Predictor(prepared, **HALF, **options)


def test_normalize_is_the_formula():
    images = torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    expected = torch.stack([(images[:, c] / 255 - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(normalize(images, mean, std, torch.channels_last), expected, atol=1e-5)


def test_restore_cuts_the_padding_off_and_resizes_the_content():
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 1, 2:6] = 1.0  # the content; rows 0, 1, 6 and 7 are padding
    assert torch.equal(restore(logits, Box(2, 0, 4, 8, 8, 16))[:, 1], torch.ones(1, 8, 16))
    assert torch.equal(restore(logits, Box(0, 0, 8, 8, 8, 8)), logits)


def identity(images):
    return images.float()


def slide(forward, image, window, overlap=0.25):
    """The logits of a whole image, and how often each pixel was given."""
    rows = lambda top, bottom: image[:, top:bottom]  # noqa: E731
    whole, times = None, torch.zeros(image.shape[1:])
    for top, left, block in sliding_blocks(forward, rows, image.shape[1:], window, overlap):
        whole = block.new_zeros(len(block), *image.shape[1:]) if whole is None else whole
        place = np.s_[top : top + block.shape[1], left : left + block.shape[2]]
        whole[(slice(None), *place)] = block
        times[place] += 1
    return whole, times


@pytest.mark.parametrize("size", [(40, 40), (33, 100), (97, 64), (128, 31), (20, 20), (64, 65), (150, 203)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_sliding_an_identity_gives_each_pixel_of_the_image_back_once(size, overlap):
    image = torch.randint(0, 256, (2, *size), dtype=torch.uint8)
    whole, times = slide(identity, image, (40, 48), overlap)
    assert torch.equal(times, torch.ones(size))
    assert torch.allclose(whole, image.float(), atol=1e-3)


def test_windows_are_blended_as_by_sums_over_the_whole_image():
    model = small_model("unet")
    predictor = predictor_of(model)
    image = torch.randint(0, 256, (3, 75, 110), dtype=torch.uint8)
    sums, total = torch.zeros(3, 75, 110), torch.zeros(75, 110)
    ramp = ((torch.minimum(torch.arange(40), torch.arange(39, -1, -1)) + 1) / 10).clamp(max=1)
    for top in (0, 18, 35):
        for left in (0, 23, 47, 70):
            place = np.s_[..., top : top + 40, left : left + 40]
            sums[place] += predictor.logits(image[place][None])[0] * ramp[:, None] * ramp
            total[place] += ramp[:, None] * ramp
    assert torch.allclose(slide(predictor.logits, image, (40, 40))[0], sums / total, atol=1e-4)


def test_one_window_that_covers_the_image_equals_taking_it_whole():
    model = small_model("unet")
    predictor = predictor_of(model)
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    assert torch.equal(slide(predictor.logits, image, (64, 64))[0], predictor.logits(image[None])[0])


def test_sliding_asks_for_one_strip_at_a_time_and_gives_no_more_than_a_window():
    asked, given = [], []

    def read(top, bottom):
        asked.append(bottom - top)
        return torch.zeros(1, bottom - top, 400, dtype=torch.uint8)

    for _, _, block in sliding_blocks(identity, read, (400, 400), (40, 40)):
        given.append(tuple(block.shape))
    assert set(asked) == {40}
    assert max(rows for _, rows, _ in given) <= 40
    assert max(columns for _, _, columns in given) <= 40


@pytest.mark.parametrize("box", [Box(0, 0, 8, 10, 100, 77), Box(2, 1, 5, 9, 5, 9), Box(1, 0, 30, 40, 17, 23)])
def test_restoring_in_strips_equals_restoring_at_once(box):
    logits = torch.randn(1, 3, 33, 41)
    strips = list(restored_strips(logits, box, elements=3 * box.original_width * 7))
    assert [top for top, _, _ in strips] == list(range(0, box.original_height, 7))
    joined = torch.cat([strip for _, _, strip in strips], dim=1)
    assert torch.allclose(joined, restore(logits, box)[0], atol=1e-5)


def test_flip_averaging_is_symmetric_and_equals_the_plain_way_for_a_symmetric_image():
    predictor = predictor_of(small_model("unet"), tta="flip")
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    assert torch.allclose(predictor.logits(image).flip(-1), predictor.logits(image.flip(-1)), atol=1e-4)


def test_multiscale_averaging_keeps_the_size():
    predictor = predictor_of(small_model("unet"), tta="multiscale")
    assert predictor.logits(torch.zeros(2, 3, 37, 53, dtype=torch.uint8)).shape == (2, 3, 37, 53)


def test_a_cpu_takes_a_batch_through_the_network_in_parts_that_its_cache_holds():
    model, sizes = small_model("segnet"), []
    predictor = predictor_of(model)
    images = torch.randint(0, 256, (5, 3, 32, CACHE_BYTES // (2 * 32 * 4 * 4)), dtype=torch.uint8)
    predictor.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    whole = predictor.logits(images)
    assert sizes == [2, 2, 1]
    assert torch.allclose(whole[2], predictor.logits(images[2:3])[0], atol=1e-4)
