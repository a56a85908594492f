"""The one exception type whose message is meant for the user."""


class UserError(Exception):
    """Something the user can mend; the message is one line: what, where, what was expected, what to do."""
