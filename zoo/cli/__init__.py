"""The command line: parses, calls, prints. `main` is the console script `zoo`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line; a user's mistake ends with a message and an exit code, never with a traceback.

    Exit codes: 0 done, 1 a check failed, 2 a mistake in what was given, 3 a budget that nothing meets, 130 interrupted.
    """
    from zoo.cli.app import app
    from zoo.errors import ZooError

    # Shells start what a script puts into the background with SIGINT ignored, and nothing could stop it cleanly.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
