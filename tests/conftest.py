"""Shared fixtures: tiny random LLaVAs with their real processor, and the shipped model."""

from dataclasses import replace

from jaxtyping import install_import_hook

# Shapes in the annotations of the formulas are checked at run time.
install_import_hook(
    [
        "captum_mllm.functional",
        "captum_mllm.model.trace",
        "captum_mllm.geometry",
        "captum_mllm.model.forward",
    ],
    "beartype.beartype",
)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.oracle.tiny import Subject, random_picture, tiny_llava, tiny_processor  # noqa: E402

# The same cases in each run, on any machine: what fails here fails there.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")

PROMPT = "USER: <image>\nwhat is here ? ASSISTANT:"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def model():
    return tiny_llava()


@pytest.fixture(scope="session")
def processor():
    return tiny_processor()


@pytest.fixture(scope="session")
def picture():
    return random_picture(0)


@pytest.fixture
def inputs(processor, picture):
    return dict(processor(images=picture, text=PROMPT, return_tensors="pt"))


@pytest.fixture
def answer():
    return torch.tensor([20, 31, 20, 45, 7])


@pytest.fixture(scope="session")
def shipped():
    """The shipped reference model and its processor."""
    from captum_mllm.reference import load

    return load()


@pytest.fixture(params=["tiny", "shipped"])
def subject(request):
    """A model to explain: the tiny random one, then the shipped one."""
    return request.getfixturevalue(f"{request.param}_subject")


@pytest.fixture(scope="session")
def tiny_subject(model, processor):
    pictures = random_picture(0), random_picture(1)
    answer = torch.tensor([10, 31, 10, 45, 7])  # 10 is in the prompt too; all have a map
    return Subject("tiny", model, processor, PROMPT, *pictures, answer)


@pytest.fixture(scope="session")
def shipped_subject(shipped):
    from captum_mllm.reference import make_scene, render_pil

    model, processor = shipped
    pictures = [render_pil(make_scene(seed))[0] for seed in (1, 2)]
    asked = Subject("shipped", model, processor, PROMPT, *pictures, torch.empty(0))
    ids = asked.inputs["input_ids"]
    said = model.generate(**asked.inputs, do_sample=False, max_new_tokens=10)[0, ids.shape[1] :]
    return replace(asked, answer=said)
