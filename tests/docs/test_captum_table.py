"""The table of docs/captum.md says nothing that no test shows."""

import re
from pathlib import Path

from tests.bridge import test_captum_methods as methods
from tests.bridge import test_interplay as interplay
from tests.bridge import test_llm_attribution as llm
from tests.bridge import test_token_log_prob as module
from tests.docs.test_models_table import families_of
from tests.oracle import families
from tests.oracle.layouts import QWEN

DOCS = Path(__file__).parents[2] / "docs" / "captum.md"
SHOWN_BY = {f"`{name}`": (methods.test_image, methods.test_text) for name in methods.METHODS} | {
    "`LayerIntegratedGradients`": (
        methods.test_image_LayerIntegratedGradients,
        methods.test_text_LayerIntegratedGradients,
    ),
    "`LayerGradCam`": (methods.test_image_LayerGradCam, methods.test_text_LayerGradCam),
    "several images": (methods.test_several_images_are_a_tuple,),
    "videos": (module.test_videos,),
    "`MultiScaleAttribution` over a method": (interplay.test_scales_over_integrated_gradients,),
    "`NoiseTunnel` over `MSEA`": (interplay.test_noise_tunnel_over_frames_equals_a_loop,),
    "`LLMAttribution`, `ImageMaskInput`": (llm.test_ablation_is_the_brute_force_one,),
    "`LLMAttribution`, words": (llm.test_words_of_the_prompt_by_brute_force,),
    "`denoise` of `token_attr`": (llm.test_captums_token_attr_denoised,),
    "`infidelity`, `sensitivity_max`": (
        interplay.test_our_maps_in_captums_infidelity,
        interplay.test_our_methods_in_captums_sensitivity,
    ),
    "captum's plots of our results": (
        interplay.test_words_as_captums_result,
        interplay.test_an_image_as_captums_result,
    ),
}
REFUSED = {  # where the test of a row shows an error, or does not run
    "`MultiScaleAttribution` over a method": interplay.ONE_SIZE,
    "videos": tuple(name for name in families.NAMES if name not in QWEN),
    "`denoise` of `token_attr`": ("PaliGemma",),
}


def table():
    """Rows of the table: what -> family -> cell."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names, rows = cells[0][1:], cells[2:]
    assert tuple(names) == families.NAMES
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}


def test_every_row_is_shown():
    assert table().keys() == SHOWN_BY.keys()


def test_every_yes_is_a_test_and_every_no_has_its_reason():
    notes = set(re.findall(r"^- (\([a-z]\)) ", DOCS.read_text(), re.MULTILINE))
    problems = []
    for what, row in table().items():
        for name, claim in row.items():
            works = name not in REFUSED.get(what, ())
            right = claim.split()[0] == ("yes" if works else "no")
            noted = set(claim.split()[1:]) <= notes and (works or len(claim.split()) == 2)
            shown = not works or all(name in families_of(test) for test in SHOWN_BY[what])
            if not (right and noted and shown):
                problems.append(f"{what}, {name}: {claim!r}")
    assert problems == []
