"""Batch normalization over the images of all processes, on GPUs and on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the batches of all processes together.

    Replaces torch's SyncBatchNorm, which selects the processes that have data by a boolean mask, three times
    per layer and step: each makes the host wait for the GPU. Here every process has data. It also runs on
    CPUs, and stays a BatchNorm2d, so that it is folded into convolutions like any other.

    Shape:
        (N, C, H, W) → (N, C, H, W).
    """

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Normalize; in evaluation, or with one process, exactly as `nn.BatchNorm2d`."""
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        mean, variance, count = _global_statistics(x.detach())
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, variance, count, self.eps)


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (C,), biased variance (C,) and number of values per channel over all processes, float32."""
    variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
    count = torch.full_like(mean[:1], x.numel() / x.shape[1])
    own = torch.cat([mean, variance, count])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    variance = ((variances + (means - mean) ** 2) * counts).sum(0) / total  # within and between processes
    return mean, variance, total


class _Normalize(torch.autograd.Function):
    """Batch normalization by given statistics, with the gradient that includes their dependence on x.

    With x̂ = (x - mean) / sqrt(var + eps), g = dL/dy and M values per channel over all processes,
    dL/dx = w / sqrt(var + eps) * (g - sum(g) / M - x̂ sum(g x̂) / M)   (Ioffe and Szegedy, 2015, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        """Normalize (N, C, H, W)."""
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias; the last two are those of this process's images."""
        x, weight, mean, variance, count = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )  # grad_x = w / sqrt(var + eps) * g, grad_weight = sum(g x̂), grad_bias = sum(g)
        sums = torch.stack([grad_weight, grad_bias]).float()
        dist.all_reduce(sums)
        sum_gx, sum_g = sums / count
        inverse_std = (variance + ctx.eps).rsqrt()
        slope = -weight * inverse_std * sum_gx * inverse_std
        offset = -weight * inverse_std * sum_g - slope * mean
        correction = torch.addcmul(offset[:, None, None], slope[:, None, None], x)
        return grad_x + correction.to(grad_x.dtype), grad_weight, grad_bias, None, None, None, None


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Make every batch norm of `model` a `SyncBatchNorm2d` with the same parameters and buffers, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            synchronized = SyncBatchNorm2d(module.num_features, module.eps, module.momentum)
            synchronized.__dict__.update(module.__dict__)  # parameters and buffers themselves, and the mode
            model.set_submodule(name, synchronized)
    return model
