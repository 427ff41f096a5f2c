"""What the JetStream API's error answers mean: refused, or of unknown outcome. Pure."""

from typing import Final

from catga_bus.transport.jetstream import ApiError, JetStreamError, JetStreamRefusedError, JetStreamUnknownError

_TEMPORARY: Final = frozenset(
    {
        10008,  # JetStream system temporarily unavailable: no leader
        10009,  # not the leader
        10023,  # insufficient resources: the server stores nothing for now
        10118,  # the stream is offline
        10119,  # the consumer is offline
        10158,  # the same message id is being stored at this moment: it may or may not come to be
        10163,  # last sequence per subject temporarily unavailable
        10164,  # another write to this subject is being stored at this moment
        10167,  # too many requests
        10194,  # the stream is offline, with a reason
        10195,  # the consumer is offline, with a reason
    }
)

_DEFINITE: Final = frozenset(
    {
        10006,  # JetStream not in clustered mode
        10010,  # clustering support required
        10028,  # insufficient memory
        10035,  # account not found
        10036,  # not supported in clustered mode
        10039,  # not enabled for the account
        10047,  # insufficient storage
        10052,  # the configuration is invalid
        10053,  # a limit of the account
        10057,  # message delete failed: denied, or not there
        10069,  # the update is not allowed
        10074,  # replicas > 1 without a cluster
        10076,  # not enabled
        10111,  # roll-up not permitted
        10117,  # too many subjects to list
    }
)
# Those that say no although their HTTP-like code is 500 or 503, as if the server had failed.

_FAILURES: Final = (500, 503)


def error_of(code: int, text: str, status: int, what: str) -> JetStreamError:
    """Return the error to raise for an error answer.

    Args:
        code: `err_code`; 0 if the server gave none.
        text: `description`.
        status: `code`, which reads like a status of HTTP.
        what: Subject of the call, for the text.
    """
    if code == ApiError.STREAM_STORE_FAILED:
        # The text alone tells a full stream from a disk that failed under the write.
        is_full = "maximum" in text or "too large" in text
        return JetStreamRefusedError(code, text) if is_full else JetStreamUnknownError(f"{what}: {text} ({code})")
    if code in _TEMPORARY or (status in _FAILURES and code not in _DEFINITE):
        return JetStreamUnknownError(f"{what}: {text} ({code})")
    return JetStreamRefusedError(code, text)
