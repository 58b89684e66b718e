"""What training might leave in a network, and the gradients in it; benchmarks/gpu_check.py uses it, too."""

import torch
from torch import nn


def grad(parameter):
    assert parameter.grad is not None
    return parameter.grad


def randomize(model, seed=1):
    """Weights, gammas, betas and statistics far from where they start, and nowhere zero."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1 + torch.rand(module.weight.shape, generator=draw))
            if module.bias is not None:
                module.bias.data = torch.randn(module.bias.shape, generator=draw).to(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            signs = 1 - 2.0 * torch.randint(2, module.weight.shape, generator=draw)
            module.weight.data = (signs * (0.5 + torch.rand(signs.shape, generator=draw))).to(module.weight)
            module.bias.data = (0.2 + torch.rand(signs.shape, generator=draw)).to(module.bias)
            mean, variance, _ = module.buffers()
            mean.copy_(torch.randn(signs.shape, generator=draw))
            variance.copy_(0.5 + torch.rand(signs.shape, generator=draw))
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale.gamma"):
            parameter.data.fill_(1.0)  # at its initial 1e-5 whole blocks would not matter
    return model


def calibrate(model, x):
    """Give every batch norm the statistics of these images, as training would; then evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
