"""One turn of each method on the real MiniLM and real text: what must change changes, and the exact bytes."""

import pytest
import torch

from fedlm import costs, models, payload
from fedlm.config import Federation as FederationConfig
from fedlm.config import Training
from fedlm.data import prepare
from fedlm.federation import Federation, _Batches
from fedlm.method import discover
from fedlm.models import ModelConfig
from fedlm.task import discover as discover_tasks

MINILM = ModelConfig(source="minilm")
# Bytes of one upload: 5 labels, float32, header included.
UPLOADS = {"fedavg": 90_872_540, "fedcybgd": 7_107_524, "local_only": 0}


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    task = discover_tasks()["bbc_news"]
    settings = task.Config(max_length=16, train_examples=20, validation_examples=20, test_examples=20)
    return prepare(task(settings), MINILM, tmp_path_factory.mktemp("news"))


@pytest.mark.parametrize("name", sorted(discover()))
def test_a_turn_of_each_method(name, news):
    kind = discover()[name]
    split = news.split(1)
    run = Federation(
        kind(kind.Config(), 2, 1),
        models.load(MINILM, "classification", 5, 1),
        news,
        split,
        [split.train[:10], split.train[10:]],
        FederationConfig(clients=2, rounds=1, participation=0.5),
        Training(batch_size=10, learning_rate=1e-3, device="cpu"),
        1,
        models.max_positions(MINILM),
    )
    frozen = {
        parameter: value.clone()
        for parameter, value in run.model.named_parameters()
        if parameter not in run.method.exchanged
    }
    run.run()
    assert len(run.rounds) == 1 and run.rounds[0]["train_loss"] > 0 and run.flops > 0
    assert all(torch.equal(run.parameters[parameter], value) for parameter, value in frozen.items())
    client = run.rounds[0]["clients"][0]
    now = run.server.kept[client] if name == "local_only" else run.server.tensors
    moved = [p for p in run.method.trainable(client, 1) if not torch.equal(now[p], run.server.initial[p])]
    # LoRA's A and an adapter's first half have no gradient as long as their other half is zero, a key's bias
    # never has one.
    expected = [
        p
        for p in run.method.trainable(client, 1)
        if not p.endswith(("key.bias", "lora_A.default.weight"))
        and not {"token_type_embeddings", "down"} & set(p.split("."))
    ]
    assert set(expected) <= set(moved)
    memory = run.instruments.peak()
    parts = memory.parameter + memory.gradient + memory.optimizer + memory.activation
    assert parts == memory.peak > 80 * 2**20
    assert (
        run.ledger.broadcast
        % payload.size(dict(models.load(MINILM, "classification", 5, 1).named_parameters()))
        == 0
    )
    if name in UPLOADS:
        assert run.ledger.upload == UPLOADS[name]
    foretold = costs.predict(
        kind(kind.Config(), 2, 1),
        MINILM,
        "classification",
        5,
        [split.train[:10], split.train[10:]],
        _Batches(news, torch.device("cpu")),
        run.settings,
        run.training,
    )
    assert (foretold.upload_bytes, foretold.download_bytes) == (run.ledger.upload, run.ledger.download)
    assert foretold.broadcast_bytes == run.ledger.broadcast_size
    assert foretold.flops == run.flops
    assert foretold.peak.peak == pytest.approx(memory.peak, rel=0.01)
