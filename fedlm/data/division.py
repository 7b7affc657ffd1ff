"""Drawing a partition: training examples are divided among clients.

A partition is a list of index arrays, one per client. It is drawn from the stream (seed, "partition"), so it
depends on the scheme, the number of clients, the data and the seed, and never on the method: all methods are
compared on the same clients. Every training example goes to exactly one client.

No client is empty. A scheme with strong skew may leave a client with fewer than `min_examples` examples; it
then receives examples, one at a time, from whichever client is the largest at that moment. How many moved is
recorded in the partition file. A study with fewer examples than `clients * min_examples` is an error.
"""

import heapq

import numpy

from fedlm.base.errors import UserError
from fedlm.base.randomness import numpy_stream
from fedlm.data.schemes import PartitionConfig, check

# A Dirichlet distribution with this alpha is uniform to nine digits; larger ones overflow in sums.
LARGEST_ALPHA = 1e18


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
    return draw(config, clients, labels, groups, seed, indices)[0]


def draw(
    config: PartitionConfig,
    clients: int,
    labels: numpy.ndarray,
    groups: numpy.ndarray | None,
    seed: int,
    indices: numpy.ndarray,
) -> tuple[list[numpy.ndarray], int]:
    """Return the result of `divide`, and how many examples were moved to clients that had too few."""
    # Sorted, so that the draw depends on the set of examples and not on their order.
    indices = numpy.sort(numpy.asarray(indices, dtype=numpy.int64))
    if config.scheme == "pooled":
        if not len(indices):
            raise UserError("there are no training examples to divide")
        return [indices], 0

    stream = numpy_stream(seed, "partition")
    kinds, kind = numpy.unique(numpy.asarray(labels)[indices], return_inverse=True)
    if groups is None:
        group, num_groups = numpy.empty(0, numpy.int64), 0  # `check` refuses what needs them
    else:
        names, group = numpy.unique(numpy.asarray(groups)[indices], return_inverse=True)
        num_groups = len(names)
    check(config, clients, len(indices), len(kinds), num_groups)

    # Each scheme returns positions in `indices`, in random order within a client.
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
    """Cut an array into pieces of these shares; rounding errors do not accumulate."""
    ends = numpy.rint(numpy.cumsum(shares)[:-1] * len(positions)).astype(numpy.int64)
    return numpy.split(positions, numpy.clip(ends, 0, len(positions)))


def _join(pieces: list[list[numpy.ndarray]], stream: numpy.random.Generator) -> list[numpy.ndarray]:
    """Join each client's pieces in random order, so that examples moved from it later are a random draw."""
    empty = numpy.empty(0, dtype=numpy.int64)
    return [stream.permutation(numpy.concatenate([empty, *some])) for some in pieces]


def _label_shares(
    kind: numpy.ndarray, clients: int, alpha: float, stream: numpy.random.Generator
) -> list[numpy.ndarray]:
    pieces: list[list[numpy.ndarray]] = [[] for _ in range(clients)]
    for label in range(kind.max() + 1):
        positions = stream.permutation(numpy.flatnonzero(kind == label))
        shares = _dirichlet(numpy.full(clients, alpha), stream)
        for client, piece in enumerate(_cut(positions, shares)):
            pieces[client].append(piece)
    return _join(pieces, stream)


def _label_mixes(
    kind: numpy.ndarray, clients: int, alpha: float, stream: numpy.random.Generator
) -> list[numpy.ndarray]:
    stock = [stream.permutation(numpy.flatnonzero(kind == label)) for label in range(kind.max() + 1)]
    left = numpy.array([len(positions) for positions in stock])
    frequencies = left / left.sum()
    sizes = [len(piece) for piece in numpy.array_split(numpy.arange(len(kind)), clients)]
    pieces: list[list[numpy.ndarray]] = [[] for _ in range(clients)]
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


def _few_labels(
    kind: numpy.ndarray, clients: int, labels_per_client: int, stream: numpy.random.Generator
) -> list[numpy.ndarray]:
    num_labels = kind.max() + 1
    owners: list[list[int]] = [[] for _ in range(num_labels)]
    for client in stream.permutation(clients):
        order = sorted(stream.permutation(num_labels), key=lambda label: len(owners[label]))
        for label in order[:labels_per_client]:
            owners[label].append(client)
    pieces: list[list[numpy.ndarray]] = [[] for _ in range(clients)]
    for label in range(num_labels):
        positions = stream.permutation(numpy.flatnonzero(kind == label))
        for client, piece in zip(
            owners[label], numpy.array_split(positions, len(owners[label])), strict=True
        ):
            pieces[client].append(piece)
    return _join(pieces, stream)


def _natural(group: numpy.ndarray, clients: int, stream: numpy.random.Generator) -> list[numpy.ndarray]:
    members = [stream.permutation(numpy.flatnonzero(group == name)) for name in range(group.max() + 1)]
    if clients <= len(members):
        held: list[list[int]] = [[] for _ in range(clients)]
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
    fullest: list[tuple[float, int]] = [(-len(some), name) for name, some in enumerate(members)]
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
    """Move single examples from the largest client (the first of several) to those that have too few."""
    held = [list(part) for part in parts]
    moved = 0
    largest = [(-len(part), client) for client, part in enumerate(held)]
    heapq.heapify(largest)
    for part in held:
        while len(part) < min_examples:
            # There are enough examples for all, so the largest client has more than it needs.
            size, client = heapq.heappop(largest)
            if -size == len(held[client]):
                part.append(held[client].pop())
                moved += 1
            heapq.heappush(largest, (-len(held[client]), client))
    return [numpy.array(part, dtype=numpy.int64) for part in held], moved
