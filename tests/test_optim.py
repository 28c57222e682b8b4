import math

import pytest
import torch
from torch import nn

from utils.optim import OPTIMIZERS, SCHEDULES, Schedule, build_optimizer


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


def rates(schedule):
    return [group["lr"] for group in schedule.optimizer.param_groups]


def run(schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append(rates(schedule)[0])
        schedule.step()
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_give_decay_to_weights_alone_and_their_own_rate_to_the_backbone(name):
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
def test_every_optimizer_moves_every_parameter(name):
    torch.manual_seed(0)
    net = Net()
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    optimizer = build_optimizer(net, name, 0.1)
    net(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    # the bias in front of a batch norm has no gradient but rounding's
    same = [key for key, p in net.named_parameters() if torch.equal(p, before[key])]
    assert set(same) <= {"backbone.0.bias"}


def test_defaults_are_the_fields_usual_ones():
    adam, sgd, rmsprop = (build_optimizer(Net(), name, 0.1).defaults for name in ("adam", "sgd", "rmsprop"))
    assert adam["betas"] == (0.9, 0.999) and adam["eps"] == 1e-8 and not adam["amsgrad"]
    assert sgd["momentum"] == 0.9 and sgd["nesterov"]
    assert rmsprop["momentum"] == 0.9 and rmsprop["alpha"] == 0.99 and not rmsprop["centered"]
    assert not build_optimizer(Net(), "sgd", 0.1, momentum=0).defaults["nesterov"]


def test_adam_is_torchs_and_copies_no_gradient_in_channels_last():
    torch.manual_seed(0)
    ours, theirs = (nn.Conv2d(8, 4, 3).to(memory_format=torch.channels_last) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        build_optimizer(ours, "adam", 0.01, weight_decay=0.1),
        torch.optim.Adam([{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias]}], 0.01),
    ]
    for _ in range(3):
        x = torch.rand(2, 8, 5, 5)
        for conv, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            conv(x).square().sum().backward()
            with torch.profiler.profile() as profile:
                optimizer.step()
            names = [event.name for event in profile.events()]
            assert conv is theirs or "aten::_fused_adam_" in names and "aten::clone" not in names
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight.shape == optimizers[0].state[ours.weight]["exp_avg"].shape
    torch.optim.Adam(build_optimizer(theirs, "adam", 0.01).param_groups).load_state_dict(
        optimizers[0].state_dict()
    )


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


def test_tied_parameters_stand_in_one_group_once():
    net = Net()
    net.tied = net.head
    assert sum(len(g["params"]) for g in build_optimizer(net, "adam", 0.1).param_groups) == 6


def test_step_poly_and_none_equal_their_closed_forms_at_every_step():
    forms = {
        "step": ({"step_size": 2, "step_gamma": 0.1}, lambda k: 0.1 ** (k // 10)),
        "poly": ({"poly_power": 0.9}, lambda k: (1 - k / 20) ** 0.9),
        "none": ({}, lambda k: 1.0),
    }
    for name, (options, factor) in forms.items():
        schedule = schedule_for(name, **options)
        wanted = [0.1 * factor(k) for k in range(20)]
        assert schedule.plan() == pytest.approx(wanted, rel=1e-12), name
        assert run(schedule, 20) == schedule.plan(), name


def test_step_schedule_equals_torchs():
    schedule = schedule_for("step", steps_per_epoch=1, epochs=12, step_size=3, step_gamma=0.5)
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    reference = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for planned in schedule.plan():
        assert planned == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


def test_poly_moves_every_step_and_is_0_only_past_the_end():
    schedule = schedule_for("poly")
    seen = run(schedule, 20)
    assert all(later < earlier for earlier, later in zip(seen, seen[1:], strict=False)) and seen[-1] > 0
    assert run(schedule, 3) == [0.0] * 3


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_in_a_line_and_then_the_schedule_begins_at_its_full_rate(name):
    schedule = schedule_for(name, warmup_steps=4)
    assert run(schedule, 5) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert schedule.plan()[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert len(schedule.plan()) == 20 and schedule.plan()[-1] > 0


def test_poly_after_warm_up_runs_over_the_steps_that_are_left():
    wanted = [0.1 * (1 - t / 16) ** 0.9 for t in range(16)]
    assert schedule_for("poly", warmup_steps=4).plan()[4:] == pytest.approx(wanted)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_backbone_keeps_its_share_of_the_rate(name):
    schedule = schedule_for(name, warmup_steps=2)
    for _ in range(12):
        head, _, backbone, _ = rates(schedule)
        assert backbone == pytest.approx(0.1 * head)
        schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_continues_with_the_same_digits(name):
    options = {"warmup_steps": 3, "step_size": 1, "plateau_patience": 0}
    scores = [0.5, 0.4, 0.6, 0.5]
    whole, broken = schedule_for(name, **options), schedule_for(name, **options)
    whole_rates = []
    for k in range(20):
        whole_rates.append(rates(whole))
        whole.step()
        if k % 5 == 4:
            whole.epoch_end(scores[k // 5])
    for k in range(20):
        if k == 13:  # a new process: a fresh schedule and optimizer, both loaded
            resumed = schedule_for(name, **options)
            resumed.optimizer.load_state_dict(broken.optimizer.state_dict())
            resumed.load_state_dict(broken.state_dict())
            broken = resumed
        assert rates(broken) == whole_rates[k]
        broken.step()
        if k % 5 == 4:
            broken.epoch_end(scores[k // 5])
    assert all(type(value) in (int, float) for value in broken.state_dict().values())


def test_plateau_follows_the_score_as_torchs_does():
    schedule = schedule_for("plateau", epochs=40, plateau_factor=0.5, plateau_patience=2)
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=2, eps=0)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, generator=generator).tolist()
    for score in [*scores[:20], math.nan, *scores[20:], *[0.99, 0.99 * (1 + 5e-5)] * 3]:
        schedule.epoch_end(score)
        reference.step(score)
        assert rates(schedule)[0] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert schedule.cuts > 2


def test_the_rate_of_a_step_knows_the_cuts_so_far():
    schedule = schedule_for("plateau", warmup_steps=3, plateau_patience=0)
    planned = schedule.plan()
    run(schedule, 10)
    for score in (0.5, 0.4, 0.3):
        schedule.epoch_end(score)
    assert schedule.cuts == 2
    assert schedule.rate(10) == pytest.approx(0.01 * planned[10]) == rates(schedule)[0]


def test_epochs_without_validation_do_not_count_for_plateau():
    schedule = schedule_for("plateau", plateau_patience=0)
    schedule.epoch_end(0.5)
    for _ in range(5):
        schedule.epoch_end(None)
    assert rates(schedule)[0] == 0.1
    schedule.epoch_end(0.5)
    assert rates(schedule)[0] == pytest.approx(0.01)


def test_an_unknown_name_is_refused_with_the_near_one():
    with pytest.raises(ValueError, match="optimizer must be one of .* Did you mean 'adam'"):
        build_optimizer(Net(), "adm", 0.1)
    with pytest.raises(ValueError, match="scheduler must be one of .* Did you mean 'poly'"):
        schedule_for("polly")
