"""Tiny random models of every image-text-to-text class that transformers knows.

``KINDS`` are the model types of the installed version, ``subject(kind)`` builds one: the real
class from its own default configuration made small, random weights, its real image processor
with small sizes, and no tokenizer: a prompt is a list of ids. Some classes need torchvision
(their image processor has no other) or timm (their tower); without them they are
:class:`Unavailable`, as are the few that can't be built at all.

    >>> from studies.zoo import KINDS, subject
    >>> subject("qwen2_vl").model.config.model_type
    'qwen2_vl'
"""

from studies.zoo.packages import torchvision_ready

torchvision_ready()  # before anything of transformers looks for it

from studies.zoo.subjects import (  # noqa: E402
    KINDS,
    ImagesOnly,
    Subject,
    Unavailable,
    has_package,
    subject,
)

__all__ = ["KINDS", "ImagesOnly", "Subject", "Unavailable", "has_package", "subject"]
