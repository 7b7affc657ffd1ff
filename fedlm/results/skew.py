"""The table of partitions: how much the clients' data differ."""

from typing import Any

import numpy
import pandas

from fedlm.results.cells import mean_and_deviation
from fedlm.results.scene import Scene
from fedlm.results.typeset import Table, spread


def skew_table(scene: Scene) -> Table:
    """The measured skew of each partition."""
    numbers, cells = [], []
    # All methods of a cell have the same partitions, so one run per seed is enough.
    runs = scene.runs.drop_duplicates(["task", "partition", "seed"])
    for task in scene.tasks:
        for partition in scene.partitions:
            own = runs[(runs["task"] == task) & (runs["partition"] == partition)]
            if own.empty:
                continue
            number: dict[str, Any] = {"task": task, "partition": partition, "scheme": own["scheme"].iloc[0]}
            cell = {"Task": task, "Partition": partition, "Scheme": own["scheme"].iloc[0]}
            for column, heading in (
                ("label_divergence", "Label divergence (bit)"),
                ("size_gini", "Size inequality (Gini)"),
            ):
                number |= mean_and_deviation(column, own[column].to_numpy(dtype=float))
                cell[heading] = spread(own[column], 3)
            numbers.append({**number, "seeds": len(own)})
            cells.append({**cell, "Seeds": str(len(own))})
    columns = ["Task", "Partition", "Scheme", "Label divergence (bit)", "Size inequality (Gini)", "Seeds"]
    notes = [
        "Label divergence: Jensen-Shannon divergence of a client's labels from all clients' labels, weighted "
        "by examples; 0 is IID. Gini coefficient of the clients' numbers of examples; 0 is equal. Mean ± "
        "standard deviation over seeds.",
        *scene.notes(),
    ]
    return Table(
        "skew",
        "How much the clients' data differ",
        pandas.DataFrame(numbers),
        pandas.DataFrame(cells, columns=columns),
        numpy.zeros((len(cells), len(columns)), dtype=bool),
        1,
        notes,
    )
