"""The cases whose costs are predicted, in parallel: methods on models, or all of a study."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy
from pydantic import ValidationError

from fedlm.base.errors import UserError
from fedlm.base.files import write_atomically
from fedlm.costs.prediction import Costs, predict
from fedlm.federation.method import Method, MethodConfig
from fedlm.federation.passes import GivenBatches
from fedlm.federation.settings import Federation, Training
from fedlm.models.catalogue import CATALOGUE
from fedlm.models.config import Kind, ModelConfig
from fedlm.models.loading import build_config, is_encoder, max_positions
from fedlm.study.plugins import discover_methods, file_of, find, is_own
from fedlm.study.study import Study

CORE = ("fedavg", "fedcybgd", "fedlora", "fedprompt")
TURNS_FOR_A_REQUEST = 200  # enough to train every block, when only the memory request matters
KINDS_OF_TASK: tuple[Kind, ...] = get_args(Kind)


class Case(NamedTuple):
    """One row of the costs: a method on a model, with everything that its costs depend on."""

    task: str  # the label in a study, or ""
    model: str  # what the row is called
    method: str
    title: str
    config: ModelConfig
    name: str  # of the method's file
    method_class: type[Method]
    settings: MethodConfig
    kind: Kind
    num_labels: int
    length: int
    steps: int  # optimizer steps of a turn
    federation: Federation
    training: Training

    def key(self) -> str:
        """Return a text that is the same for cases with equal costs."""
        values = self._asdict() | dict.fromkeys(("task", "model", "method", "title", "method_class"))
        for name in ("config", "settings", "federation", "training"):
            values[name] = values[name].model_dump(mode="json")
        return json.dumps(values, sort_keys=True)


def natural_kind(model: ModelConfig) -> Kind:
    """Return the default kind of task for a model: classification, or causal for decoders."""
    return "classification" if is_encoder(build_config(model, "classification", 2)) else "causal"


def case_of(
    model: str,
    method: str,
    *,
    kind: str | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    steps: int = 10,
    federation: Federation | None = None,
    training: dict[str, Any] | None = None,
    loading: dict[str, Any] | None = None,
    payload: str = "float32",
) -> Case:
    """Return the case of one method with its default settings on one model.

    The kind of task is by default the model's natural one, or the method's first where it does not serve
    that. The batch is by default 64 texts of 128 tokens for encoders and 1 of 512 for decoders. `loading` are
    settings of the model besides its source.

    Raises UserError for a method or model that does not exist, a kind that the method does not serve, or a
    length beyond the model's positions.
    """
    methods = discover_methods()
    if method not in methods:
        raise UserError(f"--method: {method!r}; allowed: {', '.join(sorted(methods))}")
    if kind is not None and kind not in KINDS_OF_TASK:
        raise UserError(f"--kind: {kind!r}; allowed: {', '.join(KINDS_OF_TASK)}")
    config = ModelConfig(source=model, **(loading or {}))
    natural, served = natural_kind(config), methods[method].kinds
    if kind is not None and kind not in served:
        raise UserError(f"--kind: {kind!r}; allowed with method {method}: {', '.join(served)}")
    chosen = cast(Kind, kind or (natural if natural in served else served[0]))
    encodes = natural == "classification"
    positions = max_positions(config)
    length = length or min(128 if encodes else 512, positions or 512)
    if positions is not None and length > positions:
        raise UserError(f"--length: {length}; allowed: at most {positions}, the positions of {model}")
    return Case(
        task="",
        model=model,
        method=method,
        title=methods[method].title,
        config=config,
        name=method,
        method_class=methods[method],
        settings=methods[method].Config.model_validate({"payload": payload}),
        kind=chosen,
        num_labels=1 if chosen in ("regression", "causal") else 2,
        length=length,
        steps=steps,
        federation=federation or Federation(clients=32, rounds=3),
        training=Training(batch_size=batch_size or (64 if encodes else 1), **(training or {})),
    )


def long_enough(case: Case) -> Case:
    """Return the case with ten rounds if the method does something that it has too few for."""
    method = case.method_class(case.settings, case.federation.clients, 0)
    if not method.left_out(case.federation.rounds):
        return case
    return case._replace(federation=case.federation.model_copy(update={"rounds": 10}))


def of_models(
    models: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    *,
    kind: str | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    steps: int = 10,
    accumulation: int = 1,
    optimizer: str = "adamw",
    weights: str = "float32",
    payload: str = "float32",
    gradient_checkpointing: bool = False,
    clients: int = 32,
    rounds: int = 3,
) -> list[Case]:
    """Return a case for each model and method: by default all labels of the catalogue and the core methods.

    Raises UserError naming the option of the command line whose value is not allowed.
    """
    try:
        federation = Federation(clients=clients, rounds=rounds)
        chosen = {"accumulation": accumulation, "optimizer": optimizer}
        training = Training.model_validate(chosen).model_dump(exclude_unset=True)
        loading: dict[str, Any] = {"weights": weights, "gradient_checkpointing": gradient_checkpointing}
        ModelConfig(source="x", **loading)
        return [
            case_of(
                model,
                method,
                kind=kind,
                batch_size=batch_size,
                length=length,
                steps=steps,
                federation=federation,
                training=training,
                loading=loading,
                payload=payload,
            )
            for model in models or CATALOGUE
            for method in methods or CORE
        ]
    except ValidationError as error:
        fault = error.errors()[0]
        option = str(fault["loc"][-1]).replace("_", "-")
        raise UserError(f"--{option}: {fault['input']!r}; {fault['msg']}") from None


def of_study(study: Study, steps: int = 10, for_requests: bool = False) -> list[Case]:
    """Return a case for each task and method of a study.

    A turn has the study's local_steps, or else `steps`, since the number of examples is not known.
    `for_requests` leaves out rounds that would only add bytes.
    """
    cases = []
    pairs = dict.fromkeys((run.task, run.partition, run.method) for run in study.runs())
    first = {(task, method): partition for task, partition, method in reversed(pairs)}
    for task, method in dict.fromkeys((task, method) for task, _, method in pairs):
        run = study.run(task, first[task, method], method, study.seeds[0])
        kind = study.task(task)
        federation = run.federation
        if for_requests:
            share = min(federation.participation, TURNS_FOR_A_REQUEST / federation.clients)
            a_round = max(1, round(share * federation.clients))
            rounds = min(federation.rounds, -(-TURNS_FOR_A_REQUEST // a_round))
            federation = federation.model_copy(update={"participation": share, "rounds": rounds})
        labels = kind.count_labels() if kind.kind == "classification" else None
        cases.append(
            Case(
                task=task,
                model=run.model.source,
                method=method,
                title=study.methods[method].title,
                config=run.model,
                name=run.method,
                method_class=run.method_class,
                settings=run.method_settings,
                kind=kind.kind,
                num_labels=labels or (2 if kind.kind in ("classification", "question_answering") else 1),
                length=run.task_settings.max_length,
                steps=run.training.local_steps or (1 if for_requests else steps),
                federation=federation,
                training=run.training,
            )
        )
    return cases


def cost(case: Case, positions: int | None) -> Costs:
    """Return the costs of a case; `positions` as in `prediction.predict`."""
    # These warnings are meant for the developers of Transformers and peft.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    method = case.method_class(case.settings, case.federation.clients, 0)
    shape = build_config(case.config, case.kind, case.num_labels)
    most = max_positions(case.config)
    room = case.length if most is None else min(case.length, most - method.virtual_tokens())
    examples = case.training.batch_size * case.training.accumulation * case.steps
    training = case.training.model_copy(update={"local_epochs": 1, "local_steps": None})
    return predict(
        method,
        case.config,
        case.kind,
        case.num_labels,
        [numpy.arange(examples)] * case.federation.clients,
        GivenBatches(case.kind, room, getattr(shape, "type_vocab_size", 1) > 1),
        case.federation,
        training,
        positions,
    )


def cost_all(
    cases: Sequence[Case],
    positions: int | None = None,
    processes: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Costs | UserError]:
    """Return the costs of each case, or the error; cases with equal costs are computed once.

    `processes` run in parallel, by default one per processor core. `log` receives a line per finished case.
    """
    distinct = {case.key(): case for case in cases}
    # The largest first, so that no process is left with it at the end.
    order = sorted(distinct, key=lambda key: -_weight(distinct[key]))
    found: dict[str, Costs | UserError] = {}
    processes = min(processes or len(os.sched_getaffinity(0)), len(order))
    kinds = {case.method_class for case in cases}
    outside = sorted({file_of(kind).parent for kind in kinds if not is_own(kind)})
    with ProcessPoolExecutor(processes, initializer=_begin, initargs=(outside,)) as pool:
        futures = {pool.submit(_guarded, distinct[key], positions): key for key in order}
        for number, future in enumerate(as_completed(futures), 1):
            case, found[futures[future]] = distinct[futures[future]], future.result()
            log(f"{number} of {len(futures)}: {case.title} on {case.model}")
    return [found[case.key()] for case in cases]


def failures(cases: Sequence[Case], costs: Sequence[Costs | UserError]) -> list[str]:
    """Return a line for each case that has no costs, with the reason."""
    return [
        f"{case.title} on {case.model}: {found}"
        for case, found in zip(cases, costs, strict=True)
        if isinstance(found, UserError)
    ]


def _guarded(case: Case, positions: int | None) -> Costs | UserError:
    try:
        return cost(case, positions)
    except UserError as error:
        return error


def _weight(case: Case) -> int:
    shape = build_config(case.config, case.kind, case.num_labels)
    return shape.num_hidden_layers * (4 if case.name == "fedcybgd" else 1)


def _begin(plugin_folders: Sequence[Path]) -> None:
    """Prepare a process for its cases: one thread, and the plug-ins imported that its cases use."""
    import torch

    torch.set_num_threads(1)
    find(plugin_folders)


def requests(cases: Sequence[Case], costs: Sequence[Costs | UserError]) -> dict[str, dict[str, int]]:
    """Return what the jobs of a study need, by "task/method", in bytes."""
    return {
        f"{case.task}/{case.method}": needs_of(found)
        for case, found in zip(cases, costs, strict=True)
        if isinstance(found, Costs)
    }


def needs_of(found: Costs) -> dict[str, int]:
    """Return what decides the memory that a job requests, in bytes (`jobs.requests.request_mb`)."""
    return {
        "peak_memory_bytes": found.peak.peak,
        "parameter_bytes": found.peak.parameter,
        "exchanged_bytes": found.exchanged_bytes,
        "server_bytes": found.server_bytes,
    }


def write_requests(path: Path, cases: Sequence[Case], costs: Sequence[Costs | UserError]) -> None:
    """Write what the jobs of a study need, as the pipeline reads it."""
    write_atomically(path, (json.dumps(requests(cases, costs), indent=1, sort_keys=True) + "\n").encode())
