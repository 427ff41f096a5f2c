"""The wire as others rely on it: golden bytes, names, and the page that documents them."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from catga_bus import wire
from catga_bus.codec import Gate, GateError
from catga_bus.durability.letters.letters import decode_letter
from catga_bus.durability.routes.routes import Route
from catga_bus.errors import ConfigurationError
from catga_bus.partition.hashing import partition_of
from catga_bus.wire import Kind, Names, Status, join_batch, join_ids, service_subjects, token


def read(text: str | bytes) -> Any:
    """What a JSON text says; a key of digits stands for the integer, which JSON cannot have as a key."""
    return json.loads(text, object_hook=lambda pairs: {int(k) if k.isdigit() else k: v for k, v in pairs.items()})


GOLDEN: dict[str, Any] = read((Path(__file__).parent / "golden_wire.json").read_text())
PAYLOADS: dict[str, Any] = GOLDEN["payloads"]
ADDITIONS = "additions"
IDS = (Kind.ACCEPTED, Kind.CANCEL, Kind.STATUS)
PAGE = (Path(__file__).parents[2] / "docs" / "wire.md").read_text()
HEX_BLOCK = re.compile(r"```hex (\S+)\n(.*?)```\n.*?```json\n(.*?)\n```", re.DOTALL)


def taken_apart(payload: bytes) -> tuple[int, list[Any], list[Any]]:
    """Kind, head and frames of a payload, bodies decoded, as plain values."""
    gate = Gate()
    kind = gate.kind(payload)
    if kind in IDS:
        ids = gate.ids(payload)
        return kind, [getattr(ids.head, name) for name in ids.head.__struct_fields__], ids.frames
    if kind == Kind.HEARTBEAT:
        beats = gate.beats(payload)
        said = read(msgspec.json.encode(beats.frames))
        return kind, [getattr(beats.head, name) for name in beats.head.__struct_fields__], said
    if kind == Kind.NOTICES:
        notices = gate.notices(payload)
        said = read(msgspec.json.encode(notices.frames))
        return kind, [getattr(notices.head, name) for name in notices.head.__struct_fields__], said
    if kind == Kind.LETTER:
        letter = decode_letter(payload)
        return kind, [letter.node, None, 0, 0], [read(msgspec.json.encode(letter))]
    batch = gate.messages(payload) if kind == Kind.MESSAGES else gate.answers(payload)
    frames = []
    for frame in batch.frames:
        values = [getattr(frame, name) for name in frame.__struct_fields__]
        frames.append([msgspec.msgpack.decode(v) if isinstance(v, msgspec.Raw) else v for v in values])
    return kind, [getattr(batch.head, name) for name in batch.head.__struct_fields__], frames


def padded(head: list[Any]) -> list[Any]:
    """The head with the fields that a sender may leave off."""
    return [*head, *(None, 0, 0)[len(head) - 1 :]]


@pytest.mark.parametrize("name", PAYLOADS)
def test_golden_bytes_are_read(name: str) -> None:
    golden = PAYLOADS[name]

    kind, head, frames = taken_apart(bytes.fromhex(golden["hex"]))

    assert (kind, head, frames) == (golden["kind"], padded(golden["head"]), golden["frames"])


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != ADDITIONS])
def test_golden_bytes_are_written(name: str) -> None:
    golden = PAYLOADS[name]
    frames = [msgspec.msgpack.encode(frame) for frame in golden["frames"]]
    if golden["kind"] == Kind.LETTER:  # JSON has no bytes
        [letter] = golden["frames"]
        frames = [msgspec.msgpack.encode(letter | {"body": base64.b64decode(letter["body"])})]

    payload = join_batch(Kind(golden["kind"]), tuple(golden["head"]), frames)

    assert payload.hex() == golden["hex"]
    if golden["kind"] in IDS:
        assert join_ids(Kind(golden["kind"]), tuple(golden["head"]), golden["frames"]) == payload


def test_golden_bytes_hold_an_answer_of_every_status() -> None:
    statuses = {
        frame[1] for golden in PAYLOADS.values() for frame in golden["frames"] if golden["kind"] == Kind.ANSWERS
    }

    assert statuses == set(Status)


def test_what_is_not_ok_has_a_fault_as_its_body() -> None:
    for golden in PAYLOADS.values():
        for frame in golden["frames"] if golden["kind"] == Kind.ANSWERS else []:
            if frame[1] != Status.OK:
                fault = msgspec.msgpack.decode(msgspec.msgpack.encode(frame[2]), type=wire.Fault)
                assert [fault.code, fault.message, fault.details, fault.retryable] == frame[2]


def test_faults_may_leave_off_all_but_the_code_and_may_have_additions() -> None:
    decode = msgspec.msgpack.Decoder(wire.Fault).decode

    assert decode(msgspec.msgpack.encode(["X"])) == wire.Fault("X")
    assert decode(msgspec.msgpack.encode(["X", "m", 1, True, "new", 2])) == wire.Fault("X", "m", 1, True)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_535, 65_536])
def test_batches_of_any_size_are_valid_messagepack(count: int) -> None:
    payload = join_batch(Kind.MESSAGES, ("s",), [b"\xc0"] * count)

    assert payload[:2] == wire.PREFIX
    assert msgspec.msgpack.decode(payload[2:]) == [0, ["s"], [None] * count]


@pytest.mark.parametrize("name", GOLDEN["tokens"])
def test_golden_tokens(name: str) -> None:
    assert token(name) == GOLDEN["tokens"][name]


def test_golden_subjects() -> None:
    names, node = Names(), ("billing", "billing-7k2m9x4pqa")
    letter = decode_letter(bytes.fromhex(PAYLOADS["letter"]["hex"]))

    assert GOLDEN["subjects"] == {
        "request": names.request("Quote"),
        "all_requests": names.all_requests(),
        "node_request": names.node_request(*node, "Quote"),
        "node_requests": names.node_requests(*node),
        "node_status": names.node_status(*node),
        "node_cancel": names.node_cancel(*node),
        "node_ping": names.node_ping(*node),
        "heartbeat": names.heartbeat(node[1]),
        "heartbeats": names.heartbeats(),
        "tick": names.tick("Tick"),
        "broadcast": names.broadcast("PricesChanged"),
        "command": names.command("billing", partition_of("a-1", 64)),
        "commands": names.commands("billing"),
        "stored_event": names.event("Debited", partition_of("a-1", 64)),
        "stored_events": names.events(),
        "schedule": names.schedule("billing", "Zk3J1b0qVd5mC8xY"),
        "due": names.due("billing", partition_of("a-1", 64)),
        "dead_letter": names.dead_letter("billing", "AAECAwQFBgcICQoL6", letter.mark),
        "request_with_dots": names.request("shop.v2.Quote"),
        "service_ping": list(service_subjects("PING", *node)),
    }


def test_subjects_of_liveness() -> None:
    names, node = Names("team"), ("shop.eu", "shop-1")

    assert names.heartbeat("shop.1") == "team.nodes.shop=2E1"
    assert names.heartbeats() == "team.nodes.*"
    assert names.all_directed() == "team.to.>"
    assert names.node_ping(*node) == "team.to.shop=2Eeu.shop-1.ping"
    assert names.is_ping(names.node_ping(*node))
    assert names.is_ping(names.roll_call())
    assert not any(map(names.is_ping, (names.node_status(*node), "other.to.a.b.ping", "team.rpc.ping")))


@pytest.mark.parametrize("namespace", ["", "a.b", "a b", "x" * 65, "*", "ü", "catga\n"])
def test_a_namespace_is_one_plain_token(namespace: str) -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        Names(namespace)


def test_a_namespace_owns_what_lies_in_it_and_nothing_else() -> None:
    names = Names("team")

    assert names.owns("team")
    assert names.owns("team.rpc.Quote")
    assert not names.owns("teams.rpc.Quote")
    assert not names.owns("_INBOX.team.x")


def frame_with(**changes: Any) -> bytes:
    """A payload with one message frame of which some fields are replaced."""
    fields: dict[str, Any] = {
        "id": "i", "type": "T", "key": None, "remaining_ms": None, "attempt": 1, "trace": None, "body": {},
    }  # fmt: skip
    fields |= changes
    return join_batch(Kind.MESSAGES, ("s",), [msgspec.msgpack.encode(list(fields.values()))])


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""}, {"id": "x" * 257}, {"id": 1}, {"id": None},
        {"type": ""}, {"type": "x" * 1_025}, {"type": b"T"},
        {"key": 1},
        {"remaining_ms": -1}, {"remaining_ms": 2**53}, {"remaining_ms": 1.5}, {"remaining_ms": True},
        {"attempt": 0}, {"attempt": -1}, {"attempt": 2**53}, {"attempt": None},
        {"trace": "x" * 257}, {"trace": 1},
    ],
    ids=str,
)  # fmt: skip
def test_frames_out_of_bounds_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(GateError, match=re.escape("field `[2][0]")):
        Gate().messages(frame_with(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "x" * 256}, {"type": "x" * 1_024}, {"key": "x" * 70_000}, {"remaining_ms": 0},
        {"remaining_ms": 2**53 - 1}, {"attempt": 2**53 - 1}, {"trace": "x" * 256}, {"body": None},
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_frames_at_their_bounds_are_let_in(changes: dict[str, Any]) -> None:
    [frame] = Gate().messages(frame_with(**changes)).frames

    for name, value in changes.items():
        if name != "body":
            assert getattr(frame, name) == value


@pytest.mark.parametrize("head", [("x" * 257,), ("s", "x" * 1_025), ("s", None, -1), ("s", None, 2**53), (), (1,)])
def test_heads_out_of_bounds_are_refused(head: tuple[object, ...]) -> None:
    with pytest.raises(GateError):
        Gate().messages(join_batch(Kind.MESSAGES, head, []))


@pytest.mark.parametrize(
    "frame", [["", 0, {}, "n"], ["i", -1, {}, "n"], ["i", 2**53, {}, "n"], ["i", 0, {}, "n" * 257], ["i", 0, {}]]
)
def test_answers_out_of_bounds_are_refused(frame: list[Any]) -> None:
    with pytest.raises(GateError):
        Gate().answers(join_batch(Kind.ANSWERS, ("s",), [msgspec.msgpack.encode(frame)]))


def test_a_payload_has_a_bounded_number_of_frames() -> None:
    frame = msgspec.msgpack.encode(["i", "T", None, None, 1, None, 0])

    assert len(Gate().messages(join_batch(Kind.MESSAGES, ("s",), [frame] * wire.MAX_FRAMES)).frames) == wire.MAX_FRAMES
    with pytest.raises(GateError, match="length <= 4096"):
        Gate().messages(join_batch(Kind.MESSAGES, ("s",), [frame] * (wire.MAX_FRAMES + 1)))


def beat_with(**changes: Any) -> bytes:
    """A heartbeat of which some fields are replaced."""
    golden = msgspec.msgpack.decode(bytes.fromhex(PAYLOADS["heartbeat"]["hex"])[2:], type=wire.BeatBatch).frames[0]
    fields = {name: getattr(golden, name) for name in golden.__struct_fields__} | changes
    return join_batch(Kind.HEARTBEAT, ("s",), [msgspec.msgpack.encode(list(fields.values()))])


@pytest.mark.parametrize(
    "changes",
    [
        {"id": ""}, {"id": "x" * 257}, {"service": ""}, {"version": 1}, {"incarnation": [1]}, {"incarnation": [-1, 1]},
        {"types": ["T"] * 1_025}, {"types": [""]}, {"wire_versions": [1] * 17}, {"zone": "x" * 257},
        {"metadata": {str(n): "" for n in range(65)}}, {"metadata": {"a": "x" * 257}}, {"seq": -1}, {"seq": 2**53},
        {"status": 1}, {"is_ready": 1}, {"interval_ms": 0}, {"interval_ms": 60_001}, {"stall_ms": -1},
        {"load": [-1]}, {"load": [0, 0, 0, -0.1]}, {"partitions": {-1: 1}}, {"utc_ms": 1.5}, {"breakers": [1]},
        {"commands": ["T"] * 1_025}, {"commands": [""]}, {"events": ["T"] * 1_025}, {"events": ["x" * 1_025]},
        {"event_partitions": {1: -1}}, {"event_partitions": dict.fromkeys(range(4_097), 1)}, {"store": "x" * 257},
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_heartbeats_out_of_bounds_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(GateError):
        Gate().beats(beat_with(**changes))


def test_heartbeats_are_one_of_bounded_size() -> None:
    assert Gate().beats(beat_with(zone=None)).frames[0].zone is None
    frame = msgspec.msgpack.encode(PAYLOADS["heartbeat"]["frames"][0])
    with pytest.raises(GateError, match="length <= 1"):
        Gate().beats(join_batch(Kind.HEARTBEAT, ("s",), [frame, frame]))
    with pytest.raises(GateError, match="the limit is 65536"):
        Gate().beats(beat_with(types=["x" * 1_000] * 70))


def test_heartbeats_may_leave_off_what_was_added_last_and_may_have_additions() -> None:
    whole = PAYLOADS["heartbeat"]["frames"][0]
    for frame in (whole[:13], whole[:18], [*whole, "new"]):
        payload = join_batch(Kind.HEARTBEAT, ("s",), [msgspec.msgpack.encode(frame)])
        assert Gate().beats(payload).frames[0].id == "billing-7k2m9x4pqa"
    with pytest.raises(GateError):
        Gate().beats(join_batch(Kind.HEARTBEAT, ("s",), [msgspec.msgpack.encode(whole[:12])]))


# -- docs/wire.md ----------------------------------------------------------------------------------------


def test_the_page_shows_every_golden_payload() -> None:
    assert {name for name, _, _ in HEX_BLOCK.findall(PAGE)} == set(PAYLOADS)


@pytest.mark.parametrize(("name", "dump", "said"), HEX_BLOCK.findall(PAGE), ids=lambda value: value[:20])
def test_hex_on_the_page_decodes_to_what_the_page_says(name: str, dump: str, said: str) -> None:
    payload = bytes.fromhex("".join(line.partition("#")[0] for line in dump.splitlines()))
    kind, head, frames = read(said)

    assert payload.hex() == PAYLOADS[name]["hex"]
    assert taken_apart(payload) == (kind, padded(head), frames)


def rows_of(dump: str) -> list[tuple[str, str]]:
    """Bytes and comment of each row; a row without a comment goes on with the bytes of the one before."""
    rows: list[tuple[str, str]] = []
    for line in dump.splitlines():
        shown, mark, comment = line.partition("#")
        if mark:
            rows.append((shown, comment.strip()))
        else:
            rows[-1] = (rows[-1][0] + shown, rows[-1][1])
    return rows


def test_comments_on_the_page_name_the_values_beside_them() -> None:
    checked = 0
    for _, dump, _ in HEX_BLOCK.findall(PAGE):
        if "#" not in dump:
            continue
        for shown, comment in rows_of(dump):
            value = re.search(r": (\d+|\".*\")( \(\w+\))?$", comment)
            if value:
                assert msgspec.msgpack.decode(bytes.fromhex(shown)) == json.loads(value[1]), comment
                checked += 1
    assert checked == 137


def test_the_page_lists_every_golden_token() -> None:
    rows = dict(re.findall(r"^\| `(\".*\")` \| `(\S+)` \|$", PAGE, re.MULTILINE))

    assert {json.loads(name): text for name, text in rows.items()} == GOLDEN["tokens"]


def test_the_page_names_every_kind_status_and_header() -> None:
    for status in Status:
        assert f"| {status.value} | {status.name.lower()} |" in PAGE
    for kind in Kind:
        assert f"| {kind.value} | {kind.name.lower()} |" in PAGE
    assert wire.ERROR_CODE_HEADER in PAGE
    assert wire.ERROR_HEADER in PAGE
    assert f"{wire.MAX_FRAMES:,} frames" in PAGE
    for name, subject in GOLDEN["subjects"].items():
        if name not in ("all_requests", "service_ping"):
            assert f"`{subject}`" in PAGE


def test_the_page_shows_a_route_as_it_is_written() -> None:
    shown = re.search(r"^\{\"type\": \"Debit\".*\}$", PAGE, re.MULTILINE)

    assert shown is not None
    route = msgspec.json.decode(shown[0], type=Route)
    assert json.loads(msgspec.json.encode(route)) == json.loads(shown[0])


def test_the_page_shows_the_golden_json_exchanges() -> None:
    for exchange in GOLDEN["json"].values():
        headers = "".join(f"{name}: {value}\n" for name, value in (exchange["headers"] or {}).items())
        separator = "\n" if headers else ""
        shown = f"$ nats request catga.rpc.Quote '{exchange['request']}'\n{headers}{separator}{exchange['answer']}\n"
        assert shown in PAGE
