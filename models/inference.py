"""(to be replaced by work-models)"""
import copy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from utils.device import cpu_has_amx
from utils.winograd import use_winograd

def prepare_for_inference(model, weights=None, *, device, dtype, channels_last=True):
    channels = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels
    model = copy.deepcopy(model)
    if weights is not None:
        model.load_state_dict(weights)
    fold_batch_norm(model.to(device).eval(), channels)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(dtype, memory_format=layout)
    if torch.device(device).type != "cpu":
        return model
    if dtype == torch.float32 or not cpu_has_amx():
        use_winograd(model)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1):
            conv.dilation = (2, 2)
    return model

def fold_batch_norm(model: nn.Module, in_channels: int) -> nn.Module:
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def watch(module, inputs, output) -> None:
        if isinstance(module, nn.Conv2d):
            output.made_by = module
        elif conv := getattr(inputs[0], "made_by", None):
            pairs.append((conv, module))

    watched = [module for module in model.modules() if isinstance(module, (nn.Conv2d, _BatchNorm))]
    handles = [module.register_forward_hook(watch) for module in watched]
    with torch.no_grad():
        model(torch.zeros(1, in_channels, 64, 64, device=next(model.parameters()).device))
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in model.named_modules()}
    for conv, norm in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        model.set_submodule(names[norm], nn.Identity())
    return model.requires_grad_(False)
