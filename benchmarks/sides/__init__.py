"""One file per way to send a request: a `Worker` that answers and a `Client` that asks.

Each is used as its own documentation recommends, and imported only by the processes that run it.
"""
