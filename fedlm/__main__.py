"""The command line: `python -m fedlm COMMAND --help`."""

import os
import sys
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlm.base.errors import UserError

if TYPE_CHECKING:
    from fedlm.jobs.folders import Folders
    from fedlm.study.study import Study

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="fedlm-bench: accuracy, memory, communication and compute of federated fine-tuning methods.",
)

Config = Annotated[Path, typer.Option("--config", help="The study file.")]
Results = Annotated[Path, typer.Option(help="Folder of the results.")]
TaskLabel = Annotated[str, typer.Option("--task", help="Label of a task in the study.")]
PartitionLabel = Annotated[str, typer.Option("--partition", help="Label of a partition in the study.")]
MethodLabel = Annotated[str, typer.Option("--method", help="Label of a method in the study.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]


def _study(config: Path) -> "Study":
    from fedlm.study.reading import load

    return load(config)


def _folders(study: "Study", results: Path) -> "Folders":
    from fedlm.jobs.folders import Folders

    return Folders(study.study, results)


@app.command()
def check(config: Annotated[Path, typer.Argument(help="The study file.")]) -> None:
    """Validate a study before any job starts: keys, values, labels, files, models."""
    from fedlm.jobs.obstacles import check_times
    from fedlm.study.check import check as check_study

    study = _study(config)
    for note in check_study(study):
        print(f"note: {note}", file=sys.stderr)
    check_times(study)
    runs = list(study.runs())
    trials = len(list(study.trials()))
    print(
        f"{config}: study {study.study!r} is valid: {len(runs)} runs"
        + (f", {trials} trials" if trials else "")
    )


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The study file.")],
    cores: Annotated[
        int | None, typer.Option(min=1, help="Processor cores that the pipeline gets. [all]")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Say what a study will take: hours on this machine, memory, disk. Does one turn of each method.

    Nothing is downloaded: without data or weights, costs are predicted and hours are not known.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from fedlm.jobs import planning
    from fedlm.study.check import check as check_study

    study = _study(config)
    check_study(study)
    found = planning.plan(
        study,
        config,
        _folders(study, results),
        cores or len(os.sched_getaffinity(0)),
        log=lambda line: print(line, file=sys.stderr),
    )
    print("\n".join(planning.describe(found, study)))


@app.command()
def init(
    data: Annotated[str, typer.Option(help="A .csv, .parquet or .jsonl file, or a folder like one.")],
    text: Annotated[str, typer.Option(help="Columns of the input, with commas between them.")],
    label: Annotated[str, typer.Option(help="Column of the class, the number, or the text to be produced.")],
    group: Annotated[
        str | None, typer.Option(help="Column of who holds a row, for natural clients. [none]")
    ] = None,
) -> None:
    """Print a commented study file for your own data that runs as it is; nothing is written.

    The two commands that follow are printed to standard error.
    """
    from fedlm.study.starter import commands, starter

    written, notes = starter(data, [name.strip() for name in text.split(",") if name.strip()], label, group)
    print(written, end="")
    name = written.split("study: ")[1].split("\n")[0].strip("'")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"Save it, for instance as {name}.yaml; then:", file=sys.stderr)
    for command in commands(Path(f"{name}.yaml")):
        print(f"    {command}", file=sys.stderr)


@app.command()
def schema() -> None:
    """Print the JSON schema of a study file, the content of config/schema.json."""
    from fedlm.study.schema import schema as study_schema

    print(study_schema(), end="")


@app.command()
def prepare(config: Config, task: TaskLabel, results: Results = Path("results")) -> None:
    """Tokenise a task once, for all its runs."""
    from fedlm.jobs import running

    study = _study(config)
    running.prepare(study, task, _folders(study, results), print)


@app.command()
def partition(
    config: Config,
    task: TaskLabel,
    partition: PartitionLabel,
    seed: Seed,
    results: Results = Path("results"),
) -> None:
    """Divide a prepared task's training examples among the clients."""
    from fedlm.jobs import running

    study = _study(config)
    made = running.partition(study, task, partition, seed, _folders(study, results))
    print(f"{task} {partition} seed {seed}: {made.examples} examples, {made.clients} clients")


@app.command()
def run(
    config: Config,
    task: TaskLabel,
    partition: PartitionLabel,
    method: MethodLabel,
    seed: Seed,
    output: Annotated[
        Path | None, typer.Option(help="File for the record. [its place in the study's results]")
    ] = None,
    results: Results = Path("results"),
) -> None:
    """Execute one run and write its record; an interrupted run continues from its last saved round."""
    from fedlm.jobs import running
    from fedlm.study.study import Run

    study = _study(config)
    chosen = Run(task, partition, method, seed)
    study.run(*chosen)
    folders = _folders(study, results)
    running.execute(study, chosen, output or folders.record(chosen), folders)


@app.command("run-many")
def run_many(
    config: Config,
    runs: Annotated[
        list[str], typer.Argument(help="Runs as task/partition/method/seed<k>, or .../trial<k>.")
    ],
    results: Results = Path("results"),
) -> None:
    """Execute several runs or trials in one process; each record is written as soon as its run is finished.

    A run that fails does not stop the others; the exit status is then 1.
    """
    from fedlm.jobs import running

    study = _study(config)
    folders = _folders(study, results)
    failed = 0
    for chosen in study.named(runs):
        failed |= _guarded(partial(running.execute, study, chosen, folders.record(chosen), folders))
    raise typer.Exit(failed)


@app.command()
def choose(config: Config, task: TaskLabel, method: MethodLabel, results: Results = Path("results")) -> None:
    """Choose a method's searched settings by the validation scores of its trials, and write them down."""
    from fedlm.jobs import tuning

    study = _study(config)
    choice = tuning.choose(study, task, method, _folders(study, results))
    values = ", ".join(f"{key} {value}" for key, value in choice["chosen"].items())
    print(f"{task}/{method}: trial {choice['trial']}: {values}; validation {choice['validation_score']:.4f}")


@app.command()
def rerun(
    record: Annotated[Path, typer.Argument(help="The record of a finished run.")],
    results: Annotated[
        Path | None, typer.Option(help="New folder for its files; by default none are kept.")
    ] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option(help="Folder of the run's plug-ins; repeatable. [the folders in the record]"),
    ] = None,
) -> None:
    """Repeat a run from its record alone, and report whether the results are the same.

    The code of plug-ins that the record names is executed, like that of a study's plug-ins.
    The exit status is 0 if the final payload, scores, bytes, FLOPs and memory are the same, 1 if not.
    """
    from fedlm.jobs.rerun import rerun as make_again

    raise typer.Exit(1 if make_again(record, results, plugins) else 0)


@app.command()
def compare(
    method: Annotated[
        str, typer.Argument(help="Name of a method, or a Python file with one, whose code runs.")
    ],
    study: Annotated[
        str, typer.Option(help="A tuned study: a file, or the name of one in config/.")
    ] = "benchmark",
    results: Results = Path("results"),
) -> None:
    """Tune and run a method as a study's other methods were, and place it in their ranking.

    What is finished already is not repeated, so the command can be interrupted and started again.
    """
    from fedlm.jobs import comparing, running

    found, label = comparing.study_with(study, method)
    apart = comparing.compare(found, label, _folders(found, results), running.log)
    print((apart.root / "tables" / "ranking.md").read_text())
    print(f"tables   {apart.root / 'tables'}\nfigures  {apart.root / 'figures'}")


@app.command()
def verify(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="The study file.")],
    results: Results = Path("results"),
    figures: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    findings: Annotated[
        Path | None, typer.Option(help="Where the findings are, to be checked too. [not checked]")
    ] = None,
    cheapest: Annotated[int, typer.Option(min=0, help="How many of the cheapest runs to repeat.")] = 5,
    drawn: Annotated[int, typer.Option(min=0, help="How many others to repeat, drawn at random.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draw. [a new one each time]")] = None,
    predict: Annotated[bool, typer.Option(help="Predict the costs of claims, too: minutes.")] = True,
) -> None:
    """Check a study's records: unchanged, following from the study, giving its tables, repeatable.

    The exit status is 0 if everything holds, 1 if something does not.
    """
    from fedlm.jobs import verification

    study = _study(config)
    folders = _folders(study, results)
    faults = [
        *verification.faults(study, folders),
        *verification.differences(study, folders, figures / study.study, findings, predict),
    ]
    for line in faults:
        print(line)
    if not faults:
        print(
            f"{study.study}: all records are unchanged, and give all tables and figures again, byte for byte"
        )
    paths = verification.chosen_runs(study, folders, cheapest, drawn, seed)
    repeated = [verification.repeats(path, print) for path in paths]
    raise typer.Exit(0 if not faults and all(repeated) else 1)


@app.command()
def clean(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="The study file.")],
    results: Results = Path("results"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
) -> None:
    """Remove the records, checkpoints, partitions and prepared tasks that the study no longer uses.

    What the study or a run in progress uses is kept.
    """
    from fedlm.jobs.cleaning import clean as clean_up

    study = _study(config)
    removed = clean_up(study, _folders(study, results), dry_run)
    for path, size in removed:
        print(f"{path}: {size:,} bytes")
    verb = "would be removed" if dry_run else "removed"
    print(f"{study.study}: {len(removed)} {verb}, {sum(size for _, size in removed):,} bytes")


@app.command()
def collect(config: Config, results: Results = Path("results")) -> None:
    """Compile the existing records into parquet files of runs, rounds and trials; list the missing ones."""
    from fedlm.jobs import collecting

    study = _study(config)
    folders = _folders(study, results)
    count, missing = collecting.collect(study, folders)
    print(f"{study.study}: {count} records compiled")
    for one in missing:
        outdated = " (its record was made with other settings)" if folders.record(one).exists() else ""
        print(f"missing: {one.path}{outdated}", file=sys.stderr)


@app.command()
def tables(
    config: Config,
    results: Results = Path("results"),
    show: Annotated[bool, typer.Option(help="Print the main table instead of writing files.")] = False,
    devices: Annotated[
        Path | None, typer.Option(help="Own devices and links, added to those of config/devices.yaml.")
    ] = None,
) -> None:
    """Write the tables of a study from its compiled records."""
    from fedlm.jobs import reports

    study = _study(config)
    folders = _folders(study, results)
    if show:
        print(reports.show(study, folders))
    else:
        reports.write_tables(study, folders, devices)


@app.command()
def figures(
    config: Config,
    results: Results = Path("results"),
    destination: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
) -> None:
    """Draw the figures of a study from its compiled records and partitions."""
    from fedlm.jobs import reports

    study = _study(config)
    reports.draw_figures(study, _folders(study, results), destination / study.study)


@app.command()
def explorer(
    config: Config,
    results: Results = Path("results"),
    output: Annotated[Path | None, typer.Option(help="[explorer.html in the study's results]")] = None,
    devices: Annotated[
        Path | None, typer.Option(help="Own devices and links, added to those of config/devices.yaml.")
    ] = None,
) -> None:
    """Write one web page with all results of a study, to open from a file: no network, no server."""
    from fedlm.jobs import reports

    study = _study(config)
    print(f"explorer  {reports.write_explorer(study, _folders(study, results), output, devices)}")


@app.command()
def findings(
    config: Config,
    results: Results = Path("results"),
    output: Annotated[Path | None, typer.Option(help="[findings.md in the study's results]")] = None,
) -> None:
    """Write the findings of a tuned study: two pages whose every number comes from its tables."""
    from fedlm.jobs import reports

    study = _study(config)
    folders = _folders(study, results)
    destination = output or folders.root / "findings.md"
    reports.write_findings(study, folders, destination)
    print(f"findings  {destination}")


def _refuse_others(context: typer.Context, source: str, used: Collection[str]) -> None:
    """Raise UserError if an option is given that would have no effect beside `source`."""
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "")
        if given is not None and given.name == "COMMANDLINE" and option.name not in used:
            raise UserError(f"{option.opts[0]}: not allowed with {source}, where it has no effect")


@app.command()
def costs(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option("--config", help="A study, instead of models.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Label, folder, config.json or hub id; repeatable. [all labels]")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Name of a method; repeatable. [the four core methods]")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Kind of task. [classification; decoders: causal]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[encoders: 64, decoders: 1]")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens. [encoders: 128, decoders: 512]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a turn.")] = 10,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes of a step.")] = 1,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    weights: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    payload: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute layers in backward.")] = False,
    clients: Annotated[int, typer.Option(min=1, help="With 32, every block is trained.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    positions: Annotated[
        int, typer.Option(min=0, help="How many of the equal blocks to measure; 0: all.")
    ] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the tables. [results/costs for the full table]")
    ] = None,
    drawings: Annotated[
        Path | None, typer.Option("--figures", help="Folder for figures. [figures/costs]")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="With --config: only write the needs of its jobs to this file.")
    ] = None,
    claims: Annotated[
        Path | None, typer.Option(help="Only write the costs that config/claims.yaml names to this csv file.")
    ] = None,
) -> None:
    """Predict bytes, memory and FLOPs of methods on models, without weights, data, GPU or network.

    Without --config, --model and --method: the table of the four core methods on all labelled models, also
    written to results/costs and figures/costs. With them, it is written only to --output and --figures.
    """
    from fedlm.costs import cases, figures, tables
    from fedlm.study.check import check as check_study

    if predictions is not None and config is None:
        raise UserError("--predictions: needs --config, the study whose jobs are predicted")
    if config is not None or claims is not None:
        of_study = {"config", "steps", "positions", "output", "drawings", "predictions"}
        source, used = ("--config", of_study) if claims is None else ("--claims", {"claims"})
        _refuse_others(context, source, used)
    if claims is not None:
        from fedlm.costs.claimed import write_claimed

        lines = write_claimed(claims, log=lambda line: print(line, file=sys.stderr))
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(2 if lines else 0)
    if config is not None:
        study = _study(config)
        check_study(study)
        asked = cases.of_study(study, steps, for_requests=predictions is not None)
    else:
        asked = cases.of_models(
            model,
            method,
            kind=kind,
            batch_size=batch_size,
            length=length,
            steps=steps,
            accumulation=accumulation,
            optimizer=optimizer,
            weights=weights,
            payload=payload,
            gradient_checkpointing=gradient_checkpointing,
            clients=clients,
            rounds=rounds,
        )
    found = cases.cost_all(asked, positions or None, log=lambda line: print(line, file=sys.stderr))
    failures = cases.failures(asked, found)
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    if predictions is not None:
        cases.write_requests(predictions, asked, found)
    elif len(failures) < len(found):
        if config is None and not model and not method:
            output, drawings = output or Path("results/costs"), drawings or Path("figures/costs")
        rows, blocks = tables.frames(asked, found)
        print(tables.terminal(rows))
        if output:
            tables.make(rows, blocks, output)
            print(f"\ntables   {output}")
        if drawings:
            figures.make(rows, blocks, drawings)
            print(f"figures  {drawings}")
    raise typer.Exit(2 if failures else 0)


@app.command()
def advise(
    model: Annotated[list[str], typer.Option(help="Label, folder, config.json or hub id; repeatable.")],
    link: Annotated[str, typer.Option(help="Name of a link in the file of devices.")],
    device: Annotated[str | None, typer.Option(help="Name of a device in the file of devices.")] = None,
    fleet: Annotated[
        str | None, typer.Option(help="Instead of a device, several: phone_midrange=0.6,laptop=0.4")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Name of a method; repeatable. [all]")] = None,
    clients: Annotated[int, typer.Option(min=1)] = 64,
    stragglers: Annotated[float, typer.Option(help="Share of the clients that train more slowly.")] = 0.0,
    slowdown: Annotated[float, typer.Option(help="How many times as long they train.")] = 4.0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[encoders: 64, decoders: 1]")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens. [encoders: 128, decoders: 512]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a turn.")] = 10,
    weights: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    devices: Annotated[
        Path | None, typer.Option(help="Own devices and links, added to those of config/devices.yaml.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the table as csv, md and tex.")] = None,
) -> None:
    """Say which methods fit given devices, and how long turns and rounds take on them."""
    from fedlm.costs import advice, cases, tables
    from fedlm.results.devices import read_devices
    from fedlm.results.tables import write
    from fedlm.study.plugins import discover_methods

    known = read_devices(devices)
    if (device is None) == (fleet is None):
        raise UserError("--device, --fleet: give one of them")
    shares = {device: 1.0} if device else advice.parse_shares(fleet or "")
    for name in shares:
        known.device(name)
    line = known.link(link)
    dealt = advice.make_fleet(shares, clients, stragglers, slowdown)
    asked = cases.of_models(
        model,
        method or sorted(discover_methods()),
        batch_size=batch_size,
        length=length,
        steps=steps,
        weights=weights,
        clients=clients,
        rounds=1,
    )
    asked = [cases.long_enough(case) for case in asked]
    found = cases.cost_all(asked, positions=3, log=lambda line: print(line, file=sys.stderr))
    failures = cases.failures(asked, found)
    for text in failures:
        print(f"error: {text}", file=sys.stderr)
    if len(failures) < len(found):
        rounds = advice.rounds_to_target(Path("results/benchmark/tables/cost_to_target.csv"))
        table = advice.advise(asked, found, known, dealt, line, rounds)
        print(tables.typed(table.cells, table.notes))
        if output:
            write([table], output)
            print(f"\ntable  {output}")
    raise typer.Exit(2 if failures else 0)


@app.command("test-method")
def test_method(
    path: Annotated[Path, typer.Argument(help="A Python file with one method, anywhere.")],
    settings: Annotated[
        str, typer.Option(help="Settings of the method as JSON, such as '{\"rank\": 4}'. [its defaults]")
    ] = "{}",
) -> None:
    """Run the conformance tests of this repository on a method, with tiny models. Runs the file's code.

    Prints one line per check. The exit status is 0 if all pass, 1 if one fails.
    """
    from fedlm.jobs import conformance

    raise typer.Exit(0 if conformance.test_method(path, settings) else 1)


PluginFolders = Annotated[
    list[str] | None, typer.Option("--plugins", help="Folder with more of them; repeatable. Its code runs.")
]


@app.command()
def methods(plugins: PluginFolders = None) -> None:
    """List the methods, each with its reference and one line about it."""
    from fedlm.study.plugins import find

    found = find([Path(folder) for folder in plugins or ()]).methods
    _list((name, kind.title, kind.reference, _first_line(kind)) for name, kind in found.items())


@app.command()
def tasks(plugins: PluginFolders = None) -> None:
    """List the tasks, with the source of their data."""
    from fedlm.study.plugins import find

    found = find([Path(folder) for folder in plugins or ()]).tasks
    _list((name, kind.title, kind.kind, kind.reference) for name, kind in found.items())


@app.command()
def models() -> None:
    """List the models that have a label; name any other by its folder or hub id."""
    from fedlm.models.catalogue import CATALOGUE

    _list((name, found.title, found.hub, found.reference) for name, found in CATALOGUE.items())


def _first_line(kind: type) -> str:
    module = sys.modules[kind.__module__]
    return (module.__doc__ or kind.__doc__ or "").strip().splitlines()[0]


def _list(entries: Iterable[tuple]) -> None:
    rows = [tuple(map(str, entry)) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _guarded(action: Callable[[], object]) -> int:
    """Run an action; print what the user must know about a failure; return the exit status."""
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from fedlm.jobs.failures import describe

        message = describe(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """Run the command line; return the exit status: 0 done, 1 a failed run, 2 bad input, 130 interrupted."""
    try:
        return _guarded(app)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    if status == 130:  # typer's answer to Ctrl-C
        print("interrupted; a run continues from its last saved round when started again", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
