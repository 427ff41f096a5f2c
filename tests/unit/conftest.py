"""What tests of both ends of the request lane share, and what those of stored work do."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from catga_bus import Router
from tests.unit.lane import FakeNode, StartNode
from tests.unit.work_rig import Rig, Start


@pytest.fixture
def url() -> str:
    """A broker in memory of the test's own."""
    return f"memory://{uuid4().hex}"


@pytest.fixture
async def start_node(url: str) -> AsyncIterator[StartNode]:
    """Start as many played nodes as a test needs: `await start_node("a", in_group=True)`."""
    nodes: list[FakeNode] = []

    async def start(node_id: str, *, in_group: bool = False) -> FakeNode:
        nodes.append(await FakeNode(url, node_id, in_group=in_group).start())
        return nodes[-1]

    yield start
    for node in nodes:
        await node.stop()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts rigs of stored work, which are stopped in the end."""
    rigs: list[Rig] = []

    async def started(router: Router, **options: Any) -> Rig:
        rigs.append(await Rig(router, **options).start())
        return rigs[-1]

    yield started
    for rig in rigs:
        await rig.stop()
