"""The API reference is whole: every public name has its entry, and a docstring that says enough.

Enough: each parameter by name, what comes back, which errors; of a formula its source and an
example. The examples run as doctests.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import captum_mllm

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "reference"
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
from cli_options import commands  # noqa: E402
from public_names import comment  # noqa: E402

NOT_FOR_USERS = {"captum_mllm.adapters.image_only"}  # what the command line needs
SECTIONS = ("Args", "Returns", "Raises", "Reference", "Example", "Yields", "Controls")
MATHS = ("captum_mllm.functional", "captum_mllm.metrics")


def packages() -> list[str]:
    """Modules that say by ``__all__`` what is public in them."""
    found = ["captum_mllm"]
    for info in pkgutil.walk_packages(captum_mllm.__path__, "captum_mllm."):
        origin = importlib.util.find_spec(info.name).origin
        if info.name not in NOT_FOR_USERS and re.search(
            "^__all__ = ", Path(origin).read_text(), re.M
        ):
            found.append(info.name)
    return found


def entries() -> list[str]:
    """Full names that the reference pages document."""
    found = []
    for page in sorted(PAGES.glob("*.rst")):
        text = page.read_text()
        for module, names in re.findall(r"^\.\. public:: (\S+)\n\n((?:   \S+\n)+)", text, re.M):
            found += [f"{module}.{name}" for name in names.split()]
        found += re.findall(r"^\.\. py:data:: (\S+)", text, re.M)
    return found


def resolve(name: str) -> object:
    """What a name stands for, or None."""
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute, None)


DOCUMENTED = {name: value for name in entries() if (value := resolve(name)) is not None}


def members() -> dict[str, object]:
    """Functions and classes, with what a class documents itself: methods and properties."""
    found = {}
    for name, value in DOCUMENTED.items():
        if inspect.isroutine(value):
            found[name] = value
        if inspect.isclass(value):
            found[name] = value
            for key, member in vars(value).items():
                inner = getattr(member, "__func__", member)
                new = not any(hasattr(base, key) for base in value.__mro__[1:])
                known = inspect.isfunction(inner) or isinstance(inner, property)
                if known and not key.startswith("_") and (inner.__doc__ or new):
                    found[f"{name}.{key}"] = inner
    return found


MEMBERS = members()
CONSTANTS = sorted(DOCUMENTED.keys() - MEMBERS.keys() - {"captum_mllm.__version__"})


def test_every_public_name_has_an_entry():
    ids = {id(value) for value in DOCUMENTED.values()}
    modules = map(importlib.import_module, packages())
    public = {f"{m.__name__}.{name}": getattr(m, name) for m in modules for name in m.__all__}
    assert [name for name, value in public.items() if id(value) not in ids] == []


def test_every_entry_is_of_a_name_that_there_is():
    assert [name for name in entries() if name not in DOCUMENTED] == []


def test_no_name_has_two_entries():
    assert len(entries()) == len(set(entries())) == len({id(v) for v in DOCUMENTED.values()})


def test_every_constant_says_what_it_is():
    assert CONSTANTS
    assert [name for name in CONSTANTS if not comment(*name.rsplit(".", 1))] == []


def sections(value: object) -> dict[str, str]:
    """A docstring cut at its sections; what stands before them under ""."""
    text = inspect.cleandoc(value.__doc__ or "")
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.M)
    return {"": parts[0].strip(), **dict(zip(parts[1::2], parts[2::2], strict=True))}


def parameters(value: object) -> list[str]:
    """Names that a caller may give."""
    if isinstance(value, property):
        return []
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if inspect.isclass(value) and "__init__" not in vars(value):
        return list(getattr(value, "_fields", ()))
    names = inspect.signature(value).parameters
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def raises(value: object) -> bool:
    """Whether its own code (not what it calls) has an error for the user."""
    code = value.fget if isinstance(value, property) else value
    if inspect.isclass(value):
        made = "__post_init__" if dataclasses.is_dataclass(value) else "__init__"
        code = vars(value).get(made)
    if not inspect.isfunction(code):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(code))))
    errors = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    names = [ast.unparse(error).split("(")[0] for error in errors]
    return any(name.endswith("Error") and name != "NotImplementedError" for name in names)


def wanted(name: str, value: object) -> set[str]:
    """The sections that the code asks for."""
    found = {"Args"} if parameters(value) else set()
    if inspect.isfunction(value):
        method = next(iter(inspect.signature(value).parameters), "") in ("self", "cls")
        if value.__annotations__.get("return") is not None and (parameters(value) or not method):
            found.add("Returns")
    if raises(value):
        found.add("Raises")
    if inspect.isfunction(value) and name.rsplit(".", 1)[0] in MATHS:
        found |= {"Reference", "Example"}
    return found


def explained_above(name: str, value: object) -> bool:
    """Whether a base class explains the method, or a constructor with the same parameters."""
    owner = value if inspect.isclass(value) else MEMBERS.get(name.rsplit(".", 1)[0])
    ours = [base for base in getattr(owner, "__mro__", ())[1:] if "captum_mllm" in base.__module__]
    if inspect.isclass(value):
        same = [base for base in ours if parameters(base) == parameters(value)]
        return any("Args" in sections(base) for base in same)
    last = name.rsplit(".", 1)[1]
    return any(getattr(vars(base).get(last), "__doc__", None) for base in ours)


def missing(name: str, value: object) -> list[str]:
    """What the docstring leaves out."""
    found = sections(value)
    needed = wanted(name, value) - ({"Returns"} if "Yields" in found else set())
    if not found[""]:
        return ["what it is"]
    if explained_above(name, value):
        return []
    return sorted(needed - found.keys()) + [
        parameter
        for parameter in parameters(value)
        if not re.search(rf"^\s+{parameter}( \(.*\))?:", found.get("Args", ""), re.M)
    ]


def test_every_docstring_says_enough():
    assert len(MEMBERS) > 100
    assert {name: out for name, value in MEMBERS.items() if (out := missing(name, value))} == {}


def test_a_poor_docstring_is_found():
    def poor(one: int, other: int) -> int:
        """Said.

        Args:
            one: said.
        """
        raise ValueError(one + other)

    assert missing("captum_mllm.functional.poor", poor) == [
        "Example", "Raises", "Reference", "Returns", "other",
    ]  # fmt: skip


def test_every_option_of_the_command_line_says_what_it_does():
    parsers = commands()
    assert set(parsers) == {"explain", "benchmark", "check"}
    for name, parser in parsers.items():
        assert parser.description
        assert not [a.option_strings for a in parser._actions if not a.help], name
