import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaskapp.strict_json import MAX_DEPTH, MOST_STRUCTURE, StrictJsonError, dumps, loads, refuse_much_structure

BAD = {
    "syntax": "{",
    "empty": "",
    "trailing": "{} x",
    "duplicate": '{"a": 1, "b": 2, "a": 3}',
    "duplicate below": '[{"a": {"b": 1, "b": 1}}]',
    "NaN": '{"a": NaN}',
    "Infinity": "[-Infinity]",
    "latin-1": b'{"a": "\xe4"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "half a pair": r'{"a": ["\ud800"]}',
    "half a pair in a key": r'{"\udc00": 1}',
    "control character": '"\x00"',
    "depth": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "depth 100,000": "[" * 100_000,
    "depth 100,000, closed": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "exponent beyond decimals": "1e99999999999999999999",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_not_strict_is_refused_in_one_line(text):
    with pytest.raises(StrictJsonError) as caught:
        loads(text)
    assert "\n" not in str(caught.value)


def test_numbers_are_exact_and_never_floats():
    assert loads("[0.1, 1e2, 7, -0, 0.000000001]") == [Decimal("0.1"), Decimal("1e2"), 7, 0, Decimal("0.000000001")]
    assert loads("9" * 4_301) == Decimal("9" * 4_301)
    assert isinstance(loads("7"), int)
    assert isinstance(loads("7.0"), Decimal)


def test_a_pair_of_surrogates_is_one_character():
    assert loads(r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


def test_numbers_are_written_out():
    assert dumps({"a": Decimal("1E-9"), "b": [True, None, "ä"]}) == '{"a": 0.000000001, "b": [true, null, "\\u00e4"]}'
    assert dumps(Decimal("1E+999999")) == "1E+999999"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_what_is_written_reads_back_the_same(value):
    assert loads(dumps(value)) == value


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_bytes_are_read_or_refused(text):
    try:
        loads(text)
    except StrictJsonError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most texts are no JSON, some are)


# --- the scan before anything is parsed


def is_too_much(text):
    try:
        refuse_much_structure(text.encode())
    except StrictJsonError:
        return True
    return False


def structure(text):
    """By a reader that goes through it letter by letter."""
    count, is_inside, is_escaped = 0, False, False
    for letter in text:
        if is_inside:
            is_inside = is_escaped or letter != '"'
            is_escaped = letter == "\\" and not is_escaped
        else:
            is_inside = letter == '"'
            count += letter in "{[:,"
    return count


FULL = MOST_STRUCTURE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[" + "1," * (FULL - 1) + "1]", False),
        ("[" + "1," * FULL + "1]", True),
        ("[" * FULL, False),
        ("[" * (FULL + 1), True),
        ('{"a":' * (FULL // 2 + 1), True),
        ('"' + ",:[{" * FULL + '"', False),
        ('"' + '\\",' * FULL + '"', False),
        ('["\\\\"' + "," * FULL, True),
        ('["\\\\\\"' + "," * FULL, False),
        ("[" + '",",' * (FULL - 1) + "1]", False),
        ('"' * 3 * FULL + "," * (FULL + 1), True),
        ('["' + "," * FULL + '","' + "," * FULL + '"]', False),
        ("[" + '"\\u005b",' * FULL + "1]", True),
        ("[" + '"",' * (FULL - 1) + "1]", False),
    ],
)
def test_only_what_stands_outside_of_texts_counts(text, expected):
    assert is_too_much(text) is expected


@given(st.lists(st.sampled_from(['"', "\\", ",", "a", "[", '\\"', "\\\\", '","']), max_size=60).map("".join))
def test_the_scan_finds_what_a_reader_finds(text):
    value = json.dumps(text)
    padding = "," * (FULL - 3)
    for whole in (f"[{value}{padding}", f"[{value},{value}{padding}", f"[{value},[{value},{value}{padding}"):
        assert is_too_much(whole) is (structure(whole) > FULL)


@pytest.mark.parametrize(
    "text", [rb'"\ud800"', rb'{"a": "\uDFFF"}', b"[" * 65 + b"]" * 65, b'{"a":' * 65 + b"1" + b"}" * 65]
)
def test_bytes_are_looked_through_as_texts_are(text):
    for each in (text, text.decode()):
        with pytest.raises(StrictJsonError):
            loads(each)


def test_a_long_number_beside_a_short_one_is_no_enormous_int():
    assert loads(b"[1, 123456789012345678, 1234567890123456789]") == [
        1,
        123456789012345678,
        Decimal(1234567890123456789),
    ]
    assert [type(number) for number in loads(b"[12, 1234567890123456789]")] == [int, Decimal]
