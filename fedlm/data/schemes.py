"""The settings of partitions: the ways in which a study may divide examples among clients."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings


class Pooled(Settings):
    """One client holds everything, whatever number of clients the federation asks for."""

    scheme: Literal["pooled"]


class Divided(Settings):
    """Settings of all schemes with several clients."""

    min_examples: PositiveInt = Field(default=1, description="examples that every client gets at least")


class Iid(Divided):
    """A random division into parts of equal size (they differ by at most one example)."""

    scheme: Literal["iid"]


class Dirichlet(Divided):
    """Label skew: label proportions are drawn from a Dirichlet distribution.

    `sizes: free` draws, for each label, the shares that the clients get of it (Yurochkin et al. 2019,
    arXiv:1905.12022; Li et al. 2022, arXiv:2102.02079), so that the clients' sizes differ as well.
    `sizes: equal` draws, for each client, a label mix from Dirichlet(alpha * label frequencies), and fills
    clients of equal size in random order until the labels run out (Hsu et al. 2019, arXiv:1909.06335).
    """

    scheme: Literal["dirichlet"]
    alpha: PositiveFloat = Field(description="concentration; small is skewed, large is IID")
    sizes: Literal["free", "equal"] = Field(default="free", description="free: sizes follow from the draw")


class Labels(Divided):
    """Label skew: every client holds examples of `labels_per_client` labels only.

    Labels are assigned in turn, the one with the fewest owners first and ties at random, so that every label
    has an owner and numbers of owners differ by at most one; the owners share a label's examples evenly
    (the division `#C = k` of Li et al. 2022, arXiv:2102.02079, balanced). Examples that move to a client
    with fewer than `min_examples` may add a label to it.
    """

    scheme: Literal["labels"]
    labels_per_client: PositiveInt = Field(description="different labels that one client holds")


class Quantity(Divided):
    """Size skew: the clients' shares of the data are drawn from a Dirichlet distribution; labels are IID."""

    scheme: Literal["quantity"]
    alpha: PositiveFloat = Field(description="concentration; small is unequal, large is equal sizes")


class Natural(Divided):
    """The task's own populations (its groups) are the clients, in the order of the groups.

    With fewer clients than groups, whole groups are merged: the largest first, each to the client that has
    the fewest examples so far. With more clients than groups, groups are split: each further client goes to
    the group with the most examples per client, and the clients of one group share it IID and evenly. So no
    client mixes groups unless there are too few clients.
    """

    scheme: Literal["natural"]


PartitionConfig = Annotated[
    Pooled | Iid | Dirichlet | Labels | Quantity | Natural, Field(discriminator="scheme")
]


def parse(settings: dict) -> Pooled | Iid | Dirichlet | Labels | Quantity | Natural:
    """Return the validated settings of a partition; raise pydantic's ValidationError if they are wrong."""
    return TypeAdapter(PartitionConfig).validate_python(settings)


def check(
    config: PartitionConfig,
    clients: int,
    examples: int | None = None,
    num_labels: int | None = None,
    num_groups: int | None = None,
) -> None:
    """Raise UserError if the scheme cannot be drawn; a number that is not known yet is None.

    `examples`, `num_labels` and `num_groups` are those of the training split. 0 groups means that
    the task has no natural populations.
    """
    if config.scheme == "pooled":
        return
    if clients < 1:
        raise UserError(f"clients: {clients}, but a federation needs at least 1")
    needed = clients * config.min_examples
    if examples is not None and examples < needed:
        raise UserError(
            f"clients: {clients} clients with min_examples {config.min_examples} need {needed} training "
            f"examples, but there are {examples}: enough for {examples // config.min_examples} clients"
        )
    if config.scheme == "labels" and num_labels is not None:
        if config.labels_per_client > num_labels:
            raise UserError(
                f"labels_per_client: {config.labels_per_client}, but the training examples have {num_labels} "
                f"labels; allowed: 1 to {num_labels}"
            )
        if config.labels_per_client * clients < num_labels:
            raise UserError(
                f"labels_per_client: {clients} clients with {config.labels_per_client} labels each cannot "
                f"hold {num_labels} labels; at least {-(-num_labels // clients)} labels per client are needed"
            )
    if config.scheme == "natural" and num_groups == 0:
        raise UserError(
            "scheme: natural, but the task has no natural populations; allowed: pooled, iid, dirichlet, "
            "labels and quantity"
        )
