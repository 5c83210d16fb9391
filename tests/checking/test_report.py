"""The report as table, JSON and page; texts of users can't become markup."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from captum_mllm import Finding, TrustReport
from captum_mllm.checking import tested
from captum_mllm.validation import ArgumentError

HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 1234*5678 }}\"&"
)


def report(*verdicts, **changed):
    lines = [
        Finding(f"line {n}", verdict, f"found {n}.", "do." if verdict == "failed" else "", {"x": n})
        for n, verdict in enumerate(verdicts)
    ]
    about = {"model": "m", "model class": "C", "prompt": "p", "answer": ""}
    return TrustReport(tuple(lines), {**about, **changed})


@pytest.mark.parametrize(
    ("verdicts", "passed"),
    [(("passed", "not tried"), True), (("passed", "failed"), False), ((), True)],
)
def test_what_was_not_tried_is_no_failure(verdicts, passed):
    assert report(*verdicts).passed == passed


def test_the_table():
    text = str(report("passed", "failed", "not tried"))
    assert text.splitlines() == [
        "passed     line 0  found 0.",
        "failed     line 1  found 1.",
        "                   > do.",
        "not tried  line 2  found 2.",
        "1 passed, 1 failed, 1 not tried: line 1 failed.",
    ]


def test_long_lines_are_wrapped():
    long = TrustReport((Finding("layout", "passed", "word " * 60),), {})
    assert max(map(len, str(long).splitlines())) <= 100


def test_a_line_by_its_name():
    assert report("passed")["line 0"].verdict == "passed"
    with pytest.raises(KeyError, match="the lines are line 0"):
        report("passed")["lens"]


def test_another_verdict_is_refused():
    with pytest.raises(ArgumentError, match="verdict"):
        Finding("lens", "perhaps", "")  # type: ignore[arg-type]


def test_json(tmp_path):
    made = TrustReport(
        (Finding("lens", "passed", "x", figures={"worst": float("nan")}),), {"a": "b"}
    )
    made.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data == json.loads(made.to_json()) == made.to_dict()
    assert data["passed"] is True
    assert data["about"] == {"a": "b"}
    assert data["lines"][0]["figures"] == {"worst": None}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page(made, tmp_path):
    made.to_html(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def hostile_report():
    made = report("failed", **{"prompt": HOSTILE, "model": HOSTILE, "model class": HOSTILE})
    line = Finding(HOSTILE, "failed", HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    return TrustReport((line, *made.lines), made.about, {HOSTILE: Image.new("RGB", (8, 4))})


def test_texts_of_users_are_no_markup(tmp_path):
    plain, hostile = (
        Page(page(made, tmp_path))
        for made in (
            TrustReport(
                report("failed", "failed").lines, report().about, {"x": Image.new("L", (8, 4))}
            ),
            hostile_report(),
        )
    )
    kinds = [[tag for tag, _ in one.found] for one in (plain, hostile)]
    assert kinds[0] == kinds[1]
    assert "script" not in kinds[1]
    assert all(not name.startswith("on") for _, attrs in hostile.found for name in attrs)
    assert "{{ 1234*5678 }}" in hostile.text
    assert "7006652" not in hostile.text


def test_the_page_loads_nothing(tmp_path):
    text = page(hostile_report(), tmp_path)
    found = Page(text).found
    sources = [v for _, attrs in found for k, v in attrs.items() if k in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_its_own_style_and_pictures_only(tmp_path):
    import base64
    import hashlib

    text = page(report("passed"), tmp_path)
    policy = next(a["content"] for tag, a in Page(text).found if a.get("http-equiv"))
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        f"form-action 'none'"
    )
    assert "prefers-color-scheme:dark" in style
    assert not re.search(r"<[^>]+ style=", text)


# ---- versions -----------------------------------------------------------------------------------


def test_the_file_of_versions_is_made_by_passed_reports(tmp_path, monkeypatch):
    path = tmp_path / "tested.json"
    versions = {"transformers": "5.9.1", "torch": "2.4.0+cpu"}
    monkeypatch.setattr(tested, "installed_versions", lambda: versions)
    tested.record_tested({"llava": report("passed")}, path)
    versions["transformers"] = "5.10.0"
    tested.record_tested({"llava": report("passed", **{"model class": "D"})}, path)
    assert json.loads(path.read_text()) == {
        "packages": {
            "transformers": {"oldest": "5.9.1", "newest": "5.10.0"},
            "torch": {"oldest": "2.4.0", "newest": "2.4.0"},
        },
        "models": ["C", "D"],
    }
    with pytest.raises(ValueError, match="failed: qwen"):
        tested.record_tested({"llava": report("passed"), "qwen": report("failed")}, path)


@pytest.mark.parametrize(
    ("installed", "verdict"), [("5.10.3", "passed"), ("5.11.0", "not tried"), ("6.0", "not tried")]
)
def test_newer_versions_than_checked_are_warned_of(monkeypatch, installed, verdict):
    from captum_mllm.checking import facts

    monkeypatch.setattr(facts, "installed_versions", lambda: {"transformers": installed})
    known = {"transformers": {"oldest": "5.5.0", "newest": "5.10.0"}}
    monkeypatch.setattr(facts, "tested_versions", lambda: known)
    line = facts.check_versions(None)
    assert line.verdict == verdict
    assert ("Warning: transformers newer" in line.found) == (verdict == "not tried")
