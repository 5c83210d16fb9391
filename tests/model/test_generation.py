"""Answers: generated ones, given ones, strings."""

import pytest
import torch
from transformers import GenerationConfig

from captum_mllm import LogitLens
from tests.oracle import tiny
from tests.oracle.comparing import same
from tests.oracle.published import ARC, MSEA

END = 2


@pytest.fixture(scope="module")
def speaker():
    """A tiny model that speaks (the default seed ends at once)."""
    return tiny.tiny_llava(seed=1)


def greedy(model, inputs, **options):
    settings = {
        "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 128,
        "bad_words_ids": [[tiny.IMAGE_TOKEN]], **options,
    }  # fmt: skip
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def test_default_is_greedy(speaker, inputs):
    got = LogitLens(speaker).attribute(inputs)
    expected = greedy(speaker, inputs)
    assert len(expected) == 128
    assert got.output_ids.tolist() == expected
    same(got, LogitLens(speaker).attribute(inputs, expected))


def test_default_does_not_follow_the_models_own_settings(inputs):
    """A checkpoint that samples by default is still explained greedily, every time alike."""
    model = tiny.tiny_llava(seed=1)
    expected = greedy(model, inputs)[:12]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.top_k = 90
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.num_beams = 2
    model.generation_config.max_length = 500
    before = model.generation_config.to_dict()
    for _ in range(2):
        got = LogitLens(model).attribute(inputs, gen_args={"max_new_tokens": 12})
        assert got.output_ids.tolist() == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize(
    "own",
    [
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 3.0},
        {"bad_words_ids": [[n] for n in range(5, 60)]},
        {"begin_suppress_tokens": list(range(5, 97))},
        {"sequence_bias": [[[70], 50.0]]},
        {"exponential_decay_length_penalty": (1, 9.0)},
        {"num_return_sequences": 2},
        {"stop_strings": ["dog"]},
    ],
    ids=lambda own: next(iter(own)),
)
def test_default_is_greedy_whatever_the_checkpoint_asks(own, inputs):
    """generate fills unset fields from the model's own settings: none of them may leak."""
    model = tiny.tiny_llava(seed=1)
    expected = greedy(model, inputs)[:8]
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    got = LogitLens(model).attribute(inputs, gen_args={"max_new_tokens": 8})
    assert got.output_ids.tolist() == expected
    assert model.generation_config is kept


@pytest.mark.parametrize(
    ("gen_args", "message"),
    [
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config must be a transformers"),
        ({"input_ids": torch.ones(1, 3)}, "gen_args holds .'input_ids'"),
    ],
)
def test_odd_generation_arguments_are_refused(gen_args, message, model, inputs):
    with pytest.raises((TypeError, ValueError), match=message):
        LogitLens(model).attribute(inputs, gen_args=gen_args)


def test_final_end_of_sequence_is_no_target(speaker, inputs):
    said = greedy(speaker, inputs)
    end = said[5]
    first = said.index(end)
    for ends in (end, [end, 96]):
        got = LogitLens(speaker).attribute(inputs, gen_args={"eos_token_id": ends})
        assert got.output_ids.tolist() == said[:first]


def test_end_of_the_models_own_settings(inputs):
    """Also where a given generation_config names no end of its own."""
    model = tiny.tiny_llava(seed=1)
    said = greedy(model, inputs)
    model.generation_config.eos_token_id = said[5]
    given = GenerationConfig(max_new_tokens=20, do_sample=False)
    for gen_args in (None, {"generation_config": given}):
        got = LogitLens(model).attribute(inputs, gen_args=gen_args)
        assert got.output_ids.tolist() == said[: said.index(said[5])]
    assert given.eos_token_id is None
    assert given.suppress_tokens is None


def test_an_end_inside_a_given_target_stays(model, inputs):
    got = LogitLens(model).attribute(inputs, [20, END, 31])
    assert got.output_ids.tolist() == [20, END, 31]


def test_nothing_but_the_end(inputs):
    model = tiny.tiny_llava()
    model.generation_config.eos_token_id = greedy(model, inputs)[0]
    assert len(greedy(model, inputs)) == 1
    with pytest.raises(ValueError, match=r"target is None and the model generated nothing"):
        LogitLens(model).attribute(inputs)


def test_image_ids_are_barred(inputs):
    """Even where the image token is always the likeliest."""
    model = tiny.tiny_llava(seed=1)
    model.lm_head = with_bias(model, {tiny.IMAGE_TOKEN: 1000.0})
    options = {"gen_args": {"max_new_tokens": 6}}
    got = LogitLens(model).attribute(inputs, **options)
    assert tiny.IMAGE_TOKEN not in got.output_ids.tolist()
    assert got.output_ids.tolist() == greedy(tiny.tiny_llava(seed=1), inputs)[:6]
    # Probabilities are those of the unprocessed logits: the barred token holds all the mass.
    assert float(got.output_probs.max()) < 1e-6


def with_bias(model, values):
    head = torch.nn.Linear(24, tiny.VOCABULARY)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.zero_()
    for index, value in values.items():
        head.bias.data[index] = value
    return head


def test_barred_ids_come_on_top_of_suppressed_ones(speaker, inputs):
    first = greedy(speaker, inputs)[0]
    gen_args = {"suppress_tokens": [first], "max_new_tokens": 4}
    got = LogitLens(speaker).attribute(inputs, gen_args=gen_args)
    assert got.output_ids.tolist() == greedy(speaker, inputs, **gen_args)
    assert first not in got.output_ids.tolist()
    assert gen_args == {"suppress_tokens": [first], "max_new_tokens": 4}


def test_models_own_suppressed_ids_stay_suppressed(inputs):
    model = tiny.tiny_llava(seed=1)
    first = greedy(model, inputs)[0]
    model.generation_config.suppress_tokens = [first]
    got = LogitLens(model).attribute(inputs, gen_args={"max_new_tokens": 4})
    assert first not in got.output_ids.tolist()


@pytest.mark.parametrize(
    "gen_args",
    [
        {"max_new_tokens": 3},
        {"max_length": 30},
        {"num_beams": 3, "max_new_tokens": 5},
        {"repetition_penalty": 2.0, "max_new_tokens": 9},
        {"no_repeat_ngram_size": 1, "max_new_tokens": 9},
        {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3},
    ],
    ids=str,
)
def test_gen_args_are_honoured(speaker, inputs, gen_args):
    plain = {
        k: v for k, v in gen_args.items() if k not in ("return_dict_in_generate", "output_scores")
    }
    if "max_length" in gen_args:
        plain |= {"max_new_tokens": 30 - inputs["input_ids"].shape[1]}
        plain.pop("max_length")
    got = LogitLens(speaker).attribute(inputs, gen_args=gen_args)
    assert got.output_ids.tolist() == greedy(speaker, inputs, **plain)


def test_sampling_follows_the_seed(speaker, inputs):
    gen_args = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 10}

    def sample(seed):
        torch.manual_seed(seed)
        return LogitLens(speaker).attribute(inputs, gen_args=gen_args).output_ids.tolist()

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "gen_args",
    [
        {"num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 2, "num_beams": 2},
        {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)},
    ],
    ids=["greedy", "sampled", "beams", "config"],
)
def test_several_sequences_are_refused(speaker, inputs, gen_args):
    with pytest.raises(ValueError, match=r"gen_args make 2 sequences.*num_return_sequences=1"):
        LogitLens(speaker).attribute(inputs, gen_args={"max_new_tokens": 3, **gen_args})


def test_gen_args_of_another_kind(speaker, inputs):
    with pytest.raises(TypeError, match=r"gen_args must be a mapping"):
        LogitLens(speaker).attribute(inputs, gen_args=[("max_new_tokens", 3)])


# ---- given answers --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC])
def test_kinds_of_target_agree(tiny_subject, method):
    s = tiny_subject
    attr = method(s.model, s.processor)
    text = "a dog on the left"
    ids = s.processor.tokenizer(text)["input_ids"]
    first = attr.attribute(s.inputs, text)
    assert first.output_ids.tolist() == ids == [11, 12, 14, 15, 16]
    for target in (ids, tuple(ids), torch.tensor(ids), torch.tensor(ids, dtype=torch.int32)):
        same(first, attr.attribute(s.inputs, target))


def test_string_target_of_the_shipped_model(subject):
    attr = LogitLens(subject.model, subject.processor)
    tokenizer = subject.processor.tokenizer
    text = tokenizer.decode(subject.answer, skip_special_tokens=True)
    got = attr.attribute(subject.inputs, text)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert got.output_ids.tolist() == expected
    same(got, attr.attribute(subject.inputs, expected))


def test_a_processor_is_not_needed_and_changes_labels_only(subject):
    bare = LogitLens(subject.model).attribute(subject.inputs, subject.answer)
    named = LogitLens(subject.model, subject.processor).attribute(subject.inputs, subject.answer)
    assert torch.equal(bare.grid_attr[0], named.grid_attr[0])
    assert torch.equal(bare.token_attr, named.token_attr)
    assert bare.output_tokens == tuple(f"<id {i}>" for i in subject.answer.tolist())
    assert bare.input_tokens[-len(subject.answer) :] == bare.output_tokens
    assert bare.preprocessing is None
    assert named.preprocessing is not None
    assert not any(label.startswith("<id") for label in named.output_tokens)


def test_a_tokenizer_alone_will_do(tiny_subject):
    s = tiny_subject
    got = LogitLens(s.model, s.processor.tokenizer).attribute(s.inputs, "a dog")
    assert got.output_tokens == (" a", " dog")  # as they stand in the decoded text
    assert got.preprocessing is None


def test_mappings_of_every_kind(tiny_subject):
    s = tiny_subject
    encoded = s.processor(images=s.picture, text=s.prompt, return_tensors="pt")
    assert type(encoded) is not dict
    lens = LogitLens(s.model)
    first = lens.attribute(encoded, s.answer)
    without_mask = {k: v for k, v in encoded.items() if k != "attention_mask"}
    for mapping in (dict(encoded), without_mask, {**encoded, "labels": encoded["input_ids"]}):
        keys = list(mapping)
        same(first, lens.attribute(mapping, s.answer))
        assert list(mapping) == keys
