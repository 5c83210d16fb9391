"""The pages of reports load nothing and run nothing, and look as they should all the same."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from captum_mllm.visualization import write_report
from tests.visualization.test_visualization import hand_made

PAGES = ("index.html", "text-heatmap.html")
HOSTILE = (
    ' <img src=x onerror=alert(1)><style>a{}</style> style="--s:1" class="s7" <script>1</script>'
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("report")
    result = hand_made(input_tokens=(HOSTILE, *hand_made().input_tokens[1:]))
    write_report(made, result, Image.new("RGB", (80, 40), "teal"), prompt=HOSTILE, notes=[HOSTILE])
    return made


class Reader(HTMLParser):
    """Elements, styles and addresses of a page, in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.styles, self.attributes, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += attrs
        if tag == "style":
            self.inside, self.styles = True, [*self.styles, ""]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "style"

    def handle_data(self, data):
        if self.inside:
            self.styles[-1] += data


def policy_of(page):
    (value,) = [
        attrs["content"]
        for tag, attrs in page.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    return dict(part.split(maxsplit=1) for part in value.split("; "))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_allows_its_own_styles_and_pictures_alone(name, folder):
    page = Reader((folder / name).read_text("utf-8"))
    policy = policy_of(page)
    allowed = policy.pop("style-src").split()
    assert policy == {
        "default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    digests = [hashlib.sha256(style.encode()).digest() for style in page.styles]
    assert allowed == [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert len(allowed) == 2  # the page's and the heat map's
    tags = [tag for tag, _ in page.tags]
    assert tags.index("meta") < tags.index("style")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    names = {attribute for attribute, _ in page.attributes}
    assert "style" not in names  # which the policy would forbid
    assert not [attribute for attribute in names if attribute.startswith("on")]
    sources = [value for attribute, value in page.attributes if attribute in ("src", "href")]
    assert all(value.startswith("data:image/") for value in sources)
    assert not re.search(r"url\(|@import", "".join(page.styles))


@pytest.mark.parametrize("name", PAGES)
def test_every_shade_has_its_rule(name, folder):
    page = Reader((folder / name).read_text("utf-8"))
    shades = {v for a, v in page.attributes if a == "class" and re.fullmatch(r"s\d+", v)}
    assert len(shades) > 2
    rules = dict(re.findall(r"\.cmllm \.(s\d+)\{--s:([\d.]+)\}", page.styles[-1]))
    assert set(rules) == shades
    assert all(float(value) == int(shade[1:]) / 100 for shade, value in rules.items())


def photograph(page, out):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--incognito"]
    size = ["--window-size=900,1500", f"--screenshot={out}", f"--user-data-dir={out}.d"]
    environment = {**os.environ, "HOME": str(out.parent)}
    command = [CHROMIUM, *flags, *size, page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=environment)
    with Image.open(out) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_a_browser_shows_the_page_as_without_the_policy(folder, tmp_path):
    text = (folder / "index.html").read_text("utf-8")
    versions = {
        "with": text,
        "without": re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text),
        "wrong": re.sub(r"'sha256-[^']*'", "'none'", text),  # the styles are then refused
    }
    shown = {}
    for name, version in versions.items():
        (tmp_path / f"{name}.html").write_text(version, "utf-8")
        shown[name] = photograph(tmp_path / f"{name}.html", tmp_path / f"{name}.png")
    np.testing.assert_array_equal(shown["with"], shown["without"])
    assert (shown["with"] != shown["wrong"]).mean() > 0.05
