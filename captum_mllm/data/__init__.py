"""Annotated pictures: COCO's format, label images, categories and the words that name them."""
