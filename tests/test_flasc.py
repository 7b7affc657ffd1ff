"""FLASC: one ranking over adapters and head, a masked start, changes from it, the server's AdamW."""

import pytest
import torch
import worlds
from test_config import changed, faults
from test_costs import padded  # noqa: F401
from test_doors import final, predicted, ran

from fedlm.exchange import payload
from fedlm.federation.settings import ServerAdamW

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LORA = {"rank": 4, "alpha": 8.0}
PLAIN = {"name": "sgd", "learning_rate": 1.0}


def flat(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names])


class Watched:
    """A run, with what every client received, what it had after training, and what was sent both ways."""

    def __init__(self, place, **options):
        self.run = worlds.federation("flasc", place, **{**LORA, **options})
        self.received, self.trained, self.down, self.up, self.before = [], [], [], [], []
        method, link = self.run.method, self.run.link
        train, send, upload, merge = method.train, link.send, method.upload, method.merge

        def noted_send(client, round):
            self.down.append(send(client, round))
            return self.down[-1]

        def noted_train(turn):
            if type(turn).__name__ == "Turn":  # not the probe's
                self.received.append({name: turn.received[name].clone() for name in method.exchanged})
            train(turn)

        def noted_upload(turn):
            self.trained.append({n: v.clone() for n, v in turn.values(method.exchanged).items()})
            sent = upload(turn)
            self.up.append(payload.encode(sent))
            return sent

        def noted_merge(server, uploads, round):
            self.before.append({name: value.clone() for name, value in server.tensors.items()})
            merge(server, uploads, round)

        method.train, link.send, method.upload, method.merge = (
            noted_train, noted_send, noted_upload, noted_merge,
        )  # fmt: skip
        self.names = method.exchanged
        self.run.run()
        self.elements = sum(value.numel() for value in self.run.server.tensors.values())


def by_formula(watched: Watched, round: int, down: float, up: float) -> torch.Tensor:
    """Return the mean of what clients sent in a round, from their trained values, in float64."""
    clients = len(watched.run.parts)
    theta = flat(watched.before[round], watched.names).double()
    keep = torch.zeros_like(theta, dtype=torch.bool)
    keep[theta.abs().topk(int(watched.elements * down)).indices] = True
    start, total = theta * keep, torch.zeros_like(theta)
    for turn in range(round * clients, (round + 1) * clients):
        change = flat(watched.trained[turn], watched.names).double() - start
        sent = change.abs().topk(int(watched.elements * up)).indices
        total[sent] += change[sent]
    return total / clients


def test_at_density_one_it_is_fedlora_with_that_server_optimizer_bit_for_bit(place):
    dense = {**LORA, "download_density": 1.0, "upload_density": 1.0}
    adamw = {"server_optimizer": {"name": "adamw"}}
    flasc = ran("flasc", place, **dense, weights="examples")
    assert final(flasc) == final(ran("fedlora", place, **LORA, federation=adamw))
    assert flasc.server.optimizer == ServerAdamW(name="adamw") and flasc.server.optimizer.weight_decay == 0.01
    for optimizer in ({"name": "none"}, {"name": "yogi"}):
        other = {"server_optimizer": optimizer}
        flasc = ran("flasc", place, **dense, weights="examples", federation=other)
        assert final(flasc) == final(ran("fedlora", place, **LORA, federation=other))
    # Sparse messages that hold everything change nothing either.
    almost = {**dense, "upload_density": 0.999999999}
    assert final(ran("flasc", place, **almost, weights="examples")) != final(ran("fedavg", place))


def test_a_client_starts_with_the_largest_entries_of_the_server_and_zeros(place):
    watched = Watched(place, download_density=0.3, upload_density=0.5)
    clients, count = len(watched.run.parts), int(0.3 * watched.elements)
    for turn, received in enumerate(watched.received):
        server = flat(watched.before[turn // clients], watched.names)
        found = flat(received, watched.names)
        here = found != 0
        assert int(here.sum()) <= count
        assert torch.equal(found[here], server[here])
        assert server.abs()[~here].max() <= server.abs()[here].min()
    # Zeros, and neither old values nor the first ones: some initial entries of A are not received.
    first = flat(watched.run.server.initial, watched.names)
    assert bool((first != 0)[flat(watched.received[0], watched.names) == 0].any())


@pytest.mark.parametrize(("down", "up"), [(0.3, 0.1), (0.02, 0.6)])
def test_a_message_holds_at_most_so_many_values_over_all_tensors_together(down, up, place):
    watched = Watched(place, download_density=down, upload_density=up)
    for messages, density in ((watched.down, down), (watched.up, up)):
        count = int(density * watched.elements)
        for message in messages:
            assert message.parts["*#chosen"].nbytes == 4 * count
            positions = min(4 * count, -(-watched.elements // 8))
            assert sum(part.nbytes for part in message.parts.values()) == 4 * count + positions
    assert watched.run.ledger.upload == sum(map(len, watched.up))
    assert watched.run.ledger.download == sum(map(len, watched.down))


@pytest.mark.parametrize("down", [0.3, 1.0])
def test_the_server_steps_along_the_mean_change_from_the_masked_start(down, place):
    """With a plain server: dense value plus the mean over all participants, zeros where nothing was sent."""
    plain = {"server_optimizer": PLAIN}
    watched = Watched(place, rounds=1, download_density=down, upload_density=0.2, federation=plain)
    mean = by_formula(watched, 0, down, 0.2)
    before = flat(watched.before[0], watched.names)
    after = flat(watched.run.server.tensors, watched.names)
    assert torch.allclose(after.double(), before.double() + mean, atol=1e-6)
    unsent = mean == 0
    assert 0 < int(unsent.sum()) < watched.elements
    assert torch.equal(after[unsent], before[unsent])  # nobody sent it: the dense value stays, bit for bit


def test_an_entry_that_nobody_sent_follows_adamws_formula(place):
    """In the first round it only decays; in the second its old moment moves it on."""
    rate = 1e-3
    watched = Watched(place, rounds=2, download_density=0.3, upload_density=0.2)
    means = [by_formula(watched, round, 0.3, 0.2) for round in (0, 1)]
    starts = [flat(before, watched.names) for before in watched.before]
    starts.append(flat(watched.run.server.tensors, watched.names))
    never = (means[0] == 0) & (means[1] == 0)
    expected = starts[0] * (1 - rate * 0.01)
    assert bool(never.any()) and torch.equal(starts[1][means[0] == 0], expected[means[0] == 0])
    assert torch.equal(starts[2][never], (expected * (1 - rate * 0.01))[never])
    sent = means[0].abs() > 1e-5
    step = (starts[1] - starts[0] * (1 - rate * 0.01))[sent]
    assert torch.allclose(step.abs(), torch.full_like(step, rate), rtol=1e-2)  # sign-like
    silent = sent & (means[1] == 0)
    moved = (starts[2] - starts[1] * (1 - rate * 0.01))[silent].abs() / rate
    assert bool(silent.any())
    assert moved.mean().item() == pytest.approx(0.67, abs=0.01)


def test_what_was_never_received_may_be_sent(place):
    watched = Watched(place, rounds=1, download_density=0.05, upload_density=0.5)
    sent = by_formula(watched, 0, 0.05, 0.5) != 0
    received = flat(watched.received[0], watched.names) != 0
    assert bool((sent & ~received).any())


def test_the_head_competes_with_the_adapters_for_the_same_places(place):
    """With a head a hundred times as large fewer entries of the adapters are received."""
    counts = []
    for factor in (1.0, 100.0):
        run = worlds.federation("flasc", place, rounds=1, download_density=0.2, **LORA)
        head = [name for name in run.method.exchanged if "lora" not in name]
        assert head
        for name in head:
            run.server.tensors[name] = run.server.tensors[name] * factor
        run.method.merge(run.server, iter(()), 1)
        received = run.link.receive(0, run.link.send(0, 1))
        counts.append(sum(int((received[n] != 0).sum()) for n in run.method.exchanged if "lora" in n))
    assert counts[1] < counts[0]


def test_the_model_scored_has_the_mask_of_its_round_or_all_values(place):
    run = ran("flasc", place, **LORA, download_density=0.1)
    (masked,) = run.method.models(run.server)
    values = flat(masked, run.method.exchanged)
    assert int((values != 0).sum()) <= int(0.1 * values.numel())
    dense = ran("flasc", place, **LORA, download_density=0.1, scored="dense")
    assert final(dense) == final(run)
    assert dense.method.models(dense.server)[0] is dense.server.tensors


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_prediction_and_record_agree(precision, place, padded):  # noqa: F811
    run = ran("flasc", place, payload=precision, download_density=0.3, upload_density=0.02)
    found = predicted(run, place)
    assert (found.upload_bytes, found.download_bytes) == (run.ledger.upload, run.ledger.download)
    assert found.flops == run.flops
    assert found.memory["all"].peak == pytest.approx(run.instruments.memory["all"].peak, rel=0.01)


def test_in_half_precision_an_unsent_entry_only_decays_too(place):
    watched = Watched(place, rounds=1, payload="bfloat16", download_density=0.3, upload_density=0.02)
    before = flat(watched.before[0], watched.names)
    after = flat(watched.run.server.tensors, watched.names)
    decayed = after == before * (1 - 1e-5)
    assert int((~decayed).sum()) <= 3 * int(0.02 * watched.elements)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "ffa"}, "flasc.variant: 'ffa'; Input should be 'average'"),
        ({"download_density": 0.0}, "flasc.download_density: 0.0; Input should be greater than 0"),
        ({"cache": "last_visit"}, "flasc.cache: 'last_visit'; Input should be 'none'"),
        ({"compression": {"operator": "quantize"}}, "flasc.compression: "),
        ({"upload_compression": {"operator": "sparse"}}, "flasc.upload_compression: "),
    ],
)
def test_bad_settings_are_refused_before_any_job(values, message):
    found = faults(changed(methods={"flasc": values}))
    assert any(message in fault for fault in found), found
