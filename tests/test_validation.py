"""Checks of arguments and the error that they raise."""

import pickle

import numpy as np
import pytest
import torch

from captum_mllm.validation import ArgumentError, check_alpha_max, check_number, picture_size


def test_an_argument_error_names_its_argument_also_after_pickling():
    error = ArgumentError("scales", "must be distinct, got (1.0, 1.0).")
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(same, ValueError)
        assert same.argument == "scales"
        assert str(same) == "scales must be distinct, got (1.0, 1.0)."


@pytest.mark.parametrize("value", [0, 1.0, -0.5, float("nan")])
def test_numbers_out_of_range_name_their_argument(value):
    with pytest.raises(ArgumentError, match="rbo_p must lie in between, got") as caught:
        check_number("rbo_p", value, "in between", lambda p: 0 < p < 1)
    assert caught.value.argument == "rbo_p"


@pytest.mark.parametrize("value", ["0.5", True, None])
def test_values_that_are_not_numbers(value):
    with pytest.raises(TypeError, match="rbo_p must be a number in between, got"):
        check_number("rbo_p", value, "in between", lambda p: 0 < p < 1)


def test_bounds_of_alpha():
    assert check_alpha_max(None) is None
    assert check_alpha_max(1) == 1.0
    with pytest.raises(ArgumentError, match="alpha_max must lie above 0"):
        check_alpha_max(0)


def test_sizes_of_pictures():
    assert picture_size([3, 4]) == (3, 4)
    from_numpy = picture_size((np.int64(3), np.uint16(4)))
    assert from_numpy == (3, 4)
    assert {type(side) for side in from_numpy} == {int}
    assert picture_size(torch.tensor([3, 4]).tolist()) == picture_size(torch.Size([3, 4]))
    for wrong in ((3.0, 4), (np.float64(3), 4), (True, 4), ("3", 4)):
        with pytest.raises(ArgumentError, match="size must be"):
            picture_size(wrong)
    with pytest.raises(ArgumentError, match="size must be") as caught:
        picture_size((0, 4))
    assert caught.value.argument == "size"
