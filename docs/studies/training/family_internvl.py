"""The reference InternVL: square tiles and a thumbnail, 2 x 2 patches shuffled into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from captum_mllm.adapters.image_only import image_only_processor, load_image_only
from studies.training.families import SIDES, Family, Way, square
from studies.training.layouts import NATIVE, Layout
from studies.training.tokenizer import build_tokenizer, chat_template

PATCH, SHUFFLE = 4, 2
MOST_TILES = 4  # without the thumbnail
STEP_CELLS = 256  # a full training batch has up to as many cells per scene
FAINT = 14  # side in pixels of a thumbnail that tells little
# rows, columns, side of a tile: often as the processor cuts by itself, now and then otherwise
TILINGS = (
    *((2, 2, NATIVE),) * 5,
    *((1, 2, NATIVE), (2, 1, NATIVE)) * 2,
    *((1, 3, NATIVE), (3, 1, NATIVE), (1, 4, NATIVE), (4, 1, NATIVE)),
    *((2, 2, side) for side in (80, 96, 128, 144)),
    *((1, 2, 96), (2, 1, 96), (1, 2, 144), (2, 1, 144)),
)


def _tiled(rows: int, columns: int, side: int, **settings: Any) -> Layout:
    return Layout(rows * side, columns * side, (rows, columns), **settings)


def _shared(rows: int, columns: int, side: int, **settings: Any) -> Layout:
    cells = _tiled(rows, columns, side).cells(PATCH * SHUFFLE)
    return _tiled(rows, columns, side, share=min(1.0, STEP_CELLS / cells), **settings)


class InternVL(Family):
    """One tile, or several and a thumbnail."""

    name = "internvl"
    kind = "InternVL"
    tokens = {  # noqa: RUF012
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    around = (("<img>",), ("</img>",))
    video = {  # noqa: RUF012
        "video_processor_type": "InternVLVideoProcessor",
        "size": {"height": NATIVE, "width": NATIVE},
    }
    sizes = {  # noqa: RUF012
        "small": {"vision": (160, 4, 5, 640), "text": (192, 5, 6, 440)},
        "tiny": {"vision": (32, 1, 2, 64), "text": (32, 1, 2, 64)},
    }
    cell = PATCH * SHUFFLE
    layouts = (
        *(_shared(1, 1, side) for side in SIDES),
        *(_shared(*tiling) for tiling in TILINGS),
        *(_shared(2, 2, NATIVE, thumbnail=FAINT),) * 3,
        *(_shared(1, 2, NATIVE, thumbnail=FAINT), _shared(2, 1, NATIVE, thumbnail=FAINT)),
    )
    tiny_layouts = (square(64), _tiled(2, 2, 48), _tiled(1, 2, 48, thumbnail=8))
    ways = {  # noqa: RUF012
        "native": Way(square(NATIVE)),
        "from_448": Way(square(NATIVE), (448, 448)),
        "tiles_2x2": Way(_tiled(2, 2, NATIVE)),
        "tiles_2x2_from_448": Way(_tiled(2, 2, NATIVE), (448, 448)),
        "tiles_1x2": Way(_tiled(1, 2, NATIVE)),
        "tiles_2x1": Way(_tiled(2, 1, NATIVE)),
        "tiles_2x2_faint": Way(_tiled(2, 2, NATIVE, thumbnail=FAINT)),
        "side_144": Way(square(144)),
        "side_168": Way(square(168)),
    }
    steps = (2698, 6786)
    card = {  # noqa: RUF012
        "title": "InternVL",
        "parts": "vision transformer with learned positions, patches of 4 px of which 2 x 2 are\n"
        "shuffled into one image token, two-layer projector, Qwen2 with tied embeddings; a tile "
        "has\n112 x 112 px, 14 x 14 image tokens; pictures of more pixels or another shape are "
        "cut into up to\n4 tiles, which a thumbnail follows",
        "layouts": "The scenes are square; a canvas of tiles that is not is drawn stretched. In "
        "some steps of the second\nstage the thumbnail was blurred to 14 x 14 px, so that the "
        "tiles must be read.\n",
        "ways": "`native`: one tile, drawn at 112 px; `side_N`: one tile of N px; `tiles_RxC`: R "
        "rows and C columns of\ntiles of 112 px and a thumbnail, the lens's AUC over the tiles' "
        "cells alone; `from_448`: drawn at 448 px and\nshrunk by the processor; `faint`: the "
        "thumbnail blurred to 14 x 14 px, which leaves the tiles to be read.",
    }

    def build_model(self, size: str) -> Any:
        """Build an untrained model, float32, from torch's global random generator."""
        (width, layers, heads, mlp), text = self.widths(size)
        vision = InternVLVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
            attention_bias=True,
            image_size=NATIVE,
            patch_size=PATCH,
            layer_scale_init_value=1.0,
        )
        settings = {**self.text_settings(text), "rope_parameters": {"rope_theta": 10000.0}}
        settings["rope_parameters"]["rope_type"] = "default"
        config = InternVLConfig(
            vision_config=vision,
            text_config=Qwen2Config(**settings),
            image_token_id=self.token_id("<IMG_CONTEXT>"),
            image_seq_length=(NATIVE // self.cell) ** 2,
            downsample_ratio=1 / SHUFFLE,
            tie_word_embeddings=True,
        )
        return self.finish(InternVLForConditionalGeneration(config))

    def build_processor(self) -> Any:
        """Build the processor, with its tokenizer."""
        images = GotOcr2ImageProcessorPil(
            size={"height": NATIVE, "width": NATIVE},
            crop_to_patches=True,
            min_patches=1,
            max_patches=MOST_TILES,
        )
        return image_only_processor(
            "InternVL",
            images,
            build_tokenizer(self.tokens),
            chat_template=chat_template("<IMG_CONTEXT>\n"),
            image_seq_length=(NATIVE // self.cell) ** 2,
        )

    def load_processor(self, path: Any) -> Any:
        """Load the processor from a model's folder."""
        return load_image_only(path)

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        """Projected features (batch, cells, width), tile after tile."""
        tiles = pictures.flatten(0, 1)
        found = model.model.get_image_features(pixel_values=tiles).pooler_output
        return found.reshape(len(pictures), -1, found.shape[-1])

    def tower_layers(self, model: Any) -> list[Any]:
        """Modules of the tower that `compile` compiles."""
        return list(model.model.vision_tower.encoder.layer)

    def call_settings(self, way: Way) -> dict[str, Any]:
        """Side of a tile, and the number of tiles."""
        side, count = way.layout.tile[0], way.layout.grid[0] * way.layout.grid[1]
        size = {"size": {"height": side, "width": side}}
        if count == 1:
            return {"crop_to_patches": False, **size}
        return {"crop_to_patches": True, "min_patches": count, "max_patches": count, **size}

    @contextlib.contextmanager
    def reading(self, _model: Any, processor: Any, layout: Layout) -> Iterator[None]:
        """Within it the processor counts the image tokens of a layout's tiles."""
        native = processor.image_seq_length
        processor.image_seq_length = (layout.tile[0] // self.cell) ** 2
        try:
            yield
        finally:
            processor.image_seq_length = native
