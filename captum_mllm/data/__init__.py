"""Annotated pictures: COCO's format, label images, and the categories that words name."""

from captum_mllm.data.categories import (
    COCO_NAMES,
    COCO_SYNONYMS,
    CategoryTable,
    match_categories,
    plural,
)
from captum_mllm.data.coco import CocoDataset, CocoObject, CocoSample
from captum_mllm.data.label_maps import LabelMapDataset, write_label_maps

__all__ = [
    "COCO_NAMES",
    "COCO_SYNONYMS",
    "CategoryTable",
    "CocoDataset",
    "CocoObject",
    "CocoSample",
    "LabelMapDataset",
    "match_categories",
    "plural",
    "write_label_maps",
]
