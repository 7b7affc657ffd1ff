"""What a model makes of a text before its head: the hidden states, and the words with which it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fedlm.base.errors import UserError


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens that `mask` (texts, length) marks: (texts, width)."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def at_token(hidden: Tensor, mask: Tensor, before_the_end: int = 0) -> Tensor:
    """Return the hidden state so many tokens before each text's last one: (texts, width)."""
    positions = mask.sum(1) - 1 - before_the_end
    return hidden[torch.arange(len(hidden), device=hidden.device), positions]


@contextmanager
def watching(model: nn.Module, seen: Callable[[Tensor, dict[str, Tensor]], None]) -> Iterator[None]:
    """Call `seen` after each forward pass of the pretrained model inside `model`.

    It is given the last hidden states (texts, length, width) and the arguments of `model`'s own forward.
    """
    given: dict[str, Tensor] = {}

    def note(module: nn.Module, args: tuple, arguments: dict[str, Any]) -> None:
        given.clear()
        given.update(arguments)

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        seen(output[0], given)

    inner: Any = model
    hooks = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        inner.base_model.register_forward_hook(look),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Template:
    """Where tokens are added to a text: a prompt after its leading special tokens, words before its last.

    `prompt` and `words` are ids; `leading` and `trailing` count the text's own special tokens.
    """

    def __init__(self, prompt: Sequence[int], words: Sequence[int], leading: int, trailing: int) -> None:
        self.prompt, self.words, self.leading, self.trailing = prompt, words, leading, trailing

    def fill(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the longer texts, from those (texts, length) of the bare ones."""
        texts, length = ids.shape
        added = torch.tensor([*self.prompt, *self.words], device=ids.device).expand(texts, -1)
        prompt, words = len(self.prompt), len(self.words)
        place = torch.arange(length + prompt + words, device=ids.device).expand(texts, -1)
        lengths = mask.sum(1, keepdim=True)
        body = prompt + lengths - self.trailing  # where it ends
        source = torch.where(place < self.leading + prompt, length + place - self.leading, place - prompt)
        source = torch.where(place < self.leading, place, source)
        source = torch.where(place >= body, length + prompt + place - body, source)
        source = torch.where(place >= body + words, place - prompt - words, source)
        filled = torch.cat([ids, added], 1).gather(1, source)
        return filled, (place < lengths + prompt + words).to(mask.dtype)


class PromptedModel(nn.Module):
    """A frozen model that reads each text with a prompt and compares what it makes of it with its classes.

    `prompt` (dimensions,) is projected to one vector for each token of the template's prompt, and added to
    what the embeddings make of these tokens. `answer` turns hidden states (texts, length, width) and mask
    into logits (texts, classes).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        template: Template,
        projection: Tensor,
        answer: nn.Module,
    ) -> None:
        super().__init__()
        self.base: Any = model.base_model.requires_grad_(False)
        self.template, self.answer = template, answer
        self.prompt = nn.Parameter(projection.new_zeros(projection.shape[1]))
        self.projection: Tensor
        self.register_buffer("projection", projection)
        self.vocabulary: int = model.config.vocab_size
        self.corruption: tuple[torch.Generator, float] | None = None
        place = getattr(self.base, "embeddings", None)
        if not isinstance(place, nn.Module):
            place = model.get_input_embeddings()
        place.register_forward_hook(self._add_prompt)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Return logits (texts, classes) and, with labels, the mean cross-entropy over the classes."""
        ids, mask = self.template.fill(input_ids, attention_mask)
        if self.corruption is not None:
            ids = self._corrupted(ids, mask)
        kinds = (
            {} if token_type_ids is None else {"token_type_ids": self._kinds(token_type_ids, attention_mask)}
        )
        hidden = self.base(input_ids=ids, attention_mask=mask, **kinds)[0]
        logits = self.answer(hidden, mask)
        loss = None if labels is None else functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _kinds(self, kinds: Tensor, mask: Tensor) -> Tensor:
        template = self.template
        bare = Template(
            [0] * len(template.prompt), [0] * len(template.words), template.leading, template.trailing
        )
        return bare.fill(kinds, mask)[0]

    def _add_prompt(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        first, count = self.template.leading, len(self.template.prompt)
        added = (self.projection @ self.prompt).view(count, -1).to(output.dtype)
        return torch.cat(
            [output[:, :first], output[:, first : first + count] + added, output[:, first + count :]], 1
        )

    def _corrupted(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return ids of which some were replaced by random ones; padding stays."""
        assert self.corruption is not None
        stream, rate = self.corruption
        chosen = torch.rand(ids.shape, generator=stream, device="cpu") < rate
        other = torch.randint(self.vocabulary, ids.shape, generator=stream, device="cpu")
        return torch.where(chosen.to(ids.device) & mask.bool(), other.to(ids.device), ids)


class CosineToPhrases(nn.Module):
    """Logits: the cosine between the mean of a text's hidden states and each class's, over a temperature."""

    def __init__(self, phrases: Tensor, skipped: tuple[int, int], temperature: float) -> None:
        """`phrases` (classes, width) have length 1; hidden states from and to `skipped` are left out."""
        super().__init__()
        self.phrases: Tensor
        self.register_buffer("phrases", phrases)
        self.skipped, self.temperature = skipped, temperature

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (texts, classes)."""
        first, end = self.skipped
        mask = torch.cat([mask[:, :first], torch.zeros_like(mask[:, first:end]), mask[:, end:]], 1)
        text = functional.normalize(mean_of_tokens(hidden, mask), dim=-1)
        return text @ self.phrases.to(text.dtype).T / self.temperature


class LabelWords(nn.Module):
    """Logits: those that the model's own language head gives to one token of each class, at one position."""

    def __init__(self, head: nn.Module, words: Tensor, before_the_end: int) -> None:
        """`words` (classes,) are ids; the position is so many tokens before a text's last."""
        super().__init__()
        self.head = head.requires_grad_(False)
        self.words: Tensor
        self.register_buffer("words", words)
        self.before_the_end = before_the_end

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (texts, classes)."""
        return self.head(at_token(hidden, mask, self.before_the_end))[:, self.words]


def language_head(model: PreTrainedModel, decoder: bool) -> nn.Module:
    """Return what predicts tokens from hidden states, as the pretrained model's checkpoint has it.

    Raises UserError if the checkpoint has none.
    """
    import transformers

    kind: Any = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
    parameter = next(model.parameters())
    if parameter.is_meta:
        whole = kind.from_config(model.config, dtype=parameter.dtype)
        missing: set[str] = set()
    else:
        whole, report = kind.from_pretrained(
            model.name_or_path,
            revision=getattr(model.config, "revision", None) or "main",
            use_safetensors=True,
            output_loading_info=True,
            dtype=parameter.dtype,
        )
        missing = set(report["missing_keys"])
    heads = [(name, module) for name, module in whole.named_children() if module is not whole.base_model]
    if len(heads) != 1 or any(name.startswith(f"{heads[0][0]}.") for name in missing):
        raise UserError(
            f"readout: words; {model.name_or_path or type(model).__name__} has no head that predicts tokens; "
            "allowed: phrases"
        )
    output = whole.get_output_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and output is not None:
        output.weight = model.get_input_embeddings().weight
    return heads[0][1]
