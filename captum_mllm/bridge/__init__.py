"""The bridge to captum: its own methods on multimodal LLMs, its LLM attribution made right."""

from captum_mllm.bridge.llm_inputs import ExactLabels, PromptInput, image_input
from captum_mllm.bridge.results import cell_mask, to_captum
from captum_mllm.bridge.teacher_forced import TeacherForced, check_llm_attribution
from captum_mllm.bridge.token_log_prob import TokenLogProb

__all__ = [
    "ExactLabels",
    "PromptInput",
    "TeacherForced",
    "TokenLogProb",
    "cell_mask",
    "check_llm_attribution",
    "image_input",
    "to_captum",
]
