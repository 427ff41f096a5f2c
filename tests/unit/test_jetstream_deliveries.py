"""What a delivery's reply subject says, in both versions that servers write."""

import pytest

from catga_bus.transport.jetstream_deliveries import delivered_message, pull_request

TAIL = "catga-cmd-billing.billing-p3-e7-0a0b0c0d.2.1234.56.1700000000250000000.89"


@pytest.mark.parametrize(
    "reply",
    [f"$JS.ACK.{TAIL}", f"$JS.ACK._.ACCOUNTHASH.{TAIL}", f"$JS.ACK.hub.ACCOUNTHASH.{TAIL}.random"],
    ids=["version 1", "version 2", "version 2 with a token more"],
)
def test_a_delivery_is_read_from_its_reply_subject(reply: str) -> None:
    message = delivered_message("catga.cmd.billing.3", b"x", reply, {"A": "1"})
    assert (message.subject, message.payload, message.headers, message.reply) == (
        "catga.cmd.billing.3",
        b"x",
        {"A": "1"},
        reply,
    )
    assert (message.sequence, message.consumer_sequence, message.deliveries, message.pending) == (1_234, 56, 2, 89)
    assert message.time == 1_700_000_000.25


@pytest.mark.parametrize("reply", ["", "$JS.ACK.", "$JS.ACK.s.c.1.2.3", f"$JS.ACK.{TAIL}.x", "$JS.ACK.s.c.a.b.c.d.e"])
def test_anything_else_is_an_error_that_shows_it(reply: str) -> None:
    with pytest.raises(ValueError, match=r"no reply subject of a JetStream delivery|invalid literal"):
        delivered_message("s", b"", reply, None)


def test_a_pull_is_asked_for_in_nanoseconds() -> None:
    assert pull_request(7, 30.0, 0.25) == b'{"batch":7,"expires":30000000000,"idle_heartbeat":250000000}'
