import math

import numpy as np
import pytest
import torch

from metrics import ConfusionMatrix, predicted_ids

C = 5


def case(n=7, h=9, w=11, seed=0, classes=C):
    """Random images: class 3 is never there, class 4 is predicted but never true."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(0, 3, (n, h, w), generator=generator)
    noise = torch.randint(0, 3, (n, h, w), generator=generator)
    preds = torch.where(torch.rand(n, h, w, generator=generator) < 0.6, masks, noise)
    preds[0, 0, :4] = 4
    masks[1, 2:5] = 255
    masks[2] = 255
    return preds, masks


def measured(preds, masks, **options):
    matrix = ConfusionMatrix(C, **options)
    matrix.update(preds, masks)
    return matrix


def slow_counts(preds, masks, classes=C, ignore_index=255):
    counts = np.zeros((classes, classes), dtype=np.int64)
    for p, t in zip(preds.flatten().tolist(), masks.flatten().tolist(), strict=True):
        if t != ignore_index:
            counts[t, p] += 1
    return counts


def slow_ratios(preds, masks):
    """IoU, Dice and accuracy of each class from sets of pixels."""
    pairs = [
        (p, t) for p, t in zip(preds.flatten().tolist(), masks.flatten().tolist(), strict=True) if t != 255
    ]
    iou, dice, accuracy = [], [], []
    for c in range(C):
        predicted = {i for i, (p, _) in enumerate(pairs) if p == c}
        true = {i for i, (_, t) in enumerate(pairs) if t == c}
        both = len(predicted & true)
        iou.append(both / len(predicted | true) if predicted | true else math.nan)
        dice.append(2 * both / (len(predicted) + len(true)) if predicted | true else math.nan)
        accuracy.append(both / len(true) if true else math.nan)
    return iou, dice, accuracy


def same(one, other):
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def test_four_pixels_worked_by_hand():
    scores = measured(torch.tensor([[0, 1], [1, 4]]), torch.tensor([[0, 0], [1, 255]])).scores()
    np.testing.assert_allclose(scores.iou, [1 / 2, 1 / 2, math.nan, math.nan, math.nan])
    np.testing.assert_allclose(scores.dice, [2 / 3, 2 / 3, math.nan, math.nan, math.nan])
    np.testing.assert_allclose(scores.accuracy, [1 / 2, 1, math.nan, math.nan, math.nan])
    assert scores.mean_iou == 1 / 2 and scores.mean_dice == pytest.approx(2 / 3)
    assert scores.pixel_accuracy == pytest.approx(2 / 3) and scores.mean_accuracy == 3 / 4
    assert scores.frequency_weighted_iou == pytest.approx(1 / 2)
    assert scores.mean_iou_foreground == 1 / 2 and scores.mean_dice_foreground == pytest.approx(2 / 3)
    assert scores.image_mean_iou == pytest.approx(1 / 2)
    # always class 0: right on 2 of 3 pixels, IoU 2/3 for class 0 and 0 for class 1
    assert scores.baseline_accuracy == pytest.approx(2 / 3) and scores.baseline_iou == pytest.approx(1 / 3)


def test_scores_equal_an_independent_slow_version():
    preds, masks = case()
    matrix = measured(preds, masks)
    scores = matrix.scores()
    np.testing.assert_array_equal(matrix.counts.numpy(), slow_counts(preds, masks))
    iou, dice, accuracy = slow_ratios(preds, masks)
    np.testing.assert_allclose(scores.iou, iou)
    np.testing.assert_allclose(scores.dice, dice)
    np.testing.assert_allclose(scores.accuracy, accuracy)
    assert math.isnan(iou[3]) and iou[4] == 0 and math.isnan(accuracy[4])
    assert scores.mean_iou == pytest.approx(np.nanmean(iou))
    assert scores.mean_dice_foreground == pytest.approx(np.nanmean(dice[1:]))
    frequency = [(masks == c).sum().item() for c in range(C)]
    weighted = sum(f * i for f, i in zip(frequency, iou, strict=True) if f) / sum(frequency)
    assert scores.frequency_weighted_iou == pytest.approx(weighted)


def test_mean_over_images_is_the_mean_of_each_images_own_mean():
    preds, masks = case()
    valid = [i for i in range(len(masks)) if (masks[i] != 255).any()]
    own = [slow_ratios(preds[i], masks[i]) for i in valid]
    matrix = measured(preds, masks)
    scores = matrix.scores()
    assert len(valid) == len(masks) - 1
    assert float(matrix.image_mean_iou) == scores.image_mean_iou
    assert scores.image_mean_iou == pytest.approx(np.mean([np.nanmean(iou) for iou, _, _ in own]))
    assert scores.image_mean_dice == pytest.approx(np.mean([np.nanmean(dice) for _, dice, _ in own]))


def test_baseline_is_what_always_predicting_the_commonest_class_scores():
    preds, masks = case()
    commonest = torch.bincount(masks[masks != 255]).argmax()
    scores, always = (measured(p, masks).scores() for p in (preds, torch.full_like(preds, commonest)))
    assert scores.baseline_iou == pytest.approx(always.mean_iou)
    assert scores.baseline_accuracy == pytest.approx(always.pixel_accuracy)


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [2, 5]])
def test_batch_size_order_and_processes_change_no_digit(sizes):
    preds, masks = case()
    whole = measured(preds, masks)
    order = torch.randperm(len(preds), generator=torch.Generator().manual_seed(1))
    processes = [ConfusionMatrix(C), ConfusionMatrix(C)]
    for i, part in enumerate(order.split(sizes)):
        processes[i % 2].update(preds[part], masks[part])
    together = ConfusionMatrix(C)
    together.load_state(processes[0].state() + processes[1].state())
    same(together.scores(), whole.scores())
    processes[0].merge(processes[1])
    assert torch.equal(processes[0].state(), whole.state()) and whole.state().dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtype_and_shape_of_the_ids_do_not_matter(dtype):
    preds, masks = case()
    matrix = ConfusionMatrix(C)
    for p, m in zip(preds.to(dtype), masks.to(dtype), strict=True):
        matrix.update(p, m)
    same(matrix.scores(), measured(preds, masks).scores())


@pytest.mark.parametrize("ignore_index", [-1, 255])
@pytest.mark.parametrize("classes", [2, 21, 127, 128, 255])
def test_every_pair_of_classes_counts_in_its_own_cell(classes, ignore_index):
    ids = torch.arange(classes)
    preds, masks = torch.cartesian_prod(ids, ids).T[:, None]  # each pair once
    matrix = ConfusionMatrix(classes, ignore_index=ignore_index)
    for dtype in (torch.int64, torch.uint8):
        matrix.update(preds.to(dtype), masks.to(dtype))
    assert torch.equal(matrix.counts, torch.full((classes, classes), 2))


@pytest.mark.parametrize("ignore_index", [0, 255, -100])
def test_ignored_pixels_count_for_nothing_whatever_the_label(ignore_index):
    preds, masks = case()
    masks = torch.where(masks == 255, ignore_index, masks)
    counts = measured(preds, masks, ignore_index=ignore_index).counts
    np.testing.assert_array_equal(counts.numpy(), slow_counts(preds, masks, ignore_index=ignore_index))


def test_impossible_ids_are_refused_and_never_counted_elsewhere():
    good = torch.zeros(2, 3, dtype=torch.int64)
    for value in (C, -1, 255, 70_000):
        matrix, bad = ConfusionMatrix(C, ignore_index=254), good.clone()
        bad[1, 1] = value
        with pytest.raises(ValueError, match=f"class ids 0..4, .* got preds .*{value}"):
            matrix.update(bad, good)
        with pytest.raises(ValueError, match=f"masks 0..4 or 254; got .*masks .*{value}"):
            matrix.update(good, bad)
        assert matrix.counts.sum() == 0
    with pytest.raises(ValueError, match="must both be"):
        matrix.update(good, good[:1])


def test_nothing_counted_gives_nan_and_reset_forgets():
    matrix = measured(*case())
    matrix.reset()
    same(matrix.scores(), ConfusionMatrix(C).scores())
    assert math.isnan(matrix.scores().mean_iou) and math.isnan(matrix.scores().image_mean_iou)
    assert math.isnan(matrix.image_mean_iou)
    assert np.isnan(matrix.scores().iou).all() and math.isnan(matrix.scores().baseline_iou)
    matrix.update(torch.zeros(0, 4, 4, dtype=torch.uint8), torch.zeros(0, 4, 4, dtype=torch.uint8))
    assert math.isnan(matrix.scores().pixel_accuracy)


def test_a_state_is_a_copy():
    matrix = measured(*case())
    state = matrix.state()
    matrix.update(*case(seed=1))
    assert not torch.equal(state, matrix.state())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 12, 21, 256, 300])
def test_predicted_ids_equal_argmax_also_among_equals(layout, dtype, classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(-3, 4, (2, classes, 15, 17), generator=generator).to(dtype)
    logits[0, :, 0] = -torch.inf
    ids = predicted_ids(logits.contiguous(memory_format=layout))
    assert torch.equal(ids.long(), logits.double().argmax(1))
    assert ids.dtype == (torch.uint8 if classes <= 256 else torch.int16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_and_ids_on_a_gpu_equal_those_on_the_cpu():
    preds, masks = case()
    matrix = measured(preds.cuda(), masks.cuda(), device="cuda")
    same(matrix.scores(), measured(preds, masks).scores())
    matrix.update(torch.full_like(preds, C).cuda(), masks.cuda())
    with pytest.raises(ValueError, match="ids must be in 0..4"):
        matrix.scores()
