"""Recording contributions costs few kernels and waits, and finds out what it finds at any price."""

import copy
import sys

import pytest
import torch
import transformers
from torch import nn

from captum_mllm import DirectLogitAttribution
from captum_mllm.adapters import find_adapter
from captum_mllm.model import direct as direct_module
from captum_mllm.model import layer_sums
from captum_mllm.model.direct import recorded_contributions
from captum_mllm.model.forward import captured_forward, evaluating
from captum_mllm.model.inputs import append_answer, read_sample
from captum_mllm.model.write_paths import FrozenNorm, write_paths
from studies.counted import counted
from tests.oracle.families import family

# At most so many kernels a layer (Gemma's second one has another mask: 8 are its), kernels once a
# forward, waits of the host a forward.
FEW = {"Llava": (13, 83, 3), "Qwen2_5_VL": (14, 83, 3), "Gemma3": (40, 78, 3)}


def recorded(subject, rows=None):
    """The contributions to some rows, the answer's by default, as a call to count."""
    adapter = find_adapter(subject.model)
    sample = read_sample(subject.inputs, adapter)
    full = append_answer(sample, subject.answer, adapter)
    ids = full["input_ids"][0]
    if rows is None:
        rows = torch.arange(len(ids) - len(subject.answer) - 1, len(ids) - 1)

    def call(record=True):
        with evaluating(adapter):
            if not record:
                return captured_forward(adapter, full, sample.grids, rows=rows)
            with recorded_contributions(
                adapter, write_paths(adapter), rows, ids[rows + 1]
            ) as found:
                captured_forward(adapter, full, sample.grids, rows=rows)
        return found[0]

    return call


def asked(subject):
    """Kernels and waits of the recording alone."""
    call = recorded(subject)
    call()
    found = []
    for record in (False, True):
        with counted() as counts:
            call(record)
        found.append((counts.kernels.total(), counts.waits.total()))
    return [more - bare for bare, more in zip(*found, strict=True)]


def shallow(subject, layers):
    """The same model with its first layers alone."""
    kin = copy.deepcopy(subject)
    decoder = kin.model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = layers
    return kin


@pytest.mark.parametrize("name", FEW)
def test_few_kernels_and_waits(name, monkeypatch):
    monkeypatch.setattr(layer_sums, "_HELD", 0)  # every layer by itself: the dearest case
    per_layer, once, waits = FEW[name]
    few, more = (asked(shallow(family(name), layers)) for layers in (1, 2))
    each = more[0] - few[0]
    assert each <= per_layer
    assert few[0] - each <= once
    assert few[1] == more[1] == waits, "a wait in every layer"


def test_layers_with_small_keys_cost_less_together(monkeypatch):
    subject = family("Qwen2_5_VL")
    together = asked(subject)[0]
    monkeypatch.setattr(layer_sums, "_HELD", 0)
    assert together < asked(subject)[0]


@pytest.mark.parametrize("setting", [{"_HELD": 0}, {"_SCRATCH": 1}, {"_SCRATCH": 1000}])
@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL", "Gemma3"])
def test_together_or_one_by_one_is_the_same(name, setting, monkeypatch):
    subject = family(name)
    expected = recorded(subject)()
    for key, value in setting.items():
        monkeypatch.setattr(layer_sums, key, value)
    got = recorded(subject)()
    for one, two in ((got.positive, expected.positive), (got.signed, expected.signed)):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6 * float(two.abs().max()))


@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_rows_with_gaps_and_in_any_order(name):
    subject = family(name)
    length = subject.inputs["input_ids"].shape[1] + len(subject.answer)
    every = recorded(subject, torch.arange(length - 6, length - 1))()
    some = recorded(subject, torch.tensor([length - 2, length - 6, length - 4]))()
    for name in ("positive", "signed", "logits"):
        torch.testing.assert_close(
            getattr(some, name), getattr(every.select(torch.tensor([4, 0, 2])), name)
        )


def test_layers_of_other_windows_are_told_apart():
    """Layers that attend within a window between layers that see everything, grouped keys."""
    subject = family("Llava")
    config = copy.deepcopy(subject.model.config)
    text = config.text_config
    config.text_config = transformers.Qwen2Config(
        vocab_size=text.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, use_sliding_window=True,
        sliding_window=7, layer_types=["full_attention", "sliding_attention"] * 3,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    found = []
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        found.append(
            DirectLogitAttribution(model).contributions(subject.inputs, subject.answer).signed
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_attention_that_is_not_softmax_is_named(monkeypatch):
    """A kernel that does something else in one layer only."""
    subject = family("Llava", attn="eager")
    layers = find_adapter(subject.model).layers
    source = sys.modules[type(layers[0].self_attn).__module__]
    plain = source.eager_attention_forward

    def other(module, query, key, value, *args, **kwargs):
        output, weights = plain(module, query, key, value, *args, **kwargs)
        if module is layers[1].self_attn:
            output = output + 0.05 * output.flip(1)
        return output, weights

    monkeypatch.setattr(source, "eager_attention_forward", other)
    with pytest.raises(ValueError, match=r"attention of layer 1 of Llava.* something else than"):
        DirectLogitAttribution(subject.model).contributions(subject.inputs, subject.answer)


class Squashing(nn.Module):
    """Not linear for any scale."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, states):
        return torch.tanh(self.norm(states))


@pytest.mark.parametrize("place", ["after attention in layer 1", "before the LM head"])
def test_a_norm_that_is_none_is_named(place):
    subject = family("Gemma3")
    decoder = subject.model.get_decoder()
    if "layer" in place:
        layer = decoder.layers[1]
        layer.post_attention_layernorm = Squashing(layer.post_attention_layernorm)
    else:
        decoder.norm = Squashing(decoder.norm)
    with pytest.raises(ValueError, match=f"the norm {place} of Gemma3.* is neither an RMSNorm"):
        DirectLogitAttribution(subject.model).contributions(subject.inputs, subject.answer)


def test_norms_are_read_once(monkeypatch):
    subject = family("Gemma3")
    call = recorded(subject)
    call()
    norms = [path.norm for path in write_paths(find_adapter(subject.model))]
    calls = []
    for norm in norms:
        plain = norm.forward
        monkeypatch.setattr(
            norm, "forward", lambda x, n=norm, f=plain: (calls.append(id(n)), f(x))[1]
        )
    call()  # a forward was replaced: the paths are found again
    calls.clear()
    call()
    assert sorted(calls) == sorted(2 * [id(norm) for norm in norms])  # in the forward, and read


def test_norms_read_together_are_those_read_alone():
    rms, layer = nn.RMSNorm(6), nn.LayerNorm(6)
    for norm in (rms, layer):
        nn.init.normal_(norm.weight)
    nn.init.normal_(layer.bias)
    like = [torch.zeros(1, 6)] * 2
    with torch.no_grad():
        together = FrozenNorm.of_each([rms, layer], like)
        for norm, got, centred in zip((rms, layer), together, (False, True), strict=True):
            alone = FrozenNorm.of(norm, like[0])
            assert got.centred == alone.centred == centred
            assert (got.offset is None) == (not centred)
            assert torch.equal(got.gain, alone.gain)
            states = torch.randn(4, 6)
            scale, error = got.scales(states, norm(states))
            assert float(error) < 1e-5
            linear = states - states.mean(1, keepdim=True) * centred
            expected = scale[:, None] * norm.weight * linear + (norm.bias if centred else 0)
            torch.testing.assert_close(norm(states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL", "Gemma3"])
def test_half_precision_is_near_float32_arithmetic(name, dtype, monkeypatch):
    """The same forward in half precision; what is computed from it, in half and in single."""
    subject = family(name, dtype=dtype)
    got = recorded(subject)().signed
    monkeypatch.setattr(direct_module, "_single", torch.Tensor.float)
    exact = recorded(subject)().signed
    assert got.dtype == exact.dtype == torch.float32
    assert not torch.equal(got, exact)
    share = 1e-2 if dtype == torch.bfloat16 else 2e-3
    assert float((got - exact).abs().max()) <= share * float(exact.abs().max())
