"""Transfers between the host and a device: here the device is the CPU, through the same buffers."""

import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st
from test_methods import CASES, defaults

from fedlm.base import staging
from fedlm.exchange import payload

CPU = torch.device("cpu")
KINDS = [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool]


@st.composite
def tensors(draw):
    """Return some tensors, empty ones and such without a dimension among them."""
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=8))
    return [(torch.rand(shape) * 9).to(draw(st.sampled_from(KINDS))) for shape in shapes]


@given(tensors(), st.integers(1, 30))
def test_every_value_arrives(values, room):
    buffers = staging.Buffers(CPU, 8 * room)
    for _ in range(2):  # the buffers hold what came before
        found = buffers.read(values)
        targets = [torch.full_like(value, 1) for value in values]
        buffers.write(zip(targets, values, strict=True))
        for value, copy, target in zip(values, found, targets, strict=True):
            assert copy.dtype == value.dtype and torch.equal(copy, value) and torch.equal(target, value)
            assert not value.numel() or copy.data_ptr() != value.data_ptr()


def test_many_small_tensors_cross_in_one_copy_and_a_large_one_in_pieces(monkeypatch):
    lengths = []
    buffers = staging.Buffers(CPU, 400)
    monkeypatch.setattr(buffers, "_started", lambda number: lengths.append(number))
    buffers.read([torch.rand(10) for _ in range(10)])
    assert lengths == [1]
    lengths.clear()
    buffers.read([torch.rand(10), torch.rand(250), torch.rand(41)])
    assert lengths == [0, 1, 0, 1]  # 301 values, 100 a buffer; one buffer is filled while the other is read


def test_values_are_converted_to_the_type_of_their_target():
    target, value = torch.zeros(3, dtype=torch.bfloat16), torch.tensor([1.0, 2.5, 3.0])
    staging.Buffers(CPU, 64).write([(target, value)])
    assert target.tolist() == [1.0, 2.5, 3.0]


@pytest.fixture
def away(monkeypatch):
    """Treat tensors of the CPU as those of a device with small buffers; return the number of copies."""
    copies = []
    start = staging.Buffers._started
    monkeypatch.setattr(staging, "is_away", lambda tensor: not tensor.is_meta)
    monkeypatch.setattr(staging, "ROOM", 3000)
    monkeypatch.setattr(
        staging.Buffers, "_started", lambda self, number: (copies.append(number), start(self, number))
    )
    staging.buffers.cache_clear()
    yield copies
    staging.buffers.cache_clear()


def final(run) -> str:
    return payload.encode(run.server.tensors).sha256()


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({method for method, _ in CASES}))
def test_a_run_has_the_same_bits_through_buffers(method, place, request):
    plain = worlds.federation(method, place, **defaults(method, {}))
    plain.run()
    copies = request.getfixturevalue("away")
    staged = worlds.federation(method, place, **defaults(method, {}))
    staged.run()
    assert final(staged) == final(plain) and staged.test == plain.test
    assert copies


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"weights": "bfloat16"}},
        {"payload": "bfloat16"},
        {"upload_compression": {"operator": "sparse", "density": 0.1, "error_feedback": True}},
        {"upload_compression": {"operator": "low_rank", "rank": 2}},
        {"moments": "client"},
    ],
    ids=lambda options: "-".join(map(str, [*options, *options.values()]))[:30],
)
def test_so_it_is_with_half_precision_reduced_uploads_and_moments(options, place, request):
    plain = worlds.federation("fedavg", place, **options)
    plain.run()
    copies = request.getfixturevalue("away")
    staged = worlds.federation("fedavg", place, **options)
    staged.run()
    assert final(staged) == final(plain) and copies
    assert staged.instruments.memory == plain.instruments.memory
