"""Logits and input gradients of every network and backbone, as the code of format 1 gave them.

They are samples of float64 results, so that rounding does not hide a change. The same seed gives the same
initial weights as then.
"""

import json
from pathlib import Path

import pytest
import torch

from models import build_model

BEFORE = json.loads((Path(__file__).parent / "data" / "parity_float64.json").read_text(encoding="utf-8"))


def sample(values):
    values = values.detach().flatten().double()
    at = (torch.arange(24) * 7919 * 104729) % len(values)
    return torch.tensor([float(values.norm()), *values[at].tolist()], dtype=torch.float64)


def assert_close(values, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    largest = expected[1:].abs().max().item()
    torch.testing.assert_close(sample(values), expected, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("case", BEFORE)
def test_the_results_are_those_of_before(case):
    name, options = json.loads(case)
    options |= {"aux": True} if name == "pspnet" else {}
    torch.manual_seed(0)
    model = build_model(name, 5, **options)
    assert_close(torch.cat([p.flatten() for p in model.parameters()]), BEFORE[case]["weights"])
    assert float(torch.rand(())) == BEFORE[case]["draw"]  # as many random numbers were drawn
    model.double()
    for size in ((64, 64), (97, 65)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        for mode in ("train", "eval"):
            torch.manual_seed(2)  # for dropout
            logits = model.train(mode == "train")(images)
            logits = logits if isinstance(logits, tuple) else (logits,)
            factors = [torch.linspace(0, 1, one.numel(), dtype=torch.float64).view_as(one) for one in logits]
            loss = sum((one * factor).mean() for one, factor in zip(logits, factors, strict=True))
            expected = BEFORE[case][f"{size[0]}x{size[1]} {mode}"]
            assert_close(torch.cat([one.flatten() for one in logits]), expected["logits"])
            assert_close(torch.autograd.grad(loss, images)[0], expected["grad"])
