"""What single classes need, and why a few can't be built."""

from studies.zoo.kinds_native import NATIVE_SIZE
from studies.zoo.kinds_one_size import ONE_SIZE
from studies.zoo.kinds_other import OTHER
from studies.zoo.kinds_tiles import TILES_AND_WHOLE
from studies.zoo.settings import Settings

UNAVAILABLE = {
    "evolla": "it takes proteins, no pictures.",
    "instructblipvideo": "it takes videos, no pictures.",
    "mistral4": "it is the text model of another kind and takes no pictures.",
    "pi0": "its answer is the motion of a robot, no tokens.",
    "vision-encoder-decoder": "it joins two other models and has no configuration of its own.",
}
SETTINGS: dict[str, Settings] = {**ONE_SIZE, **TILES_AND_WHOLE, **NATIVE_SIZE, **OTHER}
