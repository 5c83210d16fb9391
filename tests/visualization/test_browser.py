"""The page in a real browser (Chromium): every number and colour it shows is the result's."""

import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from captum_mllm.visualization import contents_of, render_page, summarise
from tests.oracle.pages import hostile, page_of, several

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make browser installs Debian's"),
]
NAMES = ("msea+arc", "lens", "random")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page from a file, offline; fails on what the browser's console complains of."""
    complaints, contexts = [], []

    def open_page(html, **options):
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        requests = []
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready=yes]", state="attached")
        outside = [url for url in requests if not url.startswith(("data:", "file:", "blob:"))]
        assert not outside
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def report():
    return page_of(NAMES)


def word(page, n):
    return page.locator(f'#answer .w[data-w="{n}"]')


def pixels(page, locator=None):
    """What is drawn, as (height, width, 3)."""
    target = page if locator is None else page.locator(locator).first
    with Image.open(io.BytesIO(target.screenshot())) as picture:
        return np.asarray(picture.convert("RGB")).astype(float)


def heat_of(page, opacity=0):
    """How far the picture changes as heat is laid over it, per pixel."""
    with_heat = pixels(page, "#views svg")
    page.evaluate(
        "document.querySelectorAll('#views g').forEach(g => g.setAttribute('opacity', 0))"
    )
    return np.abs(with_heat - pixels(page, "#views svg")).sum(2)


def strongest(report):
    summary = summarise(report.results["msea+arc"], report.size)
    content = [n for n, entry in enumerate(summary.words) if entry.word.content]
    return sorted(content, key=lambda n: -summary.words[n].peak.value)


def test_hover_shows_the_words_own_map(opened, report):
    page = opened(report.html)
    n = next(n for n in strongest(report) if n > 5)
    word(page, n).hover()
    assert page.locator("#views b").inner_text() == report.contents.words[n].text
    page.wait_for_timeout(100)
    drawn = torch.from_numpy(heat_of(page))
    summary = summarise(report.results["msea+arc"], report.size)
    wanted = summary.map_of(n, tuple(drawn.shape)).double()
    both = torch.stack([drawn.flatten(), wanted.clamp(max=0.35 * summary.vmax).flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    page.mouse.move(5, 5)
    assert page.locator("#views svg[data-picture]").count() == 1


def test_opens_on_the_word_with_most_evidence(opened, report):
    page = opened(report.html)
    assert page.locator("#views b").inner_text() == report.contents.words[strongest(report)[0]].text
    word(page, 0).hover()
    assert page.locator("#views b").inner_text() == report.contents.words[0].text


def test_outline_is_at_half_of_the_peak(opened, report):
    page = opened(report.html)
    n = strongest(report)[0]
    word(page, n).click()
    page.check("#outline")
    summary = summarise(report.results["msea+arc"], report.size)
    cells = summary.grid_maps[n]
    path = page.locator("#views path").first.get_attribute("d")
    points = np.array([[float(x) for x in p.split(",")] for p in re.findall(r"[ML]([^ML]+)", path)])
    assert len(points) > 8
    inside = points[(points > 0.6).all(1) & (points < len(cells) - 0.6).all(1)]
    at = torch.from_numpy(inside).float() / len(cells) * 2 - 1
    levels = torch.nn.functional.grid_sample(
        cells[None, None], at[None, None], align_corners=False, padding_mode="border"
    )
    half = float(cells.max()) / 2
    np.testing.assert_allclose(levels.flatten(), half, atol=0.03 * summary.vmax)


def test_details_are_the_results_numbers(opened, report):
    page = opened(report.html)
    summary = summarise(report.results["msea+arc"], report.size)
    for n in (*strongest(report)[:2], 0):
        entry = summary.words[n]
        word(page, n).hover()
        told = page.locator("#detail").inner_text()
        assert f"probability {entry.probability:.3f}" in told
        if entry.peak.value >= 0.02 * summary.vmax:
            assert entry.where in told
        found = re.search(r"Led by: (.*)", told)
        row = summary.context_attr[n]
        top = float(summary.context_attr.max())
        if found:
            names = [part.rsplit(" ", 1) for part in found[1].split(", ")]
            values = [float(value) for _, value in names]
            allowed = [
                float(v)
                for v, w in zip(row, report.contents.context, strict=True)
                if w.part != "template"
            ]
            expected = sorted(allowed, reverse=True)[: len(values)]
            np.testing.assert_allclose(values, expected, atol=top / 250)
            assert min(values) >= 0.02 * top * 0.99
    page.mouse.move(5, 5)


def test_pins_compare_two_words_on_one_scale(opened, report):
    page = opened(report.html)
    a, b = strongest(report)[:2]
    word(page, a).click()
    word(page, b).click()
    page.mouse.move(5, 5)
    names = page.locator("#views b").all_inner_texts()
    assert names == [report.contents.words[n].text for n in (a, b)]
    assert word(page, a).get_attribute("aria-pressed") == "true"
    third = strongest(report)[2]
    word(page, third).click()  # the first one goes
    page.mouse.move(5, 5)
    assert page.locator("#views b").all_inner_texts()[0] == names[1]
    page.keyboard.press("Escape")
    assert page.locator(".pinned").count() == 0


def test_phrase_by_shift_and_by_drag_is_the_largest_of_its_words(opened, report):
    page = opened(report.html)
    words = report.contents.words
    word(page, 4).click()
    word(page, 7).click(modifiers=["Shift"])
    page.mouse.move(5, 5)
    by_shift = page.locator("#views b").inner_text()
    assert by_shift == "".join(w.before * (k > 0) + w.text for k, w in enumerate(words[4:8]))
    told = page.locator("#detail").inner_text()
    summary = summarise(report.results["msea+arc"], report.size)
    probability = np.prod([entry.probability for entry in summary.words[4:8]])
    assert f"probability {probability:.3f}" in told
    top = float(summary.grid_maps[4:8].max())
    shown = float(re.search(r"strongest region .*, ([\d.e-]+)", told)[1])
    assert shown == pytest.approx(top, rel=5e-3)
    page.keyboard.press("Escape")
    start, end = (word(page, n).bounding_box() for n in (4, 7))
    page.mouse.move(start["x"] + 3, start["y"] + 3)
    page.mouse.down()
    page.mouse.move(end["x"] + 3, end["y"] + 3, steps=5)
    page.mouse.up()
    page.mouse.move(5, 5)
    assert page.locator("#views b").inner_text() == by_shift


def test_a_place_names_the_words_that_it_supports(opened, report):
    page = opened(report.html)
    summary = summarise(report.results["msea+arc"], report.size)
    peak = summary.words[strongest(report)[0]].peak
    svg = page.locator("#views svg").first
    box = svg.bounding_box()
    factor = box["width"] / report.size[1]
    page.mouse.click(box["x"] + (peak.x + 0.5) * factor, box["y"] + (peak.y + 0.5) * factor)
    page.mouse.move(5, 5)
    told = page.locator("#detail").inner_text()
    assert told.startswith("This place supports: ")
    listed = [
        part.rsplit(" ", 1) for part in told.removeprefix("This place supports: ").split(", ")
    ]
    maps = torch.stack([summary.map_of(n, report.size) for n in range(len(summary.words))])
    there = maps[:, peak.y, peak.x]
    order = there.argsort(descending=True)
    assert listed[0][0] == summary.words[int(order[0])].word.text
    values = [float(value) for _, value in listed]
    np.testing.assert_allclose(values, there[order[: len(values)]], atol=summary.vmax / 40)
    # a box: the mean over it
    x0, y0, x1, y1 = 20, 100, 150, 260
    page.mouse.move(box["x"] + x0 * factor, box["y"] + y0 * factor)
    page.mouse.down()
    page.mouse.move(box["x"] + x1 * factor, box["y"] + y1 * factor, steps=4)
    page.mouse.up()
    told = page.locator("#detail").inner_text()
    first = told.removeprefix("This place supports: ").split(", ")[0].rsplit(" ", 1)
    means = maps[:, y0:y1, x0:x1].mean((1, 2))
    assert first[0] == summary.words[int(means.argmax())].word.text
    assert float(first[1]) == pytest.approx(float(means.max()), abs=summary.vmax / 50)
    lit = page.eval_on_selector_all(".w", "all => all.filter(w => w.style.background).length")
    assert lit > 0


def test_method_switch_shows_the_other_methods_numbers(opened, report):
    page = opened(report.html)
    n = strongest(report)[0]
    word(page, n).click()
    page.mouse.move(5, 5)
    before = pixels(page, "#views svg")
    page.select_option("#method", label="lens")
    page.wait_for_timeout(100)
    assert np.abs(before - pixels(page, "#views svg")).max() > 30
    summary = summarise(report.results["lens"], report.size)
    assert summary.words[n].where in page.locator("#detail").inner_text()
    assert f"{summary.vmax:.3g}" in page.locator("#scale").inner_text()
    page.select_option("#method", label="random")
    assert "says nothing about the text" in page.locator("#detail").inner_text()


def test_keyboard_alone(opened, report):
    page = opened(report.html)
    word(page, 0).focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    words = report.contents.words
    page.keyboard.press("Enter")
    assert page.locator("#views b").first.inner_text() == words[4].text
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Enter")
    assert words[5].text in page.locator("#views b").first.inner_text()
    page.keyboard.press("Escape")
    page.locator("#views svg").first.focus()
    page.keyboard.press("ArrowDown")
    assert "This place supports" in page.locator("#detail").inner_text()
    page.keyboard.press("ArrowLeft")
    assert "This place supports" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.picture") == "0"  # focus stays


def test_saved_files_are_what_is_shown(opened, report, tmp_path):
    page = opened(report.html)
    n = strongest(report)[0]
    word(page, n).click()
    page.mouse.move(5, 5)
    for kind in ("svg", "png"):
        with page.expect_download() as waiting:
            page.click(f"#save-{kind}")
        waiting.value.save_as(tmp_path / f"saved.{kind}")
        assert report.contents.words[n].text in waiting.value.suggested_filename
    with Image.open(tmp_path / "saved.png") as saved:
        drawn = np.asarray(saved.convert("RGB").resize((200, 200))).astype(float)
    shown = Image.fromarray(pixels(page, "#views svg").astype(np.uint8)).resize((200, 200))
    assert np.abs(drawn - np.asarray(shown)).mean() < 6
    source = (tmp_path / "saved.svg").read_text()
    assert source.startswith("<svg")
    assert "http" not in source.replace("http://www.w3.org/", "")


def test_without_scripts_it_still_reads(opened, report):
    page = opened(report.html, java_script_enabled=False)
    assert page.locator("#answer").inner_text().strip() == report.contents.answer
    assert page.locator("table tbody tr").count() == len(report.contents.words)
    assert not page.locator("#controls").is_visible()
    assert page.locator(".gallery figure").count() == len(strongest(report))
    first = page.locator(".gallery svg").nth(2)
    assert np.ptp(pixels(page, ".gallery figure:nth-child(3) svg").sum(2)) > 100
    assert first.is_visible()


def test_phone_dark_and_print(opened, report):
    phone = opened(report.html, viewport={"width": 375, "height": 700}, color_scheme="dark")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 375
    assert pixels(phone)[5, 5].max() < 60
    phone.evaluate("window.scrollTo(0, 900)")
    assert phone.locator("#views svg").first.bounding_box()["y"] < 200  # still there: sticky
    printed = phone.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= 2


def test_picture_stays_beside_long_text(opened):
    long = page_of(("lens",), words=200)
    page = opened(long.html)
    word(page, 180).scroll_into_view_if_needed()
    word(page, 180).hover()
    box = page.locator("#views svg").first.bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 900


def test_a_scroll_that_begins_on_a_word_pins_nothing(opened, report):
    page = opened(report.html)
    fire = "(e, kind) => e.dispatchEvent(new PointerEvent(kind, {bubbles: true}))"
    word(page, 4).evaluate(fire, "pointerdown")
    word(page, 4).evaluate(fire, "pointercancel")
    page.locator("h1").click()
    assert page.locator(".pinned").count() == 0


def test_finer_maps_keep_the_tables_peak(opened):
    """A grid of 96 cells is averaged to 48 for the page; the numbers are the result's."""
    result = page_of(("lens",)).results["lens"]
    torch.manual_seed(0)
    sharp = torch.zeros(len(result.output_tokens), 96, 96)
    sharp[4, 10, 20], sharp[1, 5, 5] = 1.0, 0.03
    fine = replace(result, grid_attr=(sharp,))
    picture = Image.new("RGB", (336, 336))
    page = opened(render_page(contents_of({"lens": fine}, [picture])))
    word(page, 4).hover()
    assert ", 1\n" in page.locator("#detail").inner_text() + "\n"
    word(page, 1).hover()
    assert "0.03" in page.locator("#detail").inner_text()


def test_several_pictures_share_one_scale(opened):
    report = several()
    page = opened(report.html)
    word(page, 3).click()
    page.mouse.move(5, 5)
    assert page.locator("#views svg[data-picture]").count() == 2
    tops = {atlas.source for atlas in report.contents.methods[0].atlases}
    assert len(tops) == 2
    data = json.loads(page.locator("#data").inner_text())
    result = report.results["lens"]
    assert data["methods"][0]["top"] == max(float(maps.max()) for maps in result.grid_attr)


def test_hostile_right_to_left_and_long_text(opened):
    page = opened(hostile().html)
    assert page.evaluate("window.broken") is None
    assert page.locator("#answer").evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert "\u6591\u9a6c\u5728" in page.locator("#answer").inner_text()  # no spaces between them
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    word(page, 0).hover()
    assert "<img src=x" in hostile().contents.answer


def contrast(page, selector):
    """WCAG contrast of an element's text with the page."""
    colours = page.eval_on_selector(
        selector,
        "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]",
    )
    levels = []
    for colour in colours:
        parts = np.array([float(x) for x in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        levels.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(levels) + 0.05) / (min(levels) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names_for_screen_readers(opened, report, scheme):
    page = opened(report.html, color_scheme=scheme)
    for selector in ("body", ".soft", "td", "dd"):
        assert contrast(page, selector) >= 4.5
    controls = page.locator("select, button, input").all()
    for control in controls:
        label = control.evaluate("e => e.innerText || e.labels[0].innerText")
        assert label.strip()
    for svg in page.locator("svg[role=img], svg[role=application]").all():
        assert svg.get_attribute("aria-label")
