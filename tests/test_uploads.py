"""Reduced uploads: what is sent is counted as it is, and what is not sent is not lost."""

import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from test_config import changed, faults
from test_doors import final, predicted, ran

from fedlm.exchange import payload
from fedlm.exchange.compression import LowRankUpload, SparseUpload
from fedlm.exchange.payload import LowRank, PayloadError, Sparse, decode, encode, size
from fedlm.exchange.uploads import Outgoing, largest, power_iteration

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"a": (12, 8), "b": (5,), "c": (3, 4, 6)}
SPARSE = {"operator": "sparse", "density": 0.1}
LOW_RANK = {"operator": "low_rank", "rank": 1, "least_rate": 2.0}


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def sent(settings, values, received, kept, precision="float32"):
    """Send an upload; return what arrives, and let the client keep what it keeps."""
    outgoing = Outgoing(values, received, kept, settings, 1)
    message = encode(outgoing.sent, precision)
    assert len(message) == len(bytes(message)) == size(outgoing.sent, precision)
    arrived = decode(bytes(message), received, own=True, known=outgoing.known)
    kept.update(outgoing.rest(arrived))
    return arrived, outgoing


@given(
    st.sampled_from(
        [SparseUpload(density=0.05), SparseUpload(density=0.6), LowRankUpload(rank=1, least_rate=0)]
    ),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 4),
)
def test_what_arrived_and_what_is_kept_sum_to_the_true_change(settings, precision, turns):
    """Over any number of turns, whatever the precision of the payload."""
    kept: dict = {}
    total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for turn in range(turns):
        received = {name: value.to(torch.bfloat16).float() for name, value in drawn(2 * turn).items()}
        values = {n: received[n] + change for n, change in drawn(2 * turn + 1).items()}
        arrived, _ = sent(settings, values, received, kept, precision)
        for name in SHAPES:
            total[name] += (values[name] - received[name]) - (arrived[name] - received[name])
    for name in SHAPES:
        rest = kept.get(f"{name}@rest", torch.zeros(SHAPES[name]))
        # A vector that is sent in full is rounded to the payload's precision, as in any upload.
        bound = 1e-5 if f"{name}@rest" in kept or precision == "float32" else 0.1
        assert torch.allclose(total[name], rest, atol=bound), name


def test_without_error_feedback_nothing_is_kept_but_the_next_start():
    kept: dict = {}
    sent(SparseUpload(density=0.1, error_feedback=False), drawn(1), drawn(0), kept)
    assert not kept
    sent(LowRankUpload(rank=1, least_rate=0, error_feedback=False), drawn(1), drawn(0), kept)
    assert kept.keys() == {"a@right", "c@right"}


@given(st.floats(0.01, 1.0), st.integers(0, 50))
def test_a_sparse_upload_changes_the_largest_elements_of_all_tensors_together(density, seed):
    received, values = drawn(seed), drawn(seed + 1000)
    settings = SparseUpload(density=density)
    arrived, outgoing = sent(settings, values, received, {})
    count = settings.count(sum(value.numel() for value in values.values()))
    moved = torch.cat([(arrived[name] - received[name]).abs().flatten() for name in values])
    wanted = torch.cat([(values[name] - received[name]).abs().flatten() for name in values])
    assert int((moved > 0).sum()) == count == outgoing.sent["*"].kept
    assert torch.equal(moved > 0, wanted >= wanted.sort(descending=True).values[count - 1])
    for name, value in arrived.items():  # what arrives is the client's value, bit for bit
        here = value != received[name]
        assert torch.equal(value[here], values[name][here])


def test_at_density_one_everything_arrives_bit_for_bit():
    arrived, _ = sent(SparseUpload(density=1.0), values := drawn(1), drawn(0), {})
    assert all(torch.equal(arrived[name], values[name]) for name in values)


@given(st.integers(1, 400), st.data())
def test_positions_travel_in_the_shorter_form_and_cost_what_they_are(elements, data):
    count = data.draw(st.integers(1, elements))
    values = {"v": torch.arange(1.0, elements + 1)}
    mask = largest(values.values(), count)
    sparse = Sparse(values, mask, count)
    parts = encode({"*": sparse}).parts
    positions = min(4 * count, -(-elements // 8))
    assert sum(part.nbytes for part in parts.values()) == 4 * count + positions
    empty = {"v": torch.empty(elements, device="meta")}
    without = Sparse(empty, torch.empty(elements, dtype=torch.bool, device="meta"), count)
    assert len(encode({"*": without})) == len(encode({"*": sparse})) == size({"*": sparse})


@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=1, max_size=30), st.data())
def test_of_equal_elements_the_first_are_chosen(values, data):
    count = data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda place: (-abs(values[place]), place))
    found = largest([torch.tensor(values)], count).nonzero().flatten().tolist()
    assert found == sorted(order[:count])


def test_what_is_not_a_number_is_sent_so_that_the_server_sees_it():
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    assert largest([values], 2).tolist() == [False, True, False, True]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_a_full_rank_is_exact(rows, columns, seed):
    change = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rank = LowRankUpload(rank=100, least_rate=0).rank_of((rows, columns))
    if rank is None:  # one row or column: its factor would be larger than the vector itself
        return
    start = torch.randn(columns, rank, generator=torch.Generator().manual_seed(seed + 1))
    factors = power_iteration(change.double(), start.double(), 1)
    assert torch.allclose(factors.left @ factors.right.T, change.double(), atol=1e-6)


def test_repeated_from_the_last_factor_it_finds_the_best_approximation():
    """Warm start: on the same matrix the error falls to that of the singular value decomposition."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(20, 10, generator=generator)).Q for _ in range(2))
    singular = 2.0 ** -torch.arange(10)
    change = u * singular @ v.T
    right, errors = torch.randn(20, 2, generator=generator), []
    for _ in range(12):
        factors = power_iteration(change, right, 1)
        right = factors.right
        errors.append(float((change - factors.left @ factors.right.T).norm()))
    best = float(singular[2:].norm())
    assert errors[0] >= best - 1e-6 and errors[-1] == pytest.approx(best, rel=1e-4)
    assert torch.allclose(factors.left.T @ factors.left, torch.eye(2), atol=1e-5)
    recovered = power_iteration(change, torch.zeros(20, 2), 4)  # a turn without a change must not end it
    assert float((change - recovered.left @ recovered.right.T).norm()) < float(change.norm())


def test_the_papers_sizes():
    """Rank 2 with 4 iterations in FedCyBGD's package sends as much as rank 4 here: 4 (rows + columns)."""
    rule = LowRankUpload(rank=4, least_rate=10)
    assert [rule.rank_of(s) for s in ((768, 768), (768, 3072), (2, 768), (768,))] == [4, 4, None, None]
    assert rule.rank_of((80, 80)) is None and rule.rank_of((80, 81)) == 4  # strictly more than 10
    outgoing = Outgoing({"w": torch.ones(768, 3072)}, {"w": torch.zeros(768, 3072)}, {}, rule, 1)
    assert sum(part.nbytes for part in encode(outgoing.sent).parts.values()) == 4 * 4 * (768 + 3072)


KNOWN = {"a": torch.zeros(4, 8), "b": torch.zeros(8)}
BITS = torch.zeros(5, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"*#chosen": torch.ones(1)}, "positions as bits or as indices"),
        ({"*#bits": BITS}, "stray part '*#bits'"),
        ({"*#bits": BITS, "*#chosen": torch.ones(1)}, "1 values for 0 positions"),
        ({"*#bits": BITS[:4], "*#chosen": torch.ones(0)}, "mask of 4 bytes; expected 5"),
        ({"*#bits": BITS, "*#indices": BITS.int(), "*#chosen": torch.ones(0)}, "as bits or as indices"),
        ({"*#indices": torch.tensor([40]).int(), "*#chosen": torch.ones(1)}, "rising indices below 40"),
        ({"*#indices": torch.tensor([-1]).int(), "*#chosen": torch.ones(1)}, "rising indices below 40"),
        ({"*#indices": torch.tensor([3, 3]).int(), "*#chosen": torch.ones(2)}, "rising indices"),
        ({"*#indices": torch.tensor([3]).int(), "*#chosen": torch.ones(2)}, "2 values for 1 positions"),
        ({"a#left": torch.ones(4, 2)}, "a: expected factors of 4 and 8 rows"),
        ({"a#left": torch.ones(4, 2), "a#right": torch.ones(8, 3)}, "a: expected factors"),
        ({"a#left": torch.ones(5, 2), "a#right": torch.ones(8, 2)}, "a: expected factors"),
        ({"a#right": torch.ones(8, 2)}, "a: stray part 'right'"),
        ({"n#left": torch.ones(4, 2), "n#right": torch.ones(8, 2)}, "n: stray part 'left'"),
    ],
)
def test_a_bad_message_is_named(parts, reason):
    with pytest.raises(PayloadError) as error:
        decode(save(parts), {**KNOWN, "n": torch.zeros(4, 8)}, known=KNOWN)
    assert reason in str(error.value)


def test_a_form_without_values_has_the_same_length():
    real = {"w": LowRank(torch.ones(6, 2), torch.ones(10, 2))}
    empty = {"w": LowRank(*(torch.empty(n, 2, device="meta") for n in (6, 10)))}
    assert len(encode(real)) == len(encode(empty)) == size(empty)
    assert payload.changed(real | {"v": torch.ones(2)}) == ["w"]


@pytest.mark.slow
def test_sparse_at_density_one_is_no_reduction_bit_for_bit(place):
    for method in ("fedavg", "fedcybgd"):
        whole = ran(method, place, upload_compression={"operator": "sparse", "density": 1.0})
        assert final(whole) == final(ran(method, place))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedcybgd", "scaffold", "fedlora"])
@pytest.mark.parametrize("reduction", [SPARSE, LOW_RANK], ids=lambda values: values["operator"])
def test_prediction_and_record_agree_and_uploads_are_smaller(method, reduction, place):
    options = {"variant": "fedsa"} if method == "fedlora" else {}
    run = ran(method, place, upload_compression=reduction, **options)
    found = predicted(run, place)
    assert (found.upload_bytes, found.download_bytes) == (run.ledger.upload, run.ledger.download)
    assert found.flops == run.flops
    kept = sum(
        value.nbytes for state in run.server.kept.handles.values() for value in map(_loaded, state.values())
    )
    assert found.kept_bytes == kept > 0
    plain = ran(method, place, **options)
    assert run.ledger.upload < plain.ledger.upload and run.ledger.download == plain.ledger.download
    assert run.instruments.memory.keys() == plain.instruments.memory.keys()
    for label, memory in run.instruments.memory.items():
        assert memory.peak == plain.instruments.memory[label].peak


def _loaded(value):
    return value.load() if hasattr(value, "load") else value


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [SPARSE, LOW_RANK], ids=lambda values: values["operator"])
def test_a_run_that_was_cut_off_ends_with_the_same_bytes(reduction, place, tmp_path):
    """What clients keep of earlier messages is in the checkpoint."""
    options = {"rounds": 3, "upload_compression": reduction, "federation": {"participation": 0.7}}
    whole = ran("fedcybgd", place, **options)
    again, _ = worlds.resumed("fedcybgd", place, tmp_path, **options)
    assert final(again) == final(whole) != final(ran("fedcybgd", place, rounds=3))


@pytest.mark.slow
def test_fedcybgd_with_powersgd_sends_its_blocks_matrices_as_factors(place):
    """And its vectors and the head in full; blocks that are not trained stay as they are, bit for bit."""
    reduction = {"operator": "low_rank", "rank": 2, "least_rate": 1.5}
    run = ran("fedcybgd", place, clients=2, rounds=1, upload_compression=reduction)
    trained = run.method.trainable(0, 1)
    rule, shapes = LowRankUpload(**reduction), {name: run.server.initial[name].shape for name in trained}
    ranks = {name: rule.rank_of(shape) for name, shape in shapes.items()}
    assert {name.split(".")[-1] for name, rank in ranks.items() if rank} == {"weight"}
    assert all(bool(rank) == ("layer" in name and len(shapes[name]) == 2) for name, rank in ranks.items())
    by_hand = {
        name: torch.empty(shape) if not ranks[name] else LowRank(*(torch.empty(n, 2) for n in shape))
        for name, shape in shapes.items()
    }
    assert run.ledger.upload == 2 * size(by_hand)
    kept = run.server.kept.get(0)
    assert {name.partition("@")[0] for name in kept} == {name for name, rank in ranks.items() if rank}
    last = [name for name in run.method.exchanged if ".2." in name]
    assert last and all(torch.equal(run.server.tensors[n], run.server.initial[n]) for n in last)
    name = next(name for name, rank in ranks.items() if rank)
    change = run.server.tensors[name] - run.server.initial[name]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("fedavg", {"operator": "top"}, "methods.fedavg.upload_compression: "),
        ("fedavg", {"operator": "sparse", "density": 0}, "density: 0; Input should be greater than 0"),
        ("fedavg", {"operator": "sparse", "rank": 1}, "rank: unknown key"),
        (
            "fedlora",
            {"operator": "low_rank"},
            "low_rank of rank 4 finds no matrix that its factors make smaller",
        ),
        ("head_only", {"operator": "low_rank"}, "head_only: upload_compression: low_rank of rank 4 finds no"),
    ],
)
def test_bad_settings_are_refused_before_any_job(method, values, message):
    found = faults(changed(methods={method: {"upload_compression": values}}))
    assert any(message in fault for fault in found), found
