"""What several tests need of a subject: its special ids, its answer's positions, equal results."""

import torch
from torch.testing import assert_close


def close(actual, expected, share=1e-5):
    """Equal within 1e-5 of the map's maximum."""
    expected = torch.as_tensor(expected).float()
    assert float(expected.abs().max()) > 0
    assert_close(actual.float(), expected, rtol=0, atol=share * float(expected.abs().max()))


def answer_positions(run):
    return list(range(run.n_prompt, len(run.ids)))


def with_two_images(subject):
    prompt = subject.prompt.replace("<image>", "<image> and <image>")
    one, other = subject.picture, subject.other_picture
    return subject.encode(one, other, prompt=prompt), subject.encode(other, one, prompt=prompt)


def special_ids(subject):
    return subject.processor.tokenizer.all_special_ids


def same(one, two):
    """Every tensor of two results is the same, bit for bit."""
    for name in ("token_attr", "output_ids", "output_probs", "seq_attr"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    for a, b in zip(one.grid_attr, two.grid_attr, strict=True):
        assert torch.equal(a, b)
    assert (one.relevance is None) == (two.relevance is None)
    if one.relevance is not None:
        assert torch.equal(one.relevance, two.relevance)
    assert (one.input_tokens, one.output_tokens) == (two.input_tokens, two.output_tokens)
    assert (one.units, one.grids, one.scales) == (two.units, two.grids, two.scales)
