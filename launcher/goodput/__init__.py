"""Where a run's wall-clock time has gone: from its launch, or first start, to its end, or now. Imports without torch."""

from launcher.goodput.account import CATEGORIES, STARTING
from launcher.goodput.ledger import Ledger, read_ledger
from launcher.goodput.starts import Failure, Start

__all__ = ["CATEGORIES", "STARTING", "Failure", "Ledger", "Start", "read_ledger"]
