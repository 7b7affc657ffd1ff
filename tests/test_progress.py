"""The progress bar of a study: rounds are counted once, and only those of this start."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
import tiny_study
from test_pipeline import Place

from fedlm.jobs import progress
from fedlm.jobs.folders import Folders
from fedlm.study import reading


def test_rounds_are_counted_from_logs_and_records(tmp_path):
    study = reading.load(tiny_study.write(tmp_path, federation={"clients": 2, "rounds": 5}))
    folders = Folders(study.study, tmp_path / "results")
    runs = list(study.runs())
    logs = folders.root / "logs" / "train"
    logs.mkdir(parents=True)
    old = logs / "old.log"
    old.write_text(f"{runs[0].path}: round 4/5: loss 1\n")
    os.utime(old, (1, 1))
    rounds = progress.Rounds(study, runs, folders)
    assert (rounds.done(), rounds.total) == (0, 10)  # the log of an earlier run of the pipeline says nothing
    log = logs / "bundle0.log"
    log.write_text(
        f"{runs[0].path}: round 1/5: loss 1\n{runs[0].path}: round 2/5: loss 1\nstudy: round 9/9\n"
    )
    assert rounds.done() == 2
    log.write_text(log.read_text() + f"{runs[1].path}: already finished; its record is restored\n")
    os.utime(log, ns=(2**62, 2**62))
    assert rounds.done() == 7
    folders.record(runs[0]).parent.mkdir(parents=True)
    folders.record(runs[0]).write_text("{}")
    assert rounds.done() == 10


def test_without_a_terminal_there_is_no_bar(tmp_path, monkeypatch):
    study = reading.load(tiny_study.write(tmp_path))
    monkeypatch.delenv(progress.SHOWN, raising=False)
    rounds = progress.Rounds(study, study.runs(), Folders(study.study, tmp_path))
    assert progress.show(rounds, "study", logging.getLogger("none")) is None
    assert progress.SHOWN not in os.environ


@pytest.mark.slow
def test_a_terminal_gets_one_bar_and_the_logs_get_the_lines(tmp_path):
    place = Place(tmp_path, methods={"head_only": None}, federation={"clients": 2, "rounds": 3})
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    shown = []

    def read():
        while True:
            try:
                block = os.read(master, 4096)
            except OSError:
                return
            if not block:
                return
            shown.append(block)

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "snakemake", "collect", "--cores", "1", "--configfile", str(place.study)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=slave, stderr=slave, timeout=300)
    os.close(slave)
    reader.join()
    text = b"".join(shown).decode(errors="replace")
    assert done.returncode == 0, text
    assert "3 of 3 rounds" in text and re.search(r"tiny: +100%", text)
    assert "Training head_only on films" in text  # Snakemake's own lines stay
    assert ": round 1/3" not in text
    log = tmp_path / "results/tiny/logs/train/films/iid/head_only/seed1.log"
    assert "films/iid/head_only/seed1: round 3/3" in log.read_text()
