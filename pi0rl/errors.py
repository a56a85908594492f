"""The one exception type whose message is meant for the user."""


class UserError(Exception):
    """Something the user can mend; the message is one line: what, where, what was expected, what to do."""


class WorkerFailed(UserError):
    """A worker process died, fell silent, or raised what it should not: what it was playing may be played again."""
