"""The rules of the package's architecture, as functions of its source.

Each rule is a function of a folder of source files that gives one line per problem; nothing is
imported, so that a rule can be tried on a folder of bad files (tests/test_architecture.py).
"""

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "captum_mllm"
ROOT_FILES = {"__init__", "__main__", "_captum", "files", "geometry", "result", "validation"}
ROOT_FILES |= {"pictures", "words", "result_file"}
FLOORS = (  # a file imports from its own room and from the rooms of the floors below it
    {"functional", "geometry", "validation", "files", "pictures", "_captum"},
    {"words", "adapters", "result_file"},
    {"model", "data", "visualization"},
    {"result"},
    {"attr", "bridge", "metrics"},
    {"methods", "reference"},
    {"benchmark", "checking"},
    {"cli", "__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = set(FLOOR) - ROOT_FILES
FILE_LINES, FUNCTION_LINES = 300, 50

Definition = ast.FunctionDef | ast.AsyncFunctionDef


# ---- reading ------------------------------------------------------------------------------------


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def sources(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def room(root: Path, path: Path) -> str:
    """The folder of the root that a file is in, or the name of a file in the root itself."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def module_name(root: Path, path: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(root: Path) -> dict[str, Path]:
    return {module_name(root, path): path for path in sources(root)}


def imports(root: Path, path: Path) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name or None) of every import in a file, wherever it stands."""
    package = module_name(root, path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def ours(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of the package's own modules that a file imports, whole or names of them."""
    for line, module, name in imports(root, path):
        inner = f"{module}.{name}"
        if module.split(".")[0] == root.name and not for_version(root, path, module, name):
            yield line, inner if inner in modules(root) else module


def for_version(root: Path, path: Path, module: str, name: str | None) -> bool:
    """Whether an import of the root itself is there for ``__version__`` alone."""
    used = {
        node.attr
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == root.name
    }
    return module == root.name and (
        name == "__version__" or (name is None and used == {"__version__"})
    )


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Strings that stand alone: docstrings, and those below an attribute."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines with code: no docstring, comment or blank line."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    nothing |= {tokenize.ENCODING, tokenize.ENDMARKER}
    text = {(string.lineno, string.col_offset) for string in docstrings(parsed(path))}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in nothing and token.start not in text:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines


def public_names(path: Path) -> list[str]:
    """What ``__all__`` lists, where it is written out."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value)) if isinstance(node.value, ast.List) else []
    return []


# ---- rooms and floors ---------------------------------------------------------------------------


def rooms(root: Path) -> list[str]:
    """The root holds the agreed files and folders, nothing else, and py.typed."""
    files = {path.stem for path in root.glob("*.py")}
    folders = {path.parent.name for path in root.glob("*/__init__.py")}
    problems = [f"{name}.py is not a file of the root" for name in sorted(files - ROOT_FILES)]
    problems += [f"{name}/ is not a folder of the root" for name in sorted(folders - FOLDERS)]
    problems += [f"{name}.py is missing" for name in sorted(ROOT_FILES - files)]
    problems += [f"{name}/ is missing" for name in sorted(FOLDERS - folders)]
    problems += [
        f"{path.relative_to(root)}: folders are one deep"
        for path in sources(root)
        if len(path.relative_to(root).parts) > 2
    ]
    return problems if (root / "py.typed").exists() else [*problems, "py.typed is missing"]


def floors(root: Path) -> list[str]:
    """Imports point down, lazy ones and those for type checkers too."""
    problems = []
    for path in sources(root):
        here = room(root, path)
        if path == root / "__init__.py" or here not in FLOOR:
            continue
        allowed = {here, *(name for name in FLOOR if FLOOR[name] < FLOOR[here])}
        allowed |= {"cli"} if here == "__main__" else set()
        problems += [
            f"{path.relative_to(root)}:{line} imports {module}"
            for line, module in ours(root, path)
            if module.partition(".")[2].split(".")[0] not in allowed
        ]
    return problems


def circles(root: Path) -> list[str]:
    """No file imports itself by a detour, in whatever way."""
    graph = {
        name: {module for _, module in ours(root, path) if module in modules(root)} - {name}
        for name, path in modules(root).items()
    }
    reach: dict[str, set[str]] = {}
    for name in graph:
        seen: set[str] = set()
        waiting = list(graph[name])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += graph[other]
        reach[name] = seen
    found = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in graph
        if name in reach[name]
    }
    return [f"a circle of {len(circle)} files: {', '.join(sorted(circle))}" for circle in found]


def private_imports(root: Path) -> list[str]:
    """No private name, and no private module, of another room is used."""
    problems = []
    for path in sources(root):
        names: set[str] = set()
        for line, module, name in imports(root, path):
            parts = module.split(".")
            if parts[0] != root.name:
                continue
            there = parts[1] if len(parts) > 1 else name or ""
            if there == room(root, path):
                continue
            names.add(name or parts[0])
            whole = [part for part in (*parts, name or "") if is_private(part)]
            if whole and whole != ["_captum"]:
                problems.append(f"{path.relative_to(root)}:{line} imports {'.'.join(whole)}")
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr):
                continue
            if isinstance(node.value, ast.Name) and node.value.id in names:
                what = ast.unparse(node)
                problems.append(f"{path.relative_to(root)}:{node.lineno} uses {what}")
    return problems


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def studies_use_public_names(root: Path) -> list[str]:
    """The recorded measurements (docs/studies) take from the package what a user may take."""
    package = root.parents[1] / PACKAGE
    hidden = {name for path in sources(package) for name in private_words(parsed(path))}
    problems = []
    for path in sources(root):
        used = {
            (node.lineno, node.attr)
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute) and node.attr in hidden
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        }
        for line, module, name in imports(root, path):
            if module.split(".")[0] == PACKAGE:
                parts = (*module.split("."), name or "")
                used |= {(line, part) for part in parts if is_private(part)}
        problems += [f"{path.relative_to(root)}:{line} uses {name}" for line, name in sorted(used)]
    return problems


def private_words(tree: ast.Module) -> set[str]:
    """Private names that a file defines, attributes that it sets with them."""
    named = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    named |= {node.name for node in ast.walk(tree) if isinstance(node, Definition | ast.ClassDef)}
    return {name for name in named if is_private(name)}


def public_names_are_unique(root: Path) -> list[str]:
    """A name in several ``__all__`` is one thing, defined in one file."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for module, path in modules(root).items():
        for name in public_names(path):
            found[name].setdefault(origin(root, module, name), module)
    return [
        f"{name} of {' and of '.join(sorted(homes.values()))} are different things"
        for name, homes in sorted(found.items())
        if len(homes) > 1
    ]


def origin(root: Path, module: str, name: str) -> str:
    """The module in which a name is defined, through the imports that pass it on."""
    path = modules(root).get(module)
    for _, source, taken in imports(root, path) if path else ():
        if taken == name and source in modules(root):
            return origin(root, source, name)
    return module


# ---- what a room may know -----------------------------------------------------------------------


def model_calls(root: Path) -> list[str]:
    """The user's model runs in model/ only."""
    problems = []
    for path in sources(root):
        if room(root, path) == "model":
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and runs_model(node.func):
                call = ast.unparse(node.func)
                problems.append(f"{path.relative_to(root)}:{node.lineno} calls {call}")
    return problems


def runs_model(called: ast.expr) -> bool:
    """Whether a call is ``model(...)``, ``x.model(...)``, ``model.generate(...)`` or the like."""
    if isinstance(called, ast.Attribute) and called.attr in ("generate", "forward", "__call__"):
        called = called.value
    name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
    return bool(re.fullmatch(r"_?(model|forward_func)", name))


GENERIC = {"AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor", "ProcessorMixin"}
KIND = re.compile(
    r"\b[A-Z]\w*(?:ForConditionalGeneration|(?:Image|Video)?Processor(?:Fast|Pil)?)\b"
)


def class_names(root: Path) -> set[str]:
    """Names of transformers' classes of models and processors that adapters/ knows."""
    names: set[str] = set()
    for path in sources(root / "adapters"):
        for _, word in code_words(parsed(path)):
            names |= set(KIND.findall(word))
    return names - GENERIC


def code_words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every identifier and every string that is not a docstring."""
    text = {id(string) for string in docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in text:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name


def family_names(root: Path) -> list[str]:
    """Classes of families and of their processors are named in adapters/ only."""
    known = class_names(root)
    return [
        f"{path.relative_to(root)}:{line} names {', '.join(sorted(found))}"
        for path in sources(root)
        if room(root, path) != "adapters"
        for line, word in code_words(parsed(path))
        if (found := known & set(re.findall(r"\w+", word)))
    ]


FORMULAS_IMPORT = {"torch", "jaxtyping", "einops", "typing", "math", PACKAGE}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
WITHOUT_MODELS = FLOORS[0] | {"words", "data", "visualization", "result", "metrics"}


def formulas_know_tensors(root: Path) -> list[str]:
    """functional/ imports torch, einops and jaxtyping; rooms of data know no transformers."""
    problems = []
    for path in sources(root):
        here = room(root, path)
        for line, module, _ in imports(root, path):
            top = module.split(".")[0]
            if (here == "functional" and top not in FORMULAS_IMPORT) or (
                here in WITHOUT_MODELS and top == "transformers"
            ):
                problems.append(f"{path.relative_to(root)}:{line} imports {module}")
    return problems


def captums_private_names(root: Path) -> list[str]:
    """captum's private names are used in _captum.py only; elsewhere what captum.attr exports."""
    return [
        f"{path.relative_to(root)}:{line} imports {module}.{name}"
        for path in sources(root)
        if path.name != "_captum.py"
        for line, module, name in imports(root, path)
        if module.split(".")[0] == "captum"
        if module != "captum.attr" or is_private(name or "")
    ]


SAFELY = {  # a call that reads a file -> the keyword that keeps code in the file from running
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "from_pretrained": "trust_remote_code",
}


def files_run_no_code(root: Path) -> list[str]:
    """Nothing is unpickled, and code of a checkpoint is refused in so many words."""
    problems = []
    for path in sources(root):
        where = path.relative_to(root)
        for line, module, name in imports(root, path):
            if module.split(".")[0] in PICKLES:
                problems.append(f"{where}:{line} imports {'.'.join(filter(None, (module, name)))}")
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            wanted = SAFELY.get(called) or SAFELY.get(called.rpartition(".")[2])
            given = [ast.unparse(keyword) for keyword in node.keywords]  # "**options" is taken
            if wanted and not any(text.startswith((wanted, "**")) for text in given):
                problems.append(f"{where}:{node.lineno} {called} without {wanted}")
    return problems


# ---- options ------------------------------------------------------------------------------------


def exported_attributors(root: Path) -> dict[str, tuple[Path, ast.ClassDef]]:
    """The classes that attr/ exports, where they are written."""
    classes = {
        node.name: (path, node)
        for path in sources(root / "attr")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    }
    exported = public_names(root / "attr" / "__init__.py")
    return {name: classes[name] for name in exported if name in classes}


def defaults(function: Definition) -> Iterator[tuple[str, ast.expr]]:
    """(name, default) of the parameters that have one."""
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    yield from (
        (arg.arg, default)
        for arg, default in zip(
            plain[len(plain) - len(args.defaults) :], args.defaults, strict=True
        )
    )
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if default is not None:
            yield arg.arg, default


def constructor(node: ast.ClassDef) -> Definition | None:
    made = [item for item in node.body if isinstance(item, Definition) and item.name == "__init__"]
    return made[0] if made else None


def defaults_are_literals(root: Path) -> list[str]:
    """A signature of an exported attributor shows the values that are used."""
    problems = []
    for name, (path, node) in exported_attributors(root).items():
        function = constructor(node)
        for option, default in defaults(function) if function else ():
            try:
                ast.literal_eval(default)
            except ValueError:
                where = f"{path.relative_to(root)}:{default.lineno}"
                problems.append(f"{where} {name}({option}={ast.unparse(default)})")
    return problems


def options_are_documented_once(root: Path) -> list[str]:
    """An option of several attributors is explained by one of them; the others say "see ..."."""
    explained: defaultdict[str, list[str]] = defaultdict(list)
    problems = []
    for name, (path, node) in exported_attributors(root).items():
        function = constructor(node)
        text = ast.get_docstring(node) or ""
        for option, default in defaults(function) if function else ():
            entry = re.search(rf"^ +{option}(?: \(.*?\))?: (.*)", text, re.MULTILINE)
            if entry is None:
                problems.append(
                    f"{path.relative_to(root)}:{default.lineno} {name}({option}=) is not explained"
                )
            elif not re.match("(see|as for|as in) ", entry[1], re.IGNORECASE):
                explained[option].append(name)
    return problems + [
        f"{option} is explained by {', '.join(sorted(names))}"
        for option, names in sorted(explained.items())
        if len(names) > 1
    ]


# ---- style --------------------------------------------------------------------------------------


def sizes(root: Path) -> list[str]:
    """Files and functions stay small, docstrings, comments and blank lines not counted."""
    problems = []
    for path in sources(root):
        lines = code_lines(path)
        if len(lines) > FILE_LINES:
            problems.append(f"{path.relative_to(root)}: {len(lines)} lines of code")
        for node in ast.walk(parsed(path)):
            if isinstance(node, Definition):
                own = lines & set(range(node.lineno, (node.end_lineno or 0) + 1))
                if len(own) > FUNCTION_LINES:
                    where = f"{path.relative_to(root)}:{node.lineno}"
                    problems.append(f"{where} {node.name}: {len(own)} lines of code")
    return problems


def manners(root: Path) -> list[str]:
    """No assert, no bare except, no pyplot at a file's top; each file says what it is."""
    problems = []
    for path in sources(root):
        tree = parsed(path)
        wrong = [(1, "has no docstring")] * (ast.get_docstring(tree) is None)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                wrong.append((node.lineno, "asserts"))
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append((node.lineno, "catches everything"))
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom) and "pyplot" in ast.unparse(node):
                wrong.append((node.lineno, "imports pyplot when it is imported"))
        problems += [f"{path.relative_to(root)}:{line} {what}" for line, what in wrong]
    return problems
