"""Which settings of a method are tuned, and from which ranges they are drawn."""

from typing import NamedTuple


class LogRange(NamedTuple):
    """A number between `low` and `high`, drawn so that each factor is as likely as any other."""

    low: float
    high: float

    def at(self, position: float) -> float:
        """Return the value at a position from 0 to 1, rounded to three digits."""
        return float(f"{self.low * (self.high / self.low) ** position:.3g}")


class OneOf(NamedTuple):
    """One of a few values, in their natural order if they have one."""

    values: tuple[float | int | str, ...]

    def at(self, position: float) -> float | int | str:
        """Return the value at a position from 0 to below 1."""
        return self.values[int(position * len(self.values))]


# From the path of a setting, `training.<key>` or `<key of the method>`, to its range.
Search = dict[str, LogRange | OneOf]
