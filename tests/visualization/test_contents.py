"""What a page holds, against the results by hand."""

import base64
import hashlib
import io
import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from captum_mllm.reference import make_scene, render_pil
from captum_mllm.validation import ArgumentError
from captum_mllm.visualization import contents_of, describe, render_page, summarise
from captum_mllm.visualization.atlas import make_atlas
from tests.oracle.pages import QUESTION, hostile, page_of


def levels(source):
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("words", "rows", "cols"), [(1, 1, 1), (7, 3, 5), (900, 14, 14), (3, 1, 9)]
)
def test_atlas_holds_every_map_with_its_border_repeated(words, rows, cols):
    maps = torch.rand(words, rows, cols, generator=torch.manual_seed(words)) * 3
    atlas = make_atlas(maps, 3.0)
    sheet = levels(atlas.source)
    assert max(sheet.shape) <= 4096
    for n in range(words):
        across, down = divmod(n, atlas.down)
        tile = sheet[down * (rows + 2) :, across * (cols + 2) :][: rows + 2, : cols + 2]
        expected = np.pad(maps[n].numpy() / 3 * 255, 1, mode="edge")
        assert np.abs(tile - expected).max() <= 0.51


def test_fine_maps_are_averaged():
    fine = torch.rand(2, 128, 256)
    atlas = make_atlas(fine, 1.0)
    assert (atlas.rows, atlas.cols) == (32, 64)
    means = fine.reshape(2, 32, 4, 64, 4).mean((2, 4))
    tile = levels(atlas.source)[1:33, 1:65]
    assert np.abs(tile / 255 - means[0].numpy()).max() < 0.003


def test_maps_of_zeros_and_below():
    assert not levels(make_atlas(torch.zeros(2, 3, 3), 0.0).source).any()
    assert not levels(make_atlas(-torch.ones(2, 3, 3), 1.0).source).any()


def test_one_scale_for_all_words_and_the_texts_levels():
    report = page_of(("msea+arc", "lens"))
    for method, result in zip(report.contents.methods, report.results.values(), strict=True):
        summary = summarise(result, report.size)
        assert method.top == summary.vmax
        text = levels(method.text)
        expected = summary.context_attr / summary.context_attr.max() * 255
        assert np.abs(text - expected.numpy()).max() <= 0.51
        for peak, entry in zip(method.peaks, summary.words, strict=True):
            if entry.peak is None or entry.peak.value < 0.02 * summary.vmax:
                assert peak is None
            else:
                assert peak == (0, entry.peak.value, entry.where)


def test_text_is_what_the_tokenizer_decodes_and_the_template_is_told_apart():
    report = page_of(("lens",))
    contents = report.contents
    text = "".join(word.before + word.text for word in contents.words).strip()
    assert text == contents.answer
    prompt = contents.context[: contents.first]
    asked = "".join(word.before + word.text for word in prompt if word.part == "prompt").strip()
    assert asked == QUESTION
    assert [word.text for word in prompt if word.part == "template"] == ["assistant", ":"]
    chinese = hostile().contents
    assert "\u6591\u9a6c\u5728\u8349\u5730" in "".join(w.before + w.text for w in chinese.words)


def test_page_loads_nothing_and_escapes_everything():
    html = hostile().html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert html.count("<script") == 2
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    body = html.split("</style>")[1].split('<script type="application/json"')[0]
    assert not re.findall("<img|<!--|<b>what", body)
    assert "49" not in re.findall(r"Prompt:</span> <bdi[^>]*>(.*?)</bdi>", html)[0]
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert json.loads(data)["answer"] == hostile().contents.answer


def test_size_of_a_long_answer_over_a_large_picture():
    report = page_of(("msea+arc",), words=200)
    noise = np.random.default_rng(0).normal(128, 12, (1000, 1000, 3)).clip(0, 255).astype(np.uint8)
    smooth = Image.fromarray(noise).resize((250, 250)).resize((1000, 1000))
    contents = contents_of(report.results, [smooth], prompt=QUESTION)
    assert len(contents.words) > 180
    assert len(render_page(contents)) < 1_000_000


def test_other_answers_and_numbers_of_pictures_are_refused():
    report = page_of(("lens",))
    result = report.results["lens"]
    picture, _ = render_pil(make_scene(7, "test"))
    with pytest.raises(ArgumentError, match="results is empty"):
        contents_of({}, [picture])
    with pytest.raises(ArgumentError, match=r"one per image of the result .1., got 2"):
        contents_of({"lens": result}, [picture, picture])
    with pytest.raises(ArgumentError, match="one answer"):
        contents_of({"lens": result, "other": result.select([0])}, [picture])
    with pytest.raises(ArgumentError, match="must be one picture"):
        contents_of({"lens": result}, [[picture]])
    with pytest.raises(ArgumentError, match="explains no word"):
        contents_of({"lens": result.select([])}, [picture])
    unplaced = replace(result, preprocessing=None)
    assumed = contents_of({"lens": unplaced}, [picture.resize((100, 80))])
    assert assumed.pictures[0].assumed
    assert "it is assumed that the model saw the whole picture" in render_page(assumed)


def test_provenance_names_files_and_sums(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "a.png").write_bytes(b"picture")
    facts = describe(
        name="some/model", folder=tmp_path, images=[tmp_path / "a.png"],
        settings={"scales": (1.0,)}, command=["captum-mllm", "explain"],
    ).facts  # fmt: skip
    assert facts["weights sha256"].endswith(hashlib.sha256(b"weights").hexdigest())
    assert facts["image files"] == f"a.png sha256 {hashlib.sha256(b'picture').hexdigest()}"
    assert "torch 2." in facts["versions"]
    assert "revision" not in facts
    assert facts["command"] == "captum-mllm explain"


def test_pictures_of_sixteen_bits_are_scaled():
    result = page_of(("lens",)).results["lens"]
    deep = Image.new("I;16", (336, 336), 40_000)
    (shown,) = contents_of({"lens": result}, [deep]).pictures
    assert shown.image.getpixel((5, 5)) == (156, 156, 156)


def test_some_tokens_only_keep_their_own_context():
    """Their text stands before them as it is, the answer's other words among it."""
    result = page_of(("lens",)).results["lens"]
    picture, _ = render_pil(make_scene(7, "test"))
    some = result.select([2, 3, 4])
    contents = contents_of({"lens": some}, [picture], prompt=QUESTION)
    assert not contents.whole
    assert {word.part for word in contents.context[: contents.first]} == {"prompt"}
    text = levels(contents.methods[0].text)
    assert text.shape == (3, len(contents.context))
    assert not text[:, contents.first :].any()
    assert "<h2>Text</h2>" in render_page(contents)


def test_recorded_commands_can_be_run_again():
    facts = describe(command=["captum-mllm", "--image", "red pic.png", "--prompt", "what's $HOME"])
    assert shlex.split(facts.facts["command"])[2:] == ["red pic.png", "--prompt", "what's $HOME"]
