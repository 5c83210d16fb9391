"""The bridge to captum: its methods on multimodal LLMs, its LLM attribution with correct values."""

from captum_mllm.bridge.llm_inputs import ExactLabels, PromptInput, image_input
from captum_mllm.bridge.teacher_forced import TeacherForced, check_llm_attribution
from captum_mllm.bridge.token_log_prob import TokenLogProb

__all__ = [
    "ExactLabels",
    "PromptInput",
    "TeacherForced",
    "TokenLogProb",
    "check_llm_attribution",
    "image_input",
]
