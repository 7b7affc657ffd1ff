"""pfl, Apple's framework pfl-research: its FederatedAveraging on its simulated backend, in one process."""

from collections.abc import Iterable, Iterator

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from workload import Batch, Clock, Workload, arguments, finish


class Module(torch.nn.Module):
    """The model, with the methods that pfl asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, **batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of a batch."""
        return self.model(**batch).loss

    def metrics(self, **batch: torch.Tensor) -> dict[str, Weighted]:
        """Return a number that costs nothing: pfl also scores in its first round, which is not measured."""
        return {"batches": Weighted(1, 1)}


class Turn(Dataset):
    """A client's examples in one round, in the batches of the workload."""

    def __init__(self, work: Workload, round: int, client: int) -> None:
        super().__init__(raw_data=(), user_id=str(client))
        self.work, self.round, self.client = work, round, client

    def __len__(self) -> int:
        return self.work.examples[self.client]

    def iter(self, batch_size: int | None) -> Iterable[Batch]:
        """Return the batches."""
        return self.work.batches(self.round, self.client)


def everyone(work: Workload) -> Iterator[tuple[int, int]]:
    """Yield all clients of each round, in order."""
    for round in range(1, work.rounds + 1):
        for client in range(work.clients):
            yield round, client


def main() -> None:
    """Run the workload."""
    work, folder = arguments()
    module = Module(work.model())
    work.batches(1, 0)
    clock = Clock()
    turns = everyone(work)
    data = FederatedDataset(lambda turn: Turn(work, *turn), lambda: next(turns))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=PyTorchModel(
            module,
            lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True),
            torch.optim.SGD(module.parameters(), lr=1.0),  # the mean of the changes is added as it is
        ),
        model_train_params=NNTrainHyperParams(
            local_batch_size=None,
            local_num_epochs=1,
            local_learning_rate=work.learning_rate,
        ),
    )
    finish(folder, clock.read(), dict(module.model.named_parameters()))


if __name__ == "__main__":
    main()
