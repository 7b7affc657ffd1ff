"""FedAvg side by side: this suite, a bare PyTorch loop, pfl, Flower and BlazeFL on the same turns.

    python benchmarks/peers/run.py [--markdown] [--rounds 2] [--repeats 2] [--threads 2]

Every program gets the same model (MiniLM, dropout off), the same batches (BBC News) and AdamW, and is run in
a process and an environment of its own, which are made in `benchmarks/peers/.environments` when they are not
there. All programs run in turn, then all again. Printed are the seconds of each repetition, the ratio to the
bare loop of the same repetition (the median over repetitions), the largest memory of the processes together
(proportional set size, sampled), processor seconds, the largest difference of a final weight from the bare
loop's, and how far a weight moved at most. `docs/performance.md` says how to read it.
"""

import argparse
import datetime
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".environments"
PROGRAMS = {  # its title, and the file with arguments of its own
    "bare": ("Bare PyTorch loop", "bare.py"),
    "suite": ("This suite", "suite.py"),
    "suite-pytorch": ("This suite, PyTorch's products", "suite.py", "--pytorch-products"),
    "pfl": ("pfl", "apple_pfl.py"),
    "flower": ("Flower", "flower.py"),
    "blazefl": ("BlazeFL", "blaze.py"),
}
WORKLOADS = {"100x1": (100, 1), "10x10": (10, 10)}  # clients, steps a turn


class Unusable(Exception):
    """A program whose environment cannot be made, or that failed; the message says why."""


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), help="CLIENTSxSTEPS")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens a text, at most")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    options = parser.parse_args()
    pythons = {}
    for name in options.programs:
        try:
            pythons[name] = environment(name)
        except Unusable as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    for workload in options.workloads:
        clients, steps = map(int, workload.split("x"))
        with tempfile.TemporaryDirectory(prefix="fedlm-peers-") as folder:
            place = Path(folder)
            write(place / "workload", options, clients, steps)
            found = measure(pythons, place, options.repeats)
            report(found, f"{clients} clients x {steps} steps, {options.rounds} rounds", options)


def environment(name: str) -> str:
    """Return the interpreter of a program's environment, which is made where it is missing or out of date."""
    if PROGRAMS[name][1] == "suite.py":
        return sys.executable
    requirements = HERE / f"requirements-{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    folder, mark = ENVIRONMENTS / name, ENVIRONMENTS / name / "requirements.sha256"
    python = folder / "bin" / "python"
    if mark.is_file() and mark.read_text() == digest:
        return str(python)
    print(f"making the environment of {name}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    install = [python, "-m", "pip", "install", "--quiet", "--ignore-requires-python", "-r", requirements]
    for command in ([sys.executable, "-m", "venv", folder], install):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise Unusable((done.stderr or done.stdout).strip().splitlines()[-1])
    mark.write_text(digest)
    return str(python)


def write(folder: Path, options: argparse.Namespace, clients: int, steps: int) -> None:
    """Write the workload, in a process of its own."""
    arguments = (options.model, options.length, clients, options.rounds, steps, options.threads)
    code = (
        f"import sys; from pathlib import Path; import suite; suite.write(Path(sys.argv[1]), *{arguments!r})"
    )
    folder.mkdir()
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=HERE, check=True)


def measure(pythons: dict[str, str], place: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Run all programs in turn, `repeats` times, and return what each repetition of each took."""
    found: dict[str, list[dict[str, float]]] = {}
    failed: set[str] = set()
    for repeat in range(repeats):
        for name in [name for name in pythons if name not in failed]:
            result = place / f"{name}-{repeat}"
            result.mkdir()
            try:
                peak = run(pythons[name], PROGRAMS[name][1:], place / "workload", result)
            except Unusable as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                failed.add(name)
                found.pop(name, None)
                continue
            times = json.loads((result / "times.json").read_text())
            found.setdefault(name, []).append({**times, "memory": peak, **differences(place, name, repeat)})
            print(f"{name}: {times['seconds']:.1f} s", file=sys.stderr)
    return found


def run(python: str, program: tuple[str, ...], workload: Path, result: Path) -> int:
    """Run a program, a file with its arguments, and return the largest memory of its processes, in bytes."""
    file, *arguments = program
    command = [python, str(HERE / file), str(workload), str(result), *arguments]
    threads = json.loads((workload / "workload.json").read_text())["threads"]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    peak = 0
    with (result / "log").open("wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=settings, cwd=result)
        while child.poll() is None:
            peak = max(peak, sum(map(proportional, family(child.pid))))
            time.sleep(0.5)
    if child.returncode:
        raise Unusable((result / "log").read_text(errors="replace").strip().splitlines()[-1])
    return peak


def family(process: int) -> list[int]:
    """Return the numbers of a process and of all that it started."""
    found = [process]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, tasks.read_text().split())
            except OSError:
                continue  # it has ended
    return found


def proportional(process: int) -> int:
    """Return a process's memory in bytes, in which memory that several share counts once for all of them."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def differences(place: Path, name: str, repeat: int) -> dict[str, float]:
    """Return the largest difference of the final weights from the bare loop's, and from the first weights."""
    from safetensors.torch import load_file

    weights = load_file(place / f"{name}-{repeat}" / "weights")
    first = load_file(place / "workload" / "model" / "model.safetensors")
    moved = max(float((weights[key] - first[key]).abs().max()) for key in weights)
    bare = place / f"bare-{repeat}" / "weights"
    if not bare.is_file():
        return {"moved": moved}
    other = load_file(bare)
    if other.keys() != weights.keys():
        raise SystemExit(f"{name}: its weights have other names than the bare loop's")
    largest = max(float((weights[key] - other[key]).abs().max()) for key in other)
    return {"moved": moved, "difference": largest}


def report(found: dict[str, list[dict[str, float]]], title: str, options: argparse.Namespace) -> None:
    """Print one workload's table."""
    header = ["", "seconds", "ratio to bare", "memory (MB)", "processor s", "difference", "moved"]
    rows = [header, *(row(name, found) for name in found)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(header))]
    today = datetime.date.today().isoformat()
    print(f"\n{title}, {options.threads} threads; measured on {today}, {options.repeats} repetitions\n")
    for number, line in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if options.markdown else "  ".join(cells).rstrip())
        if options.markdown and number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.flush()


def row(name: str, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return a program's line of the table."""
    repeats = found[name]
    ratio, difference = "", ""
    if "bare" in found:
        pairs = zip(repeats, found["bare"], strict=True)
        ratio = f"{statistics.median(own['seconds'] / bare['seconds'] for own, bare in pairs):.2f}"
        difference = f"{max(one['difference'] for one in repeats):.1e}"
    return [
        PROGRAMS[name][0],
        " ".join(f"{one['seconds']:.1f}" for one in repeats),
        ratio,
        f"{max(one['memory'] for one in repeats) / 1e6:.0f}",
        f"{statistics.median(one['processor_seconds'] for one in repeats):.0f}",
        difference,
        f"{max(one['moved'] for one in repeats):.1e}",
    ]


if __name__ == "__main__":
    main()
