"""BlazeFL: its FedAvg server and its trainer of one client after the other, in one process."""

from types import SimpleNamespace

import torch
from blazefl.contrib.fedavg import FedAvgBaseClientTrainer, FedAvgBaseServerHandler, FedAvgUplinkPackage
from blazefl.core import deserialize_model, serialize_model
from workload import Clock, Workload, arguments, finish


class Trainer(FedAvgBaseClientTrainer):
    """Trains on the workload's batches, with its optimizer; all else is BlazeFL's."""

    def __init__(self, work: Workload, selector: SimpleNamespace) -> None:
        dataset = SimpleNamespace(get_dataloader=lambda type_, cid, batch_size, generator: None)
        super().__init__(selector, "model", dataset, "cpu", work.clients, 1, 1, work.learning_rate, 0)
        self.work, self.round = work, 1

    def train(self, model_parameters: torch.Tensor, train_loader: None, cid: int) -> FedAvgUplinkPackage:
        """Let a client have its turn."""
        deserialize_model(self.model, model_parameters)
        self.work.train(self.model, self.round, cid)
        return FedAvgUplinkPackage(cid, serialize_model(self.model), self.work.examples[cid])


def main() -> None:
    """Run the workload."""
    work, folder = arguments()
    selector = SimpleNamespace(select_model=lambda name: work.model())
    trainer = Trainer(work, selector)
    server = FedAvgBaseServerHandler(
        selector, "model", SimpleNamespace(), work.rounds, work.clients, 1.0, "cpu", 1, 0
    )
    work.batches(1, 0)
    clock = Clock()
    while not server.if_stop():
        clients = server.sample_clients()
        trainer.local_process(server.downlink_package(), clients)
        for package in trainer.uplink_package():
            server.load(package)
        trainer.round += 1
    finish(folder, clock.read(), dict(server.model.named_parameters()))


if __name__ == "__main__":
    main()
