"""Exported test sets read back as they were drawn, with our reader and with COCO's own."""

import contextlib
import io
import json
import signal

import numpy as np
import pytest
from PIL import Image

from captum_mllm.data import CocoDataset
from captum_mllm.reference import export as module
from captum_mllm.reference import openmoji
from captum_mllm.reference.captions import text_of
from captum_mllm.reference.export import LICENSES, export, main
from captum_mllm.reference.render import render_pil
from captum_mllm.reference.scenes import Scene, SceneObject
from captum_mllm.reference.sets import SETS, Example, make_example
from captum_mllm.reference.sprites import CATEGORIES, load_sprites

COUNT, SIZE = 6, 96


@pytest.fixture(autouse=True)
def third_style(tmp_path, monkeypatch):
    """A stand-in for the third style: Twemoji mirrored."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("CAPTUM_MLLM_DATA", str(home))
    sprites = load_sprites()[1, :, :, ::-1]
    np.savez(home / "openmoji.npz", sprites=sprites, categories=np.array(CATEGORIES))
    return home / "openmoji.npz"


def read(folder):
    return CocoDataset(*(folder / n for n in ("images", "instances.json", "captions.json")))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def coco(path):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


@pytest.mark.parametrize("name", SETS)
def test_read_back_equals_what_was_drawn(name, tmp_path):
    data = read(export(name, tmp_path, "validation", COUNT, SIZE))
    assert data.categories == CATEGORIES
    assert len(data) == COUNT
    for number, sample in enumerate(data):
        example = make_example(name, number, "validation")
        image, masks = render_pil(example.scene, SIZE)
        assert sample.image.tobytes() == image.tobytes()
        assert (sample.image_id, sample.file_name) == (number, f"{number:06d}.png")
        shown = [i for i, mask in enumerate(masks) if mask.any()]
        assert [thing.extra["object"] for thing in sample.objects] == shown
        assert sample.extra["hidden"] == [i for i in range(len(masks)) if i not in shown]
        for i, thing in zip(shown, sample.objects, strict=True):
            drawn = example.scene.objects[i]
            np.testing.assert_array_equal(thing.mask, masks[i].numpy())
            assert thing.category == drawn.category
            assert (thing.area, thing.is_crowd) == (masks[i].sum(), False)
            assert thing.id == 100 * number + i + 1
            left, top, width, height = map(int, thing.bbox)
            inside = np.zeros_like(thing.mask)
            inside[top : top + height, left : left + width] = True
            assert not (thing.mask & ~inside).any()
            assert thing.mask[:, [left, left + width - 1]].any(0).all()
            assert thing.mask[[top, top + height - 1]].any(1).all()
            assert thing.extra == {
                "object": i,
                "size_word": drawn.size_word,
                "color": drawn.color,
                "position_words": list(drawn.position_words),
                "style": drawn.style,
            }
        asked = {k: sample.extra[k] for k in ("set", "number", "split", "seed", "background")}
        scene = example.scene
        assert list(asked.values()) == [name, number, "validation", scene.seed, scene.background]
        check_caption(sample, example)


def check_caption(sample, example):
    turns = example.talk.turns
    assert sample.captions == [text_of(turns[-1].answer)]
    (extra,) = sample.caption_extra
    assert extra["question"] == text_of(turns[-1].question)
    for kept, turn in zip(extra["turns"], turns, strict=True):
        for part in ("question", "answer"):
            words = [(w["text"], w["role"], w["obj"]) for w in kept[part]]
            assert words == [(w.text, w.role, w.obj) for w in getattr(turn, part)]
    assert extra["planted"] == (example.planted and list(example.planted))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_cocos_own_reader_reads_it(tmp_path):
    folder = export("plain", tmp_path, count=COUNT, size=SIZE)
    theirs, said = coco(folder / "instances.json"), coco(folder / "captions.json")
    assert theirs.getImgIds() == said.getImgIds() == list(range(COUNT))
    assert [c["name"] for c in theirs.loadCats(theirs.getCatIds())] == list(CATEGORIES)
    for sample in read(folder):
        found = theirs.loadAnns(theirs.getAnnIds(imgIds=sample.image_id))
        assert [a["id"] for a in found] == [thing.id for thing in sample.objects]
        for a, thing in zip(found, sample.objects, strict=True):
            np.testing.assert_array_equal(theirs.annToMask(a), thing.mask)
        (caption,) = said.loadAnns(said.getAnnIds(imgIds=sample.image_id))
        assert [caption["caption"]] == sample.captions


@pytest.mark.parametrize("name", ["twins", "openmoji"])
def test_the_same_call_writes_the_same_bytes(name, tmp_path):
    first = files(export(name, tmp_path / "a", count=2, size=SIZE))
    assert files(export(name, tmp_path / "b", count=2, size=SIZE)) == first
    assert sorted(first) == [
        "NOTICE.md", "captions.json", "images/000000.png", "images/000001.png", "instances.json",
    ]  # fmt: skip


def test_ids_do_not_depend_on_how_many_are_written(tmp_path):
    few, more = (read(export("small", tmp_path / str(n), count=n, size=SIZE)) for n in (2, 4))
    for a, b in zip(few, more[:2], strict=True):
        assert (a.image_id, a.captions) == (b.image_id, b.captions)
        assert [x.id for x in a.objects] == [x.id for x in b.objects]
        assert [x.category for x in a.objects] == [x.category for x in b.objects]
    first, second = (json.loads((tmp_path / n / "small/instances.json").read_text()) for n in "24")
    assert first["categories"] == second["categories"]


def test_splits_and_sizes_differ(tmp_path):
    test, validation = (
        read(export("plain", tmp_path / split, split, 1, 50))[0] for split in ("test", "validation")
    )
    assert test.captions != validation.captions
    assert test.image.size == (50, 50)
    assert test.objects[0].mask.shape == (50, 50)


def test_an_object_without_a_visible_pixel(tmp_path, monkeypatch):
    """It is in the words and in `hidden`, and other objects keep their ids and indices."""
    key, tv = (
        SceneObject("key", "noto", (0.45, 0.5), 0.1),
        SceneObject("tv", "noto", (0.5, 0.5), 0.5),
    )
    scene = Scene(1, "white", (key, tv, SceneObject("ball", "noto", (0.8, 0.5), 0.3)))
    talk = make_example("plain", 0).talk
    monkeypatch.setattr(
        module, "make_example", lambda *a: Example("plain", a[1], a[2], scene, talk)
    )
    (sample,) = read(export("plain", tmp_path, count=1, size=SIZE))
    assert [thing.id for thing in sample.objects] == [2, 3]
    assert [thing.extra["object"] for thing in sample.objects] == [1, 2]
    assert sample.extra["hidden"] == [0]


@pytest.mark.parametrize("name", ["plain", "openmoji"])
def test_licences(name, tmp_path):
    folder = export(name, tmp_path, count=8, size=32)
    data = json.loads((folder / "instances.json").read_text())
    licenses = {record["id"]: record for record in data["licenses"]}
    for image in data["images"]:
        styles = {a["style"] for a in data["annotations"] if a["image_id"] == image["id"]}
        text = licenses[image["license"]]["name"]
        for style, words in {
            "noto": ("Noto", "Apache-2.0"),
            "twemoji": ("Twemoji", "CC-BY-4.0"),
            "openmoji": ("OpenMoji", "CC-BY-SA-4.0"),
        }.items():
            assert all((word in text) == (style in styles) for word in words), (styles, text)
        assert licenses[image["license"]]["url"].startswith("https://")
    notice = (folder / "NOTICE.md").read_text()
    assert ("CC-BY-SA-4.0" in notice) == (name == "openmoji")
    assert ("Apache" in notice) == ("CC-BY-4.0" in notice) == (name == "plain")
    assert len(LICENSES) == len(licenses)
    assert "{" not in notice


def test_what_is_there_is_not_overwritten(tmp_path):
    folder = export("plain", tmp_path, count=1, size=32)
    before = files(folder)
    with pytest.raises(FileExistsError, match=r"plain is not empty; --force replaces"):
        export("plain", tmp_path, count=2, size=32)
    assert files(folder) == before
    export("plain", tmp_path, count=2, size=32, force=True)
    assert len(read(folder)) == 2
    (tmp_path / "small").mkdir()  # an empty folder is no obstacle
    export("small", tmp_path, count=1, size=32)
    (tmp_path / "twins").mkdir()
    (tmp_path / "twins" / "letter.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no earlier export: not replaced"):
        export("twins", tmp_path, count=1, size=32, force=True)
    (tmp_path / "crowded").write_text("mine")
    with pytest.raises(FileExistsError, match=r"crowded is a file"):
        export("crowded", tmp_path, count=1, size=32, force=True)


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    folder = export("plain", tmp_path / "out", count=1, size=32)
    before, draw = files(folder), module.render_pil

    def breaks(scene, size):
        if scene == make_example("plain", 2).scene:
            raise MemoryError
        return draw(scene, size)

    monkeypatch.setattr(module, "render_pil", breaks)
    with pytest.raises(MemoryError):
        export("plain", tmp_path / "out", count=3, size=32, force=True)
    with pytest.raises(MemoryError):
        export("plain", tmp_path / "other", count=3, size=32)
    assert files(tmp_path / "out") == {f"plain/{name}": data for name, data in before.items()}
    assert list((tmp_path / "other").iterdir()) == []

    def refuses(self, target):
        if self.name == "made":
            raise PermissionError
        return rename(self, target)

    rename = module.Path.rename
    monkeypatch.setattr(module, "render_pil", draw)
    monkeypatch.setattr(module.Path, "rename", refuses)
    with pytest.raises(PermissionError):
        export("plain", tmp_path / "out", count=3, size=32, force=True)
    assert files(folder) == before


@pytest.mark.parametrize("moved", ["before", "made"])
def test_an_interrupt_keeps_the_earlier_export(moved, tmp_path, monkeypatch):
    """Ctrl-C once the earlier export was moved away, and once the new one was moved in."""
    folder = export("plain", tmp_path, count=1, size=32)
    before, rename = files(folder), module.Path.rename

    def interrupted(self, target):
        rename(self, target)
        if moved in (self.name, target.name):
            monkeypatch.setattr(module.Path, "rename", rename)
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export("plain", tmp_path, count=3, size=32, force=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["plain"]
    assert (files(folder) == before) == (moved == "before")
    assert len(read(folder)) == (1 if moved == "before" else 3)


def test_only_an_export_is_replaced(tmp_path):
    folder = export("plain", tmp_path, count=2, size=32)
    again = {"count": 1, "size": 32, "force": True}
    for stray in ("model.pt", "images/mine.png", "images/000002.png", "runs/log.txt"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text("mine")
        with pytest.raises(FileExistsError, match=rf"more than an export: (runs/, )?{stray}\."):
            export("plain", tmp_path, **again)
        assert (folder / stray).read_text() == "mine"
        (folder / stray).unlink()
    with pytest.raises(FileExistsError, match=r"export: runs/\. --force would delete that: not"):
        export("plain", tmp_path, **again)
    (folder / "runs").rmdir()
    ours = (folder / "instances.json").read_text()
    for text in ("{", "[]", "{}", '{"info": []}', ours.replace('"set": "plain"', '"set": "small"')):
        (folder / "instances.json").write_text(text)
        with pytest.raises(FileExistsError, match=r"set 'plain', so it is no earlier export: not"):
            export("plain", tmp_path, **again)
    (folder / "instances.json").write_text(ours)
    (folder / "NOTICE.md").unlink()  # what is there is ours, if not all of it
    assert len(read(export("plain", tmp_path, **again))) == 1


def test_what_comes_while_it_draws_is_kept(tmp_path, monkeypatch):
    draw = module.render_pil

    def slow(scene, size):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / "letter.txt").write_text("mine")
        return draw(scene, size)

    monkeypatch.setattr(module, "render_pil", slow)
    with pytest.raises(FileExistsError, match="plain is not empty"):
        export("plain", tmp_path, count=1, size=32)
    assert (tmp_path / "plain" / "letter.txt").read_text() == "mine"


def test_sigterm_leaves_nothing_behind(tmp_path, monkeypatch):
    def killed(scene, size):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # else the tests end here
        signal.raise_signal(signal.SIGTERM)

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    monkeypatch.setattr(module, "render_pil", killed)
    with pytest.raises(SystemExit) as stopped:
        main(["--set", "plain", "--out", str(tmp_path / "out"), "--count", "1", "--size", "32"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_arguments_that_are_wrong(tmp_path):
    for name, split, count, size, message in (
        ("none", "test", 1, 9, "name='none' is unknown"),
        ("plain", "train", 1, 9, "split='train' must be"),
        ("plain", "test", 0, 9, "count=0 must be in 1.."),
        ("plain", "test", 10**5 + 1, 9, "count=100001 must be in"),
        ("plain", "test", 1, 0, "size=0 at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            export(name, tmp_path / "out", split, count, size)
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, capsys, third_style):
    out = tmp_path / "out"
    call = ["--out", str(out), "--count", "1", "--size", "32"]
    main(["--set", "plain", "small", "plain", *call])
    assert sorted(path.name for path in out.iterdir()) == ["plain", "small"]
    assert capsys.readouterr().out.count("1 pictures of 32 px") == 2
    third_style.unlink()
    with pytest.raises(SystemExit) as stopped:  # before any set is written
        main(["--set", "all", "--force", "--split", "validation", *call])
    assert stopped.value.code == 1
    assert "python -m captum_mllm.reference.openmoji" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["plain", "small"]
    assert read(out / "plain")[0].extra["split"] == "test"
    with pytest.raises(SystemExit):
        main(["--set", "plain", *call])
    assert "--force replaces" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--set", "unheard", *call])
    assert "twins" in capsys.readouterr().err


def test_all_sets_at_once(tmp_path):
    main(["--set", "all", "--out", str(tmp_path / "out"), "--count", "1", "--size", "32"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(SETS)
    picture = tmp_path / "out" / "openmoji" / "images" / "000000.png"
    with Image.open(picture) as opened:
        assert opened.size == (32, 32)
    assert openmoji.LICENSE in (tmp_path / "out" / "openmoji" / "NOTICE.md").read_text()
