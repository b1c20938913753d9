"""The bound of a whole input is above what any upstream could count, as far as that is known."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rs_bpe.bpe import openai as vocabularies

from backends.pricing.prompt_bounds import ImagesNotBounded, image_tokens, prompt_tokens
from backends.pricing.token_bounds import InputTooLong
from tests.upstream import count_input_tokens

COUNT = vocabularies.o200k_base().count
PLENTY = 10**6
HI = [{"role": "user", "content": "Hi"}]

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
word = st.text("abcxyz_é漢😀", min_size=1, max_size=12)
leaf = st.sampled_from([{}, {"type": "string"}, {"type": "integer", "enum": [1, 2]}, {"type": "boolean"}])
schemas = st.recursive(
    leaf | st.fixed_dictionaries({"type": st.just("string"), "description": text}),
    lambda inner: (
        st.fixed_dictionaries({"type": st.just("array"), "items": inner})
        | st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(word, inner, max_size=4)})
    ),
    max_leaves=12,
)
objects = st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(word, schemas, max_size=4)})
functions = st.fixed_dictionaries({"name": word, "parameters": objects}, optional={"description": text})
tools = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=4)
parts = st.fixed_dictionaries({"type": st.just("text"), "text": text}) | st.fixed_dictionaries(
    {
        "type": st.just("image_url"),
        "image_url": st.fixed_dictionaries({"url": st.just("https://a")}, optional={"detail": st.just("low")}),
    }
)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.just("call_1"),
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": word, "arguments": text}),
        }
    ),
    max_size=3,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": text | st.lists(parts, max_size=3)})
    | st.fixed_dictionaries({"role": st.just("assistant"), "content": st.none(), "tool_calls": calls}),
    min_size=1,
    max_size=6,
)


def as_typescript(tool):
    """A function as OpenAI's models are known to be shown it: a type in a namespace, with comments."""
    function = tool["function"]
    lines = comments(function)
    return "\n".join([*lines, f"type {function['name']} = (_: {shape(function['parameters'], 0)}) => any;"])


def comments(node):
    return [f"// {line}" for line in node.get("description", "").splitlines()]


def shape(node, depth):
    if node.get("type") == "object":
        pad = "  " * depth
        fields = [
            "\n".join([*(pad + line for line in comments(inner)), f"{pad}{name}?: {shape(inner, depth + 1)},"])
            for name, inner in node["properties"].items()
        ]
        return "\n".join(["{", *fields, pad + "}"])
    if node.get("type") == "array":
        return f"{shape(node['items'], depth)}[]"
    if "enum" in node:
        return " | ".join(map(json.dumps, node["enum"]))
    return {"integer": "number", "string": "string", "boolean": "boolean"}.get(node.get("type"), "any")


@settings(max_examples=150, deadline=None)
@given(messages, tools)
def test_it_is_above_what_an_upstream_counts(said, offered):
    bound = prompt_tokens("gpt-4o", said, {"tools": offered}, PLENTY)
    request = {"messages": said, **({"tools": offered} if offered else {})}
    assert bound >= count_input_tokens(request)
    # A stranger's tokenizer may make a token of every byte.
    if all(isinstance(message["content"], str) for message in said):
        assert prompt_tokens("stranger", said, {}, PLENTY) >= sum(
            len(message["content"].encode()) + 3 for message in said
        )


@settings(max_examples=150, deadline=None)
@given(tools)
def test_tools_are_bounded_in_the_form_in_which_models_see_them(offered):
    bare = prompt_tokens("gpt-4o", HI, {}, PLENTY)
    with_tools = prompt_tokens("gpt-4o", HI, {"tools": offered}, PLENTY)
    seen = "# Tools\n\n## functions\n\nnamespace functions {\n\n" + "\n\n".join(map(as_typescript, offered))
    assert with_tools - bare >= (COUNT(seen + "\n\n} // namespace functions") if offered else 0)
    # Templates of other models print the tools with line breaks, after instructions of their own.
    bare, with_tools = (prompt_tokens("stranger", HI, {"tools": each}, PLENTY) for each in ([], offered))
    assert with_tools - bare >= sum(len(json.dumps(tool, indent=4, ensure_ascii=False).encode()) for tool in offered)


@pytest.mark.parametrize(
    "options",
    [
        {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 999}}]},
        {"functions": [{"name": "a", "description": "x" * 999}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "x" * 999}}}},
        {"tool_choice": {"type": "function", "function": {"name": "x" * 999}}},
        {"tools": [{"type": "custom", "custom": {"name": "a", "format": {"definition": "x" * 999}}}]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_the_model_reads_counts(options):
    assert prompt_tokens("gpt-4o", HI, options, PLENTY) >= prompt_tokens("gpt-4o", HI, {}, PLENTY) + 999
    with pytest.raises(InputTooLong):
        prompt_tokens("gpt-4o", HI, options, 999)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "x", "name": "字" * 200},
        {"role": "assistant", "refusal": "字" * 200},
        {"role": "assistant", "reasoning_content": "字" * 200},
        {"role": "tool", "content": "x", "tool_call_id": "字" * 200},
        {"role": "assistant", "function_call": {"name": "a", "arguments": "字" * 200}},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "a", "input": "字" * 200}}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "字" * 200}]},
        {"role": "assistant", "content": "x", "annotations": [{"title": "字" * 200}]},
        {"role": "assistant", "content": "x", "reasoning_details": [{"text": "字" * 200}]},
        {"role": "assistant", "content": "x", "字" * 200: None},
        {"role": "assistant", "content": "x", "reasoning_content": ["字" * 200]},
        {"role": "user", "content": [{"type": "text", "text": "x", "own": {"字" * 200: 1}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "字" * 200}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a"}, "own": {"字" * 200: 1}}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "字" * 200: 1}}]},
        {"role": "assistant", "function_call": {"name": "a", "字" * 200: 1}},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://a", "own": "字" * 200}}]},
    ],
    ids=lambda message: list(message)[-1],
)
def test_every_text_of_a_message_counts(message):
    assert prompt_tokens("gpt-4o", [message], {}, PLENTY) >= COUNT("字" * 200)


@pytest.mark.parametrize("value", [12345678901234567890, [1.5] * 9, {"a": {"b": None}}, True], ids=str)
def test_what_is_not_known_counts_as_many_tokens_as_its_json_has_bytes(value):
    bare, more = ({"role": "assistant", "content": "x", **own} for own in ({}, {"own": value}))
    for model in ("gpt-4o", "stranger"):
        tokens = prompt_tokens(model, [more], {}, PLENTY) - prompt_tokens(model, [bare], {}, PLENTY)
        assert tokens >= len(json.dumps({"own": value}))


def test_words_that_steer_have_an_allowance():
    bare = prompt_tokens("gpt-4o", HI, {"tool_choice": "auto", "temperature": 1, "stop": ["x" * 99]}, PLENTY)
    assert bare == prompt_tokens("gpt-4o", HI, {}, PLENTY)
    assert prompt_tokens("gpt-4o", HI, {"reasoning_effort": "low", "verbosity": "low"}, PLENTY) == bare + 64


# --- schemas that point


def schema_tokens(schema, most=PLENTY):
    options = {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
    return prompt_tokens("gpt-4o", HI, options, most)


def test_what_is_pointed_to_counts_as_often_as_it_is_pointed_to():
    target = {"description": "x" * 500}
    once, thrice = (
        schema_tokens({"$defs": {"a": target}, "items": [{"$ref": "#/$defs/a"}] * times}) for times in (1, 3)
    )
    assert once > 1_000
    assert thrice - once > 2 * 500


def test_a_short_schema_that_would_be_enormous_written_out_is_too_long():
    levels = {f"a{level}": {"items": [{"$ref": f"#/$defs/a{level + 1}"}] * 2} for level in range(60)}
    schema = {"$defs": levels | {"a60": {}}, "$ref": "#/$defs/a0"}
    assert len(json.dumps(schema)) < 6_000
    with pytest.raises(InputTooLong):
        schema_tokens(schema)


@pytest.mark.parametrize(
    "pointer", ["#", "#/$defs/a", "#/nothing/here", "https://elsewhere/a", "", "#/$defs/a/items/0"]
)
def test_a_pointer_that_leads_back_or_nowhere_ends(pointer):
    schema = {"$defs": {"a": {"items": [{"$ref": pointer}]}}, "$ref": "#/$defs/a"}
    assert schema_tokens(schema) < 1_000


def test_a_chain_of_pointers_may_be_longer_than_the_stack():
    links = {f"a{link}": {"$ref": f"#/a{link + 1}"} for link in range(1_100)}
    schema = {**links, "$ref": "#/a0"}
    with pytest.raises(InputTooLong):
        schema_tokens(schema, most=128_000)
    # Each link is the beginning of a chain of its own.
    chains = sum(number * len('{"$ref": "#/a1"}') for number in range(1_100))
    assert schema_tokens(schema, most=10**8) > chains


def test_what_is_in_a_circle_counts_wherever_one_comes_into_it():
    text = "x" * 1_000
    circle = {
        "a": {"description": text, "next": {"$ref": "#/$defs/b"}},
        "b": {"description": text, "next": {"$ref": "#/$defs/a"}},
    }
    bare, at_a, at_both = (
        schema_tokens({"$defs": circle, "items": [{"$ref": f"#/$defs/{name}"} for name in names]})
        for names in ("", "a", "ab")
    )
    assert at_a - bare > 2 * 1_000
    assert at_both - bare > 4 * 1_000


def test_a_schema_whose_parts_all_point_to_each_other_is_too_long():
    names = [f"a{number}" for number in range(12)]
    schema = {"$defs": {name: {"anyOf": [{"$ref": f"#/$defs/{each}"} for each in names]} for name in names}}
    with pytest.raises(InputTooLong):
        schema_tokens({**schema, "$ref": "#/$defs/a0"}, most=400_000)


@pytest.mark.parametrize("pointer", ["#/$defs/0", "#/x~1y/z", "#/x%2Fy/z", "#/~0/0/z"])
def test_every_spelling_of_a_pointer_is_followed(pointer):
    big = {"z": "x" * 1_000}
    schema = {"$defs": [big], "x/y": big, "~": [big]}
    assert schema_tokens({**schema, "$ref": pointer}) - schema_tokens(schema) > 1_000


BIG = {"description": "x" * 1_000}


@pytest.mark.parametrize(
    ("target", "pointer"),
    [
        ({"$id": "https://guard.example/big.json", **BIG}, {"$ref": "https://guard.example/big.json"}),
        ({"$id": "https://guard.example/big.json#", **BIG}, {"$ref": "big.json"}),
        ({"$id": "big", **BIG}, {"$ref": "big"}),
        ({"$id": "/a/big", **BIG}, {"$ref": "https://guard.example/a/big#"}),
        ({"$id": "urn:uuid:0-1-2", **BIG}, {"$ref": "urn:uuid:0-1-2"}),
        ({"id": "big", **BIG}, {"$ref": "big"}),
        ({"$id": "#big", **BIG}, {"$ref": "#big"}),
        ({"$anchor": "big", **BIG}, {"$ref": "#big"}),
        ({"$anchor": "big", **BIG}, {"$ref": "#%62ig"}),
        ({"$id": "a", "$anchor": "big", **BIG}, {"$ref": "a#big"}),
        ({"$dynamicAnchor": "big", **BIG}, {"$dynamicRef": "#big"}),
        ({"$dynamicAnchor": "big", **BIG}, {"$ref": "#big"}),
        ({"$anchor": "big", **BIG}, {"$dynamicRef": "#big"}),
        ({"$id": "a", "$defs": {"big": BIG}}, {"$ref": "a#/$defs/big"}),
        ({"$id": "a", "$defs": {"big": BIG}}, {"$ref": "#/$defs/big"}),
    ],
)
def test_whatever_a_pointer_may_stand_for_counts(target, pointer):
    """By an address, an anchor, or a path that begins where an `$id` has changed the base."""
    schema = {"$defs": {"target": target}}
    assert schema_tokens({**schema, "items": pointer}) - schema_tokens(schema) > 1_000


def test_the_whole_schema_is_pointed_to_by_a_recursive_pointer():
    assert schema_tokens({**BIG, "items": {"$recursiveRef": "#"}}) - schema_tokens(BIG) > 1_000


def test_a_pointer_by_address_counts_each_time_and_ends_in_a_circle():
    once, thrice = (
        schema_tokens({"$defs": {"a": {"$id": "a", **BIG}}, "items": [{"$ref": "a"}] * times}) for times in (1, 3)
    )
    assert thrice - once > 2 * 1_000
    assert schema_tokens({"$id": "a", "items": [{"$ref": "a"}, {"$dynamicRef": "#a"}]}) < 1_000


def test_very_many_names_are_read_in_little_time_and_count_more_than_they_are():
    names = {f"a{number}": {"$id": f"b{number}", "a": {"$ref": f"#/a/{number}"}} for number in range(3_000)}
    with pytest.raises(InputTooLong):
        schema_tokens({"$defs": names}, most=300_000)


def test_what_normalisation_lengthens_in_a_definition_counts_as_its_longest_form():
    tool = {"type": "function", "function": {"name": "a", "description": "\ufdfa" * 100}}
    assert prompt_tokens("llama-3.1-8b", HI, {"tools": [tool]}, PLENTY) > 100 * 33


# --- images


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [
        ("gpt-4o", 85, 1_445),
        ("openai/gpt-4o-2024-11-20", 85, 1_445),
        ("gpt-4.1", 85, 1_445),
        ("gpt-4o-mini", 2_833, 48_169),
        ("gpt-4.1-mini", 2_489, 2_489),
        ("gpt-5-nano-2025-08-07", 3_779, 3_779),
        ("gpt-5", 70, 1_190),
        ("o3", 75, 1_275),
        ("o4-mini", 2_642, 2_642),
    ],
)
def test_an_image_counts_as_the_most_that_is_documented(model, low, high):
    assert image_tokens(model, "low") == low + 16
    assert {image_tokens(model, detail) for detail in ("high", "auto", None)} == {high + 16}


@pytest.mark.parametrize("model", ["gpt-5.2", "gpt-4o-audio-preview", "claude-sonnet-4", "llava", "gpt-4", "o3-mini"])
def test_without_a_documented_maximum_there_is_no_bound(model):
    with pytest.raises(ImagesNotBounded):
        image_tokens(model, "low")
