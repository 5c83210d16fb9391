"""Torch's functions under LocalAttention: every position hears itself only."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from captum_mllm.adapters.hooks import contiguous_gradients
from captum_mllm.model.locality import LocalAttention


def heard(function, x, axes):
    """For each output position, which input positions its gradient touches."""
    x = x.clone().requires_grad_(True)
    with LocalAttention():
        y = function(x)
    places = [range(y.shape[axis]) for axis in axes]
    found = {}
    for at in (
        [(i, j) for i in places[0] for j in places[1]]
        if len(axes) == 2
        else [(i,) for i in places[0]]
    ):
        index = [slice(None)] * y.ndim
        for axis, i in zip(axes, at, strict=True):
            index[axis] = i
        weights = torch.randn(y[tuple(index)].shape, generator=torch.Generator().manual_seed(0))
        (g,) = torch.autograd.grad((y[tuple(index)] * weights).sum(), x, retain_graph=True)
        others = [axis for axis in range(x.ndim) if axis not in axes]
        found[at] = {tuple(p) for p in (g.abs().sum(others) > 0).nonzero().tolist()}
    return found


def states(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_fused_attention_with_grouped_values():
    x = states(1, 4, 6, 8)

    def attend(x):
        return F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True)

    with LocalAttention() as mode:
        y = attend(x)
    assert_close(y, x[:, :2].repeat_interleave(2, 1))
    assert mode.mixed["self-attention"] == 1
    assert all(places == {at} for at, places in heard(attend, x, (2,)).items())


def test_softmax_attention():
    x = states(1, 2, 6, 8)

    def attend(x):
        return (x @ x.mT).softmax(-1) @ x

    assert all(places == {at} for at, places in heard(attend, x, (2,)).items())


def test_torchs_own_attention_layer():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = states(1, 5, 16)
    found = heard(lambda x: layer(x, x, x, need_weights=False)[0], x, (1,))
    assert all(places == {at} for at, places in found.items())
    with LocalAttention():
        y, _ = layer(x, x, x)
    weight, bias = layer.in_proj_weight.chunk(3)[2], layer.in_proj_bias.chunk(3)[2]
    assert_close(y, layer.out_proj(F.linear(x, weight, bias)))


def test_queries_are_left_alone():
    x, q = states(1, 2, 6, 8), states(1, 2, 3, 8)
    with LocalAttention() as mode:
        y = F.scaled_dot_product_attention(q, x, x)
    assert_close(y, F.scaled_dot_product_attention(q, x, x))
    assert mode.mixed["3 queries to 6 keys"] == 1


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 1, 1), (7, 1, 3), (3, 2, 1), (7, 2, 3), (4, 2, 1), (2, 2, 0)],
)
def test_convolutions_keep_their_own_cell(kernel, stride, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, kernel, stride, padding)
    size = 8
    found = heard(conv, states(1, 3, size, size), (2, 3))
    for (row, col), places in found.items():
        cell = {(row * stride + i, col * stride + j) for i in range(stride) for j in range(stride)}
        assert places == cell, (row, col)


def test_strings_of_padding_and_other_dimensions():
    same = nn.Conv1d(3, 4, 5, padding="same")
    assert all(p == {at} for at, p in heard(same, states(1, 3, 7), (2,)).items())


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x + F.adaptive_avg_pool2d(x, 1),
        lambda x: x + F.adaptive_max_pool2d(x, (1, 1)),
        lambda x: x * (1 + x.mean((2, 3), keepdim=True)),
        lambda x: x * (1 + torch.mean(x, dim=(-2, -1), keepdim=True)),
        lambda x: F.group_norm(x, 2, torch.ones(4), torch.zeros(4)),
    ],
)
def test_what_spans_the_picture_is_gone(pool):
    found = heard(pool, states(1, 4, 3, 3), (2, 3))
    assert all(places == {at} for at, places in found.items())


def test_nothing_changes_outside_of_the_mode():
    x = states(1, 2, 6, 8)
    before = F.scaled_dot_product_attention(x, x, x)
    with LocalAttention():
        pass
    assert_close(F.scaled_dot_product_attention(x, x, x), before)


def test_gradients_through_batch_norms_are_right():
    """A gradient laid out as attention over a map of features leaves it (FastViT, batch of 1)."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    norm.running_var.uniform_(0.5, 2)
    x, gradient = states(1, 8, 4, 4).requires_grad_(True), states(1, 8, 4, 4)
    transposed = torch.empty_strided(gradient.shape, (8, 1, 32, 8)).copy_(gradient)
    with contiguous_gradients(norm):
        y = norm(x)
    (got,) = torch.autograd.grad(y, x, transposed)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert_close(got, gradient * factor[:, None, None])
    assert not norm._forward_hooks
