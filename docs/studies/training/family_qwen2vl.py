"""The reference Qwen2-VL: pictures of any shape, 2 x 2 patches merged, positions in 3 axes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from captum_mllm.adapters.image_only import image_only_processor, load_image_only
from studies.training.data import prefix_ids
from studies.training.families import SIDES, Family, Way, square
from studies.training.layouts import NATIVE, Layout
from studies.training.tokenizer import build_tokenizer, chat_template

PATCH, MERGE = 4, 2
FEWEST, MOST = 32 * 32, 256 * 256  # pixels; between them a picture keeps its size
STEP_CELLS = 256  # a full training batch has up to as many cells per scene
SHAPES = (
    *((side, side) for side in SIDES),
    *((112, 168), (168, 112), (88, 136), (136, 88), (112, 144), (144, 112), (96, 128), (128, 96)),
    *((80, 160), (160, 80), (112, 224), (224, 112)),
)
ROPE_THETA = 30.0  # positions stay below 150, and a head has 16 angles for 3 axes


def _layout(height: int, width: int) -> Layout:
    cells = Layout(height, width).cells(PATCH * MERGE)
    return Layout(height, width, share=min(1.0, STEP_CELLS / cells))


class Qwen2VL(Family):
    """One picture of any shape."""

    name = "qwen2vl"
    kind = "Qwen2VL"
    tokens = {  # noqa: RUF012
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    around = (("<|vision_start|>",), ("<|vision_end|>",))
    video = {  # noqa: RUF012
        "video_processor_type": "Qwen2VLVideoProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    sizes = {  # noqa: RUF012
        "small": {"vision": (160, 4, 5, 640), "text": (192, 5, 6, 440)},
        "tiny": {"vision": (32, 1, 2, 64), "text": (32, 1, 2, 64)},
    }
    cell = PATCH * MERGE
    layouts = tuple(_layout(*shape) for shape in SHAPES)
    tiny_layouts = (square(64), Layout(56, 80))
    ways = {  # noqa: RUF012
        "native": Way(square(NATIVE)),
        "from_448": Way(square(NATIVE), (448, 448)),
        "wide_112x168": Way(Layout(112, 168)),
        "tall_168x112": Way(Layout(168, 112)),
        "side_144": Way(square(144)),
        "side_168": Way(square(168)),
        "side_224": Way(square(224)),
    }
    steps = (3021, 7178)
    card = {  # noqa: RUF012
        "title": "Qwen2-VL",
        "parts": "vision transformer with 2-D rotary positions, patches of 4 px of which 2 x 2 "
        "are\nmerged, Qwen2 with multimodal rotary positions and tied embeddings; a picture keeps "
        "its shape,\n112 x 112 px are 14 x 14 image tokens",
        "layouts": "The scenes are square; for pictures of other shapes they are stretched.\n",
        "ways": "`native`: drawn at 112 px; `from_448`: drawn at 448 px and shrunk by the "
        "processor; `side_N`: drawn\nand read at N px; `wide`, `tall`: drawn and read at that "
        "height and width.",
    }

    def __init__(self) -> None:
        self._block = _block

    def build_model(self, size: str) -> Any:
        """Build an untrained model, float32, from torch's global random generator."""
        (width, layers, heads, mlp), text = self.widths(size)
        angles = text[0] // text[2] // 2  # per head
        time = angles // 4
        config = Qwen2VLConfig(
            vision_config={
                "depth": layers,
                "embed_dim": width,
                "hidden_size": text[0],
                "num_heads": heads,
                "mlp_ratio": mlp // width,
                "patch_size": PATCH,
                "spatial_merge_size": MERGE,
                "temporal_patch_size": 2,
            },
            text_config={
                **self.text_settings(text),
                "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": ROPE_THETA,
                    "mrope_section": [time, (angles - time) // 2, (angles - time + 1) // 2],
                },
            },
            image_token_id=self.token_id("<|image_pad|>"),
            video_token_id=self.token_id("<|video_pad|>"),
            vision_start_token_id=self.token_id("<|vision_start|>"),
            vision_end_token_id=self.token_id("<|vision_end|>"),
            tie_word_embeddings=True,
        )
        return self.finish(Qwen2VLForConditionalGeneration(config))

    def build_processor(self) -> Any:
        """Build the processor, with its tokenizer."""
        images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": FEWEST, "longest_edge": MOST},
            patch_size=PATCH,
            merge_size=MERGE,
            temporal_patch_size=2,
        )
        template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
        return image_only_processor(
            "Qwen2VL", images, build_tokenizer(self.tokens), chat_template=template
        )

    def load_processor(self, path: Any) -> Any:
        """Load the processor from a model's folder."""
        return load_image_only(path)

    def features(self, model: Any, pictures: Tensor) -> Tensor:
        """The merger's output, as `model.model.visual` gives it for one picture after the other.

        All pictures have the same shape, so the tower's attention can take them at once; its own
        loop over pictures would be several times slower.
        """
        tower = model.model.visual
        patches = rearrange(
            pictures[:, 0],
            "b c (r i h) (k j w) -> b (r k i j) (c h w)",
            **{"i": MERGE, "j": MERGE, "h": PATCH, "w": PATCH},
        )
        # the processor repeats a picture, as if it were two frames
        weight = tower.patch_embed.proj.weight.sum(2).flatten(1)
        states = F.linear(patches, weight)
        height, width = pictures.shape[-2:]
        angles = _angles(height // PATCH, width // PATCH, tower.blocks[0].attn.head_dim)
        cos, sin = (f(angles.to(pictures.device)) for f in (torch.cos, torch.sin))
        for block in tower.blocks:
            states = self._block(block, states, cos, sin)
        return tower.merger(states.flatten(0, 1)).unflatten(0, (len(pictures), -1))

    def positions(self, model: Any, layout: Layout, text: int) -> Tensor:
        """Position ids (3, 1, tokens) of a training sequence, as the model itself finds them."""
        before, after = self.around_ids()
        image = [self.token_id("<|image_pad|>")] * layout.cells(self.cell)
        ids = [*prefix_ids(), *before, *image, *after, *[0] * text]
        row = torch.tensor([ids])
        grid = torch.tensor([[1, layout.height // PATCH, layout.width // PATCH]])
        kinds = (row == image[0]).int()
        found, _ = model.model.get_rope_index(row, mm_token_type_ids=kinds, image_grid_thw=grid)
        return found

    def compile(self, model: Any) -> None:
        """Compile a model's layers, one graph for every size, to train faster."""
        super().compile(model)
        self._block = torch.compile(_block, dynamic=True)

    def call_settings(self, way: Way) -> dict[str, Any]:
        """A number of pixels that larger pictures are shrunk to."""
        if way.drawn is None:
            return {}
        most = way.layout.height * way.layout.width
        return {"size": {"shortest_edge": min(FEWEST, most), "longest_edge": most}}


def _angles(rows: int, columns: int, head: int) -> Tensor:
    """Rotary angles (patches, width of a head) of the tower, its patches in blocks of 2 x 2."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = rearrange(
        torch.stack([row, column], -1), "(r i) (k j) a -> (r k i j) a", i=MERGE, j=MERGE
    )
    steps = 10000.0 ** -(torch.arange(0, head // 2, 2) / (head // 2))
    angles = (places[..., None] * steps).flatten(1)
    return torch.cat([angles, angles], -1)


def _block(block: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A layer of the tower on a batch (batch, patches, width)."""
    states = states + _attend(block.attn, block.norm1(states), cos, sin)
    return states + block.mlp(block.norm2(states))


def _attend(attention: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The tower's attention, within each picture of a batch (batch, patches, width)."""
    joint = attention.qkv(states)
    joint = joint.unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = joint.permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = cos.to(joint.dtype), sin.to(joint.dtype)

    def turn(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin

    mixed = F.scaled_dot_product_attention(turn(query), turn(key), value)
    return attention.proj(mixed.transpose(1, 2).flatten(2))
