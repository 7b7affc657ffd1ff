"""The control that answers every text with the class of most training examples."""

import numpy
import pytest
import torch
import worlds

pytestmark = pytest.mark.usefixtures("one_thread")


def run(place, **settings):
    found = worlds.federation("majority", place, **settings)
    found.run()
    return found


def test_the_answer_is_the_class_of_most_training_examples_and_the_loss_that_of_the_shares(place):
    found = run(place, rounds=2, smoothing=0.5)
    labels = found.data.labels
    counts = numpy.bincount(labels[found.split.train], minlength=2)
    assert found.server.state["counts"].tolist() == counts.tolist()
    validation = labels[found.split.validation]
    scored = found.rounds[-1]["validation"]
    assert scored["accuracy"] == pytest.approx((validation == counts.argmax()).mean())
    shares = (counts + 0.5) / (counts + 0.5).sum()
    assert scored["loss"] == pytest.approx(-numpy.log(shares[validation]).mean(), rel=1e-5)


def test_no_parameter_changes_and_a_client_counts_once(place):
    found, fresh = run(place, rounds=2), worlds.federation("majority", place, rounds=2)
    for (name, value), other in zip(found.model.named_parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(value, other) and not value.requires_grad, name
    first, second = found.rounds
    assert first["flops"] > 0 and second["flops"] == 0
    assert (
        first["upload_bytes"] > second["upload_bytes"] and first["download_bytes"] == second["download_bytes"]
    )
    assert first["validation"] == second["validation"]
