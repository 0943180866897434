"""`mega doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from launcher.output import Output
from launcher.verb import EXIT_REFUSED


def doctor(out: Output) -> int:
    """Report devices, backends, versions, memory and disk of this machine, with the mend for each thing missing."""
    from cluster.hardware import this_machine
    from launcher.diagnosis import diagnose

    hardware = this_machine()
    findings = list(diagnose(hardware, directory=Path.cwd()))
    out.table(
        ("", "what", "found", "mend"),
        [(finding.state, finding.subject, finding.detail, finding.mend) for finding in findings],
    )
    missing = [finding.subject for finding in findings if finding.state == "missing"]
    out.say(f"Missing: {', '.join(missing)}." if missing else "Runs will work here.")
    out.result(
        {"ok": not missing, "device": hardware.device_name, "findings": [asdict(finding) for finding in findings]}
    )
    return EXIT_REFUSED if missing else 0
