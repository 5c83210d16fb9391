"""Bad input raises an error that names the argument, what came and how to mend it."""

import re

import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import nn

from captum_mllm import ImageGeometry, LogitLens, TokenActivationMap
from captum_mllm.adapters import LlavaAdapter, find_adapter, register_adapter
from tests.oracle import tiny
from tests.oracle.published import ARC, MSEA, MultiScaleAttribution, RankCorrelationDenoiser


def raises(error, *parts):
    """The error, with every part somewhere in its message, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))


# ---- inputs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, [[1.0]], "pixels"], ids=["none", "list", "string"])
@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC, TokenActivationMap])
def test_no_pixels(model, inputs, answer, method, value):
    got = "nothing" if value is None else type(value).__name__
    with raises(ValueError, "'pixel_values'", f"got {got}", "images="):
        method(model).attribute({**inputs, "pixel_values": value}, answer)


def test_no_pixels_key_and_no_ids(model, inputs, answer):
    for name in ("pixel_values", "input_ids"):
        mapping = {k: v for k, v in inputs.items() if k != name}
        with raises(ValueError, repr(name), "got nothing", "return_tensors='pt'"):
            LogitLens(model).attribute(mapping, answer)


@pytest.mark.parametrize("inputs", ["text", None, [1, 2], 5], ids=str)
def test_no_mapping(model, answer, inputs):
    with raises(TypeError, "inputs must be the mapping", "got", type(inputs).__name__):
        LogitLens(model).attribute(inputs, answer)


@pytest.mark.parametrize(
    "shape", [(0, 3, 16, 16), (3, 16, 16), (1, 1, 3, 16, 16), (1, 5, 16, 16)], ids=str
)
def test_pixels_of_another_shape(model, inputs, answer, shape):
    with raises(ValueError, "pixel_values must be (images, 3 channels", f"got shape {shape}"):
        LogitLens(model).attribute({**inputs, "pixel_values": torch.zeros(shape)}, answer)


def test_pixels_that_are_no_whole_patches(model, inputs, answer):
    with raises(ValueError, "pixel_values are 18 x 16", "4 px patches", "multiples of 4"):
        LogitLens(model).attribute({**inputs, "pixel_values": torch.zeros(1, 3, 18, 16)}, answer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite(model, inputs, answer, value):
    pixels = inputs["pixel_values"].clone()
    pixels[0, 1, 2, 3] = value
    with raises(ValueError, "pixel_values hold NaN or infinite", "check the image"):
        LogitLens(model).attribute({**inputs, "pixel_values": pixels}, answer)


@pytest.mark.parametrize("side", [8, 24])
def test_image_tokens_that_do_not_match_the_pixels(model, inputs, answer, side):
    grid = side // 4
    with raises(
        ValueError, "input_ids hold 16 image tokens", f"pixel_values make {grid**2}",
        f"{grid} x {grid}", "same processor call",
    ):  # fmt: skip
        LogitLens(model).attribute(
            {**inputs, "pixel_values": torch.zeros(1, 3, side, side)}, answer
        )


def test_more_images_than_placeholders(model, inputs, answer):
    doubled = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with raises(ValueError, "16 image tokens", "make 32", "2 image(s)"):
        LogitLens(model).attribute(doubled, answer)


def test_more_than_one_sample(model, inputs, answer):
    batch = {name: torch.cat([value, value]) for name, value in inputs.items()}
    with raises(ValueError, "exactly one sample", "(2, ", "once per sample"):
        ARC(MSEA(model)).attribute(batch, answer)
    with raises(ValueError, "exactly one sample"):
        LogitLens(model).attribute({**inputs, "input_ids": inputs["input_ids"][0]}, answer)


def test_right_padding(model, inputs, answer):
    ids = torch.cat([inputs["input_ids"], torch.zeros(1, 2, dtype=torch.int64)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.zeros(1, 2, dtype=torch.int64)], 1)
    with raises(ValueError, "attention_mask: only left padding", "padding_side = 'left'"):
        LogitLens(model).attribute({**inputs, "input_ids": ids, "attention_mask": mask}, answer)


def test_mask_of_another_length(model, inputs, answer):
    with raises(ValueError, "attention_mask must have the shape of input_ids", "got (1, 3)"):
        LogitLens(model).attribute({**inputs, "attention_mask": torch.ones(1, 3)}, answer)


@pytest.mark.parametrize("bad", [-1, tiny.VOCABULARY])
def test_prompt_ids_outside_the_vocabulary(model, inputs, answer, bad):
    ids = inputs["input_ids"].clone()
    ids[0, -1] = bad
    with raises(ValueError, "input_ids must be integers in 0..96", str(bad), "processor"):
        LogitLens(model).attribute({**inputs, "input_ids": ids}, answer)
    with raises(ValueError, "input_ids must be integers", "torch.float32"):
        LogitLens(model).attribute({**inputs, "input_ids": inputs["input_ids"].float()}, answer)


def test_per_token_inputs_that_are_not_known(model, inputs, answer):
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with raises(ValueError, "'position_ids'", "leave it out", "attention_mask"):
        LogitLens(model).attribute({**inputs, "position_ids": positions}, answer)


def test_pixel_tensor_without_its_rest(model, inputs, answer):
    with raises(TypeError, "additional_forward_args must be the rest", "got NoneType"):
        MSEA(model).attribute(inputs["pixel_values"], answer)
    with raises(TypeError, "additional_forward_args must be the rest", "got tuple"):
        MSEA(model).attribute(inputs["pixel_values"], answer, (inputs["input_ids"], 1))
    with raises(ValueError, "inputs must be pixels (N, channels", "(3, 16, 16)"):
        MSEA(model).attribute(inputs["pixel_values"][0], answer, inputs)


def test_mapping_with_additional_forward_args(model, inputs, answer):
    with raises(TypeError, "additional_forward_args goes with a pixel tensor"):
        LogitLens(model).attribute(inputs, answer, inputs)


# ---- target and explain ---------------------------------------------------------------------


@pytest.mark.parametrize("target", [[], (), torch.tensor([]), torch.tensor([]).long()], ids=repr)
def test_empty_target(model, inputs, target):
    with raises(ValueError, "target is empty", "None to generate"):
        LogitLens(model).attribute(inputs, target)


def test_empty_string_target(model, inputs, processor):
    with raises(ValueError, "target is empty"):
        LogitLens(model, processor).attribute(inputs, "")


def test_target_with_an_image_token(model, inputs, processor):
    with raises(ValueError, "target holds an image token", "[3]", "Cut it off"):
        LogitLens(model).attribute(inputs, [20, tiny.IMAGE_TOKEN])
    with raises(ValueError, "target holds an image token"):
        LogitLens(model, processor).attribute(inputs, "a <image> dog")


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (5, "shape ()"), (5.0, "shape ()"), ([1.5], "torch.float32"), ([[5, 6]], "shape (1, 2)"),
        (torch.tensor([[5], [6]]), "shape (2, 1)"), ([True, False], "torch.bool"),
        ({"ids": [5]}, "dict"), (object(), "object"), ([None], "list"), ([[5], [6, 7]], "list"),
    ],

)  # fmt: skip
def test_target_of_another_kind(model, inputs, target, shown):
    with raises(TypeError, "target must be a 1-D tensor or list of token ids", shown):
        LogitLens(model).attribute(inputs, target)


@pytest.mark.parametrize("bad", [-1, -100, tiny.VOCABULARY, 10**9])
def test_target_outside_the_vocabulary(model, inputs, bad):
    with raises(ValueError, "target holds ids outside 0..96", f"[{bad}]"):
        LogitLens(model).attribute(inputs, [20, bad])


def test_string_target_without_a_processor(model, inputs):
    with raises(ValueError, "target is a string", "needs a processor", "MSEA(model, processor)"):
        LogitLens(model).attribute(inputs, "a dog")


@pytest.mark.parametrize("explain", ["answers", "", "Answer"])
def test_explain_with_a_typo(model, inputs, answer, explain):
    with raises(ValueError, "explain must be 'answer', 'prompt', 'all'", repr(explain)):
        LogitLens(model).attribute(inputs, answer, explain=explain)


@pytest.mark.parametrize("explain", [None, {"answer"}, ["answer"], object()])
def test_explain_of_another_kind(model, inputs, answer, explain):
    with raises(TypeError, "explain must be 'answer', 'prompt', 'all' or positions"):
        LogitLens(model).attribute(inputs, answer, explain=explain)


@pytest.mark.parametrize("explain", [[], 5, [1.5], [[20]], torch.tensor([[20]])], ids=str)
def test_explain_without_positions(model, inputs, answer, explain):
    with raises(ValueError, "explain must hold at least one position"):
        LogitLens(model).attribute(inputs, answer, explain=explain)


@pytest.mark.parametrize("position", [0, 5, -1, 27, 1000])
def test_explain_at_positions_without_text(model, inputs, answer, position):
    with raises(ValueError, "explain holds positions", f"[{position}]", "text tokens stand at"):
        LogitLens(model).attribute(inputs, answer, explain=[20, position])


def test_explain_a_prompt_without_text(model, processor, picture, answer):
    inputs = processor(images=picture, text="USER: <image>", return_tensors="pt")
    with raises(ValueError, "explain='prompt'", "no text tokens"):
        LogitLens(model).attribute(inputs, answer, explain="prompt")


# ---- parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MSEA, lambda m, **k: MultiScaleAttribution(LogitLens(m), **k)])
@pytest.mark.parametrize(
    ("scales", "error", "shown"),
    [
        ((), ValueError, " is empty"), ((1.0, 1.0), ValueError, "distinct, got (1.0, 1.0)"),
        ((1, 1.5, 1.0), ValueError, "distinct"), ((1.0, 0.0), ValueError, "> 0"),
        ((1.0, -1.0), ValueError, "> 0"), ((float("nan"),), ValueError, "finite"),
        ((float("inf"),), ValueError, "finite"), (1.5, TypeError, "sequence of numbers, got 1.5"),
        ("12", TypeError, "sequence of numbers"), (None, TypeError, "got None"),
        (("a",), TypeError, "sequence of numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_scales(model, make, scales, error, shown):
    with raises(error, "scales", shown):
        make(model, scales=scales)


def test_scales_too_small_for_a_patch(model, inputs, answer):
    with raises(ValueError, "scales: 0.1", "16 x 16 pixels smaller than one 4 px patch", "larger"):
        MSEA(model, scales=(1.0, 0.1)).attribute(inputs, answer)


@pytest.mark.parametrize("method", [ARC, lambda m, **k: RankCorrelationDenoiser(LogitLens(m), **k)])
def test_numbers_of_arc(model, inputs, answer, method):
    with raises(ValueError, "top_k must lie in 1..97 (the vocabulary), got 98"):
        method(model, top_k=98).attribute(inputs, answer)
    method(model, top_k=97).attribute(inputs, answer)
    for bad in (0, -1, 2.5, True, "50", None):
        with raises(ValueError, "top_k must be an int >= 1", repr(bad)):
            method(model, top_k=bad)
    for bad in (0.0, 1.0, -0.1, 1.5, float("nan")):
        with raises(ValueError, "rbo_p must lie strictly between 0 and 1", repr(bad)):
            method(model, rbo_p=bad)
    for bad in (-1.0, float("nan"), float("inf")):
        with raises(ValueError, "strength must lie in 0 .. inf", repr(bad)):
            method(model, strength=bad)
    for bad in (0.0, -1.0, float("nan")):
        with raises(ValueError, "alpha_max must lie above 0 (or be None)", repr(bad)):
            method(model, alpha_max=bad)


@pytest.mark.parametrize("layer", [3, -4, 100, 1.0, "last", None, True])
@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC])
def test_layers(model, layer, method):
    with raises(ValueError, "layer must be an int in -3..2", repr(layer)):
        method(model, layer=layer)


def test_other_parameters(model):
    with raises(ValueError, "context must be one of after_image, all", "'before'"):
        LogitLens(model, context="before")
    with raises(ValueError, "aggregation must be one of mean, median", "'max'"):
        MSEA(model, aggregation="max")
    with raises(ValueError, "resize must be one of mass, density", "'area'"):
        MultiScaleAttribution(Saliency(model), resize="area")
    with raises(ValueError, "template_tail must lie at a whole number from 0 on", "-1"):
        TokenActivationMap(model, template_tail=-1)


@pytest.mark.parametrize("method", [MSEA, ARC, TokenActivationMap])
def test_a_processor_given_twice(model, processor, method):
    with raises(ValueError, "processor and layer belong to the innermost", "LogitLens"):
        method(LogitLens(model, processor), processor)
    with raises(ValueError, "processor and layer belong to the innermost"):
        method(LogitLens(model), layer=1)


@pytest.mark.parametrize("kind", ["image processor", "string"])
@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC, TokenActivationMap])
def test_something_else_as_processor(model, processor, method, kind):
    other = processor.image_processor if kind == "image processor" else "llava-hf/llava-1.5-7b-hf"
    with raises(TypeError, "processor must be the model's processor", type(other).__name__):
        method(model, other)


def test_original_pictures(model, processor, inputs, answer, picture):
    with raises(ValueError, "images= needs a processor"):
        MSEA(model).attribute(inputs, answer, images=picture)
    with raises(ValueError, "images= holds 2 pictures, inputs have 1"):
        MSEA(model, processor).attribute(inputs, answer, images=[picture, picture])


def test_original_pictures_that_the_processor_treats_otherwise(model, processor, answer, picture):
    """inputs were made with settings of one call, which the processor does not remember."""
    wide = processor(
        images=picture, text="USER: <image> what", return_tensors="pt", do_center_crop=False,
        size={"height": 8, "width": 24},
    )  # fmt: skip
    with (
        raises(
            ValueError, "images= through the processor's settings are not the pixels of inputs",
            "Leave images out",
        ),
        pytest.warns(UserWarning, match=r"pixel_values are 8 x 24 pixels, but .* make 16 x 16"),
    ):  # fmt: skip
        MSEA(model, processor, scales=(1.0, 2.0)).attribute(wide, answer, images=picture)


def test_original_pictures_of_something_else(model, processor, inputs, answer):
    with raises(ValueError, "are not the pixels of inputs", "other pictures", "Leave images out"):
        MSEA(model, processor).attribute(inputs, answer, images=tiny.random_picture(7))


def test_original_pictures_need_an_image_processor(model, processor, inputs, answer, picture):
    with raises(ValueError, "images= needs a processor"):
        MSEA(model, processor.tokenizer).attribute(inputs, answer, images=picture)


# ---- which model, which attribution ---------------------------------------------------------


class Other(nn.Module):
    config = None


@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC, TokenActivationMap])
def test_unsupported_model_class(method):
    with raises(
        ValueError, "no adapter for Other", "LlavaForConditionalGeneration", "subclass",
        "@register_adapter('Other')",
    ):  # fmt: skip
        method(Other())


@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC, TokenActivationMap])
@pytest.mark.parametrize("thing", [None, "llava-hf/llava-1.5-7b-hf", lambda x: x], ids=type)
def test_no_model_at_all(method, thing):
    with raises(TypeError, "model must be a transformers model", type(thing).__name__):
        method(thing)


def test_unsupported_tower(model):
    class Config:
        image_token_id = 3
        vision_feature_select_strategy = "default"

        class vision_config:  # noqa: N801
            model_type = "pixtral"
            patch_size = 4

    fake = nn.Module()
    fake.config = Config
    with raises(ValueError, "'pixtral' tower is not supported", "clip_vision_model"):
        LlavaAdapter(fake)


def test_a_registered_adapter_serves_its_class_and_subclasses(model):
    class MyLlava(type(model)):
        pass

    class MyAdapter(LlavaAdapter):
        pass

    mine = MyLlava(model.config)
    assert type(find_adapter(mine)) is LlavaAdapter
    from captum_mllm.adapters import registry

    try:
        register_adapter("MyLlava")(MyAdapter)
        assert type(find_adapter(mine)) is MyAdapter
        assert type(find_adapter(model)) is LlavaAdapter
    finally:
        registry._REGISTRY.pop("MyLlava")


def test_attributions_that_cannot_be_wrapped(model):
    gradients = IntegratedGradients(lambda x: x.sum((1, 2, 3)))
    with raises(TypeError, "ARC needs maps per token, and IntegratedGradients", "LogitLens(model)"):
        ARC(gradients)
    with raises(TypeError, "TokenActivationMap needs maps per token"):
        TokenActivationMap(gradients)
    for wrapped in (ARC(model), TokenActivationMap(model)):
        for method in (ARC, TokenActivationMap, RankCorrelationDenoiser):
            with raises(ValueError, "needs logits", type(wrapped).__name__, "use one of the two"):
                method(wrapped)
    with raises(TypeError, "attribution_method must be a captum attribution", "MSEA(model)"):
        MultiScaleAttribution(model)
    with raises(TypeError, "attribution_method must be a captum attribution", "ARC(model)"):
        RankCorrelationDenoiser(model)


def test_scales_of_scales(model):
    with raises(ValueError, "multi-scale already", "give it all the scales"):
        MSEA(MSEA(model, scales=(1.0, 2.0)))
    for method in (ARC, TokenActivationMap):
        with raises(ValueError, "(MSEA(...))"):
            MSEA(method(MSEA(model, scales=(1.0, 2.0))))


@pytest.mark.parametrize("inner", [None, IntegratedGradients(lambda x: x)], ids=["none", "ig"])
def test_a_denoiser_that_cannot_attribute(inputs, answer, inner):
    with raises(TypeError, "does not trace tokens", "LogitLens(model) or MSEA(model)", "denoise"):
        RankCorrelationDenoiser(inner).attribute(inputs, answer)


def test_a_trace_without_rankings(model, inputs, answer):
    with raises(ValueError, "trace holds no rankings", "top_k"):
        ARC(model).attribute_trace(LogitLens(model).trace(inputs, answer))


def test_a_pixel_attributor_traces_nothing():
    with raises(TypeError, "Saliency", "does not trace tokens", "MultiScaleAttribution(Saliency"):
        MSEA(Saliency(lambda x: x))


# ---- states, heads, compiled models ---------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("where", ["first layer", "last layer", "tower"])
def test_states_that_are_not_finite(inputs, answer, value, layer, where):
    model = tiny.tiny_llava()
    part = {
        "first layer": model.get_decoder().layers[0].mlp.down_proj,
        "last layer": model.get_decoder().layers[2].mlp.down_proj,
        "tower": model.model.multi_modal_projector.linear_2,
    }[where]
    with torch.no_grad():
        part.weight[0, 0] = value
    with raises(ValueError, "hold NaN or infinite values", "dtype", "weights"):
        LogitLens(model, layer=layer).attribute(inputs, answer)


def test_states_that_are_not_finite_at_another_scale_only(inputs, answer):
    model = tiny.tiny_llava()

    def spoil(_module, args, output):
        return output * float("nan") if output.shape[1] > 22 else output

    layer = model.get_decoder().layers[0].mlp
    handle = layer.register_forward_hook(spoil)
    # 22 prompt tokens and one of the answer stay below a prefix of 64 image tokens.
    with raises(ValueError, "hold NaN or infinite values"):
        MSEA(model, scales=(1.0, 2.0)).attribute(inputs, answer)
    handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_head_rows_that_are_not_finite(inputs, answer, value):
    """Also of a class that no token has: rankings and probabilities would be wrong."""
    model = tiny.tiny_llava()
    with torch.no_grad():
        model.lm_head.weight[90] = value
    with raises(ValueError, "logits hold NaN or infinite values", "LM head"):
        LogitLens(model).attribute(inputs, answer)


class Capped(nn.Linear):
    def forward(self, x):
        return 5 * torch.tanh(super().forward(x) / 5)


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.05 * super().forward(x)


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", [Capped, Scaled, Shifted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_not_plain(inputs, answer, kind, dtype):
    model = tiny.tiny_llava(dtype=dtype)
    head = kind(24, tiny.VOCABULARY, bias=False, dtype=dtype)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with raises(
        ValueError, "its LM head is not the plain linear map W h + b", "Register an adapter"
    ):
        MSEA(model).attribute(inputs, answer)


def test_heads_without_a_matrix(inputs, answer):
    model = tiny.tiny_llava()
    plain = model.lm_head
    model.lm_head = Wrapper(plain)
    with raises(ValueError, "its LM head (Wrapper) is not the plain linear map", "Unwrap"):
        LogitLens(model).attribute(inputs, answer)
    packed = nn.Linear(24, tiny.VOCABULARY, bias=False)
    packed.weight = nn.Parameter(torch.zeros(97 * 12, 1, dtype=torch.uint8), requires_grad=False)
    model.lm_head = packed
    with raises(ValueError, "its LM head (Linear) is not the plain linear map", "quantised"):
        LogitLens(model).attribute(inputs, answer)


def test_logits_scaled_after_the_head(inputs, answer):
    model = tiny.tiny_llava()
    model.lm_head.register_forward_hook(lambda _m, _a, output: output / 2)
    with raises(ValueError, "its LM head is not the plain linear map"):
        LogitLens(model).attribute(inputs, answer)


@pytest.fixture
def fresh():
    return tiny.tiny_llava()


@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC, TokenActivationMap])
def test_compiled_model(fresh, method):
    with raises(ValueError, "model: it is compiled (torch.compile)", "uncompiled"):
        method(torch.compile(fresh, backend="eager"))
    fresh.compile(backend="eager")
    with raises(ValueError, "model: it is compiled (torch.compile)"):
        method(fresh)


PARTS = ["model", "model.vision_tower", "model.language_model", "model.language_model.layers.1"]


@pytest.mark.parametrize("part", PARTS)
def test_compiled_part(fresh, part):
    fresh.get_submodule(part).compile(backend="eager")
    with raises(ValueError, f"its module '{part}' is compiled"):
        LogitLens(fresh)


def test_compiled_part_in_its_wrapper(fresh):
    fresh.model.vision_tower = torch.compile(fresh.model.vision_tower, backend="eager")
    with raises(ValueError, "its module 'model.vision_tower' is compiled"):
        MSEA(fresh)


@pytest.mark.parametrize("part", ["", *PARTS])
def test_compiled_forward(fresh, part):
    module = fresh.get_submodule(part)
    module.forward = torch.compile(module.forward, backend="eager")
    with raises(ValueError, "is compiled"):
        LogitLens(fresh)


def test_compiled_after_the_attributor_was_made(fresh, inputs, answer):
    method = ARC(MSEA(fresh))
    fresh.get_decoder().compile(backend="eager")
    with raises(ValueError, "its module 'model.language_model' is compiled"):
        method.attribute(inputs, answer)


def test_hooks_that_do_not_fire(fresh, inputs, answer):
    """A module whose call skips its hooks, however it came to that."""

    class Silent(type(fresh.get_decoder().norm)):
        def __call__(self, x):
            return self.forward(x)

    fresh.get_decoder().norm.__class__ = Silent
    with raises(ValueError, "hook on the final norm fired 0 times", "expected 1", "plain model"):
        LogitLens(fresh).attribute(inputs, answer)


# ---- denoise --------------------------------------------------------------------------------


def test_denoise():
    arc = RankCorrelationDenoiser(None, top_k=2)
    ranks = torch.tensor([[1, 2], [3, 4], [1, 3]])
    with raises(ValueError, "rankings must be a tensor (tokens, k) with k >= top_k = 2", "(3, 1)"):
        arc.denoise(torch.ones(1, 3), ranks[:, :1])
    with raises(ValueError, "target_rankings hold 2 rows for 1 targets"):
        arc.denoise(torch.ones(1, 3), ranks, target_rankings=ranks[:2])
    with raises(ValueError, "maps_or_scores of shape (1, 4)", "(1, 3)"):
        arc.denoise(torch.ones(1, 4), ranks)
    with raises(ValueError, "need context_maps=", "context_scores="):
        arc.denoise(torch.ones(1, 5, 5), ranks)
    with raises(ValueError, "context_maps must be (3, 5, 5)", "(3, 4, 4)"):
        arc.denoise(
            torch.ones(1, 5, 5), ranks, context_maps=torch.ones(3, 4, 4),
            context_scores=torch.ones(1, 3),
        )  # fmt: skip
    with raises(ValueError, "distinct ids"):
        arc.denoise(torch.ones(1, 1), torch.tensor([[1, 1]]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda _: RankCorrelationDenoiser(None, rbo_p="a"), "rbo_p"),
        (lambda _: RankCorrelationDenoiser(None, strength=None), "strength"),
        (lambda _: RankCorrelationDenoiser(None, strength=float("nan")), "strength"),
        (lambda _: RankCorrelationDenoiser(None, alpha_max="a"), "alpha_max"),
        (lambda m: ARC(m, alpha_max=0), "alpha_max"),
        (lambda m: TokenActivationMap(m, alpha_max=-1), "alpha_max"),
        (lambda m: TokenActivationMap(m, template_tail=-1), "template_tail"),
        (lambda m: TokenActivationMap(m, template_tail="a"), "template_tail"),
    ],
)
def test_numbers_are_checked_by_name(make, name, model):
    with pytest.raises((TypeError, ValueError), match=name):
        make(model)


@pytest.mark.parametrize("size", [40, "ab", None, (40.5, 40), (0, 3), (1, 2, 3)])
def test_to_image_checks_its_size(size, model, processor, inputs, answer):
    result = LogitLens(model, processor).attribute(inputs, answer)
    with pytest.raises((TypeError, ValueError), match="size must be"):
        result.to_image(0, size)


def test_to_image_checks_its_geometry(model, inputs, answer):
    result = LogitLens(model).attribute(inputs, answer)
    with pytest.raises(TypeError, match="geometry must be an ImageGeometry"):
        result.to_image(0, (40, 40), geometry=(0, 0, 40, 40))
    for box in ((0, 0, 1), "abcd"):
        with pytest.raises(TypeError, match="box"):
            ImageGeometry(box)


def test_images_are_pictures_and_pixels_are_some(model, processor, inputs, answer):
    with pytest.raises(TypeError, match="images= takes PIL pictures"):
        MSEA(model, processor).attribute(inputs, answer, images="cat.png")
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="holds no image"):
        MSEA(model).attribute(inputs["pixel_values"][:0], answer, rest)
