"""What clients keep lies on the disk: written once, there as long as it is needed, and never lost."""

import errno
import gc
import os
import resource

import pytest
import torch
import worlds
from safetensors.torch import load

from fedlm.base.errors import FailedRun
from fedlm.exchange import payload
from fedlm.federation import scorer
from fedlm.federation.checkpoint import Checkpoints, remove_checkpoints
from fedlm.federation.stored import ClientStates, Kept, StorageError, Store
from fedlm.federation.turn import Turn
from fedlm.jobs.failures import describe

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "half": torch.full((5,), 1.5, dtype=torch.bfloat16),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
    "count": torch.tensor([2**40]),
    "nothing": torch.ones(0, 4),
    "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "states")


def names(store) -> list[str]:
    return sorted(path.name for path in store.folder.glob("*"))


def test_what_was_put_comes_back(store):
    handles = store.put(TENSORS)
    assert len(names(store)) == 1
    for name, tensor in TENSORS.items():
        found = handles[name].load()
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        assert torch.equal(found, tensor) or name == "odd"
    assert torch.equal(handles["odd"].load().view(torch.int32), TENSORS["odd"].view(torch.int32))


def test_a_store_without_a_folder_leaves_nothing():
    store = Store()
    handles = store.put(TENSORS)
    folder = store.folder
    assert torch.equal(handles["matrix"].load(), TENSORS["matrix"])
    del store
    assert folder.exists()  # the handles hold it
    del handles
    assert not folder.exists()


def test_tensors_without_values_are_never_written():
    store = Store()
    handles = store.put({"meta": torch.empty(2, 3, dtype=torch.bfloat16, device="meta")})
    found = handles["meta"].load()
    assert found.is_meta and found.shape == (2, 3) and found.dtype == torch.bfloat16
    assert store._folder is None and not store.live


def test_writing_into_a_loaded_tensor_reaches_no_file(store):
    handles = store.put(TENSORS)
    loaded = handles["matrix"].load()
    assert handles["matrix"].holds(loaded) and handles["matrix"].load() is loaded
    loaded.add_(1)
    assert not handles["matrix"].holds(loaded)
    del loaded
    assert torch.equal(handles["matrix"].load(), TENSORS["matrix"])


def test_a_file_goes_with_its_last_handle(store):
    handles = store.put(TENSORS)
    loaded = handles["matrix"].load()
    one = handles["scalar"]
    del handles
    assert len(names(store)) == 1
    del one
    assert names(store) == [] and not store.live
    assert torch.equal(loaded, TENSORS["matrix"])  # mapped still


def test_a_pinned_file_stays_until_it_is_let_go(store):
    handles = store.put(TENSORS)
    (name,) = names(store)
    store.pin({name})
    del handles
    assert names(store) == [name]
    store.pin(set())
    assert names(store) == []


def test_a_forked_process_removes_no_file(store):
    handles = store.put(TENSORS)
    pid = os.fork()
    if pid == 0:
        del handles
        gc.collect()
        os._exit(0)
    os.waitpid(pid, 0)
    assert torch.equal(handles["matrix"].load(), TENSORS["matrix"])


def test_no_place_for_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError) as error:
        Store(tmp_path / "file").put(TENSORS)
    assert "a file is where a folder should be" in describe(error.value)


def test_what_is_unchanged_is_not_written_again(store):
    states = ClientStates(store)
    states[3] = {"a": torch.ones(2), "b": torch.zeros(2), "c": torch.zeros(3)}
    turn = dict(states[3])
    turn["b"] = torch.full((2,), 5.0)
    turn["c"].add_(1)
    before = states.handles[3]["a"]
    states[3] = turn
    assert states.handles[3]["a"] is before and len(names(store)) == 2
    del turn
    assert [states[3][name].tolist() for name in "abc"] == [[1, 1], [5, 5], [1, 1, 1]]
    assert {**states[3]}.keys() == {"a", "b", "c"} and sorted(states.items())[0][0] == 3
    states[3] = {}
    del before
    assert 3 not in states and names(store) == []


def test_a_version_is_that_of_all_values(store):
    states = ClientStates(store)
    states[3] = {"a": torch.ones(2), "b": torch.zeros(2)}
    first = states[3].version()
    states[3] = dict(states[3])
    assert states[3].version() == first
    states[3] = {**states[3], "b": torch.zeros(2)}
    second = states[3].version()
    states[3] = {"a": states[3]["a"]}
    assert len({first, second, states[3].version()}) == 3


# --- scoring


def scored(run, monkeypatch) -> list[int]:
    """Run; return how many models were scored in each scoring: the baseline, each round, the test."""
    counts, score = [], scorer.score

    def counted(*arguments):
        counts[-1] += 1
        return score(*arguments)

    def scoring(indices, scores=run.scorer.score):
        counts.append(0)
        return scores(indices)

    monkeypatch.setattr(scorer, "score", counted)
    run.scorer.score = scoring
    run.run()
    monkeypatch.setattr(scorer, "score", score)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["reset", "client"])
def test_a_client_s_model_is_scored_where_it_changed(place, quick, monkeypatch, moments):
    options = {"clients": 6, "rounds": 4, "federation": {"participation": 0.34}, "moments": moments}
    run, again = federation(place, **options), federation(place, **options)
    sampled = [run.sample(round) for round in range(1, 5)]
    assert scored(run, monkeypatch) == [1, *map(len, sampled), len(set().union(*sampled))]
    monkeypatch.setattr(Kept, "version", lambda self: None)  # nothing is known to be unchanged
    seen = [len(set().union(*sampled[:rounds])) for rounds in range(1, 5)]
    assert scored(again, monkeypatch) == [1, *seen, seen[-1]] and seen[-1] > len(sampled[-1])
    assert [row["validation"] for row in run.rounds] == [row["validation"] for row in again.rounds]
    assert outcome(run) == outcome(again)


def test_a_client_that_trains_again_is_scored_again(place, quick, monkeypatch):
    assert scored(federation(place, rounds=3), monkeypatch) == [1, 3, 3, 3, 3]


# --- with checkpoints


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(Turn, "probe", lambda self, segments, train: None)


def federation(place, **options):
    return worlds.federation("local_only", place, training={"local_steps": 1}, **options)


def outcome(run) -> tuple:
    kept = [(client, payload.encode(kept).sha256()) for client, kept in sorted(run.server.kept.items())]
    return kept, run.test, payload.encode(run.server.tensors).sha256()


def interrupted(place, folder, rounds, lines=None):
    """Run some rounds of three, and leave what a killed process leaves."""
    run = federation(place, rounds=3)
    run.settings = run.settings.model_copy(update={"rounds": rounds})
    checkpoints = Checkpoints(folder, "mine", print)
    run.run(checkpoints)
    stray = folder / "state-0123456789abcdef.bin"
    stray.write_bytes(b"half")
    return run


@pytest.mark.slow
def test_a_checkpoint_refers_to_what_clients_keep(place, quick, tmp_path):
    whole = federation(place, rounds=3)
    whole.run()
    run = interrupted(place, tmp_path, 2)
    files = set(tmp_path.glob("state-*"))
    assert len(files) == 1 + 2 * 3  # of both checkpoints, three clients each
    assert len(run.server.store.live) == 3
    for path in tmp_path.glob("round-*"):
        assert all(name == "plain" or name.startswith("server/") for name in load(path.read_bytes()[65:]))
    del run
    gc.collect()
    assert files == set(tmp_path.glob("state-*"))  # the run is gone, what its checkpoints need is not
    lines = []
    resumed = federation(place, rounds=3, log=lines.append)
    resumed.run(Checkpoints(tmp_path, "mine", lines.append))
    assert "resumed after round 2/3" in lines
    assert outcome(resumed) == outcome(whole)
    assert len(list(tmp_path.glob("state-*"))) == 2 * 3
    remove_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_checkpoint_whose_file_is_gone_is_not_used(damage, place, quick, tmp_path):
    whole = federation(place, rounds=3)
    whole.run()
    newest = next(iter(interrupted(place, tmp_path, 2).server.kept.handles[1].values())).file.path
    if damage == "missing":
        newest.unlink()
    else:
        os.truncate(newest, newest.stat().st_size - 1)
    lines = []
    resumed = federation(place, rounds=3, log=lines.append)
    resumed.run(Checkpoints(tmp_path, "mine", lines.append))
    (line,) = [line for line in lines if "is not used" in line]
    assert line.startswith("checkpoint round-000002.checkpoint is not used: state-")
    assert line.endswith(", to which it refers, is missing or cut short")
    assert "resumed after round 1/3" in lines
    assert outcome(resumed) == outcome(whole)


@pytest.mark.slow
def test_a_run_that_had_another_store_is_saved_as_a_whole(place, quick, tmp_path):
    whole = federation(place, rounds=3)
    whole.run()
    first = federation(place, rounds=3)
    first.settings = first.settings.model_copy(update={"rounds": 2})
    first.run()
    first.run(Checkpoints(tmp_path, "mine", print))  # nothing is left to do; then a checkpoint of it
    checkpoints = Checkpoints(tmp_path, "mine", print)
    checkpoints.save(2, *first._state())
    del first
    resumed = federation(place, rounds=3)
    resumed.run(Checkpoints(tmp_path, "mine", print))
    assert outcome(resumed) == outcome(whole)


def test_no_room_found_when_a_round_is_saved_names_the_client(place, quick, tmp_path, monkeypatch):
    """Quotas and network file systems report it when a file is brought to disk."""
    run = federation(place, rounds=2)

    def full(number):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("fedlm.federation.stored.os.fsync", full)
    with pytest.raises(FailedRun) as error:
        run.run(Checkpoints(tmp_path, "mine", print))
    line = describe(error.value)
    assert line.startswith(f"method local_only, round 1, client 0: {tmp_path}/state-")
    assert ": Disk quota exceeded; finished runs are kept" in line


@pytest.mark.slow
def test_no_room_for_a_client_is_one_line_and_costs_nothing_that_was_finished(place, quick, tmp_path):
    whole = federation(place, rounds=3)
    whole.run()
    run = federation(place, rounds=3)
    play, limits = run.play, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(round):
        if round == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return play(round)

    run.play = limited
    try:
        with pytest.raises(FailedRun) as error:
            run.run(Checkpoints(tmp_path, "mine", print))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = describe(error.value)
    assert line.startswith(f"method local_only, round 2, client 0: {tmp_path}/state-")
    assert line.endswith(
        ": File too large; finished runs are kept, an unfinished one continues from its last saved round: "
        "run again to continue"
    )
    assert len(list(tmp_path.glob("state-*"))) == 3  # those of round 1
    lines = []
    resumed = federation(place, rounds=3, log=lines.append)
    resumed.run(Checkpoints(tmp_path, "mine", print))
    assert "resumed after round 1/3" in lines and outcome(resumed) == outcome(whole)


def test_no_room_for_a_version_that_a_merge_replaced(place, quick, tmp_path):
    run = worlds.federation("fedcybgd", place, cache="last_visit", training={"local_steps": 1}, rounds=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.play(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(FailedRun, match=r"^method fedcybgd, round 2, client \d: .*File too large$"):
            run.play(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
