"""Queries and cancels: what a caller says to a node about requests that the node may have."""

import logging
from collections.abc import Mapping, Sequence
from itertools import islice

from catga_bus.errors import CatgaError
from catga_bus.requests.peers import Address
from catga_bus.transport.base import Transport
from catga_bus.wire import Kind, Names, join_ids

log = logging.getLogger("catga_bus.requests")

_MAX_IDS = 1_000  # in one payload: about 30 KB


class Queries:
    """Writes status queries and cancels; their answers come to the inbox of the calls.

    Args:
        transport: The connection.
        names: The subjects.
        sender: Id of this node.
        answers_to: The inbox of the calls: a node minds only calls that came from it.
    """

    def __init__(self, transport: Transport, names: Names, *, sender: str, answers_to: str) -> None:
        self._transport = transport
        self._names = names
        self._head = (sender, answers_to)
        self.asked = 0
        self.cancels = 0

    def ask(self, ids_of: Mapping[Address, Sequence[str]]) -> None:
        """Ask nodes what became of these calls: each says that it has them, answers again, or says that they are lost.

        Args:
            ids_of: The ids of the calls, by node.
        """
        for address, ids in ids_of.items():
            self.asked += len(ids)
            self._write(Kind.STATUS, self._names.node_status(*address), ids)

    def cancel(self, ids_of: Mapping[Address, Sequence[str]]) -> None:
        """Tell nodes to forget what they have not started of these calls.

        Args:
            ids_of: The ids of the calls, by node.
        """
        for address, ids in ids_of.items():
            self.cancels += len(ids)
            self._write(Kind.CANCEL, self._names.node_cancel(*address), ids)

    def _write(self, kind: Kind, subject: str, ids: Sequence[str]) -> None:
        rest = iter(ids)
        while some := list(islice(rest, _MAX_IDS)):
            try:
                self._transport.publish(subject, join_ids(kind, self._head, some))
            except CatgaError as error:  # the next round comes within a second
                log.debug("%d ids for %s were not written: %s", len(some), subject, error)
                return
