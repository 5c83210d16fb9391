"""Benchmark runs on the shipped model: figures by hand, runs that go on, samples that fail."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from captum_mllm.benchmark import METRICS, Settings, run_benchmark
from captum_mllm.benchmark.figures import table_of_values
from captum_mllm.benchmark.samples import explain_sample, prepare_sample
from captum_mllm.benchmark.settings import fixed_part, resolved_categories, weights_of
from captum_mllm.data import (
    COCO_NAMES,
    CategoryTable,
    CocoDataset,
    LabelMapDataset,
    match_categories,
    write_label_maps,
)
from captum_mllm.methods import METHODS, explain
from captum_mllm.metrics import (
    MASK_METRICS,
    f1_iou,
    func_iou,
    insertion_deletion,
    is_function_word,
)
from captum_mllm.model.loading import prepare_inputs
from captum_mllm.reference.export import export
from captum_mllm.reference.models import model_path
from captum_mllm.words import group_words
from studies.training.models import sha256

SIZE, PICTURES = 96, 3
NAMES = ("images", "instances.json", "captions.json")
FAST = Settings(methods=("lens", "random"), metrics=("obj_iou", "func_iou", "f1_iou", "auc"))


def read(folder):
    return CocoDataset(*(folder / name for name in NAMES))


def lines(folder):
    """The lines of a run, without what differs from run to run."""
    found = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "checksum")} for line in found]


def with_other(settings, **changes):
    return Settings(**{**vars(settings), **changes})


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return export("twins", tmp_path_factory.mktemp("data"), count=PICTURES, size=SIZE)


@pytest.fixture
def data(exported):
    return read(exported)


@pytest.fixture
def own(exported, tmp_path):
    """A copy of the set that a test may break."""
    return shutil.copytree(exported, tmp_path / "own")


def by_hand(model, processor, sample, method, number, names):
    """One picture's values, written out: word by word, token by token."""
    inputs, _ = prepare_inputs(processor, [sample.image], "describe the picture.")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0]
    answer = ids[inputs["input_ids"].shape[1] :].tolist()
    answer = answer[:-1] if answer[-1] == model.generation_config.eos_token_id else answer
    result = explain(method, model, processor, inputs, answer, seed=number)
    words = group_words(result.output_tokens)
    labels = match_categories([word.text for word in words], CategoryTable.of(names))
    pixels = result.to_image(0, sample.size)
    values = {name: [] for name in MASK_METRICS}
    nouns, scored = [], []
    for n, (word, label) in enumerate(zip(words, labels, strict=True)):
        if label is None:
            continue
        if n and labels[n - 1] == label:  # a name of two words
            nouns[-1] += word.tokens
        else:
            nouns.append([*word.tokens])
        scored += word.tokens
    for tokens in nouns:
        label = labels[next(n for n, w in enumerate(words) if tokens[0] in w.tokens)]
        masks = [thing.mask for thing in sample.objects if thing.category == label]
        if not masks:
            continue
        mask = np.any(masks, axis=0)
        found = [{m: f(pixels[t], mask) for m, f in MASK_METRICS.items()} for t in tokens]
        best = max(found, key=lambda scores: scores["obj_iou"])
        for name, own in values.items():
            both = name in ("precision", "recall")
            own.append(best[name] if both else max(scores[name] for scores in found))
    dark = [word.tokens for word in words if is_function_word(word.text)]
    values["func_iou"] = func_iou(result.grid_attr[0], nouns, dark, sample.size).tolist()
    curves = insertion_deletion(
        model, inputs, answer, result, processor=processor, tokens=scored, steps=2, baseline="mean"
    )
    values["insertion"] = curves.insertion_auc.tolist()
    values["deletion"] = curves.deletion_auc.tolist()
    values["difference"] = curves.difference.tolist()
    drops = (curves.probs - curves.black_probs).tolist()
    pairs = zip(values["difference"], drops, strict=True)
    values["difference_sensitive"] = [value for value, drop in pairs if drop > 0.2]
    for name in ("comprehensiveness", "sufficiency"):
        shares = getattr(curves, name).values()
        values[name] = [float(np.mean([share[t] for share in shares])) for t in range(len(scored))]
    return values


def test_figures_are_those_made_by_hand(shipped, data, tmp_path):
    settings = Settings(
        methods=("tam", "random"),
        metrics=METRICS,
        steps=2,
        baseline="mean",
        limit=2,
        max_new_tokens=16,
    )
    found = run_benchmark(*shipped, data, tmp_path, settings)
    assert set(METRICS) == {"f1_iou", "func_iou", *MASK_METRICS} | {
        "insertion", "deletion", "difference", "difference_sensitive", "comprehensiveness",
        "sufficiency",
    }  # fmt: skip
    means = {}
    for method in settings.methods:
        each = [by_hand(*shipped, data[n], method, n, data.categories) for n in range(2)]
        pooled = {name: [v for values in each for v in values[name]] for name in each[0]}
        means[method] = {name: sum(v) / len(v) for name, v in pooled.items()}
        means[method]["f1_iou"] = f1_iou(means[method]["obj_iou"], means[method]["func_iou"])
        for name, entry in found.figures[method]["metrics"].items():
            assert entry["mean"] == pytest.approx(means[method][name], abs=1e-6), name
            assert entry["low"] <= entry["mean"] <= entry["high"]
            if name != "f1_iou":
                assert entry["values"] == len(pooled[name])
        assert found.figures[method]["pictures"] == 2
    assert "difference" not in found.figures["tam"]
    for name, entry in found.figures["random"]["difference"].items():
        expected = means["random"][name] - means["tam"][name]
        assert entry["mean"] == pytest.approx(expected, abs=1e-6), name
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["finished"]
    assert written["figures"]["tam"]["metrics"] == found.figures["tam"]["metrics"]
    assert f"| tam | {means['tam']['obj_iou']:.3f} [" in found.table
    assert (tmp_path / "benchmark.md").read_text() == found.table
    assert "deletion (lower is better)" in found.table


def test_both_layouts_give_the_same_figures(shipped, data, tmp_path):
    others = LabelMapDataset(write_label_maps(data, tmp_path / "labels"))
    assert (resolved_categories(FAST, data), resolved_categories(FAST, others)) == (
        "data",
        "picture",
    )
    for answers in ("own", "captions"):
        settings = with_other(FAST, answers=answers)
        found = [
            run_benchmark(*shipped, one, tmp_path / f"{answers}{n}", settings)
            for n, one in enumerate((data, others))
        ]
        for method in settings.methods:
            one, other = (run.figures[method]["metrics"] for run in found)
            assert one == other
            assert not math.isnan(one["f1_iou"]["mean"])
    said = [line["answer"] for line in lines(tmp_path / "captions0")]
    assert said == [sample.captions[0] for sample in data for _ in range(2)]


def test_a_run_goes_on_with_more_methods_and_pictures(shipped, data, tmp_path):
    whole = run_benchmark(*shipped, data, tmp_path / "whole", FAST)
    first = with_other(FAST, methods=("lens",), limit=1)
    run_benchmark(*shipped, data, tmp_path / "parts", first)
    before = (tmp_path / "parts/samples.jsonl").read_bytes()
    found = run_benchmark(*shipped, data, tmp_path / "parts", FAST)
    after = (tmp_path / "parts/samples.jsonl").read_bytes()
    assert after.startswith(before)  # not even the time was taken anew
    assert len(lines(tmp_path / "parts")) == 2 * PICTURES

    def key(line):
        return line["sample"], line["method"]

    parts, all_at_once = lines(tmp_path / "parts"), lines(tmp_path / "whole")
    assert sorted(parts, key=key) == sorted(all_at_once, key=key)
    for method in FAST.methods:
        for part in ("metrics", "difference"):
            assert found.figures[method].get(part) == whole.figures[method].get(part)
    again = run_benchmark(*shipped, data, tmp_path / "parts", FAST)
    assert (tmp_path / "parts/samples.jsonl").read_bytes() == after
    assert again.table == found.table


def test_a_torn_line_is_made_anew(shipped, data, tmp_path):
    run_benchmark(*shipped, data, tmp_path, FAST)
    path = tmp_path / "samples.jsonl"
    whole, before = path.read_bytes(), lines(tmp_path)
    last = whole.rstrip().rfind(b"\n") + 1
    for cut in (last + 1, last + 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="1 line does not fit this run .1 cut off or changed"):
            found = run_benchmark(*shipped, data, tmp_path, FAST)
        assert lines(tmp_path) == before
        assert found.set_aside == {"cut off or changed": 1}
    aside = (tmp_path / "samples.set-aside.jsonl").read_bytes()
    assert aside.split(b"\n")[:2] == [whole[last : last + 1], whole[last : last + 40]]


def test_what_fails_is_recorded_and_may_be_done_again(shipped, own, tmp_path):
    picture = own / "images/000001.png"
    good = picture.read_bytes()
    picture.write_bytes(b"no picture")
    found = run_benchmark(*shipped, read(own), tmp_path / "out", FAST)
    failed = [line for line in lines(tmp_path / "out") if "error" in line]
    assert [(line["sample"], line["method"]) for line in failed] == [(1, "lens"), (1, "random")]
    assert failed[0]["error"]["type"] == "ValueError"
    assert "000001.png cannot be read as a picture" in failed[0]["error"]["text"]
    assert [own["failed"] for own in found.figures.values()] == [1, 1]
    assert [own["pictures"] for own in found.figures.values()] == [PICTURES - 1] * 2
    assert list(found.failures.values()) == [2]
    assert "2 x ValueError: " in found.table
    left = {}
    for line in lines(tmp_path / "out"):
        left.setdefault(line["method"], []).extend(line.get("values", {}).get("obj_iou", []))
    for method, values in left.items():
        mean = found.figures[method]["metrics"]["obj_iou"]["mean"]
        assert mean == pytest.approx(sum(values) / len(values))
    assert run_benchmark(*shipped, read(own), tmp_path / "out", FAST).table == found.table
    picture.write_bytes(good)  # another picture by its bytes, so that nothing need be asked for
    with pytest.warns(UserWarning, match=r"2 lines .* \(2 of another picture or annotation\)"):
        repaired = run_benchmark(*shipped, read(own), tmp_path / "out", FAST)
    assert repaired.failures == {}
    assert len(lines(tmp_path / "out")) == 2 * PICTURES
    whole = run_benchmark(*shipped, read(own), tmp_path / "whole", FAST)
    assert repaired.figures["lens"]["metrics"] == whole.figures["lens"]["metrics"]


def test_failed_samples_are_done_again_when_asked(shipped, data, tmp_path):
    def fail(*_):
        raise RuntimeError("out of memory")

    handle = shipped[0].register_forward_pre_hook(fail)
    try:
        found = run_benchmark(*shipped, data, tmp_path, FAST)
    finally:
        handle.remove()
    assert found.failures == {"RuntimeError: out of memory": 2 * PICTURES}
    assert found.values == 0
    assert run_benchmark(*shipped, data, tmp_path, FAST).table == found.table
    repaired = run_benchmark(*shipped, data, tmp_path, FAST, retry_failed=True)
    assert (repaired.failures, repaired.set_aside) == ({}, {})
    assert len(lines(tmp_path)) == 4 * PICTURES
    again = run_benchmark(*shipped, data, tmp_path, FAST)  # the failed lines are no repetitions
    assert (again.table, again.set_aside) == (repaired.table, {})


def test_a_method_that_fails_leaves_the_others_alone(shipped, data, tmp_path):
    settings = with_other(FAST, methods=("lens", "msea"), options={"msea": {"scales": (0.0,)}})
    found = run_benchmark(*shipped, data, tmp_path, settings)
    assert (found.figures["lens"]["failed"], found.figures["msea"]["failed"]) == (0, PICTURES)
    assert math.isnan(found.figures["msea"]["metrics"]["f1_iou"]["mean"])
    assert math.isnan(found.figures["msea"]["difference"]["obj_iou"]["mean"])
    assert list(found.failures.values()) == [PICTURES]
    written = json.loads((tmp_path / "benchmark.json").read_text())  # NaN is no JSON
    assert written["figures"]["msea"]["metrics"]["auc"]["mean"] is None


def test_other_settings_are_refused(shipped, data, own, tmp_path):
    out = tmp_path / "out"
    run_benchmark(*shipped, data, out, FAST)
    before = (out / "samples.jsonl").read_bytes()
    for change, message in (
        ({"steps": 8}, "steps was 64, is 8"),
        ({"prompt": "what?"}, r"prompt was 'describe the picture\.', is 'what\?'"),
        ({"metrics": ("obj_iou",)}, "metrics was"),
        ({"options": {"lens": {"layer": 0}}}, "options.lens was None, is {'layer': 0}"),
        ({"seed": 1}, "seed was 0, is 1"),
    ):
        pattern = f"out .* holds a run with other settings: {message}.* Name another folder"
        with pytest.raises(ValueError, match=pattern):
            run_benchmark(*shipped, data, out, with_other(FAST, **change))
    path = own / "captions.json"
    path.write_text(path.read_text().replace("there is", "there's"))
    with pytest.raises(ValueError, match=r"other settings: data.sha256 was '"):
        run_benchmark(*shipped, read(own), out, FAST)
    model, processor = shipped
    with pytest.raises(ValueError, match=r"dtype was 'float32', is 'float64'"):
        run_benchmark(model.double(), processor, data, out, FAST)
    model.float()
    assert (out / "samples.jsonl").read_bytes() == before
    head = json.loads((out / "benchmark.json").read_text())
    for version in (1, 3, "2", None):
        (out / "benchmark.json").write_text(json.dumps({**head, "format": version}))
        pattern = f"out .* holds a run of format {version!r}, and this version reads and writes 2"
        with pytest.raises(ValueError, match=pattern):
            run_benchmark(*shipped, data, out, FAST)
    for text in ("[]", "no json", '{"format": 2}', "[" * 100_000, "\udcff"):
        (out / "benchmark.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"benchmark.json that no benchmark wrote"):
            run_benchmark(*shipped, data, out, FAST)
    (out / "benchmark.json").write_text("{}")
    with pytest.raises(ValueError, match=r"benchmark.json that no benchmark wrote; name another"):
        run_benchmark(*shipped, data, out, FAST)
    (out / "benchmark.json").unlink()
    with pytest.raises(ValueError, match=r"holds samples.jsonl but no benchmark.json"):
        run_benchmark(*shipped, data, out, FAST)


WRONG = [
    ({"methods": ()}, r"methods must be a sequence of at least one name, got \(\)"),
    ({"methods": "lens"}, r"methods must be a sequence"),
    ({"methods": ("lens", "tan")}, r"methods must be among lens, tam, .*; unknown: tan"),
    ({"methods": ("lens", "lens")}, r"methods must be distinct, got lens, lens"),
    (
        {"metrics": ("iou",)},
        r"metrics must be among obj_iou, func_iou, f1_iou, average_p.*; unknown: iou",
    ),
    ({"against": "tam"}, r"against must be one of lens, random, got 'tam'"),
    ({"answers": "other"}, r"answers must be one of own, captions, got 'other'"),
    ({"baseline": "white"}, r"baseline must be one of black, mean, blur"),
    ({"categories": "all"}, r"categories must be one of"),
    ({"scored_tokens": "some"}, r"scored_tokens must be one of"),
    ({"steps": 0}, r"steps must be a whole number of at least 1, got 0"),
    ({"limit": 1.5}, r"limit must be a whole number"),
    ({"prompt": " "}, r"prompt is empty"),
    ({"options": {"tam": {}}}, r"options must be for one of lens, random, got some for 'tam'"),
    ({"options": {"lens": {"layer": object()}}}, r"options must be plain data for JSON"),
    (
        {"options": {"lens": {"scales": 1}}},
        r"options .* method 'lens' does not take the option\(s\) scales; it takes: calibration, ",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_settings_that_are_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        with_other(FAST, **change)


def test_categories(data, own):
    def resolved(kind, of):
        return resolved_categories(with_other(FAST, categories=kind), of)

    with pytest.raises(ValueError, match=r"categories is 'coco', but the data has .* too; use"):
        resolved("coco", data)
    with pytest.raises(ValueError, match=r"categories is 'picture', but this data has no names"):
        resolved("picture", data)
    content = json.loads((own / "instances.json").read_text())
    for category in content["categories"]:
        category["name"] = COCO_NAMES[category["id"] % 80]
    (own / "instances.json").write_text(json.dumps(content))
    assert resolved("auto", read(own)) == "coco"
    assert resolved("data", read(own)) == "data"


def test_pictures_without_objects_or_captions(shipped, own, tmp_path):
    """Func-IoU is still measured where nothing is annotated; no caption is a failure."""
    content = json.loads((own / "instances.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 0]
    (own / "instances.json").write_text(json.dumps(content))
    bare = CocoDataset(own / "images", own / "instances.json")
    run_benchmark(*shipped, bare, tmp_path / "own answers", FAST)
    first, second = lines(tmp_path / "own answers")[:3:2]
    assert set(first["values"]["obj_iou"]) <= {None}
    assert first["values"]["func_iou"]
    assert None not in first["values"]["func_iou"]
    assert None not in second["values"]["obj_iou"]
    found = run_benchmark(*shipped, bare, tmp_path / "out", with_other(FAST, answers="captions"))
    assert found.figures["lens"]["failed"] == PICTURES
    assert "ValueError: image 0 has no caption to explain." in found.failures


def test_every_method_runs(shipped, data, tmp_path):
    settings = Settings(
        methods=tuple(METHODS),
        metrics=("average_precision",),
        options={"integrated_gradients": {"steps": 2}, "ablation": {"grid": (2, 2)}},
        limit=1,
        max_new_tokens=10,
        against="mask",
    )
    found = run_benchmark(*shipped, data, tmp_path, settings)
    assert found.failures == {}
    means = {
        name: own["metrics"]["average_precision"]["mean"] for name, own in found.figures.items()
    }
    assert max(means, key=means.get) == "mask"  # which knows where the objects are
    assert "difference" not in found.figures["mask"]


def test_identity_of_weights(shipped, model, tmp_path):
    loaded, _ = shipped
    assert weights_of(loaded) == f"sha256:{sha256(model_path() / 'model.safetensors')}"
    first = weights_of(model)  # made in memory
    with torch.no_grad():
        parameter = next(model.parameters())
        parameter.add_(1.0)
        assert weights_of(model) != first
        parameter.sub_(1.0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    on_disk = weights_of(again)
    assert on_disk.startswith("sha256:")
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert weights_of(again) != on_disk


def test_settings_that_cost_time_alone_are_free(shipped, data):
    one = fixed_part(FAST, shipped[0], data)
    other = with_other(FAST, perturbations_per_eval=8, limit=1, methods=("random",), against=None)
    assert fixed_part(other, shipped[0], data) == one


def test_values_of_two_methods_side_by_side():
    a = [{"values": {"auc": [0.5, None]}}, {}, {"values": {"auc": []}}]
    b = [{"values": {"auc": [0.1, 0.2]}}, {"values": {"auc": [0.3]}}, {"error": {}}]
    one, other = table_of_values(a, b, "auc")
    np.testing.assert_array_equal(one, [[0.5, np.nan], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(other, [[0.1, 0.2], [0.3, np.nan], [np.nan] * 2])


def test_two_runs_at_once_and_a_package_that_is_missing(shipped, data, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"out .* is being written by another run; wait"):
            run_benchmark(*shipped, data, tmp_path, FAST)
    monkeypatch.setitem(sys.modules, "skimage.filters", None)
    with pytest.raises(ImportError, match=r"captum-mllm\[metrics\]"):
        run_benchmark(*shipped, data, tmp_path, FAST)
    assert not (tmp_path / "samples.jsonl").exists()  # it is no failure of a picture
    monkeypatch.undo()
    assert run_benchmark(*shipped, data, tmp_path, FAST).failures == {}


@pytest.mark.parametrize("name", ["qwen2vl", "internvl"])
def test_other_families(name, data, tmp_path):
    """Another grid, and tiles with a thumbnail."""
    from captum_mllm.reference import load

    settings = Settings(methods=("lens", "msea+arc"), metrics=("obj_iou", "insertion"), steps=2)
    found = run_benchmark(*load(name), data, tmp_path, with_other(settings, limit=1))
    assert found.failures == {}
    assert found.figures["msea+arc"]["metrics"]["insertion"]["values"] > 0


# ---- shared traces ------------------------------------------------------------------------------


def forwards(model, run):
    """What a call returns, and how many times it ran the decoder."""
    calls = []
    handle = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    try:
        return run(), len(calls)
    finally:
        handle.remove()


OURS = ("lens", "tam", "arc", "msea", "msea+arc")


@pytest.mark.parametrize("order", [OURS, OURS[::-1]])
def test_methods_share_their_traces(shipped, data, order):
    """Five methods for the forwards of two, and every number as one by one."""
    model, processor = shipped
    settings = Settings(methods=order, max_new_tokens=8)
    table = CategoryTable.of(data.categories)

    def sample():
        return prepare_sample(model, processor, data[0], 0, settings, table)

    shared, counts = sample(), {}
    for method in order:
        result, counts[method] = forwards(
            model, lambda m=method: explain_sample(model, processor, shared, m, settings)
        )
        single = explain_sample(model, processor, sample(), method, settings)
        assert result.method == single.method
        for name in ("grid_attr", "token_attr", "output_probs", "relevance"):
            values = getattr(result, name), getattr(single, name)
            pairs = zip(*values, strict=True) if name == "grid_attr" else [values]
            for value, expected in pairs:
                assert (value is expected is None) or torch.equal(value, expected), (method, name)
    assert sum(counts[name] for name in ("lens", "tam", "arc")) == 1
    assert sum(counts[name] for name in ("msea", "msea+arc")) == 4  # two scales, also mirrored
    assert shared.shared.saved > 0


def test_other_settings_share_nothing(shipped, data):
    model, processor = shipped
    options = {"tam": {"layer": 0}, "arc": {"top_k": 3}}
    settings = Settings(methods=("lens", "tam", "arc"), max_new_tokens=8, options=options)
    sample = prepare_sample(
        model, processor, data[0], 0, settings, CategoryTable.of(data.categories)
    )
    for method in settings.methods:
        result, count = forwards(
            model, lambda m=method: explain_sample(model, processor, sample, m, settings)
        )
        assert count == 1, method
        expected = explain(
            method, model, processor, sample.inputs, sample.answer, **options.get(method, {})
        )
        assert torch.equal(result.grid_attr[0], expected.grid_attr[0])
    assert sample.shared.saved == 0
