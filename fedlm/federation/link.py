"""The way from the server to a client: what must travel, in which form, and what the client already has."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fedlm.base import staging
from fedlm.exchange import compression, payload, pruning
from fedlm.exchange.compression import LayerDrop, Prune, Quantize, Stale
from fedlm.exchange.declared import Declared, Way
from fedlm.exchange.payload import PayloadError
from fedlm.federation.method import Method
from fedlm.federation.reducible import require_reducible
from fedlm.federation.state import Server
from fedlm.federation.stored import Stored
from fedlm.models import blocks

NO_VERSION = -1  # of a parameter that a client has in a form of its own


class Copy:
    """A parameter's value that clients keep, one for all that have the same: the server's own, or stored."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: Tensor | Stored) -> None:
        self.value = value

    def load(self) -> Tensor:
        """Return the value."""
        return self.value.load() if isinstance(self.value, Stored) else self.value


class Link:
    """Downloads of a federation: client caches and compression.

    What the client trains in this turn always arrives exactly (in the payload's precision); of the other
    parameters, those in blocks may be reduced. Of clients that keep what they had (cache: last_visit),
    `copies` holds the values that are not the pretrained ones, and `seen` notes which version of each
    parameter that is, and whether exactly. A value that several clients have is held once, and no longer than
    one of them has it; what is not the server's present value is in the server's store. The other caches
    cost nothing per client.

    `observe` returns what the linear layers are given on a number of calibration examples. Tensors may be
    without values (meta); then pruned matrices have no mask, only the number of values that it would keep.

    Raises UserError if the method leaves nothing to reduce.
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
        self.copies: dict[int, dict[str, Copy]] = {}
        # Of each name, the copy that is the server's own value, and the newest of those that are not.
        self._current: weakref.WeakValueDictionary[str, Copy] = weakref.WeakValueDictionary()
        self._latest: weakref.WeakValueDictionary[str, Copy] = weakref.WeakValueDictionary()
        self.seen: dict[int, dict[str, tuple[int, bool]]] = {}
        self._uploaded: tuple[int, Mapping[str, Tensor]] | None = None
        self._inputs: tuple[int, dict[str, pruning.Inputs]] = (0, {})  # the round, and what was seen in it
        self._masks: dict[str, tuple[tuple[int, int], Tensor]] = {}
        if self.config.compression:
            self.anatomy = blocks.find_blocks(model)
            self.linear = pruning.linear_weights(model)
            require_reducible(self.method, self.anatomy)

    def expected(self, way: Way, client: int) -> dict[str, Tensor | Declared]:
        """Return, for every name that may be in a client's payload, its declaration or a tensor like it."""
        like = self._zeros(client)
        expected: dict[str, Tensor | Declared] = {**like, **self._declared(way)}
        if self.config.moments == "handed_on":
            for name, value in like.items():
                expected |= {f"{name}@{key}": value for key in ("exp_avg", "exp_avg_sq", "momentum_buffer")}
                expected[f"{name}@step"] = torch.zeros(())
        return expected

    def prune(self, client: int, round: int) -> None:
        """Choose the masks of what the client is sent pruned, which is work of the server."""
        if isinstance(self.config.compression, Prune):
            self._plan(client, round)

    def send(self, client: int, round: int) -> payload.Message:
        """Return the encoded download."""
        sent = self._plan(client, round)
        self._note(client, sent)
        return payload.encode(sent, self.config.payload)

    def _declared(self, way: Way) -> dict[str, Declared]:
        return {name: entry for name, entry in self.method.messages().items() if way in entry.ways}

    def _require_declared(self, received: Mapping[str, Tensor], way: Way) -> None:
        """Raise PayloadError unless everything that the method declares has arrived."""
        for name, entry in self._declared(way).items():
            required = "@" not in name or name.partition("@")[0] in received
            if required and name not in received:
                raise PayloadError(f"{name}: missing; expected {entry}")

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
            source = value if (exact := isinstance(value, Tensor)) else getattr(value, "tensor", None)
            known = name in self.server.tensors and source is self.server.tensors[name]
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

        They may share memory with the server's; nobody may write into them. Stored ones are mapped from their
        file for as long as they are held. Raises StorageError where what the client keeps cannot be stored.
        """
        # Elements that the method did not send are zero.
        expected = self.expected("down", client)
        zeros = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
        decoded = payload.decode(message, expected, known=zeros)
        self._require_declared(decoded, "down")
        if self.config.cache == "last_visit":
            self._put_away(self._replaced())
            self._hold(client, {name: decoded[name] for name in decoded if name in self.server.tensors})
        copies = {name: copy.load() for name, copy in self.copies.get(client, {}).items()}
        kept = self.server.kept.get(client, {})
        own = {name: kept[name] for name in kept if "@" not in name}
        has = {**copies, **own, **decoded}
        initial = self.server.initial
        others = self.method.held(client, {name: initial[name] for name in initial if name not in has})
        return {**initial, **others, **has}

    def accept(
        self, client: int, message: payload.Message | bytes, known: Mapping[str, Tensor] | None = None
    ) -> payload.Received:
        """Return what the server receives from a client, each tensor copied when it is asked for.

        `known` holds what the server has already of tensors that arrive in part.
        """
        received = payload.receive(message, self.expected("up", client), known)
        self._require_declared(received, "up")
        return received

    def uploaded(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """Note what the server received from a client."""
        if self.config.cache == "last_visit":
            self._uploaded = (client, tensors)

    def uploads_more(self) -> None:
        """Forget what a client uploaded, since it is not the only one of its cohort."""
        self._uploaded = None

    def merged(self, cohort: list[int]) -> None:
        """Note which parameters of the server are now just what a client merged alone has itself.

        Values that the merge replaced and that clients still have go to the store; raises StorageError where
        it has no room.
        """
        uploaded, self._uploaded = self._uploaded, None
        replaced = self._replaced()
        if uploaded is not None and len(cohort) == 1:
            client, tensors = uploaded
            current = self.server.tensors
            same = {n: current[n] for n, v in tensors.items() if n in current and _equal(current[n], v)}
            self._hold(client, same)
            if same:
                versions = {name: (self.server.version.get(name, 0), True) for name in same}
                self.seen.setdefault(client, {}).update(versions)
        self._put_away(replaced)

    def state(self) -> tuple[dict[str, Tensor | Stored], dict[str, Any]]:
        """Return what a checkpoint must hold: each value that clients have, and plain values."""
        numbers: dict[Copy, str] = {}
        copies: dict[str, dict[str, str]] = {}
        for client, held in self.copies.items():
            copies[str(client)] = {
                name: numbers.setdefault(copy, str(len(numbers))) for name, copy in held.items()
            }
        seen = {str(client): seen for client, seen in self.seen.items()}
        return {number: copy.value for copy, number in numbers.items()}, {"seen": seen, "copies": copies}

    def restore(self, values: dict[str, Tensor | Stored], plain: dict[str, Any]) -> None:
        """Continue from what `state` returned; the server has its values already."""
        self.seen = {
            int(client): {name: (version, exact) for name, (version, exact) in seen.items()}
            for client, seen in plain["seen"].items()
        }
        copies = {number: Copy(value) for number, value in values.items()}
        self.copies = {}
        for client, held in plain["copies"].items():
            self.copies[int(client)] = {name: copies[number] for name, number in held.items()}
            for name, number in held.items():
                value = copies[number].value
                if value is self.server.tensors.get(name):
                    self._current[name] = copies[number]
                else:
                    copies[number].value = self.server.store.adopt({name: value})[name]

    def _hold(self, client: int, values: dict[str, Tensor]) -> None:
        """Let a client have these values from now on."""
        held = self.copies.setdefault(client, {})
        own: dict[str, Tensor] = {}
        for name, value in values.items():
            current, latest = self.server.tensors.get(name), self._latest.get(name)
            if current is not None and _equal(current, value):
                if current is self.server.initial.get(name):
                    held.pop(name, None)  # all clients have it
                    continue
                if name not in self._current:
                    self._current[name] = held[name] = Copy(current)
                held[name] = self._current[name]
            elif latest is not None and _equal(latest.load(), value):
                held[name] = latest  # reduced in the same way for another client
            else:
                own[name] = value
        for name, stored in self.server.store.put(own).items():
            self._latest[name] = held[name] = Copy(stored)
        if not held:
            del self.copies[client]

    def _replaced(self) -> dict[str, "weakref.ref[Copy]"]:
        """Take those of the server's own values that it has replaced out of the table; return them."""
        current = self.server.tensors
        replaced = {
            name: weakref.ref(copy)
            for name, copy in self._current.items()
            if copy.value is not current.get(name)
        }
        for name in replaced:
            self._current.pop(name, None)
        return replaced

    def _put_away(self, replaced: dict[str, "weakref.ref[Copy]"]) -> None:
        """Store the replaced values that a client still has."""
        copies = {name: copy for name, reference in replaced.items() if (copy := reference()) is not None}
        for name, stored in self.server.store.adopt({n: copy.value for n, copy in copies.items()}).items():
            copies[name].value = stored

    def _zeros(self, client: int) -> Mapping[str, Tensor]:
        """Return zeros, which take no memory, in the shapes of the client's copy of the parameters."""
        zeros = {name: value.new_zeros(()).expand(value.shape) for name, value in self.server.initial.items()}
        return self.method.held(client, zeros)

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

    @contextmanager
    def _without(self, dropped: list[int]) -> Iterator[None]:
        """Take layers out of the resident model: they compute nothing and hold no memory."""
        parameters = dict(self.model.named_parameters())
        names = (name for index in dropped for name in self.anatomy.blocks[index].parameters)
        taken = {name: parameters[name] for name in names}
        with staging.set_aside(taken), blocks.skip(self.model, dropped):
            for parameter in taken.values():
                parameter.data = parameter.data.new_empty(0)
            yield


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit by bit; those without values only if they are the same."""
    if one is other or one.is_meta or other.is_meta:
        return one is other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
