"""The way from the server to a client: what must travel, in which form, and what the client already has."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fedlm.exchange import compression, payload, pruning
from fedlm.exchange.compression import LayerDrop, Prune, Quantize, Stale
from fedlm.federation.method import Method
from fedlm.federation.reducible import require_reducible
from fedlm.federation.state import Server
from fedlm.models import blocks

NO_VERSION = -1  # of a parameter that a client has in a form of its own


class Link:
    """Downloads of a federation: client caches and compression.

    What the client trains in this turn always arrives exactly (in the payload's precision); of the other
    parameters, those in blocks may be reduced. Of clients that keep what they had (cache: last_visit),
    `copies` holds the values and `seen` notes which version of each parameter that is, and whether exactly.
    The other caches cost nothing per client.

    `observe` returns what the linear layers are given on so many calibration examples. Tensors may be without
    values (meta); then pruned matrices have no mask, only the number of values that it would keep. Raises
    UserError if the method leaves nothing to reduce.
    """

    def __init__(
        self,
        method: Method,
        server: Server,
        model: Module,
        seed: int,
        observe: Callable[[int], dict[str, pruning.Inputs]] | None = None,
    ) -> None:
        self.method, self.server, self.model, self.seed = method, server, model, seed
        self.observe = observe
        self.config = method.config
        self.copies: dict[int, dict[str, Tensor]] = {}
        self.seen: dict[int, dict[str, tuple[int, bool]]] = {}
        self._uploaded: tuple[int, dict[str, Tensor]] | None = None
        self._inputs: tuple[int, dict[str, pruning.Inputs]] = (0, {})  # the round, and what was seen in it
        self._masks: dict[str, tuple[tuple[int, int], Tensor]] = {}
        if self.config.compression:
            self.anatomy = blocks.find_blocks(model)
            self.linear = pruning.linear_weights(model)
            require_reducible(self.method, self.anatomy)

    def expected(self) -> dict[str, Tensor]:
        """Return, for every name that may be in a payload, a tensor of its shape and type."""
        expected = dict(self.server.initial)
        for name, value in self.server.initial.items():
            expected |= {f"{name}@{kind}": value for kind in self.method.companions}
        if self.config.moments == "handed_on":
            for name, value in self.server.initial.items():
                expected |= {f"{name}@{key}": value for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")}
                expected[f"{name}@step"] = torch.zeros(())
        return expected

    def send(self, client: int, round: int) -> payload.Message:
        """Return the encoded download."""
        sent = self._plan(client, round)
        self._note(client, sent)
        return payload.encode(sent, self.config.payload)

    def _plan(self, client: int, round: int) -> dict[str, payload.Sendable]:
        """Return what travels to the client, each parameter in the form in which it travels."""
        trained = set(self.method.trainable(client, round))
        free = self._free(trained)
        absent = self._absent(free, client, round)
        reducible = {name for block in free for name in block.parameters}
        sent: dict[str, payload.Sendable] = {}
        for name, value in self.method.download(self.server, client, round).items():
            moment_of_others = "@" in name and name.partition("@")[0] not in trained
            if moment_of_others or name in absent:
                continue
            if value is not self.server.tensors.get(name):
                sent[name] = value  # made by the method for this turn, in the form that it chose
            elif not self._has(client, name, name in trained):
                sent[name] = self._reduced(name, value, round) if name in reducible else value
        return sent

    def _note(self, client: int, sent: dict[str, payload.Sendable]) -> None:
        """Note that a client has now what was sent."""
        if self.config.cache != "last_visit":
            return
        seen = self.seen.setdefault(client, {})
        for name, value in sent.items():
            source = value if (exact := isinstance(value, Tensor)) else value.tensor
            known = source is self.server.tensors.get(name)
            seen[name] = (self.server.version.get(name, 0) if known else NO_VERSION, exact)

    @contextmanager
    def depth(self, client: int, round: int) -> Iterator[tuple[int, ...]]:
        """Let the resident model have only the layers of the client's copy; yield those that it lacks."""
        dropped = self._dropped(self._free(self.method.trainable(client, round)), client, round)
        if not dropped:
            yield ()
            return
        with self._without(dropped):
            yield tuple(dropped)

    def receive(self, client: int, message: payload.Message | bytes) -> dict[str, Tensor]:
        """Return the values of the client's copy: pretrained, overlaid by what it kept and was sent.

        They may share memory with the server's; nobody may write into them.
        """
        decoded = payload.decode(message, self.expected())
        if self.config.cache == "last_visit":
            # What arrived as the server has it is held once, however many clients keep it.
            copies = {name: self._one_copy(name, value) for name, value in decoded.items()}
            self.copies.setdefault(client, {}).update(copies)
        own = {name: v for name, v in self.server.kept.get(client, {}).items() if "@" not in name}
        return {**self.server.initial, **self.copies.get(client, {}), **own, **decoded}

    def uploaded(self, client: int, tensors: dict[str, Tensor]) -> None:
        """Note what the server received from a client."""
        if self.config.cache == "last_visit":
            self._uploaded = (client, tensors)

    def merged(self, cohort: list[int]) -> None:
        """Note which parameters of the server are now just what a client merged alone has itself."""
        uploaded, self._uploaded = self._uploaded, None
        if uploaded is None or len(cohort) > 1:
            return
        client, tensors = uploaded
        for name, value in tensors.items():
            current = self.server.tensors.get(name)
            if current is not None and _equal(current, value):
                self.copies.setdefault(client, {})[name] = current
                self.seen.setdefault(client, {})[name] = (self.server.version.get(name, 0), True)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside `copies`, as plain values."""
        return {"seen": {str(client): seen for client, seen in self.seen.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.seen = {
            int(client): {name: (version, exact) for name, (version, exact) in seen.items()}
            for client, seen in state["seen"].items()
        }

    def _has(self, client: int, name: str, exactly: bool) -> bool:
        """Return whether the client need not be sent this parameter of the server's."""
        version = self.server.version.get(name, 0)
        if self.config.cache == "last_visit":
            seen, exact = self.seen.get(client, {}).get(name, (0, True))
            return seen == version and (exact or not exactly)
        # A client whose stale blocks are the pretrained ones has these, whatever else it keeps.
        keeps = self.config.cache == "pretrained" or isinstance(self.config.compression, Stale)
        return keeps and version == 0

    def _free(self, trained: Iterable[str]) -> list[blocks.Block]:
        """Return the blocks that may be reduced in a turn that trains these parameters."""
        return compression.free_blocks(self.anatomy, trained) if self.config.compression else []

    def _dropped(self, free: list[blocks.Block], client: int, round: int) -> list[int]:
        """Return the numbers of the layers that the client does without."""
        operator = self.config.compression
        if not isinstance(operator, LayerDrop):
            return []
        return operator.dropped(self.anatomy, free, self.seed, round, client)

    def _absent(self, free: list[blocks.Block], client: int, round: int) -> set[str]:
        """Return the names of parameters that stay behind."""
        operator = self.config.compression
        left_out = [self.anatomy.blocks[index] for index in self._dropped(free, client, round)]
        if isinstance(operator, Stale):
            updated = [block for block in free if any(map(self.server.version.get, block.parameters))]
            left_out = operator.left_out(updated, self.seed, round, client)
        return {name for block in left_out for name in block.parameters}

    def _reduced(self, name: str, value: Tensor, round: int) -> payload.Sendable:
        """Return a parameter of a free block in the form in which it travels."""
        operator = self.config.compression
        if name not in self.linear:
            return value
        transposed = self.linear[name]
        if isinstance(operator, Quantize):
            return payload.Quantized(value, channels=int(transposed))
        if not isinstance(operator, Prune):
            return value
        if not value.is_meta:
            return payload.Pruned(value, self._mask(name, value, round, operator))
        rows, columns = reversed(value.shape) if transposed else value.shape
        return payload.Pruned(value, None, rows * pruning.kept_per_row(columns, operator.sparsity))

    def _mask(self, name: str, value: Tensor, round: int, operator: Prune) -> Tensor:
        """Return the mask of a matrix, chosen again when its values changed or other inputs were observed."""
        inputs, observed = {}, 0
        if operator.criterion != "magnitude":
            inputs, observed = self._observed(round, operator.calibration_examples), round
        made_for = (self.server.version.get(name, 0), observed)
        if name not in self._masks or self._masks[name][0] != made_for:
            weight = value.T if self.linear[name] else value
            mask = pruning.choose(weight, operator.sparsity, operator.criterion, inputs.get(name))
            self._masks[name] = made_for, mask.T if self.linear[name] else mask
        return self._masks[name][1]

    def _observed(self, round: int, examples: int) -> dict[str, pruning.Inputs]:
        """Return what the linear layers are given on calibration examples, observed once a round."""
        if self._inputs[0] != round:
            assert self.observe is not None, f"{self.config.compression} needs calibration examples"
            self._inputs = round, self.observe(examples)
        return self._inputs[1]

    def _one_copy(self, name: str, value: Tensor) -> Tensor:
        """Return the server's own tensor if it is equal, so that many clients may keep it."""
        current = self.server.tensors.get(name)
        return current if current is not None and _equal(current, value) else value

    @contextmanager
    def _without(self, dropped: list[int]) -> Iterator[None]:
        """Take layers out of the resident model: they compute nothing and hold no memory."""
        parameters = dict(self.model.named_parameters())
        taken = [parameters[name] for index in dropped for name in self.anatomy.blocks[index].parameters]
        held = [parameter.data if parameter.is_meta else parameter.data.cpu() for parameter in taken]
        device = taken[0].device
        for parameter in taken:
            parameter.data = parameter.data.new_empty(0)
        try:
            with blocks.skip(self.model, dropped):
                yield
        finally:
            for parameter, value in zip(taken, held, strict=True):
                parameter.data = value.to(device)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal; those without values only if they are the same."""
    return one is other or (not one.is_meta and torch.equal(one, other))
