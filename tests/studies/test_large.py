"""The recorded measurement of large models: its architectures, its cases, what it writes."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from captum_mllm.adapters import find_adapter
from studies import large, large_table
from studies.large_models import FAMILIES, build, make_inputs, tiny

CPU = torch.device("cpu")
NAMES = ["llava", "qwen2vl", "internvl"]
PARAMETERS = {  # of the published checkpoints
    "llava": 7_063_427_072,
    "qwen2vl": 8_291_375_616,
    "internvl": 7_944_373_760,
}
TINY = {  # family -> image tokens in the order of the forwards, shape of the maps
    "llava": [([16, 9, 4], [4, 4]), ([16, 25, 36], [6, 6])],
    "qwen2vl": [([16, 25, 36], [6, 6]), ([36, 16, 9], [6, 6])],
    "internvl": [([16, 25, 36], [6, 6]), ([112, 63, 28], [8, 12])],
}
LARGEST = {
    "llava": [576, 1296, 2304, 4096],
    "qwen2vl": [576, 1296, 2304, 4096, 4096],
    "internvl": [576, 1280, 2560, 4032, 4096],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run with --tiny: the folder, the record, the text."""
    folder = tmp_path_factory.mktemp("large")
    assert large.main(["--tiny", "--repeats", "2", "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"large.json", "large.md"}
    return folder, json.loads((folder / "large.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_each_case_ran_on_its_tokens_and_has_maps_on_its_grid(run, name):
    cases = run[1]["families"][name]["cases"]
    assert [(case["image_tokens"], case["map_shape"]) for case in cases] == TINY[name]
    for case in cases:
        assert case["largest_image_tokens"] == max(case["image_tokens"])
        assert case["sum_image_tokens"] == sum(case["image_tokens"])
        assert case["prefix_forwards"] == 2 == len(case["scales"]) - 1
        assert case["achieved"] == pytest.approx(case["scales"], abs=0.1)  # of few cells
        assert 0 < case["positive_cells"] <= 1


def test_record_says_what_was_measured(run):
    record = run[1]
    assert record["command"].endswith(f'ARGS="--tiny --repeats 2 --out {run[0]}"')
    assert (record["device"], record["gpu"]) == ("CPU", False)
    assert (record["dtype"], record["attention"]) == ("bfloat16", "sdpa")
    assert record["torch"] == torch.__version__
    assert list(record["families"]) == NAMES
    for family in record["families"].values():
        assert family["weight_bytes"] == pytest.approx(2 * family["parameters"], rel=0.01)
        assert family["build_seconds"] > 0
        for case in family["cases"]:
            assert set(case["methods"]) == set(large_table.METHODS)
            for method, row in case["methods"].items():
                assert len(row["seconds"]) == (1 if method == "generate" else 2)
                assert min(row["seconds"]) > 0
                plain = case["methods"]["plain forward"]["median_seconds"]
                assert row["time_ratio"] == pytest.approx(row["median_seconds"] / plain)
                for memory in ("peak_bytes", "above_weights_bytes", "peak_ratio", "above_ratio"):
                    assert row[memory] is None  # no GPU


def test_text_holds_the_table(run):
    folder, record = run
    text = (folder / "large.md").read_text()
    assert text == large_table.as_text(record)
    assert f"`{record['command']}` on CPU: LLaVA-1.5-7B, tiny (" in text
    assert "GiB above" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 6
    assert {line.count("|") for line in lines} == {9}
    assert "| InternVL3-8B, tiny | 112, 63, 28 (203) | " in text
    row = record["families"]["internvl"]["cases"][1]["methods"]["MSEA+ARC"]
    assert f"| {row['median_seconds'] * 1e3:.0f} (x {row['time_ratio']:.2f}) |" in text


def test_memory_is_told_above_the_weights_and_in_all(run):
    seconds = {name: [1.0, 3.0, 2.0] for name in large_table.METHODS}
    gib = 2**30
    peaks = dict.fromkeys(seconds, 12 * gib) | {"MSEA+ARC": 13 * gib}
    rows = large._figures(seconds, peaks, 10 * gib)
    arc = rows["MSEA+ARC"]
    assert (arc["median_seconds"], arc["time_ratio"]) == (2.0, 1.0)
    assert (arc["peak_bytes"], arc["above_weights_bytes"]) == (13 * gib, 3 * gib)
    assert (arc["peak_ratio"], arc["above_ratio"]) == (13 / 12, 1.5)
    case = {"image_tokens": [576, 144], "methods": rows}
    record = {**run[1], "gpu": True, "families": {"a": {"title": "A", "cases": [case]}}}
    text = large_table.table(record)
    assert "**GiB above the weights**" in text
    assert "3.00 (x 1.50)" in text
    assert "13.0 (x 1.08)" in text


@pytest.mark.parametrize("name", NAMES)
def test_built_models_are_those_of_from_pretrained(name, tmp_path):
    family = tiny(name)
    built = build(family, CPU)
    built.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    expected = dict(loaded.named_buffers())
    for key, buffer in built.named_buffers():
        torch.testing.assert_close(buffer, expected[key], rtol=0, atol=0)
    assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
    _, forced, _ = make_inputs(family, family.cases[-1], CPU, 6)
    with torch.no_grad():
        logits = [model(**forced).logits for model in (built, loaded)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    assert float(logits[0].float().std()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_real_architectures_and_cases(name):
    """Without weights: as many parameters as the checkpoints, grids as the adapter reads them."""
    family = FAMILIES[name]
    model = build(family, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    adapter = find_adapter(model)
    for case in family.cases:
        prompt, forced, answer = make_inputs(family, case, CPU)
        ids = prompt["input_ids"]
        grids = adapter.grids(prompt)  # a doubtful layout of tiles would warn
        scaled = [adapter.scaled_grid(grids[0], scale) for scale in case.scales]
        assert [sum(adapter.runs(grid)) for grid in scaled] == list(case.tokens)
        assert int((ids == model.config.image_token_id).sum()) == case.tokens[0]
        assert case.map_shape == max(grid.shape for grid in scaled)
        assert forced["input_ids"][0, ids.shape[1] :].tolist() == answer.tolist()
        assert len(answer) == 64
        for key in prompt.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
            assert torch.equal(prompt[key], forced[key])
    assert [max(case.tokens) for case in family.cases] == LARGEST[name]


def test_a_case_that_fails_leaves_its_reason_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    good = tiny("llava")
    bad = replace(good.cases[0], tokens=(16, 9, 5))

    def some_fail(name):
        if name == "qwen2vl":
            return replace(good, title="B", config=lambda *_: 1 / 0)
        return replace(good, cases=(bad, good.cases[0]))

    monkeypatch.setattr(large, "tiny", some_fail)
    arguments = ["--tiny", "--repeats", "1", "--families", "qwen2vl", "llava"]
    assert large.main([*arguments, "--out", str(tmp_path)]) == 1
    families = json.loads((tmp_path / "large.json").read_text())["families"]
    assert families["qwen2vl"]["error"] == "ZeroDivisionError: division by zero"
    first, second = families["llava"]["cases"]
    assert first["error"].startswith("ValueError: forwards had [16, 9, 4] image tokens")
    assert "error" not in second
    text = (tmp_path / "large.md").read_text()
    assert text in capsys.readouterr().out
    assert "| B | failed: ZeroDivisionError: division by zero |" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("| ")} == {9}


def test_a_stopped_run_keeps_its_cases(tmp_path, monkeypatch):
    measure_case, calls = large.measure_case, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure_case(*args)

    monkeypatch.setattr(large, "measure_case", stops)
    with pytest.raises(KeyboardInterrupt):
        large.main(["--tiny", "--repeats", "1", "--out", str(tmp_path)])
    families = json.loads((tmp_path / "large.json").read_text())["families"]
    assert [len(family["cases"]) for family in families.values()] == [1]
    assert "| 16, 9, 4 (29) |" in (tmp_path / "large.md").read_text()


def test_arguments(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (([], "needs a GPU"), (["--tiny", "--repeats", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            large.main(arguments)
        assert message in capsys.readouterr().err
    folder = large._arguments(["--tiny"]).out
    folder.rmdir()  # new and empty, not that of the records


def test_on_a_gpu_clock_and_memory_wait_for_it(monkeypatch):
    order = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _device, name=name: order.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 123)
    seconds, peak = large.measured(lambda: order.append("call"), torch.device("cuda"))
    assert seconds > 0
    assert peak == 123
    assert order == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]
