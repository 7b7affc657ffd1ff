"""Checkpoints that are damaged or another's are named and never used."""

import json
import os
import signal
import struct

import pytest
import torch
import worlds
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedlm.base.files import sha256
from fedlm.exchange import payload
from fedlm.federation.checkpoint import Checkpoints, remove_checkpoints

TENSORS = {"server/a": torch.arange(6.0).view(2, 3), "server/b": torch.ones(2, dtype=torch.int64)}
PLAIN = {"rounds": [1, 2], "note": "é"}


@pytest.fixture
def lines():
    return []


@pytest.fixture
def checkpoints(tmp_path, lines):
    return Checkpoints(tmp_path / "run", "mine", lines.append)


def written(checkpoints, *rounds):
    for round in rounds:
        checkpoints.save(round, {**TENSORS, "server/round": torch.tensor(round)}, PLAIN)
    return {int(path.name[6:12]): path for path in checkpoints.folder.glob("round-*")}


def test_what_was_saved_comes_back(checkpoints, lines):
    square = torch.arange(4.0).view(2, 2)
    shared = {
        **TENSORS,
        "kept/1/a": TENSORS["server/a"],
        "x": square,
        "turned": square.T,
        "none": torch.ones(0),
    }
    checkpoints.save(3, shared, PLAIN)
    round, tensors, plain = checkpoints.latest()
    assert (round, plain, lines) == (3, PLAIN, [])
    assert tensors.keys() == shared.keys()
    assert all(torch.equal(tensors[name], shared[name]) for name in shared)


def test_shared_tensors_are_stored_once(checkpoints):
    checkpoints.save(1, {"a": torch.ones(10_000)}, {})
    one = written(checkpoints)[1].stat().st_size
    value = torch.ones(10_000)
    checkpoints.save(1, {f"kept/{client}/a": value for client in range(50)}, {})
    assert written(checkpoints)[1].stat().st_size < 1.2 * one


@pytest.mark.slow
def test_the_state_of_very_many_clients_is_read_again(checkpoints):
    """safetensors writes metadata of any size and reads none above 100 MB."""
    checkpoints.save(1, TENSORS, {"seen": "x" * 101_000_000})
    assert len(checkpoints.latest()[2]["seen"]) == 101_000_000


def test_the_newest_two_are_kept(checkpoints):
    assert sorted(written(checkpoints, 1, 2, 3, 4)) == [3, 4]
    assert checkpoints.latest()[0] == 4
    remove_checkpoints(checkpoints.folder)
    assert checkpoints.latest() is None


def test_a_folder_that_is_not_there_has_no_checkpoint(checkpoints, lines):
    assert checkpoints.latest() is None and lines == []


def described(header: dict, tensors=TENSORS) -> bytes:
    """Return a checkpoint file with this header and a right checksum."""
    plain = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    return with_checksum(save({**tensors, "plain": plain}, metadata={"files": "{}"}))


def with_checksum(content: bytes) -> bytes:
    return f"{sha256(content)}\n".encode() + content


HEADER = {"fingerprint": "mine", "round": 2, "aliases": {}, "stored": {}, "state": {}}
DAMAGES = {
    "empty": lambda content: b"",
    "one byte": lambda content: b"\n",
    "digest only": lambda content: content[:65],
    "truncated": lambda content: content[:-1],
    "cut in half": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "first bit flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "header flipped": lambda content: content[:90] + bytes([content[90] ^ 4]) + content[91:],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"this is no checkpoint\n" * 100,
    "nothing in it": lambda content: with_checksum(b""),
    "no length": lambda content: with_checksum(b"abc"),
    "endless header": lambda content: with_checksum(struct.pack("<Q", 1 << 62) + b"{}"),
    "header no JSON": lambda content: with_checksum(struct.pack("<Q", 4) + b"\xff{{["),
    "nested header": lambda content: with_checksum(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "no metadata": lambda content: with_checksum(save(TENSORS)),
    "metadata no JSON": lambda content: with_checksum(save(TENSORS, metadata={"files": "?"})),
    "no state": lambda content: with_checksum(save(TENSORS, metadata={"files": "{}"})),
    "state no JSON": lambda content: with_checksum(
        save({**TENSORS, "plain": torch.full((9,), 63, dtype=torch.uint8)}, metadata={"files": "{}"})
    ),
    "header a list": lambda content: described([]),
    "header empty": lambda content: described({}),
    "state a text": lambda content: described({**HEADER, "state": "no"}),
    "state missing": lambda content: described({k: v for k, v in HEADER.items() if k != "state"}),
    "aliases a number": lambda content: described({**HEADER, "aliases": 3}),
    "aliases lead nowhere": lambda content: described({**HEADER, "aliases": {"a": "nowhere"}}),
    "round a text": lambda content: described({**HEADER, "round": "two"}),
    "round of another": lambda content: described({**HEADER, "round": 7}),
    "round missing": lambda content: described({**HEADER, "round": None}),
    "foreign": lambda content: described({**HEADER, "fingerprint": "another"}),
    "fingerprint a list": lambda content: described({**HEADER, "fingerprint": []}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, checkpoints, lines):
    files = written(checkpoints, 1, 2)
    files[2].write_bytes(DAMAGES[damage](files[2].read_bytes()))
    round, tensors, _ = checkpoints.latest()
    assert round == 1 == tensors["server/round"]
    assert len(lines) == 1 and lines[0].startswith("checkpoint round-000002.checkpoint is not used: ")
    assert len(lines[0]) < 200 and "\n" not in lines[0]
    files[1].unlink()
    assert checkpoints.latest() is None
    # The run makes the round again, and this time it is whole.
    written(checkpoints, 2)
    assert checkpoints.latest()[0] == 2


def test_reasons_say_what_is_wrong(checkpoints, lines):
    files = written(checkpoints, 1)
    whole = files[1].read_bytes()
    for content in (whole[:-3], described({**HEADER, "round": 1, "fingerprint": "b"}), described([])):
        files[1].write_bytes(content)
        assert checkpoints.latest() is None
    assert [line.partition(": ")[2] for line in lines] == [
        "its checksum does not match (it is truncated or damaged)",
        "it is of another configuration, data, model or code",
        "its checksum is right, but it is no checkpoint",
    ]


def test_a_folder_in_the_place_of_a_checkpoint(checkpoints, lines):
    files = written(checkpoints, 1, 2)
    files[2].unlink()
    files[2].mkdir()
    assert checkpoints.latest()[0] == 1 and "round-000002" in lines[0]


@given(data=st.data())
def test_no_flipped_bit_passes(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    lines = []
    checkpoints = Checkpoints(folder, "mine", lines.append)
    path = written(checkpoints, 1)[1]
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert checkpoints.latest() is None and len(lines) == 1


def test_those_of_another_configuration_do_not_push_ones_own_out(checkpoints, lines):
    """The other one had more rounds behind it, so that its files count as newer."""
    other = Checkpoints(checkpoints.folder, "other", lines.append)
    written(other, 7, 8)
    assert checkpoints.latest() is None and len(lines) == 2
    assert sorted(written(checkpoints, 1)) == [1]
    assert checkpoints.latest()[0] == 1


def test_what_a_killed_write_left_is_removed(checkpoints):
    checkpoints.folder.mkdir()
    (checkpoints.folder / ".round-000001.checkpoint.x.part").write_bytes(b"half")
    (checkpoints.folder / "record.json").write_text("{}")
    assert checkpoints.latest() is None
    assert [path.name for path in checkpoints.folder.iterdir()] == ["record.json"]


def test_too_little_memory_to_read_one_is_no_reason_to_start_over(checkpoints, monkeypatch):
    written(checkpoints, 1)

    def fails(path):
        raise MemoryError

    monkeypatch.setattr(checkpoints, "_read", fails)
    with pytest.raises(MemoryError):
        checkpoints.latest()


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_falls_back_one_round_or_starts_over_and_ends_the_same(damaged, place, tmp_path):
    whole = worlds.federation("fedavg", place, rounds=3)
    whole.run()
    lines = []
    first = worlds.federation("fedavg", place, rounds=3)
    first.settings = first.settings.model_copy(update={"rounds": 2})
    first.run(Checkpoints(tmp_path, "mine", lines.append))
    for path in sorted(tmp_path.iterdir(), reverse=True)[:damaged]:
        path.write_bytes(path.read_bytes()[:-9])
    again = worlds.federation("fedavg", place, rounds=3, log=lines.append)
    again.run(Checkpoints(tmp_path, "mine", lines.append))
    assert payload.encode(again.server.tensors).sha256() == payload.encode(whole.server.tensors).sha256()
    assert again.test == whole.test and again.ledger.upload == whole.ledger.upload
    assert sum("is not used" in line for line in lines) == damaged
    assert ("resumed after round 1/3" in lines) == (damaged == 1)


@pytest.mark.slow
def test_a_run_is_saved_when_it_is_time(place, tmp_path):
    for seconds, expected in ((0.0, [2, 3]), (1e6, [])):
        checkpoints = Checkpoints(tmp_path / str(seconds), "mine", print, seconds)
        worlds.federation("fedavg", place, rounds=3).run(checkpoints)
        assert sorted(int(path.name[6:12]) for path in checkpoints.folder.glob("*")) == expected


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_a_signal_after_the_last_round_saves_the_run_and_ends_it(seconds, place, tmp_path):
    """Nothing would notice it otherwise, and the process would go on with its next run."""
    federation = worlds.federation("fedavg", place, rounds=1)
    score = federation.scorer.score

    def interrupted(examples):
        if examples is federation.split.test:
            os.kill(os.getpid(), signal.SIGINT)
        return score(examples)

    federation.scorer.score = interrupted
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest-xdist sets aside
    try:
        with pytest.raises(KeyboardInterrupt):
            federation.run(Checkpoints(tmp_path, "mine", print, seconds))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not hasattr(federation, "test")
    found = Checkpoints(tmp_path, "mine", print).latest()
    assert found is not None and found[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_round_end_and_saves_it(number, place, tmp_path):
    folder = tmp_path / "run"
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)

        def log(line):
            if line.startswith("round 2"):  # in the middle of the run, before round 3
                os.kill(os.getpid(), number)

        try:
            worlds.federation("fedavg", place, rounds=9, log=log).run(Checkpoints(folder, "mine", print, 1e6))
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == (130 if number == signal.SIGINT else -signal.SIGTERM)
    found = Checkpoints(folder, "mine", print).latest()
    assert found is not None and found[0] == 2
