"""One damaged case, run and judged; the counts of an area.

An outcome is one of

- **right value**: the operation returned what the case's own check, which shares no code with the
  package, finds right: as if nothing were damaged, or as recomputed from the damaged file;
- **clear error**: :func:`is_clear`;
- **told**: a UserWarning that names the argument or the file; the value is that of the inputs as
  they are;

or else a failure: **raw error** (any other exception), **wrong value** (returned, not right, and
nothing said), **too slow**, **too large**.
"""

import resource
import signal
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import captum_mllm

PACKAGE = str(Path(captum_mllm.__file__).parent)
GOOD = ("right value", "clear error", "told")
BAD = ("raw error", "wrong value", "too slow", "too large")
SECONDS, MIB = 20.0, 400


@dataclass(frozen=True)
class Case:
    """One operation on something damaged.

    Args:
        what: the damage, for the report.
        run: the operation.
        is_right: whether what it returns is right; a contradiction has no right value.
        names: a clear error, or a warning, names one of these.
    """

    what: str
    run: Callable[[], Any]
    is_right: Callable[[Any], bool]
    names: Sequence[str]


@dataclass
class Tally:
    """Outcomes of an area, and an example of each kind of failure."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, outcome: str, what: str, detail: str) -> None:
        self.counts[outcome] += 1
        if outcome in BAD:
            self.failures.setdefault(f"{outcome}: {detail}", what)


class _TooSlowError(BaseException):
    """No Exception, so that nothing on the way takes it for an error of its own."""


def is_clear(error: BaseException, names: Sequence[str]) -> bool:
    """An error that the package raised itself and that says what it is about.

    Its class is ValueError, TypeError or FileNotFoundError, or one that the package derives from
    them, none of other libraries; the innermost frame is the package's; the message names the
    argument or the file.
    """
    kind = type(error)
    ours = kind.__module__.startswith("captum_mllm") and issubclass(kind, ValueError | TypeError)
    if not ours and kind not in (ValueError, TypeError, FileNotFoundError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and frames[-1].filename.startswith(PACKAGE)
    return inside and any(name in str(error) for name in names)


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise in the main thread after so many seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def judge(case: Case, seconds: float = SECONDS, mib: float = MIB) -> tuple[str, str]:
    """The outcome of a case, and a line on it."""
    before = _peak()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with _bounded(seconds):
                value = case.run()
                right = case.is_right(value)
        except _TooSlowError:
            return "too slow", f"{seconds} s"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = frames[-1]
            detail = f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {error}"[
                :240
            ]
            outcome = "clear error" if is_clear(error, case.names) else "raw error"
        else:
            told = [w for w in caught if issubclass(w.category, UserWarning)]
            said = any(name in str(w.message) for w in told for name in case.names)
            outcome = "right value" if right else "told" if said else "wrong value"
            detail = case.what
    if _peak() - before > mib:
        return "too large", f"{_peak() - before:.0f} MiB more"
    return outcome, detail


def fuzz(
    draw_case: Callable[[st.DataObject], Case], examples: int, *, strict: bool = True
) -> Tally:
    """Make and judge so many cases, the same ones each time.

    Args:
        draw_case: makes one.
        examples: how many.
        strict: raise at the first failure, made as small as hypothesis can; or count on.
    """
    tally = Tally()
    phases = (Phase.generate, Phase.shrink) if strict else (Phase.generate,)

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, phases=phases,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        case = draw_case(data)
        outcome, detail = judge(case)
        tally.add(outcome, case.what, detail)
        assert outcome in GOOD or not strict, f"{outcome}: {case.what}\n{detail}"

    one()
    return tally
