"""What an answer must look like: the forms a request may ask for, checked before a stream begins.

A constraint is data: it goes from the surface to the rank that samples, and is turned there into
masks over the vocabulary (``compute/grammar.py``). What cannot be enforced is refused here, by
name, and never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from models.errors import BadConstraint
from models.json_schema import compiled_schema, parse_schema

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

Kind = Literal["json_object", "json_schema", "regex", "lark", "choice"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)

MAX_TEXT_BYTES: Final = 256 * 1024
MAX_CHOICES: Final = 5_000
# What compiling, one mask and the lexer's tables may take; beyond it a grammar is an error.
LIMITS: Final[dict[str, Any]] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
}
# Options of a rule that change nothing but what the text may be.
_RULE_OPTIONS = frozenset({"lazy", "suffix"})
_RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][\w-]*[ \t]*\[([^\]\n]*)\][ \t]*:", re.MULTILINE)
_INLINE_SCHEMA = re.compile(r"%json\s*(?=\{)")
_NO_TOKENIZER = "no tokenizer"


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form of one answer, all of it from the first token to the last.

    Attributes:
        kind: ``json_object`` any JSON object; ``json_schema`` JSON that ``text``, a schema of
            draft 2020-12, accepts; ``regex`` a text that matches ``text`` as a whole (Rust's
            syntax, no look-around); ``lark`` a grammar in llguidance's form of Lark, its rule
            ``start``; ``choice`` one of the texts in the JSON list ``text``.
        text: "" for ``json_object``.
        before: Lark rules of what comes before it, the first of them ``before``; "" for nothing.
            Made by ``models.tool_grammar.after_thinking``.
    """

    kind: Kind
    text: str = ""
    before: str = ""


def choice(texts: Sequence[str]) -> Constraint:
    """An answer that is one of these texts."""
    return Constraint("choice", json.dumps(list(texts), ensure_ascii=False))


def check(constraint: Constraint) -> None:
    """See that a constraint can be enforced; to be called before an answer begins.

    Takes 1 ms for a common schema and up to some 0.2 s for one of 256 KiB: from an event loop,
    call it through ``asyncio.to_thread``. What was found sound is remembered.

    Raises:
        BadConstraint: it is no constraint, or says something that no mask can enforce; the text
            names the keyword and where it stands. Belongs to its sender (HTTP 400).
    """
    source(constraint)


@lru_cache(maxsize=64)
def source(constraint: Constraint) -> str:
    """The grammar in llguidance's own form, checked. Raises BadConstraint."""
    kind, text = constraint.kind, constraint.text
    if kind not in KINDS:
        raise BadConstraint(kind, f"none of {', '.join(KINDS)}")
    size = len(text.encode("utf-8", "replace")) + len(constraint.before)
    if size > MAX_TEXT_BYTES:
        raise BadConstraint(kind, f"{size} bytes; at most {MAX_TEXT_BYTES} are taken")
    found: dict[str, Any]
    match kind:
        case "json_object":
            if text:
                raise BadConstraint(kind, "takes no text")
            found = {"json_schema": compiled_schema({"type": "object"})}
        case "json_schema":
            found = {"json_schema": compiled_schema(parse_schema(text))}
        case "regex":
            found = {"lark_grammar": f"start: {_regex_literal(text)}"}
        case "lark":
            _check_lark(text)
            found = {"lark_grammar": text}
        case "choice":
            found = {"lark_grammar": _choice_rule(text)}
    grammars = [found]
    if constraint.before:
        _check_lark(constraint.before)
        first = {"lark_grammar": f"start: before @answer\n{constraint.before}"}
        grammars = [first, {"name": "answer", **found}]
    grammar = json.dumps({"grammars": grammars}, ensure_ascii=False)
    _try_out(kind, grammar)
    return grammar


def parser_limits() -> LLParserLimits:
    """``LIMITS`` as llguidance takes them."""
    from llguidance import LLParserLimits

    return LLParserLimits(**LIMITS, verbose_errors=False)


def _regex_literal(text: str) -> str:
    from llguidance import LLMatcher

    try:
        wrapped = json.loads(LLMatcher.grammar_from_regex(text))
    except ValueError as exc:
        raise BadConstraint("regex", str(exc)) from exc
    rule: str = wrapped["grammars"][0]["lark_grammar"]
    return rule.removeprefix("start: ")


def _choice_rule(text: str) -> str:
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadConstraint("choice", f"no JSON list: {exc}") from exc
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise BadConstraint("choice", "must be a list of texts")
    if not 1 <= len(texts) <= MAX_CHOICES or not all(texts):
        raise BadConstraint("choice", f"must be 1 to {MAX_CHOICES} texts, none of them empty")
    return "start: " + " | ".join(literal(one) for one in dict.fromkeys(texts))


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def _check_lark(text: str) -> None:
    """Refuse what llguidance would take and a mask cannot do."""
    for options in _RULE.findall(text):
        for option in options.split(","):
            name = option.partition("=")[0].strip()
            if name and name not in _RULE_OPTIONS:
                allowed = " and ".join(sorted(_RULE_OPTIONS))
                raise BadConstraint("lark", f"rule option {name!r}: only {allowed} are honoured")
    decoder = json.JSONDecoder()
    for found in _INLINE_SCHEMA.finditer(text):
        try:
            schema, _ = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong, with the line
        compiled_schema(schema, guided=True)


def _try_out(kind: str, grammar: str) -> None:
    """Compile against a vocabulary of single bytes, and take the first mask."""
    from llguidance import LLMatcher

    limits = parser_limits()
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits)
    for message in messages:
        if failed or not message.startswith(_NO_TOKENIZER):
            raise BadConstraint(kind, _shown(message))
    if messages:
        return  # its special tokens are known to the rank alone
    matcher = LLMatcher(_bytes_tokenizer(), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise BadConstraint(kind, _shown(matcher.get_error()))


def _shown(message: str) -> str:
    return message.partition("\n<non-verbose/>")[0].strip()[:600]


class _Bytes:
    """A vocabulary of the 256 bytes and one end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)
    is_tokenizer_wrapper = True

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(maxsize=1)
def _bytes_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer

    wrapper: Any = _Bytes()
    return LLTokenizer(wrapper, n_vocab=257, eos_token=256, slices=[])
