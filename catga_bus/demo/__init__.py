"""The flight desk: a month of real flights through the bus, several processes, and a verdict.

Read it to learn the library, in this order: `messages` (what travels), `node` (a service: handlers,
its state, how it runs), `replay` (a client: send, publish, broadcast, ask one node). `data`,
`ledger`, `report` and `latency` are plain Python without a bus; `processes` and `display` are the
surroundings; `app` puts everything together.
"""
