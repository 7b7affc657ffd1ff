"""Payloads: the bytes are what the size says, and a bad message is refused by name."""

import hashlib

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from fedlm.exchange import payload
from fedlm.exchange.declared import Declared
from fedlm.exchange.payload import PayloadError, Pruned, Quantized, decode, encode, size

KINDS = [torch.float32, torch.bfloat16, torch.float16]
KINDS += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
entries = st.dictionaries(
    st.text(st.characters(exclude_characters="#", exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.tuples(st.sampled_from(KINDS), shapes),
    min_size=1,
    max_size=8,
)


@given(entries, st.sampled_from(list(payload.PRECISIONS)))
def test_bytes_are_those_of_safetensors_and_size_predicts_them(described, precision):
    tensors = {name: torch.ones(shape).to(kind) for name, (kind, shape) in described.items()}
    message = encode(tensors, precision)
    assert len(message) == size(tensors, precision)
    wide = payload.PRECISIONS[precision]
    assert bytes(message) == save({n: t.to(wide) if t.is_floating_point() else t for n, t in tensors.items()})
    assert message.sha256() == hashlib.sha256(bytes(message)).hexdigest()
    for decoded in (
        decode(message, tensors),
        decode(bytes(message), tensors),
        decode(message, tensors, own=True),
    ):
        assert decoded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert decoded[name].dtype == tensor.dtype and torch.equal(decoded[name], tensor)


DECLARED = Declared((None, 2), "int16")


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (torch.zeros(3, 2, dtype=torch.int16), None),
        (torch.zeros(0, 2, dtype=torch.int16), None),
        (torch.zeros(3, 3, dtype=torch.int16), r"m: shape \(3, 3\); expected int16 of shape \(any, 2\)"),
        (torch.zeros(3, dtype=torch.int16), r"m: shape \(3,\); expected int16 of shape \(any, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int32), "m: type torch.int32; expected torch.int16"),
        (torch.zeros(3, 2), "m: type torch.float32; expected torch.int16"),
        (Quantized(torch.ones(3, 2)), "m: in a reduced form; expected int16"),
    ],
    ids=str,
)
def test_what_was_declared_is_what_arrives(sent, fault):
    message = bytes(encode({"m": sent}))
    if fault is None:
        assert torch.equal(decode(message, {"m": DECLARED})["m"], sent)
        return
    with pytest.raises(PayloadError, match=fault):
        decode(message, {"m": DECLARED})


def test_the_empty_payload_is_no_message():
    assert (
        bytes(encode({})) == b""
        and len(encode({})) == 0
        and decode(encode({}), {}) == {}
        and size({}) == 0
        and decode(b"", {"a": torch.zeros(1)}) == {}
    )


@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_pruned_tensors_travel_as_mask_and_values(rows, columns, density, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < density
    message = encode({"w": Pruned(tensor, mask)})
    assert len(message) == size({"w": Pruned(tensor, mask)})
    assert torch.equal(decode(message, {"w": tensor})["w"], tensor * mask)


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from([0, 1]), st.integers(0, 1000))
def test_quantized_tensors_are_within_half_a_step(rows, columns, channels, seed):
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    message = encode({"w": Quantized(tensor, channels)})
    assert len(message) == size({"w": Quantized(tensor, channels)})
    restored = decode(message, {"w": tensor})["w"]
    step = tensor.abs().amax(1 - channels, keepdim=True) / 127
    assert ((restored - tensor).abs() <= step * 0.5001).all()


def test_sizes_are_known_without_values():
    with torch.device("meta"):
        tensor = torch.empty(6, 10)
    expected = size({"w": Pruned(tensor, None, 12), "v": Quantized(tensor, 1)})
    real, mask = torch.randn(6, 10), torch.arange(60).view(6, 10) % 5 == 0
    assert expected == len(encode({"w": Pruned(real, mask), "v": Quantized(real, 1)}))
    parts = {"w": Pruned(tensor, None, 12), "v": Quantized(tensor, 1)}
    assert expected == len(encode(parts))
    assert all(
        v.is_meta and v.shape == (6, 10) for v in decode(encode(parts), {"w": tensor, "v": tensor}).values()
    )


def test_what_is_received_is_shared_or_owned():
    sent = {"a": torch.ones(3), "n": torch.ones(2, dtype=torch.int64)}
    shared, owned = (decode(encode(sent), sent, own=own) for own in (False, True))
    sent["a"].fill_(2), sent["n"].fill_(2)
    assert shared["a"].sum() == 6 and owned["a"].sum() == 3 and owned["n"].sum() == 2


@pytest.mark.parametrize("precision", payload.PRECISIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_values_are_rounded_where_they_are_used(precision, transposed):
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    tensor = tensor.T if transposed else tensor
    rounded = tensor.to(payload.PRECISIONS[precision]).float().clone()
    assert torch.equal(rounded, tensor) == (precision == "float32")
    message = encode({"w": tensor}, precision)
    assert message.parts["w"].tensor.data_ptr() == tensor.data_ptr()
    received, own = payload.receive(message, {"w": tensor}), payload.receive(message, {"w": tensor})
    assert torch.equal(decode(bytes(message), {"w": tensor})["w"], rounded)
    assert torch.equal(received.view("w"), rounded) and torch.equal(dict(received.sent())["w"], rounded)
    own.own_all()
    tensor.zero_()
    assert torch.equal(own["w"], rounded) and not received["w"].any()


@given(entries)
@example({"*": (torch.float32, ())})  # the name that tensors laid together have as well
def test_a_payload_without_values_has_the_same_length_and_shapes(described):
    tensors = {name: torch.ones(shape).to(kind) for name, (kind, shape) in described.items()}
    empty = {name: value.to("meta") for name, value in tensors.items()}
    message = encode(empty)
    assert len(message) == len(encode(tensors))
    decoded = decode(message, empty, own=True)
    assert {n: (v.shape, v.dtype, v.is_meta) for n, v in decoded.items()} == {
        n: (v.shape, v.dtype, True) for n, v in tensors.items()
    }


EXPECTED = {"a": torch.zeros(2, 3), "n": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"x", "not a payload"),
        (b"\xff" * 64, "not a payload"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "not a payload"),
        (bytes(encode({"a": torch.zeros(2, 3)}))[:-1], "not a payload"),
        (encode({"b": torch.zeros(2, 3)}), "unknown tensor 'b'"),
        (encode({"a": torch.zeros(3, 2)}), "a: shape (3, 2); expected (2, 3)"),
        (encode({"a": torch.zeros(2, 3, dtype=torch.int64)}), "a: type"),
        (encode({"n": torch.zeros(2)}), "n: type"),
        (save({"a#mask": torch.zeros(9, dtype=torch.uint8)}), "mask of 9 bytes; expected 1"),
        (save({"a#mask": torch.zeros(1, dtype=torch.uint8)}), "as many values"),
        (save({"a#mask": torch.full((1,), 255, dtype=torch.uint8), "a#values": torch.zeros(7)}), "as many"),
        (save({"a#int8": torch.zeros(2, 3, dtype=torch.int8)}), "2 scales"),
        (save({"a#scale": torch.zeros(2)}), "stray part"),
        (save({"a#other": torch.zeros(2)}), "stray part"),
    ],
)
def test_a_bad_message_is_named(message, reason):
    with pytest.raises(PayloadError) as error:
        decode(message, EXPECTED)
    assert reason in str(error.value)


@given(st.binary(max_size=400))
def test_random_bytes_never_crash(message):
    if message:
        with pytest.raises(PayloadError):
            decode(message, EXPECTED)


VALID = bytes(
    encode({"a": Pruned(torch.ones(2, 3), torch.ones(2, 3) > 0), "n": torch.zeros(2, dtype=torch.int64)})
)


@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(data):
    message = bytearray(VALID)
    for position in data.draw(st.lists(st.integers(0, len(VALID) - 1), min_size=1, max_size=4)):
        message[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(message), EXPECTED)
    except PayloadError:
        return
    assert all(decoded[name].shape == EXPECTED[name].shape for name in decoded)
