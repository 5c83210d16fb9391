"""``captum-mllm explain``: one answer about a picture, explained word by word in a folder."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


METHODS = ("lens", "tam", "msea", "arc", "msea+arc")


PRESET_NAMES = ("measured", "paper")


DEMO_SCENE = 23  # three objects, among them a noun of two words; fixed before training
