"""Multi-scale aggregation around captum attributors on a small CNN, against hand-written loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GradientShap,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerConductance,
    LayerGradCam,
    LayerIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import nn
from torch.testing import assert_close

from captum_mllm.functional import resize_attributions
from tests.oracle import formulas as reference
from tests.oracle.published import MultiScaleAttribution

SCALES = (1.0, 0.5, 1.5)
pytestmark = [  # captum says so of every tensor without requires_grad, and of its own hooks
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks"),
]


class Net(nn.Module):
    """Takes one or two images of any size, and a factor."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.act1, self.act2 = nn.Softplus(), nn.Softplus()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(32, 5)

    def forward(self, x, other=None, factor=1.0):
        features = self.act2(self.conv2(self.act1(self.conv1(x))))
        out = self.head(self.pool(features).flatten(1))
        if other is not None:
            out = out + 0.5 * self.head(self.pool(self.conv2(self.conv1(other))).flatten(1))
        return out * factor


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, 12, 10, dtype=torch.float64)


def resized(tensor, scale, mode="bilinear"):
    if scale == 1.0:
        return tensor
    size = (round(tensor.shape[-2] * scale), round(tensor.shape[-1] * scale))
    if mode == "nearest":
        return F.interpolate(tensor.double(), size=size, mode="nearest-exact").to(tensor.dtype)
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)


def mean_over_scales(attribute_at, size, preserve="mass", scales=SCALES):
    """Attribute at each scale, bring back by the slow twin, average."""
    total = 0
    for scale in scales:
        total = total + reference.resize_attributions(attribute_at(scale).detach(), size, preserve)
    return total / len(scales)


def check(actual, expected):
    largest = float(expected.detach().abs().max())
    assert largest > 0
    assert_close(actual.double(), expected.double(), rtol=0, atol=1e-6 * largest)


METHODS = {
    "ig": (IntegratedGradients, {"n_steps": 8}),
    "saliency": (Saliency, {}),
    "signed-saliency": (Saliency, {"abs": False}),
    "input-x-gradient": (InputXGradient, {}),
    "ablation": (FeatureAblation, {}),
}


@pytest.mark.parametrize("resize", ["mass", "density"])
@pytest.mark.parametrize("name", ["ig", "saliency", "signed-saliency", "input-x-gradient"])
def test_equals_a_loop(net, x, name, resize):
    kind, options = METHODS[name]
    method = kind(net)
    got = MultiScaleAttribution(method, SCALES, resize=resize).attribute(x, target=3, **options)
    expected = mean_over_scales(
        lambda s: method.attribute(resized(x, s), target=3, **options), (12, 10), resize
    )
    check(got, expected)
    assert got.shape == x.shape


@pytest.mark.parametrize("aggregation", ["mean", "median"])
@pytest.mark.parametrize("name", METHODS)
def test_scale_one_alone_is_the_base(net, x, name, aggregation):
    kind, options = METHODS[name]
    method = kind(net)
    got = MultiScaleAttribution(method, (1.0,), aggregation).attribute(x, target=3, **options)
    assert torch.equal(got, method.attribute(x, target=3, **options))


def test_the_callers_tensor_is_left_alone(net, x):
    x.requires_grad_()
    MultiScaleAttribution(Saliency(net), SCALES).attribute(x, target=3)
    assert x.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("target", [3, [1, 4], torch.tensor([1, 4]), [(1,), (4,)]], ids=str)
def test_targets_per_example(net, x, target):
    method = IntegratedGradients(net)
    got = MultiScaleAttribution(method, SCALES).attribute(x, target=target, n_steps=4)
    expected = mean_over_scales(
        lambda s: method.attribute(resized(x, s), target=target, n_steps=4), (12, 10)
    )
    check(got, expected)


@pytest.mark.parametrize("kind", ["none", "number", "tensor", "one-row", "random"])
def test_baselines_follow_the_input(net, x, kind):
    base = {
        "none": None,
        "number": 0.3,
        "tensor": torch.rand_like(x),
        "one-row": torch.rand(1, 3, 12, 10, dtype=x.dtype),
        "random": torch.rand(2, 3, 12, 10, dtype=x.dtype),
    }[kind]
    method = IntegratedGradients(net)
    got = MultiScaleAttribution(method, SCALES).attribute(x, base, 3, n_steps=6)

    def at(scale):
        scaled = resized(base, scale) if isinstance(base, torch.Tensor) else base
        return method.attribute(resized(x, scale), scaled, 3, n_steps=6)

    check(got, mean_over_scales(at, (12, 10)))


def test_positional_arguments(net, x):
    base = torch.rand_like(x)
    msa = MultiScaleAttribution(IntegratedGradients(net), SCALES)
    by_name = msa.attribute(
        inputs=x, baselines=base, target=3, additional_forward_args=(None, 2.0), n_steps=4,
        return_convergence_delta=True,
    )  # fmt: skip
    by_place = msa.attribute(x, base, 3, (None, 2.0), 4, "gausslegendre", None, True)
    for one, two in zip(by_name, by_place, strict=True):
        assert torch.equal(one, two)


def test_additional_forward_args_go_through(net, x):
    msa = MultiScaleAttribution(Saliency(net), SCALES)
    once = msa.attribute(x, target=3)
    thrice = msa.attribute(x, target=3, additional_forward_args=(None, 3.0))
    check(thrice, 3 * once)


@pytest.mark.parametrize("baseline", ["number", "tensor"])
def test_convergence_delta_and_completeness(net, x, baseline):
    """Sums equal the mean over scales of f(x_s) - f(b_s), per example; deltas are its error."""
    base = 0.2 if baseline == "number" else torch.rand_like(x)
    msa = MultiScaleAttribution(IntegratedGradients(net), SCALES)
    assert msa.has_convergence_delta()
    got, delta = msa.attribute(x, base, target=3, n_steps=64, return_convergence_delta=True)
    changes = []
    with torch.no_grad():
        for s in SCALES:
            at = resized(x, s)
            b = torch.full_like(at, 0.2) if baseline == "number" else resized(base, s)
            changes.append((net(at) - net(b))[:, 3])
    difference = torch.stack(changes).mean(0)
    assert delta.shape == (2,)
    assert_close(got.sum((1, 2, 3)), difference + delta, rtol=1e-9, atol=1e-12)
    assert_close(got.sum((1, 2, 3)), difference, rtol=0, atol=1e-6)


def test_completeness_of_coarse_steps_is_in_the_delta(net, x):
    msa = MultiScaleAttribution(IntegratedGradients(net, multiply_by_inputs=True), (1.0, 0.7))
    got, delta = msa.attribute(
        x, target=1, n_steps=2, method="riemann_left", return_convergence_delta=True
    )
    deltas, changes = [], []
    for s in (1.0, 0.7):
        _, one = IntegratedGradients(net).attribute(
            resized(x, s), target=1, n_steps=2, method="riemann_left", return_convergence_delta=True
        )
        deltas.append(one)
        with torch.no_grad():
            changes.append((net(resized(x, s)) - net(torch.zeros_like(resized(x, s))))[:, 1])
    assert float(delta.abs().max()) > 1e-4
    assert_close(delta, torch.stack(deltas).mean(0))
    assert_close(got.sum((1, 2, 3)) - torch.stack(changes).mean(0), delta, rtol=1e-9, atol=1e-12)


def test_deep_lift_and_its_delta(x):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).double()
    method = DeepLift(net)
    got, delta = MultiScaleAttribution(method, SCALES).attribute(
        x, target=2, return_convergence_delta=True
    )
    expected = mean_over_scales(lambda s: method.attribute(resized(x, s), target=2), (12, 10))
    check(got, expected)
    with torch.no_grad():
        changes = [(net(resized(x, s)) - net(0 * resized(x, s)))[:, 2] for s in SCALES]
    assert_close(got.sum((1, 2, 3)), torch.stack(changes).mean(0) + delta)
    assert_close(delta, torch.zeros(2, dtype=delta.dtype), rtol=0, atol=1e-9)


# ---- masks, windows, tuples -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 12, 10), (2, 3, 12, 10), (12, 10)], ids=str)
def test_feature_masks_follow_the_input(net, x, shape):
    rows = torch.arange(12)[:, None] // 6
    cols = torch.arange(10)[None, :] // 5
    mask = (rows * 2 + cols).expand(shape).clone()
    method = FeatureAblation(net)
    got = MultiScaleAttribution(method, SCALES).attribute(x, target=3, feature_mask=mask)

    def at(scale):
        four = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        scaled = resized(four, scale, "nearest").long()
        assert sorted(scaled.unique().tolist()) == [0, 1, 2, 3]
        return method.attribute(resized(x, scale), target=3, feature_mask=scaled)

    check(got, mean_over_scales(at, (12, 10)))


def test_occlusion(net, x):
    method = Occlusion(net)
    options = {"target": 3, "sliding_window_shapes": (3, 2, 2), "strides": (3, 2, 2)}
    base = torch.rand_like(x)
    got = MultiScaleAttribution(method, SCALES).attribute(x, baselines=base, **options)
    expected = mean_over_scales(
        lambda s: method.attribute(resized(x, s), baselines=resized(base, s), **options), (12, 10)
    )
    check(got, expected)


def test_tuples_of_inputs(net, x):
    other = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    bases = (torch.rand_like(x), 0.1)
    method = IntegratedGradients(net)
    got, delta = MultiScaleAttribution(method, SCALES).attribute(
        (x, other), bases, target=3, n_steps=4, return_convergence_delta=True
    )
    assert isinstance(got, tuple)
    assert delta.shape == (2,)
    for n, size in enumerate([(12, 10), (8, 8)]):
        expected = mean_over_scales(
            lambda s, n=n: method.attribute(
                (resized(x, s), resized(other, s)), (resized(bases[0], s), 0.1), 3, n_steps=4
            )[n],
            size,
        )
        check(got[n], expected)
    single = MultiScaleAttribution(method, SCALES).attribute((x,), target=3, n_steps=2)
    assert isinstance(single, tuple)
    assert torch.equal(
        single[0], MultiScaleAttribution(method, SCALES).attribute(x, target=3, n_steps=2)
    )


def test_tuples_of_masks(net, x):
    other = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    masks = (torch.zeros(1, 1, 12, 10).long(), torch.ones(1, 1, 8, 8).long())
    method = FeatureAblation(net)
    got = MultiScaleAttribution(method, SCALES).attribute((x, other), target=3, feature_mask=masks)
    for n, size in enumerate([(12, 10), (8, 8)]):
        expected = mean_over_scales(
            lambda s, n=n: method.attribute(
                (resized(x, s), resized(other, s)),
                target=3,
                feature_mask=tuple(resized(m, s, "nearest") for m in masks),
            )[n],
            size,
        )
        check(got[n], expected)


def test_gradient_shap_with_a_distribution_of_baselines(net, x):
    base = torch.rand(5, 3, 12, 10, dtype=torch.float64)
    method = GradientShap(net)

    def run(at):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 (captum draws from it)
        return at()

    options = {"target": 3, "n_samples": 3, "stdevs": 0.1}
    got, delta = run(
        lambda: MultiScaleAttribution(method, (0.5,)).attribute(
            x, base, return_convergence_delta=True, **options
        )
    )
    expected, delta_twin = run(
        lambda: method.attribute(
            resized(x, 0.5), resized(base, 0.5), return_convergence_delta=True, **options
        )
    )
    check(got, reference.resize_attributions(expected.detach(), (12, 10), "mass"))
    assert_close(delta, delta_twin)


# ---- layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [SCALES, (0.5, 1.5)], ids=str)
@pytest.mark.parametrize("resize", ["mass", "density"])
@pytest.mark.parametrize("layer", ["conv1", "conv2"])
def test_layer_grad_cam(net, x, layer, resize, scales):
    """Brought to the layer's size at scale 1, whether or not scale 1 is among the scales."""
    method = LayerGradCam(net, getattr(net, layer))
    got = MultiScaleAttribution(method, scales, resize=resize).attribute(x, target=3)
    size = {"conv1": (12, 10), "conv2": (6, 5)}[layer]
    expected = mean_over_scales(
        lambda s: method.attribute(resized(x, s), target=3), size, resize, scales
    )
    check(got, expected)
    assert got.shape == (2, 1, *size)


def test_layer_scale_one_alone_is_the_base(net, x):
    method = LayerGradCam(net, net.conv2)
    got = MultiScaleAttribution(method, (1.0,)).attribute(x, target=3, relu_attributions=True)
    assert torch.equal(got, method.attribute(x, target=3, relu_attributions=True))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LayerActivation, {}), (LayerConductance, {"target": 3, "n_steps": 4}),
     (LayerIntegratedGradients, {"target": 3, "n_steps": 4})],
)  # fmt: skip
def test_other_layer_methods(net, x, kind, options):
    method = kind(net, net.conv2)
    got = MultiScaleAttribution(method, SCALES).attribute(x, **options)
    check(got, mean_over_scales(lambda s: method.attribute(resized(x, s), **options), (6, 5)))


def test_layer_without_a_grid(net, x):
    """A linear layer's attributions have one size at every scale and need no resizing."""
    method = LayerConductance(net, net.head)
    got = MultiScaleAttribution(method, SCALES).attribute(x, target=3, n_steps=4)
    total = sum(method.attribute(resized(x, s), target=3, n_steps=4) for s in SCALES)
    check(got, total / len(SCALES))


def test_layer_with_a_changing_length_is_refused(x):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.flat = nn.Conv2d(3, 4, 3).double(), nn.Flatten(2)

        def forward(self, x):
            return self.flat(self.conv(x)).mean(-1)

    net = Tokens()
    with pytest.raises(ValueError, match=r"attribution_method gives attributions of shape"):
        MultiScaleAttribution(LayerActivation(net, net.flat), SCALES).attribute(x)


def test_guided_grad_cam(net, x):
    relu = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    method = GuidedGradCam(relu, relu[0])
    got = MultiScaleAttribution(method, SCALES).attribute(x, target=1)
    expected = mean_over_scales(lambda s: method.attribute(resized(x, s), target=1), (12, 10))
    check(got, expected)


# ---- noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel_inside(net, x, nt_type):
    options = {"nt_type": nt_type, "nt_samples": 4, "stdevs": 0.2, "target": 3}
    method = NoiseTunnel(Saliency(net))
    torch.manual_seed(5)
    got = MultiScaleAttribution(method, SCALES).attribute(x, **options)
    torch.manual_seed(5)
    expected = mean_over_scales(lambda s: method.attribute(resized(x, s), **options), (12, 10))
    check(got, expected)


def test_noise_tunnel_inside_with_baselines_and_delta(net, x):
    base = torch.rand_like(x)
    options = {"nt_samples": 3, "stdevs": 0.1, "target": 3, "n_steps": 3}
    method = NoiseTunnel(IntegratedGradients(net))
    torch.manual_seed(5)
    got, delta = MultiScaleAttribution(method, (0.5,)).attribute(
        x, baselines=base, return_convergence_delta=True, **options
    )
    torch.manual_seed(5)
    expected, delta_twin = method.attribute(
        resized(x, 0.5), baselines=resized(base, 0.5), return_convergence_delta=True, **options
    )
    check(got, reference.resize_attributions(expected, (12, 10), "mass"))
    assert_close(delta, delta_twin)


def test_noise_tunnel_outside(net, x):
    """NoiseTunnel(MultiScaleAttribution(Saliency)): captum's own wrapper takes ours."""
    msa = MultiScaleAttribution(Saliency(net), SCALES)
    torch.manual_seed(5)
    got = NoiseTunnel(msa).attribute(x, nt_samples=4, stdevs=0.2, target=[1, 4])
    torch.manual_seed(5)
    noisy = x.repeat_interleave(4, 0) + torch.normal(0, torch.full((8, 3, 12, 10), 0.2))
    rows = msa.attribute(noisy, target=[1, 1, 1, 1, 4, 4, 4, 4])
    check(got, rows.unflatten(0, (2, 4)).mean(1))


# ---- refusals -------------------------------------------------------------------------------


def test_delta_needs_the_mean(net, x):
    msa = MultiScaleAttribution(IntegratedGradients(net), SCALES, "median")
    with pytest.raises(ValueError, match=r"return_convergence_delta needs aggregation='mean'"):
        msa.attribute(x, target=3, return_convergence_delta=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": torch.zeros(2, 3, 11, 10).double()}, r"baselines of shape .*can't follow"),
        ({"baselines": torch.zeros(3).double()}, r"baselines of shape .*can't follow"),
        ({"baselines": torch.zeros(2, 3, 12, 10).long()}, r"baselines must be floating point"),
    ],
)
def test_baselines_that_cannot_follow(net, x, options, message):
    with pytest.raises(ValueError, match=message):
        MultiScaleAttribution(IntegratedGradients(net), SCALES).attribute(x, target=3, **options)


def test_baselines_of_a_kind_that_cannot_follow(net, x):
    with pytest.raises(TypeError, match=r"baselines must be a tensor, a number"):
        MultiScaleAttribution(IntegratedGradients(net), SCALES).attribute(x, "zero", target=3)


@pytest.mark.parametrize("bad", [torch.ones(3, 12, 10), torch.ones(2, 5), [1.0], (None,)])
def test_inputs_that_are_no_images(net, bad):
    with pytest.raises(ValueError, match=r"inputs must be tensors \(N, C, H, W\)"):
        MultiScaleAttribution(Saliency(net), SCALES).attribute(bad, target=3)


def test_a_mapping_around_a_pixel_attributor(net):
    with pytest.raises(TypeError, match=r"inputs is a mapping, but Saliency does not trace"):
        MultiScaleAttribution(Saliency(net)).attribute({"pixel_values": 1}, target=3)


def test_a_scale_below_one_pixel(net, x):
    with pytest.raises(ValueError, match=r"scales: 0\.01 .*smaller than one pixel"):
        MultiScaleAttribution(Saliency(net), (1.0, 0.01)).attribute(x, target=3)


def test_scales_of_one_size_are_dropped(net, x):
    with pytest.warns(UserWarning, match=r"scale 1\.01 comes out at the same size as scale 1\.0"):
        got = MultiScaleAttribution(Saliency(net), (1.0, 1.01, 0.5)).attribute(x, target=3)
    assert torch.equal(got, MultiScaleAttribution(Saliency(net), (1.0, 0.5)).attribute(x, target=3))


def test_mass_is_kept_at_every_scale(net, x):
    back = resize_attributions(torch.rand(2, 3, 17, 5, dtype=torch.float64), (12, 10))
    assert back.shape == (2, 3, 12, 10)
    for scale in (0.4, 0.9, 1.3, 2.0):
        method = InputXGradient(net)
        got = MultiScaleAttribution(method, (scale,)).attribute(x, target=3)
        total = method.attribute(resized(x, scale), target=3).sum((1, 2, 3))
        assert_close(got.sum((1, 2, 3)), total)
