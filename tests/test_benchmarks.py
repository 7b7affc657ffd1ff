"""The benchmarks run: what they print is read by people, and nothing else would notice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["block.py", "--repeats", "1"], "time / FLOPs: first block"),
        (["turns.py", "--clients", "1", "--rounds", "1", "--steps", "1"], "FedPrompt  "),
    ],
    ids=["block", "turns"],
)
def test_a_benchmark_prints_its_result(arguments, last):
    script, *options = arguments
    command = [sys.executable, ROOT / "benchmarks" / script, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1].startswith(last)
