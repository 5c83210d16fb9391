"""captum's LLMAttribution: wrong without TeacherForced, and with it a brute-force ablation."""

import copy
import warnings

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, KernelShap, LLMAttribution, ShapleyValueSampling
from PIL import Image
from torch.testing import assert_close

from captum_mllm import PromptInput, TeacherForced, TokenLogProb
from captum_mllm.bridge import ExactLabels, check_llm_attribution, image_input
from captum_mllm.functional import grid_mask
from tests.oracle.families import above
from tests.oracle.frames import log_probs_by_hand
from tests.oracle.layouts import QWEN, kin_of
from tests.oracle.published import RankCorrelationDenoiser

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
MODES = {
    "as it comes": {},
    "token by token": {"use_cached_outputs": False},
    "at once": {"forward_in_tokens": False},
}


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


def segments(picture):
    """Six segments of unequal size, one of them in two pieces."""
    mask = grid_mask((picture.height, picture.width), 2, 4)
    mask[mask == 7] = 0
    mask[mask == 5] = 4
    return mask


def painted(picture, mask, segment, colour=(255, 255, 255)):
    pixels = np.array(picture)
    pixels[(mask == segment).numpy()] = colour
    return Image.fromarray(pixels)


def ablated_by_hand(kin, picture, mask, others=()):
    """(answer, segments): what painting a segment white costs each token, a forward at a time."""
    with torch.no_grad():
        whole = log_probs_by_hand(kin, kin.encode(picture, *others), kin.answer)
        columns = [
            log_probs_by_hand(kin, kin.encode(painted(picture, mask, int(s)), *others), kin.answer)
            for s in mask.unique()
        ]
    return whole[:, None] - torch.stack(columns, 1)


def attribution(model, kin, method=FeatureAblation):
    return LLMAttribution(method(model), kin.processor.tokenizer)


@pytest.mark.parametrize("mode", MODES)
def test_ablation_is_the_brute_force_one(kin, mode):
    picture = kin.wide_picture
    mask = segments(picture)
    inp = image_input(picture, mask, kin.prompt, kin.processor)
    wrapped = attribution(TeacherForced(kin.model), kin)
    got = wrapped.attribute(inp, kin.answer, **MODES[mode])
    expected = ablated_by_hand(kin, picture, mask)
    assert float(expected.abs().max()) > 0.1
    assert_close(got.token_attr, expected, rtol=1e-5, atol=1e-5)
    assert_close(got.seq_attr, expected.sum(0), rtol=1e-5, atol=1e-5)


def test_the_second_of_two_pictures(kin):
    first, second = kin.wide_picture, kin.tall_picture
    prompt = kin.prompt.replace(kin.placeholder, f"{kin.placeholder} {kin.placeholder}")
    mask = segments(second)
    inp = image_input([first, second], mask, prompt, kin.processor, image=1)
    wrapped = attribution(TeacherForced(kin.model), kin)
    got = wrapped.attribute(inp, kin.answer, forward_in_tokens=False).token_attr
    with torch.no_grad():
        whole = log_probs_by_hand(kin, kin.encode(first, second), kin.answer)
        inputs = kin.encode(first, painted(second, mask, 4))
        expected = whole - log_probs_by_hand(kin, inputs, kin.answer)
    assert_close(got[:, [int(i) for i in mask.unique()].index(4)], expected, rtol=1e-5, atol=1e-5)


def test_captums_default_without_the_wrapper_is_zero(kin):
    """Fails when captum (or transformers) fixes it: then the docs and the warning may go."""
    mask = segments(kin.wide_picture)
    inp = image_input(kin.wide_picture, mask, kin.prompt, kin.processor)
    plain = attribution(kin.model, kin)
    result = plain.attribute(inp, kin.answer)
    assert float(result.token_attr.abs().max()) == 0, "captum's default mode sees the image now"
    with pytest.warns(UserWarning, match=r"give zeros: .*TeacherForced\(model\)"):
        assert not check_llm_attribution(plain, inp, kin.answer)


@pytest.mark.parametrize("mode", ["token by token", "at once"])
def test_captums_other_modes_without_the_wrapper_fail_on_qwen(kin, mode):
    """Fails when captum extends the inputs that go with input_ids."""
    inp = image_input(kin.wide_picture, segments(kin.wide_picture), kin.prompt, kin.processor)
    plain = attribution(kin.model, kin)
    if kin.name in QWEN:
        with pytest.raises(IndexError):
            plain.attribute(inp, kin.answer, **MODES[mode])
        with pytest.warns(UserWarning, match="would raise IndexError"):
            assert not check_llm_attribution(plain, inp, kin.answer, **MODES[mode])
    else:
        assert check_llm_attribution(plain, inp, kin.answer, **MODES[mode])


@pytest.mark.parametrize("mode", ["as it comes", "at once"])
def test_the_check_is_content_with_the_wrapper(kin, mode):
    inp = image_input(kin.picture, None, kin.prompt, kin.processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrapped = attribution(TeacherForced(kin.model), kin)
        assert check_llm_attribution(wrapped, inp, kin.answer, **MODES[mode])


def test_the_check_tells_of_wrong_values():
    """A model whose image arrives, but whose answer is scored otherwise."""
    kin = kin_of("Llava")

    class Off(TeacherForced):
        def forward(self, input_ids, **kwargs):
            out = super().forward(input_ids, **kwargs)
            out.logits = out.logits * 1.1
            return out

    class Inner(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, model):
            super().__init__()
            self.forward = Off(model).forward
            self.inner = model

    wrong = attribution(Inner(kin.model), kin)
    inp = image_input(kin.picture, None, kin.prompt, kin.processor)
    wrong.model = kin.model
    wrong.attr_method.forward_func = attribution(Inner(kin.model), kin).attr_method.forward_func
    with pytest.warns(UserWarning, match="wrong values: a token's log-probability is off"):
        assert not check_llm_attribution(wrong, inp, kin.answer, forward_in_tokens=False)
    with pytest.raises(TypeError, match="LLMAttribution, got FeatureAblation"):
        check_llm_attribution(FeatureAblation(kin.model), inp, kin.answer)
    with pytest.raises(TypeError, match="target must be ids, got the string 'dog'"):
        check_llm_attribution(attribution(kin.model, kin), inp, "dog")
    with pytest.raises(ValueError, match=r"target must be \(targets,\) ids"):
        check_llm_attribution(attribution(kin.model, kin), inp, kin.answer[None])
    with pytest.raises(TypeError, match="wrapped in TeacherForced already"):
        TeacherForced(TeacherForced(kin.model))


@pytest.mark.parametrize("score", ["log_prob", "prob"])
@pytest.mark.parametrize("method", [FeatureAblation, KernelShap])
def test_the_check_sees_zeros_of_unlikely_answers(score, method):
    """Of many tokens' product of probabilities nothing is left, whatever the model does."""
    kin = kin_of("Llava")
    inp = image_input(kin.picture, None, kin.prompt, kin.processor)
    answer = torch.cat([kin.answer] * 5)
    plain = LLMAttribution(method(kin.model), kin.processor.tokenizer, score)
    before = plain.attr_target, plain.include_per_token_attr
    with pytest.warns(UserWarning, match="would give zeros"):
        assert not check_llm_attribution(plain, inp, answer.tolist())
    assert (plain.attr_target, plain.include_per_token_attr) == before
    right = LLMAttribution(method(TeacherForced(kin.model)), kin.processor.tokenizer, score)
    assert check_llm_attribution(right, inp, answer)


def test_a_wrapped_model_is_not_told_to_be_wrapped():
    kin = kin_of("Llava")
    inp = image_input(kin.picture, None, kin.prompt, kin.processor)
    wrapped = attribution(TeacherForced(kin.model), kin)
    with pytest.warns(UserWarning, match="does the target fit the vocabulary"):
        assert not check_llm_attribution(wrapped, inp, torch.tensor([10**6]))


def test_nothing_to_see_is_not_called_zeros():
    """A white picture, ablated to white, gives zeros rightly."""
    kin = kin_of("Llava")
    white = Image.new("RGB", kin.picture.size, (255, 255, 255))
    inp = image_input(white, None, kin.prompt, kin.processor)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrapped = attribution(TeacherForced(kin.model), kin)
        assert check_llm_attribution(wrapped, inp, kin.answer)


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "InternVL"])
@pytest.mark.parametrize("method", [ShapleyValueSampling, KernelShap])
def test_shapley_values_sum_to_the_whole_picture(name, method):
    kin = kin_of(name)
    picture = kin.wide_picture
    inp = image_input(picture, segments(picture), kin.prompt, kin.processor)
    wrapped = attribution(TeacherForced(kin.model), kin, method)
    options = {"n_samples": 2 if method is ShapleyValueSampling else 60}
    got = wrapped.attribute(inp, kin.answer, forward_in_tokens=False, **options).seq_attr
    white = Image.new("RGB", picture.size, (255, 255, 255))
    with torch.no_grad():
        expected = log_probs_by_hand(kin, kin.encode(picture), kin.answer).sum()
        expected = expected - log_probs_by_hand(kin, kin.encode(white), kin.answer).sum()
    # KernelShap holds the sum by a large weight, and by enough samples.
    tolerance = 1e-4 if method is ShapleyValueSampling else 2e-2
    assert_close(got.sum(), expected, rtol=tolerance, atol=tolerance)


def test_words_of_the_prompt_by_brute_force(kin):
    inputs = kin.encode()
    inp = PromptInput(inputs, kin.model, kin.processor, baseline=50)
    wrapped = attribution(TeacherForced(kin.model), kin)
    got = wrapped.attribute(inp, kin.answer, forward_in_tokens=False)
    with torch.no_grad():
        whole = log_probs_by_hand(kin, inputs, kin.answer)
        columns = []
        for position in inp.positions.tolist():
            ids = inputs["input_ids"].clone()
            ids[0, position] = 50
            columns.append(whole - log_probs_by_hand(kin, {**inputs, "input_ids": ids}, kin.answer))
    expected = torch.stack(columns, 1)
    assert_close(got.token_attr, expected, rtol=1e-5, atol=1e-5)
    assert "".join("".join(got.input_tokens).split()) == "USER:whatishere?ASSISTANT:"
    special = {0, 1, 2, kin.model.config.image_token_id}
    assert not special & set(inputs["input_ids"][0][inp.positions].tolist())


@pytest.mark.parametrize("name", ["Idefics3", "SmolVLM"])
def test_names_of_tiles_are_no_words(name):
    """Without a tokenizer, which knows them as special."""
    kin = kin_of(name)
    inputs = kin.encode()
    inp = PromptInput(inputs, kin.model)
    where = (inputs["input_ids"][0] == kin.model.config.image_token_id).nonzero()[:, 0]
    assert not [p for p in inp.positions.tolist() if int(where[0]) <= p <= int(where[-1])]
    tokens = kin.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][inp.positions])
    assert not [token for token in tokens if token.startswith(("<row", "<global", "<fake"))]


def test_captums_token_attr_denoised(kin):
    """ARC's text side on captum's result: each column times its relevance, by the definition."""
    from tests.oracle import formulas as reference

    if kin.name == "PaliGemma":
        return  # no token of its prompt is predicted; TokenLogProb.rankings says so
    inputs = kin.encode()
    inp = PromptInput(inputs, kin.model, kin.processor)
    result = attribution(TeacherForced(kin.model), kin).attribute(
        inp, kin.answer, forward_in_tokens=False
    )
    f = TokenLogProb(kin.model, inputs, kin.answer)
    rankings = f.rankings(20)
    arc = RankCorrelationDenoiser(None, top_k=20)
    own, targets = rankings[inp.positions], rankings[f.positions]
    got = arc.denoise(result.token_attr, own, target_rankings=targets)
    relevance = reference.rank_biased_overlap(targets, own, 0.9).float()
    assert_close(got, result.token_attr * relevance)
    # Any (targets, tokens) tensor, here Saliency's over all tokens.
    x = f.embeddings.requires_grad_()
    rows = [torch.autograd.grad(f(x)[0, t], x)[0].norm(dim=-1)[0] for t in range(len(kin.answer))]
    scores = torch.stack(rows)
    kept = arc.denoise(scores, rankings)
    overlap = reference.rank_biased_overlap(rankings[f.positions], rankings, 0.9).float()
    earlier = torch.arange(scores.shape[1])[None] < f.positions[:, None]
    assert_close(kept, torch.where(earlier, scores * overlap, 0.0))
    assert float(kept[:, 0].abs().max()) == 0  # the first token was predicted from nothing


# ---- the wrapper -------------------------------------------------------------------------------


def test_it_generates_the_models_own_answer(kin):
    inputs = kin.encode()
    wrapper = TeacherForced(kin.model)
    got = wrapper.generate(**inputs, max_new_tokens=4, do_sample=False)
    barred = [kin.model.config.image_token_id]
    barred += [i for i in [getattr(kin.model.config, "video_token_id", None)] if i is not None]
    plain = kin.model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=barred)
    assert torch.equal(got, plain)
    assert not torch.isin(got[0, inputs["input_ids"].shape[1] :], torch.tensor(barred)).any()


def test_the_model_is_left_as_it_was(kin):
    model = copy.deepcopy(kin.model).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = [
        {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str)}
        for m in model.modules()
    ]
    inp = image_input(kin.picture, segments(kin.picture), kin.prompt, kin.processor)
    attribution(TeacherForced(model), kin).attribute(inp, gen_args={"max_new_tokens": 2})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert [
        {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str)}
        for m in model.modules()
    ] == plain


def test_padding_and_missing_inputs_are_refused():
    kin = kin_of("Qwen2_5_VL")
    inputs = kin.encode()
    wrapper = TeacherForced(kin.model)
    mask = inputs["attention_mask"].clone()
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="attention_mask holds zeros"):
        wrapper(**{**inputs, "attention_mask": mask})
    inputs.pop("mm_token_type_ids")
    with pytest.raises(ValueError, match="inputs lack 'mm_token_type_ids'"):
        wrapper(**inputs)


def test_inputs_of_captums_are_checked():
    kin = kin_of("Llava")
    picture, inputs = kin.picture, kin.encode()
    with pytest.raises(TypeError, match="pictures must be PIL pictures, got str"):
        image_input(["a.png"], None, kin.prompt, kin.processor)
    with pytest.raises(IndexError, match="image 1 is out of range"):
        image_input(picture, None, kin.prompt, kin.processor, image=1)
    with pytest.raises(ValueError, match=r"mask must be \(height, width\) = \(16, 16\)"):
        image_input(picture, torch.zeros(4, 4), kin.prompt, kin.processor)
    for baseline in (-1, 97, 3):
        with pytest.raises(ValueError, match=r"baseline must be a token id in 0\.\.96"):
            PromptInput(inputs, kin.model, baseline=baseline)
    with pytest.raises(ValueError, match="baseline must be a token id"):
        PromptInput(inputs, kin.model, baseline="x")
    with pytest.raises(TypeError, match="processor must be the model's processor, got NoneType"):
        image_input(picture, None, kin.prompt, None)
    segments_of = torch.zeros(16, 16, dtype=torch.long)
    segments_of[8:] = 1
    assert image_input(picture, segments_of.numpy(), kin.prompt, kin.processor).n_itp_features == 2
    assert PromptInput(inputs, kin.model).values[0].startswith("<id")


# ---- labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_labels_of_ids_that_no_text_encodes(kin, seed):
    """Random ids, specials and repeats among them: one label for each, in order."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (6,), generator=g)
    ids = torch.cat(
        [torch.where(ids == kin.model.config.image_token_id, 50, ids), ids.new_tensor([2])]
    )
    inp = image_input(kin.picture, None, kin.prompt, kin.processor)
    method = LLMAttribution(FeatureAblation(TeacherForced(kin.model)), ExactLabels(kin.processor))
    result = method.attribute(inp, ids, forward_in_tokens=False)
    expected = kin.processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert [token.strip() for token in result.output_tokens] == [
        token.replace("\n", "\\n").strip() for token in expected
    ]
    assert result.token_attr.shape == (7, 1)


def test_other_calls_go_to_the_tokenizer():
    kin = kin_of("Llava")
    tokenizer, own = ExactLabels(kin.processor), kin.processor.tokenizer
    assert tokenizer.encode("dog left", add_special_tokens=False) == own.encode(
        "dog left", add_special_tokens=False
    )
    assert tokenizer.decode(20) == own.decode(20)
    assert tokenizer.pad_token == own.pad_token
    assert tokenizer("dog")["input_ids"] == own("dog")["input_ids"]
    with pytest.raises(TypeError, match="processor must be"):
        ExactLabels(None)
    with pytest.raises(TypeError, match="processor must be"):
        ExactLabels(object())
