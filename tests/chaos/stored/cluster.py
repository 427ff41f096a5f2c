"""Services with stores, and producers, on a stage: started, hit by faults, drained, and looked at afterwards."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import nats
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from catga_bus.durability.letters.letters import decode_letter
from catga_bus.testing import eventually
from catga_bus.wire import Names
from tests.chaos.netns import Namespace
from tests.chaos.processes import stance
from tests.chaos.stage import Stage, end_of
from tests.chaos.stored.history import Begun, Ended, Hit, Owned, Record, Sent, read_stored, tail_of
from tests.chaos.stored.messages import SERVICE, NodePlan, ProducerPlan
from tests.chaos.stored.points import Arming, point_file
from tests.chaos.stored.story import Effect, Letter, Remains
from tests.servers import NatsServer, free_port

READY_TIMEOUT = 60.0
DRAIN_TIMEOUT = 60.0
POINT_TIMEOUT = 30.0
LETTER_TIMEOUT = 20.0
REPLICA_TIMEOUT = 30.0
# Seconds until three servers have elected who leads.


class StoredCluster(Stage):
    """Services with stores, and those who send them commands and events. See `Stage`.

    Args:
        directory: Of the run.
        seed: Of everything random in the producers.
        bug: That the processes started from now on have; none if empty.
        servers: How many nats-servers: 1, or 3 with streams that all of them hold.
        partitions: P.
    """

    def __init__(
        self, directory: Path, seed: str = "0", *, bug: str = "", servers: int = 1, partitions: int = 16
    ) -> None:
        super().__init__(directory, seed)
        self.bug = bug
        self.servers: list[NatsServer] = []
        self.names = Names(self._namespace)
        self._server_count = servers
        self._partitions = partitions
        self._plans: dict[str, NodePlan] = {}
        self._services: dict[str, NodePlan] = {}
        self._owned: list[Owned] = []
        self._read: dict[Path, int] = {}  # bytes of each history

    async def _start(self) -> None:
        if self._server_count == 1:
            self.servers = [self._start_server(jetstream=True)]
        else:
            await self._start_servers(self._server_count)
        self.server = self.servers[0]
        self._client = await nats.connect(
            [server.url for server in self.servers],
            reconnect_time_wait=0.05,
            max_reconnect_attempts=-1,
            error_cb=_ignore,
        )
        self._stack.push_async_callback(self._client.close)
        self._js: JetStreamContext = self._client.jetstream(timeout=2.0)
        await self._wait_jetstream()

    async def _start_servers(self, count: int) -> None:
        ports = [free_port() for _ in range(count)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        for place, port in enumerate(ports, 1):
            config = (
                f'server_name: "s{place}"\n'
                f'cluster {{ name: "c", listen: "127.0.0.1:{port}", routes: [{routes}], pool_size: -1 }}\n'
            )
            server = NatsServer(self.directory / f"nats-{place}", config, jetstream=True)
            self._stack.callback(server.kill)
            await asyncio.to_thread(server.start)
            self.servers.append(server)

    async def _wait_jetstream(self) -> None:
        async with asyncio.timeout(REPLICA_TIMEOUT):
            while True:
                with contextlib.suppress(Exception):
                    await self._js.account_info()
                    return
                await asyncio.sleep(0.1)

    @property
    def url(self) -> str:
        """The addresses of all servers."""
        return ",".join(server.url for server in self.servers)

    # -- members -------------------------------------------------------------------------------------------

    async def start_nodes(self, count: int, service: str = SERVICE, **options: Any) -> list[str]:
        """Start nodes of a service side by side, and return their ids when each of them keeps partitions."""
        names = [await self._launch(service, **options) for _ in range(count)]
        await self.wait_shared(names)
        return names

    async def start_node(self, service: str = SERVICE, **options: Any) -> str:
        """Start a node, which no node was named like before; return its id when it keeps partitions."""
        (name,) = await self.start_nodes(1, service, **options)
        return name

    async def _launch(
        self, service: str, *, linked: bool = False, in_space: bool = False, bug: str | None = None, **options: Any
    ) -> str:
        name = f"{service[0]}{next(self._numbers)}"
        prefix: list[str] = []
        url, host = self.url, "127.0.0.1"
        if in_space:
            space = self._spaces[name] = self._stack.enter_context(Namespace(len(self._spaces)))
            prefix, host = space.prefix, space.host
        if linked or in_space:
            url = await self._url(name, host)
        plan = NodePlan(
            url,
            self._namespace,
            name,
            service,
            str(self._history),
            str(self.directory / f"{service}.db"),
            **{"partitions": self._partitions, "replicas": len(self.servers), **options},
        )
        self._plans[name] = self._services[service] = plan
        env = {"CHAOS_BUG": self.bug if bug is None else bug}
        self.nodes[name] = await self._child(name, "tests.chaos.stored.service", plan, prefix, env)
        return name

    async def wait_shared(self, names: Sequence[str]) -> None:
        """Wait until each of these nodes keeps partitions."""

        def idle() -> list[str]:
            for name in names:
                self.nodes[name].check()
            return [name for name in names if not self.owned_by(name)]

        await eventually(lambda: not idle(), READY_TIMEOUT, what=f"{names} keep partitions")

    async def start_producer(self, name: str, *, linked: bool = False, bug: str | None = None, **options: Any) -> str:
        """Start a producer, and return its name when it has sent its first message."""
        url = await self._url(name, "127.0.0.1") if linked else self.url
        plan = ProducerPlan(
            url,
            self._namespace,
            name,
            str(self._history),
            f"{self.seed}-{name}",
            **{"partitions": self._partitions, "replicas": len(self.servers), **options},
        )
        env = {"CHAOS_BUG": self.bug if bug is None else bug}
        child = self.callers[name] = await self._child(name, "tests.chaos.stored.producer", plan, env=env)

        def has_sent() -> bool:
            child.check()
            return any(isinstance(record, Sent) for record in self._said(name))

        await eventually(has_sent, READY_TIMEOUT)
        return name

    def _said(self, name: str) -> list[Record]:
        return [record for path in self._files(name) for record in tail_of(path)]

    def owned_by(self, name: str) -> set[tuple[str, int]]:
        """Return the partitions that a node was granted last, as all histories say."""
        last: dict[tuple[str, str, int], Owned] = {}
        for record in sorted(self._moves(), key=lambda record: record.t):
            if record.step in ("granted", "released"):
                last[record.service, record.domain, record.partition] = record
        return {
            (record.domain, record.partition)
            for record in last.values()
            if record.node == name and record.step == "granted"
        }

    def _moves(self) -> list[Owned]:
        """Return the steps of ownership in all histories so far; of each only what is new is read."""
        mark = b'"type":"owned"'
        for path in self._history.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _torn = file.read().rpartition(b"\n")
            self._read[path] = self._read.get(path, 0) + len(whole) + len(newline)
            self._owned += [msgspec.json.decode(line, type=Owned) for line in whole.splitlines() if mark in line]
        return self._owned

    def running(self, name: str) -> set[str]:
        """Return the operations that a node is executing, as its history says."""
        runs: set[str] = set()
        for record in self._said(name):
            match record:
                case Begun():
                    runs.add(record.op)
                case Ended():
                    runs.discard(record.op)
        return runs

    async def wait_busy(self, name: str) -> None:
        """Wait until a node is in the middle of something."""
        await eventually(lambda: self.running(name), READY_TIMEOUT, what=f"{name} runs something")

    async def wait_calm(self, seconds: float = 0.6) -> None:
        """Wait until the partitions have not moved for a while."""
        clock = self._recorder.clock

        def is_calm() -> bool:
            moves = [
                record.t
                for path in self._history.glob("*.jsonl")
                for record in tail_of(path)
                if isinstance(record, Owned)
            ]
            return bool(moves) and clock() - max(moves) > seconds

        await eventually(is_calm, READY_TIMEOUT, what="the partitions stay where they are")

    async def wait_run_elsewhere(self, hit: Hit) -> None:
        """Wait until another process executes what a process was frozen with."""
        op = hit.what.rpartition(" ")[2]

        def runs() -> bool:
            return any(
                isinstance(record, Begun) and record.op == op and record.pid != hit.pid
                for name in self.nodes
                for record in self._said(name)
            )

        await eventually(runs, POINT_TIMEOUT, what=f"another node runs {op}")

    # -- the end -------------------------------------------------------------------------------------------

    async def finish(self) -> Remains:
        """Stop the producers, let everything be handled, and return what is left of the run."""
        await self.stop_callers()
        left = await self._drain()
        for child in self.nodes.values():
            child.check()
        records = read_stored(self._history)
        effects = {service: self._effects(Path(plan.inbox)) for service, plan in self._services.items()}
        letters = {service: await self._letters(service) for service in self._services}
        return Remains(records, effects, letters, left)

    async def _drain(self) -> dict[str, int]:
        """Wait until nothing waits any more; return how many messages still do, by stream or consumer."""
        clock = self._recorder.clock
        over = clock() + DRAIN_TIMEOUT
        left = {"all": 1}
        while clock() < over and any(child.is_running for child in self.nodes.values()):
            try:
                left = await self._left()
            except Exception:  # a server is not there yet
                left = {"unknown": 1}
            if not left:
                break
            await asyncio.sleep(0.1)
        return left

    async def _left(self) -> dict[str, int]:
        left: dict[str, int] = {}
        for service, plan in self._services.items():
            if plan.takes_commands:
                stream = self.names.command_stream(service)
                left[stream] = (await self._js.stream_info(stream)).state.messages
            if plan.takes_events:
                log = self.names.event_stream()
                left[f"{log} {service}"] = await self._behind(log, service)
        return {name: count for name, count in left.items() if count}

    async def _behind(self, log: str, service: str) -> int:
        infos = await self._consumers(log)
        mine = [one for one in infos if one.name.startswith(f"{service}-p")]
        return sum((one.num_pending or 0) + (one.num_ack_pending or 0) for one in mine) if mine else 1

    async def _consumers(self, stream: str) -> list[Any]:
        return list(await self._js.consumers_info(stream))

    def _effects(self, path: Path) -> list[Effect]:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            rows = connection.execute(
                "SELECT place, t, op, execution, key, value, domain, partition, epoch, node, pid"
                " FROM effects ORDER BY place"
            ).fetchall()
        return [Effect(*row) for row in rows]

    async def _letters(self, service: str) -> list[Letter]:
        stream = self.names.dead_letter_stream(service)
        try:
            state = (await self._js.stream_info(stream)).state
        except NotFoundError:
            return []
        letters: list[Letter] = []
        for sequence in range(max(1, state.first_seq), state.last_seq + 1):
            with contextlib.suppress(NotFoundError):
                raw = await self._js.get_msg(stream, sequence)
                letter = decode_letter(raw.data or b"")
                letters.append(Letter(letter.id, letter.key, str(letter.reason), letter.attempts, letter.error))
        return letters

    # -- faults --------------------------------------------------------------------------------------------

    async def kill(self, name: str) -> None:
        """SIGKILL a node while it is in the middle of something."""
        await self.wait_busy(name)
        child = self.nodes.pop(name)
        async with self.fault("kill", name, child.pid) as see:
            await child.kill()
            see({end_of(child): 1})

    async def freeze(self, name: str, seconds: float) -> None:
        """SIGSTOP a node in the middle of something, and SIGCONT it afterwards."""
        await self.wait_busy(name)
        child = self.nodes[name]
        async with self.fault("freeze", name, child.pid) as see:
            child.freeze()
            try:
                await asyncio.sleep(seconds)
                see({stance(child.pid): 1})
            finally:
                child.thaw()

    def arm(self, name: str, point: str, action: str, prefix: str = "") -> None:
        """Have a node killed or frozen when it comes to a point with something."""
        file = point_file(self._history, name)
        draft = file.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(Arming(point, action, prefix)))  # type: ignore[arg-type]
        draft.rename(file)

    async def wait_hit(self, name: str, point: str, count: int = 1) -> Hit:
        """Wait until a node has come to its point, and return the last time it did."""

        def hits() -> list[Hit]:
            return [record for record in self._said(name) if isinstance(record, Hit) and record.point == point]

        await eventually(lambda: len(hits()) >= count, POINT_TIMEOUT, what=f"{name} comes to {point}")
        return hits()[-1]

    async def kill_at(self, name: str, point: str, prefix: str = "") -> Hit:
        """Have a node killed when it comes to a point."""
        child = self.nodes.pop(name)
        child.may_end = True
        async with self.fault("kill", name, child.pid) as see:
            self.arm(name, point, "kill", prefix)
            hit = await self.wait_hit(name, point)
            await asyncio.wait_for(child.process.wait(), POINT_TIMEOUT)
            see({end_of(child): 1})
        return hit

    @asynccontextmanager
    async def frozen_at(self, name: str, point: str, prefix: str = "", *, is_armed: bool = False) -> AsyncIterator[Hit]:
        """Have a node frozen when it comes to a point, until the end of the block."""
        child = self.nodes[name]
        if not is_armed:
            self.arm(name, point, "freeze", prefix)
        hit = await self.wait_hit(name, point)
        await eventually(lambda: stance(child.pid) == "stopped", POINT_TIMEOUT)
        async with self.fault("freeze", name, child.pid) as see:
            try:
                yield hit
                see({stance(child.pid): 1})
            finally:
                child.thaw()

    async def roll(self, name: str, *, with_successor: bool = True) -> str | None:
        """Start another node like it, then SIGTERM this one and wait for its end; return the id of the new one."""
        child = self.nodes[name]
        plan = self._plans[name]
        async with self.fault("roll", name, child.pid) as see:
            successor = None
            if with_successor:
                options = {"takes_commands": plan.takes_commands, "takes_events": plan.takes_events}
                successor = await self._launch(plan.service, linked=name in self._links, **options)
                await self.wait_shared([successor])
            del self.nodes[name]
            code = await child.terminate()
            see({end_of(child): 1})
        assert code == 0, f"{name} ended with {code} on SIGTERM; see its log in {self.directory}"
        return successor

    async def replace(self, name: str) -> str:
        """Start a node like one that is gone."""
        plan = self._plans[name]
        options = {"takes_commands": plan.takes_commands, "takes_events": plan.takes_events}
        return await self.start_node(plan.service, linked=name in self._links, **options)

    @asynccontextmanager
    async def deaths(self) -> AsyncIterator[None]:
        """Let nodes die by themselves, each of which is a fault, and start another like each until the block ends."""
        for child in self.nodes.values():
            child.may_end = True
        replacing = asyncio.create_task(self._replace_dead())
        try:
            yield
        finally:
            replacing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await replacing

    async def _replace_dead(self) -> None:
        while True:
            for name, child in list(self.nodes.items()):
                if not child.is_running:
                    async with self.fault("die", name, child.pid) as see:
                        see({end_of(child): 1})
                    del self.nodes[name]
                    plan = self._plans[name]
                    options = {"takes_commands": plan.takes_commands, "takes_events": plan.takes_events}
                    successor = await self._launch(plan.service, **options)
                    self.nodes[successor].may_end = True
            await asyncio.sleep(0.02)

    async def wait_letter(self, service: str = SERVICE) -> None:
        """Wait until there is a dead letter, or for so long that there should have been."""
        stream = self.names.dead_letter_stream(service)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LETTER_TIMEOUT):
                while not (await self._js.stream_info(stream)).state.messages:
                    await asyncio.sleep(0.1)

    async def leader_of(self, stream: str) -> NatsServer:
        """Return the server that leads a stream."""
        info = await self._js._api_request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=2.0)
        return self.servers[int(info["cluster"]["leader"].removeprefix("s")) - 1]

    async def kill_leader(self, stream: str, down: float) -> None:
        """SIGKILL the server that leads a stream, and start it again after a while."""
        server = await self.leader_of(stream)
        async with self.fault("kill_leader", server.address) as see:
            server.kill()
            await asyncio.sleep(down)
            see({"killed": 1} if not server.is_running else {})
            await asyncio.to_thread(server.start)

    async def delete_consumers(self, stream: str, count: int) -> None:
        """Delete consumers under their owners."""
        async with self.fault("delete_consumers", stream) as see:
            infos = await self._consumers(stream)
            doomed = [one.name for one in infos][:count]
            for name in doomed:
                await self._js.delete_consumer(stream, name)
            see({"deleted": len(doomed)})

    async def delete_owners(self) -> None:
        """Delete the bucket with the owners of all partitions."""
        stream = f"KV_{self.names.owners_bucket()}"
        async with self.fault("delete_owners", stream) as see:
            await self._js.delete_stream(stream)
            see({"deleted": 1})


async def _ignore(_: Exception) -> None:
    """Servers that are killed are no news."""
