"""The control that keeps the method and takes the knowledge: the model's weights, shuffled."""

import copy

import torch
from torch import nn


def shuffled_copy(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a model, the entries of each of its parameters permuted at random.

    So every tensor keeps its values' distribution and knows nothing; tied weights stay tied.
    Buffers stay as they are. Memory: the model once more, and 12 bytes per entry of its largest
    parameter meanwhile.

    Args:
        model: left as it is.
        seed: of the permutations, which are drawn on each parameter's own device (another kind of
            device draws others).

    Raises:
        ValueError: offloaded or quantised weights, which can't be permuted.

    Reference:
        Model parameter randomisation test (arXiv 1810.03292); permutation in place of anew drawn
        weights is ours.

    Example:
        >>> own = torch.nn.Linear(2, 1, bias=False)
        >>> other = shuffled_copy(own, seed=0)
        >>> torch.equal(other.weight.sort().values, own.weight.sort().values)
        True
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            raise ValueError(
                f"model: its parameter {name!r} is "
                f"{'offloaded' if parameter.is_meta else f'of {parameter.dtype}'}, so that no "
                f"copy with permuted weights can be made; load the model whole and unquantised."
            )
    other = copy.deepcopy(model)
    draws: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for parameter in other.parameters():
            device = parameter.device
            draw = draws.setdefault(device, torch.Generator(device).manual_seed(seed))
            order = torch.randperm(parameter.numel(), generator=draw, device=device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other
