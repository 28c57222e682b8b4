"""The losses against their definitions, and the fused form against the formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import LOSSES, AuxLoss, SegmentationLoss, build_loss, median_frequency_weights
from losses.fused import _sum_by_label, _sum_by_label_in_buckets

WEIGHTS = [0.5, 2.0, 1.0, 3.0]
FORMS = {  # the losses, and joint with each pixel loss
    "ce": ("ce", {}),
    "weighted_ce": ("weighted_ce", {"class_weights": WEIGHTS}),
    "focal": ("focal", {"class_weights": WEIGHTS, "focal_gamma": 1.5}),
    "dice": ("dice", {}),
    "dice without smoothing": ("dice", {"dice_smooth": 0.0}),
    "joint": ("joint", {"dice_weight": 0.3}),
    "joint with weighted_ce": ("joint", {"joint_ce": "weighted_ce", "class_weights": WEIGHTS}),
    "joint with focal": ("joint", {"joint_ce": "focal", "class_weights": WEIGHTS}),
}
FORMS |= {name: (name, {}) for name in LOSSES if name not in FORMS}  # one that you add, with its defaults


def build(form, **more):
    name, options = FORMS[form]
    return build_loss(name, **{**options, **more})


every_form = pytest.mark.parametrize("form", FORMS)
every_fused_form = pytest.mark.parametrize("form", [form for form in FORMS if build(form).factors])
every_computation = pytest.mark.parametrize("fused", [True, False])


def batch(n=2, c=4, h=5, w=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(n, c, h, w, generator=generator)).to(dtype).requires_grad_()
    masks = torch.randint(0, c - 1, (n, h, w), generator=generator)  # the last class is absent
    masks[0, :2] = 255
    return logits, masks


def slow(loss_fn, logits, masks):
    """The definitions, pixel by pixel."""
    probs, is_of = torch.softmax(logits, 1), loss_fn.factors
    weights = is_of.class_weights if is_of.class_weights is not None else torch.ones(logits.shape[1])
    pixel, total = logits.new_zeros(()), 0.0
    overlap, mass, count = ([0.0] * logits.shape[1] for _ in range(3))
    for n, i, j in (masks != loss_fn.ignore_index).nonzero().tolist():
        y, p = int(masks[n, i, j]), probs[n, :, i, j]
        pixel = pixel - weights[y] * (1 - p[y]) ** is_of.gamma * torch.log(p[y])
        total += float(weights[y])
        for k in range(len(p)):
            mass[k] = mass[k] + p[k]
        overlap[y] = overlap[y] + p[y]
        count[y] += 1
    s = is_of.smooth
    dice = [1 - (2 * overlap[k] + s) / (mass[k] + count[k] + s) for k in range(len(count)) if count[k]]
    return is_of.pixel * pixel / total + is_of.dice * sum(dice) / len(dice)


def loss_and_grad(loss_fn, logits, masks, **more):
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = loss_fn(logits, masks, **more)
    loss.backward()
    return loss.detach(), logits.grad


def test_two_pixels_worked_by_hand():
    # p = (0.8, 0.2) and (0.5, 0.5), labels 0 and 1
    logits = torch.tensor([[[[math.log(4), 0.0]], [[0.0, 0.0]]]])
    masks = torch.tensor([[[0, 1]]])
    dice = 1 - ((2 * 0.8 + 1) / (1.3 + 1 + 1) + (2 * 0.5 + 1) / (0.7 + 1 + 1)) / 2
    ce = -(math.log(0.8) + math.log(0.5)) / 2
    wanted = {
        "ce": ce,
        "weighted_ce": -(math.log(0.8) + 3 * math.log(0.5)) / 4,
        "focal": -(0.04 * math.log(0.8) + 0.25 * math.log(0.5)) / 2,
        "dice": dice,
        "joint": 0.5 * ce + 0.5 * dice,
    }
    for name, value in wanted.items():
        weights = [1, 3] if name == "weighted_ce" else None
        assert build_loss(name, class_weights=weights)(logits, masks).item() == pytest.approx(value, rel=1e-6)


@every_fused_form
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_equal_the_definition_pixel_by_pixel(form, layout):
    loss_fn, (logits, masks) = build(form), batch()
    value, grad = loss_and_grad(loss_fn, logits.contiguous(memory_format=layout), masks)
    reference = slow(loss_fn, logits, masks)
    reference.backward()
    torch.testing.assert_close(value, reference.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(grad, logits.grad, rtol=1e-7, atol=1e-12)
    assert grad.is_contiguous(memory_format=layout)


@every_form
def test_gradient_passes_gradcheck(form):
    logits, masks = batch(h=3, w=4)
    loss_fn = build(form)
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, masks, denominator=50.0), logits)
    assert torch.autograd.gradcheck(lambda x: 3 * loss_fn(x, masks), logits)


@every_form
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("classes", [4, 17])
def test_pieces_do_not_change_the_result(form, layout, classes, monkeypatch):
    weights = None if FORMS[form][1].get("class_weights") is None else torch.arange(1.0, classes + 1)
    loss_fn = build(form, **({} if weights is None else {"class_weights": weights}))
    logits, masks = batch(c=classes, dtype=torch.float32)
    whole = loss_and_grad(loss_fn, logits.contiguous(memory_format=layout), masks)
    monkeypatch.setattr("losses.fused._PIECE", {"cpu": 7 * classes})  # 7 of the 30 pixels of an image
    pieces = loss_and_grad(loss_fn, logits.contiguous(memory_format=layout), masks)
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-8)


CASES = {
    "float64": {"dtype": torch.float64},
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "large": {"n": 1, "c": 17, "h": 31, "w": 40, "dtype": torch.float32},
    "micro-batch": {"dtype": torch.float64, "denominator": 77.0},
    "ignored 0": {"dtype": torch.float64, "ignore_index": 0},
    "all ignored": {"dtype": torch.float32, "ignored": slice(None)},
}


@every_fused_form
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_the_fused_form_equals_the_formula(form, layout, case):
    options = dict(CASES[case])
    more = {"denominator": options.pop("denominator")} if "denominator" in options else {}
    ignore_index, ignored = options.pop("ignore_index", 255), options.pop("ignored", (0, slice(2)))
    logits, masks = batch(**options)
    masks[masks == 255] = 1
    masks[ignored] = ignore_index
    logits = logits.contiguous(memory_format=layout)
    settings = {"ignore_index": ignore_index}
    if FORMS[form][1].get("class_weights"):
        settings["class_weights"] = torch.arange(1.0, logits.shape[1] + 1)
    one, other = (
        loss_and_grad(build(form, fused=fused, **settings), logits, masks, **more) for fused in (True, False)
    )
    tight = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-8), torch.bfloat16: (1e-2, 1e-5)}
    rtol, atol = tight[logits.dtype]
    torch.testing.assert_close(one[0], other[0], rtol=min(rtol, 1e-4), atol=1e-7)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=atol)
    assert one[1].dtype == other[1].dtype == logits.dtype


@every_form
def test_the_terms_of_both_forms_are_the_same(form):
    logits, masks = batch()
    one, other = (build(form, fused=fused).with_terms(logits, masks)[1] for fused in (True, False))
    assert list(one) == list(other)
    torch.testing.assert_close(one, other)
    assert not any(term.requires_grad for term in other.values())


@every_form
def test_a_call_leaves_no_attribute_behind(form):
    logits, masks = batch()
    loss_fn = AuxLoss(build(form))
    before = [sorted(vars(module)) for module in loss_fn.modules()]
    loss_fn.with_terms((logits, logits), masks)
    assert [sorted(vars(module)) for module in loss_fn.modules()] == before


@every_form
def test_the_formula_compiles_to_one_graph(form):
    torch.compiler.reset()
    logits, masks = batch(dtype=torch.float32)
    loss_fn = build(form, fused=False)
    compiled = torch.compile(loss_fn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, masks), loss_fn(logits, masks))


class Squared(SegmentationLoss):
    """A loss of one's own, with nothing but `forward`."""

    def forward(self, logits, masks, denominator=None):
        valid, labels = self.split(masks)
        pixels = self.denominator(masks) if denominator is None else denominator
        p_y = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return ((1 - p_y).square() * valid).sum() / pixels


@every_computation
@pytest.mark.parametrize("denominator", [None, 80.0])
def test_joint_combines_dice_with_a_loss_that_a_user_adds(fused, denominator, monkeypatch):
    monkeypatch.setitem(LOSSES, "squared", Squared)
    logits, masks = batch()
    loss_fn = build_loss("joint", joint_ce="squared", dice_weight=0.25, fused=fused)
    loss, terms = loss_fn.with_terms(logits, masks, denominator)
    squared = build_loss("squared")(logits, masks, denominator)
    dice = build_loss("dice")(logits, masks, denominator)
    torch.testing.assert_close(loss, 0.75 * squared + 0.25 * dice)
    assert list(terms) == ["squared", "dice"]
    assert build_loss("squared").with_terms(logits, masks)[1].keys() == {"squared"}


def test_sums_by_label_in_buckets_are_those_of_bincount():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3000, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 3000), generator=generator)
    torch.testing.assert_close(_sum_by_label_in_buckets(values, labels, 7), _sum_by_label(values, labels, 7))


def test_cross_entropies_equal_those_of_torch():
    logits, masks = batch(dtype=torch.float32)
    for form, weights in (("ce", None), ("weighted_ce", torch.tensor(WEIGHTS))):
        value, grad = loss_and_grad(build(form), logits, masks)
        logits.grad = None
        reference = F.cross_entropy(logits, masks, weight=weights, ignore_index=255)
        reference.backward()
        torch.testing.assert_close((value, grad), (reference.detach(), logits.grad), rtol=1e-5, atol=1e-8)


def test_focal_is_cross_entropy_at_gamma_0_and_another_loss_at_2():
    logits, masks = batch(dtype=torch.float32)
    ce = build_loss("ce")(logits, masks)
    assert torch.equal(build_loss("focal", focal_gamma=0)(logits, masks), ce)
    assert build_loss("focal")(logits, masks) < 0.9 * ce
    weighted = build("weighted_ce")(logits, masks)
    assert torch.equal(build_loss("focal", class_weights=WEIGHTS, focal_gamma=0)(logits, masks), weighted)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_the_prediction_is_certain(gamma):
    logits = torch.tensor([[[[200.0]], [[-200.0]]]])
    for label in (0, 1):
        value, grad = loss_and_grad(
            build_loss("focal", focal_gamma=gamma), logits, torch.full((1, 1, 1), label)
        )
        assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("joint_ce", ["ce", "weighted_ce", "focal"])
def test_joint_equals_its_parts_and_names_them(joint_ce):
    logits, masks = batch(dtype=torch.float32)
    weights = None if joint_ce == "ce" else WEIGHTS
    joint_fn = build_loss("joint", class_weights=weights, joint_ce=joint_ce, dice_weight=0.3)
    part_fn, dice_fn = build_loss(joint_ce, class_weights=weights), build_loss("dice")
    value, grad = loss_and_grad(joint_fn, logits, masks)
    (part, part_grad), (dice, dice_grad) = (loss_and_grad(f, logits, masks) for f in (part_fn, dice_fn))
    torch.testing.assert_close(value, 0.7 * part + 0.3 * dice)
    torch.testing.assert_close(grad, 0.7 * part_grad + 0.3 * dice_grad, rtol=1e-4, atol=1e-8)
    logits = logits.detach().requires_grad_()
    loss, terms = joint_fn.with_terms(logits, masks)
    torch.testing.assert_close((loss.detach(), terms), (value, {joint_ce: part, "dice": dice}))
    assert list(part_fn.with_terms(logits, masks)[1]) == [joint_ce]
    assert loss.requires_grad and not terms["dice"].requires_grad


@every_form
@every_computation
@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_ignored_pixels_change_neither_value_nor_gradient(form, ignore_index, fused):
    logits, masks = batch(dtype=torch.float32)
    masks = torch.where(masks == 255, ignore_index, masks)
    ignored = (masks == ignore_index)[:, None].expand_as(logits)
    other = torch.where(ignored, 70 * torch.randn_like(logits), logits)
    loss_fn = build(form, ignore_index=ignore_index, fused=fused)
    (value, grad), (other_value, other_grad) = (loss_and_grad(loss_fn, x, masks) for x in (logits, other))
    assert torch.equal(value, other_value) and torch.equal(grad, other_grad)
    assert (grad[ignored] == 0).all() and grad[~ignored].abs().min() > 0


@every_form
@every_computation
def test_targets_are_never_written_to(form, fused):
    for dtype in (torch.int64, torch.uint8):
        logits, masks = batch()
        masks = masks.to(dtype)
        before, version = masks.clone(), masks._version
        loss_and_grad(build(form, fused=fused), logits, masks)
        assert torch.equal(masks, before) and masks._version == version


@every_form
def test_byte_masks_give_the_same_loss(form):
    logits, masks = batch()
    ours, bytes_ = (loss_and_grad(build(form), logits, m) for m in (masks, masks.byte()))
    assert torch.equal(ours[0], bytes_[0]) and torch.equal(ours[1], bytes_[1])


@every_form
@pytest.mark.parametrize("denominator", [None, 0.0, 9.0])
def test_batch_without_valid_pixels_gives_0_with_zero_gradient(form, denominator):
    logits, masks = batch(dtype=torch.float32)
    value, grad = loss_and_grad(build(form), logits, torch.full_like(masks, 255), denominator=denominator)
    assert value == 0 and grad.shape == logits.shape and (grad == 0).all()


@every_form
def test_permuting_classes_permutes_the_gradient_and_nothing_else(form):
    logits, masks = batch()
    order = torch.tensor([2, 0, 3, 1])  # new channel k is old channel order[k]
    renamed = torch.where(masks == 255, 255, order.argsort()[masks.clamp(max=3)])
    weights = FORMS[form][1].get("class_weights")
    other_fn = build(form, **({"class_weights": torch.tensor(weights)[order]} if weights else {}))
    value, grad = loss_and_grad(build(form), logits, masks)
    other_value, other_grad = loss_and_grad(other_fn, logits[:, order], renamed)
    torch.testing.assert_close(other_value, value)
    torch.testing.assert_close(other_grad, grad[:, order])


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_of_80_stay_finite(form, dtype):
    logits = torch.where(torch.rand(2, 4, 32, 32) < 0.5, -80.0, 80.0).to(dtype)
    masks = torch.randint(0, 4, (2, 32, 32))
    value, grad = loss_and_grad(build(form), logits, masks)
    reference, _ = loss_and_grad(build(form), logits.float(), masks)
    assert grad.dtype == dtype and value.dtype == torch.float32 and grad.isfinite().all()
    assert value.isfinite() and torch.equal(value, reference)


@pytest.mark.parametrize("form", ["ce", "joint with focal"])
def test_large_images_in_half_precision_stay_finite(form):
    logits = torch.full((1, 4, 1024, 1024), 80.0, dtype=torch.float16)
    logits[:, 1] = -80
    value, grad = loss_and_grad(build(form), logits, torch.ones(1, 1024, 1024, dtype=torch.uint8))
    assert value.isfinite() and value > 70 and grad.isfinite().all()


@every_form
def test_autocast_does_not_touch_the_loss(form):
    logits, masks = batch(n=1, h=64, w=64, dtype=torch.float32)
    value, grad = loss_and_grad(build(form), logits, masks)
    with torch.autocast("cpu", torch.bfloat16):
        inside_value, inside_grad = loss_and_grad(build(form), logits, masks)
    assert torch.equal(value, inside_value) and torch.equal(grad, inside_grad)


@every_form
def test_upstream_slope_scales_the_gradient_and_backward_can_be_repeated(form):
    logits, masks = batch()
    loss = build(form)(logits, masks)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss, logits, grad_outputs=torch.tensor(1024.0, dtype=torch.float64))
    torch.testing.assert_close(scaled, 1024 * once)


def test_loss_in_a_compiled_function_is_the_same():
    logits, masks = batch(dtype=torch.float32)
    loss_fn = build("joint")

    @torch.compile(backend="eager")
    def step(x):
        return 2 * loss_fn(x + 1, masks)

    torch.testing.assert_close(step(logits), 2 * loss_fn(logits + 1, masks))


@pytest.mark.parametrize("form", ["ce", "weighted_ce", "focal"])
def test_micro_batches_add_up_to_the_whole_batch(form):
    logits, masks = batch(n=4)
    loss_fn = build(form)
    total = loss_fn.denominator(masks)
    whole, whole_grad = loss_and_grad(loss_fn, logits, masks)
    parts = [loss_and_grad(loss_fn, logits[i:j], masks[i:j], denominator=total) for i, j in ((0, 1), (1, 4))]
    torch.testing.assert_close(sum(value for value, _ in parts), whole)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_grad)


def test_dice_of_a_micro_batch_enters_by_its_part_of_the_valid_pixels():
    logits, masks = batch()
    loss_fn = build("dice")
    own = loss_fn.denominator(masks)
    assert own == (masks != 255).sum()
    torch.testing.assert_close(loss_fn(logits, masks, denominator=4 * own), loss_fn(logits, masks) / 4)


def test_a_class_of_weight_0_is_no_reason_to_leave_dice_out():
    logits, masks = torch.randn(1, 3, 8, 8, requires_grad=True), torch.zeros(1, 8, 8, dtype=torch.long)
    joint = build_loss("joint", joint_ce="weighted_ce", class_weights=[0.0, 1.0, 1.0])
    loss, terms = joint.with_terms(logits, masks)
    loss.backward()
    torch.testing.assert_close(terms["dice"], build_loss("dice")(logits.detach(), masks))
    assert logits.grad.abs().max() > 0


def test_dice_does_not_depend_on_ignored_pixels_or_absent_classes():
    logits, masks = batch()
    value = build("dice")(logits, masks)
    padded = build("dice")(F.pad(logits, (0, 7, 0, 3)), F.pad(masks, (0, 7, 0, 3), value=255))
    more = F.pad(logits, (0, 0, 0, 0, 0, 5), value=-torch.inf)  # five classes, never present nor predicted
    torch.testing.assert_close(padded, value)
    torch.testing.assert_close(build("dice")(more, masks), value)


def test_dice_of_a_perfect_prediction_is_0():
    masks = torch.randint(0, 3, (2, 8, 8))
    masks[0, 0] = 255
    logits = 100.0 * F.one_hot(masks.clamp(max=3), 4).permute(0, 3, 1, 2)
    assert build("dice")(logits, masks) == 0
    assert build("dice", dice_smooth=0)(logits, masks) == 0


def test_auxiliary_loss_adds_its_fraction_and_takes_plain_logits_too():
    (logits, masks), (aux_logits, _) = batch(), batch(seed=1)
    loss_fn = build("joint")
    aux_fn = AuxLoss(loss_fn, weight=0.4)
    wanted, aux = loss_fn(logits, masks), loss_fn(aux_logits, masks)
    loss, terms = aux_fn.with_terms((logits, aux_logits), masks)
    torch.testing.assert_close(loss, wanted + 0.4 * aux)
    assert torch.equal(loss, aux_fn((logits, aux_logits), masks))
    assert set(terms) == {"ce", "dice", "aux"} and terms["aux"] == aux
    loss, terms = aux_fn.with_terms(logits, masks)
    assert aux_fn(logits, masks) == loss == wanted and set(terms) == {"ce", "dice"}
    assert aux_fn.denominator(masks) == loss_fn.denominator(masks)


def test_median_frequency_weights_worked_by_hand():
    # frequencies 50/100, 10/100, 10/40, and a class that never occurs
    weights = median_frequency_weights([50, 10, 10, 0], [100, 100, 40, 0])
    assert weights == pytest.approx([0.5, 2.5, 1.0, 1.0]) and all(type(w) is float for w in weights)
    build_loss("weighted_ce", class_weights=weights)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("joit", {}, "Did you mean 'joint'"),
        ("ce", {"class_weights": [1.0]}, "class_weights does not apply"),
        ("dice", {"focal_gamma": 2.0}, "focal_gamma does not apply"),
        ("focal", {"focal_gama": 2.0}, "focal_gama does not apply"),
        ("focal", {"focal_gamma": -1.0}, "focal_gamma must be 0 or more"),
        ("weighted_ce", {}, "needs one number per class"),
        ("weighted_ce", {"class_weights": [1.0, float("inf")]}, "finite"),
        ("weighted_ce", {"class_weights": [1.0, -1.0]}, "below 0"),
        ("joint", {"joint_ce": "dice"}, "joint_ce must be"),
        ("joint", {"joint_ce": "weighted_ce"}, "'weighted_ce' needs one number per class; got none"),
        ("joint", {"class_weights": [1.0, 2.0]}, "class_weights does not apply to loss 'ce'"),
        ("joint", {"focal_gamma": 2.0}, "focal_gamma does not apply to loss 'ce', which takes no options"),
        ("joint", {"joint_ce": "focal", "focal_gama": 2.0}, "focal_gama does not apply to loss 'focal'"),
        ("joint", {"dice_weight": 1.5}, "dice_weight must be in 0..1"),
        ("dice", {"dice_smooth": -1.0}, "dice_smooth must be 0 or more"),
    ],
)
def test_wrong_options_are_refused_by_name(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_loss(name, **options)


def test_wrong_shapes_and_labels_are_refused():
    logits, masks = batch()
    for x, y, words in (
        (logits[:, :1], masks, "C of 2 or more"),
        (logits, masks[:, 1:], "masks"),
        (logits, torch.full_like(masks, 4), "class ids 0..3"),
        (logits, torch.full_like(masks, -7), "class ids 0..3"),
        (logits[:, :3], masks, "each of the 3 classes"),
    ):
        for fused in (True, False):
            with pytest.raises(ValueError, match=words):
                build("joint with weighted_ce", fused=fused)(x, y)
            if words == "class ids 0..3":
                with pytest.raises(ValueError, match=words):
                    build("joint", fused=fused)(x, y)
