"""The contract of `catga_bus.transport.jetstream` as tests: what serves JetStream passes them, be it model or server.

Fill `Carrier` (its server has JetStream), inherit `JetStreamContract`, give it the fixtures `carrier` and
`no_jetstream`; see `catga_bus.testing.transport_contract` for the rest. Each test is a script with exact outcomes, so
that whoever passes behaves as nats-server 2.15 does, its surprises included.
"""

from catga_bus.testing.jetstream_consumers import ConsumerScripts
from catga_bus.testing.jetstream_streams import StreamScripts
from catga_bus.testing.jetstream_trials import TrialScripts


class JetStreamContract(StreamScripts, ConsumerScripts, TrialScripts):
    """The promises of `JetStream`, one test each. Inherit it and give it the fixtures `carrier` and `no_jetstream`."""
