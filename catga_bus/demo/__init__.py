"""The flight desk: a month of real flights through the bus, several processes, and a verdict.

Read it to learn the library, in this order: `messages` (what travels), `node` (a service: handlers with a transaction,
how it runs), `board` (another service, which hears its events), `replay` and `day` (a client: enqueue, broadcast, ask
one node), `watch` (how a bus sees the nodes and their partitions). `data`, `effects`, `ledger`, `verdict`, `moves`,
`partition_map`, `latency`, `faults` and the reports are plain Python without a bus; `processes`, `injector`, `cleanup`
and `display` are the surroundings; `app` puts everything together.
"""
