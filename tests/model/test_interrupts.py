"""Ctrl-C at every line of ours, as a real SIGINT: the model is as before, and works."""

import contextlib
import io
import signal
import threading
import time

import accelerate
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution

from captum_mllm import (
    ARC,
    MSEA,
    DirectLogitAttribution,
    LogitLens,
    MultiScaleAttribution,
    TeacherForced,
    TokenActivationMap,
    TokenLogProb,
    check,
    probe_layout,
)
from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.hooks import one_thread
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.bridge import check_llm_attribution, image_input
from captum_mllm.methods import explain
from captum_mllm.metrics import (
    hallucination_scores,
    insertion_deletion,
    keep_and_remove,
    linear_datamodeling_score,
    sample_gates,
)
from captum_mllm.model.attention import attention_weights, observed_attention
from captum_mllm.model.forward import evaluating
from captum_mllm.model.observing import language_inputs, last_logits
from tests.oracle.families import family
from tests.oracle.interrupting import interrupted, left_by_interrupts, places
from tests.oracle.model_state import worn

MAP = torch.linspace(0, 1, 256).reshape(16, 16)
NAMED = {"map": MAP}
SOME = {"tokens": [1], "perturbations_per_eval": 8}


class Scene:
    """A model in use, the inputs of a picture, and the answer to explain."""

    def __init__(self, name):
        kin = family(name)
        self.model = worn(kin.model) if name == "Llava" else kin.model.train()
        self.processor, self.picture, self.answer = kin.processor, kin.picture, kin.answer
        self.inputs, self.kin = kin.encode(), kin


def attributed(method, **options):
    def make(scene):
        explainer = method(scene.model)
        return lambda: explainer.attribute(scene.inputs, scene.answer, **options)

    return make


def explained(method, **options):
    def make(scene):
        def call():
            given = scene.model, scene.processor, scene.inputs, scene.answer[:2]
            return explain(method, *given, **options)

        return call

    return make


def multi_scale(scene):
    f = TokenLogProb(scene.model, scene.inputs, scene.answer, scene.processor)
    return lambda: MultiScaleAttribution(FeatureAblation(f), scales=(1.0, 2.0)).attribute(
        f.pixels, target=1, feature_mask=torch.zeros(1, 1, 16, 16).long()
    )


def llm_attribution(scene):
    tokenizer = scene.processor.tokenizer
    method = LLMAttribution(FeatureAblation(TeacherForced(scene.model)), tokenizer)
    inp = image_input(scene.picture, None, scene.kin.prompt, scene.processor)
    return lambda: check_llm_attribution(method, inp, scene.answer[:2], forward_in_tokens=False)


def probed(scene):
    def call():
        return probe_layout(scene.model, scene.inputs, scene.processor, scene.picture)

    return call


def quiet_check(scene):
    def call():
        with contextlib.redirect_stderr(io.StringIO()):
            return check(scene.model, scene.processor, only=("lens", "prefix", "teacher forcing"))

    return call


def looks(scene):
    adapter = find_adapter(scene.model)
    return lambda: (
        language_inputs(adapter, scene.inputs),
        last_logits(adapter, scene.inputs),
        attention_weights(adapter, scene.inputs, adapter.grids(scene.inputs), 1),
    )


def scored(metric):
    def make(scene):
        given = scene.model, scene.inputs, scene.answer
        return lambda: metric(*given, processor=scene.processor)

    return make


def generated(scene):
    return lambda: LogitLens(scene.model).attribute(scene.inputs, gen_args={"max_new_tokens": 2})


def pixel_versions(scene):
    pixels = scene.inputs["pixel_values"].repeat(2, 1, 1, 1)
    rest = {name: value for name, value in scene.inputs.items() if name != "pixel_values"}
    lens = LogitLens(scene.model)
    return lambda: lens.attribute(pixels, tuple(scene.answer.tolist()), rest)


CALLS = {
    "lens": ("Llava", attributed(LogitLens)),
    "lens of a layer": ("Llava", attributed(lambda m: LogitLens(m, layer=0))),
    "msea+arc": ("Qwen2VL", attributed(lambda m: ARC(MSEA(m, consistency=True)))),
    "msea": ("Llava", attributed(lambda m: MSEA(m, scales=(1.0, 1.5)))),
    "windows": ("LlavaNext", attributed(lambda m: MSEA(m, scales=(1.0, 2.0)))),
    "tam": ("Llava", attributed(TokenActivationMap)),
    "direct": ("Qwen2VL", attributed(DirectLogitAttribution)),
    "generated": ("Qwen2VL", generated),
    "pixels": ("Llava", pixel_versions),
    "integrated gradients": ("Llava", explained("integrated_gradients", steps=1)),
    "gradcam": ("Llava", explained("gradcam")),
    "attention": ("Llava", explained("attention")),
    "ablation": ("Llava", explained("ablation", grid=(1, 2))),
    "randomised": ("Llava", explained("randomised_model")),
    "multi-scale": ("Llava", multi_scale),
    "LLMAttribution": ("Llava", llm_attribution),
    "faithfulness": (
        "Llava",
        scored(lambda *given, **more: insertion_deletion(*given, MAP, steps=2, **SOME, **more)),
    ),
    "keep and remove": (
        "Llava",
        scored(lambda *given, **more: keep_and_remove(*given, NAMED, MAP > 0.5, **SOME, **more)),
    ),
    "datamodeling": (
        "Llava",
        scored(
            lambda *given, **more: linear_datamodeling_score(
                *given, NAMED, subsets=4, **SOME, **more
            )
        ),
    ),
    "hallucination": (
        "Llava",
        scored(lambda *given, **more: hallucination_scores(*given, tokens=[1], **more)),
    ),
    "gates": ("Llava", scored(lambda *given, **more: sample_gates(*given, tokens=[1], **more))),
    "probing": ("Qwen2VL", probed),
    "check": ("Llava", quiet_check),
    "looks": ("Qwen2VL", looks),
}
DONE: set = set()  # places that another call was interrupted at


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_every_line(name):
    kind, build = CALLS[name]

    def make():
        scene = Scene(kind)
        return scene.model, build(scene)

    struck, left = left_by_interrupts(make, DONE)
    print(f"{name}: {struck} interrupts, {len(left)} left something")
    assert not left


# ---- in a moment: a sample of the lines, and those that set up and clean up without a forward ----


def settings(scene):
    adapter = find_adapter(scene.model)

    def call():
        with evaluating(adapter, gradients=True), observed_attention(adapter, id):
            pass
        with evaluating(adapter):
            pass

    return call


@pytest.mark.parametrize(("build", "every"), [(settings, 31), (CALLS["lens"][1], 41)])
def test_some_lines(build, every):
    def make():
        scene = Scene("Llava")
        return scene.model, build(scene)

    struck, left = left_by_interrupts(make, set(), every)
    assert struck > 20
    assert not left


def test_the_model_works_afterwards():
    scene = Scene("Llava")
    call = CALLS["msea"][1](scene)
    expected = call()
    steps = places(call)
    assert interrupted(call, steps[len(steps) // 2][0])
    for got, wanted in zip(call().grid_attr, expected.grid_attr, strict=True):
        assert torch.equal(got, wanted)


def test_an_offloaded_model(tmp_path):
    """Weights that were loaded for a call that was interrupted are away again."""
    scene = Scene("Llava")
    expected = CALLS["lens"][1](scene)()

    def fail(*_):
        signal.raise_signal(signal.SIGINT)

    away = accelerate.disk_offload(scene.model, str(tmp_path), execution_device="cpu")
    lens = LogitLens(away)
    layer = away.get_decoder().layers[1]
    handle = layer.mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        lens.attribute(scene.inputs, scene.answer)
    handle.remove()
    assert all(parameter.is_meta for parameter in away.parameters())
    got = lens.attribute(scene.inputs, scene.answer)
    assert torch.equal(got.grid_attr[0], expected.grid_attr[0])


# ---- the pieces ---------------------------------------------------------------------------------


def test_an_interrupt_waits_while_something_is_entered_or_left():
    done = []

    @uninterrupted
    def changed():
        signal.raise_signal(signal.SIGINT)
        done.append("entered")
        try:
            yield
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("left")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), changed():
        done.append("never")
    assert done == ["entered", "left"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_in_the_body_comes_at_once():
    done = []

    @uninterrupted
    def changed():
        try:
            yield
        finally:
            done.append("left")

    with pytest.raises(KeyboardInterrupt), changed():
        signal.raise_signal(signal.SIGINT)
    assert done == ["left"]


def test_the_users_own_handler_is_asked():
    got = []

    @uninterrupted
    def changed():
        signal.raise_signal(signal.SIGINT)
        assert not got
        yield

    before = signal.signal(signal.SIGINT, lambda number, _: got.append(number))
    try:
        with changed():
            assert len(got) == 1
            signal.raise_signal(signal.SIGINT)
            assert len(got) == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("way", ["kept", "put back", "chained"])
def test_our_handler_may_outlive_its_context(way):
    """A debugger in a hook keeps the handler that stands there, and puts it back later."""
    before, mine = signal.getsignal(signal.SIGINT), []

    @uninterrupted
    def changed():
        yield

    def chain(number, frame):
        mine.append(number)
        kept(number, frame)

    try:
        with changed():
            kept = signal.getsignal(signal.SIGINT)
        if way == "put back":
            signal.signal(signal.SIGINT, kept)
            with changed():
                pass
        signal.signal(signal.SIGINT, chain if way == "chained" else kept)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert len(mine) == (way == "chained")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_wait_for_another_thread(model, inputs, answer):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with one_thread(model):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(5)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            LogitLens(model).attribute(inputs, answer)
        assert time.perf_counter() - start < 5
    finally:
        leave.set()
        thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    LogitLens(model).attribute(inputs, answer)
