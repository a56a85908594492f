"""The one exception type whose message is meant for the user, and other people's errors in one line."""


class UserError(Exception):
    """Something the user can mend; the message is one line: what, where, what was expected, what to do."""


class WorkerFailed(UserError):
    """A worker process died, fell silent, or raised what it should not: what it was playing may be played again."""


def first_line(error: BaseException) -> str:
    """What another library's error says, to be quoted inside one line; its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
