"""Lines that compare what the library computes with what the model computes by itself."""

import torch

from captum_mllm.checking.report import Finding
from captum_mllm.checking.subject import Subject
from captum_mllm.functional import rank_correlation
from captum_mllm.model.forward import Captured, captured_forward, evaluating, full_logits
from captum_mllm.model.inputs import append_answer, cut

_TOLERANCE = {"full": 1e-4, "half": 3e-2}  # share of the largest value
_LOG_PROB = {"full": 1e-3, "half": 0.3}  # natural units; half precision: kernels round otherwise
SAME = 0.98  # rank correlation from which on two maps count as one


def _precision(subject: Subject) -> str:
    dtype = getattr(subject.adapter.model, "dtype", torch.float32)
    return "full" if dtype in (torch.float32, torch.float64) else "half"


def _answer_forward(subject: Subject) -> Captured:
    """One forward over prompt and answer; rows of the positions that predict the answer."""
    sample, adapter, answer = subject.sample, subject.adapter, subject.answer
    full = append_answer(sample, answer, adapter)
    first = len(sample.prompt_ids) - 1
    rows = torch.arange(first, first + len(answer), device=answer.device)
    with evaluating(adapter):
        return captured_forward(adapter, full, sample.grids, rows=rows)


def check_lens(subject: Subject) -> Finding:
    """Whether the lens is the model's head: ``W h + b`` over the vocabulary against its logits.

    Args:
        subject: the model under check.
    """
    captured = _answer_forward(subject)
    theirs = captured.logits.float()
    first = len(subject.sample.prompt_ids) - 1
    hidden = captured.final_hidden[first : first + len(theirs)]
    with evaluating(subject.adapter):
        ours = full_logits(subject.adapter, hidden).to(theirs)
    size = float(theirs.abs().max())
    worst = float((ours - theirs).abs().max())
    bound = _TOLERANCE[_precision(subject)] * max(size, 1e-6)
    found = (
        f"W h + b of {theirs.shape[1]} tokens at {len(theirs)} positions differs from the model's "
        f"logits by {worst:.2g} at most, at a size of {size:.3g} (allowed {bound:.2g})."
    )
    figures = {"worst": worst, "size": size, "allowed": bound}
    if worst <= bound:
        return Finding("lens", "passed", found, "", figures)
    advice = (
        "The head is not plain (soft-capping, a scale, quantised or adapted weights): register an "
        "adapter whose class_weights tells the true map."
    )
    return Finding("lens", "failed", found, advice, figures)


def check_teacher_forcing(subject: Subject) -> Finding:
    """Whether one forward over the answer gives what ``generate`` computed step by step.

    Args:
        subject: the model under check.
    """
    answer, steps = subject.steps
    ids = answer.cpu()[:, None]
    generated = steps.log_softmax(-1).gather(1, ids)
    forced = _answer_forward(subject).logits.float().cpu().log_softmax(-1).gather(1, ids)
    worst = float((generated - forced).abs().max())
    bound = _LOG_PROB[_precision(subject)]
    text = subject.text(answer)
    found = (
        f"Log-probabilities of the {len(answer)} tokens of {text!r}: one forward and generate "
        f"differ by {worst:.2g} at most (allowed {bound:g})."
    )
    figures = {"worst": worst, "allowed": bound, "tokens": len(answer)}
    if worst <= bound:
        return Finding("teacher forcing", "passed", found, "", figures)
    advice = "Explanations would be about other probabilities than those of the answer: report it."
    return Finding("teacher forcing", "failed", found, advice, figures)


def check_prefix(subject: Subject) -> Finding:
    """Whether image tokens have the same states with and without the text after them.

    Args:
        subject: the model under check.
    """
    sample, adapter = subject.sample, subject.adapter
    where = torch.cat(list(sample.image_positions))
    whole = _answer_forward(subject).lens_hidden[where].float()
    with evaluating(adapter):
        prefix = captured_forward(
            adapter,
            cut(sample.kwargs, sample.prefix_length, adapter),
            sample.grids,
            rows=sample.prompt_ids[:0],
        )
    worst = float((prefix.lens_hidden[where].float() - whole).abs().max())
    size = float(whole.abs().max())
    bound = _TOLERANCE[_precision(subject)] * max(size, 1e-6)
    found = (
        f"States of {len(where)} image tokens, computed without the text after them, differ by "
        f"{worst:.2g} at most, at a size of {size:.3g} (allowed {bound:.2g})."
    )
    figures = {"worst": worst, "size": size, "allowed": bound}
    if worst <= bound:
        return Finding("prefix", "passed", found, "", figures)
    advice = "Image tokens hear of the text after them: use scales=(1.0,) and flip='none'."
    return Finding("prefix", "failed", found, advice, figures)


def check_another_picture(subject: Subject) -> Finding:
    """Whether another picture gives another map of the same answer.

    Args:
        subject: the model under check.
    """
    model = subject.model
    own, other = subject.lens_maps(model), subject.lens_maps(model, subject.other)
    if own.shape != other.shape:
        return Finding("another picture", "passed", "Another picture has maps of another shape.")
    # Where a model does not look, a map is flat and has no ranks; equal ones are one.
    equal = ((own - other).abs() <= 1e-5 * own.abs().amax(1, keepdim=True)).all(1)
    similar = float(rank_correlation(own, other).masked_fill(equal, 1.0).median())
    found = f"Its maps of the same answer have a rank correlation of {similar:.2f} with these."
    figures = {"rank_correlation": similar}
    if similar < SAME:
        return Finding("another picture", "passed", found, "", figures)
    advice = "The maps don't depend on what the picture shows: does the model see it at all?"
    return Finding("another picture", "failed", found, advice, figures)
