import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fedlm.measure.memory import KINDS, MemoryTracker, measure_step
from fedlm.models.blocks import find_blocks
from fedlm.models.config import ModelConfig
from fedlm.models.loading import load

MIB = 2**20


pytestmark = pytest.mark.usefixtures("one_thread")


def minilm_step(trained, dropout):
    """A step of AdamW on MiniLM with 5 labels, 16 texts of 64 tokens, in training mode; heads are trained."""
    model = load(ModelConfig(source="minilm", dropout=dropout), "classification", 5, 0).train()
    anatomy = find_blocks(model)
    if trained != "all":
        block = anatomy.blocks[0 if trained == "first block" else -1]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in block.parameters or name in anatomy.head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = {
        "input_ids": torch.randint(5, 1000, (16, 64), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(16, 64, dtype=torch.long),
        "token_type_ids": torch.zeros(16, 64, dtype=torch.long),
        "labels": torch.arange(16) % 5,
    }

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, optimizer, batch


def allocator_peak(step, tensors):
    """The peak by the allocator's own account, of two steps that meet these tensors."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# With the model's own dropout of 0.1, which needs masks and a slower attention; without dropout a step needs
# less (436, 212 and 133 MiB).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "mebibytes"), [("all", 488), ("first block", 276), ("last block", 144.5)]
)
def test_minilm_agrees_with_the_allocator(trained, mebibytes):
    step, model, optimizer, batch = minilm_step(trained, dropout="model")
    memory = measure_step(step, model)
    assert memory.peak / MIB == pytest.approx(mebibytes, abs=0.5)
    assert memory.peak == sum(getattr(memory, kind) for kind in KINDS)
    trained_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert memory.parameter == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    # Two moments, and a step counter of four bytes for each tensor.
    assert memory.optimizer == 2 * trained_bytes + 4 * len(optimizer.state)
    assert 0 <= memory.gradient <= trained_bytes
    optimizer.state.clear()
    truth = allocator_peak(step, [*model.parameters(), *model.buffers(), *batch.values()])
    # oneDNN, where it multiplies, copies a matrix that lies by columns: here at most 384 x 1536 numbers.
    assert memory.peak == pytest.approx(truth, rel=0.01, abs=4 * 384 * 1536)


@pytest.mark.slow
def test_it_repeats_to_the_byte():
    step, model, *_ = minilm_step("last block", dropout=0.0)
    first = measure_step(step, model)
    assert first.peak / MIB == pytest.approx(132.55, abs=0.1)
    assert measure_step(step, model) == first
    assert measure_step(*minilm_step("last block", dropout=0.0)[:2]) == first


def test_a_linear_layer_by_hand():
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000, bias=False)  # 4,000,000 bytes
    inputs = torch.ones(500, 1000)  # 2,000,000 bytes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step():
        model(inputs).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    memory = measure_step(step, model)
    assert memory.parameter == 4_000_000
    assert memory.gradient == 4_000_000
    assert memory.optimizer == 4_000_000
    # In the backward pass: the input; the output is gone; the output's gradient is one expanded number.
    assert 2_000_000 <= memory.activation <= 2_000_000 + 100


def test_what_exists_before_counts_from_the_start():
    model = nn.Linear(100, 100, bias=False)
    model.weight.grad = torch.zeros_like(model.weight)
    with MemoryTracker(model) as tracker:
        pass
    memory = tracker.memory()
    assert (memory.parameter, memory.gradient, memory.peak) == (40_000, 40_000, 80_000)


def test_shared_storage_counts_once():
    model = nn.Module()
    model.a = nn.Linear(100, 100, bias=False)
    model.b = nn.Linear(100, 100, bias=False)
    model.b.weight = model.a.weight
    with MemoryTracker(model) as tracker:
        whole = torch.zeros(1000)
        views = [whole[10:], whole.view(10, 100).T, whole.detach(), whole.add_(1)]
        del whole, views
        torch.zeros(500)
    assert tracker.memory().peak == 40_000 + 4_000


def test_float32_copies_of_half_precision_weights_belong_to_the_optimizer():
    model = nn.Linear(100, 100, bias=False, dtype=torch.bfloat16)
    copies = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(copies)

    def step():
        model(torch.ones(1, 100, dtype=torch.bfloat16)).sum().backward()
        for copy, parameter in zip(copies, model.parameters(), strict=True):
            copy.grad = parameter.grad.float()
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for copy, parameter in zip(copies, model.parameters(), strict=True):
                parameter.copy_(copy)

    memory = measure_step(step, model)
    assert memory.parameter == 20_000
    assert memory.optimizer == 3 * 40_000 + 4
    assert memory.gradient == 40_000


@pytest.mark.slow
def test_the_state_of_any_other_optimizer_can_be_named():
    model = nn.Linear(100, 100, bias=False)
    state = {}

    def step():
        model(torch.ones(1, 100)).sum().backward()
        weight = model.weight
        state.setdefault("mean", torch.zeros_like(weight)).lerp_(weight.grad, 0.1)
        with torch.no_grad():
            weight -= state["mean"]
        weight.grad = None

    assert measure_step(step, model, state.values).optimizer == 40_000
    state.clear()
    assert measure_step(step, model).optimizer == 0


@pytest.mark.slow
def test_gradient_checkpointing_and_accumulation_are_followed():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
            self.checkpointing = False

        def forward(self, x):
            for layer in self.layers:
                function = lambda y, layer=layer: torch.tanh(torch.tanh(torch.tanh(layer(y))))  # noqa: E731
                if self.checkpointing:
                    x = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
                else:
                    x = function(x)
            return x

    def peak(checkpointing, parts):
        model = Deep()
        model.checkpointing = checkpointing
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            for part in torch.ones(1024, 64).chunk(parts):
                model(part).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        return measure_step(step, model)

    plain, checkpointed, accumulated = peak(False, 1), peak(True, 1), peak(False, 8)
    assert checkpointed.activation < 0.6 * plain.activation
    assert accumulated.activation < 0.4 * plain.activation
    assert plain.parameter == checkpointed.parameter == accumulated.parameter


def test_nothing_is_kept_alive_and_nothing_is_left_behind():
    model = nn.Linear(10, 10)
    with MemoryTracker(model) as tracker:
        tensor = model(torch.ones(1, 10))
        seen = weakref.ref(tensor)
        del tensor
        assert seen() is None
        kept = torch.zeros(10)
    before = tracker.memory()
    del kept
    model(torch.ones(1, 10)).sum().backward()
    assert tracker.memory() == before
    assert not model.weight._post_accumulate_grad_hooks
    assert gc.isenabled()


def test_a_step_that_fails_fails_as_it_is():
    with pytest.raises(KeyError):
        measure_step(lambda: {}["missing"], nn.Linear(2, 2))
    assert gc.isenabled()


@settings(max_examples=50)
@given(st.lists(st.integers(min_value=-8, max_value=100), max_size=40))
def test_any_sequence_of_allocations_and_releases(actions):
    """A positive number allocates so many floats, a negative one drops the tensor at that place."""
    live, now, peak = [], 0, 0
    with MemoryTracker(nn.Module()) as tracker:
        for action in actions:
            if action > 0:
                live.append(torch.empty(action))
                now += 4 * action
                peak = max(peak, now)
            elif len(live) >= -action > 0:
                now -= 4 * len(live.pop(action))
    assert tracker.memory().peak == tracker.memory().activation == peak
