"""Slow twins of the attributors on plain model outputs: no hooks, no traces, loops over tokens.

A full forward gives logits at every position; everything else is read off those with the formula
twins of ``reference``. At other scales the vision features are put in by hand.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import formulas as reference


def with_answer(inputs, answer):
    """The processor's mapping with the answer appended."""
    ids = torch.cat([inputs["input_ids"], torch.as_tensor(answer)[None]], dim=1)
    more = inputs["attention_mask"].new_ones(1, len(answer))
    mask = torch.cat([inputs["attention_mask"], more], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class Plain:
    """What a plain forward shows: ids (all), logits (all, vocabulary), cells per image."""

    ids: list[int]
    n_prompt: int
    logits: Tensor
    cells: list[Tensor]  # per image (rows, cols): positions
    special: frozenset[int]
    context_all: bool = False

    @property
    def text(self) -> list[int]:
        """Positions of the text tokens."""
        start = 1 if self.context_all else max(int(c.max()) for c in self.cells) + 1
        prompt = [p for p in range(start, self.n_prompt) if self.ids[p] not in self.special]
        return prompt + list(range(self.n_prompt, len(self.ids)))

    def raw_maps(self, token_id: int) -> list[Tensor]:
        """Per image relu(logit) at its cells, float64."""
        return [self.logits[where.flatten(), token_id].clamp(min=0).reshape(where.shape)
                for where in self.cells]  # fmt: skip

    def score(self, target: int, token: int) -> float:
        """relu(logit at pos(token) of the target's id), positions in the sequence."""
        own = token if token < self.n_prompt else token - 1
        return max(float(self.logits[own, self.ids[target]]), 0.0)

    def scores(self, targets) -> Tensor:
        rows = [[self.score(t, j) if j < t else 0.0 for j in self.text] for t in targets]
        return torch.tensor(rows, dtype=torch.float64)

    def probs(self, targets) -> Tensor:
        chosen = [self.logits[t - 1].softmax(-1)[self.ids[t]] for t in targets]
        return torch.stack(chosen)

    def rankings(self, k: int) -> Tensor:
        rows = torch.stack([self.logits[t - 1] for t in self.text])
        return reference.top_k_rankings(rows, k)

    def relevance(self, targets, k: int, p: float) -> Tensor:
        ranks = self.rankings(k)
        rows = torch.stack([ranks[self.text.index(t)] for t in targets])
        overlap = reference.rank_biased_overlap(rows, ranks, p)
        return overlap * self.earlier(targets)

    def earlier(self, targets) -> Tensor:
        return torch.tensor([[j < t for j in self.text] for t in targets])

    def context(self, targets) -> Tensor:
        rows = [[j < t and self.ids[j] != self.ids[t] for j in self.text] for t in targets]
        return torch.tensor(rows)


def image_cells(ids, image_id, shapes, extra=0) -> list[Tensor]:
    """Positions of each image's grid cells, counted off the placeholders in order."""
    where = [p for p, i in enumerate(ids) if i == image_id]
    cells = []
    for rows, cols in shapes:
        own, where = where[extra : extra + rows * cols], where[extra + rows * cols :]
        cells.append(torch.tensor(own).reshape(rows, cols))
    return cells


def layout(model, inputs, answer, *, special=(), context_all=False) -> Plain:
    """Where everything lies in prompt and answer; no logits yet. The inputs must not be padded."""
    ids = with_answer(inputs, answer)["input_ids"][0].tolist()
    patch = model.config.vision_config.patch_size
    height, width = inputs["pixel_values"].shape[-2:]
    shapes = [(height // patch, width // patch)] * len(inputs["pixel_values"])
    text_config, image_id = model.config.text_config, model.config.image_token_id
    found = {text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id}
    return Plain(
        ids,
        inputs["input_ids"].shape[1],
        torch.empty(0),
        image_cells(ids, image_id, shapes, extra_tokens(model)),
        frozenset({*found, image_id, *special}),
        context_all,
    )


def extra_tokens(model) -> int:
    """Tokens of each image that lie on no cell."""
    return int(model.config.vision_feature_select_strategy == "full")


@torch.no_grad()
def plain(model, inputs, answer, *, layer=None, **options) -> Plain:
    """One plain forward over prompt and answer."""
    output = model(**with_answer(inputs, answer), output_hidden_states=layer is not None)
    logits = output.logits[0]
    if layer is not None:
        norm = model.get_decoder().norm
        logits = model.lm_head(norm(output.hidden_states[layer + 1]))[0]
    return replace(layout(model, inputs, answer, **options), logits=logits.double())


def rebuilt_ids(ids, image_id, old, new) -> list[int]:
    """The ids with every run of ``old`` placeholders replaced by ``new``, as a processor would."""
    result, run = [], 0
    for i in ids:
        if i != image_id:
            result.append(i)
            continue
        run += 1
        if run == old:
            result += [image_id] * new
            run = 0
    return result


@torch.no_grad()
def plain_at(model, inputs, answer, scale) -> Plain:
    """The whole sequence, not its prefix, with the pixels resized and the placeholders recounted.

    No hook: the vision features are computed with the model's own option and put in by hand.
    """
    base = layout(model, inputs, answer)
    patch, image_id = model.config.vision_config.patch_size, model.config.image_token_id
    extra = extra_tokens(model)
    rows, cols = base.cells[0].shape
    new_rows, new_cols = round(rows * scale), round(cols * scale)
    pixels = inputs["pixel_values"]
    if (new_rows, new_cols) != (rows, cols):
        size = (new_rows * patch, new_cols * patch)
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    ids = rebuilt_ids(base.ids, image_id, rows * cols + extra, new_rows * new_cols + extra)
    features = model.model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    features = getattr(features, "pooler_output", features)
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    embeds[0, torch.tensor(ids) == image_id] = torch.cat(list(features))
    hidden = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    shapes = [(new_rows, new_cols)] * len(base.cells)
    return replace(
        base,
        ids=ids,
        n_prompt=len(ids) - len(answer),
        logits=model.lm_head(hidden)[0].double(),
        cells=image_cells(ids, image_id, shapes, extra),
    )


def msea_maps(model, inputs, answer, scales) -> dict[int, list[Tensor]]:
    """Per token id and image the mean over scales of the maps on the finest grid."""
    runs = [plain_at(model, inputs, answer, s) for s in scales]
    finest = tuple(max(r.cells[0].shape[axis] for r in runs) for axis in (0, 1))
    maps: dict[int, list[Tensor]] = {}
    for token_id in {runs[0].ids[t] for t in runs[0].text}:
        per_scale = [[reference.upsample(m[None], finest)[0] for m in run.raw_maps(token_id)]
                     for run in runs]  # fmt: skip
        maps[token_id] = [sum(ms) / len(ms) for ms in zip(*per_scale, strict=True)]
    return maps


def consistency(model, inputs, answer, scale) -> float:
    """exp(mean_t min(0, log p_s(y_t) - log p_1(y_t))) by full forwards."""

    def log_probs(run):
        steps = range(run.n_prompt, len(run.ids))
        return torch.stack([run.logits[t - 1].log_softmax(-1)[run.ids[t]] for t in steps])

    scaled, base = (plain_at(model, inputs, answer, s) for s in (scale, 1.0))
    drop = log_probs(scaled) - log_probs(base)
    return float(drop.clamp(max=0).mean().exp())


def _cells(maps: list[Tensor]) -> Tensor:
    return torch.cat([m.flatten() for m in maps])


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = flat.split([m.numel() for m in like], dim=1)
    return [p.reshape(len(flat), *m.shape) for p, m in zip(parts, like, strict=True)]


def _filtered(grids: list[Tensor], rank_filter: bool) -> list[Tensor]:
    if not rank_filter:
        return grids
    return [torch.stack([reference.rank_gaussian_filter(m) for m in grid]) for grid in grids]


def raw(run: Plain, targets, maps=None):
    """Maps per image (targets, rows, cols) and text scores of the lens."""
    get = run.raw_maps if maps is None else maps.__getitem__
    per_target = [get(run.ids[t]) for t in targets]
    return [torch.stack(ms) for ms in zip(*per_target, strict=True)], run.scores(targets)


def tam(run: Plain, targets, maps=None, rank_filter=True):
    """ECI, joint normalisation, rank filter."""
    get = run.raw_maps if maps is None else maps.__getitem__
    scores = run.scores(targets)
    own = torch.stack([_cells(get(run.ids[t])) for t in targets])
    contexts = torch.stack([_cells(get(run.ids[j])) for j in run.text])
    weights = reference.context_weights(scores, run.context(targets))
    cleaned = reference.eci_subtract(own, contexts, weights)
    unit, unit_scores = reference.joint_min_max(cleaned, scores, run.earlier(targets))
    return _filtered(_split(unit, get(run.ids[targets[0]])), rank_filter), unit_scores


def arc(run: Plain, targets, maps=None, *, k=50, p=0.9, strength=1.0):
    """ARC's image side, text side and relevance."""
    get = run.raw_maps if maps is None else maps.__getitem__
    scores, relevance = run.scores(targets), run.relevance(targets, k, p)
    own = torch.stack([_cells(get(run.ids[t])) for t in targets])
    contexts = torch.stack([_cells(get(run.ids[j])) for j in run.text])
    weights = reference.context_weights(scores, run.context(targets))
    cleaned = reference.arc_subtract(own, contexts, weights, relevance, strength)
    unit, unit_scores = reference.joint_min_max(cleaned, scores, run.earlier(targets))
    kept = (1 - strength * (1 - relevance)).clamp(min=0)
    return _split(unit, get(run.ids[targets[0]])), unit_scores * kept, relevance


def parity_tam(run: Plain, targets, template_tail=0, rank_filter=True):
    """TAM with the deviations of its released code, answer targets only.

    The first prompt text token stands for the class it predicts most; the prompt's last token's
    class is the context map of the first answer token; the first answer token shows the map of
    the first prompt token, normalised with that class's scores over the prompt text; the last
    ``template_tail`` prompt text tokens are no context; 256 levels.
    """
    prompt = [j for j in run.text if j < run.n_prompt]
    counted = prompt[: len(prompt) - template_tail]
    tail = set(prompt) - set(counted)
    first_class = int(run.logits[prompt[0]].argmax())

    def context_map(j):
        if j == prompt[0]:
            return _cells(run.raw_maps(first_class))
        if j == run.n_prompt:
            return _cells(run.raw_maps(run.ids[run.n_prompt - 1]))
        return _cells(run.raw_maps(run.ids[j]))

    is_text = torch.tensor([[j not in tail for j in run.text]])
    contexts = torch.stack([context_map(j) for j in run.text])
    rows = []
    for t in targets:
        if t == run.n_prompt:
            own = _cells(run.raw_maps(first_class))[None]
            values = [[max(float(run.logits[j, first_class]), 0.0) for j in counted]]
            scores = torch.tensor(values, dtype=torch.float64)
            unit, _ = reference.joint_min_max(own, scores, torch.ones_like(scores).bool())
        else:
            scores = run.scores([t])
            weights = reference.context_weights(scores, run.context([t]) & is_text)
            own = _cells(run.raw_maps(run.ids[t]))[None]
            cleaned = reference.eci_subtract(own, contexts, weights)
            unit, _ = reference.joint_min_max(cleaned, scores, run.earlier([t]) & is_text)
        rows.append(unit)
    like = run.raw_maps(first_class)
    return _filtered(_split(torch.cat(rows), like), rank_filter)
