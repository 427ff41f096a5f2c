"""What can go wrong with a benchmark, each with a text that a person can act on."""


class BenchmarkError(Exception):
    """A benchmark cannot go on; the text says why and what to do."""


class UsageError(BenchmarkError):
    """The command line asks for something that cannot be done."""


class ServerUnreachableError(BenchmarkError):
    """There is no NATS server at the address given."""
