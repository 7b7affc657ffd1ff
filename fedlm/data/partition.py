"""Partition files: who holds which training examples, and how much the clients differ.

The resulting skew is measured and recorded, because the same alpha means different things with different
schemes, numbers of clients and numbers of labels.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy
from pydantic import Field, ValidationError

from fedlm.base.errors import UserError
from fedlm.base.files import sha256, write_atomically
from fedlm.base.settings import Settings
from fedlm.data.division import draw
from fedlm.data.schemes import PartitionConfig


def count_labels(parts: list[numpy.ndarray], labels: numpy.ndarray, num_labels: int) -> numpy.ndarray:
    """Return how many examples of each label each client holds: (clients, labels) integers."""
    return numpy.array([numpy.bincount(labels[part], minlength=num_labels) for part in parts])


def skew(
    parts: list[numpy.ndarray], labels: numpy.ndarray, num_labels: int | None = None
) -> dict[str, float]:
    """Measure how much the clients differ.

    Args:
        parts: the pool indices of each client.
        labels: (pool size,) integer labels.
        num_labels: number of labels; by default the largest that occurs, plus one.

    Returns:
        label_divergence: Jensen-Shannon divergence in bits between a client's label distribution and that of
            all clients together, averaged over clients with their number of examples as weight; 0 (all
            equal) to 1.
        size_gini: Gini coefficient of the clients' numbers of examples; 0 (equal) to (clients-1)/clients.
        smallest_client, median_client, largest_client: numbers of examples.
        labels_per_client: mean number of different labels that a client holds.
    """
    from scipy.special import (
        rel_entr,
    )  # Imported here, since every job reads partitions but few measure them.

    labels = numpy.asarray(labels)
    if num_labels is None:
        num_labels = max(int(labels[part].max()) + 1 for part in parts if len(part))
    counts = count_labels(parts, labels, num_labels)
    sizes = counts.sum(axis=1)
    local = counts / numpy.maximum(sizes, 1)[:, None]
    together = counts.sum(axis=0) / sizes.sum()
    middle = (local + together) / 2
    divergence = (rel_entr(local, middle) + rel_entr(together[None, :], middle)).sum(axis=1) / (
        2 * numpy.log(2)
    )
    ascending = numpy.sort(sizes)
    ranks = numpy.arange(1, len(sizes) + 1)
    gini = (2 * ranks - len(sizes) - 1) @ ascending / (len(sizes) * sizes.sum())
    return {
        "label_divergence": float(numpy.clip(divergence @ sizes / sizes.sum(), 0, 1)),
        "size_gini": float(gini),
        "smallest_client": int(sizes.min()),
        "median_client": float(numpy.median(sizes)),
        "largest_client": int(sizes.max()),
        "labels_per_client": float((counts > 0).sum(axis=1).mean()),
    }


class PartitionFile(Settings):
    """A drawn partition with its settings and its skew, as stored in the results folder."""

    partition_file: Literal[1] = 1  # version of this layout
    task: str = Field(description="label of the task in the study")
    partition: str = Field(description="label of the partition in the study")
    config: PartitionConfig
    seed: int
    clients: int = Field(description="resulting number of clients")
    examples: int
    moved: int = Field(description="examples moved to clients that had fewer than min_examples")
    skew: dict[str, float] = Field(description="by label; by population where the task has no labels")
    label_names: list[str] = Field(description="names of the labels; numbers where the task has none")
    label_counts: list[list[int]] = Field(description="examples of each label, for each client")
    group_names: list[str] = Field(description="names of the task's natural populations, if any")
    group_counts: list[list[int]] = Field(description="examples of each population, for each client")
    sha256: str = Field(description="of the clients' indices")
    data_sha256: str = Field(description="of the prepared task")
    code_sha256: str = Field("", description="of the code that drew it")
    indices: list[list[int]] = Field(description="pool indices of each client, ascending")

    @classmethod
    def make(
        cls,
        config: PartitionConfig,
        clients: int,
        labels: numpy.ndarray,
        groups: numpy.ndarray | None,
        seed: int,
        indices: numpy.ndarray,
        *,
        task: str,
        partition: str,
        data_sha256: str,
        code_sha256: str = "",
        label_names: Sequence[str] = (),
        group_names: Sequence[str] = (),
    ) -> "PartitionFile":
        """Draw a partition (arguments as in `divide`) and measure its skew."""
        parts, moved = draw(config, clients, labels, groups, seed, indices)
        label_names = list(label_names) or [str(label) for label in range(int(labels[indices].max()) + 1)]
        group_counts, what, names = [], labels, label_names
        if groups is not None:
            group_names = list(group_names) or [str(group) for group in range(int(groups.max()) + 1)]
            group_counts = count_labels(parts, groups, len(group_names)).tolist()
            if len(label_names) < 2:  # a task without labels: clients differ by the populations they hold
                what, names = groups, group_names
        return cls(
            task=task,
            partition=partition,
            config=config,
            seed=seed,
            clients=len(parts),
            examples=sum(map(len, parts)),
            moved=moved,
            skew=skew(parts, what, len(names)),
            label_names=label_names,
            label_counts=count_labels(parts, labels, len(label_names)).tolist(),
            group_names=list(group_names) if groups is not None else [],
            group_counts=group_counts,
            sha256=fingerprint(parts),
            data_sha256=data_sha256,
            code_sha256=code_sha256,
            indices=[part.tolist() for part in parts],
        )

    def content(self) -> tuple[list[str], list[list[int]]]:
        """Return what clients differ in, labels or else populations: names, and counts for each client."""
        if len(self.label_names) < 2 and self.group_names:
            return self.group_names, self.group_counts
        return self.label_names, self.label_counts

    @property
    def parts(self) -> list[numpy.ndarray]:
        """One sorted int64 array of pool indices for each client."""
        return [numpy.array(part, dtype=numpy.int64) for part in self.indices]

    def with_skew_of(self, other: "PartitionFile") -> "PartitionFile":
        """Return this partition with the measured skew of another of the same clients, or else its own."""
        alike = self.sha256 == other.sha256 and self.label_counts == other.label_counts
        near = self.skew.keys() == other.skew.keys() and all(
            math.isclose(value, other.skew[name], rel_tol=1e-9, abs_tol=1e-12)
            for name, value in self.skew.items()
        )
        return self.model_copy(update={"skew": other.skew}) if alike and near else self

    def content_hash(self) -> str:
        """Return the SHA-256 of the partition without its labels and the code that drew it."""
        named = {"task", "partition", "code_sha256"}
        return sha256(json.dumps(self.model_dump(mode="json", exclude=named), sort_keys=True).encode())

    def write(self, path: Path) -> None:
        """Write the partition as JSON, one line per key; the same partition gives the same bytes."""
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.model_dump().items()]
        write_atomically(Path(path), ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def read(cls, path: Path) -> "PartitionFile":
        """Read a partition; raise UserError if the file is damaged or of another version."""
        try:
            partition = cls.model_validate_json(Path(path).read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path}: no such partition file") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path}: not a partition file of this version: {place}: {first['msg']}"
            ) from None
        if fingerprint(partition.parts) != partition.sha256:
            raise UserError(f"{path}: the indices do not have the SHA-256 that the file names; draw it again")
        return partition


def fingerprint(parts: list[numpy.ndarray]) -> str:
    """Return the SHA-256 of a partition: for each client its number of examples and its indices, int64."""
    sizes = numpy.array([len(part) for part in parts], dtype="<i8")
    return sha256(sizes.tobytes() + b"".join(numpy.asarray(part, dtype="<i8").tobytes() for part in parts))
