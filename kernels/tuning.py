"""Tile sizes as data: operator -> architecture -> rows; the first row whose condition holds is taken.

Nothing is searched for at run time. `pylumiere bench ops --tune` measures candidates on a GPU and prints rows to
commit, with device and date. Rows without a measurement say "not measured".
"""

from dataclasses import dataclass, field
from typing import Any, Callable

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# Most shared memory that one block may use, in bytes.
SHARED_MEMORY = {
    75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A tile choice: constexpr values by name, and how to compile."""

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    note: str = "not measured"


@dataclass(frozen=True)
class Row:
    """`config` is used where `when(shape)` holds; `shape` is the dict of sizes that the caller passes."""

    config: Config
    when: Callable[[dict[str, Any]], bool] = field(default=lambda shape: True)


# Architecture 0 is the interpreter: small tiles, so that tests reach tile borders with small tensors.
TABLE: dict[str, dict[int, list[Row]]] = {}


def choose(op: str, arch: int, **shape: Any) -> Config:
    """The configuration of `op` for these sizes on compute capability `arch` (0 for the interpreter).

    An architecture without rows takes those of the nearest lower one that has some.

    Raises:
        ValueError: no row fits.
    """
    rows = TABLE[op]
    known = [listed for listed in rows if listed <= arch and (listed == 0) == (arch == 0)]
    if not known:
        raise ValueError(f"{op} has no configuration for compute capability {arch}; listed: {sorted(rows)}")
    for row in rows[max(known)]:
        if row.when(shape):
            return row.config
    raise ValueError(f"{op} has no configuration for {shape} on compute capability {arch}")
