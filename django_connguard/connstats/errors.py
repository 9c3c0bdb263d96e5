"""The one exception of connstats."""


class StatsError(Exception):
    """A mistake or a missing thing that the user can mend; its text is one clear line."""
