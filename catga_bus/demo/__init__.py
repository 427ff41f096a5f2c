"""The flight desk: a month of real flights through the bus, several processes, and a verdict.

Read it to learn the library, in this order: `messages` (what travels), `node` (a service: handlers,
its state, how it runs), `replay` and `day` (a client: send, broadcast, ask one node), `watch` (how a bus
sees the nodes). `data`, `ledger`, `latency`, `faults`, `failover` and the reports are plain Python without
a bus; `processes`, `injector` and `display` are the surroundings; `app` puts everything together.
"""
