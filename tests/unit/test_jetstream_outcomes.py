"""Which error answers prove that nothing happened."""

import pytest

from catga_bus.transport.jetstream import JetStreamRefusedError, JetStreamUnknownError
from catga_bus.transport.jetstream_outcomes import error_of

REFUSED = [
    (10014, "consumer not found", 404),
    (10037, "no message found", 404),
    (10039, "JetStream not enabled for account", 503),
    (10047, "insufficient storage resources available", 500),
    (10052, "duplicates window can not be larger then max age", 500),
    (10057, "message delete not permitted", 500),
    (10058, "stream name already in use with a different configuration", 400),
    (10059, "stream not found", 404),
    (10065, "subjects overlap with an existing stream", 400),
    (10071, "wrong last sequence: 7", 400),
    (10074, "replicas > 1 not supported in non-clustered mode", 500),
    (10076, "JetStream not enabled", 503),
    (10077, "maximum bytes exceeded", 503),
    (10077, "maximum messages exceeded", 503),
    (10077, "message size too large", 503),
    (10100, "filtered consumer not unique on workqueue stream", 400),
    (10148, "consumer already exists", 400),
    (10005, "no suitable peers for placement", 400),
]
UNKNOWN = [
    (10008, "JetStream system temporarily unavailable", 503),
    (10009, "JetStream cluster can not handle request", 500),
    (10023, "insufficient resources", 503),
    (10077, 'error opening msg block file ["blk"]: no space left on device', 503),
    (10118, "stream is offline", 500),
    (10158, "duplicate message id is in process", 409),
    (10163, "expected last sequence per subject temporarily unavailable", 503),
    (10164, "wrong last sequence", 400),
    (10167, "too many requests", 429),
    (10051, "general stream failure", 500),
    (99999, "something that a newer server says", 503),
    (0, "no code at all", 500),
]


@pytest.mark.parametrize(("code", "text", "status"), REFUSED)
def test_a_no_is_refused(code: int, text: str, status: int) -> None:
    error = error_of(code, text, status, "STREAM.CREATE.s")
    assert isinstance(error, JetStreamRefusedError)
    assert (error.code, error.text, str(error)) == (code, text, f"{text} ({code})")


@pytest.mark.parametrize(("code", "text", "status"), UNKNOWN)
def test_what_proves_nothing_is_unknown(code: int, text: str, status: int) -> None:
    error = error_of(code, text, status, "STREAM.CREATE.s")
    assert isinstance(error, JetStreamUnknownError)
    assert str(error) == f"STREAM.CREATE.s: {text} ({code})"
