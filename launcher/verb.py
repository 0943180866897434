"""What every verb shares: --json, --debug, exit codes, and errors as one line instead of a traceback."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.errors import ConfigError
from launcher.failure_record import record_failure, tells_of_lost_peer
from launcher.output import Output
from launcher.rank_process import failure_file
from megamodel.train.stop import was_asked_to_stop

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object; all else goes to stderr.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ConfigFiles = Annotated[
    list[Path], typer.Argument(metavar="CONFIG.toml...", help="TOML files, later ones over earlier ones.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set one key, over all files. May be given many times."),
]
NumRanks = Annotated[
    int | None, typer.Option("--ranks", min=1, metavar="N", help="Ranks on this machine. Default: one process.")
]

EXIT_FAILED = 1
EXIT_REFUSED = 3
EXIT_READER_LEFT = 141  # 128 + SIGPIPE, as other programs end in a pipe


def as_command(verb: Callable[..., int]) -> Callable[..., None]:
    """`verb(out, **options) -> exit code` as a typer command, with --json and --debug added to its options."""

    @functools.wraps(verb)
    def command(*, as_json: bool, debug: bool, **options: Any) -> None:
        out = Output(as_json=as_json)
        try:
            code = verb(out, **options)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and out.reader_has_left():
                raise typer.Exit(EXIT_READER_LEFT) from None
            code = report_error(error, out, debug=debug)
        if code:
            raise typer.Exit(code)

    own = [parameter for name, parameter in inspect.signature(verb, eval_str=True).parameters.items() if name != "out"]
    shared = [
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonFlag),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugFlag),
    ]
    parameters = [*(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own), *shared]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def report_error(error: Exception, out: Output, *, debug: bool) -> int:
    """Tells the user, or the launcher of this rank, what went wrong; returns the exit code."""
    expected = is_users_matter(error)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    code = getattr(error, "exit_code", EXIT_FAILED)
    with_traceback = debug or not expected
    if path := failure_file(os.environ):
        # The launcher shows the first cause alone. The other ranks' logs keep theirs; rank 0 has the terminal.
        record_failure(path, error, message=message, exit_code=code, with_traceback=with_traceback)
        if os.environ["RANK"] == "0":
            return code
    # Ranks hear of a stop one after another, and before the first step each leaves at once: no error of those that it leaves.
    follows = was_asked_to_stop(error) and tells_of_lost_peer(message)
    if with_traceback and (debug or not follows):
        traceback.print_exception(error, file=sys.stderr)
    out.warn("stopped: another rank had ended before" if follows else f"error: {message}")
    problems = {"problems": list(error.problems)} if isinstance(error, ConfigError) and error.problems else {}
    if os.environ.get("RANK", "0") == "0":  # the ranks of torchrun share one standard output
        out.result({"error": message, "exit_code": code, **problems})
    return code


def is_users_matter(error: Exception) -> bool:
    """Whether the message alone tells the user what to do: our own user errors, and the operating system's."""
    return isinstance(getattr(type(error), "exit_code", None), int) or isinstance(error, OSError)
