"""What can go wrong for reasons the user can mend, apart from our own defects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong. The message is one sentence that names the file, the key, the value and
    the remedy; the command line prints it without a traceback and exits with 2."""


class Interrupted(Exception):
    """The user stopped a run. The state is saved and the message says how to go on; exit code 130."""


class TrainingDiverged(UserError):
    """A loss became NaN or infinite. The message names step, term, timesteps and pictures; exit code 2."""


def nearest(name: str, valid: Iterable[str], *, phrase: str = "did you mean {!r}?") -> str:
    """`" did you mean 'x'?"` for the closest valid name, or `""`: to be appended to an error sentence."""
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return " " + phrase.format(found[0]) if found else ""
