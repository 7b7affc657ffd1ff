"""The memory of whole processes: a turn's beside the model (SmolLM2), and that of preparing many rows."""

import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parent.parent


def model_folder(folder: Path) -> Path:
    """Return SmolLM2 where it was made before; otherwise a model of its shape with random weights."""
    from transformers import AutoModelForCausalLM

    from fedlm.base import downloads
    from fedlm.models import embedded, loading
    from fedlm.models.config import ModelConfig

    made = downloads.folder() / f"smollm2-{embedded.SMOLLM2_SHA256[:12]}"
    if (made / "model.safetensors").is_file():
        return made
    shape = loading.build_config(ModelConfig(source="smollm2"), "causal", 2)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


def own_memory() -> int:
    """Return the process's resident memory that is in no file, in bytes: what the system cannot drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


class Watch:
    """The largest memory while it watches, in a thread of its own."""

    def __init__(self) -> None:
        self.largest, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self.look()

    def look(self) -> None:
        self.largest = max(self.largest, own_memory())

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def play(folder: str, name: str, settings: str) -> None:
    """Play three rounds of three clients and save the server's values; print bytes of the model, of the
    exchanged parameters, and memory.

    Training only scales what is trained, so that gradients and the optimizer's state do not count.
    """
    import numpy
    import torch

    from fedlm.federation.checkpoint import Checkpoints
    from fedlm.federation.rounds import Rounds
    from fedlm.federation.settings import Federation, Training
    from fedlm.models import loading
    from fedlm.models.config import ModelConfig
    from fedlm.study.plugins import discover_methods

    torch.set_num_threads(1)
    model = loading.load(ModelConfig(source=folder), "classification", 2, 0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kind = discover_methods()[name]
    before = own_memory()  # the model's weights are still in their file

    class Scaled(kind):
        title = "Scaled"

        def segments(self, client, round, steps):
            return []

        def train(self, turn):
            parameters = dict(turn.model.named_parameters())
            with torch.no_grad():
                for trained in self.trainable(turn.client, turn.round):
                    parameters[trained].mul_(1 - 0.01 * (turn.client + 1))
            turn.observed(1.0)
            watch.look()

    method = Scaled(kind.Config(**json.loads(settings)), 3, 1)
    with Watch() as watch:
        prepared = method.prepare(model, "classification")
        training = Training(local_steps=1, device="cpu")
        parts = [numpy.arange(4)] * 3
        rounds = Rounds(
            method, prepared, parts, lambda i: {}, Federation(clients=3, rounds=3), training, 1, 0
        )
        loaded = own_memory()
        for number in (1, 2, 3):
            rounds.play(number)
        with tempfile.TemporaryDirectory() as place:
            Checkpoints(Path(place), "", print).save(3, rounds.server.tensors, {})
    exchanged = sum(value.nbytes for value in rounds.server.initial.values())
    sizes = {"weights": weights, "exchanged": exchanged}
    print(json.dumps({**sizes, "loaded": loaded - before, "peak": watch.largest - before}))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize(
    ("name", "settings", "copies"),
    [
        ("fedavg", {}, 2),
        ("fedavg", {"payload": "bfloat16"}, 3.4),
        ("fedcybgd", {}, 1),
        ("fedcybgd", {"cache": "last_visit"}, 1),
    ],
)
def test_a_turn_holds_few_copies_of_what_is_exchanged(name, settings, copies, smollm2):
    """FedAvg holds the server's values and the mean; FedCyBGD the server's values that changed so far.

    With a payload in half precision the client's values are not the server's, so there is a copy more; and
    the largest tensor, a fifth of all, is for a moment there in both types.
    """
    command = [sys.executable, __file__, str(smollm2), name, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    slack = 0.15 * found["exchanged"]  # of the allocator, and code that is read when it is first used
    assert found["exchanged"] > 400e6
    # The first values stay in their file, and only the model is in memory.
    assert found["loaded"] <= found["weights"] + slack
    assert found["peak"] <= found["weights"] + copies * found["exchanged"] + slack


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_a_csv_of_a_million_rows_is_prepared_in_600_mb(tmp_path):
    """With only `train_examples` capped, 310,000 rows are tokenised: the pool, and two shares of all rows."""
    tiny.save(tmp_path / "model", "bert", ["the film was good"])
    with (tmp_path / "rows.csv").open("w") as file:
        file.write("text,label\n")
        for row in range(1_000_000):
            file.write(f"the film was {row} times as good as {row % 977} of the others,{row % 2}\n")
    (tmp_path / "study.yaml").write_text(
        json.dumps(
            {
                "study": "rows",
                "seeds": [1],
                "model": {"source": str(tmp_path / "model")},
                "federation": {"clients": 2, "rounds": 1},
                "tasks": {
                    "files": {
                        "train": str(tmp_path / "rows.csv"),
                        "text": ["text"],
                        "label": "label",
                        "max_length": 16,
                        "train_examples": 500,
                    }
                },
                "partitions": {"iid": {}},
                "methods": {"fedavg": {}},
            }
        )
    )
    code = """
import re, sys
from pathlib import Path
from fedlm.__main__ import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""
    command = ["prepare", "--config", str(tmp_path / "study.yaml"), "--task", "files"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--results", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    said, kilobytes = done.stdout.splitlines()
    assert "310000 examples" in said
    assert int(kilobytes) * 1024 <= 600e6


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    play(*sys.argv[1:])
