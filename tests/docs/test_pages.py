"""What README and the manual show works: blocks run, commands exist, links lead somewhere."""

import importlib.util
import json
import re
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import matplotlib.pyplot as plt
import numpy as np
import pytest
from markdown_it import MarkdownIt

from captum_mllm.cli.main import build_parser
from studies.records import read_record

ROOT = Path(__file__).parents[2]
GUIDE = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.md")
    if "studies" not in path.parts
)
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *GUIDE]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tutorials").glob("*.ipynb"))
CARDS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("docs/studies/records/*.md", "captum_mllm/reference/models/*/README.md")
    for path in ROOT.glob(pattern)
)
FENCES = {"python", "sh", "text", "math", ""}  # one name for each, so that none escapes the tests
OTHER_COMMANDS = {"pip", "git", "cd"}


@cache
def markdown(name: str) -> str:
    text = (ROOT / name).read_text()
    if not name.endswith(".ipynb"):
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@cache
def tokens(name: str) -> list:
    """Blocks and what is in their lines, flat."""
    text = re.sub(r"\A---\n.*?\n---\n", "", markdown(name), flags=re.DOTALL)  # a card's metadata
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token, *(token.children or [])]
    return found


def blocks(name: str, language: str) -> list[str]:
    fences = [token for token in tokens(name) if token.type == "fence"]
    return [token.content for token in fences if token.info.strip() == language]


# ---- code ---------------------------------------------------------------------------------------


def test_blocks_name_a_language_that_is_tested():
    infos = {
        (name, token.info.strip())
        for name in PAGES + NOTEBOOKS
        for token in tokens(name)
        if token.type == "fence"
    }
    assert [at for at in infos if not at[1].startswith("{") and at[1] not in FENCES] == []


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, "python")])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    """In order, in one namespace per file."""
    from captum_mllm.adapters import registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    namespace: dict = {}
    try:
        for number, code in enumerate(blocks(name, "python")):
            exec(compile(code, f"{name}, block {number + 1}", "exec"), namespace)
    finally:
        plt.close("all")


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, cut at pipes and the like."""
    found: list[list[str]] = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        for word in [*shlex.split(line, comments=True), "&&"]:
            found[-1:] = [found[-1], []] if word in ("&&", "|", ";", ">") else [[*found[-1], word]]
    return [words for words in found if words]


def check_command(words: list[str], whole: bool) -> None:
    """Raise where a command has a program, a module, a target or an option that there is not."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "captum-mllm":
        check_cli(rest, whole)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), words
        settings = dict(word.split("=", 1) for word in rest if "=" in word)
        if "study" in rest:
            check_program(["-m", f"studies.{settings['NAME']}", *settings.get("ARGS", "").split()])
    elif program.startswith("python"):
        check_program(rest)
    else:
        assert program in OTHER_COMMANDS, words


def check_cli(rest: list[str], whole: bool) -> None:
    parser = build_parser()
    if whole:
        parser.parse_args(rest)
        return
    (commands,) = [action.choices for action in parser._actions if action.dest == "command"]
    known = commands[rest[0]] if rest and not rest[0].startswith("-") else parser
    options = {word.split("=")[0] for word in rest if word.startswith("-")}
    assert options <= set(known._option_string_actions), rest


def check_program(rest: list[str]) -> None:
    if rest[0] == "-m":
        spec = importlib.util.find_spec(rest[1])
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{rest[1]}.__main__")
        assert spec is not None, rest
        path, rest = Path(spec.origin or ""), rest[2:]
    else:
        path, rest = ROOT / rest[0], rest[1:]
    source = path.read_text()
    if path.is_relative_to(ROOT):
        options = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert {option for option in options if f'"{option}"' not in source} == set(), path


def wrong_command(words: list[str], whole: bool) -> str:
    """Why a command can't be run, or ""."""
    try:
        check_command(words, whole)
    except (AssertionError, SystemExit, FileNotFoundError) as error:
        return repr(error)
    return ""


def test_shell_blocks_name_what_there_is():
    found = [
        (name, words, wrong_command(words, whole=True))
        for name in PAGES
        for text in blocks(name, "sh")
        for words in commands(text)
    ]
    assert found
    assert [command for command in found if command[2]] == []


def test_commands_in_the_text_name_what_there_is():
    inline = r"(captum-mllm|make|python -m captum_mllm\S*|python \S+\.py)( |$)"
    found = [
        (name, token.content, wrong_command(shlex.split(token.content), whole=False))
        for name in PAGES + NOTEBOOKS + CARDS
        for token in tokens(name)
        if token.type == "code_inline" and re.match(inline, token.content)
    ]
    assert found
    assert [command for command in found if command[2]] == []


@pytest.mark.parametrize(
    "wrong",
    [
        "make nothing",
        "captum-mllm explain --pictures a.png --out out",
        "captum-mllm draw",
        "make study NAME=nothing",
        'make study NAME=sets ARGS="--nothing"',
        "python tests/nothing.py",
        "curl something",
    ],
)
def test_wrong_commands_are_found(wrong):
    assert wrong_command(shlex.split(wrong), whole=True)


# ---- links --------------------------------------------------------------------------------------


def links(name: str) -> list[str]:
    found = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(name)]
    html = [token.content for token in tokens(name) if token.type.startswith("html")]
    return [link for link in found if link] + re.findall(r'(?:src|href)="([^"]+)"', " ".join(html))


def slug(title: str) -> str:
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@cache
def anchors(name: str) -> set[str]:
    found: list[str] = re.findall(r'<\w+ id="([^"]+)"', markdown(name))
    found += re.findall(r"^\(([\w-]+)\)=$", markdown(name), re.MULTILINE)
    for token, line in pairwise(tokens(name)):
        if token.type == "heading_open":
            made = slug("".join(part.content for part in line.children))
            again = sum(made == other.rsplit("-", 1)[0] or made == other for other in found)
            found.append(f"{made}-{again}" if made in found else made)
    return set(found)


def wrong(name: str, link: str) -> str:
    """Why a link leads nowhere, or ""."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        good = parts.scheme == "https" and "." in parts.netloc and not re.search(r"\s|\.$", link)
        return "" if good else "is no https address"
    path = ((ROOT / name).parent / unquote(parts.path)).resolve() if parts.path else ROOT / name
    if not path.exists() or not path.is_relative_to(ROOT):
        return "no such file"
    if parts.fragment and path.suffix in (".md", ".ipynb"):
        known = anchors(str(path.relative_to(ROOT)))
        return "" if unquote(parts.fragment) in known else "no such heading"
    return "an anchor of a file that has none" if parts.fragment else ""


def test_links_lead_somewhere():
    found = [(name, link) for name in PAGES + NOTEBOOKS + CARDS for link in links(name)]
    assert found
    assert {at: why for at in found if (why := wrong(*at))} == {}


@pytest.mark.parametrize(
    "link",
    [
        "nothing.md",
        "#nothing",
        "docs/captum.md#nothing",
        "http://arxiv.org",
        "https://arxiv",
        "../x",
    ],
)
def test_wrong_links_are_found(link):
    assert wrong("README.md", link)


def test_anchors_are_githubs():
    assert {"what-works", "tokenlogprob-a-function-of-pixels-and-of-token-embeddings"} <= anchors(
        "docs/captum.md"
    )


def test_the_check_of_the_built_pages_finds_what_is_wrong(tmp_path):
    from tests.docs.check_site import problems

    (tmp_path / "b.html").write_text('<p id="there">')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">x</a><a href="#b">x</a><a href="c.html">x</a><a href="b.html#not">'
        'x</a><a href="https://captum.ai">x</a><script src="https://captum.ai/x.js"></script>'
    )
    found = [line.split(": ", 1)[1] for line in problems(tmp_path)]
    assert found == [
        "#b: no such anchor",
        "c.html: no such file",
        "b.html#not: no such anchor",
        "https://captum.ai/x.js: is fetched from another site",
    ]


# ---- text ---------------------------------------------------------------------------------------


def test_nothing_is_left_to_fill_in():
    gap = re.compile(r"[A-Z]+_PLACE|@[A-Z0-9_]+@|TODO|FIXME|XXX")
    assert {n: gaps for n in PAGES + NOTEBOOKS if (gaps := gap.findall(markdown(n)))} == {}


def test_table_of_sets_is_the_recorded_one():
    """The three families' means, to the digits that the table gives."""
    record = read_record(ROOT / "docs/studies/records/sets.json.xz")["measured"]
    text = (ROOT / "docs/results.md").read_text()
    columns = ("average_precision", "obj_iou", "func_iou", "removed", "read")
    for name in record["llava"]:
        (row,) = re.findall(rf"^\| {name} \| (.*) \|$", text, re.M)
        cells = row.split(" | ")
        shown = [cells[0], cells[2], cells[4], cells[5], cells[6].removesuffix(" %")]
        for metric, cell in zip(columns, shown, strict=True):
            for family, value in zip(("llava", "qwen2vl", "internvl"), cell.split(), strict=True):
                values = np.concatenate([row[metric] for row in record[family][name]["rows"]])
                mean = values.mean() * (100 if metric == "read" else 1)
                digits = len(value.split(".")[1]) if "." in value else 0
                assert float(value) == pytest.approx(mean, abs=0.51 * 10**-digits), (name, metric)


@pytest.mark.slow
def test_readme_table_of_results_is_made_of_the_record():
    from studies.quality import RECORDS
    from studies.quality_table import readme_table

    record = json.loads((RECORDS / "quality.json").read_text())
    assert readme_table(record) in (ROOT / "README.md").read_text()
