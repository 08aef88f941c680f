"""From a constraint to what llguidance compiles, and the refusal of one that cannot be.

Called on both sides: by the trial and by the engine's compiler, which must agree.
"""

import json
from typing import Any

from moe_server.errors import MoeServerError
from moe_server.messages import Constraint, ConstraintKind

WHITESPACE = r" |\r?\n[ \t]{0,20}"
"""Between the tokens of a JSON document. A model that likes blanks would never end without it."""

_OPTIONS = '\n%llguidance {"no_forcing": true}'
"""Text that the grammar forces is tokenised as the model likes it. llguidance would force its own
reading of it, for which it would need the tokenizer. Last, so that error messages count lines as
the user does."""


def to_grammar(constraint: Constraint) -> str:
    """The constraint in llguidance's own form.

    Raises:
        MoeServerError: A JSON schema that is not JSON; a regular expression that is cut short.
    """
    from llguidance import regex_to_lark  # noqa: PLC0415 - only where constraints are used

    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            schema = {"name": "schema", "json_schema": _parse_schema(constraint.texts[0])}
            return json.dumps({"grammars": [{"lark_grammar": "start: @schema" + _OPTIONS}, schema]})
        case ConstraintKind.REGEX:
            regex = constraint.texts[0]
            if (len(regex) - len(regex.rstrip("\\"))) % 2:
                raise refusal(constraint, "it ends with a backslash that escapes nothing")
            lark = f"start: /{regex_to_lark(regex, use_ascii='')}/"
        case ConstraintKind.CHOICES:
            choices = " | ".join(json.dumps(text) for text in constraint.texts)
            lark = f"start: CHOICE\nCHOICE: {choices}"
        case ConstraintKind.GRAMMAR:
            lark = constraint.texts[0]
    return json.dumps({"grammars": [{"lark_grammar": lark + _OPTIONS}]})


def refusal(constraint: Constraint, problem: str) -> MoeServerError:
    """What the caller of a constraint that cannot be used is told."""
    field = constraint.kind.value
    name = {"json_schema": "JSON schema", "regex": "regular expression"}.get(field, field)
    return MoeServerError(f"The {name} cannot be used: {problem.rstrip('.')}.", field=field)


def _refuse_constant(name: str) -> None:
    """Python's reader takes NaN, Infinity and -Infinity for numbers."""
    raise ValueError(f"{name} is no number of it")


def _parse_schema(text: str) -> Any:
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else f"no JSON: {error}"
        raise refusal(Constraint(ConstraintKind.JSON_SCHEMA, (text,)), problem) from None
    if isinstance(schema, dict):
        options = schema.setdefault("x-guidance", {})
        if isinstance(options, dict) and not any(key.startswith("whitespace") for key in options):
            options["whitespace_pattern"] = WHITESPACE
    return schema
