"""Ctrl-C at a chosen line: a real SIGINT, which Python handles where it always would.

A trace function written in Python can't send it: Python would handle the signal within that
function, at places where none is ever handled. Here the line before sets the frame's trace function
to one written in C (``raise`` of the C library), so that the signal has arrived when the line
begins, and the interpreter handles it at its next own check: a call, a loop, a function's start.
"""

import contextlib
import ctypes
import functools
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import captum_mllm
from captum_mllm.adapters.hooks import one_thread

PACKAGE = str(Path(captum_mllm.__file__).parent)
# Beside ours, what our set-up calls of others: contexts, gradient modes, replaced parameters.
TORCHS = ("autograd/grad_mode.py", "nn/utils/stateless.py", "overrides.py", "utils/_contextlib.py")
OTHERS = {contextlib.__file__, *(str(Path(torch.__file__).parent / name) for name in TORCHS)}
STEP_BY_STEP = {"__enter__", "__exit__", "_finish", "one_thread", "unchanged", "acquire"}
CORE = (
    "adapters/hooks.py",
    "adapters/interrupts.py",
    "model/forward.py",
    "model/attention.py",
    *OTHERS,
)

Place = tuple[str, int, int]  # file, line, instruction (or -1)


def _in_c(name: str, number: int) -> Any:
    """A trace function that calls one of the C library's, with a number."""
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes = [ctypes.c_int, *[ctypes.py_object] * 3]
    function.restype = None
    return functools.partial(function, number)


_STRIKE, _NOTHING = _in_c("raise", signal.SIGINT), _in_c("abs", 0)


def _is_ours(frame: Any) -> bool:
    """Whether a frame is of our code, or of the others' that our code has called."""
    while frame is not None and frame.f_code.co_filename in OTHERS:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


class _Tracer:
    """Counts the steps of our frames; arms one of them, or notes where each is armed."""

    def __init__(self, arm: int | None = None) -> None:
        self.arm, self.steps = arm, 0
        self.before: dict[int, int] = {}  # frame -> its last step
        self.found: list[tuple[int, Place]] = []

    def on_call(self, frame: Any, event: str, _arg: Any) -> Any:
        if event != "call" or not _is_ours(frame):
            return None
        name = frame.f_code.co_filename
        # Each instruction of what enters and leaves, of all else each line.
        core = name.endswith(CORE[:2])
        frame.f_trace_opcodes = core and frame.f_code.co_name in STEP_BY_STEP
        return self._step(frame)

    def on_step(self, frame: Any, event: str, _arg: Any) -> Any:
        if event in ("line", "opcode"):
            if self.arm is None:
                at = frame.f_lasti if event == "opcode" else -1
                place = (frame.f_code.co_filename, frame.f_lineno, at)
                self.found.append((self.before[id(frame)], place))
        elif event == "exception":
            return self.on_step
        return self._step(frame)

    def _step(self, frame: Any) -> Any:
        self.steps += 1
        self.before[id(frame)] = self.steps
        if self.steps != self.arm:
            return self.on_step
        sys.settrace(_NOTHING)  # from here on no Python runs but what is traced
        above = frame.f_back
        while above is not None:
            above.f_trace = None
            above = above.f_back
        return _STRIKE


def places(call: Callable[[], Any]) -> list[tuple[int, Place]]:
    """(step that arms it, place) of each line of ours that a call executes, in order."""
    tracer = _Tracer()
    sys.settrace(tracer.on_call)
    try:
        call()
    finally:
        sys.settrace(None)
    return tracer.found


def interrupted(call: Callable[[], Any], arm: int) -> bool:
    """Run a call with a SIGINT at a step; whether it ended in the KeyboardInterrupt."""

    def on_interrupt(_number: int, frame: Any) -> None:
        sys.settrace(None)
        while frame is not None:
            frame.f_trace = None
            frame = frame.f_back
        raise KeyboardInterrupt

    def on_lost(lost: Any) -> None:  # Python drops what is raised while it collects garbage
        if lost.exc_type is not KeyboardInterrupt:
            hook(lost)

    before, hook = signal.signal(signal.SIGINT, on_interrupt), sys.unraisablehook
    sys.unraisablehook = on_lost
    try:
        sys.settrace(_Tracer(arm).on_call)
        try:
            call()
            [str(n) for n in range(3)]  # a signal of the last line is handled here
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            assert signal.getsignal(signal.SIGINT) is on_interrupt, "SIGINT's handler was left"
        return False
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


# ---- the state that must be as before -----------------------------------------------------------


def light_state(model: Any) -> dict[str, Any]:
    """All that a model's modules and configs hold, by identity: cheap enough for each line."""
    modules = dict(model.named_modules())
    configs = {id(c): c for m in modules.values() if (c := getattr(m, "config", None)) is not None}
    held: dict[str, Any] = {}
    for name, module in modules.items():
        for key, value in vars(module).items():
            held[f"{name}.{key}"] = _light(value)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                held[f"{name}.{key} grad"] = (
                    parameter.requires_grad, id(parameter.grad), parameter._version
                )  # fmt: skip
    for number, config in enumerate(configs.values()):
        for key, value in vars(config).items():
            held[f"config{number}.{key}"] = _light(value)
    held["gradients"] = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    held["function modes"] = torch._C._len_torch_function_stack()
    return held


def _light(value: Any) -> Any:
    if isinstance(value, dict):
        return id(value), [(key, id(one)) for key, one in value.items()]
    return value if isinstance(value, bool | int | float | str) else id(value)


def changes(before: dict[str, Any], model: Any) -> list[str]:
    """What is not as before; whether another thread can run the model is tried too."""
    after = light_state(model)
    names = {**before, **after}
    found = [name for name in names if before.get(name, "") != after.get(name, "")]
    free = threading.Event()

    def other() -> None:
        with one_thread(model):
            free.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    thread.join(2)
    return found if free.is_set() else [*found, "the lock"]


def left_by_interrupts(
    make: Callable[[], tuple[Any, Callable[[], Any]]], done: set[Place], every: int = 1
) -> tuple[int, dict[Place, list[str]]]:
    """Interrupt a call at each place not done yet (or at some); how many, and what was left.

    ``make`` gives a model and the call; once more where an interrupt left the model changed.
    """
    model, call = make()
    call()
    arms: dict[Place, list[int]] = {}
    for arm, place in places(call):
        arms.setdefault(place, []).append(arm)
    new = [place for place in arms if place not in done]
    done |= set(new)
    chosen = [(place, arms[place][0]) for place in new]
    # Entered first is left last: the last time is another.
    chosen += [(place, arms[place][-1]) for place in new if place[0].endswith(CORE)]
    chosen += [(place, arms[place][0]) for place in list(arms)[::40] if place not in new]
    before, left, arrived = light_state(model), {}, 0
    for place, arm in chosen[::every]:
        arrived += interrupted(call, arm)
        if what := changes(before, model):
            left[place] = what
            model, call = make()
            call()
            before = light_state(model)
    assert arrived >= 0.97 * len(chosen[::every]), f"{arrived} interrupts arrived"
    return arrived, left
