"""On a GPU: memory, the same bits after a resumption, half precision, and steps that do not wait for it."""

import math
import os

# Read when cuBLAS is first used; without it its results may differ from one call to the next.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy
import pytest
import torch
import worlds
from test_methods import CASES, IDS, defaults
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from fedlm.base import staging
from fedlm.exchange import payload
from fedlm.federation.checkpoint import Checkpoints
from fedlm.federation.loop import Batches
from fedlm.federation.optimizer import LocalOptimizer
from fedlm.federation.passes import targets
from fedlm.federation.settings import Training

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]
WORKSPACES = 96 << 20  # bytes that cuBLAS takes from PyTorch's allocator and no tensor holds


@pytest.fixture
def deterministic():
    """Let equal inputs have equal results."""
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


def federation(method, place, **options):
    training = {"device": "cuda", **options.pop("training", {})}
    return worlds.federation(method, place, training=training, **options)


def final(run) -> str:
    return payload.encode(run.server.tensors).sha256()


@pytest.mark.parametrize(("method", "settings"), CASES, ids=IDS)
def test_every_method_learns_there(method, settings, place):
    run = federation(method, place, **defaults(method, settings))
    run.run()
    assert run.device.type == "cuda" and all(math.isfinite(value) for value in run.test.values())


@pytest.mark.parametrize("method", ["fedavg", "fedcybgd", "fedprox"])
def test_the_tracker_sees_what_the_allocator_gives_out(method, place):
    run = federation(method, place, training={"batch_size": 32})
    before = torch.cuda.memory_allocated()
    run.run()
    peak = run.instruments.peak().peak
    assert run.device.type == "cuda" and run.cuda_peak > 0
    # The allocator rounds each tensor up, and kernels take memory for themselves.
    assert peak <= run.cuda_peak <= 1.1 * peak + before + WORKSPACES


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold"])
def test_the_memory_of_a_turn_is_that_of_the_same_turn_on_a_cpu(method, place):
    optimizer = {"optimizer": "sgd"} if method == "scaffold" else {}
    found = {
        device: worlds.federation(method, place, training={"device": device, **optimizer})
        for device in ("cpu", "cuda")
    }
    for run in found.values():
        run.run()
    cpu, cuda = (run.instruments.memory["all"] for run in found.values())
    assert (cuda.parameter, cuda.gradient, cuda.method) == (cpu.parameter, cpu.gradient, cpu.method)
    assert cuda.optimizer == pytest.approx(cpu.optimizer, abs=4096)  # where the counts of steps are


@pytest.mark.parametrize(
    ("method", "settings"), [("fedavg", {}), ("fedcybgd", {"cache": "last_visit"}), ("local_only", {})]
)
def test_a_resumed_run_has_the_same_bits(method, settings, place, tmp_path, deterministic):
    whole = federation(method, place, rounds=3, **settings)
    whole.run()
    first = federation(method, place, rounds=3, **settings)
    first.settings = first.settings.model_copy(update={"rounds": 2})
    first.run(Checkpoints(tmp_path, "mine", print))
    lines: list[str] = []
    resumed = federation(method, place, rounds=3, log=lines.append, **settings)
    resumed.run(Checkpoints(tmp_path, "mine", print))
    assert "resumed after round 2/3" in lines
    assert final(resumed) == final(whole) and resumed.test == whole.test


@pytest.mark.parametrize(
    "options", [{"model": {"weights": "bfloat16"}}, {"training": {"autocast": "bfloat16"}}]
)
def test_bfloat16_trains_as_float32_does(options, place):
    plain, half = federation("fedavg", place, rounds=3), federation("fedavg", place, rounds=3, **options)
    for run in (plain, half):
        run.run()
    values = half.server.tensors.values()
    assert all(v.dtype == torch.float32 and v.device.type == "cpu" and v.isfinite().all() for v in values)
    assert math.isfinite(half.test["loss"])
    assert half.rounds[-1]["train_loss"] == pytest.approx(plain.rounds[-1]["train_loss"], rel=0.1)
    if "model" in options:
        assert half.instruments.memory["all"].parameter < plain.instruments.memory["all"].parameter


def test_neither_a_batch_nor_an_update_waits_for_the_device(place):
    run = federation("fedavg", place)
    parameters = {name: run.parameters[name] for name in run.method.exchanged}
    settings = Training(device="cuda", largest_gradient_norm=1.0, loss_scale=8.0)
    optimizer = LocalOptimizer(parameters, {}, settings)
    make_batch = Batches(run.data, run.device)
    for number in range(2):  # the first time memory is still being allocated
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            batch = make_batch(numpy.arange(8))
            optimizer.step(1.0, lambda name, gradient: gradient.mul_(0.5))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert batch["input_ids"].device.type == "cuda"
    assert all(parameter.isfinite().all() for parameter in parameters.values())


def test_batches_of_a_language_model_are_weighed_on_the_device(place):
    run = federation("fedavg", place, family="gpt2", kind="causal")
    batch = Batches(run.data, run.device)(numpy.arange(4))
    torch.cuda.set_sync_debug_mode("error")
    try:
        count = targets(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count.device.type == "cuda" and int(count) == int((batch["labels"][:, 1:] >= 0).sum())


@pytest.mark.parametrize("method", ["fedavg", "fedlora"])
def test_payloads_cross_in_few_copies_from_and_to_locked_memory(method, place):
    run = federation(method, place, **defaults(method, {}))
    values = {name: value + 1 for name, value in run.server.initial.items()}
    run.load(run.server.initial)  # the first time memory is still being allocated
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as downloading:
        run.load(values)
        torch.cuda.synchronize()
    message = payload.encode({name: run.parameters[name] for name in values})
    with profile(activities=activities) as uploading:
        received = payload.receive(message, values)
        received.own_all()
    assert all(torch.equal(received[name], value) for name, value in values.items())
    assert len(values) > 4 and len(message) < staging.ROOM
    for found, way in ((downloading, "HtoD"), (uploading, "DtoH")):
        copies = [event.name for event in found.events() if way in event.name]
        assert len(copies) == 1 and "Pinned" in copies[0]


def test_a_download_does_not_wait_for_the_device(place):
    run = federation("fedavg", place)
    run.load({name: value + 1 for name, value in run.server.initial.items()})
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.load(run.server.initial)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in run.server.initial.items():
        assert torch.equal(run.parameters[name].detach().cpu(), value)


def test_the_first_values_stay_on_the_cpu(place):
    run = federation("fedavg", place)
    assert all(value.device.type == "cpu" for value in run.server.initial.values())
    assert all(parameter.device.type == "cuda" for parameter in run.parameters.values())
    assert all(
        torch.equal(run.parameters[name].detach().cpu(), value) for name, value in run.server.initial.items()
    )
