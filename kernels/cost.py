"""What an operator must do at least, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Arithmetic and memory traffic of one call.

    Args:
        flops: multiplications plus additions.
        bytes: fewest bytes that must cross the memory bus: each input read once, each output written once.
    """

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The time no implementation can beat on a device with these two rates."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)
