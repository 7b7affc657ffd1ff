"""One turn of each method on the real MiniLM and real text: what must change changes, and the exact bytes."""

import pytest
import torch

from fedlm.costs import prediction
from fedlm.data.tokenising import prepare
from fedlm.exchange import payload
from fedlm.federation.loop import Batches, Federation
from fedlm.federation.settings import Federation as FederationConfig
from fedlm.federation.settings import Training
from fedlm.measure.memory import KINDS
from fedlm.models import loading
from fedlm.models.config import ModelConfig
from fedlm.study.plugins import discover_methods, discover_tasks

pytestmark = pytest.mark.slow

MINILM = ModelConfig(source="minilm")
# Bytes of one upload: 5 labels, float32, header included.
UPLOADS = {"fedavg": 90_872_540, "fedcybgd": 7_107_524, "local_only": 0}
# Otherwise its first round only chooses layers.
SETTINGS = {"fedpeptao": {"layers": [0, 2, 4]}}


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    task = discover_tasks()["bbc_news"]
    settings = task.Config(max_length=16, train_examples=20, validation_examples=20, test_examples=20)
    return prepare(task(settings), MINILM, tmp_path_factory.mktemp("news"))


@pytest.mark.parametrize("name", sorted(discover_methods()))
def test_a_turn_of_each_method(name, news):
    kind = discover_methods()[name]
    split = news.split(1)
    run = Federation(
        kind(kind.Config(**SETTINGS.get(name, {})), 2, 1),
        loading.load(MINILM, "classification", 5, 1),
        news,
        split,
        [split.train[:10], split.train[10:]],
        FederationConfig(clients=2, rounds=1, participation=0.5),
        Training(batch_size=10, learning_rate=1e-3, device="cpu"),
        1,
        loading.max_positions(MINILM),
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
    parts = sum(getattr(memory, kind) for kind in KINDS)
    assert parts == memory.peak > 80 * 2**20
    assert (
        run.ledger.broadcast
        % payload.size(dict(loading.load(MINILM, "classification", 5, 1).named_parameters()))
        == 0
    )
    if name in UPLOADS:
        assert run.ledger.upload == UPLOADS[name]
    predicted = prediction.predict(
        kind(kind.Config(**SETTINGS.get(name, {})), 2, 1),
        MINILM,
        "classification",
        5,
        [split.train[:10], split.train[10:]],
        Batches(news, torch.device("cpu")),
        run.settings,
        run.training,
    )
    assert (predicted.upload_bytes, predicted.download_bytes) == (run.ledger.upload, run.ledger.download)
    assert predicted.broadcast_bytes == run.ledger.broadcast_size
    assert predicted.flops == run.flops
    assert predicted.peak.peak == pytest.approx(memory.peak, rel=0.01)
