"""Lattices fitted to the places of tokens, against lattices that were drawn."""

import numpy as np
import pytest
import torch

from captum_mllm.model.lattice import fit_lattices, token_places


class Drawing:
    """Numbers of pixel inputs of which it is known who owns them and what they show."""

    def __init__(self) -> None:
        self.parts: list[tuple[list[int], list[float], list[float], list[int]]] = []

    def grid(self, tokens, box, side, tile=0, jitter=0.0, seed=0):
        """Add a view: every token hears side x side pixels in three channels."""
        rng = np.random.default_rng(seed)
        tokens = np.asarray(tokens)
        (rows, cols), (left, upper, right, lower) = tokens.shape, box
        dx, dy = (right - left) / (cols * side), (lower - upper) / (rows * side)
        for row in range(rows * side):
            for col in range(cols * side):
                token = int(tokens[row // side, col // side])
                x = left + (col + 0.5) * dx + jitter * rng.standard_normal()
                y = upper + (row + 0.5) * dy + jitter * rng.standard_normal()
                self.parts.append(([token] * 3, [x] * 3, [y] * 3, [tile] * 3))
        return self

    def fit(self):
        owner, x, y, tile = ([v for part in self.parts for v in part[k]] for k in range(4))
        double = torch.float64
        return fit_lattices(
            token_places(
                torch.tensor(owner),
                torch.tensor(x, dtype=double),
                torch.tensor(y, dtype=double),
                torch.tensor(tile),
            )
        )


def numbered(rows, cols, first=0):
    return first + np.arange(rows * cols).reshape(rows, cols)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 4), (3, 7), (9, 2)])
def test_one_view(shape, seed):
    box = (-3.0, 5.0, 87.0, 42.0)
    (view,), notes = Drawing().grid(numbered(*shape), box, 4, jitter=0.05, seed=seed).fit()
    assert not notes
    assert view.tokens.tolist() == numbered(*shape).tolist()
    cell = min((box[2] - box[0]) / shape[1], (box[3] - box[1]) / shape[0])
    assert np.abs(np.array(view.box) - box).max() < 0.05 * cell
    assert view.side == 4


def test_tiles_are_joined_and_the_overview_is_a_view_of_its_own():
    drawing = Drawing()
    for k, (x, y) in enumerate([(0, 0), (40, 0), (0, 30), (40, 30)]):
        drawing.grid(numbered(2, 2, 4 * k), (x, y, x + 40, y + 30), 4, tile=k)
    drawing.grid(numbered(2, 2, 16), (0, 0, 80, 60), 4, tile=4)
    (tiles, overview), notes = drawing.fit()
    assert not notes
    assert tiles.tokens.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert overview.tokens.tolist() == [[16, 17], [18, 19]]
    assert np.allclose(overview.box, (0, 0, 80, 60), atol=1e-6)


def test_tiles_that_show_the_same_place_are_two_views():
    drawing = Drawing().grid(numbered(3, 3), (0, 0, 60, 60), 4, tile=0)
    (one, other), notes = drawing.grid(numbered(3, 3, 9), (0, 0, 60, 60), 4, tile=1).fit()
    assert not notes
    assert {one.tokens[0, 0], other.tokens[0, 0]} == {0, 9}


def test_a_scrambled_order_is_noted():
    tokens = np.random.default_rng(0).permutation(16).reshape(4, 4)
    (view,), notes = Drawing().grid(tokens, (0, 0, 40, 40), 4).fit()
    assert view.tokens.tolist() == tokens.tolist()  # the places are right all the same
    assert notes == ("tokens do not follow one another row by row",)


def test_a_missing_token_is_noted():
    drawing = Drawing().grid(numbered(4, 4), (0, 0, 40, 40), 4)
    drawing.parts = [part for part in drawing.parts if part[0][0] != 9]
    assert any("1 of 16 cells" in note for note in drawing.fit()[1])


def test_tokens_that_share_a_cell_are_noted():
    drawing = Drawing().grid(numbered(3, 3), (0, 0, 30, 30), 4)
    views, notes = drawing.grid(numbered(3, 3, 9), (0, 0, 30, 30), 4).fit()
    assert len(views) == 2
    assert any("2 tokens share a cell" in note for note in notes)


def test_uneven_columns_are_noted():
    drawing = Drawing().grid([[0], [3]], (0, 0, 10, 20), 4).grid([[1], [4]], (10, 0, 20, 20), 4)
    drawing.grid([[2], [5]], (30, 0, 40, 20), 4)
    _, notes = drawing.fit()
    assert any("uneven" in note for note in notes)


def test_padding_counts_for_what_is_heard_only():
    """A cell half of padding keeps its place in the lattice."""
    drawing = Drawing().grid(numbered(2, 4), (0, 0, 40, 20), 4)
    drawing.parts = [
        (owner, [np.nan] * 3 if x[0] > 36 else x, y, tile) for owner, x, y, tile in drawing.parts
    ]
    (view,), notes = drawing.fit()
    assert not notes
    assert np.allclose(view.box, (0, 0, 40, 20), atol=0.2)
