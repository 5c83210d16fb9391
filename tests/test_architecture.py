"""The shape of the package: rooms, floors, what each may know, sizes; nothing happens on import.

Each rule is a function in tests/architecture.py that lists all problems; each is tried on a bad
file below, so that a rule which finds nothing is known to look.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import captum_mllm
from tests import architecture as rules
from tests.oracle.families import NAMES

PACKAGE = Path(captum_mllm.__file__).parent
STUDIES = PACKAGE.parent / "docs" / "studies"


def check(rule, root=PACKAGE):
    problems = rule(root)
    assert not problems, f"{inspect.getdoc(rule)}\n" + "\n".join(problems)


def test_the_root_holds_the_agreed_files_and_folders():
    check(rules.rooms)


def test_imports_point_down():
    check(rules.floors)


def test_no_file_imports_itself_by_a_detour():
    check(rules.circles)


def test_the_model_runs_in_its_room_only():
    check(rules.model_calls)


def test_classes_of_families_are_named_by_their_adapters_only():
    assert {f"{n}ForConditionalGeneration" for n in NAMES} <= rules.class_names(PACKAGE)
    check(rules.family_names)


def test_defaults_are_literals():
    check(rules.defaults_are_literals)


def test_an_option_is_documented_once():
    check(rules.options_are_documented_once)


def test_no_private_name_of_another_room():
    check(rules.private_imports)


def test_studies_use_public_names():
    check(rules.studies_use_public_names, STUDIES)


def test_public_names_are_unique():
    check(rules.public_names_are_unique)


def test_files_and_functions_are_small():
    check(rules.sizes)


def test_formulas_know_tensors_only():
    check(rules.formulas_know_tensors)


def test_captums_private_names_are_in_one_file():
    check(rules.captums_private_names)


def test_files_run_no_code():
    check(rules.files_run_no_code)
    check(rules.files_run_no_code, STUDIES)


def test_no_assert_no_bare_except_no_pyplot_on_import():
    check(rules.manners)


# ---- each rule can fail -------------------------------------------------------------------------

ATTR = 'from captum_mllm.attr.lens import Lens, Maps\n__all__ = ["Lens", "Maps"]\n'
TWO = '''
class Lens:
    """A lens.

    Args:
        layer: of the model.
    """

    def __init__(self, model, *, layer={0}): ...


class Maps:
    """Maps.

    Args:
        layer: {1}.
    """

    def __init__(self, model, layer=-1): ...
'''
GEMMA = '@register_adapter("GemmaForConditionalGeneration")\nclass A: ...\n'
BAD = {  # what a bad folder shows -> its rule, its files, what the rule must say
    "a stray file": (rules.rooms, {"misc.py": ""}, "misc.py is not a file of the root"),
    "a stray folder": (rules.rooms, {"misc/__init__.py": ""}, "misc/ is not a folder of the root"),
    "a file that is gone": (rules.rooms, {"words.py": ""}, "result.py is missing"),
    "a folder in a folder": (rules.rooms, {"attr/x/y.py": ""}, "attr/x/y.py: folders are one"),
    "an import upwards": (
        rules.floors,
        {"words.py": "from captum_mllm.attr import MSEA"},
        "words.py:1 imports captum_mllm.attr",
    ),
    "a relative import upwards": (
        rules.floors,
        {"model/a.py": "from ..result import R", "result.py": ""},
        "model/a.py:1 imports captum_mllm.result",
    ),
    "a lazy import of the same floor": (
        rules.floors,
        {"attr/a.py": "def f():\n    from captum_mllm import bridge", "bridge/__init__.py": ""},
        "attr/a.py:2 imports captum_mllm.bridge",
    ),
    "an import of the root": (
        rules.floors,
        {"attr/a.py": "import captum_mllm\ncaptum_mllm.__version__, captum_mllm.MSEA"},
        "attr/a.py:1 imports captum_mllm",
    ),
    "an import from the root": (
        rules.floors,
        {"attr/a.py": "from captum_mllm import MSEA, __version__"},
        "attr/a.py:1 imports captum_mllm",
    ),
    "a type's import upwards": (
        rules.floors,
        {"words.py": "if TYPE_CHECKING:\n    import captum_mllm.cli"},
        "words.py:2 imports captum_mllm.cli",
    ),
    "a circle": (
        rules.circles,
        {
            "attr/a.py": "from captum_mllm.attr.b import f",
            "attr/b.py": "def f():\n    from captum_mllm.attr import c",
            "attr/c.py": "if TYPE_CHECKING:\n    from .a import A",
        },
        "a circle of 3 files: captum_mllm.attr.a, captum_mllm.attr.b, captum_mllm.attr.c",
    ),
    "an adapter's model called": (
        rules.model_calls,
        {"attr/a.py": "out = self._adapter.model(**inputs)"},
        "attr/a.py:1 calls self._adapter.model",
    ),
    "a model called": (rules.model_calls, {"a.py": "model(inputs)"}, "a.py:1 calls model"),
    "a model that generates": (
        rules.model_calls,
        {"cli/a.py": "ids = unwrapped.model.generate(inputs)"},
        "cli/a.py:1 calls unwrapped.model.generate",
    ),
    "a family's class": (
        rules.family_names,
        {"adapters/gemma.py": GEMMA, "a.py": 'if name == "GemmaForConditionalGeneration": ...'},
        "a.py:1 names GemmaForConditionalGeneration",
    ),
    "a processor's class": (
        rules.family_names,
        {
            "adapters/a.py": "from transformers import FooImageProcessorPil",
            "cli/a.py": "from transformers import FooImageProcessorPil",
        },
        "cli/a.py:1 names FooImageProcessorPil",
    ),
    "a sentinel as a default": (
        rules.defaults_are_literals,
        {"attr/__init__.py": ATTR, "attr/lens.py": TWO.format("PRESET", "see Lens")},
        "attr/lens.py:9 Lens(layer=PRESET)",
    ),
    "an option explained twice": (
        rules.options_are_documented_once,
        {"attr/__init__.py": ATTR, "attr/lens.py": TWO.format(-1, "of the model")},
        "layer is explained by Lens, Maps",
    ),
    "an option not explained": (
        rules.options_are_documented_once,
        {
            "attr/__init__.py": ATTR,
            "attr/lens.py": TWO.format(-1, "see Lens").replace("layer: of", "layers: of"),
        },
        "attr/lens.py:9 Lens(layer=) is not explained",
    ),
    "a private name of another room": (
        rules.private_imports,
        {"attr/a.py": "from captum_mllm.model.forward import _forward"},
        "attr/a.py:1 imports _forward",
    ),
    "a private module of another room": (
        rules.private_imports,
        {"attr/a.py": "import captum_mllm.metrics._arrays"},
        "attr/a.py:1 imports _arrays",
    ),
    "a private name by its module": (
        rules.private_imports,
        {"attr/a.py": "from captum_mllm.model import forward\nforward._forward()"},
        "attr/a.py:2 uses forward._forward",
    ),
    "two things of one name": (
        rules.public_names_are_unique,
        {
            "attr/__init__.py": '__all__ = ["f"]\ndef f(): ...',
            "data/__init__.py": '__all__ = ["f"]\nfrom captum_mllm.data.a import f',
            "data/a.py": "def f(): ...",
        },
        "f of captum_mllm.attr and of captum_mllm.data are different things",
    ),
    "a long file": (rules.sizes, {"a.py": "a = 1\n" * 301}, "a.py: 301 lines of code"),
    "a long function": (
        rules.sizes,
        {"a.py": "class A:\n    def f(self):\n" + "        a = 1\n" * 50},
        "a.py:2 f: 51 lines of code",
    ),
    "a formula that knows numpy": (
        rules.formulas_know_tensors,
        {"functional/a.py": "def f():\n    import numpy as np"},
        "functional/a.py:2 imports numpy",
    ),
    "a result that knows models": (
        rules.formulas_know_tensors,
        {"result.py": "from transformers import AutoModel"},
        "result.py:1 imports transformers",
    ),
    "captum's private module": (
        rules.captums_private_names,
        {"attr/a.py": "from captum._utils.common import _run_forward"},
        "attr/a.py:1 imports captum._utils.common._run_forward",
    ),
    "a pickle": (rules.files_run_no_code, {"a.py": "import pickle"}, "a.py:1 imports pickle"),
    "weights that may be pickled": (
        rules.files_run_no_code,
        {"a.py": "torch.load(f, weights_only=False)"},
        "a.py:1 torch.load without weights_only=True",
    ),
    "arrays that may be pickled": (
        rules.files_run_no_code,
        {"a.py": "np.load(f)"},
        "a.py:1 np.load without allow_pickle=False",
    ),
    "a checkpoint that may bring code": (
        rules.files_run_no_code,
        {"a.py": "AutoModel.from_pretrained(f)"},
        "a.py:1 AutoModel.from_pretrained without trust_remote_code",
    ),
    "an assert": (rules.manners, {"a.py": '"""A."""\nassert 1'}, "a.py:2 asserts"),
    "a bare except": (
        rules.manners,
        {"a.py": '"""A."""\ntry:\n    b()\nexcept:\n    pass'},
        "a.py:4 catches everything",
    ),
    "pyplot on import": (
        rules.manners,
        {"a.py": '"""A."""\nimport matplotlib.pyplot as plt'},
        "a.py:2 imports pyplot when it is imported",
    ),
    "a file without a docstring": (rules.manners, {"a.py": "a = 1"}, "a.py:1 has no docstring"),
}


def written(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("what", BAD)
def test_each_rule_can_fail(what, tmp_path):
    rule, files, message = BAD[what]
    problems = rule(written(tmp_path / "captum_mllm", files))
    assert any(problem.startswith(message) for problem in problems), problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from captum_mllm.metrics import _arrays", "a.py:1 uses _arrays"),
        ("import captum_mllm.metrics._arrays", "a.py:1 uses _arrays"),
        ("from captum_mllm.attr import MSEA\nMSEA(model)._hidden()", "a.py:2 uses _hidden"),
    ],
)
def test_the_rule_of_the_studies_can_fail(text, message, tmp_path):
    written(tmp_path / "captum_mllm", {"attr/a.py": "class A:\n    def _hidden(self): ..."})
    assert rules.studies_use_public_names(
        written(tmp_path / "docs/studies", {"a.py": f"{text}\nself._hidden = os._exit"})
    ) == [message]


def test_good_files_pass(tmp_path):
    """What stands near the bound of a rule, on the right side."""
    files = {
        "__init__.py": '"""P."""\nfrom captum_mllm.attr import Lens\n__all__ = ["Lens"]',
        "__main__.py": '"""M."""\nfrom captum_mllm.cli import main',
        "_captum.py": '"""C."""\nfrom captum._utils.common import _run_forward',
        "adapters/gemma.py": f'"""G."""\n{GEMMA}',
        "attr/__init__.py": f'"""A."""\n{ATTR}',
        "attr/lens.py": f'"""L."""{TWO.format(-1, "see :class:`Lens`")}'
        "from captum_mllm._captum import log_usage\nfrom captum_mllm.model import forward\n",
        "model/forward.py": '"""Runs ``model(**inputs)``, a GemmaForConditionalGeneration."""\n'
        "out = adapter.model(**inputs)\n",
        "functional/lens.py": '"""F.\n\n' + "Text.\n" * 300 + '"""\n# A comment.\n\n' + "a = 1\n" * 300,  # noqa: E501
        "cli/__init__.py": '"""M."""\nfrom captum_mllm import __version__\n'
        "import captum_mllm\nprint(captum_mllm.__version__)\n"
        "def main():\n    print(model_forward(model))\n" + "    a = 1\n" * 48,
    }  # fmt: skip
    written(tmp_path / "captum_mllm", files)
    for rule in {rule for rule, _, _ in BAD.values()} - {rules.rooms}:
        assert rule(tmp_path / "captum_mllm") == [], rule.__name__


# ---- at run time --------------------------------------------------------------------------------

IMPORTED = """
import logging, random, sys, torch, captum.attr, transformers

def state():
    log = logging.getLogger()
    return log.handlers[:], log.level, random.getstate(), torch.is_grad_enabled()

def packages():
    return {name.split(".")[0] for name in sys.modules}

before, theirs, numbers = state(), packages(), torch.get_rng_state().clone()
import captum_mllm
assert state() == before and torch.equal(torch.get_rng_state(), numbers)
late = ("captum_mllm.visualization", "captum_mllm.reference", "captum_mllm.cli.main")
print(*(name for name in sys.modules if name.startswith(late)))
import captum_mllm.cli.main, captum_mllm.words
heavy = {"matplotlib", "PIL", "sklearn", "skimage", "scipy", "pandas"}
print(*(packages() - theirs) & heavy)
"""


def test_nothing_happens_on_import():
    """No log, no random number, no page's or figure's library beyond what captum brings."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTED], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n\n", "")


def test_public_names():
    assert len(captum_mllm.__all__) == len(set(captum_mllm.__all__))
    fixed = {"LogitLens", "TokenActivationMap", "MSEA", "ARC", "MultiScaleAttribution",
             "RankCorrelationDenoiser"}  # fmt: skip
    assert fixed <= set(captum_mllm.__all__)
    things = [getattr(captum_mllm, name) for name in captum_mllm.__all__]
    things = [thing for thing in things if callable(thing)]
    named = {thing.__name__: thing for thing in things} | {
        f"{thing.__name__}.{name}": getattr(thing, name)
        for thing in things
        for name, member in vars(thing).items()
        if not name.startswith("_") and callable(member)
    }
    assert [name for name, thing in named.items() if not inspect.getdoc(thing)] == []


def test_attributors_are_captums():
    from captum.attr import Attribution

    for name in ("LogitLens", "TokenActivationMap", "MSEA", "ARC"):
        kind = getattr(captum_mllm, name)
        assert issubclass(kind, Attribution), name
        assert list(inspect.signature(kind.attribute).parameters)[:2][1] == "inputs", name
        assert hasattr(kind.attribute, "__wrapped__"), name  # NoiseTunnel calls it


def test_parameters_are_documented():
    """Every parameter of a public class and of the functions has a line of its own."""
    import captum_mllm.functional as functional

    things = [
        getattr(captum_mllm, n) for n in captum_mllm.__all__ if callable(getattr(captum_mllm, n))
    ]
    things += [getattr(functional, n) for n in functional.__all__ if n[0].islower()]
    missing = [
        f"{thing.__name__}: {name}"
        for thing in things
        for name in inspect.signature(thing).parameters
        if f"{name}:" not in (inspect.getdoc(thing) or "")
    ]
    assert missing == []
