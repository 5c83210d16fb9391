"""Damage to bytes and to plain data, drawn by hypothesis."""

import copy
from typing import Any

from hypothesis import strategies as st

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**70, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "1", "\ud800", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\x00",
    [], [[]], [1], [None], [1, 2], [1.5, 2], ["a", "b"], [0.5] * 6, [[0.5] * 6], list(range(2000)),
    {}, {"a": 1}, {"id": None}, [{}], [[[[[[]]]]]],
)  # fmt: skip


def damaged_bytes(draw: Any, data: bytes) -> tuple[str, bytes]:
    """A few bits flipped, cut, doubled, overwritten or put in."""
    kind = draw(st.sampled_from(("flip", "cut", "zeros", "more", "twice", "hole")))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "flip":
        changed = bytearray(data)
        for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=3)):
            changed[place] ^= 1 << draw(st.integers(0, 7))
        return f"flip: {len(data)} bytes", bytes(changed)
    size = draw(st.integers(1, 64))
    made = {
        "cut": data[:at],
        "zeros": data[:at] + bytes(min(size, len(data) - at)) + data[at + size :],
        "more": data[:at] + draw(st.binary(min_size=1, max_size=64)) + data[at:],
        "twice": data + data[at:],
        "hole": data[:at] + data[at + size :],
    }
    return f"{kind}: at {at}, {size}", made[kind]


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value within plain data; of long lists the first few."""
    found = [path] if path else []
    if isinstance(data, dict):
        for key, value in data.items():
            found += places(value, (*path, key))
    elif isinstance(data, list):
        for n, value in enumerate(data[:8]):
            found += places(value, (*path, n))
    return found


def at_path(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def damaged_data(draw: Any, data: Any) -> tuple[str, Any]:
    """A value replaced, removed, renamed, doubled, or exchanged with another."""
    data = copy.deepcopy(data)
    path = draw(st.sampled_from(places(data)))
    parent, key = at_path(data, path[:-1]), path[-1]
    kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "swap")))
    what = f"{kind}: {'.'.join(map(str, path))}"
    if kind == "remove":
        del parent[key]
    elif kind == "rename":
        if isinstance(parent, dict):
            parent[f"{key}_"] = parent.pop(key)
        else:
            parent.append(copy.deepcopy(parent[key]))
    elif kind == "swap":
        other = draw(st.sampled_from(places(data)))
        value = copy.deepcopy(at_path(data, other))
        parent[key] = value
        what += f" by {'.'.join(map(str, other))}"
    else:
        value = draw(st.sampled_from(NASTY))
        parent[key] = copy.deepcopy(value)
        what += f" by {repr(value)[:40]}"
    return what, data
