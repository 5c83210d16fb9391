"""RankCorrelationDenoiser.denoise on attributions computed elsewhere."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm import LogitLens
from tests.oracle import formulas as reference
from tests.oracle.published import ARC, RankCorrelationDenoiser


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    rankings = torch.stack([torch.randperm(12, generator=g)[:8] for _ in range(6)])
    scores = torch.rand(3, 6, generator=g, dtype=torch.float64)
    maps = torch.rand(3, 4, 5, generator=g, dtype=torch.float64)
    contexts = torch.rand(6, 4, 5, generator=g, dtype=torch.float64)
    return rankings, scores, maps, contexts


def earlier(n_targets, n_tokens):
    """The targets are the last of the tokens; context is what lies before each."""
    first = n_tokens - n_targets
    return torch.tensor([[j < first + t for j in range(n_tokens)] for t in range(n_targets)])


@pytest.mark.parametrize("strength", [1.0, 0.4, 3.0])
@pytest.mark.parametrize("k", [8, 5])
def test_text_side(case, strength, k):
    rankings, scores, _, _ = case
    arc = RankCorrelationDenoiser(None, top_k=k, rbo_p=0.7, strength=strength)
    overlap = reference.rank_biased_overlap(rankings[-3:, :k], rankings[:, :k], 0.7)
    kept = (1 - strength * (1 - overlap)).clamp(min=0)
    assert_close(arc.denoise(scores, rankings), scores * kept * earlier(3, 6))
    # Targets of their own: every token is context.
    targets = rankings[[5, 0, 2]]
    overlap = reference.rank_biased_overlap(targets[:, :k], rankings[:, :k], 0.7)
    kept = (1 - strength * (1 - overlap)).clamp(min=0)
    assert_close(arc.denoise(scores, rankings, target_rankings=targets), scores * kept)


@pytest.mark.parametrize("own_targets", [False, True])
def test_image_side(case, own_targets):
    rankings, scores, maps, contexts = case
    arc = RankCorrelationDenoiser(None, top_k=8, rbo_p=0.9, strength=0.8, alpha_max=0.9)
    targets = rankings[[5, 0, 2]] if own_targets else rankings[-3:]
    is_context = torch.ones(3, 6).bool() if own_targets else earlier(3, 6)
    expected = reference.arc_subtract(
        maps.flatten(1), contexts.flatten(1), reference.context_weights(scores, is_context),
        reference.rank_biased_overlap(targets, rankings, 0.9), 0.8, 0.9,
    )  # fmt: skip
    got = arc.denoise(
        maps, rankings, context_maps=contexts, context_scores=scores,
        target_rankings=targets if own_targets else None,
    )  # fmt: skip
    assert_close(got.flatten(1), expected, rtol=1e-10, atol=1e-12)


def test_denoising_a_lens_result_gives_what_arc_subtracts(tiny_subject):
    """The lens' own maps, denoised, are ARC's before normalisation."""
    s = tiny_subject
    trace = LogitLens(s.model).trace(s.inputs, s.answer, explain="all", top_k=20)
    arc = ARC(s.model, top_k=20)
    maps = trace.maps[0][trace.map_rows]
    scores = torch.where(trace.is_context, trace.text_scores, 0.0)
    cleaned = arc.denoise(maps, trace.rankings, context_maps=maps, context_scores=scores)
    result = arc.attribute_trace(trace)
    for t in range(1, len(maps)):
        values = torch.cat([cleaned[t].flatten(), trace.text_scores[t, :t]])
        unit = (cleaned[t] - values.min()) / (values.max() - values.min()).clamp(min=1e-30)
        assert_close(result.grid_attr[0][t], unit, rtol=0, atol=1e-5)


def test_integer_scores_are_refused():
    """Relevance in [0, 1] would be cut to 0 in an integer tensor."""
    rankings = torch.tensor([[1, 2], [2, 1]])
    with pytest.raises(ValueError, match="maps_or_scores must be a floating point"):
        RankCorrelationDenoiser(None, top_k=2).denoise(torch.tensor([[1, 2]]), rankings)


def test_kinds_and_numbers_of_rankings_are_checked():
    rankings = torch.tensor([[1, 2], [2, 1]])
    arc = RankCorrelationDenoiser(None, top_k=2)
    with pytest.raises(ValueError, match="maps_or_scores must be a floating point tensor"):
        arc.denoise(torch.ones(2, 2).numpy(), rankings)
    with pytest.raises(ValueError, match="rankings must be a tensor"):
        arc.denoise(torch.ones(2, 2), rankings.tolist())
    with pytest.raises(ValueError, match="rankings hold 2 rows, but maps_or_scores 3 targets"):
        arc.denoise(torch.ones(3, 2), rankings)
