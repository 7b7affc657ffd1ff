"""The bare loop: FedAvg in PyTorch, with nothing around it."""

import torch
from workload import Clock, arguments, finish


def main() -> None:
    """Run the workload."""
    work, folder = arguments()
    model = work.model()
    work.batches(1, 0)  # read from the disk before the clock starts
    clock = Clock()
    server = {name: value.detach().clone() for name, value in model.named_parameters()}
    total = sum(work.examples)
    for round in range(1, work.rounds + 1):
        mean = {name: torch.zeros_like(value) for name, value in server.items()}
        for client in range(work.clients):
            with torch.no_grad():
                for name, value in model.named_parameters():
                    value.copy_(server[name])
            work.train(model, round, client)
            with torch.no_grad():
                for name, value in model.named_parameters():
                    mean[name].add_(value, alpha=work.examples[client] / total)
        server = mean
    finish(folder, clock.read(), server)


if __name__ == "__main__":
    main()
