"""Devices and links by name, read from config/devices.yaml, and how long turns and rounds take on them.

The model: a turn downloads, computes and uploads, one after the other, at the link's rates and the device's
effective speed of training. A cohort takes as long as its slowest client, since its uploads are merged
together; cohorts come one after another. Clients that take turns, as those of FedCyBGD do, are cohorts of
one: their turns add up. Merging and scoring at the server take no time.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, Self, TypeVar

import numpy
import pandas
from pydantic import Field, model_validator

from fedlm.base.errors import UserError
from fedlm.base.settings import Settings
from fedlm.study.yaml_files import read_settings

DEVICES = Path(__file__).parents[2] / "config" / "devices.yaml"


class Known(Settings):
    """A number with its source, or marked as an assumption."""

    value: float = Field(gt=0)
    source: str | None = Field(None, description="who measured or published it")
    assumption: str | None = Field(None, description="why this value is taken, where no source is known")

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.source is None) == (self.assumption is None):
            raise ValueError("give either its source or its assumption")
        return self


class Device(Settings):
    """What a client computes with."""

    title: str
    memory_gb: Known = Field(description="1e9 bytes, of which the system takes its part")
    training_gflops: Known = Field(
        description="1e9 floating point operations a second that training achieves"
    )
    power_watts: Known | None = None

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb.value * 1e9

    @property
    def flops_a_second(self) -> float:
        return self.training_gflops.value * 1e9


class Link(Settings):
    """What connects a client with the server."""

    title: str
    down_mbit: Known = Field(description="1e6 bits a second from the server to the client")
    up_mbit: Known = Field(description="1e6 bits a second from the client to the server")

    @property
    def down_bytes_a_second(self) -> float:
        return self.down_mbit.value * 1e6 / 8

    @property
    def up_bytes_a_second(self) -> float:
        return self.up_mbit.value * 1e6 / 8


class Devices(Settings):
    """Devices and links by name, and the pairs of them that tables show."""

    devices: dict[str, Device] = {}
    links: dict[str, Link] = {}
    shown: list[Annotated[tuple[str, str], Field(strict=False)]] = Field(
        [], description="[device, link] of the columns of tables"
    )

    def device(self, name: str) -> Device:
        """Return a device; raise UserError for an unknown name."""
        return _named("device", name, self.devices)

    def link(self, name: str) -> Link:
        """Return a link; raise UserError for an unknown name."""
        return _named("link", name, self.links)

    def columns(self) -> dict[str, tuple[Device, Link]]:
        """Return the pairs that tables show, by the name of their column."""
        return {
            f"seconds_on({device}, {link})": (self.device(device), self.link(link))
            for device, link in self.shown
        }


def columns_of_seconds(names: Iterable[str]) -> list[str]:
    """Return those of a table's columns that are among `Devices.columns`."""
    return [name for name in names if name.startswith("seconds_on(")]


def in_words(column: str) -> str:
    """Return the name of a column of `Devices.columns` for a reader: seconds on phone, 5g."""
    return column.replace("_on(", " on ").removesuffix(")")


Entry = TypeVar("Entry", Device, Link)


def _named(kind: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    if name not in entries:
        raise UserError(f"{kind}: {name!r}; allowed: {', '.join(sorted(entries))}")
    return entries[name]


def read_devices(own: Path | None = None, path: Path = DEVICES) -> Devices:
    """Read the devices and links that are known, and those of the user's own file.

    An entry of the own file takes the place of the one with its name; its `shown`, if any, takes the place
    of the other. Raises UserError naming file and key.
    """
    found = read_settings(path, Devices)
    if own is not None:
        more = read_settings(own, Devices)
        found = Devices(
            devices={**found.devices, **more.devices},
            links={**found.links, **more.links},
            shown=more.shown or found.shown,
        )
    try:
        found.columns()
    except UserError as error:
        raise UserError(f"{own or path}: shown: {error}") from None
    return found


class Turn(NamedTuple):
    """What a client's turn costs."""

    flops: float
    upload_bytes: float
    download_bytes: float


def turn_seconds(turn: Turn, device: Device, link: Link) -> float:
    """Return how long a turn takes: download, training, upload."""
    return (
        turn.download_bytes / link.down_bytes_a_second
        + turn.flops / device.flops_a_second
        + turn.upload_bytes / link.up_bytes_a_second
    )


def round_seconds(cohorts: Iterable[Sequence[float]]) -> float:
    """Return how long a round takes, given the seconds of each client's turn, cohort by cohort.

    A cohort takes as long as its slowest client; cohorts come one after another.
    """
    return sum(max(cohort) for cohort in cohorts if len(cohort))


def waiting_seconds(cohorts: Iterable[Sequence[float]]) -> float:
    """Return the seconds that all clients together wait for others from a round's start to its end."""
    cohorts = [cohort for cohort in cohorts if len(cohort)]
    whole = round_seconds(cohorts)
    return sum(whole - own for cohort in cohorts for own in cohort)


def seconds_so_far(
    rounds: pandas.DataFrame,
    runs: pandas.DataFrame,
    cohorts: Mapping[tuple[str, str], float],
    device: Device,
    link: Link,
) -> pandas.Series:
    """Return the seconds from a run's start to each round's end, if all clients had this device and link.

    A record holds the sums of a round, and the largest payloads. Where each client is a cohort of its own the
    seconds follow from the sums. Otherwise a cohort is charged for a client that has the round's largest
    payloads and the compute of the partition's largest client (compute follows the number of examples, unless
    all clients make the same number of steps): its slowest, exactly so where all clients take part and send
    the same.

    Args:
        rounds, runs: as from `records.load_rounds` and `load_runs`.
        cohorts: by task and method, the number of cohorts of a round over the number of its clients: 1 where
            clients take turns, 1 over the number of clients where all are merged at once.

    Returns:
        A series with the index of `rounds`; NaN for a task and method without an entry in `cohorts`.
    """
    keys = ["task", "partition", "method", "seed"]
    own = rounds[[*keys, "round", "participants", "dropped"]].copy()
    own[keys[:3]] = own[keys[:3]].astype(object)
    costs = ("flops", "upload_bytes", "download_bytes")
    ordered = rounds.sort_values([*keys, "round"])
    for name in costs:
        steps = ordered.groupby(keys, observed=True)[name].diff()
        own[name] = steps.fillna(ordered[name]).reindex(rounds.index)
    shares = runs[[*keys, "clients", "largest_client_share", "local_steps"]]
    own = own.merge(shares.astype(dict.fromkeys(keys[:3], object)), on=keys, how="left").set_axis(
        rounds.index
    )
    turns = own["participants"].where(own["participants"] > 0)
    answered = (own["participants"] - own["dropped"]).where(lambda count: count > 0)
    share = own["largest_client_share"].astype(float).where(own["local_steps"].isna())
    largest = share.fillna(1 / own["clients"]) * own["clients"] / answered
    largest = largest.clip(lower=1 / answered, upper=1).fillna(0.0)  # nobody trained: no compute
    whole: pandas.Series = turn_seconds(Turn(*(own[name] for name in costs)), device, link)
    slowest: pandas.Series = turn_seconds(
        Turn(
            own["flops"] * largest,
            rounds["largest_upload_bytes"].fillna(own["upload_bytes"] / answered).fillna(0.0),
            rounds["largest_download_bytes"].fillna(own["download_bytes"] / turns),
        ),
        device,
        link,
    )
    shares_of = [cohorts.get(labels, numpy.nan) for labels in zip(own["task"], own["method"], strict=True)]
    number = numpy.ceil(numpy.array(shares_of) * turns - 1e-9)
    seconds = whole.where(number >= turns, numpy.minimum(whole, number * slowest))
    # A round without clients takes no time; a method whose cohorts are not known has no seconds.
    seconds = seconds.where(turns.notna(), 0.0).where(~numpy.isnan(shares_of))
    labels = [own[key] for key in keys]
    order = ordered.index
    return seconds.loc[order].groupby([label.loc[order] for label in labels]).cumsum().loc[rounds.index]
