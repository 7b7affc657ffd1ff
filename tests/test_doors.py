"""The doors of a turn: a term of the loss, a correction of the gradient, passes that only look."""

import pytest
import torch
import worlds
from test_costs import padded  # noqa: F401

from fedlm.base.errors import FailedRun, UserError
from fedlm.costs import prediction
from fedlm.exchange import payload
from fedlm.exchange.declared import Declared
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.loop import Batches
from fedlm.federation.method import Method, Segment
from fedlm.federation.settings import Training
from fedlm.federation.turn import steps_of_turn
from fedlm.jobs.failures import describe
from fedlm.models.config import ModelConfig
from methods.fedavg import FedAvg
from methods.scaffold import Scaffold

pytestmark = pytest.mark.usefixtures("one_thread")


def ran(method, place, **options):
    run = worlds.federation(method, place, **options)
    run.run()
    return run


def final(run) -> str:
    return payload.encode({name: run.server.tensors[name] for name in run.method.exchanged}).sha256()


def predicted(run, place, model=None):
    method = type(run.method)(run.method.config, run.method.clients, run.seed)
    source = ModelConfig(source=str(worlds.folder("bert", str(place))), **(model or {}))
    batches = Batches(run.data, torch.device("cpu"))
    kind, labels = run.data.kind, run.data.num_labels
    return prediction.predict(method, source, kind, labels, run.parts, batches, run.settings, run.training)


@pytest.mark.slow
def test_without_pull_and_without_controls_both_are_fedavg(place):
    fedavg = ran("fedavg", place)
    assert final(ran("fedprox", place, mu=0.0)) == final(fedavg)
    assert final(ran("scaffold", place, corrected=False, weights="examples")) == final(fedavg)
    assert final(ran("fedprox", place, mu=1.0)) != final(fedavg)
    assert final(ran("scaffold", place)) != final(fedavg)


@pytest.mark.slow
@pytest.mark.parametrize("training", [{}, {"accumulation": 2, "batch_size": 4, "largest_gradient_norm": 0.5}])
def test_doors_that_add_nothing_leave_every_bit(training, place):
    """Doors that are used, not left out; SCAFFOLD's controls are zero in the first round."""
    options = {"rounds": 1, "training": {"optimizer": "sgd", "learning_rate": 0.05, **training}}
    fedavg = ran("fedavg", place, **options)
    assert final(ran(Idle, place, **options)) == final(fedavg)
    if not training:
        assert final(ran("scaffold", place, weights="examples", **options)) == final(fedavg)


@pytest.mark.slow
def test_fedprox_holds_one_copy_of_what_is_trained_and_scaffold_two_controls(place):
    """To the byte, where the peak is in the optimizer's step: one example a batch."""
    options = {"training": {"batch_size": 1, "local_steps": 1}}
    fedavg, fedprox, scaffold = (
        ran(name, place, **options).instruments.memory["all"] for name in ("fedavg", "fedprox", "scaffold")
    )
    trained = fedavg.gradient
    assert fedavg.method == 0 and trained > 0
    assert fedprox.method == trained and fedprox.peak - fedavg.peak == trained
    assert scaffold.method == 2 * trained and scaffold.peak - fedavg.peak == 2 * trained


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedprox", "scaffold"])
def test_prediction_and_record_agree_on_what_the_method_holds(name, place, padded):  # noqa: F811
    run = ran(name, place)
    found = predicted(run, place)
    assert found.memory["all"].method == run.instruments.memory["all"].method > 0
    assert found.memory["all"].peak == pytest.approx(run.instruments.memory["all"].peak, rel=0.01)
    assert (found.upload_bytes, found.download_bytes) == (run.ledger.upload, run.ledger.download)
    assert found.flops == run.flops


class Pulled(FedAvg):
    """Adds half the squared parameters to the loss, or the same as a correction of the gradient."""

    title = "Pulled"
    door = "term"

    def train(self, turn):
        parameters = dict(turn.model.named_parameters())
        for segment in self.segments(turn.client, turn.round, turn.steps):
            if self.door == "term":
                turn.fit(segment, term=lambda p: sum(v.float().square().sum() for v in p.values()) / 2)
            else:
                turn.fit(segment, correct=lambda name, g: g + parameters[name].detach().float())


class Corrected(Pulled):
    """The same by the other door."""

    title = "Corrected"
    door = "correction"


class Idle(FedAvg):
    """Uses all doors, each for nothing."""

    title = "Idle"

    def train(self, turn):
        for segment in self.segments(turn.client, turn.round, turn.steps):
            turn.fit(
                segment,
                term=lambda trained: torch.zeros(()),
                correct=lambda name, gradient: gradient + 0,
                output_term=lambda batch, outputs: 0 * outputs.logits.sum(),
            )


class Multiplying(FedAvg):
    """Multiplies matrices behind each door, and takes a gradient without them first."""

    title = "Multiplying"
    doors = ("term", "output_term", "correct")

    def train(self, turn):
        name = "classifier.weight"

        def term(trained):
            return 1e-3 * (trained[name] @ trained[name].T).sum()

        def output_term(batch, outputs):
            return 1e-3 * (outputs.logits.T @ outputs.logits).sum()

        def correct(name, gradient):
            return gradient + 0 * (gradient @ gradient.T @ gradient) if gradient.dim() == 2 else gradient

        found = {"term": term, "output_term": output_term, "correct": correct}
        for segment in self.segments(turn.client, turn.round, turn.steps):
            turn.gradient_norms(segment)
            turn.fit(segment, **{door: found[door] for door in self.doors})


@pytest.mark.slow
@pytest.mark.parametrize(
    "doors", [("term",), ("output_term",), ("correct",), Multiplying.doors], ids="+".join
)
def test_products_behind_the_doors_count_and_are_predicted(doors, place, padded, monkeypatch):  # noqa: F811
    class Plain(Multiplying):
        title = "Plain"
        doors = ()

    monkeypatch.setattr(Multiplying, "doors", doors)
    options = {"training": {"accumulation": 2, "batch_size": 4, "local_steps": 2}}
    run, plain = ran(Multiplying, place, **options), ran(Plain, place, **options)
    assert run.flops > plain.flops
    assert predicted(run, place).flops == run.flops
    assert predicted(plain, place).flops == plain.flops


@pytest.mark.slow
def test_a_term_of_the_outputs_is_part_of_the_recorded_loss_once(place):
    """Distillation from nothing: the mean squared logit, over the passes of a step."""

    class Distilled(FedAvg):
        title = "Distilled"
        seen: list = []

        def train(self, turn):
            def squares(batch, outputs):
                self.seen.append(float(outputs.logits.detach().square().mean()) * len(batch["labels"]))
                return outputs.logits.square().mean()

            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(segment, output_term=squares)

    training = {**SGD, "learning_rate": 1e-8, "accumulation": 2, "batch_size": 4, "local_steps": 1}
    options = {"training": training, "rounds": 1, "clients": 1}
    plain = ran("fedavg", place, **options)
    run = worlds.federation(Distilled, place, **options)
    run.instruments.knows_memory = lambda *work: True  # the probe would be seen, too
    run.run()
    found = run.rounds[0]["train_loss"] - plain.rounds[0]["train_loss"]
    assert len(Distilled.seen) == 2
    assert found == pytest.approx(sum(Distilled.seen) / 8, rel=1e-3)


@pytest.mark.slow
def test_fedprox_sees_what_half_precision_would_round_away(place):
    """Weights of bfloat16 move in steps of 0.4%: the pull follows their float32 values."""
    training = {**SGD, "learning_rate": 1e-5, "local_steps": 20}
    name, held_back = "bert.encoder.layer.0.output.dense.weight", {}
    for weights in ("float32", "bfloat16"):
        options = {"training": training, "model": {"weights": weights}, "rounds": 1, "clients": 1}
        runs = ran("fedavg", place, **options), ran("fedprox", place, mu=1000.0, **options)
        free, held = (run.server.tensors[name] - run.server.initial[name] for run in runs)
        held_back[weights] = float(1 - held.norm() / free.norm())
    assert all(share > 0.01 for share in held_back.values()), held_back


def test_during_training_values_are_what_half_precision_would_round_away(place):
    seen = []

    class Watching(FedAvg):
        title = "Watching"

        def train(self, turn):
            def watch(name, gradient):
                if name == "classifier.weight":
                    stored = turn.model.get_parameter(name).detach()
                    seen.append(
                        (turn.values([name])[name].clone(), turn.copies([name])[name], stored.clone())
                    )
                return gradient

            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(segment, correct=watch)

    training = {**SGD, "learning_rate": 1e-6, "local_steps": 2}
    run = worlds.federation(
        Watching, place, training=training, model={"weights": "bfloat16"}, rounds=1, clients=1
    )
    run.instruments.knows_memory = lambda *work: True
    run.play(1)
    (first, copied, stored), (second, _, still) = seen
    assert first.dtype == torch.float32 and stored.dtype == torch.bfloat16
    assert torch.equal(first, run.server.initial["classifier.weight"]) and torch.equal(copied, first)
    assert not torch.equal(second, first) and torch.equal(stored, still)


SGD = {"optimizer": "sgd", "learning_rate": 1e-2, "local_steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"training": SGD},
        {"training": {**SGD, "accumulation": 2, "batch_size": 4}},
        {"training": {**SGD, "loss_scale": 1024.0}},
        {
            "training": {
                **SGD,
                "accumulation": 2,
                "batch_size": 4,
                "loss_scale": 64.0,
                "largest_gradient_norm": 0.5,
            }
        },
        {"training": {**SGD, "autocast": "bfloat16", "accumulation": 2, "batch_size": 4}},
    ],
    ids=str,
)
def test_both_doors_give_the_same_update_under_every_setting(options, place):
    """A hook on the parameter would count twice with accumulation: 2 and ignore the loss scale."""
    term, correction = ran(Pulled, place, rounds=1, **options), ran(Corrected, place, rounds=1, **options)
    for name in term.method.exchanged:
        moved = term.server.tensors[name] - term.server.initial[name]
        other = correction.server.tensors[name] - correction.server.initial[name]
        assert torch.allclose(moved, other, atol=2e-6, rtol=1e-3), name


@pytest.mark.slow
def test_both_doors_serve_half_precision_weights(place):
    options = {"training": SGD, "model": {"weights": "bfloat16"}, "rounds": 1}
    term, correction = ran(Pulled, place, **options), ran(Corrected, place, **options)
    plain = ran("fedavg", place, **options)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
        moved, other, without = (
            (run.server.tensors[name] - run.server.initial[name]).norm() for run in (term, correction, plain)
        )
        assert moved == pytest.approx(float(other), rel=0.05)
        assert abs(moved - without) > 0.05 * without


@pytest.mark.slow
@pytest.mark.parametrize("training", [{}, {"loss_scale": 64.0}])
def test_a_term_sees_what_half_precision_would_round_away(training, place):
    """Its gradient is that at the float32 values, and is added to the others in float32."""

    class Pulling(FedAvg):
        title = "Pulling"
        strength = 1000.0

        def train(self, turn):
            anchor = turn.copies(self.exchanged)
            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(
                    segment,
                    term=lambda trained: sum(
                        self.strength / 2 * (value - anchor[name]).square().sum()
                        for name, value in trained.items()
                    ),
                )

    class Free(Pulling):
        title = "Free"
        strength = 0.0

    name, held_back = "bert.encoder.layer.0.output.dense.weight", {}
    for weights in ("float32", "bfloat16"):
        steps = {**SGD, "learning_rate": 1e-5, "local_steps": 20, **training}
        options = {"training": steps, "model": {"weights": weights}, "rounds": 1, "clients": 1}
        free, held = (ran(method, place, **options) for method in (Free, Pulling))
        moves = [(run.server.tensors[name] - run.server.initial[name]).norm() for run in (free, held)]
        held_back[weights] = float(1 - moves[1] / moves[0])
    assert held_back["bfloat16"] == pytest.approx(held_back["float32"], rel=0.2)
    assert held_back["float32"] > 0.01


@pytest.mark.slow
def test_what_a_method_adds_may_cost_more_in_a_later_round(place):
    class Growing(FedAvg):
        title = "Growing"

        def train(self, turn):
            def term(trained):
                matrix = trained["classifier.weight"]
                return sum((matrix @ matrix.T).sum() for _ in range(turn.round))

            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(segment, term=term, correct=lambda name, gradient: correct(gradient, turn.round))

    def correct(gradient, times):
        for _ in range(times if gradient.shape == (16,) else 0):
            gradient = gradient + 0 * (torch.ones(16, 16) @ gradient)
        return gradient

    options = {"rounds": 3, "training": {"local_steps": 2}, "clients": 2}
    first, second, third = (row["flops"] for row in ran(Growing, place, **options).rounds)
    assert second > first and third - second == second - first


@pytest.mark.parametrize(
    ("doors", "message"),
    [
        ({"term": lambda trained: trained["classifier.bias"]}, "term returned a tensor of shape (2,)"),
        ({"term": lambda trained: None}, "term returned None"),
        ({"output_term": lambda batch, outputs: outputs.logits}, "output_term returned a tensor of shape"),
        ({"correct": lambda name, gradient: None}, "is None; allowed: a gradient"),
        ({"correct": lambda name, gradient: gradient.double()}, "has type torch.float64; allowed:"),
    ],
)
def test_what_a_door_must_not_return_is_one_line(doors, message, place):
    class Wrong(FedAvg):
        name = title = "wrong"

        def train(self, turn):
            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(segment, **doors)

    with pytest.raises(FailedRun, match="method wrong, round 1, client 0: ") as error:
        ran(Wrong, place, training={"local_steps": 1})
    assert message in str(error.value)


@pytest.mark.slow
def test_the_term_is_part_of_the_recorded_loss_once(place):
    options = {"training": {**SGD, "learning_rate": 1e-8, "accumulation": 2, "batch_size": 4}, "rounds": 1}
    with_term, plain = ran(Pulled, place, **options), ran("fedavg", place, **options)
    expected = sum(float(v.square().sum()) for v in plain.server.initial.values()) / 2
    found = with_term.rounds[0]["train_loss"] - plain.rounds[0]["train_loss"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("training", [{}, {"optimizer": "sgd", "momentum": 0.9}])
def test_scaffold_is_refused_where_its_controls_would_not_be_gradients(training):
    with pytest.raises(UserError, match="allowed: sgd without momentum"):
        Scaffold(Scaffold.Config(), 2, 0).check_training(Training(**training))
    Scaffold(Scaffold.Config(), 2, 0).check_training(Training(optimizer="sgd"))
    with pytest.raises(UserError, match="training.largest_gradient_norm: 1; allowed: none"):
        clipped = Training(optimizer="sgd", largest_gradient_norm=1.0)
        Scaffold(Scaffold.Config(), 2, 0).check_training(clipped)
    Scaffold(Scaffold.Config(corrected=False), 2, 0).check_training(Training(**training))


def test_scaffold_by_hand(place):
    """Two rounds of one SGD step, every control and parameter worked out from the gradients."""
    options = {"clients": 2, "training": {"optimizer": "sgd", "learning_rate": 0.1, "local_steps": 1}}
    run = worlds.federation("scaffold", place, rounds=2, **options)
    name, seen = "classifier.weight", []
    merge = run.method.merge

    def noted(server, uploads, round):
        uploads = list(uploads)
        seen.append([{n: v.clone() for n, v in upload.tensors.items()} for upload in uploads])
        before = {n: v.clone() for n, v in {**server.tensors, **server.state}.items()}
        merge(server, iter(uploads), round)
        mean = sum(upload[name] for upload in seen[-1]) / 2
        assert torch.allclose(server.tensors[name], mean, atol=1e-6)
        change = sum(upload[f"{name}@control"] for upload in seen[-1]) / 2
        control = f"{name}@control"
        assert torch.allclose(server.state[control], before[control] + change, atol=1e-6)
        for upload in seen[-1]:  # option II: with c = c_i = 0, the new control is the gradient itself
            if round == 1:
                gradient = (before[name] - upload[name]) / 0.1
                assert torch.allclose(upload[control], gradient, atol=1e-5)
        # In full participation the server's control is the mean of the clients'.
        kept = [run.server.kept[client][control] for client in range(2)]
        assert torch.allclose(server.state[control], sum(kept) / 2, atol=1e-5)

    run.method.merge = noted
    run.run()
    assert len(seen) == 2


class Looking(Method):
    """Trains nothing by gradients: keeps of two random candidates the one with the lower loss."""

    title = "Looking"
    reference = "test"
    name = "looking"

    def segments(self, client, round, steps):
        return [Segment("queries", [], steps, forward_only=True)]

    def train(self, turn):
        (segment,) = self.segments(turn.client, turn.round, turn.steps)
        start = turn.copies(["classifier.weight"])
        moved = {"classifier.weight": start["classifier.weight"] + 0.05}
        losses = [turn.evaluate(segment, values) for values in (start, moved)]
        turn.evaluate(segment, start if losses[0] <= losses[1] else moved)
        turn.observed(min(losses))


@pytest.mark.slow
def test_passes_that_only_look_are_measured_counted_and_predicted(place, padded):  # noqa: F811
    run, fedavg = ran(Looking, place), ran("fedavg", place)
    memory, training = run.instruments.memory["queries"], fedavg.instruments.memory["all"]
    assert predicted(run, place).queries == run.queries > 0
    assert memory.gradient == memory.optimizer == 0 and memory.peak < training.peak
    # Three evaluations of forward passes against one of forward and backward, which is three forwards.
    assert run.flops == pytest.approx(fedavg.flops, rel=0.2)
    assert run.queries == 3 * sum(-(-len(part) // 8) for part in run.parts) * 2
    assert [row["queries"] for row in run.rounds] == [run.queries // 2] * 2
    found = predicted(run, place)
    assert found.flops == run.flops
    assert found.memory["queries"].peak == pytest.approx(memory.peak, rel=0.01)


class Counting(FedAvg):
    """Sends, instead of parameters, how many steps a turn had; the model counts all of them."""

    title = "Counting"
    name = "counting"
    fault = ""

    def messages(self):
        return {
            "total": Declared((1,), "int64", ("down",)),
            "steps": Declared((1,), "int64", ("up",)),
            "losses": Declared((None,), "float32", ("up",)),
        }

    def download(self, server, client, round):
        return {"total": server.state.get("total", torch.zeros(1, dtype=torch.int64))}

    def rebuild(self, received):
        head = received["classifier.bias"] + float(received["total"])
        return {**received, "classifier.bias": head}

    def upload(self, turn):
        sent = {"steps": torch.tensor([turn.steps]), "losses": torch.full((turn.steps,), turn.loss)}
        if turn.client == 1 and self.fault == "missing":
            del sent["losses"]
        elif turn.client == 1 and self.fault == "shape":
            sent["steps"] = torch.zeros(2, dtype=torch.int64)
        elif turn.client == 1 and self.fault == "type":
            sent["steps"] = torch.zeros(1)
        elif turn.client == 1 and self.fault == "direction":
            sent["total"] = torch.zeros(1, dtype=torch.int64)
        return sent

    def merge(self, server, uploads, round):
        uploads = list(uploads)
        assert all(upload.tensors["losses"].shape == (int(upload.tensors["steps"]),) for upload in uploads)
        before = server.state.get("total", torch.zeros(1, dtype=torch.int64))
        server.state["total"] = before + sum(upload.tensors["steps"] for upload in uploads)


def test_messages_that_are_no_parameters_cross_as_declared(place):
    run = worlds.federation(Counting, place)
    seen, load = [], run.load

    def noted(values):
        seen.append(float(values["classifier.bias"][0] - run.server.initial["classifier.bias"][0]))
        load(values)

    run.load = noted
    run.run()
    steps = [len(steps_of_turn(part, run.training, 1, 1, 0)) for part in run.parts]
    assert int(run.server.state["total"]) == 2 * sum(steps)
    assert max(seen) == pytest.approx(sum(steps))  # the copy of a client in the second round
    names = {"total": run.server.state["total"]}
    assert run.ledger.download == 6 * payload.size(names)
    assert run.ledger.upload == 2 * sum(
        payload.size({"steps": torch.zeros(1, dtype=torch.int64), "losses": torch.zeros(count)})
        for count in steps
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "losses: missing; expected float32 of shape (any)"),
        ("shape", "steps: shape (2,); expected int64 of shape (1)"),
        ("type", "steps: type torch.float32; expected torch.int64"),
        ("direction", "unknown tensor 'total'"),
    ],
)
def test_a_message_that_is_not_as_declared_names_method_client_and_tensor(fault, message, place):
    run = worlds.federation(Counting, place)
    run.method.fault = fault
    with pytest.raises(FailedRun) as error:
        run.run()
    assert str(error.value) == f"method counting, round 1, client 1: {message}"


def test_controls_are_required_of_scaffold_where_their_parameter_is_sent(place):
    run = worlds.federation("scaffold", place)
    upload = run.method.upload

    def lacking(turn):
        sent = upload(turn)
        if turn.client == 2:
            del sent["classifier.bias@control"]
        return sent

    run.method.upload = lacking
    lost = r"client 2: classifier.bias@control: missing; expected float32 of shape \(2\)"
    with pytest.raises(FailedRun, match=lost):
        run.run()


class Broken(FedAvg):
    """A term or a correction with a fault, of client 1 in round 2."""

    name = "broken"
    title = "Broken"
    fault = ""

    def train(self, turn):
        for segment in self.segments(turn.client, turn.round, turn.steps):
            if not self.fault or (turn.round, turn.client) != (2, 1):
                turn.fit(segment)
            elif self.fault == "term":
                turn.fit(segment, term=lambda p: p["classifier.bias"].sum() * float("nan"))
            else:
                turn.fit(segment, correct=lambda name, gradient: gradient[:1])


@pytest.mark.slow
def test_fedprox_adds_the_gradient_of_its_term(place):
    """The hand-written gradient mu (w - anchor) is the one that autograd finds."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "local_steps": 2}
    options = {"clients": 1, "rounds": 1, "scheme": {"scheme": "pooled"}, "training": sgd}

    class Written(FedAvg):
        """FedProx with its term left to autograd."""

        title = "Written"

        def train(self, turn):
            anchor = turn.copies(self.exchanged)
            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(
                    segment, term=lambda p: 5 * sum((v - anchor[n]).square().sum() for n, v in p.items())
                )

    written, fedprox = ran(Written, place, **options), ran("fedprox", place, mu=10.0, **options)
    plain = ran("fedavg", place, **options)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
        one, other = written.server.tensors[name], fedprox.server.tensors[name]
        assert torch.allclose(one, other, atol=1e-6) and not torch.allclose(one, plain.server.tensors[name])
    assert written.rounds[0]["train_loss"] == pytest.approx(fedprox.rounds[0]["train_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("term", "the loss is nan"),
        (
            "shape",
            "the correction of bert.embeddings.word_embeddings.weight has shape (1, 16); allowed: (256, 16)",
        ),
    ],
)
def test_a_fault_is_one_line_and_costs_nothing_that_was_finished(fault, message, place, tmp_path):
    options = {"training": {"local_steps": 1}}
    run = worlds.federation(Broken, place, **options)
    run.method.fault = fault
    with pytest.raises(FailedRun) as error:
        run.run(Checkpoints(tmp_path, "mine", print))
    assert describe(error.value) == f"method broken, round 2, client 1: {message}"
    lines = []
    mended = worlds.federation(Broken, place, log=lines.append, **options)
    mended.run(Checkpoints(tmp_path, "mine", print))
    assert lines[0] == "resumed after round 1/2"
    assert final(mended) == final(ran("fedavg", place, **options))


def test_a_fault_stops_a_prediction_in_one_line(place, padded):  # noqa: F811
    class Wrong(FedAvg):
        name = title = "wrong"

        def train(self, turn):
            for segment in self.segments(turn.client, turn.round, turn.steps):
                turn.fit(segment, correct=lambda name, gradient: gradient[:1])

    run = worlds.federation(Wrong, place)
    with pytest.raises(UserError, match=r"method wrong: the correction of \S+ has shape \(1, 16\)"):
        predicted(run, place)


class Hoarding(FedAvg):
    """Holds all uploads of a round before it merges them, and those of the round before."""

    title = "Hoarding"

    def merge(self, server, uploads, round):
        self.hoard = list(uploads)
        super().merge(server, iter(self.hoard), round)


def test_uploads_that_a_method_holds_are_those_that_the_clients_sent(place):
    options = {"training": {"local_steps": 1}}
    hoarding, fedavg = ran(Hoarding, place, **options), ran("fedavg", place, **options)
    assert final(hoarding) == final(fedavg)
    mine = {parameter.data_ptr() for parameter in hoarding.parameters.values()}
    for upload in hoarding.method.hoard:
        assert upload.tensors.keys() == set(hoarding.method.exchanged)
        assert mine.isdisjoint(value.data_ptr() for value in upload.tensors.values())


def test_a_method_whose_training_leaves_out_a_segment_is_reported(place):
    class Forgetful(FedAvg):
        title = "Forgetful"

        def train(self, turn):
            pass

    with pytest.raises(FailedRun, match=r"segments\(\) lists 'all', but train\(\) never fits it"):
        worlds.federation(Forgetful, place).run()
