"""Watching the nodes: changes of the view, for whoever follows them."""

from collections.abc import Callable, Iterable

from catga_bus.cluster.records import ChangeKind, NodeChange, NodeInfo
from catga_bus.watching import Watcher as AnyWatcher


class Watcher(AnyWatcher[NodeChange]):
    """An asynchronous iterator of the changes of nodes.

    It begins with `joined` for every node that is known. When more than `max_pending` changes wait, they are dropped;
    the next one is then `missed`, and after it every node that is known comes as `joined` again.

    Args:
        present: Returns the nodes that are known.
        max_pending: Changes that may wait.
    """

    def __init__(self, present: Callable[[], Iterable[NodeInfo]], max_pending: int) -> None:
        super().__init__(
            lambda: [NodeChange(ChangeKind.JOINED, info) for info in present()],
            lambda count: NodeChange(ChangeKind.MISSED, None, count),
            max_pending,
        )
