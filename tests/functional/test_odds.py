"""Log-odds against decimals, where p is anything from almost 0 to almost 1."""

import pytest
import torch

from captum_mllm.functional import log_odds
from tests.functional.cases import over_seeds, randn
from tests.oracle import formulas


@over_seeds
@pytest.mark.parametrize("size", [0.1, 3.0, 80.0])
def test_log_odds_are_those_of_decimals(seed, size):
    logits = size * randn(6, 9, seed=seed)
    ids = torch.randint(9, (6,), generator=torch.Generator().manual_seed(seed))
    expected = [
        formulas.log_odds(*pair) for pair in zip(logits.tolist(), ids.tolist(), strict=True)
    ]
    torch.testing.assert_close(log_odds(logits, ids).tolist(), expected, rtol=1e-10, atol=1e-10)
    probs = logits.softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(log_odds(logits, ids).sigmoid(), probs)
    single = log_odds(logits.float(), ids)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.tolist(), expected, rtol=1e-5, atol=1e-4)


def test_certain_and_impossible_tokens_stay_finite():
    logits = torch.tensor([[300.0, 0.0, -300.0]] * 3)
    assert log_odds(logits, torch.arange(3)).tolist() == [300.0, -300.0, -600.0]
    assert log_odds(logits.bfloat16()[:1], torch.tensor([0])).dtype == torch.float32
    with pytest.raises(ValueError, match="at least two tokens"):
        log_odds(torch.zeros(1, 1), torch.tensor([0]))
