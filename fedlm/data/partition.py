"""Partitions: who holds which training examples.

A partition is a list of index arrays, one a client. It is drawn from the stream (seed, "partition"), so it
depends on the scheme, the number of clients, the data and the seed, and never on the method: all methods are
compared on the same clients. Every training example goes to exactly one client.

No client is empty. A scheme with strong skew may leave a client with fewer than `min_examples` examples; it
then receives examples, one at a time, from whichever client is the largest at that moment. How many moved is
recorded in the partition file. A study with fewer examples than `clients * min_examples` is an error.

The skew that came out is measured and recorded, because the same alpha means different things with different
schemes, numbers of clients and numbers of labels.
"""

import heapq
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy
from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from scipy.special import rel_entr

from fedlm.base.errors import UserError
from fedlm.base.files import sha256, write_atomically
from fedlm.base.randomness import numpy_stream
from fedlm.base.settings import Settings

# A Dirichlet distribution with this alpha is uniform to nine digits; larger ones overflow in sums.
LARGEST_ALPHA = 1e18


class Pooled(Settings):
    """One client holds everything, whatever number of clients the federation asks for."""

    scheme: Literal["pooled"]


class Divided(Settings):
    """What all schemes with several clients share."""

    min_examples: PositiveInt = Field(default=1, description="examples that every client gets at least")


class Iid(Divided):
    """A random division into parts of equal size (they differ by at most one example)."""

    scheme: Literal["iid"]


class Dirichlet(Divided):
    """Label skew: label proportions are drawn from a symmetric Dirichlet distribution.

    `sizes: free` draws, for each label, the shares that the clients get of it (Yurochkin et al. 2019,
    arXiv:1905.12022; Li et al. 2022, arXiv:2102.02079), so that the clients' sizes differ as well.
    `sizes: equal` draws, for each client, a label mix from Dirichlet(alpha * label frequencies), and fills
    clients of equal size in random order until the labels run out (Hsu et al. 2019, arXiv:1909.06335).
    """

    scheme: Literal["dirichlet"]
    alpha: PositiveFloat = Field(description="concentration; small is skewed, large is IID")
    sizes: Literal["free", "equal"] = Field(default="free", description="free: sizes follow from the draw")


class Labels(Divided):
    """Label skew: every client holds examples of `labels_per_client` labels only.

    Labels are assigned in turn, the one with the fewest owners first and ties at random, so that every label
    has an owner and numbers of owners differ by at most one; the owners share a label's examples evenly
    (the division `#C = k` of Li et al. 2022, arXiv:2102.02079, made balanced). Examples that move to a client
    with fewer than `min_examples` may add a label to it.
    """

    scheme: Literal["labels"]
    labels_per_client: PositiveInt = Field(description="different labels that one client holds")


class Quantity(Divided):
    """Size skew: the clients' shares of the data are drawn from a Dirichlet distribution; labels are IID."""

    scheme: Literal["quantity"]
    alpha: PositiveFloat = Field(description="concentration; small is unequal, large is equal sizes")


class Natural(Divided):
    """The task's own populations (its groups) are the clients, in the order of the groups.

    With fewer clients than groups, whole groups are merged: the largest first, each to the client that has
    the fewest examples so far. With more clients than groups, groups are split: each further client goes to
    the group with the most examples per client, and the clients of one group share it IID and evenly. So no
    client mixes groups unless there are too few clients.
    """

    scheme: Literal["natural"]


PartitionConfig = Annotated[
    Pooled | Iid | Dirichlet | Labels | Quantity | Natural, Field(discriminator="scheme")
]


def parse(settings: dict) -> Pooled | Iid | Dirichlet | Labels | Quantity | Natural:
    """Return the checked settings of a partition; raise pydantic's ValidationError where they are wrong."""
    return TypeAdapter(PartitionConfig).validate_python(settings)


def check(
    config: PartitionConfig,
    clients: int,
    examples: int | None = None,
    num_labels: int | None = None,
    num_groups: int | None = None,
) -> None:
    """Raise UserError where the scheme cannot be drawn; a number that is not known yet is None.

    `examples`, `num_labels` and `num_groups` are those of the training split. A number of groups of 0 says
    that the task has no natural populations.
    """
    if config.scheme == "pooled":
        return
    if clients < 1:
        raise UserError(f"clients: {clients}, but a federation needs at least 1")
    needed = clients * config.min_examples
    if examples is not None and examples < needed:
        raise UserError(
            f"clients: {clients} clients with min_examples {config.min_examples} need {needed} training "
            f"examples, but there are {examples}: enough for {examples // config.min_examples} clients"
        )
    if config.scheme == "labels" and num_labels is not None:
        if config.labels_per_client > num_labels:
            raise UserError(
                f"labels_per_client: {config.labels_per_client}, but the training examples have {num_labels} "
                f"labels; allowed is 1 to {num_labels}"
            )
        if config.labels_per_client * clients < num_labels:
            raise UserError(
                f"labels_per_client: {clients} clients with {config.labels_per_client} labels each cannot "
                f"hold {num_labels} labels; at least {-(-num_labels // clients)} labels a client are needed"
            )
    if config.scheme == "natural" and num_groups == 0:
        raise UserError(
            "scheme: natural, but the task has no natural populations; allowed are pooled, iid, dirichlet, "
            "labels and quantity"
        )


def divide(
    config: PartitionConfig,
    clients: int,
    labels: numpy.ndarray,
    groups: numpy.ndarray | None,
    seed: int,
    indices: numpy.ndarray,
) -> list[numpy.ndarray]:
    """Divide training examples among clients.

    Args:
        config: the scheme and its settings.
        clients: number of clients; `pooled` has one, whatever is asked for.
        labels: (pool size,) integers; the label of each example of the pool.
        groups: (pool size,) integers, the natural population of each example, or None.
        seed: the run's seed.
        indices: (examples,) the pool indices to divide, each once.

    Returns:
        One sorted int64 array of pool indices for each client; every index is in exactly one of them.

    Raises:
        UserError: too few examples or labels for this scheme, or no groups where they are needed.
    """
    return _divide(config, clients, labels, groups, seed, indices)[0]


def _divide(config, clients, labels, groups, seed, indices) -> tuple[list[numpy.ndarray], int]:
    """Return the parts, and how many examples moved to clients that had too few."""
    # Sorted, so that the draw depends on the set of examples and not on the order they are handed over in.
    indices = numpy.sort(numpy.asarray(indices, dtype=numpy.int64))
    if config.scheme == "pooled":
        if not len(indices):
            raise UserError("there are no training examples to divide")
        return [indices], 0

    stream = numpy_stream(seed, "partition")
    kinds, kind = numpy.unique(numpy.asarray(labels)[indices], return_inverse=True)
    if groups is None:
        group, num_groups = None, 0
    else:
        names, group = numpy.unique(numpy.asarray(groups)[indices], return_inverse=True)
        num_groups = len(names)
    check(config, clients, len(indices), len(kinds), num_groups)

    # Each scheme answers with positions in `indices`, in random order within a client.
    match config.scheme:
        case "iid":
            parts = numpy.array_split(stream.permutation(len(indices)), clients)
        case "dirichlet" if config.sizes == "free":
            parts = _label_shares(kind, clients, config.alpha, stream)
        case "dirichlet":
            parts = _label_mixes(kind, clients, config.alpha, stream)
        case "labels":
            parts = _few_labels(kind, clients, config.labels_per_client, stream)
        case "quantity":
            shares = _dirichlet(numpy.full(clients, config.alpha), stream)
            parts = _cut(stream.permutation(len(indices)), shares)
        case "natural":
            parts = _natural(group, clients, stream)

    parts, moved = _fill_up(parts, config.min_examples)
    return [numpy.sort(indices[part]) for part in parts], moved


def _dirichlet(alphas: numpy.ndarray, stream: numpy.random.Generator) -> numpy.ndarray:
    return stream.dirichlet(numpy.clip(alphas, numpy.finfo(float).tiny, LARGEST_ALPHA))


def _cut(positions: numpy.ndarray, shares: numpy.ndarray) -> list[numpy.ndarray]:
    """Cut an array into pieces of these shares; the rounding errors do not add up."""
    ends = numpy.rint(numpy.cumsum(shares)[:-1] * len(positions)).astype(numpy.int64)
    return numpy.split(positions, numpy.clip(ends, 0, len(positions)))


def _join(pieces: list[list[numpy.ndarray]], stream: numpy.random.Generator) -> list[numpy.ndarray]:
    """Join each client's pieces in random order, so that what moves away from it later is a random draw."""
    empty = numpy.empty(0, dtype=numpy.int64)
    return [stream.permutation(numpy.concatenate([empty, *some])) for some in pieces]


def _label_shares(kind, clients, alpha, stream) -> list[numpy.ndarray]:
    pieces = [[] for _ in range(clients)]
    for label in range(kind.max() + 1):
        positions = stream.permutation(numpy.flatnonzero(kind == label))
        shares = _dirichlet(numpy.full(clients, alpha), stream)
        for client, piece in enumerate(_cut(positions, shares)):
            pieces[client].append(piece)
    return _join(pieces, stream)


def _label_mixes(kind, clients, alpha, stream) -> list[numpy.ndarray]:
    stock = [stream.permutation(numpy.flatnonzero(kind == label)) for label in range(kind.max() + 1)]
    left = numpy.array([len(positions) for positions in stock])
    frequencies = left / left.sum()
    sizes = [len(piece) for piece in numpy.array_split(numpy.arange(len(kind)), clients)]
    pieces = [[] for _ in range(clients)]
    for client in stream.permutation(clients):
        mix = _dirichlet(alpha * frequencies, stream)
        missing = sizes[client]
        while missing:
            # A label that has run out leaves its share to the others.
            mix = numpy.where(left > 0, mix, 0.0)
            if mix.sum() == 0:
                mix = left.astype(float)
            mix = mix / mix.sum()
            counts = numpy.minimum(stream.multinomial(missing, mix), left)
            for label in numpy.flatnonzero(counts):
                start = len(stock[label]) - left[label]
                pieces[client].append(stock[label][start : start + counts[label]])
            left -= counts
            missing -= counts.sum()
    return _join(pieces, stream)


def _few_labels(kind, clients, labels_per_client, stream) -> list[numpy.ndarray]:
    num_labels = kind.max() + 1
    owners = [[] for _ in range(num_labels)]
    for client in stream.permutation(clients):
        order = sorted(stream.permutation(num_labels), key=lambda label: len(owners[label]))
        for label in order[:labels_per_client]:
            owners[label].append(client)
    pieces = [[] for _ in range(clients)]
    for label in range(num_labels):
        positions = stream.permutation(numpy.flatnonzero(kind == label))
        for client, piece in zip(
            owners[label], numpy.array_split(positions, len(owners[label])), strict=True
        ):
            pieces[client].append(piece)
    return _join(pieces, stream)


def _natural(group, clients, stream) -> list[numpy.ndarray]:
    members = [stream.permutation(numpy.flatnonzero(group == name)) for name in range(group.max() + 1)]
    if clients <= len(members):
        held = [[] for _ in range(clients)]
        if clients == len(members):
            held = [[name] for name in range(clients)]
        else:
            lightest = [(0, client) for client in range(clients)]
            for name in sorted(range(len(members)), key=lambda name: (-len(members[name]), name)):
                size, client = heapq.heappop(lightest)
                held[client].append(name)
                heapq.heappush(lightest, (size + len(members[name]), client))
        return _join([[members[name] for name in names] for names in held], stream)
    seats = [1] * len(members)
    fullest = [(-len(some), name) for name, some in enumerate(members)]
    heapq.heapify(fullest)
    for _ in range(clients - len(members)):
        _, name = heapq.heappop(fullest)
        seats[name] += 1
        heapq.heappush(fullest, (-len(members[name]) / seats[name], name))
    return [
        piece
        for some, number in zip(members, seats, strict=True)
        for piece in numpy.array_split(some, number)
    ]


def _fill_up(parts: list[numpy.ndarray], min_examples: int) -> tuple[list[numpy.ndarray], int]:
    """Move single examples from the largest client (the first of equals) to those that have too few."""
    parts = [list(part) for part in parts]
    moved = 0
    largest = [(-len(part), client) for client, part in enumerate(parts)]
    heapq.heapify(largest)
    for part in parts:
        while len(part) < min_examples:
            # There are enough examples for all, so the largest client has more than it needs.
            size, client = heapq.heappop(largest)
            if -size == len(parts[client]):
                part.append(parts[client].pop())
                moved += 1
            heapq.heappush(largest, (-len(parts[client]), client))
    return [numpy.array(part, dtype=numpy.int64) for part in parts], moved


def count_labels(parts: list[numpy.ndarray], labels: numpy.ndarray, num_labels: int) -> numpy.ndarray:
    """Return how many examples of each label each client holds: (clients, labels) integers."""
    return numpy.array([numpy.bincount(labels[part], minlength=num_labels) for part in parts])


def skew(
    parts: list[numpy.ndarray], labels: numpy.ndarray, num_labels: int | None = None
) -> dict[str, float]:
    """Measure how much the clients differ.

    Args:
        parts: the pool indices of each client.
        labels: (pool size,) integer labels.
        num_labels: number of labels; by default the largest that occurs, plus one.

    Returns:
        label_divergence: Jensen-Shannon divergence in bits between a client's label distribution and that of
            all clients together, averaged over clients with their number of examples as weight; 0 (all alike)
            to 1.
        size_gini: Gini coefficient of the clients' numbers of examples; 0 (equal) to (clients-1)/clients.
        smallest_client, median_client, largest_client: numbers of examples.
        labels_per_client: mean number of different labels that a client holds.
    """
    labels = numpy.asarray(labels)
    if num_labels is None:
        num_labels = max(int(labels[part].max()) + 1 for part in parts if len(part))
    counts = count_labels(parts, labels, num_labels)
    sizes = counts.sum(axis=1)
    local = counts / numpy.maximum(sizes, 1)[:, None]
    together = counts.sum(axis=0) / sizes.sum()
    middle = (local + together) / 2
    divergence = (rel_entr(local, middle) + rel_entr(together[None, :], middle)).sum(axis=1) / (
        2 * numpy.log(2)
    )
    ascending = numpy.sort(sizes)
    ranks = numpy.arange(1, len(sizes) + 1)
    gini = (2 * ranks - len(sizes) - 1) @ ascending / (len(sizes) * sizes.sum())
    return {
        "label_divergence": float(numpy.clip(divergence @ sizes / sizes.sum(), 0, 1)),
        "size_gini": float(gini),
        "smallest_client": int(sizes.min()),
        "median_client": float(numpy.median(sizes)),
        "largest_client": int(sizes.max()),
        "labels_per_client": float((counts > 0).sum(axis=1).mean()),
    }


class PartitionFile(Settings):
    """A drawn partition with what was asked and what came out, as it lies in the results folder."""

    partition_file: Literal[1] = 1  # version of this layout
    task: str = Field(description="label of the task in the study")
    partition: str = Field(description="label of the partition in the study")
    config: PartitionConfig
    seed: int
    clients: int = Field(description="number of clients that came out")
    examples: int
    moved: int = Field(description="examples moved to clients that had fewer than min_examples")
    skew: dict[str, float] = Field(description="by label; by population where the task has no labels")
    label_names: list[str] = Field(description="names of the labels; numbers where the task has none")
    label_counts: list[list[int]] = Field(description="examples of each label, for each client")
    group_names: list[str] = Field(description="names of the task's natural populations, if any")
    group_counts: list[list[int]] = Field(description="examples of each population, for each client")
    sha256: str = Field(description="of the clients' indices")
    data_sha256: str = Field(description="of the prepared task")
    indices: list[list[int]] = Field(description="pool indices of each client, ascending")

    @classmethod
    def make(
        cls,
        config: PartitionConfig,
        clients: int,
        labels: numpy.ndarray,
        groups: numpy.ndarray | None,
        seed: int,
        indices: numpy.ndarray,
        *,
        task: str,
        partition: str,
        data_sha256: str,
        label_names: list[str] = (),
        group_names: list[str] = (),
    ) -> "PartitionFile":
        """Draw a partition (arguments as in `divide`) and measure its skew."""
        parts, moved = _divide(config, clients, labels, groups, seed, indices)
        label_names = list(label_names) or [str(label) for label in range(int(labels[indices].max()) + 1)]
        group_counts, what, names = [], labels, label_names
        if groups is not None:
            group_names = list(group_names) or [str(group) for group in range(int(groups.max()) + 1)]
            group_counts = count_labels(parts, groups, len(group_names)).tolist()
            if len(label_names) < 2:  # a task without labels: clients differ by the populations they hold
                what, names = groups, group_names
        return cls(
            task=task,
            partition=partition,
            config=config,
            seed=seed,
            clients=len(parts),
            examples=sum(map(len, parts)),
            moved=moved,
            skew=skew(parts, what, len(names)),
            label_names=label_names,
            label_counts=count_labels(parts, labels, len(label_names)).tolist(),
            group_names=list(group_names) if groups is not None else [],
            group_counts=group_counts,
            sha256=fingerprint(parts),
            data_sha256=data_sha256,
            indices=[part.tolist() for part in parts],
        )

    def content(self) -> tuple[list[str], list[list[int]]]:
        """Return by what clients differ, labels or else populations: names, and counts of each client."""
        if len(self.label_names) < 2 and self.group_names:
            return self.group_names, self.group_counts
        return self.label_names, self.label_counts

    @property
    def parts(self) -> list[numpy.ndarray]:
        """One sorted int64 array of pool indices for each client."""
        return [numpy.array(part, dtype=numpy.int64) for part in self.indices]

    def write(self, path: Path) -> None:
        """Write the partition as JSON, one line a key; the same partition gives the same bytes."""
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.model_dump().items()]
        write_atomically(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def read(cls, path: Path) -> "PartitionFile":
        """Read a partition; raise UserError where the file is damaged or of another version."""
        try:
            partition = cls.model_validate_json(Path(path).read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such partition file") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path}: not a partition file of this version: {place}: {first['msg']}"
            ) from None
        if fingerprint(partition.parts) != partition.sha256:
            raise UserError(f"{path}: the indices do not have the SHA-256 that the file names; draw it again")
        return partition


def fingerprint(parts: list[numpy.ndarray]) -> str:
    """Return the SHA-256 of a partition: for each client its number of examples and its indices, int64."""
    sizes = numpy.array([len(part) for part in parts], dtype="<i8")
    return sha256(sizes.tobytes() + b"".join(numpy.asarray(part, dtype="<i8").tobytes() for part in parts))
