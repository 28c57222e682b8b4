import math

import pytest
import torch
from torch import nn

from utils.optim import OPTIMIZERS, SCHEDULES, Schedule, build_optimizer, depends_on_length


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.backbone(x))


def schedule_for(name, lr=0.1, steps_per_epoch=5, epochs=4, **options):
    optimizer = build_optimizer(Net(), "sgd", lr, backbone_lr_scale=0.1)
    return Schedule(optimizer, name, steps_per_epoch=steps_per_epoch, epochs=epochs, **options)


def lrs(schedule):
    return [group["lr"] for group in schedule.optimizer.param_groups]


def run(schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append(lrs(schedule)[0])
        schedule.step()
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_decay_weights_alone_and_scale_the_learning_rate_of_the_backbone(name):
    optimizer = build_optimizer(Net(), name, 0.1, weight_decay=1e-4, backbone_lr_scale=0.1)
    groups = {g["name"]: (g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert groups == {
        "head": (["head.weight"], 0.1, 1e-4),
        "head.no_decay": (["head.bias"], 0.1, 0.0),
        "backbone": (["backbone.0.weight"], pytest.approx(0.01), 1e-4),
        "backbone.no_decay": (
            ["backbone.0.bias", "backbone.1.weight", "backbone.1.bias"],
            pytest.approx(0.01),
            0.0,
        ),
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_updates_every_parameter(name):
    torch.manual_seed(0)
    net = Net()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = build_optimizer(net, name, 0.1)
    net(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    # the bias in front of a batch norm has no gradient but rounding errors
    same = [key for key, p in net.named_parameters() if torch.equal(p, before[key])]
    assert set(same) <= {"backbone.0.bias"}


def test_defaults_are_the_usual_ones():
    adam, sgd, rmsprop = (build_optimizer(Net(), name, 0.1).defaults for name in ("adam", "sgd", "rmsprop"))
    assert adam["betas"] == (0.9, 0.999) and adam["eps"] == 1e-8 and not adam["amsgrad"]
    assert sgd["momentum"] == 0.9 and sgd["nesterov"]
    assert rmsprop["momentum"] == 0.9 and rmsprop["alpha"] == 0.99 and not rmsprop["centered"]
    assert not build_optimizer(Net(), "sgd", 0.1, momentum=0).defaults["nesterov"]


@pytest.mark.parametrize(("name", "torchs"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_and_adamw_are_torchs_and_copy_no_gradient_in_channels_last(name, torchs):
    torch.manual_seed(0)
    ours, theirs = (nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0}]
    optimizers = [build_optimizer(ours, name, 0.01, weight_decay=0.1), torchs(groups, 0.01)]
    for _ in range(3):
        x = torch.rand(2, 8, 5, 5)
        for conv, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            conv(x).square().sum().backward()
            with torch.profiler.profile() as profile:
                optimizer.step()
            names = [event.name for event in profile.events()]
            assert conv is theirs or f"aten::_fused_{name}_" in names and "aten::clone" not in names
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight.shape == optimizers[0].state[ours.weight]["exp_avg"].shape
    torchs(build_optimizer(theirs, name, 0.01).param_groups).load_state_dict(optimizers[0].state_dict())


def test_frozen_parameters_are_left_out():
    net = Net()
    net.backbone.requires_grad_(False)
    optimizer = build_optimizer(net, "adam", 0.1)
    assert [g["name"] for g in optimizer.param_groups] == ["head", "head.no_decay"]
    with pytest.raises(ValueError, match="backbone_lr_scale 0.1 needs a backbone that is trained"):
        build_optimizer(net, "adam", 0.1, backbone_lr_scale=0.1)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of Net is trainable"):
        build_optimizer(net, "adam", 0.1)


def test_tied_parameters_are_in_one_group_once():
    net = Net()
    net.tied = net.head
    assert sum(len(g["params"]) for g in build_optimizer(net, "adam", 0.1).param_groups) == 6


def test_schedules_equal_their_closed_forms_at_every_step():
    forms = {
        "step": ({"step_size": 2, "step_gamma": 0.1}, lambda k: 0.1 ** (k // 10)),
        "poly": ({"poly_power": 0.9}, lambda k: (1 - k / 20) ** 0.9),
        "cosine": ({}, lambda k: 0.5 * (1 + math.cos(math.pi * k / 20))),
        "none": ({}, lambda k: 1.0),
    }
    for name, (options, factor) in forms.items():
        schedule = schedule_for(name, **options)
        expected = [0.1 * factor(k) for k in range(20)]
        assert schedule.plan() == pytest.approx(expected, rel=1e-12), name
        assert run(schedule, 20) == schedule.plan(), name


def test_step_schedule_equals_torchs():
    schedule = schedule_for("step", steps_per_epoch=1, epochs=12, step_size=3, step_gamma=0.5)
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for planned in schedule.plan():
        assert planned == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_cosine_schedule_equals_torchs():
    schedule = schedule_for("cosine")
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for planned in schedule.plan():
        assert planned == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["poly", "cosine"])
def test_poly_and_cosine_fall_at_every_step_and_are_0_only_past_the_end(name):
    schedule = schedule_for(name)
    seen = run(schedule, 20)
    assert all(later < earlier for earlier, later in zip(seen, seen[1:], strict=False)) and seen[-1] > 0
    assert run(schedule, 3) == [0.0] * 3


def test_schedules_that_end_at_zero_depend_on_the_length_of_the_run():
    assert [name for name in SCHEDULES if depends_on_length(name)] == ["poly", "cosine"]
    for name in SCHEDULES:
        short, long = (schedule_for(name, epochs=epochs).plan()[3] for epochs in (4, 8))
        assert (short != long) == depends_on_length(name), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_linearly_and_then_the_schedule_begins_at_the_base_learning_rate(name):
    schedule = schedule_for(name, warmup_steps=4)
    assert run(schedule, 5) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert schedule.plan()[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert len(schedule.plan()) == 20 and schedule.plan()[-1] > 0


def test_warm_up_takes_at_most_half_the_run():
    assert schedule_for("none", warmup_steps=100).plan() == pytest.approx(
        [k / 110 for k in range(1, 11)] + [0.1] * 10
    )


@pytest.mark.parametrize(
    ("name", "factor"),
    [("poly", lambda t: (1 - t) ** 0.9), ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2)],
)
def test_poly_and_cosine_run_over_the_steps_after_the_warm_up(name, factor):
    expected = [0.1 * factor(k / 16) for k in range(16)]
    assert schedule_for(name, warmup_steps=4).plan()[4:] == pytest.approx(expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_backbone_keeps_its_factor_on_the_learning_rate(name):
    schedule = schedule_for(name, warmup_steps=2)
    for _ in range(12):
        head, _, backbone, _ = lrs(schedule)
        assert backbone == pytest.approx(0.1 * head)
        schedule.step()


OPTIONS = {"step": {"step_size": 1}, "plateau": {"plateau_patience": 0}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_continues_with_the_same_digits(name):
    options = {"warmup_steps": 3, **OPTIONS.get(name, {})}
    scores = [0.5, 0.4, 0.6, 0.5]
    whole, resumed = schedule_for(name, **options), schedule_for(name, **options)
    for k in range(20):
        if k == 13:  # a new process: a fresh schedule and optimizer, both loaded
            saved = resumed
            resumed = schedule_for(name, **options)
            resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
            resumed.load_state_dict(saved.state_dict())
        assert lrs(resumed) == lrs(whole)
        for schedule in (whole, resumed):
            schedule.step()
            if k % 5 == 4:
                schedule.epoch_end(scores[k // 5])
    plain = {"position": 20, "scores": scores, "warmup_steps": 3}
    assert resumed.state_dict() == plain


def test_plateau_follows_the_score_as_torchs_does():
    schedule = schedule_for("plateau", epochs=40, plateau_factor=0.5, plateau_patience=2)
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2, eps=0)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, generator=generator).tolist()
    for score in [*scores[:20], math.nan, *scores[20:], *[0.99, 0.99 * (1 + 5e-5)] * 3]:
        schedule.epoch_end(score)
        reference.step(score)
        assert lrs(schedule)[0] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert lrs(schedule)[0] < 0.1 * 0.5**2


def test_the_learning_rate_of_a_step_includes_the_reductions_so_far():
    schedule = schedule_for("plateau", warmup_steps=3, plateau_factor=0.1, plateau_patience=0)
    planned = schedule.plan()
    run(schedule, 10)
    for score in (0.5, 0.4, 0.3):
        schedule.epoch_end(score)
    assert schedule.lr_at(10) == pytest.approx(0.01 * planned[10]) == lrs(schedule)[0]
    assert schedule.plan() == planned


def test_epochs_without_validation_do_not_count_for_plateau():
    schedule = schedule_for("plateau", plateau_factor=0.1, plateau_patience=0)
    schedule.epoch_end(0.5)
    for _ in range(5):
        schedule.epoch_end(None)
    assert lrs(schedule)[0] == 0.1
    schedule.epoch_end(0.5)
    assert lrs(schedule)[0] == pytest.approx(0.01)


def test_an_unknown_name_or_option_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of .* Did you mean 'adam'"):
        build_optimizer(Net(), "adm", 0.1)
    with pytest.raises(ValueError, match="scheduler must be one of .* Did you mean 'poly'"):
        schedule_for("polly")
    with pytest.raises(ValueError, match="optimizer adam has no option 'momentum'"):
        build_optimizer(Net(), "adam", 0.1, momentum=0.9)
    with pytest.raises(ValueError, match="scheduler step has no option 'poly_power'"):
        schedule_for("step", poly_power=0.9)
