"""`python -m tests.conformance > docs/conformance.md`: runs every cell; faults go to stderr, and make it fail."""

from __future__ import annotations

import sys

from tests.conformance.table import CONTAINERS, markdown, outcomes


def main() -> int:
    """Writes the page to stdout."""
    table, faults = [], 0
    for kind, row in outcomes():
        table.append((kind, row))
        for container, outcome in zip(CONTAINERS, row, strict=True):
            for fault in outcome.faults:
                faults += 1
                sys.stderr.write(f"{kind.name} in {container}: {fault}\n")
    sys.stdout.write(markdown(table))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
