"""Whether a server's list of permissions permits what a bus needs."""

import re
from pathlib import Path

import pytest

from catga_bus.cli.findings import Level
from catga_bus.cli.permissions import Need, Permissions, Responses, Rules, Use, check_needs, is_within, needs_of
from catga_bus.wire import Names

NAMES = Names()
SHOP = Use("shop", "shop-1", "_INBOX.shop", handles=("Quote",), hears=("Sold", "PricesChanged"))
WEB = Use("web", "web-1", "_INBOX.web", asks=("Quote",), publishes=("Sold",))


@pytest.mark.parametrize(
    ("subject", "pattern", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b", "a.*", True),
        ("a.b", "*.b", True),
        ("a.b", "a.>", True),
        ("a.b", ">", True),
        ("a", "a.>", False),
        ("a.b.c", "a.*", False),
        ("a", "a.*", False),
        ("a.*", "a.*", True),
        ("a.*", "a.b", False),
        ("a.>", "a.>", True),
        ("a.>", "a.*", False),
        ("a.b.>", "a.>", True),
        ("a.>", "a.*.>", False),
        (">", "a.>", False),
    ],
)
def test_a_subject_lies_within_a_pattern_or_not(subject: str, pattern: str, expected: bool) -> None:
    assert is_within(subject, pattern) is expected


@pytest.mark.parametrize(
    ("rules", "subject", "queue", "expected"),
    [
        (Rules(), "a", "", True),
        (Rules(allow=()), "a", "", True),
        (Rules(allow=("b",)), "a", "", False),
        (Rules(allow=("a",)), "a", "q", True),
        (Rules(allow=("a q",)), "a", "q", True),
        (Rules(allow=("a q",)), "a", "other", False),
        (Rules(allow=("a q",)), "a", "", False),
        (Rules(allow=("a *",)), "a", "q", True),
        (Rules(allow=("a >",)), "a", "q.r", True),
        (Rules(deny=("a",)), "a", "", False),
        (Rules(deny=("a",)), "a", "q", False),
        (Rules(allow=("a",), deny=("a q",)), "a", "q", False),
        (Rules(allow=("a",), deny=("a q",)), "a", "", True),
        (Rules(allow=("a.>",), deny=("a.> >",)), "a.b", "q", False),
        (Rules(allow=("a.>",), deny=("a.> >",)), "a.b", "", True),
    ],
)
def test_rules_are_read_as_the_server_reads_them(rules: Rules, subject: str, queue: str, expected: bool) -> None:
    assert rules.permit(subject, queue) is expected


def test_a_service_needs_its_queue_groups_and_a_caller_needs_to_ask() -> None:
    shop = {(need.verb, need.subject, need.queue) for need in needs_of(SHOP, NAMES)}
    assert {
        ("subscribe", "_INBOX.shop.>", ""),
        ("subscribe", "catga.to.shop.shop-1.ping", ""),
        ("subscribe", "catga.to.shop.shop-1.rpc.*", ""),
        ("subscribe", "catga.to.shop.shop-1.status", ""),
        ("subscribe", "catga.to.shop.shop-1.cancel", ""),
        ("publish", "catga.to.shop.shop-1.ping", ""),
        ("publish", "_INBOX.catga-doctor", ""),
        ("subscribe", "catga.nodes.*", ""),
        ("publish", "catga.nodes.shop-1", ""),
        ("subscribe", "catga.rpc.Quote", "rpc"),
        ("subscribe", "catga.tick.Sold", "shop"),
        ("subscribe", "catga.all.Sold", ""),
        ("subscribe", "$SRV.STATS.shop.shop-1", ""),
    } <= shop
    assert not any(subject.startswith(("catga.rpc", "catga.tick")) for verb, subject, _ in shop if verb == "publish")
    web = {(need.verb, need.subject) for need in needs_of(WEB, NAMES)}
    assert {
        ("publish", "catga.rpc.Quote"),
        ("publish", "catga.to.web.web-1.rpc.Quote"),
        ("publish", "catga.to.web.web-1.cancel"),
        ("publish", "catga.to.web.web-1.status"),
        ("subscribe", "catga.to.web.web-1.ping"),
        ("publish", "catga.tick.Sold"),
    } <= web
    assert not any("$SRV" in subject for _, subject in web)
    rules = {need.rule for need in needs_of(WEB, NAMES) if need.subject == "catga.to.web.web-1.ping"}
    assert rules == {"catga.to.web.*.ping", "catga.to.*.*.ping"}  # hears its own, asks all; hears nothing else
    assert not any(subject.startswith("catga.to") and "ping" not in subject for verb, subject in web if verb[0] == "s")
    assert not any("cancel" in subject or "status" in subject for verb, subject, _ in shop if verb == "publish")


def test_a_bus_that_hears_of_ended_connections_needs_that() -> None:
    use = Use("web", "web-1", "_INBOX.web", disconnect_events="catga.sys.disconnect")
    (need,) = set(needs_of(use, NAMES)) - set(needs_of(Use("web", "web-1", "_INBOX.web"), NAMES))
    assert (need.verb, need.subject, need.level) == ("subscribe", "catga.sys.disconnect", Level.WARNING)


def test_a_client_answers_questions_by_response_or_by_permission() -> None:
    needs = [need for need in needs_of(WEB, NAMES) if need.is_response]
    assert len(needs) == 1
    nothing = Rules(allow=("nothing",))
    for permissions, level in (
        (Permissions(publish=nothing, responses=Responses(4)), Level.OK),
        (Permissions(publish=Rules(allow=("_INBOX.>",))), Level.OK),
        (Permissions(publish=Rules(allow=("_INBOX.*.*.*.*",), deny=("_INBOX.*.*.*.a",))), Level.OK),
        (Permissions(publish=nothing), Level.FAILED),
    ):
        (finding,) = check_needs(needs, permissions, [])
        assert finding.level is level
    assert "'_INBOX.>'" in finding.fix
    assert [one.what for one in check_needs(needs, None, [])] == ["0 of 0 subjects in use are permitted"]


def test_what_is_refused_says_which_rule_would_allow_it() -> None:
    permissions = Permissions(publish=Rules(allow=("catga.nodes.*",)), subscribe=Rules(allow=("catga.>",)))
    needs = [
        Need("publish", "catga.to.web.web-1.ping", "asks", rule="catga.to.*.*.ping"),
        Need("publish", "catga.nodes.web-1", "is seen"),
        Need("subscribe", "_INBOX.web.>", "gets answers", level=Level.WARNING),
        Need("subscribe", "$SRV.X", "joins", "q"),
    ]
    ping, inbox, joins = check_needs(needs, permissions, [])
    assert (ping.level, inbox.level, joins.level) == (Level.FAILED, Level.WARNING, Level.FAILED)
    assert "may not publish on 'catga.to.web.web-1.ping'" in ping.what
    assert "'catga.to.*.*.ping'" in ping.fix
    assert "may not subscribe to '_INBOX.web.>'" in inbox.what
    assert "in the queue group 'q'" in joins.what
    assert "'$SRV.X q'" in joins.fix


def test_what_is_permitted_is_counted() -> None:
    needs = needs_of(SHOP, NAMES)
    (finding,) = check_needs(needs, Permissions(), [])
    assert finding.level is Level.OK
    assert finding.what == f"{len(needs)} of {len(needs)} subjects in use are permitted"


def test_what_was_only_tried_leaves_queue_groups_unknown() -> None:
    needs = needs_of(SHOP, NAMES)
    tried = [(need, True) for need in needs if not need.queue and not need.is_response]
    granted, unknown = check_needs(needs, None, tried)
    assert granted.level is Level.OK
    assert granted.what.startswith(f"{len(tried)} of {len(needs) - 1} ")
    assert unknown.level is Level.UNKNOWN
    assert unknown.what.startswith("3 subjects were not tried")
    assert "catga.rpc.Quote rpc" in unknown.what
    refused = check_needs(needs, None, [(need, need is not tried[0][0]) for need, _ in tried])
    assert [finding.level for finding in refused] == [Level.FAILED, Level.UNKNOWN]


def rules_in(user: str) -> Permissions:
    """Read the permissions of a user's file as the server does: the first `publish` and the first `subscribe` list."""
    text = (Path(__file__).parents[2] / "deploy" / "nats" / "users" / f"{user}.conf").read_text()
    text = re.sub(r"(^|\s)#.*", "", text)
    lists = re.findall(r"(publish|subscribe): \{\s*allow: \[(.*?)\]", text, re.S)
    rules = {verb: Rules(allow=tuple(re.findall(r'"([^"]+)"', inner))) for verb, inner in lists}
    return Permissions(**rules, responses=Responses(4) if "allow_responses: { max: 4" in text else None)


@pytest.mark.parametrize("use", [SHOP, WEB, Use("operator", "operator-1", "_INBOX.operator")])
def test_the_users_that_we_ship_have_what_they_need(use: Use) -> None:
    permissions = rules_in(use.service)
    assert permissions.publish.allow
    assert [finding.level for finding in check_needs(needs_of(use, NAMES), permissions, [])] == [Level.OK]
