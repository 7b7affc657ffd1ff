"""Loss and metrics of a model on prepared examples."""

import math
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.nn.functional as functional

from fedlm.data import metrics
from fedlm.data.prepared import IGNORED, Prepared

Batch = dict[str, torch.Tensor]
# The predictions (one list, or one for each metric), and the references.
Predicted = tuple[list | dict[str, list], list]

LABELS = ("labels", "start_positions", "end_positions")


def losses(kind: str, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the losses, float32, whose mean over one batch is the loss that Transformers' models compute.

    (For question answering theirs includes the padding and so depends on its amount; here it does not.)
    Classification: cross-entropy (examples,). Regression: squared error (examples,). Causal: negative
    log-likelihood (target tokens,). Question answering: mean cross-entropy of start and end (windows,).

    Args:
        kind: the kind of task.
        outputs: of a Transformers model's forward without labels. Logits at positions that a method put
            before the text (soft prompts) are ignored.
        batch: as `Prepared.batch` gives it, on the model's device.
    """
    if kind == "question_answering":
        padding = batch["attention_mask"] == 0
        start, end = (
            logits[:, -padding.shape[1] :].masked_fill(padding, -math.inf)
            for logits in (outputs.start_logits, outputs.end_logits)
        )
        return (
            _cross_entropy(start, batch["start_positions"]) + _cross_entropy(end, batch["end_positions"])
        ) / 2
    if kind == "classification":
        return _cross_entropy(outputs.logits, batch["labels"])
    if kind == "regression":
        return (outputs.logits.float().squeeze(-1) - batch["labels"]).square()
    logits, targets = _target_logits(outputs, batch)
    return _cross_entropy(logits, targets)


def _target_logits(outputs: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits that predict a target token, (target tokens, words), and the tokens."""
    labels = batch["labels"]
    wanted = labels[:, 1:] != IGNORED
    return outputs.logits[:, -labels.shape[1] : -1][wanted], labels[:, 1:][wanted]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def score(
    model: torch.nn.Module,
    data: Prepared,
    indices: numpy.ndarray,
    batch_size: int,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Return the task's metrics and "loss" (see `losses`; the mean over all) on some examples.

    The model is put into evaluation mode, and its mode is restored afterwards. The result does not depend on
    the batch size, up to rounding: sums are kept, never means of batches.

    Args:
        model: returns Transformers' outputs; already on `device`.
        data: the task.
        indices: which examples, in any order; at least one.
        batch_size: how many of the longest examples make one forward pass; of shorter ones, the same tokens.
        device: where the model is.
        autocast: the precision of the forward pass, if not the weights'.
    """
    indices = numpy.asarray(indices)
    # Similar lengths together, to have little padding; the longest first, so that memory runs out early.
    ordered = indices[numpy.argsort(-data.lengths[indices], kind="stable")]
    total, count = 0.0, 0
    predictions: dict[str, list] = {name: [] for name in data.metrics if name != "loss"}
    references: list = []
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for chunk in _batches(data, ordered, batch_size):
            batch = {name: tensor.to(device) for name, tensor in data.batch(chunk).items()}
            inputs = {name: tensor for name, tensor in batch.items() if name not in LABELS}
            with (
                torch.inference_mode(),
                torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None),
            ):
                outputs = model(**inputs)
            values = losses(data.kind, outputs, batch).double()
            total += values.sum().item()
            count += len(values)
            predicted, right = _PREDICT[data.kind](outputs, batch, data, chunk, values)
            for name, found in predictions.items():
                # Most kinds have one prediction for all metrics, some one for each.
                found += predicted[name] if isinstance(predicted, dict) else predicted
            references += right
    finally:
        for module, training in modes.items():
            module.training = training
    scores = {"loss": total / count}
    for name, predicted in predictions.items():
        broken = data.kind == "regression" and not numpy.isfinite(predicted).all()
        scores[name] = math.nan if broken else metrics.compute(data.kind, name, predicted, references)
    return scores


def _batches(data: Prepared, ordered: numpy.ndarray, batch_size: int) -> Iterator[numpy.ndarray]:
    """Cut examples, the longest first, into batches of as many tokens, padding included, as the first has.

    For question answering every window counts as a separate text; an example is never divided.
    """
    room = batch_size * data.batch_length(ordered[:1])
    start = 0
    while start < len(ordered):
        rest = ordered[start:]
        windows = numpy.cumsum(data.windows[rest])
        fitting = numpy.searchsorted(windows, room // data.batch_length(rest[:1]), side="right")
        yield rest[: max(1, fitting)]
        start += max(1, int(fitting))


# Each returns the predictions and the references of a batch's examples, as the metrics take them; `values`
# are what `losses` gave, in float64.


def _predict_class(
    outputs: Any, batch: Batch, data: Prepared, examples: numpy.ndarray, values: torch.Tensor
) -> Predicted:
    return outputs.logits.argmax(-1).tolist(), batch["labels"].tolist()


def _predict_number(
    outputs: Any, batch: Batch, data: Prepared, examples: numpy.ndarray, values: torch.Tensor
) -> Predicted:
    return outputs.logits.float().squeeze(-1).tolist(), batch["labels"].tolist()


def _predict_tokens(
    outputs: Any, batch: Batch, data: Prepared, examples: numpy.ndarray, values: torch.Tensor
) -> Predicted:
    """Return each example's summed loss, number of correct tokens and number of target tokens."""
    logits, targets = _target_logits(outputs, batch)
    wanted = batch["labels"][:, 1:] != IGNORED
    example = wanted.nonzero()[:, 0]
    right = (logits.argmax(-1) == targets).double()
    sums = torch.zeros(2, len(wanted), dtype=torch.double, device=logits.device)
    sums.index_add_(1, example, torch.stack([values, right]))
    return {"perplexity": sums[0].tolist(), "exact_match": sums[1].long().tolist()}, wanted.sum(1).tolist()


def _predict_answer(
    outputs: Any, batch: Batch, data: Prepared, examples: numpy.ndarray, values: torch.Tensor
) -> Predicted:
    """Return each example's answer: the best span of document tokens in any of its windows.

    Where the task has questions without an answer, there is none if position 0 scores higher than that span,
    by its lowest score over the windows.
    """
    length = batch["input_ids"].shape[1]
    starts, ends = data.characters(examples)
    outside = torch.from_numpy(ends <= starts).to(batch["input_ids"].device)
    start, end = (logits[:, -length:].float() for logits in (outputs.start_logits, outputs.end_logits))
    none = (start[:, 0] + end[:, 0]).tolist()
    start, end = start.masked_fill(outside, -math.inf), end.masked_fill(outside, -math.inf)
    best = torch.full((len(start),), -math.inf, device=start.device)
    first, last = torch.zeros_like(best, dtype=torch.long), torch.zeros_like(best, dtype=torch.long)
    for distance in range(min(data.max_answer_tokens, length)):
        value, position = (start[:, : length - distance] + end[:, distance:]).max(1)
        better = value > best
        best = torch.where(better, value, best)
        first = torch.where(better, position, first)
        last = torch.where(better, position + distance, last)
    highest, begin, end_of = best.tolist(), first.tolist(), last.tolist()
    predictions, stop = [], 0
    for example in examples:
        windows = range(stop, stop + data.windows[example])
        stop = windows.stop
        chosen = max(windows, key=highest.__getitem__)
        unanswered = data.unanswerable and min(none[w] for w in windows) > highest[chosen]
        if unanswered or highest[chosen] == -math.inf:
            predictions.append("")
        else:
            text = data.columns["context"][int(example)].as_py()
            predictions.append(text[starts[chosen, begin[chosen]] : ends[chosen, end_of[chosen]]])
    return predictions, data.columns["answers"].take(examples).to_pylist()


_PREDICT = {
    "classification": _predict_class,
    "regression": _predict_number,
    "causal": _predict_tokens,
    "question_answering": _predict_answer,
}
