"""Train a reference LLaVA: `python -m captum_mllm.reference.train --out DIR`.

Stage 1 (vision): tower, projector and word embedding learn to tell, for every patch that an
object covers by more than 30 %, the first piece of the object's noun. Stage 2: everything learns
to answer questions; the loss is on answers alone, never on image positions. Nothing here computes
an attribution map, and the last step's weights are what is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_mllm.reference.card import write_card
from captum_mllm.reference.data import (
    IGNORE,
    Batch,
    batches,
    draw_pixels,
    first_piece_ids,
    patch_coverage,
    piece_ids,
    prefix_ids,
)
from captum_mllm.reference.evaluate_model import evaluate
from captum_mllm.reference.models import PATCH_SIZE, SIZES, build_model, sha256
from captum_mllm.reference.render import draw_masks
from captum_mllm.reference.tokenizer import build_processor

IMAGE_SIZES = (*range(80, 169, 8), 112, 112, 112, 192, 224)
SLOW = 0.3  # stage 2: rate of tower, projector and word embedding, against the rest
COVERED = 0.3


class Schedule:
    """Learning rate over one stage: linear warm-up, cosine to zero; ends by steps or by time."""

    def __init__(self, rate: float, steps: int, seconds: float | None, warmup: int = 150) -> None:
        self.rate, self.steps, self.seconds, self.warmup = rate, steps, seconds, warmup
        self.start, self.step = time.monotonic(), 0

    def advance(self, optimizer: torch.optim.Optimizer) -> bool:
        """Set the next step's learning rate; False when the stage is over."""
        progress = self.step / self.steps
        if self.seconds:
            progress = max(progress, (time.monotonic() - self.start) / self.seconds)
        if progress >= 1:
            return False
        self.step += 1
        rate = self.rate * min(1, self.step / self.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate * (0.5 + 0.5 * math.cos(math.pi * progress))
        return True

    def report(self, label: str, loss: Tensor) -> None:
        """Print the loss and the speed now and then."""
        if self.step in (20, 100) or self.step % 500 == 0:
            value = loss.item()
            speed = self.step / (time.monotonic() - self.start)
            print(f"{label} step {self.step} loss {value:.4f} {speed:.1f} steps/s", flush=True)


def image_features(model, pixels: Tensor) -> Tensor:
    """Projected patch features (batch, patches, width), at any size that patches divide."""
    tower = model.model.vision_tower
    states = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
    return model.model.multi_modal_projector(states[:, 1:])


def vision_loss(model, batch: Batch, size: int, pick: random.Random, background: float) -> Tensor:
    """Stage 1: classify covered patches into the first piece of their object's noun.

    Args:
        model: The model.
        batch: Scenes on the model's device.
        size: Side of the pictures.
        pick: Chooses how they are drawn.
        background: Weight of uncovered patches, whose class is the word "background"; 0: none.
    """
    pixels = draw_pixels(batch.scenes, size, pick)
    coverage, place = patch_coverage(draw_masks(batch.scenes, size), PATCH_SIZE).max(1)
    nouns = first_piece_ids().to(pixels.device)[batch.scenes.category]
    labels = torch.where(coverage > COVERED, nouns.gather(1, place), IGNORE)
    hidden = model.model.language_model.norm(image_features(model, pixels))
    logits = model.lm_head(hidden).float().flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)
    if background:
        word = piece_ids("background")[0]
        empty = torch.where(coverage == 0, word, IGNORE).flatten()
        loss = loss + background * F.cross_entropy(logits, empty, ignore_index=IGNORE)
    return loss


def answer_loss(model, batch: Batch, features: Tensor | None) -> Tensor:
    """Stage 2: next-token loss on answers.

    Args:
        model: The model.
        batch: Ids and labels on the model's device.
        features: Projected patch features, or None for text alone.
    """
    embed = model.get_input_embeddings()
    prefix = torch.tensor(prefix_ids(), device=batch.ids.device).expand(len(batch.ids), -1)
    parts = [embed(prefix), *([] if features is None else [features]), embed(batch.ids)]
    inputs = torch.cat([part.to(parts[-2].dtype) for part in parts], 1)
    states = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    text = states[:, -batch.ids.shape[1] : -1]
    labels = batch.labels[:, 1:].flatten()
    return F.cross_entropy(model.lm_head(text).float().flatten(0, 1), labels, ignore_index=IGNORE)


def _step(optimizer: torch.optim.Optimizer, model, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _optimizer(model, slow: float, device: torch.device) -> torch.optim.Optimizer:
    """AdamW; what stage 1 has trained moves `slow` times as fast as the rest."""
    language = {id(p) for p in model.model.language_model.layers.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in language) == fast], "scale": scale}
        for fast, scale in ((True, 1.0), (False, slow))
    ]
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.98), weight_decay=0.02, fused=device.type == "cuda"
    )


def train(model, data: Iterator[Batch], args: argparse.Namespace) -> dict:
    """Run both stages.

    Args:
        model: An untrained model, on its device.
        data: Endless batches.
        args: The command line's settings.

    Returns:
        What was done: steps, seconds and last loss of each stage.
    """
    device = next(model.parameters()).device
    pick = random.Random(args.seed)
    sizes = (112,) if args.config == "tiny" else IMAGE_SIZES
    done: dict = {}
    stages = (("vision", args.vision_steps, 0.27, 1.0), ("answers", args.steps, 0.73, SLOW))
    for stage, steps, share, slow in stages:
        seconds = args.max_seconds and args.max_seconds * share
        schedule = Schedule(args.rate, steps, seconds, args.warmup)
        optimizer = _optimizer(model, slow, device)
        losses = []
        while schedule.advance(optimizer):
            batch = next(data)
            size = pick.choice(sizes)
            batch = batch.to(device, args.batch_size if size <= 168 else args.batch_size // 2)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                if stage == "vision":
                    loss = vision_loss(model, batch, size, pick, args.background)
                elif pick.random() < args.text_only:
                    loss = answer_loss(model, batch, None)
                else:
                    pixels = draw_pixels(batch.scenes, size, pick)
                    loss = answer_loss(model, batch, image_features(model, pixels))
            _step(optimizer, model, loss)
            losses.append(loss.detach())
            schedule.report(stage, losses[-1])
        done[stage] = {
            "steps": schedule.step,
            "seconds": round(time.monotonic() - schedule.start, 1),
            "first_loss": round(torch.stack(losses[:5]).mean().item(), 4),
            "last_loss": round(torch.stack(losses[-20:]).mean().item(), 4),
        }
        print(stage, done[stage], flush=True)
    return done


def save(model, out: Path) -> None:
    """Write weights (float16), configuration, tokenizer and processor."""
    copy = build_model(_size_of(model))
    copy.load_state_dict(model.state_dict())
    copy.half().save_pretrained(out)
    _name_as_on_the_hub(out / "model.safetensors")
    build_processor().save_pretrained(out)


def _name_as_on_the_hub(path: Path) -> None:
    """Name the tower's weights as public LLaVA checkpoints do, which every version reads.

    transformers of late writes them without "vision_model."; 5.5 would leave such a tower at
    random weights.
    """
    short, long = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        name if name.startswith(long) else name.replace(short, long, 1): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _size_of(model) -> str:
    width = model.config.text_config.hidden_size
    return next(name for name, size in SIZES.items() if size["text"][0] == width)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a reference LLaVA.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--config", choices=sorted(SIZES), default="small")
    parser.add_argument("--vision-steps", type=int, default=2670)
    parser.add_argument("--steps", type=int, default=5139, help="steps of the second stage")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text-only", type=float, default=0.05, help="share of batches without image"
    )
    parser.add_argument("--background", type=float, default=0.1, help="weight in stage 1")
    parser.add_argument("--max-seconds", type=float, help="end both stages early, by the clock")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--eval-scenes", type=int, default=1000)
    parser.add_argument("--eval-split", choices=("test", "validation"), default="test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="a run of seconds, to see that it works"
    )
    args = parser.parse_args(argv)
    if args.tiny:
        args.config, args.vision_steps, args.steps, args.batch_size = "tiny", 6, 12, 16
        args.workers, args.eval_scenes, args.warmup = 0, 8, 2
    return args


def main(argv: list[str] | None = None) -> dict:
    """Train, save, evaluate, print the figures; returns them."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(args.config).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.config}: {parameters / 1e6:.3f} M parameters", flush=True)
    training = train(model, batches(args.batch_size, args.seed, args.workers), args)
    save(model, args.out)
    weights = args.out / "model.safetensors"
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "workers")}
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    figures = {
        "sha256": sha256(weights),
        "bytes": weights.stat().st_size,
        "parameters": parameters,
        "settings": settings,
        "training": training,
        "trained_on": {
            "device": device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    figures["evaluation"] = evaluate(args.out, args.eval_scenes, args.device, split=args.eval_split)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_card(args.out)
    print(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main()
