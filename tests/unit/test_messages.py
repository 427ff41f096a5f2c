import sys
import types
from enum import Enum, IntEnum
from typing import Annotated, Any, Generic, Literal, NewType, TypeVar
from uuid import UUID

import msgspec
import pytest

from catga_bus.errors import ConfigurationError
from catga_bus.messages import Command, Event, MessageOptions, Request, options_of, reply_type

T = TypeVar("T")
U = TypeVar("U")


class Price(msgspec.Struct):
    cents: int


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


class TestOptions:
    def test_defaults(self) -> None:
        class Ask(Request[Price]):
            sku: str

        class Debit(Command[None]):
            account: str

        class Debited(Event):
            account: str

        assert options_of(Ask) == MessageOptions(kind="Request", type_name="Ask", partition_by=None, idempotent=True)
        assert options_of(Debit) == MessageOptions(kind="Command", type_name="Debit")
        assert options_of(Debited) == MessageOptions(kind="Event", type_name="Debited", durable=True)

    def test_every_option_is_kept(self) -> None:
        class Ask(Request[Price], partition_by="sku", idempotent=False, type_name="shop.Ask"):
            sku: str

        class Debit(Command[None], partition_by="account", type_name="bank.Debit"):
            account: str

        class Ticked(Event, durable=False, partition_by="sku", type_name="Tick"):
            sku: str

        assert options_of(Ask) == MessageOptions("Request", "shop.Ask", "sku", idempotent=False)
        assert options_of(Debit) == MessageOptions("Command", "bank.Debit", "account")
        assert options_of(Ticked) == MessageOptions("Event", "Tick", "sku", durable=False)

    def test_a_subclass_inherits_everything_but_the_name(self) -> None:
        class Base(Event, durable=False, partition_by="sku", type_name="base"):
            sku: str

        class Leaf(Base):
            more: int

        class Stored(Base, durable=True, partition_by="more"):
            more: str

        assert options_of(Leaf) == MessageOptions("Event", "Leaf", "sku", durable=False)
        assert options_of(Stored) == MessageOptions("Event", "Stored", "more", durable=True)

    def test_a_subclass_may_drop_an_inherited_idempotence(self) -> None:
        class Base(Request[Price], idempotent=False):
            pass

        class Leaf(Base, idempotent=True):
            pass

        assert not options_of(Base).idempotent
        assert options_of(Leaf).idempotent

    def test_options_come_through_a_mixin(self) -> None:
        class Traced(msgspec.Struct):
            note: str = ""

        class Base(Event, durable=False):
            pass

        class Leaf(Traced, Base):
            pass

        assert options_of(Leaf).durable is False

    def test_options_of_msgspec_pass_through(self) -> None:
        class Ask(Request[Price], frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
            sku_name: str

        ask = Ask(sku_name="a")

        assert msgspec.json.encode(ask) == b'{"skuName":"a"}'
        with pytest.raises(AttributeError):
            ask.sku_name = "b"  # type: ignore[misc]

    def test_fields_are_positional_and_messages_can_be_changed_unless_frozen(self) -> None:
        class Ask(Request[Price]):
            sku: str
            count: int = 1

        ask = Ask("a", 2)
        ask.count = 3

        assert ask == Ask("a", count=3)

    def test_unknown_fields_are_ignored_when_decoding(self) -> None:
        class Ask(Request[Price]):
            sku: str

        assert msgspec.json.decode(b'{"sku":"a","new":1}', type=Ask) == Ask("a")

    @pytest.mark.parametrize("value", [int, Price, Request, Command, Event, Request[Price], None, Price(1)])
    def test_what_is_no_message_class_has_no_options(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="is not a message class; derive one from"):
            options_of(value)


class TestWrongOptions:
    def test_a_typo_names_the_class_and_what_it_takes(self) -> None:
        with pytest.raises(ConfigurationError) as caught:

            class Debit(Command[None], partiton_by="account"):
                account: str

        text = str(caught.value)
        assert "class Debit: unknown option 'partiton_by' (no message has it)" in text
        assert "Command takes partition_by, type_name and the options of msgspec.Struct" in text

    @pytest.mark.parametrize(
        ("base", "option", "whose"),
        [
            (Request[None], {"durable": False}, "Event"),
            (Command[None], {"durable": False}, "Event"),
            (Command[None], {"idempotent": False}, "Request"),
            (Event, {"idempotent": False}, "Request"),
        ],
    )
    def test_the_option_of_another_kind_is_refused_with_its_name(
        self, base: Any, option: dict[str, Any], whose: str
    ) -> None:
        with pytest.raises(ConfigurationError, match=f"it is an option of {whose}"):
            types.new_class("Wrong", (base,), option)

    @pytest.mark.parametrize("value", ["", 3, None, b"x"])
    def test_a_type_name_must_be_a_name(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="class Wrong: type_name must be 1 to 1,024 characters, got"):
            types.new_class("Wrong", (Event,), {"type_name": value})

    @pytest.mark.parametrize(("base", "option"), [(Event, "durable"), (Request[None], "idempotent")])
    @pytest.mark.parametrize("value", [0, 1, None, "no"])
    def test_flags_must_be_true_or_false(self, base: Any, option: str, value: Any) -> None:
        with pytest.raises(ConfigurationError, match=f"class Wrong: {option} must be True or False, got {value!r}"):
            types.new_class("Wrong", (base,), {option: value})


class TestKeys:
    @pytest.mark.parametrize(
        "hint",
        [
            str,
            int,
            UUID,
            Colour,
            Level,
            bool,
            str | int,
            NewType("AccountId", str),
            Annotated[str, msgspec.Meta(min_length=1)],
        ],
    )
    def test_what_can_be_a_key(self, hint: Any) -> None:
        class Debit(Command[None], partition_by="key"):
            key: hint

        assert options_of(Debit).partition_by == "key"

    @pytest.mark.parametrize(
        "hint",
        [
            float,
            bytes,
            list[str],
            str | None,
            int | None,
            str | float,
            Any,
            Price,
            Literal["a"],
            T,
            NewType("N", float),
        ],
    )
    def test_what_cannot_be_a_key(self, hint: Any) -> None:
        with pytest.raises(ConfigurationError, match="a key must be str, int, UUID or Enum"):

            class Debit(Command[None], partition_by="key"):
                key: hint

    def test_the_key_must_be_a_field(self) -> None:
        with pytest.raises(ConfigurationError, match="partition_by='acount' is not a field; its fields are account, n"):

            class Debit(Command[None], partition_by="acount"):
                account: str
                n: int

    def test_a_class_without_fields_says_none(self) -> None:
        with pytest.raises(ConfigurationError, match="its fields are none"):

            class Debit(Command[None], partition_by="account"):
                pass

    @pytest.mark.parametrize("value", [3, None, ["account"]])
    def test_the_key_must_be_named_by_a_string(self, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="is not a field"):

            class Debit(Command[None], partition_by=value):
                account: str

    def test_an_inherited_field_may_be_the_key(self) -> None:
        class Base(Command[None]):
            account: str

        class Debit(Base, partition_by="account"):
            cents: int

        assert options_of(Debit).partition_by == "account"

    def test_a_key_whose_type_is_a_forward_reference_is_let_through(self) -> None:
        class Debit(Command[None], partition_by="key"):
            key: "NotYetDefined"  # type: ignore[name-defined]  # noqa: F821

        assert options_of(Debit).partition_by == "key"


class TestReplyType:
    def test_it_is_what_the_class_head_says(self) -> None:
        class Ask(Request[Price]):
            pass

        class Debit(Command[list[int] | None]):
            pass

        assert reply_type(Ask) is Price
        assert reply_type(Debit) == list[int] | None

    def test_none_stands_for_no_answer(self) -> None:
        class Ask(Request[None]):
            pass

        assert reply_type(Ask) is type(None)

    def test_it_is_inherited(self) -> None:
        class Base(Request[Price]):
            pass

        class Middle(Base, frozen=True):
            pass

        class Leaf(Middle, frozen=True):
            n: int

        assert reply_type(Leaf) is Price

    def test_type_variables_are_filled_through_generic_classes(self) -> None:
        class Page(Request[list[T]], Generic[T]):
            number: int

        class Pair(Page[tuple[T, U]], Generic[T, U]):
            pass

        class Orders(Page[Price]):
            pass

        class Both(Pair[int, str]):
            pass

        class Maybe(Request[T | None], Generic[T]):
            pass

        class Found(Maybe[Price]):
            pass

        assert reply_type(Orders) == list[Price]
        assert reply_type(Both) == list[tuple[int, str]]
        assert reply_type(Found) == Price | None

    def test_mixins_before_the_base_do_not_hide_it(self) -> None:
        class Traced(msgspec.Struct):
            note: str = ""

        class Ask(Traced, Request[Price]):
            pass

        assert reply_type(Ask) is Price

    def test_annotations_of_the_reply_are_kept(self) -> None:
        class Ask(Request[Annotated[int, msgspec.Meta(gt=0)]]):
            pass

        assert reply_type(Ask) == Annotated[int, msgspec.Meta(gt=0)]

    def test_forward_references_are_found_in_the_module_of_the_class(self) -> None:
        assert reply_type(Early) is Late
        assert reply_type(EarlyMany) == list[Late]
        assert reply_type(EarlyText) == dict[str, Late]

    def test_forward_references_are_found_where_they_were_written(self) -> None:
        module = types.ModuleType("elsewhere_for_test")
        sys.modules[module.__name__] = module
        try:
            exec(
                "from catga_bus.messages import Request\nclass Base(Request['Hidden']): pass\nclass Hidden: pass\n",
                vars(module),
            )

            class Leaf(module.Base):  # type: ignore[misc, name-defined]
                pass

            assert reply_type(Leaf) is module.Hidden
        finally:
            del sys.modules[module.__name__]

    @pytest.mark.parametrize("reference", ["Nowhere", "nowhere.Price", "int.price"])
    def test_a_reference_to_nothing_is_named(self, reference: str) -> None:
        class Ask(Request[reference]):  # type: ignore[valid-type]
            pass

        with pytest.raises(ConfigurationError, match=f"class Ask: its reply type .*{reference}.* cannot be found"):
            reply_type(Ask)

    def test_a_class_that_does_not_say_is_refused(self) -> None:
        class Ask(Request):  # type: ignore[type-arg]
            pass

        class Page(Command[T], Generic[T]):
            pass

        with pytest.raises(ConfigurationError, match=r"class Ask does not say .* write Request\[Reply\]"):
            reply_type(Ask)
        with pytest.raises(ConfigurationError, match=r"class Page does not say .* write Command\[Reply\]"):
            reply_type(Page)

    def test_events_have_none(self) -> None:
        class Ticked(Event):
            pass

        with pytest.raises(ConfigurationError, match="class Ticked is an event, and nobody answers events"):
            reply_type(Ticked)

    def test_the_bases_have_none(self) -> None:
        with pytest.raises(ConfigurationError, match="is not a message class"):
            reply_type(Request)


class Early(Request["Late"]):
    pass


class EarlyMany(Request[list["Late"]]):
    pass


class EarlyText(Command["dict[str, Late]"]):
    pass


class Late(msgspec.Struct):
    n: int


class TestGenericMessages:
    def test_fields_of_generic_classes_are_typed_in_their_leaves(self) -> None:
        class Save(Request[T], Generic[T]):
            item: T

        class SavePrice(Save[Price]):
            pass

        assert reply_type(SavePrice) is Price
        assert msgspec.json.decode(b'{"item":{"cents":3}}', type=Save[Price]) == Save(Price(3))
        assert options_of(SavePrice).type_name == "SavePrice"

    def test_a_parametrised_alias_is_no_message_class(self) -> None:
        class Save(Request[T], Generic[T]):
            item: T

        with pytest.raises(ConfigurationError, match="is not a message class"):
            options_of(Save[Price])
