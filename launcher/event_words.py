"""Lines of events.jsonl in words, for tables and reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]


def event_words(event: Event) -> str:
    """What has happened, in one line; the event's own name where it is not known here."""
    name = str(event.get("event", "event"))
    words = _WORDS.get(name)
    try:
        text = words(event) if words is not None else _message(event)
    except (TypeError, ValueError):  # a damaged line
        text = name
    return " ".join(text.split())


def duration(seconds: float) -> str:
    """`4 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    whole = max(0, round(seconds))
    for unit, name, part, part_name in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min")):
        if whole >= unit:
            rest = whole % unit // part
            return f"{whole // unit} {name}" + (f" {rest} {part_name}" if rest else "")
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def _message(event: Event) -> str:
    name = str(event.get("event", "event")).replace("_", " ")
    return str(event.get("message") or event.get("sentence") or name)


def _hosts(names: Any) -> str:
    """A few of them by name."""
    if not isinstance(names, Sequence) or isinstance(names, str):
        return "its hosts"
    return ", ".join(map(str, names)) if len(names) <= 4 else f"{len(names)} hosts"


def _preflight(event: Event) -> str:
    sentences = " ".join(map(str, event.get("sentences") or ()))
    return "preflight: all is well" if event.get("ok") else f"preflight: {sentences or 'something is wrong'}"


def _reason(event: Event, before: str) -> str:
    reason = event.get("reason")
    if not reason:
        return before
    # One word is a name of ours; a sentence may name an axis of the mesh.
    words = str(reason)
    return f"{before}: {words if ' ' in words else words.replace('_', ' ')}"


_WORDS: dict[str, Callable[[Event], str]] = {
    "launch": lambda event: f"launched on {event.get('backend')}" + _of_job(event),
    "attempt": lambda event: f"attempt {event.get('attempt')} on {_hosts(event.get('hosts'))}",
    "ranks_started": lambda event: f"ranks of attempt {event.get('attempt')} started",
    "preflight": _preflight,
    "failure": lambda event: f"failed: {_message(event)}",
    "exclude": lambda event: _reason(event, f"{event.get('host')} is not used any more"),
    "restart": lambda event: _reason(event, "starting again"),
    "wait_for_hosts": lambda event: f"waiting for hosts: {_count(event.get('have'))} of {_count(event.get('need'))}",
    "stop_asked": lambda event: _reason(event, "asked to stop"),
    "requeue": lambda event: _reason(event, "queued again"),
    "give_up": lambda event: f"given up: {event.get('cause')}",
    "done": lambda event: "finished",
    "begin": lambda event: f"first rank is ready on {event.get('host')}",
    "start": lambda event: "training from step 0",
    "resume": lambda event: f"training on after step {event.get('step')}",
    "rollback": lambda event: f"{event.get('lost_steps')} step(s) after step {event.get('to_step')} lost",
    "checkpoint": lambda event: f"checkpoint of step {event.get('step')}",
    "end": lambda event: f"last step made ({event.get('step')})",
    "finished": lambda event: "finished",
    "export": lambda event: f"exported step {event.get('step')}",
    "sample": lambda event: f"sampled from step {event.get('step')}",
    "communication_time": lambda event: "communication compared with what is expected",
    "fabric_finding": lambda event: f"fabric: {_message(event)}",
}


def _of_job(event: Event) -> str:
    return f", job {event['job_id']}" if event.get("job_id") else ""


def _count(hosts: Any) -> int:
    return len(hosts) if isinstance(hosts, Sequence) else int(hosts)
