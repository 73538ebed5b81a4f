"""The facts that each row of results/ carries."""

from pylumiere.bench.facts import append_row, machine_facts

__all__ = ["append_row", "machine_facts"]
