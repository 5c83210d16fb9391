"""The shape of the package: imports point one way, nothing happens on import, files stay small."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import captum_mllm

PACKAGE = Path(captum_mllm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINE = {  # the way of the data; a part may import from parts with a smaller number only
    "functional": 0, "checks": 0, "geometry": 0, "_captum": 0, "words": 0, "labels": 0,
    "storage": 0, "adapters": 1, "trace": 1, "batches": 2, "inputs": 2, "capture": 2, "result": 2,
    "rescale": 3, "targets": 3,
    "generation": 3, "runner": 4, "attr": 5,
    "coco_masks": 5, "coco": 6, "label_maps": 6, "metrics": 6, "visualization": 6, "bridge": 6,
    "reference": 7, "methods": 7, "cli_model": 8,
    "cli_arguments": 8, "benchmark": 9, "cli_benchmark": 10, "cli": 11, "__main__": 12,
}  # fmt: skip
NO_MODEL = {"functional", "geometry", "words", "labels", "_captum", "trace", "result", "metrics"}


def part_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path):
    """Full dotted names that a file imports, wherever the import stands, and if at run time."""
    tree = ast.parse(path.read_text())
    checked_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = ["captum_mllm", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_every_part_has_its_place_in_the_line():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts <= LINE.keys(), f"place {parts - LINE.keys()} in LINE"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports_of(path):
        if not name.startswith("captum_mllm."):
            continue
        other = name.split(".")[1]
        if other in LINE and other != part:
            # Inside plot_* and to_captum only.
            late_plots = part == "result" and other in ("visualization", "bridge")
            same = LINE[other] == LINE[part] and part not in ("metrics", "visualization", "bridge")
            assert LINE[other] < LINE[part] or late_plots or same, f"{part} imports {name}"
        if other == "_captum":
            continue
        assert other != "captum"


def test_parts_of_one_number_do_not_import_each_other_in_a_circle():
    graph = {}
    for path in FILES:
        part = part_of(path)
        for name in imports_of(path):
            if name.startswith("captum_mllm.") and (other := name.split(".")[1]) in LINE:
                graph.setdefault(part, set()).add(other)
    graph["result"] -= {"visualization", "bridge"}

    def reachable(part, seen):
        for other in graph.get(part, set()) - {part} - seen:
            seen.add(other)
            reachable(other, seen)
        return seen

    for part in graph:
        if part != "__init__":
            assert part not in reachable(part, set()), f"{part} imports itself by a detour"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_who_may_know_models_and_captums_private_names(path):
    names = list(imports_of(path))
    if part_of(path) in NO_MODEL:
        assert not [n for n in names if n.split(".")[0] == "transformers"]
    if path.name != "_captum.py":
        private = [n for n in names if n.startswith("captum.") and not n.startswith("captum.attr.")]
        private += [n for n in names if n.startswith("captum.attr._")]
        assert set(private) <= {"captum.attr"}


def test_formulas_know_tensors_only():
    for path in (PACKAGE / "functional").glob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots <= {"torch", "jaxtyping", "einops", "typing", "math", "captum_mllm"}, path.name
        ours = [n for n in imports_of(path) if n.startswith("captum_mllm.")]
        assert all(n.startswith("captum_mllm.functional") for n in ours)


def docstring_lines(tree):
    nodes = [
        n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    said = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    return sum(text.end_lineno - text.lineno + 1 for text in said)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_assert_no_bare_except_and_small_files(path):
    text = path.read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}"
    assert len(text.splitlines()) - docstring_lines(tree) <= 300  # docstrings may say it all
    assert ast.get_docstring(tree), "a module says what it is"


def in_a_fresh_python(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_nothing_happens_on_import():
    code = (
        "import logging, random, sys, torch, captum.attr, transformers\n"
        "before = logging.getLogger().handlers[:], logging.getLogger().level\n"
        "state = torch.get_rng_state().clone(), random.getstate()\n"
        "import captum_mllm\n"
        "assert (logging.getLogger().handlers[:], logging.getLogger().level) == before\n"
        "assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]\n"
        "assert torch.is_grad_enabled()\n"
        "names = ('captum_mllm.visualization', 'captum_mllm.reference', 'captum_mllm.cli.main')\n"
        "assert not [n for n in sys.modules if n.startswith(names)]\n"
    )
    assert in_a_fresh_python(code) == ("", "")


def test_import_brings_no_pyplot_of_its_own():
    """captum imports pyplot itself; ours must not add to what captum and transformers bring."""
    code = "import sys, {}; print(' '.join(sorted(m.split('.')[0] for m in sys.modules)))"
    theirs = set(in_a_fresh_python(code.format("captum.attr, transformers, torch"))[0].split())
    ours = set(in_a_fresh_python(code.format("captum_mllm"))[0].split())
    assert not (ours - theirs) & {"matplotlib", "PIL", "sklearn", "skimage", "scipy", "pandas"}
    for path in FILES:
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("pyplot" in ast.unparse(node) for node in top), path.name


def test_public_names():
    assert len(captum_mllm.__all__) == len(set(captum_mllm.__all__))
    fixed = {"LogitLens", "TokenActivationMap", "MSEA", "ARC", "MultiScaleAttribution",
             "RankCorrelationDenoiser"}  # fmt: skip
    assert fixed <= set(captum_mllm.__all__)
    for name in captum_mllm.__all__:
        thing = getattr(captum_mllm, name)
        if name in ("__version__", "PRESETS"):
            continue
        assert inspect.getdoc(thing), name
        for member_name, member in vars(thing).items():
            if member_name.startswith("_") or not callable(member):
                continue
            assert inspect.getdoc(getattr(thing, member_name)), f"{name}.{member_name}"


@pytest.mark.parametrize("name", ["LogitLens", "TokenActivationMap", "MSEA", "ARC"])
def test_attributors_are_captums(name):
    from captum.attr import Attribution

    kind = getattr(captum_mllm, name)
    assert issubclass(kind, Attribution)
    assert list(inspect.signature(kind.attribute).parameters)[:2][1] == "inputs"
    assert hasattr(kind.attribute, "__wrapped__")  # NoiseTunnel calls it


def test_parameters_are_documented():
    """Every parameter of a public class and of the functions has a line of its own."""
    import captum_mllm.functional as functional

    things = [
        getattr(captum_mllm, n) for n in captum_mllm.__all__ if callable(getattr(captum_mllm, n))
    ]
    things += [getattr(functional, n) for n in functional.__all__ if n[0].islower()]
    for thing in things:
        doc = inspect.getdoc(thing)
        for name in inspect.signature(thing).parameters:
            assert f"{name}:" in doc, f"{thing.__name__}: {name}"
