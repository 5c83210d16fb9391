"""All that a model holds, before and after a call: it must be the same."""

import torch

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def state(model):
    """Everything about a model that must not change."""
    modules = dict(model.named_modules())
    return {
        "hooks": {n: [list(getattr(m, h)) for h in HOOKS] for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
        "kinds": {n: (type(m), id(m), sorted(vars(m))) for n, m in modules.items()},
        "grads": {
            n: (p.requires_grad, None if p.grad is None else p.grad.clone(), id(p), p._version)
            for n, p in model.named_parameters()
        },
        "tensors": {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def check_same(before, model):
    after = state(model)
    for name in ("hooks", "training", "kinds", "generation", "config", "modes"):
        assert before[name] == after[name], name
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
    for name, (requires, grad, *ids) in before["grads"].items():
        now_requires, now_grad, *now_ids = after["grads"][name]
        assert (requires, ids) == (now_requires, now_ids), name
        assert (grad is None) == (now_grad is None)
        assert grad is None or torch.equal(grad, now_grad)


def worn(model):
    """A model in use: training but for one part, gradients there, one part frozen, a hook."""
    model.train()
    model.model.language_model.layers[0].eval()
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.get_decoder().norm.register_forward_hook(lambda *_: None)
    return model
