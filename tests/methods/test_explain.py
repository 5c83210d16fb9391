"""``methods.explain``: one call for all, in one unit, and the user's model left as it was."""

import inspect

import pytest
import torch
from torch.testing import assert_close

from captum_mllm import (
    ARC,
    MSEA,
    DirectLens,
    DirectLogitAttribution,
    JointNormalization,
    LogitLens,
    TokenActivationMap,
)
from captum_mllm.methods import METHODS, Method, explain
from captum_mllm.methods.registry import method as register_method
from captum_mllm.metrics import insertion_deletion
from tests.oracle.families import above, family, video
from tests.oracle.layouts import QWEN, frame_shape, kin_of, pictures_of
from tests.oracle.model_state import check_same, state, worn
from tests.oracle.tiny import tiny_llava

OURS = ("lens", "tam", "msea", "arc", "msea+arc", "direct", "direct_lens")
SCALED = ("msea", "msea+arc", "direct", "direct_lens")
FEW = {"steps": 2}


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


def masks_of(pictures):
    """The first token's mask: the upper half of every picture."""
    own = []
    for picture in pictures:
        mask = torch.zeros(picture.height, picture.width, dtype=torch.bool)
        mask[: picture.height // 2] = True
        own.append(mask)
    return {0: own}


# ---- one form of result -------------------------------------------------------------------------


def test_the_names():
    kinds = {kind: [n for n, m in METHODS.items() if m.kind == kind] for kind in
             ("ours", "baseline", "control")}  # fmt: skip
    assert kinds == {
        "ours": list(OURS),
        "baseline": ["gradcam", "integrated_gradients", "attention", "ablation"],
        "control": ["random", "centre", "randomised_model", "mask"],
    }
    assert {n for n, m in METHODS.items() if m.gradients} == {"gradcam", "integrated_gradients"}
    assert {n: m.needs for n, m in METHODS.items() if m.needs} == {"mask": "masks"}
    assert all(name == method.name and method.about for name, method in METHODS.items())


@pytest.mark.filterwarnings("ignore:scales .* become 1.0")  # "direct" on models of one size
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["wide", "two"])
def test_every_method_in_every_family(kin, method, case):
    pictures = pictures_of(kin, case)
    inputs = kin.encode(*pictures)
    got = explain(
        method, kin.model, kin.processor, inputs, kin.answer, masks=masks_of(pictures), **FEW
    )
    lens = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    assert got.units == "[0, 1]"
    for name in ("input_tokens", "output_tokens", "preprocessing"):
        assert getattr(got, name) == getattr(lens, name), name
    assert torch.equal(got.output_ids, lens.output_ids)
    assert got.token_attr.shape == lens.token_attr.shape
    if method != "randomised_model":
        assert_close(got.output_probs, lens.output_probs)
    for own, picture in zip(got.grid_attr, pictures, strict=True):
        if method not in SCALED:
            finer = 2 if method == "arc" else 1  # ARC's default
            rows, cols = frame_shape(kin, picture)
            assert tuple(own.shape) == (len(kin.answer), finer * rows, finer * cols)
        assert float(own.min()) >= 0
        assert float(own.max()) <= 1
    assert max(float(own.max()) for own in got.grid_attr) > 0.1
    if METHODS[method].kind != "ours" and method != "randomised_model":
        assert not bool(got.token_attr.any())
    if METHODS[method].kind == "baseline" or method in ("random", "centre"):
        assert max(float(own.max()) for own in got.grid_attr) == 1.0
    for i, picture in enumerate(pictures):
        assert got.to_image(i, picture).shape[1:] == (picture.height, picture.width)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", above(QWEN))
def test_videos(name, method):
    kin = kin_of(name)
    got = explain(method, kin.model, None, video(kin), kin.answer, masks={}, **FEW)
    if method not in (*SCALED, "arc"):
        assert tuple(got.grid_attr[0].shape) == (5, 4, 3, 4)
    assert torch.equal(got.grid_attr[0][:, 0], got.grid_attr[0][:, 1])  # two frames of one step
    assert bool(got.grid_attr[0].any()) == (method != "mask")


def test_the_metrics_take_every_method():
    kin = kin_of("Llava")
    inputs = kin.encode()
    for method in METHODS:
        got = explain(
            method, kin.model, kin.processor, inputs, kin.answer, masks=masks_of([kin.picture]),
            **FEW,
        )  # fmt: skip
        curves = insertion_deletion(
            kin.model, inputs, got.output_ids, got, processor=kin.processor, steps=2
        )
        assert curves is not None


def test_the_manual_names_every_method_and_option():
    manual = inspect.getdoc(explain)
    assert all(f'"{name}"' in manual for name in METHODS)
    others = [m for m in METHODS.values() if m.kind != "ours" and m.options]
    assert all(f"``{option}``" in manual for m in others for option in m.options)


# ---- ours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LogitLens, MSEA])
def test_raw_maps_in_one_unit_by_hand(kin, kind):
    """Per token: all cells of all images and all earlier text between one least and one most."""
    pictures = pictures_of(kin, "two")
    attributor = kind(kin.model)
    trace = attributor.trace(kin.encode(*pictures), kin.answer)
    raw = attributor.attribute_trace(trace)
    got = JointNormalization(attributor).attribute_trace(trace)
    assert (got.units, got.method) == ("[0, 1]", f"JointNormalization({attributor.name})")
    for t in range(len(kin.answer)):
        column = int(trace.targets[t])
        cells = [float(v) for own in raw.grid_attr for v in own[t].flatten()]
        text = [float(v) for v in raw.token_attr[t, :column]]
        low, high = min(cells + text), max(cells + text)
        for own, unit in zip(raw.grid_attr, got.grid_attr, strict=True):
            expected = (own[t] - low) / (high - low)
            assert_close(unit[t], expected, rtol=1e-4, atol=1e-5)
        expected = (raw.token_attr[t, :column] - low) / (high - low)
        assert_close(got.token_attr[t, :column], expected, rtol=1e-4, atol=1e-5)
        assert not bool(got.token_attr[t, column:].any())


def same(got, expected):
    for own, other in zip(got.grid_attr, expected.grid_attr, strict=True):
        assert torch.equal(own, other)
    assert torch.equal(got.token_attr, expected.token_attr)
    assert got.method == expected.method


def test_ours_are_the_classes(kin):
    model, processor, answer = kin.model, kin.processor, kin.answer
    inputs = kin.encode(kin.wide_picture)

    def by_name(name, **options):
        return explain(name, model, processor, inputs, answer, **options)

    def unit(attributor):
        return JointNormalization(attributor).attribute(inputs, answer)

    same(by_name("lens", layer=0), unit(LogitLens(model, layer=0)))
    some = {"scales": (1.0, 1.5), "aggregation": "median"}
    same(by_name("msea", layer=0, **some), unit(MSEA(model, layer=0, **some)))
    same(
        by_name("tam", rank_filter=False),
        TokenActivationMap(model, processor, rank_filter=False).attribute(inputs, answer),
    )
    cleaned = ARC(model, strength=2.0, alpha_max=0.5).attribute(inputs, answer)
    same(by_name("arc", strength=2.0, alpha_max=0.5), cleaned)
    both = ARC(MSEA(model, layer=0, **some), alpha_max=0.5).attribute(inputs, answer)
    same(by_name("msea+arc", layer=0, alpha_max=0.5, **some), both)
    assert not torch.equal(by_name("msea+arc").grid_attr[0], both.grid_attr[0])


def test_options_are_the_constructors():
    for name, kinds, more in (
        ("lens", (LogitLens, JointNormalization), set()),
        ("tam", (LogitLens, TokenActivationMap), set()),
        ("msea", (LogitLens, MSEA, JointNormalization), {"images"}),
        ("arc", (LogitLens, ARC), set()),
        ("msea+arc", (LogitLens, MSEA, ARC), {"images"}),
        ("direct", (DirectLogitAttribution, MSEA, JointNormalization), {"images"}),
        ("direct_lens", (DirectLens, JointNormalization), {"images"}),
    ):
        expected = set(more)
        for kind in kinds:
            _, *others = inspect.signature(kind).parameters
            expected |= set(others) - {"processor"}
        if name.startswith("direct"):
            expected -= {"layer"}
        assert METHODS[name].options == expected, name


def test_direct_methods_are_upsampled_and_calibrated(model, processor, inputs, answer):
    by_hand = {
        "direct": MSEA(DirectLogitAttribution(model, processor), scales=(1.0,)),
        "direct_lens": DirectLens(model, processor, scales=(1.0,)),
    }
    for name, source in by_hand.items():
        finished = JointNormalization(source, upsampling=2, calibration="adaptive")
        got = explain(name, model, processor, inputs, answer, scales=(1.0,))
        same(got, finished.attribute(inputs, answer))
        plain = explain(
            name, model, processor, inputs, answer, scales=(1.0,), upsampling=1, calibration=None
        )
        same(plain, JointNormalization(source).attribute(inputs, answer))


def test_a_method_is_what_its_function_says():
    def run(request, size=1, *, flip=False):
        """Say what it does.

        And more.
        """

    def around(request, of="lens", **options):
        """Pass the options on."""

    try:
        register = register_method("some", kind="control", needs="masks", gradients=True)
        assert register(run) is run
        assert METHODS["some"] == Method(
            "some", "Say what it does", "control", run, frozenset({"size", "flip"}), "masks", True
        )
        register_method("other", kind="ours")(around)
        assert METHODS["other"].options is None  # whatever the other method takes
        register_method("other", kind="ours", options=frozenset({"layer"}))(around)
        assert METHODS["other"].options == {"of", "layer"}
    finally:
        METHODS.pop("some", None)
        METHODS.pop("other", None)


def test_generation_arguments_reach_every_method(shipped_subject):
    it = shipped_subject
    for name in METHODS:
        got = explain(
            name, it.model, it.processor, it.inputs, masks={}, steps=1,
            gen_args={"max_new_tokens": 2},
        )  # fmt: skip
        assert len(got.output_ids) == 2, name


def test_original_pictures_reach_the_scales():
    kin = kin_of("Qwen2VL")
    inputs, model = kin.encode(kin.wide_picture), kin.model
    expected = ARC(MSEA(model, kin.processor)).attribute(
        inputs, kin.answer, images=kin.wide_picture
    )
    got = explain("msea+arc", model, kin.processor, inputs, kin.answer, images=kin.wide_picture)
    same(got, expected)
    plain = explain("msea+arc", model, kin.processor, inputs, kin.answer)
    assert not torch.equal(plain.grid_attr[0], got.grid_attr[0])


# ---- the answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_answers_given_as_text_or_generated(method, model, processor, inputs):
    text = explain(method, model, processor, inputs, "a dog", masks={}, **FEW)
    ids = processor.tokenizer("a dog", add_special_tokens=False)["input_ids"]
    given = explain(method, model, processor, inputs, ids, masks={}, **FEW)
    assert_close(text.grid_attr[0], given.grid_attr[0])
    assert text.output_ids.tolist() == ids


@pytest.mark.parametrize("method", METHODS)
def test_no_answer_is_the_models_own(method, shipped_subject):
    """Of the shuffled model too: it is asked about the answer of the model itself."""
    it = shipped_subject
    got = explain(method, it.model, it.processor, it.inputs, masks={}, steps=1)
    assert torch.equal(got.output_ids, it.answer[: len(got.output_ids)])
    assert len(it.answer) - len(got.output_ids) <= 1  # but for the end of sequence


@pytest.mark.parametrize("method", METHODS)
def test_left_padding_changes_nothing(method, model, processor, inputs, answer):
    masks = {1: torch.ones(16, 16, dtype=torch.bool)}
    plain = explain(method, model, processor, inputs, answer, masks=masks, **FEW)
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    padded = {
        **inputs,
        "input_ids": torch.cat([ids.new_zeros(1, 3), ids], 1),
        "attention_mask": torch.cat([seen.new_zeros(1, 3), seen], 1),
    }
    got = explain(method, model, processor, padded, answer, masks=masks, **FEW)
    assert_close(got.grid_attr[0], plain.grid_attr[0], rtol=1e-4, atol=1e-5)


# ---- the user's model afterwards ----------------------------------------------------------------


def implementations(model):
    """What every part's attention is computed by, in a model that no test has used before."""
    parts = [model.config, *(getattr(m, "config", None) for m in model.modules())]
    return [getattr(config, "_attn_implementation", "none") for config in parts]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method, processor, inputs, answer):
    used = worn(tiny_llava())
    before, ways = state(used), implementations(used)
    explain(method, used, processor, inputs, answer, masks={}, **FEW)
    check_same(before, used)
    assert implementations(used) == ways


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was_by_an_error(method, processor, inputs, answer):
    """The user's own hook stops the second forward, where there is one, and else the first."""
    used = worn(tiny_llava())
    calls = 0
    last = METHODS[method].kind != "baseline"

    def stop(*_args):
        nonlocal calls
        calls += 1
        if last or calls > 1:
            raise OSError("stopped")

    used.get_decoder().layers[2].register_forward_hook(stop)
    before, ways = state(used), implementations(used)
    with pytest.raises(OSError, match="stopped"):
        explain(method, used, processor, inputs, answer, masks={}, **FEW)
    check_same(before, used)
    assert implementations(used) == ways


@pytest.mark.filterwarnings("ignore:scales .* become 1.0")  # "direct" on models of one size
@pytest.mark.parametrize("name", ["Qwen2VL", "LlavaNext", "SmolVLM"])
def test_models_with_memories_are_left_as_they_were(name):
    kin = family(name)
    for method in METHODS:
        before, ways = state(kin.model), implementations(kin.model)
        explain(method, kin.model, None, kin.encode(), kin.answer, masks={}, **FEW)
        check_same(before, kin.model)
        assert implementations(kin.model) == ways


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients_around(method, model, inputs, answer):
    expected = explain(method, model, None, inputs, answer, masks={}, **FEW)
    with torch.no_grad():
        got = explain(method, model, None, inputs, answer, masks={}, **FEW)
    assert_close(got.grid_attr[0], expected.grid_attr[0])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    kin = family("Llava", dtype=torch.bfloat16)
    got = explain(method, kin.model, kin.processor, kin.encode(), kin.answer, masks={}, **FEW)
    assert got.grid_attr[0].dtype == torch.float32


# ---- errors -------------------------------------------------------------------------------------


def test_errors_of_names_and_options(model, processor, inputs, answer):
    with pytest.raises(ValueError, match=r"method must be one of lens, tam, .*mask, got 'len'"):
        explain("len", model, processor, inputs, answer)
    with pytest.raises(TypeError, match=r"method 'gradcam' does not take.* scales; it takes: none"):
        explain("gradcam", model, processor, inputs, answer, scales=(1.0,))
    with pytest.raises(TypeError, match=r"method 'attention' does .* a, b; it takes: layer\."):
        explain("attention", model, processor, inputs, answer, b=1, a=2)
    with pytest.raises(TypeError, match=r"method 'lens' does not take .* it takes: calibration"):
        explain("randomised_model", model, processor, inputs, answer, scales=(1.0,))
    with pytest.raises(ValueError, match=r"method 'mask' needs masks="):
        explain("mask", model, processor, inputs, answer)
    with pytest.raises(ValueError, match=r"of must be one of lens, .*, got 'randomised_model'"):
        explain("randomised_model", model, processor, inputs, answer, of="randomised_model")
    with pytest.raises(ValueError, match=r"method must be one of .*, got \['lens'\]"):
        explain(["lens"], model, processor, inputs, answer)
    with pytest.raises(ValueError, match=r"of must be one of .*, got 'x'"):
        explain("randomised_model", model, processor, inputs, answer, of="x")
