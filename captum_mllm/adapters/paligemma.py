"""PaliGemma 1 and 2: a prefix LM, whose prompt tokens all attend to each other."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from captum_mllm.adapters.patch_grid import PatchGridAdapter
from captum_mllm.adapters.registry import register_adapter


@register_adapter("PaliGemmaForConditionalGeneration")
class PaliGemmaAdapter(PatchGridAdapter):
    """Adapter of PaliGemma 1 and 2: a prefix LM, whose prompt tokens all attend to each other."""

    required: ClassVar[Mapping[str, str]] = {
        "token_type_ids": "the prompt is masked causally and all hidden states are wrong"
    }
    suffix_fill: ClassVar[Mapping[str, int]] = {"attention_mask": 1, "token_type_ids": 1}
    bidirectional_prompt = True

    @override
    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        super().check_inputs(inputs)
        if bool((inputs["token_type_ids"] != 0).any()):
            raise ValueError(
                "token_type_ids must be 0 throughout the prompt (1 marks an answer, which is "
                "masked causally): call the processor without suffix=, and pass the answer as "
                "target."
            )
