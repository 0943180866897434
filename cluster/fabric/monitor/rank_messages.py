"""Kinds of messages that ranks send to the monitor at the head."""

DURATIONS = "durations"
"""`StepDurations.as_payload`: from every rank, of the steps that it watches."""
EXPECTED = "expected"
"""`ExpectedStep.as_payload`: from rank 0, once."""
OFF = "durations_off"
"""`{"reason": ...}`: from a rank that will send no more durations."""
