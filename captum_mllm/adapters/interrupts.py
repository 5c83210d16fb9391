"""Interrupts (Ctrl-C) that wait while a user's model is set up or put back.

Python handles a signal between any two steps of the main thread. A ``with`` statement does not help
in between: after something was changed and before the statement knows how to undo it, or while it
is undone. :func:`uninterrupted` makes context managers that are entered as a whole and left as a
whole. While the outermost of them lasts, our handler stands in the place of the user's. If a signal
comes while one is entered or left, which the interrupted frames tell, it waits until that is done;
at any other time it goes to the user's handler at once. Signals reach the main thread only, so
nothing waits in others.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Ctrl-C, and the signals with which time limits are made; those without a handler in Python stay.
_NAMES = ("SIGINT", "SIGALRM", "SIGTERM")
_NUMBERS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

_USERS: dict[int, Callable[[int, FrameType | None], Any]] = {}  # in whose place ours stands
_BEFORE: dict[int, Callable[[int, FrameType | None], Any]] = {}  # the last of them, kept
_WAITING: dict[int, None] = {}  # numbers of signals that came while a model was set up or put back


class _Whole(AbstractContextManager[_T], Generic[_T]):
    """Another context manager, entered and left without an interrupt in between."""

    def __init__(self, inner: AbstractContextManager[_T]) -> None:
        self._inner = inner
        self._outermost = False

    def __enter__(self) -> _T:
        self._outermost = not _USERS and _in_main_thread()
        try:
            if self._outermost:
                _take_place()
            value = self._inner.__enter__()
            try:
                _pass_on(sys._getframe(1))
            except BaseException as error:
                self._inner.__exit__(type(error), error, error.__traceback__)
                raise
        except BaseException:
            self._finish(sys._getframe(1))
            raise
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            self._finish(sys._getframe(1))

    def _finish(self, caller: FrameType | None) -> None:
        try:
            if self._outermost:
                _give_back(list(_USERS))
        finally:
            _pass_on(caller)


_WHOLE = {_Whole.__enter__.__code__, _Whole.__exit__.__code__}


def uninterrupted(
    function: Callable[_P, Iterator[_T]],
) -> Callable[_P, AbstractContextManager[_T]]:
    """As ``contextlib.contextmanager``, but an interrupt waits while it is entered or left.

    Args:
        function: a generator function that yields once.

    Example:
        >>> @uninterrupted
        ... def changed(values):
        ...     values.append(1)
        ...     try:
        ...         yield values
        ...     finally:
        ...         values.clear()
        >>> with changed([]) as values:
        ...     print(values)
        [1]
    """
    make = contextmanager(function)

    @wraps(function)
    def whole(*args: _P.args, **kwargs: _P.kwargs) -> AbstractContextManager[_T]:
        return _Whole(make(*args, **kwargs))

    return whole


def acquire(lock: Any, seconds: float = 0.05) -> None:
    """Acquire a lock; an interrupt ends the wait, also where interrupts wait otherwise.

    Args:
        lock: of :mod:`threading`.
        seconds: how often an interrupt is looked for, default 0.05.

    Example:
        >>> lock = threading.RLock()
        >>> acquire(lock)
        >>> lock.release()
    """
    while not lock.acquire(timeout=seconds):
        _pass_on(None)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _take_place() -> None:
    """Put our handler in the place of the user's."""
    _WAITING.clear()  # what waited while another interrupt was passed on, which counts for both
    for number in _NUMBERS:
        handler = signal.getsignal(number)
        handler = _BEFORE.get(number) if handler is _receive else handler
        if callable(handler):
            _USERS[number] = _BEFORE[number] = handler
            try:
                signal.signal(number, _receive)
            except ValueError:  # Python's main thread is not the process's: no signal reaches us
                _USERS.clear()
                return


def _give_back(numbers: list[int]) -> None:
    """Put the user's handlers back; once the first is, an interrupt can end this function."""
    if not numbers:
        return
    try:
        handler = _USERS.pop(numbers[0])
        if signal.getsignal(numbers[0]) is _receive:  # else the user has set another meanwhile
            signal.signal(numbers[0], handler)
    finally:
        _give_back(numbers[1:])


def _receive(number: int, frame: FrameType | None) -> None:
    """Our handler."""
    if _is_busy(frame):
        _WAITING[number] = None
    else:  # where somebody kept ours beyond its context: what stood there before
        (_USERS.get(number) or _BEFORE[number])(number, frame)


def _is_busy(frame: FrameType | None) -> bool:
    """Whether a context manager is being entered or left in a frame or in one above it."""
    while frame is not None:
        if frame.f_code in _WHOLE:
            return True
        frame = frame.f_back
    return False


def _pass_on(caller: FrameType | None) -> None:
    """Give the signals that wait to the user's handlers, unless the caller is to be whole too."""
    if not _WAITING or not _in_main_thread() or _is_busy(caller):
        return
    number, _ = _WAITING.popitem()
    try:
        _users_handler(number)(number, sys._getframe(1))
    finally:
        _pass_on(caller)


def _users_handler(number: int) -> Callable[[int, FrameType | None], Any]:
    handler: Any = _USERS.get(number) or signal.getsignal(number)
    if handler is _receive:  # somebody kept ours beyond its context, as pdb does
        handler = _BEFORE.get(number)
    return handler if callable(handler) else signal.default_int_handler
