"""The adapter that CONTRIBUTING shows serves a real family that the package does not know."""

import pytest
import torch
import transformers

from captum_mllm import LogitLens
from captum_mllm.adapters import DiscoveredAdapter, find_adapter, registry
from tests.docs.test_pages import blocks
from tests.oracle.families import without_mixing
from tests.oracle.published import ARC, MSEA

IMAGE, SIDE, PATCH = 3, 16, 4


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    exec(blocks("CONTRIBUTING.md", "python")[-1], {})


def tiny_vip_llava():
    torch.manual_seed(0)
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=SIDE, patch_size=PATCH,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        ),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -1],
    )  # fmt: skip
    return transformers.VipLlavaForConditionalGeneration(config).eval()


def sample():
    cells = (SIDE // PATCH) ** 2
    ids = torch.tensor([[1, 20, *[IMAGE] * cells, 21, 22]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, SIDE, SIDE)}


def test_an_unknown_family_says_the_ways_out():
    model = tiny_vip_llava()
    assert isinstance(find_adapter(model), DiscoveredAdapter)
    with pytest.raises(ValueError, match=r"no adapter is registered for VipLlava.*images=picture"):
        LogitLens(model).attribute(sample(), torch.arange(10, 13))
    with pytest.raises(ValueError, match=r"no adapter for Linear.*register_adapter") as error:
        find_adapter(torch.nn.Linear(2, 2))
    assert "Qwen2VLForConditionalGeneration" in str(error.value)


def test_the_adapter_of_contributing_serves_it(registered):
    model, inputs, answer = tiny_vip_llava(), sample(), torch.arange(10, 30)
    result = ARC(MSEA(model)).attribute(inputs, answer)
    assert result.grid_attr[0].shape == (20, 6, 6)
    assert float(result.grid_attr[0].max()) > 0


def test_its_cells_are_where_they_should_be(registered):
    model, inputs, answer = without_mixing(tiny_vip_llava()), sample(), torch.arange(10, 60)
    before = LogitLens(model).attribute(inputs, answer).grid_attr[0]
    for cell in range((SIDE // PATCH) ** 2):
        row, col = divmod(cell, SIDE // PATCH)
        pixels = inputs["pixel_values"].clone()
        pixels[..., row * PATCH : (row + 1) * PATCH, col * PATCH : (col + 1) * PATCH] += 1
        after = LogitLens(model).attribute({**inputs, "pixel_values": pixels}, answer).grid_attr[0]
        assert (before != after).any(0).nonzero().tolist() == [[row, col]]
