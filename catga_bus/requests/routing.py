"""Routing: where a call may go, first and in later attempts, and the lanes that lead there."""

from catga_bus.codec import Body
from catga_bus.errors import ConfigurationError
from catga_bus.messages import options_of, reply_type
from catga_bus.requests.calls import Aim, Call, Route
from catga_bus.requests.endings import not_permitted
from catga_bus.requests.guard import Guard
from catga_bus.requests.peers import Address, Choice, OwnerOf, Peers
from catga_bus.transport.coalescer import Coalescer, Lane, Seal
from catga_bus.wire import Names

_MAX_DIRECTED = 1_024  # lanes of a type to single nodes; they are a cache


class Routing:
    """Knows the way to the queue group of each type, and to single nodes.

    Args:
        coalescer: Packs the requests.
        names: The subjects.
        peers: What is known of the other nodes.
        guard: What is held back.
        seal: Makes batches of requests.
        owner_of: Finds the owner of a key.

    Attributes:
        by_class: The routes found so far; all that the hot path looks at.
        closed: Services whose nodes this user may not address one by one, as far as the server has said since the
            connection came up.
    """

    def __init__(
        self, coalescer: Coalescer, names: Names, peers: Peers, guard: Guard, seal: Seal, owner_of: OwnerOf
    ) -> None:
        self._coalescer = coalescer
        self._names = names
        self._peers = peers
        self._guard = guard
        self._seal = seal
        self._owner_of = owner_of
        self.by_class: dict[type, Route] = {}
        self.closed: set[str] = set()

    def add(self, cls: type) -> Route:
        """Find the route of a message class.

        Raises:
            ConfigurationError: The class is no request.
        """
        options = options_of(cls)
        if options.kind == "Command":
            raise ConfigurationError(
                f"{cls.__name__} is a command, and this version stores no commands yet; make it a Request"
            )
        if options.kind != "Request":
            raise ConfigurationError(f"{cls.__name__} is an {options.kind}: publish or broadcast it")
        name = options.type_name
        route = Route(
            type_name=name,
            subject=self._names.request(name),
            key_field=options.partition_by,
            idempotent=options.idempotent,
            decode=Body(reply_type(cls)).decode,
            lane=self._coalescer.lane(self._names.request(name), self._seal, returnable=True),
        )
        self.by_class[cls] = route
        return route

    def aim(self, call: Call, target: Address | None, choice: Choice | None) -> None:
        """Decide where a new call goes first that does not simply go to the queue group.

        Raises:
            CircuitOpenError: A circuit breaker holds it back.
            PermissionDeniedError: Only some nodes may take it, and the server has refused to let this user choose.
        """
        if choice is not None and target is not None and target[0] in self.closed:
            raise not_permitted(self._names.node_request(*target, call.route.type_name))
        type_name = call.route.type_name
        aim = call.aim = Aim(is_bound=target is not None and choice is None, choice=choice)
        if self._guard.held:
            admission = self._guard.admit(type_name, target if aim.is_bound else None, choice)
            aim.probes, target = admission.probes, admission.target or target
        elif target is None and type_name in self._peers.troubled:
            target = self._peers.pick(type_name)
        if target is not None and (aim.is_bound or target[0] not in self.closed):
            aim.target = target
            call.lane = self._lane_to(call.route, target)

    def prefer(self, call: Call, key: str) -> None:
        """Send a call whose message has a key to the live owner of its partition; the queue group is as good.

        The owner has the key's data at hand. Nothing is stored and nothing fenced: later attempts go to any node.
        """
        target = self._owner_of(call.route.type_name, key)
        if target is not None and target[0] not in self.closed:
            call.aim = Aim(is_bound=False, choice=None)
            call.aim.target = target
            call.lane = self._lane_to(call.route, target)

    def aim_again(self, call: Call) -> Address | None:
        """Decide where the next attempt of a call goes; return the node that it is addressed to.

        Returns:
            None for the queue group, unless the call has a `choice`: then no node is left for it.
        """
        target = call.aim.target if call.aim is not None and call.aim.is_bound else self._next_node(call)
        call.lane = call.route.lane if target is None else self._lane_to(call.route, target)
        return target

    def _next_node(self, call: Call) -> Address | None:
        """Return a live node for the next attempt; None for the queue group.

        The queue group would give a share of the calls to a node that is dead and has not been evicted.
        """
        progress = call.trouble()
        type_name = call.route.type_name
        is_any_fine = not (progress.avoid or progress.silences or call.choice or type_name in self._peers.troubled)
        if is_any_fine and not self._guard.held:
            return None
        target = self._peers.pick(type_name, (*progress.avoid, *self._guard.held_nodes()), call.choice)
        if target is None and call.choice is not None:
            target = self._peers.pick(type_name, (), call.choice)  # no other fits
        return None if target is None or target[0] in self.closed else target

    def close(self, call: Call) -> bool:
        """Address nodes of a service no more, because the server has refused what this call was written to.

        Returns:
            Whether the queue group may have the call instead.
        """
        node = call.node
        address = None if node is None else self._peers.address(node)
        if call.lane.subject == call.route.subject or call.is_bound or address is None:
            return False
        self.closed.add(address[0])
        return call.choice is None

    def _lane_to(self, route: Route, target: Address) -> Lane:
        lane = route.directed.get(target)
        if lane is None:
            if len(route.directed) >= _MAX_DIRECTED:
                route.directed.clear()
            subject = self._names.node_request(*target, route.type_name)
            lane = route.directed[target] = self._coalescer.lane(subject, self._seal, returnable=True)
        lane.limit = route.lane.limit
        return lane
