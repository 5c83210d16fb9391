"""The third drawing style: how it is made, found and refused; and the real one if it was made."""

import io
import tarfile
import urllib.error
import zipfile
from dataclasses import replace
from http.client import HTTPResponse
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from captum_mllm.reference import make_scene, openmoji
from captum_mllm.reference.render import _sprites, render, render_pil
from captum_mllm.reference.scenes import SceneBatch
from captum_mllm.reference.sprites import CATEGORIES, CODE_POINTS, load_sprites
from tests.check_wheel import SPRITES, share_alike

REAL = openmoji.openmoji_path()
made = pytest.mark.skipif(
    not REAL.exists(), reason="the third style was not made here: `make third-style`"
)
SQUARE = """<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">
<rect x="{}" y="{}" width="{}" height="{}" fill="#ff0000"/></svg>"""


def package(drawings):
    """An npm package with drawings by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in drawings.items():
            member = tarfile.TarInfo(f"package/color/svg/{name}.svg")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def names():
    return [points.upper().replace("-FE0F", "") for points in CODE_POINTS.values()]


def save(path, seed=0, **more):
    sprites = np.random.default_rng(seed).integers(0, 256, (64, 64, 64, 4), np.uint8)
    np.savez(path, **{"sprites": sprites, "categories": np.array(CATEGORIES), **more})
    return sprites


def third(scene):
    return replace(scene, objects=tuple(replace(o, style="openmoji") for o in scene.objects))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPTUM_MLLM_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def archive(monkeypatch):
    """A package of squares of different sizes and places that passes for the real one."""
    boxes = {n: (8 + i % 5, 20 + i % 7, 12 + i % 40, 30) for i, n in enumerate(names())}
    made = package({name: SQUARE.format(*box) for name, box in boxes.items()})
    monkeypatch.setattr(openmoji, "SHA256", openmoji.hashlib.sha256(made).hexdigest())
    return made


def test_where_it_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPTUM_MLLM_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("HOME", "/home/someone")
    assert openmoji.openmoji_path() == tmp_path / "openmoji.npz"
    monkeypatch.delenv("CAPTUM_MLLM_DATA")
    assert str(openmoji.openmoji_path()) == "/cache/captum_mllm/openmoji.npz"
    for nothing in ("", "relative"):  # XDG: only an absolute path counts
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert str(openmoji.openmoji_path()) == "/home/someone/.cache/captum_mllm/openmoji.npz"


def test_a_drawing_fills_its_square_whatever_its_margin():
    pytest.importorskip("resvg_py")
    for box in ((20, 30, 10, 5), (0, 0, 72, 72), (50, 3, 4, 60)):
        sprite = openmoji._sprite(SQUARE.format(*box), "ball")
        assert sprite.shape == (64, 64, 4)
        rows, columns = (np.flatnonzero((sprite[..., 3] > 127).any(axis)) for axis in (1, 0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert max(height, width) == 62
        assert height / width == pytest.approx(box[3] / box[2], rel=0.1)
        assert rows.mean() == pytest.approx(31.5, abs=0.6)
        assert columns.mean() == pytest.approx(31.5, abs=0.6)
        assert (sprite[31, 31] == (255, 0, 0, 255)).all()
        assert not sprite[sprite[..., 3] == 0].any()


def test_drawings_that_are_none():
    pytest.importorskip("resvg_py")
    with pytest.raises(ValueError, match="drawing of 'ball' has no viewBox"):
        openmoji._sprite(SQUARE.format(1, 1, 9, 9).replace("72", "128"), "ball")
    with pytest.raises(ValueError, match="drawing of 'ball' is empty"):
        openmoji._sprite(SQUARE.format(80, 80, 9, 9), "ball")


def test_making_it(home, archive, tmp_path, capsys):
    pytest.importorskip("resvg_py")
    package = tmp_path / "package.tgz"
    package.write_bytes(archive)
    openmoji.main(["--archive", str(package)])
    assert capsys.readouterr().out.count("\n") == 1
    sprites = openmoji.load_openmoji()
    assert sprites.shape == load_sprites().shape[1:]
    boxes = [SQUARE.format(8 + i % 5, 20 + i % 7, 12 + i % 40, 30) for i in range(64)]
    for i in (0, 3, 21, 63):  # each category got its own drawing
        np.testing.assert_array_equal(sprites[i], openmoji._sprite(boxes[i], "ball"))
    notice = (home / "openmoji.NOTICE.md").read_text()
    assert "CC-BY-SA-4.0" in notice
    assert "https://openmoji.org" in notice
    before = (home / "openmoji.npz").read_bytes()
    openmoji.main(["--archive", str(package), "--out", str(tmp_path / "deep" / "er" / "x.npz")])
    assert str(home / "openmoji.npz") in capsys.readouterr().out  # where it is looked for
    assert (tmp_path / "deep" / "er" / "x.npz").read_bytes() == before
    assert not list(home.rglob("*.partial"))


def test_archives_that_are_refused(home, tmp_path, monkeypatch, capsys):
    path = tmp_path / "package.tgz"
    path.write_bytes(b"something else")
    with pytest.raises(SystemExit):
        openmoji.main(["--archive", str(path)])
    assert "not openmoji-15.1.0.tgz: its sha256 is" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        openmoji.main(["--archive", str(tmp_path / "none.tgz")])
    assert "none.tgz" in capsys.readouterr().err
    assert not openmoji.openmoji_path().exists()
    with pytest.raises(FileNotFoundError, match=r"no picture of 'person': .*/1F9CD.svg"):
        openmoji.rasterise(package({"1F600": "<svg/>"}))


def cut():
    """An answer whose connection ends in the middle of it."""
    sent = io.BytesIO(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
    answer = HTTPResponse(Mock(**{"makefile.return_value": sent}))
    answer.begin()
    return answer


class Line:
    """Answers of the network, one after the other."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, url, timeout):
        assert timeout > 0
        self.asked.append(url)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer) if isinstance(answer, bytes) else answer


def test_fetching_it_is_tried_again(archive, monkeypatch):
    line = Line(urllib.error.URLError("no route"), cut(), TimeoutError("slow"), archive)
    monkeypatch.setattr(openmoji.urllib.request, "urlopen", line)
    assert openmoji.download(wait=0) == archive
    assert line.asked == [openmoji.URL] * 4


def test_fetching_it_fails_with_a_way_out(archive, monkeypatch):
    for answers, message in (
        ([urllib.error.URLError("no route")] * 9, "no route"),
        ([b"page"] * 9, r"\(4 bytes\)"),
        ([cut() for _ in range(9)], r"IncompleteRead\(4 bytes read, 5 more expected\)"),
    ):
        monkeypatch.setattr(openmoji.urllib.request, "urlopen", Line(*answers))
        with pytest.raises(ConnectionError, match=rf"fetched.*{message}.*--archive"):
            openmoji.download(wait=0)


def test_without_the_file(home):
    scene = make_scene(0)
    render(scene, 16)  # the shipped styles need none
    message = r"pip install \"captum-mllm\[openmoji\]\".*python -m captum_mllm.reference.openmoji"
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=message):
            render(third(scene), 16)
    with pytest.raises(FileNotFoundError, match=message):
        openmoji.load_openmoji()


def test_files_that_are_refused(home):
    path = home / "openmoji.npz"
    path.write_bytes(b"no archive")
    with pytest.raises(RuntimeError, match=r"openmoji.npz cannot be read .*: make it anew"):
        render(third(make_scene(0)), 16)
    for wrong in (
        {"categories": np.array(CATEGORIES[::-1])},
        {"sprites": np.zeros((64, 32, 32, 4), np.uint8)},
        {"sprites": np.zeros((64, 64, 64, 4), np.float32)},
    ):
        save(path, **wrong)
        with pytest.raises(RuntimeError, match="does not fit this version's categories: make it"):
            render(third(make_scene(0)), 16)
    np.savez(path, categories=np.array(CATEGORIES))
    with pytest.raises(RuntimeError, match="cannot be read"):
        openmoji.load_openmoji()


def test_it_is_read_only_when_needed_and_anew_when_changed(home, monkeypatch):
    loads, load = [], openmoji.load_openmoji
    monkeypatch.setattr(openmoji, "load_openmoji", lambda path: loads.append(path) or load(path))
    scene = make_scene(3)
    plain = render(scene, 32)
    drawn = []
    for seed in (1, 2):
        save(home / "openmoji.npz", seed, extra=np.zeros(seed))
        drawn += [render(third(scene), 32), render(third(scene), 32)]
    assert len(loads) == 2
    torch.testing.assert_close(drawn[0].pixels, drawn[1].pixels)
    torch.testing.assert_close(drawn[2].pixels, drawn[3].pixels)
    assert (drawn[0].pixels - drawn[2].pixels).abs().max() > 0.1
    torch.testing.assert_close(render(scene, 32).pixels, plain.pixels, rtol=0, atol=0)
    assert _sprites(torch.device("cpu"), None).shape[0] == 2
    assert len(loads) == 2


def test_styles_can_be_mixed_in_a_scene_and_a_batch(home):
    """Each object looks as it does in a batch of its own style."""
    sprites = np.zeros((64, 64, 64, 4), np.uint8)
    sprites[:, 8:56, 8:56] = (255, 0, 255, 255)
    np.savez(home / "openmoji.npz", sprites=sprites, categories=np.array(CATEGORIES))
    scene = next(s for s in map(make_scene, range(50)) if len(s.objects) == 2)
    natural = [replace(o, color=None) for o in scene.objects]
    mixed = replace(scene, objects=(replace(natural[0], style="openmoji"), natural[1]))
    batch = render(SceneBatch.of([mixed, make_scene(1)]), 64)
    torch.testing.assert_close(batch.pixels[1], render(make_scene(1), 64).pixels[0])
    spot = batch.pixels[0][:, batch.masks[0, 0]].mT
    clear = (spot - torch.tensor([1.0, 0.0, 1.0])).abs().amax(1) < 0.05
    assert clear.float().mean() > 0.8
    alone = render(replace(scene, objects=tuple(natural)), 64).masks
    torch.testing.assert_close(batch.masks[0, 1], alone[0, 1])


def wheel_of(*files, styles=2):
    buffer = io.BytesIO()
    sprites = io.BytesIO()
    np.savez(sprites, sprites=np.zeros((styles, 1)))
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(SPRITES, sprites.getvalue())
        archive.writestr("captum_mllm/reference/openmoji.py", "")
        archive.writestr("captum_mllm-0.1.dist-info/licenses/LICENSE", "")
        for file in files:
            archive.writestr(file, "")
    return zipfile.ZipFile(buffer)


def test_a_wheel_holds_nothing_of_it():
    assert share_alike(wheel_of()) == []
    strays = ["captum_mllm/OpenMoji/1F600.png", "captum_mllm/a.svg", "captum_mllm/b.npz"]
    assert share_alike(wheel_of(*strays)) == sorted(strays)
    assert share_alike(wheel_of(styles=3)) == [SPRITES]


@made
def test_real_sprites_are_whole_and_of_the_others_size():
    sprites = openmoji.load_openmoji(REAL)
    seen = sprites[..., 3] > 127
    edge = np.ones((64, 64), bool)
    edge[1:-1, 1:-1] = False
    assert sprites[:, edge, 3].max() < 30, "cut off"
    for category, mask, shipped in zip(CATEGORIES, seen, load_sprites()[0, ..., 3], strict=True):
        sides = [np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)]
        assert 60 <= max(sides) <= 63, category
        assert mask.mean() > 0.08, category
        assert 0.3 < mask.mean() / (shipped > 127).mean() < 3 or mask.mean() < 0.13, category
    flat = sprites.reshape(64, -1).astype(int)
    distance = np.abs(flat[:, None] - flat[None]).mean(-1) + 255 * np.eye(64)
    assert distance.min() > 10, "two categories share a drawing"


@made
def test_real_drawings_have_their_colours():
    """What each of these is known by: a drawing of something else would not have it."""
    sprites = dict(zip(CATEGORIES, openmoji.load_openmoji(REAL).astype(float), strict=True))
    known = {"apple": "r", "stop sign": "r", "broccoli": "g", "banana": "rg", "fish": "b"}
    for category, high in known.items():
        rgba = sprites[category]
        mean = (rgba[..., :3] * rgba[..., 3:]).sum((0, 1)) / rgba[..., 3].sum()
        assert mean["rgb".index(high[0])] > 1.15 * max(
            m for m, channel in zip(mean, "rgb", strict=True) if channel not in high
        ), category


@made
def test_real_scenes(monkeypatch):
    monkeypatch.setenv("CAPTUM_MLLM_DATA", str(REAL.parent))
    for number in range(8):
        scene = third(make_scene(number))
        image, masks = render_pil(scene, 112)
        assert masks.shape == (len(scene.objects), 112, 112)
        assert masks.flatten(1).any(1).all()
        assert image.tobytes() != render_pil(make_scene(number), 112)[0].tobytes()
    assert (REAL.parent / "openmoji.NOTICE.md").is_file()
