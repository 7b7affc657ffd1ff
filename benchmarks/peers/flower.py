"""Flower: its FedAvg strategy in its simulation (Ray), one client at a time with all threads."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import sys
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

PROGRAMS = str(Path(__file__).resolve().parent)
if PROGRAMS not in sys.path:
    sys.path.insert(0, PROGRAMS)
os.environ["PYTHONPATH"] = PROGRAMS  # for the processes that Ray starts
os.environ.setdefault("WORKLOAD", sys.argv[1] if len(sys.argv) > 1 else "")

from workload import Clock, Workload, arguments, finish  # noqa: E402

_kept: dict[str, tuple[Workload, torch.nn.Module]] = {}


def resident() -> tuple[Workload, torch.nn.Module]:
    """Return the workload and the model, of which a process makes only one."""
    folder = os.environ["WORKLOAD"]
    if folder not in _kept:
        work = Workload(Path(folder))
        _kept[folder] = work, work.model()
    return _kept[folder]


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Let a client have its turn."""
    work, model = resident()
    client = int(context.node_config["partition-id"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    work.train(model, int(message.content["config"]["server-round"]), client)
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": work.examples[client]}),
    }
    return Message(content=RecordDict(content), reply_to=message)


def main() -> None:
    """Run the workload."""
    work, folder = arguments()
    model = work.model()
    final: dict[str, torch.Tensor] = {}
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=work.clients)
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=work.rounds
        )
        final.update(result.arrays.to_torch_state_dict())

    clock = Clock()
    resources = {"client_resources": {"num_cpus": work.threads, "num_gpus": 0.0}}
    resources["init_args"] = {"num_cpus": work.threads}
    run_simulation(server_app, client_app, work.clients, backend_config=resources)
    names = [name for name, _ in model.named_parameters()]
    finish(folder, clock.read(), {name: final[name] for name in names})


if __name__ == "__main__":
    main()
