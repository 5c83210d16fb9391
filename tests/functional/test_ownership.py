"""Owners of pixels, read from signs, against the table that says who hears what."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm.functional import NOBODY, SEVERAL, owners, sign_codes


def slow_owner(hears: torch.Tensor) -> torch.Tensor:
    """Who hears each pixel, by looking."""
    found = []
    for column in hears.T:
        who = column.nonzero()[:, 0].tolist()
        found.append(NOBODY if not who else who[0] if len(who) == 1 else SEVERAL)
    return torch.tensor(found)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 3, 64, 100])
def test_owners_are_those_who_hear(n, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = 60
    hears = torch.zeros(n, pixels)
    who = torch.randint(-1, n, (pixels,), generator=generator)
    for pixel, token in enumerate(who.tolist()):
        if token >= 0:
            hears[token, pixel] = 0.1 + torch.rand(1, generator=generator).item()
    for pixel in range(0, pixels, 7):  # some are heard twice
        hears[torch.randint(n, (1,), generator=generator), pixel] += 0.5
    hears *= torch.randn(1, pixels, generator=generator).sign()
    found = owners(hears.sum(0), sign_codes(n) @ hears, n)
    assert_close(found, slow_owner(hears))


def test_codes_differ_and_spell_the_number():
    codes = sign_codes(11)
    assert codes.shape == (4, 11)
    assert len({tuple(column) for column in codes.T.tolist()}) == 11
    assert ((codes[:, 5] > 0).int() * 2 ** torch.arange(4)).sum() == 5


def test_rounding_is_no_owner():
    plain = torch.tensor([1.0, 1e-8])
    coded = torch.tensor([[1.0, -1e-8]])
    assert owners(plain, coded, 2).tolist() == [1, NOBODY]
    assert owners(plain, coded, 2, largest=1e-8).tolist() == [1, 0]


def test_shapes_are_kept():
    plain = torch.ones(2, 3, 4)
    assert owners(plain, torch.stack([plain, -plain]), 4).shape == (2, 3, 4)
