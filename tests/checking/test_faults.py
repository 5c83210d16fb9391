"""Planted faults: the check names each of them, by the line that fails and by what it says."""

import copy
import json

import pytest
import torch
from transformers import AutoProcessor

from captum_mllm import check
from captum_mllm.adapters import (
    Gemma3Adapter,
    InternVLAdapter,
    LlavaAdapter,
    QwenVLAdapter,
    View,
    registry,
)
from captum_mllm.reference import load
from tests.oracle.families import family
from tests.oracle.layouts import kin_of

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def failing(report):
    return {line.name: f"{line.found} {line.advice}" for line in report.failed}


FAST = ("class", "inputs", "image tokens", "processor", "side inputs", "layout", "lens")


def checked(kin, model=None, processor=None, picture=None, only=FAST):
    return check(
        model or kin.model,
        processor or kin.processor,
        picture or kin.wide_picture,
        kin.prompt,
        max_new_tokens=4,
        only=only,
    )


@pytest.fixture
def registered(monkeypatch):
    """Registers other adapters for a class, until the test ends."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return lambda name, adapter: registry._REGISTRY.update({name: adapter})


# ---- a wrong adapter ----------------------------------------------------------------------------


def changed_views(base, change):
    """An adapter whose first view's tokens are rearranged."""

    class Wrong(base):
        def views(self, grid):
            first, *rest = super().views(grid)
            return (View(change(first.tokens), first.box), *rest)

    return Wrong


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.flatten().reshape(t.shape[::-1]).T, "Rows and columns are exchanged"),
        (lambda t: t.flip(1), "mirrored left to right"),
        (lambda t: t.flip(0), "upside down"),
        (lambda t: t.flip(0, 1), "turned by 180 degrees"),
        (lambda t: t.flatten().roll(1).reshape(t.shape), "off by 1"),
        (
            lambda t: t.flatten()[torch.arange(t.numel()) * 13 % t.numel()].reshape(t.shape),
            "No simple rule",
        ),
    ],
)
@pytest.mark.parametrize(("name", "base"), [("Qwen2_5_VL", QwenVLAdapter), ("Llava", LlavaAdapter)])
def test_an_adapter_with_another_layout(registered, name, base, change, named):
    registered(f"{name}ForConditionalGeneration", changed_views(base, change))
    found = failing(checked(kin_of(name)))
    assert list(found) == ["layout"]
    assert named in found["layout"]


def test_the_adapter_of_another_family(registered):
    registered("InternVLForConditionalGeneration", LlavaAdapter)
    report = checked(kin_of("InternVL"))
    assert (
        "registered for InternVLForConditionalGeneration does not fit" in failing(report)["class"]
    )
    assert report["layout"].verdict == "not tried"


def test_an_adapter_with_another_head(registered):
    class Wrong(LlavaAdapter):
        def class_weights(self, ids):
            weight, bias = super().class_weights(ids)
            return 1.1 * weight, bias

    registered("LlavaForConditionalGeneration", Wrong)
    found = failing(checked(kin_of("Llava")))
    assert "lens" in found
    assert "W h + b" in found["lens"]


# ---- an image token count off by one ------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 2])
def test_a_processor_that_makes_one_image_token_too_many_or_too_few(extra):
    kin = family("Llava")
    kin.processor.num_additional_image_tokens = extra
    report = checked(kin)
    assert f"hold {15 + extra} image tokens" in failing(report)["image tokens"]
    assert report["layout"].verdict == "not tried"


def test_an_adapter_that_counts_one_token_too_many(registered):
    class Wrong(InternVLAdapter):
        def runs(self, grid):
            return (*super().runs(grid), 1)

    registered("InternVLForConditionalGeneration", Wrong)
    assert "image tokens" in failing(checked(kin_of("InternVL")))


# ---- swapped tiles ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first"), [("InternVL", 0), ("Idefics3", 0), ("LlavaNext", 1)])
def test_a_model_with_swapped_tiles(name, first):
    kin = kin_of(name)
    model = copy.deepcopy(kin.model)

    def swap(_module, args, kwargs):
        """The tower gets two tiles in each other's place."""
        order = None

        def swapped(pixels):
            nonlocal order
            order = torch.arange(len(pixels))
            order[[first, first + 1]] = order[[first + 1, first]]
            return pixels[order]

        key = "pixel_values"
        if key in kwargs:
            return args, {**kwargs, key: swapped(kwargs[key])}
        return (swapped(args[0]), *args[1:]), kwargs

    model.get_encoder(modality="image").register_forward_pre_hook(swap, with_kwargs=True)
    found = failing(checked(kin, model, picture=kin.wide_picture))
    assert "Tiles are swapped" in found["layout"]
    assert "what is in tile (0, 0) shows in (0, 1)" in found["layout"]
    assert failing(checked(kin)) == {}


# ---- a processor of another model ---------------------------------------------------------------


def test_a_processor_of_another_family():
    model, _ = load("llava")
    _, processor = load("qwen2vl")
    assert (
        "223 tokens, the model 220 embeddings"
        in failing(check(model, processor, only=("processor",)))["processor"]
    )


def test_a_processor_with_another_normalisation():
    model, processor = load("llava")
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    found = failing(check(model, processor, only=FAST))
    assert list(found) == ["processor"]
    assert "Its image_mean is [0.5, 0.5, 0.5], the checkpoint's [0.48" in found["processor"]


def test_a_tokenizer_of_another_model_of_the_same_size(tmp_path):
    """Two words have each other's ids; image token, size and round trip are those of the model."""
    _, processor = load("llava")
    processor.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]  # (token, score) in the order of the ids
    vocabulary[100], vocabulary[101] = vocabulary[101], vocabulary[100]
    file.write_text(json.dumps(data))
    model, _ = load("llava")
    foreign = AutoProcessor.from_pretrained(tmp_path)
    found = failing(check(model, foreign, only=("processor", "image tokens")))
    assert list(found) == ["processor"]
    assert "1% of the checkpoint's tokens have another id" in found["processor"]


def test_a_processor_with_another_patch_size():
    kin = family("Qwen2VL")
    kin.processor.image_processor.patch_size = 8
    found = failing(checked(kin))
    assert "patch_size is 8, the model's is 4" in found["processor"]


def test_a_processor_with_another_image_token():
    kin = family("Llava")
    kin.processor.image_token = "w50"
    kin.processor.image_token_id = kin.processor.tokenizer.image_token_id = 50
    assert "Its image token is 50, the model's is 3" in failing(checked(kin))["processor"]


# ---- a missing side input -----------------------------------------------------------------------


class Without:
    """A processor that leaves one of its outputs out."""

    def __init__(self, processor, name):
        self.__dict__.update(vars(processor))
        self.processor, self.name = processor, name

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, *args, **kwargs):
        made = self.processor(*args, **kwargs)
        return {name: value for name, value in made.items() if name != self.name}


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_missing_mm_token_type_ids(name):
    kin = kin_of(name)
    found = failing(checked(kin, processor=Without(kin.processor, "mm_token_type_ids")))
    assert list(found) == ["side inputs"]
    assert "mm_token_type_ids is missing" in found["side inputs"]


def trusting(base):
    """An adapter that asks for no side inputs, as one that was found by probing."""

    class Trusting(base):
        required = {}  # noqa: RUF012

        def check_inputs(self, inputs):
            pass

    return Trusting


def test_missing_side_inputs_that_the_model_itself_asks_for(registered):
    registered("Qwen2VLForConditionalGeneration", trusting(QwenVLAdapter))
    kin = kin_of("Qwen2VL")
    found = failing(checked(kin, processor=Without(kin.processor, "mm_token_type_ids")))
    assert "mm_token_type_ids is missing" in found["side inputs"]


def test_missing_side_inputs_without_which_logits_change_in_silence(registered):
    registered("Gemma3ForConditionalGeneration", trusting(Gemma3Adapter))
    kin = kin_of("Gemma3")
    found = failing(checked(kin, processor=Without(kin.processor, "token_type_ids")))
    assert (
        "token_type_ids is missing: the model takes it, and with it logits"
        in (found["side inputs"])
    )
    whole = checked(kin)["side inputs"]
    assert whole.verdict == "passed"
    assert "silently where left out: token_type_ids (by" in whole.found


@pytest.mark.parametrize("name", ["PaliGemma", "Gemma3"])
def test_missing_token_type_ids(name):
    kin = kin_of(name)
    found = failing(checked(kin, processor=Without(kin.processor, "token_type_ids")))
    assert "token_type_ids is missing" in found["side inputs"]
