"""What attention writes, by position: against the model run by hand under hooks."""

import copy
import sys
import warnings
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from captum_mllm import MSEA, DirectLogitAttribution, LogitLens
from captum_mllm.adapters import find_adapter
from captum_mllm.model import runner as runner_module
from captum_mllm.model.direct import image_maps
from captum_mllm.model.forward import evaluating
from captum_mllm.model.inputs import append_answer, read_sample
from captum_mllm.model.write_paths import write_paths
from tests.oracle.families import NAMES, family, video
from tests.oracle.model_state import check_same, state


def near(got, expected, share=1e-4):
    size = max(float(expected.abs().max()), 1e-6)
    assert float((got - expected).abs().max()) <= share * size


def by_hand(subject, inputs):
    """Signed and positive contributions, other paths and centred logits, by eager weights."""
    adapter = find_adapter(subject.model)
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation("eager")
    eager = find_adapter(model)
    sample = read_sample(inputs, adapter)
    full = append_answer(sample, subject.answer, adapter)
    seen = {}

    def keep(name):
        def hook(_module, args, kwargs, output):
            given = args[0] if args else kwargs.get("hidden_states")
            seen[name] = (given, output)

        return hook

    with ExitStack() as stack:
        parts = {"final": eager.final_norm}
        for n, layer in enumerate(eager.layers):
            attention = layer.self_attn
            parts |= {("layer", n): layer, ("attention", n): attention}
            parts[("value", n)] = attention.v_proj
            if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma's sandwich
                parts[("norm", n)] = layer.post_attention_layernorm
        for name, part in parts.items():
            handle = part.register_forward_hook(keep(name), with_kwargs=True)
            stack.callback(handle.remove)
        with torch.no_grad(), evaluating(eager):
            logits = model(**full, use_cache=False).logits[0]
    n_answer = len(subject.answer)
    length = full["input_ids"].shape[1]
    rows = torch.arange(length - n_answer - 1, length - 1)
    before, after = (t[0, rows] for t in seen["final"])
    head = eager.head.weight.detach()
    direction = (head[subject.answer] - head.mean(0)) * after / before  # its scale frozen
    first = seen[("layer", 0)][0][0, rows]
    others = (first * direction).sum(1)
    signed = torch.zeros(n_answer, length)
    positive = torch.zeros(n_answer, length)
    for n, layer in enumerate(eager.layers):
        given, made = seen[("layer", n)]
        made = made[0] if isinstance(made, tuple) else made
        output, weights = seen[("attention", n)][1][:2]
        led, written = direction, output
        if ("norm", n) in seen:
            raw, written = seen[("norm", n)]
            led = direction * written[0, rows] / raw[0, rows]
        mlp = (made - given - written)[0, rows]
        others = others + (mlp * direction).sum(1)
        if n + 1 < len(eager.layers):  # what is added between layers (deepstack)
            between = (seen[("layer", n + 1)][0] - made)[0, rows]
            others = others + (between * direction).sum(1)
        heads = weights.shape[1]
        values = seen[("value", n)][1][0]
        matrix = layer.self_attn.o_proj.weight.detach()
        width = matrix.shape[1] // heads
        groups = values.shape[1] // width
        for h in range(heads):
            group = h * groups // heads
            value = values[:, group * width : (group + 1) * width]
            wrote = value @ matrix[:, h * width : (h + 1) * width].T  # (positions, dim)
            each = weights[0, h, rows] * (led @ wrote.T)
            signed += each
            positive += each.clamp(min=0)
    centred = logits[rows].gather(1, subject.answer[:, None])[:, 0] - logits[rows].mean(1)
    return signed, positive, others, centred


def check(subject, inputs):
    got = DirectLogitAttribution(subject.model).contributions(inputs, subject.answer)
    signed, positive, others, centred = by_hand(subject, inputs)
    near(got.logits, centred)
    near(got.signed.sum(1) + others, centred)
    near(got.rest, others, 3e-4)
    near(got.signed, signed)
    near(got.positive, positive)
    near(got.signed.sum(1) + got.rest, got.logits, 1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_the_decomposition(name, attn):
    subject = family(name, attn=attn)
    check(subject, subject.encode(subject.wide_picture))


@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL", "Gemma3", "Qwen3VL"])
def test_two_images(name):
    subject = family(name, seed=1)
    check(subject, subject.encode(subject.picture, subject.other_picture))


@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Qwen3VL"])
def test_a_video(name):
    subject = family(name)
    check(subject, video(subject))
    got = DirectLogitAttribution(subject.model).attribute(video(subject), subject.answer)
    assert got.grid_attr[0].ndim == 4


@pytest.mark.parametrize("name", ["Llava", "Gemma3"])
def test_left_padding_changes_nothing(name):
    subject = family(name)
    inputs = subject.encode()
    tokens = inputs["input_ids"].shape
    padded = dict(inputs)
    for key, value in inputs.items():
        if value.shape == tokens:
            padded[key] = torch.cat([value.new_zeros(1, 3), value], 1)
    method = DirectLogitAttribution(subject.model)
    one, two = (method.contributions(given, subject.answer) for given in (inputs, padded))
    near(two.signed, one.signed, 1e-5)
    near(two.logits, one.logits, 1e-5)


def test_the_prompt_is_explained_too():
    subject = family("Llava")
    method = DirectLogitAttribution(subject.model)
    answer = method.contributions(subject.inputs, subject.answer)
    both = method.contributions(subject.inputs, subject.answer, explain="all")
    assert len(both.logits) > len(answer.logits)
    near(both.signed[-len(subject.answer) :], answer.signed, 1e-5)
    near(both.signed.sum(1) + both.rest, both.logits, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_cells_add_up_to_the_images_tokens(name):
    subject = family(name)
    adapter = find_adapter(subject.model)
    sample = read_sample(subject.encode(subject.wide_picture), adapter)
    values = torch.rand(2, len(sample.prompt_ids))
    (shown,) = image_maps(adapter, sample, values)
    (grid,), (where,) = sample.grids, sample.image_positions
    views = adapter.views(grid)
    at = torch.cat([where[view.tokens.flatten()] for view in views])
    ragged = any(edge not in (0, 1) for view in views for edge in view.box)
    near(shown.flatten(1).sum(1), values[:, at].sum(1), 0.05 if ragged else 1e-4)


@pytest.mark.parametrize("kind", ["gate", "factor"])
def test_attention_that_writes_in_another_way(kind):
    subject = family("Llava")
    attention = subject.model.get_decoder().layers[1].self_attn
    if kind == "gate":
        attention.o_proj.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    else:
        attention.register_forward_hook(lambda _, __, output: (output[0] * 0.5, *output[1:]))
    why = {"gate": "changed .a gate.", "factor": "is not the sum"}[kind]
    with pytest.raises(ValueError, match=f"in layer 1 of .*{why}"):
        DirectLogitAttribution(subject.model).attribute(subject.inputs, subject.answer)


def test_no_attention_to_read(monkeypatch):
    subject = family("Llava")
    monkeypatch.setattr(runner_module, "write_paths", lambda _: (None,) * 3)
    method = DirectLogitAttribution(subject.model)
    with pytest.warns(UserWarning, match="logit lens is used"):
        got = method.attribute(subject.inputs, subject.answer)
    lens = LogitLens(subject.model).attribute(subject.inputs, subject.answer)
    assert torch.equal(got.grid_attr[0], lens.grid_attr[0])
    with (
        pytest.warns(UserWarning, match="no softmax|softmax attention"),
        pytest.raises(ValueError, match="no layer has softmax"),
    ):
        method.contributions(subject.inputs, subject.answer)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL"])
def test_the_model_is_unchanged(name, error):
    subject = family(name)
    model = subject.model
    if error is not None:

        def fail(*_):
            raise error

        model.get_decoder().layers[-1].register_forward_hook(fail)
    before = state(model)
    settings = {n: vars(m.config).get("_attn_implementation_internal")
                for n, m in model.named_modules() if hasattr(m, "config")}  # fmt: skip
    method = DirectLogitAttribution(model)
    if error is None:
        method.attribute(subject.inputs, subject.answer)
    else:
        with pytest.raises(error):
            method.attribute(subject.inputs, subject.answer)
    check_same(before, model)
    assert settings == {n: vars(m.config).get("_attn_implementation_internal")
                        for n, m in model.named_modules() if hasattr(m, "config")}  # fmt: skip


def test_lora_on_the_projection_like_merged():
    peft = pytest.importorskip("peft")
    subject = family("Llava")
    config = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*o_proj", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, of what it calls in transformers
        model = peft.get_peft_model(copy.deepcopy(subject.model), config)
    merged = copy.deepcopy(model).merge_and_unload()
    one, two = (
        DirectLogitAttribution(m).contributions(subject.inputs, subject.answer)
        for m in (model, merged)
    )
    near(one.signed, two.signed)
    near(one.logits, two.logits)


def test_an_offloaded_projection(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    subject = family("Llava")
    plain = DirectLogitAttribution(subject.model).contributions(subject.inputs, subject.answer)
    model = accelerate.disk_offload(
        copy.deepcopy(subject.model), str(tmp_path), execution_device="cpu"
    )
    got = DirectLogitAttribution(model).contributions(subject.inputs, subject.answer)
    near(got.signed, plain.signed, 1e-6)


class Packed(nn.Module):
    """A linear layer whose weight is packed out of sight."""

    def __init__(self, linear):
        super().__init__()
        self.packed = [linear]

    def forward(self, states):
        return self.packed[0](states)


def test_a_projection_that_cannot_be_read():
    subject = family("Llava")
    attention = subject.model.get_decoder().layers[0].self_attn
    attention.o_proj = Packed(attention.o_proj)
    with pytest.raises(ValueError, match="output projection of attention"):
        DirectLogitAttribution(subject.model).attribute(subject.inputs, subject.answer)


def test_paths_are_found_again_after_a_part_is_replaced():
    subject = family("Llava")
    adapter = find_adapter(subject.model)
    with evaluating(adapter):
        paths = write_paths(adapter)
        assert write_paths(adapter) is paths
        attention = subject.model.get_decoder().layers[0].self_attn
        attention.o_proj = copy.deepcopy(attention.o_proj)
        assert write_paths(adapter)[0].projection is attention.o_proj


LANGUAGE_MODELS = {
    "soft-capped": (
        transformers.Gemma2Config,
        {"head_dim": 8, "attn_logit_softcapping": 0.5, "sliding_window": 9},
    ),
    "window": (transformers.MistralConfig, {"sliding_window": 9}),
    "biases": (transformers.Qwen2Config, {}),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_llava_over_another_language_model(kind):
    config_class, settings = LANGUAGE_MODELS[kind]
    subject = family("Llava")
    config = copy.deepcopy(subject.model.config)
    text = {name: getattr(config.text_config, name) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    )}  # fmt: skip
    config.text_config = config_class(**text, **settings, initializer_range=0.3, pad_token_id=0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.bias", "norm.weight")):
            nn.init.normal_(parameter, 0.5, 0.3)
    model.set_attn_implementation("eager")
    check(replace(subject, model=model), subject.inputs)


class Halved(nn.Linear):
    """Linear, but not by its own matrix."""

    def forward(self, states):
        return 0.5 * super().forward(states)


def test_a_projection_that_is_not_its_matrix():
    subject = family("Llava")
    subject.model.get_decoder().layers[1].self_attn.o_proj.__class__ = Halved
    with pytest.raises(ValueError, match=r"in layer 1 of .*not the linear map"):
        DirectLogitAttribution(subject.model).attribute(subject.inputs, subject.answer)


# ---- what a reader of the code found -----------------------------------------------------------


def test_the_kernel_finds_its_own_name():
    """Flash kernels read the setting again while they run."""
    kin = family("Llava")
    adapter = find_adapter(kin.model)
    config = adapter.decoder.config
    seen = []
    source = sys.modules[type(adapter.layers[0].self_attn).__module__]
    plain = source.eager_attention_forward

    def spy(module, *args, **kwargs):
        seen.append(module.config._attn_implementation)
        return plain(module, *args, **kwargs)

    kin.model.set_attn_implementation("eager")
    source.eager_attention_forward = spy
    try:
        DirectLogitAttribution(kin.model).trace(kin.inputs, kin.answer)
    finally:
        source.eager_attention_forward = plain
    assert set(seen) == {"eager"}
    assert config._attn_implementation == "eager"


def test_a_hook_that_comes_later_is_seen():
    kin = family("Llava")
    direct = DirectLogitAttribution(kin.model)
    direct.contributions(kin.inputs, kin.answer)
    layer = find_adapter(kin.model).layers[1]
    handle = layer.self_attn.register_forward_hook(lambda _m, _a, out: (0 * out[0], *out[1:]))
    try:
        with pytest.raises(ValueError, match="layer 1"):
            direct.contributions(kin.inputs, kin.answer)
    finally:
        handle.remove()
    direct.contributions(kin.inputs, kin.answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_factor_on_what_attention_writes_is_refused_in_every_precision(dtype):
    """As Granite's residual multiplier."""
    kin = family("Llava", dtype=dtype)
    layer = find_adapter(kin.model).layers[0]
    handle = layer.self_attn.register_forward_hook(lambda _m, _a, out: (0.22 * out[0], *out[1:]))
    try:
        with pytest.raises(ValueError, match="layer 0"):
            DirectLogitAttribution(kin.model).contributions(kin.inputs, kin.answer)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["Llava", "Gemma3", "Qwen2_5_VL"])
def test_half_precision_and_autocast(name):
    kin = family(name)
    direct = DirectLogitAttribution(kin.model)
    exact = direct.contributions(kin.inputs, kin.answer).positive
    with torch.autocast("cpu", torch.bfloat16):
        mixed = direct.contributions(kin.inputs, kin.answer).positive
    half = family(name, dtype=torch.bfloat16)
    rough = DirectLogitAttribution(half.model).contributions(half.inputs, half.answer).positive
    for other in (mixed, rough):
        assert (other - exact).abs().max() < 0.15 * exact.max()


@pytest.mark.parametrize("level", [1e-33, 1e-23, 1e19, 1e20, 1e33])
def test_the_level_of_the_head_only_scales_what_is_written(level):
    subject = family("Llava")
    inputs = subject.encode()
    expected = DirectLogitAttribution(subject.model).attribute(inputs, subject.answer).grid_attr[0]
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.mul_(level)
    got = DirectLogitAttribution(subject.model).attribute(inputs, subject.answer).grid_attr[0]
    near(got.double() / level, expected.double())


def test_flex_attention_is_refused_at_once():
    kin = family("Llava")
    config = find_adapter(kin.model).decoder.config
    vars(config)["_attn_implementation_internal"] = "flex_attention"
    with pytest.raises(ValueError, match="flex attention takes its mask as an object"):
        DirectLogitAttribution(kin.model).contributions(kin.inputs, kin.answer)


def test_scales_that_direct_attribution_can_not_see_are_named():
    kin = family("LlavaNext")
    with pytest.warns(UserWarning, match=r"scales \[1.0, 2.0\] become 1.0"):
        trace = MSEA(DirectLogitAttribution(kin.model)).trace(kin.inputs, kin.answer)
    assert trace.scales == (1.0,)
