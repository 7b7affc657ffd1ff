"""Partitions: every example to exactly one client, no client empty, same draw every time, measured skew."""

import json
import subprocess
import sys

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.data import partition
from fedlm.data.division import divide
from fedlm.data.partition import PartitionFile, count_labels, skew
from fedlm.data.schemes import check, parse

SCHEMES = [
    {"scheme": "pooled"},
    {"scheme": "iid"},
    {"scheme": "dirichlet", "alpha": 0.1},
    {"scheme": "dirichlet", "alpha": 0.1, "sizes": "equal"},
    {"scheme": "dirichlet", "alpha": 1e-300},
    {"scheme": "dirichlet", "alpha": 1e-300, "sizes": "equal"},
    {"scheme": "dirichlet", "alpha": 1e300},
    {"scheme": "labels", "labels_per_client": 2},
    {"scheme": "quantity", "alpha": 0.2},
    {"scheme": "natural"},
]
NAMES = ["-".join(str(value) for value in scheme.values()) for scheme in SCHEMES]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)


def pool(examples=1200, num_labels=2, num_groups=4, seed=0):
    """Labels, groups, and the indices of a training split that is not the whole pool and not in order."""
    generator = numpy.random.default_rng(seed)
    labels = generator.integers(0, num_labels, examples)
    groups = generator.integers(0, num_groups, examples)
    return labels, groups, generator.permutation(examples)[: examples * 3 // 4]


@settings(max_examples=150)
@given(
    scheme=st.sampled_from(SCHEMES),
    min_examples=st.integers(1, 4),
    clients=st.integers(1, 40),
    num_labels=st.integers(2, 12),
    num_groups=st.integers(1, 9),
    examples=st.integers(60, 400),
    seed=st.integers(0, 2**31),
)
def test_every_example_goes_to_exactly_one_client_and_no_client_is_empty(
    scheme, min_examples, clients, num_labels, num_groups, examples, seed
):
    labels, groups, indices = pool(examples, num_labels, num_groups, seed % 7)
    pooled = scheme["scheme"] == "pooled"
    config = parse(scheme if pooled else scheme | {"min_examples": min_examples})
    try:
        parts = divide(config, clients, labels, groups, seed, indices)
    except UserError:
        too_few = len(indices) < clients * min_examples
        impossible_labels = scheme["scheme"] == "labels" and clients * 2 < len(numpy.unique(labels[indices]))
        assert too_few or impossible_labels
        return
    assert len(parts) == (1 if pooled else clients)
    assert numpy.array_equal(numpy.sort(numpy.concatenate(parts)), numpy.sort(indices))
    for part in parts:
        assert part.dtype == numpy.int64
        assert numpy.all(numpy.diff(part) > 0)
        assert len(part) >= (1 if pooled else min_examples)


@every_scheme
def test_the_draw_depends_on_the_seed_and_on_nothing_else(scheme):
    labels, groups, indices = pool()
    config = parse(scheme)
    first = divide(config, 24, labels, groups, 5, indices)
    numpy.random.seed(1)  # the global generator must not matter
    numpy.random.random(7)
    again = divide(config, 24, labels, groups, 5, indices[::-1])
    assert partition.fingerprint(first) == partition.fingerprint(again)
    other = divide(config, 24, labels, groups, 6, indices)
    assert (partition.fingerprint(first) == partition.fingerprint(other)) == (scheme["scheme"] == "pooled")


def test_dirichlet_with_two_labels_a_tenth_and_24_clients_works_for_many_seeds():
    labels, groups, indices = pool()
    for seed in range(200):
        parts = divide(parse({"scheme": "dirichlet", "alpha": 0.1}), 24, labels, groups, seed, indices)
        assert min(map(len, parts)) >= 1
        assert sum(map(len, parts)) == len(indices)


@pytest.mark.parametrize("sizes", ["free", "equal"])
def test_smaller_alpha_means_more_label_skew(sizes):
    labels, groups, indices = pool(4000, num_labels=5)
    divergence = [
        numpy.mean(
            [
                skew(
                    divide(
                        parse({"scheme": "dirichlet", "alpha": alpha, "sizes": sizes}),
                        10,
                        labels,
                        groups,
                        seed,
                        indices,
                    ),
                    labels,
                )["label_divergence"]
                for seed in range(10)
            ]
        )
        for alpha in (100, 1, 0.3, 0.1, 0.01)
    ]
    assert divergence == sorted(divergence)
    assert divergence[0] < 0.02 < 0.4 < divergence[-1]


def test_dirichlet_of_equal_sizes_is_skewed_in_labels_only():
    labels, groups, indices = pool(4000, num_labels=5)
    config = parse({"scheme": "dirichlet", "alpha": 0.1, "sizes": "equal"})
    parts = divide(config, 24, labels, groups, 0, indices)
    assert {len(part) for part in parts} == {125}
    assert skew(parts, labels)["label_divergence"] > 0.3


def test_iid_sizes_differ_by_at_most_one_and_labels_hardly_diverge():
    labels, groups, indices = pool(5000, num_labels=5)
    parts = divide(parse({"scheme": "iid"}), 13, labels, groups, 3, indices)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert skew(parts, labels)["label_divergence"] < 0.01


@settings(max_examples=60)
@given(
    clients=st.integers(1, 30),
    labels_per_client=st.integers(1, 6),
    num_labels=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_labels_gives_each_client_exactly_k_labels_and_each_label_its_owners(
    clients, labels_per_client, num_labels, seed
):
    assume(labels_per_client <= num_labels <= clients * labels_per_client)
    labels = numpy.repeat(numpy.arange(num_labels), 40)
    indices = numpy.arange(len(labels))
    config = parse({"scheme": "labels", "labels_per_client": labels_per_client})
    parts = divide(config, clients, labels, None, seed, indices)
    held = count_labels(parts, labels, num_labels) > 0
    assert numpy.all(held.sum(axis=1) == labels_per_client)
    owners = held.sum(axis=0)
    assert owners.min() >= 1
    assert owners.max() - owners.min() <= 1


def test_natural_with_as_many_clients_as_groups_is_the_groups():
    labels, groups, indices = pool()
    parts = divide(parse({"scheme": "natural"}), 4, labels, groups, 0, indices)
    for group, part in enumerate(parts):
        assert numpy.array_equal(part, numpy.sort(indices[groups[indices] == group]))


def test_natural_with_fewer_clients_merges_whole_groups_evenly():
    groups = numpy.repeat([0, 1, 2, 3, 4], [100, 90, 40, 30, 20])
    parts = divide(parse({"scheme": "natural"}), 2, numpy.zeros(280, dtype=int), groups, 0, numpy.arange(280))
    assert [sorted(set(groups[part])) for part in parts] == [[0, 3, 4], [1, 2]]
    assert all(numpy.sum(numpy.isin(groups, groups[part])) == len(part) for part in parts)


def test_natural_with_more_clients_splits_the_largest_groups_and_mixes_none():
    groups = numpy.repeat([0, 1, 2], [60, 30, 10])
    parts = divide(
        parse({"scheme": "natural"}), 10, numpy.zeros(100, dtype=int), groups, 0, numpy.arange(100)
    )
    assert [len(part) for part in parts] == [10] * 10
    assert [set(groups[part].tolist()) for part in parts] == [{0}] * 6 + [{1}] * 3 + [{2}]


def test_examples_move_from_the_largest_client_and_are_counted():
    labels = numpy.zeros(100, dtype=int)
    made = PartitionFile.make(
        parse({"scheme": "dirichlet", "alpha": 1e-300, "min_examples": 3}),
        5,
        labels,
        None,
        0,
        numpy.arange(100),
        task="t",
        partition="p",
        data_sha256="0",
    )
    # One label and such an alpha: one client gets everything, the four others are filled up to three each.
    assert sorted(map(len, made.parts)) == [3, 3, 3, 3, 88]
    assert made.moved == 12


@pytest.mark.parametrize(
    ("scheme", "clients", "words"),
    [
        ({"scheme": "iid"}, 901, "901 training examples, but there are 900"),
        ({"scheme": "iid", "min_examples": 10}, 91, "enough for 90 clients"),
        ({"scheme": "iid"}, 0, "clients: 0"),
        ({"scheme": "labels", "labels_per_client": 3}, 5, "labels_per_client: 3.*allowed: 1 to 2"),
        ({"scheme": "labels", "labels_per_client": 1}, 1, "at least 2 labels per client"),
    ],
)
def test_what_cannot_be_divided_is_an_error_that_names_the_key(scheme, clients, words):
    labels, groups, indices = pool()
    with pytest.raises(UserError, match=words):
        divide(parse(scheme), clients, labels, groups, 0, indices)


def test_natural_needs_groups():
    labels, _, indices = pool()
    with pytest.raises(UserError, match="no natural populations"):
        divide(parse({"scheme": "natural"}), 4, labels, None, 0, indices)
    with pytest.raises(UserError, match="no natural populations"):
        check(parse({"scheme": "natural"}), 4, num_groups=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scheme": "dirichlet"},
        {"scheme": "dirichlet", "alpha": 0},
        {"scheme": "dirichlet", "alpha": -1},
        {"scheme": "dirichlet", "alpha": float("inf")},
        {"scheme": "dirichlet", "alpha": float("nan")},
        {"scheme": "labels", "labels_per_client": 0},
        {"scheme": "iid", "alpha": 1},
        {"scheme": "iid", "min_examples": 0},
        {"scheme": "unknown"},
        {},
    ],
)
def test_wrong_settings_are_rejected(wrong):
    with pytest.raises(ValidationError):
        parse(wrong)


def test_skew_of_known_cases():
    labels = numpy.array([0, 0, 0, 0, 1, 1, 1, 1])
    same = skew([numpy.array([0, 1, 4, 5]), numpy.array([2, 3, 6, 7])], labels)
    assert same["label_divergence"] == pytest.approx(0, abs=1e-12)
    assert same["size_gini"] == 0
    apart = skew([numpy.arange(4), numpy.arange(4, 8)], labels)
    # A client of one label against a half-half mixture: H(3/4) - H(1/2)/2 - 0 bits.
    expected = -(0.75 * numpy.log2(0.75) + 0.25 * numpy.log2(0.25)) - 0.5
    assert apart["label_divergence"] == pytest.approx(expected)
    assert apart["labels_per_client"] == 1
    uneven = skew([numpy.array([0]), numpy.array([1]), numpy.arange(2, 8)], labels)
    assert uneven["size_gini"] == pytest.approx((2 * (1 + 2 + 18) - 4 * 8) / (3 * 8))
    assert (uneven["smallest_client"], uneven["median_client"], uneven["largest_client"]) == (1, 1, 6)


@settings(max_examples=60)
@given(
    counts=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3).filter(sum), min_size=1, max_size=12)
)
def test_skew_equals_the_textbook_formulas(counts):
    from scipy.spatial.distance import jensenshannon

    counts = numpy.array(counts)
    labels = numpy.concatenate([numpy.repeat(numpy.arange(3), row) for row in counts])
    parts = numpy.split(numpy.arange(len(labels)), numpy.cumsum(counts.sum(axis=1))[:-1])
    sizes = counts.sum(axis=1)
    together = counts.sum(axis=0) / sizes.sum()
    divergence = [jensenshannon(row / row.sum(), together, base=2) ** 2 for row in counts]
    pairs = numpy.abs(sizes[:, None] - sizes[None, :]).sum()
    measured = skew(parts, labels, 3)
    assert measured["label_divergence"] == pytest.approx(numpy.average(divergence, weights=sizes), abs=1e-7)
    assert measured["size_gini"] == pytest.approx(pairs / (2 * len(sizes) * sizes.sum()))


def make_file(**changes):
    labels, groups, indices = pool()
    arguments = {
        "config": parse({"scheme": "dirichlet", "alpha": 0.3}),
        "clients": 6,
        "labels": labels,
        "groups": groups,
        "seed": 3,
        "indices": indices,
        "task": "reviews",
        "partition": "skewed",
        "data_sha256": "ab",
        "label_names": ["bad", "good"],
        "group_names": ["a", "b", "c", "d"],
    }
    return PartitionFile.make(**(arguments | changes)), labels, groups, indices


def test_partition_file_comes_back_as_it_was_written_and_twice_the_same_bytes(tmp_path):
    made, labels, groups, indices = make_file()
    made.write(tmp_path / "one.json")
    make_file()[0].write(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    read = PartitionFile.read(tmp_path / "one.json")
    assert read == made
    expected = divide(made.config, 6, labels, groups, 3, indices)
    assert all(numpy.array_equal(one, other) for one, other in zip(read.parts, expected, strict=True))
    assert read.label_counts == count_labels(expected, labels, 2).tolist()
    assert numpy.sum(read.group_counts) == len(indices) == read.examples


def test_partition_file_without_label_names_numbers_them():
    made, *_ = make_file(label_names=[], groups=None)
    assert made.label_names == ["0", "1"]
    assert made.group_names == [] and made.group_counts == []


def test_damaged_partition_files_are_recognised(tmp_path):
    made, *_ = make_file()
    path = tmp_path / "seed3.json"
    made.write(path)
    whole = path.read_text()
    document = json.loads(whole)
    document["indices"][0][0] += 1
    for damaged in (
        whole[: len(whole) // 2],
        "",
        "[]",
        json.dumps(document),
        whole.replace('"seed"', '"sead"'),
    ):
        path.write_text(damaged)
        with pytest.raises(UserError, match="seed3.json"):
            PartitionFile.read(path)
    with pytest.raises(UserError, match="no such partition"):
        PartitionFile.read(tmp_path / "absent.json")


@pytest.mark.slow
def test_ten_thousand_clients_are_divided_in_seconds():
    labels, groups, indices = pool(60_000, num_labels=3, num_groups=50)
    for scheme in SCHEMES[1:]:
        parts = divide(parse(scheme), 10_000, labels, groups, 0, indices)
        assert len(parts) == 10_000


def test_partitions_need_no_torch():
    code = "import sys, fedlm.data.partition; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_dirichlet_is_as_skewed_as_that_of_flwr_datasets():
    """Where flwr-datasets is installed (it is not in the lock): the same mean divergence over draws."""
    partitioner = pytest.importorskip("flwr_datasets.partitioner")
    datasets = pytest.importorskip("datasets")
    labels, groups, _ = pool(4000, num_labels=10)
    indices = numpy.arange(len(labels))
    ours, theirs = [], []
    for seed in range(20):
        config = parse({"scheme": "dirichlet", "alpha": 0.5})
        ours.append(skew(divide(config, 10, labels, groups, seed, indices), labels)["label_divergence"])
        their = partitioner.DirichletPartitioner(
            10, "label", alpha=0.5, min_partition_size=1, self_balancing=False, seed=seed
        )
        their.dataset = datasets.Dataset.from_dict({"label": labels, "index": indices})
        parts = [numpy.array(their.load_partition(client)["index"]) for client in range(10)]
        theirs.append(skew(parts, labels)["label_divergence"])
    assert numpy.mean(ours) == pytest.approx(numpy.mean(theirs), rel=0.1)
