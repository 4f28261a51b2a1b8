"""Answers that call, as a grammar: the released format of tool calls, and arguments of a JSON schema.

    grammar = call_grammar(tools, tokenizer)
    reply = engine.chat("Who is Emma?", tools=tools, grammar=grammar)

The format (`v4jax/text/parse.py` reads it) has a tag for each argument. A text is written as it is, with
`string="true"`, as models learned it; other values are JSON. What a schema says of a text beyond its length
or a list of texts is not looked at in raw text: such a text is written as JSON too, which the format allows
and llguidance checks.

Arguments come in the order of the schema's properties. Nothing else is written beside them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from v4jax.inference.grammar import SPACE, Grammar, GrammarError
from v4jax.text.format import CALLS_START, DSML, EOS, SPECIAL_TOKENS, shown
from v4jax.text.tokenizer import Tokenizer

_NOTES = {"title", "description", "default", "examples", "deprecated", "$comment"}
_OF_ARGUMENTS = {"type", "properties", "required", "additionalProperties"} | {
    *("$defs", "definitions", "$schema", "$id", *_NOTES)
}
_LARGEST = 1_000_000  # characters of a text whose length a schema bounds
# A text that is written as it is has no token of the format in it, not even spelled out.
_PLAIN = f"& ~/(?s:.*)({DSML}|{EOS})(?s:.*)/"
_NAME = r"/[^\"<>\n｜]{1,64}/"  # of an argument that no schema names


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    is_required: bool = True,
    is_parallel: bool = True,
) -> Grammar:
    """What an answer may be that has tools.

    Args:
      tools: as `Tokenizer.render` takes them.
      tokenizer: of the answers, whose tokens the grammar names.
      name: of the function that is called, once; None: any of them.
      is_required: whether the answer is calls alone. Otherwise it is any text, with calls behind it if
        the model likes, and only those of functions with `strict` are bound to their schema.
      is_parallel: whether there may be more than one call.

    Raises:
      GrammarError: no such function, or a schema that cannot be followed, and why.
    """
    functions = [_function(tool) for tool in tools]
    if name is not None:
        names = [function["name"] for function in functions]
        functions = [function for function in functions if function["name"] == name]
        if not functions:
            raise GrammarError(f"{shown(name)} is no tool: expected one of {', '.join(names)}.")
    if not functions:
        raise GrammarError("there are no tools: expected a function to call.")
    return _Writer(tokenizer).grammar(functions, is_required, is_parallel and name is None)


def is_strict(tool: Any) -> bool:
    """Whether a tool asks for arguments that follow its schema."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and function.get("strict") is True


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise GrammarError(f"Tool {shown(tool)}: expected a function with a name.")
    _check_name(name, "a function")
    return function


def _check_name(name: str, what: str) -> None:
    if not name or '"' in name or any(token in name for token in SPECIAL_TOKENS):
        raise GrammarError(
            f"{shown(name)} is the name of {what}: expected one without quotation marks and special "
            "tokens, which a tag of a call could not have."
        )


class _Writer:
    """Writes one grammar, in llguidance's dialect of Lark.

    Args:
      tokenizer: see `call_grammar`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._mark = f"<[{tokenizer.id(DSML)}]>"  # the token in tags
        self._names: dict[str, str] = {}  # of rules, by what they are

    def grammar(
        self, functions: Sequence[Mapping[str, Any]], is_required: bool, is_parallel: bool
    ) -> Grammar:
        """Of an answer that calls some of these functions, or may."""
        calls = []
        for function in functions:
            is_bound = is_required or function.get("strict") is True
            arguments = self._arguments(function) if is_bound else self._any_arguments(None, {})
            head, tail = f'invoke name="{function["name"]}">\n', "invoke>\n"
            calls.append(self._rule(f"{self._open(head)} {arguments} {self._close(tail)}"))
        many = "+" if is_parallel else ""
        before, rest = CALLS_START.split(DSML)
        begin = _quoted(before)
        start = ""
        if not is_required:
            begin = self._terminal(f"/(?s:.*){_escaped(before)}/ {_PLAIN}")
            start = self._terminal(f"/(?s:.*)/ {_PLAIN}") + " | "
        block = f"{begin} {self._mark} {_quoted(rest + '>' + chr(10))} ({' | '.join(calls)}){many}"
        start += f"{block} {self._close('tool_calls>')}"
        rules = [f"{name}: {body}" for body, name in self._names.items()]
        return Grammar.lark("\n".join([f"start: {start}", *rules]))

    def _arguments(self, function: Mapping[str, Any]) -> str:
        """What is between the tags of a call."""
        name, schema = function["name"], function.get("parameters")
        if schema is None:
            return _quoted("\n")
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            raise GrammarError(
                f"parameters of {shown(name)} are {shown(schema)}: expected the schema of an object."
            )
        if others := sorted(set(schema) - _OF_ARGUMENTS):
            raise GrammarError(
                f"parameters of {shown(name)} have {', '.join(map(shown, others))}: of an object, "
                "properties, required and additionalProperties can be followed."
            )
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        are_texts = isinstance(required, list) and all(isinstance(key, str) for key in required)
        if not isinstance(properties, Mapping) or not are_texts:
            raise GrammarError(
                f"parameters of {shown(name)}: expected properties as an object, and required as a "
                "list of texts."
            )
        if missing := [key for key in required if key not in properties]:
            raise GrammarError(
                f"parameters of {shown(name)} require {shown(missing[0])}: expected it in properties."
            )
        _check_references(schema, name)
        if "properties" not in schema and schema.get("additionalProperties") is not False:
            return self._any_arguments(schema.get("additionalProperties"), schema)
        rules = []
        for key, value in properties.items():
            _check_name(key, f"an argument of {shown(name)}")
            try:
                written = self._value(value, schema)
            except GrammarError as error:
                raise GrammarError(f"argument {shown(key)} of {shown(name)}: {error}") from None
            head = self._open(f'parameter name="{key}" string="')
            rules.append((self._rule(f"{head} {written} {self._mark_end()}"), key in required))
        return _in_order(rules)

    def _any_arguments(self, values: Any, root: Mapping[str, Any]) -> str:
        """Arguments of any name."""
        written = self._value({} if values is None or values is True else values, root)
        head, name = self._open('parameter name="'), self._terminal(_NAME)
        quote = _quoted('" string="')
        one = self._rule(f"{head} {name} {quote} {written} {self._mark_end()}")
        return f"({_quoted(chr(10))} | {one}+)"

    def _value(self, schema: Any, root: Mapping[str, Any]) -> str:
        """A value with the rest of its opening tag, up to the "</" of the closing one."""
        texts, others = _split(schema, root)
        ways = [f"{_quoted('true' + chr(34) + '>')} {self._text(text)}" for text in texts]
        if others:
            value = others[0] if len(others) == 1 else {"anyOf": others}
            value = {**value, "x-guidance": {"whitespace_pattern": SPACE}}
            if "$ref" in json.dumps(value):
                value |= {key: root[key] for key in ("$defs", "definitions") if key in root}
            Grammar.json_schema(value)  # which says what is wrong with it alone
            rule = self._rule(f"%json {json.dumps(value)}")
            ways.append(f"{_quoted('false' + chr(34) + '>')} {rule} {_quoted('</')}")
        return self._rule(" | ".join(ways))

    def _text(self, schema: Mapping[str, Any]) -> str:
        """A text as it is, with "</" behind it."""
        if "enum" in schema:
            return f"({' | '.join(_quoted(text + '</') for text in schema['enum'])})"
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        bounds = f"{{{low},{'' if high is None else high}}}" if low or high is not None else "*"
        return self._terminal(rf"/(?s:.){bounds}<\// {_PLAIN}")

    def _open(self, tag: str) -> str:
        return f'"<" {self._mark} {_quoted(tag)}'

    def _close(self, tag: str) -> str:
        return f'"</" {self._mark} {_quoted(tag)}'

    def _mark_end(self) -> str:
        """The closing tag of an argument, behind its "</"."""
        return f"{self._mark} {_quoted('parameter>' + chr(10))}"

    def _rule(self, body: str) -> str:
        return self._names.setdefault(body, f"r{len(self._names)}")

    def _terminal(self, body: str) -> str:
        return self._names.setdefault(body, f"T{len(self._names)}")


def _in_order(rules: Sequence[tuple[str, bool]]) -> str:
    """Arguments one after another, those that are not required or not; an empty line for none."""
    if any(is_required for _, is_required in rules):
        return " ".join(name if is_required else f"{name}?" for name, is_required in rules)
    names = [name for name, _ in rules]
    ways = [
        " ".join([name, *(f"{other}?" for other in names[n + 1 :])]) for n, name in enumerate(names)
    ]
    return f"({' | '.join([_quoted(chr(10)), *ways])})"


def _split(
    schema: Any, root: Mapping[str, Any], seen: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(texts that are written as they are, other values) that a schema allows."""
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{shown(schema)}: expected a JSON schema.")
    keys = set(schema) - _NOTES
    reference = schema.get("$ref")
    if keys == {"$ref"} and isinstance(reference, str) and reference not in seen:
        found: Any = root
        for step in reference.removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, Mapping) else None
        if found is None:
            raise GrammarError(f"$ref {shown(reference)}: there is no such schema.")
        return _split(found, root, [*seen, reference])
    branches = schema.get("anyOf")
    if keys == {"anyOf"} and isinstance(branches, list) and branches:
        parts = [_split(branch, root, seen) for branch in branches]
        return _joined(text for text, _ in parts), _joined(other for _, other in parts)
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else None
    if not keys:
        return [{}], [{}]
    values = [schema["const"]] if "const" in keys else schema.get("enum")
    if keys <= {"type", "enum", "const"} and isinstance(values, list):
        texts = [text for text in values if isinstance(text, str)]
        is_plain = not any(token in text for text in texts for token in (DSML, EOS))
        if texts and is_plain and (kinds is None or "string" in kinds):
            rest = {"enum": [value for value in values if not isinstance(value, str)]}
            if kinds is not None:
                rest["type"] = [kind for kind in kinds if kind != "string"]
            return [{"enum": texts}], [rest] if all(rest.values()) else []
    elif kinds and "string" in kinds and keys <= {"type", "minLength", "maxLength"}:
        bounds = {key: schema[key] for key in ("minLength", "maxLength") if key in keys}
        low, high = bounds.get("minLength", 0), bounds.get("maxLength", _LARGEST)
        if isinstance(low, int) and isinstance(high, int) and 0 <= low <= high <= _LARGEST:
            rest_kinds = [kind for kind in kinds if kind != "string"]
            return [bounds], [{"type": rest_kinds}] if rest_kinds else []
    return [], [dict(schema)]


def _check_references(schema: Any, name: str) -> None:
    """Values are schemas of their own, beside the definitions: nothing else can be referred to."""
    reference = schema.get("$ref", "#/$defs/") if isinstance(schema, Mapping) else "#/$defs/"
    if isinstance(reference, str) and not reference.startswith(("#/$defs/", "#/definitions/")):
        raise GrammarError(
            f"parameters of {shown(name)} have $ref {shown(reference)}: expected one to #/$defs."
        )
    for value in schema.values() if isinstance(schema, Mapping) else schema:
        if isinstance(value, Mapping | list):
            _check_references(value, name)


def _joined(lists: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [one for some in lists for one in some]


def _quoted(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text in a regular expression of Lark."""
    return text.replace("\n", r"\n")
