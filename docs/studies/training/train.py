"""Train a reference model: `make study NAME=training.train ARGS="--family NAME --out DIR"`.

Stage 1 (vision): tower, projector and word embedding learn to tell, for every cell (the patch, or
the merged patches, of one image position) that an object covers by more than 30 %, the first
piece of the object's noun. Stage 2: everything learns
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
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from studies.training.card import write_card
from studies.training.data import IGNORE, Batch, batches, first_piece_ids, piece_ids, prefix_ids
from studies.training.evaluate_model import evaluate
from studies.training.families import Family
from studies.training.layouts import Layout, draw_training, layout_coverage
from studies.training.models import FAMILIES, family_of, sha256

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


def vision_loss(
    model, family: Family, batch: Batch, layout: Layout, pick: random.Random, background: float
) -> Tensor:
    """Stage 1: classify covered cells into the first piece of their object's noun.

    Args:
        model: The model.
        family: Its family.
        batch: Scenes on the model's device.
        layout: How the pictures are read; thumbnails are never blurred here.
        pick: Chooses how they are drawn.
        background: Weight of uncovered cells, whose class is the word "background"; 0: none.
    """
    layout = replace(layout, thumbnail=None)
    pictures = draw_training(batch.scenes, layout, pick)
    coverage, place = layout_coverage(batch.scenes, layout, family.cell).max(1)
    nouns = first_piece_ids().to(pictures.device)[batch.scenes.category]
    labels = torch.where(coverage > COVERED, nouns.gather(1, place), IGNORE)
    hidden = model.model.language_model.norm(family.features(model, pictures))
    logits = model.lm_head(hidden).float().flatten(0, 1)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)
    if background:
        word = piece_ids("background")[0]
        empty = torch.where(coverage == 0, word, IGNORE).flatten()
        loss = loss + background * F.cross_entropy(logits, empty, ignore_index=IGNORE)
    return loss


def answer_loss(
    model,
    family: Family,
    batch: Batch,
    layout: Layout | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """Stage 2: next-token loss on answers.

    Args:
        model: The model.
        family: Its family.
        batch: Ids and labels on the model's device.
        layout: How the pictures were read; None: text alone.
        features: What the family's `features` made of the pictures; None: text alone.
    """
    embed = model.get_input_embeddings()
    length = batch.ids.shape[1]

    def embedded(ids: tuple[int, ...]) -> Tensor:
        row = torch.tensor(ids, dtype=torch.int64, device=batch.ids.device)
        return embed(row.expand(len(batch.ids), -1))

    parts, positions = [embedded(prefix_ids())], None
    if layout is not None and features is not None:
        before, after = family.around_ids()
        parts += [embedded(before), features, embedded(after)]
        positions = family.positions(model, layout, length)
    parts.append(embed(batch.ids))
    kept = features if features is not None else parts[0]
    settings = (
        {}
        if positions is None
        else {"position_ids": positions.to(batch.ids.device).expand(-1, len(batch.ids), -1)}
    )
    states = model.model.language_model(
        inputs_embeds=torch.cat([part.to(kept.dtype) for part in parts], 1),
        use_cache=False,
        **settings,
    ).last_hidden_state
    labels = batch.labels[:, 1:].flatten()
    logits = model.lm_head(states[:, -length:-1]).float().flatten(0, 1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


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


def _loss(
    model, family: Family, batch: Batch, layout: Layout, pick: random.Random, args, stage: str
) -> Tensor:
    """A step's loss; in the second stage that of text alone now and then."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=batch.ids.is_cuda):
        if stage == "vision":
            return vision_loss(model, family, batch, layout, pick, args.background)
        if pick.random() < args.text_only:
            return answer_loss(model, family, batch)
        features = family.features(model, draw_training(batch.scenes, layout, pick))
        return answer_loss(model, family, batch, layout, features)


def _warm_up(model, family: Family, batch: Batch, args: argparse.Namespace) -> None:
    """Compile what the steps need, before the clock that ends a stage starts."""
    start, device = time.monotonic(), next(model.parameters()).device
    for number, layout in enumerate(dict.fromkeys(family.layouts[:6] + family.layouts[-6:])):
        part = batch.to(device, args.batch_size // (2 + number % 3))
        for stage, text_only in (("vision", 0), ("answers", 0), ("answers", 1)):
            settings = argparse.Namespace(background=args.background, text_only=text_only)
            _loss(model, family, part, layout, random.Random(0), settings, stage).backward()
    model.zero_grad(set_to_none=True)
    print(f"compiled in {time.monotonic() - start:.1f} s", flush=True)


def train(model, family: Family, data: Iterator[Batch], args: argparse.Namespace) -> dict:
    """Run both stages.

    Args:
        model: An untrained model, on its device.
        family: Its family.
        data: Endless batches.
        args: The command line's settings.

    Returns:
        What was done: steps, seconds and last loss of each stage.
    """
    device = next(model.parameters()).device
    pick = random.Random(args.seed)
    few = args.config == "tiny" or args.one_size
    layouts = family.tiny_layouts if few else family.layouts
    done: dict = {}
    stages = (("vision", args.vision_steps, 0.27, 1.0), ("answers", args.steps, 0.73, SLOW))
    for stage, steps, share, slow in stages:
        seconds = args.max_seconds and args.max_seconds * share
        schedule = Schedule(args.rate, steps, seconds, args.warmup)
        optimizer = _optimizer(model, slow, device)
        losses = []
        while schedule.advance(optimizer):
            batch = next(data)
            layout = pick.choice(layouts)
            batch = batch.to(device, int(args.batch_size * layout.share))
            loss = _loss(model, family, batch, layout, pick, args, stage)
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


def save(model, family: Family, config: str, out: Path) -> None:
    """Write weights (float16), configuration, tokenizer and processor."""
    plain = family.build_model(config)
    plain.load_state_dict(model.state_dict())
    plain.half().save_pretrained(out)
    path = out / "model.safetensors"
    tensors = {family.weight_name(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    family.build_processor().save_pretrained(out)
    _tidy(out, family)


def _tidy(out: Path, family: Family) -> None:
    """Settle what versions of transformers write or need differently.

    Only some know the name of the tower's rotary positions, which are the same in all; and where
    torchvision is installed, `AutoProcessor` wants a processor's full class and all its parts.
    """
    for file in ("config.json", "tokenizer_config.json"):
        settings = json.loads((out / file).read_text())
        settings.get("vision_config", {}).pop("rope_parameters", None)
        if "processor_class" in settings:
            settings["processor_class"] = settings["processor_class"].removeprefix("ImageOnly")
        (out / file).write_text(json.dumps(settings, indent=2) + "\n")
    if family.video:
        settings = json.loads((out / "processor_config.json").read_text())
        settings["video_processor"] = dict(family.video)
        (out / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a reference model.")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llava")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--config", choices=("tiny", "small", "base"), default="small")
    parser.add_argument("--vision-steps", type=int, help="default: the shipped model's")
    parser.add_argument("--steps", type=int, help="of the second stage; default: likewise")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text-only", type=float, default=0.05, help="share of batches without image"
    )
    parser.add_argument("--background", type=float, default=0.1, help="weight in stage 1")
    parser.add_argument("--max-seconds", type=float, help="end both stages early, by the clock")
    parser.add_argument("--compile", action="store_true", help="train faster, after a minute")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--eval-scenes", type=int, default=1000, help="0: no evaluation, no card")
    parser.add_argument("--eval-batch", type=int, default=50, help="scenes at a time")
    parser.add_argument("--eval-split", choices=("test", "validation"), default="test")
    parser.add_argument("--eval-ways", nargs="+", help="default: all of the family's")
    parser.add_argument(
        "--one-size", action="store_true", help="train on pictures of the native size alone"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="a run of seconds, to see that it works"
    )
    args = parser.parse_args(argv)
    vision_steps, steps = family_of(args.family).steps
    args.vision_steps, args.steps = args.vision_steps or vision_steps, args.steps or steps
    if args.tiny:
        args.config, args.vision_steps, args.steps, args.batch_size = "tiny", 6, 12, 16
        args.workers, args.eval_scenes, args.warmup = 0, 8, 2
    return args


def main(argv: list[str] | None = None) -> dict:
    """Train, save, evaluate, print the figures; returns them."""
    args = parse(argv)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    family = family_of(args.family)
    model = family.build_model(args.config).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{family.kind}, {args.config}: {parameters / 1e6:.3f} M parameters", flush=True)
    data = batches(args.batch_size, args.seed, args.workers, family.draw, family.converse)
    if args.compile:
        family.compile(model)
        _warm_up(model, family, next(data), args)
    training = train(model, family, data, args)
    save(model, family, args.config, args.out)
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
    if args.eval_scenes:
        figures["evaluation"] = evaluate(
            args.out,
            args.eval_scenes,
            args.device,
            args.eval_ways or tuple(family.ways)[: 3 if args.tiny else None],
            args.eval_split,
            family.name,
            args.eval_batch,
        )
        (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        write_card(args.out, family)
    print(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    main()
