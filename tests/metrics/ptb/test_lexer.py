"""The lexer against `re`, which is asked about every piece of text."""

from __future__ import annotations

import random
import re

import pytest

from ftlib.metrics.ptb.lexer import Automaton, Lexer, Pattern, Rule, any_of, either, exactly, none_of, text, words

A, B = exactly("a"), exactly("b")
SAME: list[tuple[Pattern, str]] = [
    (A.some() + B, "a+b"),
    (A.many() + B.maybe() + A, "a*b?a"),
    ((A | A + B).times(1, 3), "(a|ab){1,3}"),
    (either(A + B, B + A, exactly("c")).many() + A, "(ab|ba|c)*a"),
    (none_of("a").times(2, 2) + any_of("ac"), "[^a]{2}[ac]"),
    ((A.maybe() + B).some() + exactly("c").times(0, 2), "(a?b)+c{0,2}"),
    (words("ab abc c"), "(?i:ab|abc|c)"),
]


@pytest.mark.parametrize("seed", range(40))
def test_longest_match_and_first_rule(seed: int) -> None:
    draw = random.Random(seed)
    rules = draw.sample(SAME, 4)
    automaton = Automaton([pattern for pattern, _ in rules])
    for _ in range(60):
        read = "".join(draw.choice("abcBC") for _ in range(draw.randint(0, 9)))
        start = draw.randint(0, len(read))
        ends = [
            (end, -number)
            for end in range(start + 1, len(read) + 1)
            for number, (_, expression) in enumerate(rules)
            if re.fullmatch(expression, read[start:end])
        ]
        end, number = max(ends, default=(start, 1))
        assert automaton.longest(read, start, set()) == (-number, end)


def test_context_competes_but_is_not_read() -> None:
    lexer = Lexer([Rule(A.some(), context=B), Rule(A.some(), str.upper), Rule(B, None), Rule(A + B + B)])
    assert lexer.next_token("aab", 0, set()) == ("aa", 2)
    assert lexer.next_token("aac", 0, set()) == ("AA", 2)
    assert lexer.next_token("abb", 0, set()) == ("abb", 3)
    assert lexer.next_token("b", 0, set()) == (None, 1)


def test_the_longest_token_before_its_context() -> None:
    lexer = Lexer([Rule((A | B).some(), context=B.some() + A.maybe())])
    assert lexer.next_token("abbb", 0, set()) == ("abb", 3)
    assert lexer.next_token("abba", 0, set()) == ("ab", 2)


def test_what_is_read_once_more() -> None:
    lexer = Lexer([Rule(text("cannot"), back=3), Rule(text("co."), back=1, twice=True)])
    assert lexer.next_token("cannot", 0, set()) == ("can", 3)
    assert lexer.next_token("Co.", 0, set()) == ("Co.", 2)


def test_text_matches_in_either_case_and_sets_as_written() -> None:
    assert Automaton([text("kiss")]).longest("\u212a\u0130\u017fS", 0, set()) == (0, 4)
    assert Automaton([any_of("k")]).longest("K", 0, set()) == (-1, 0)


def test_no_rule_matches() -> None:
    with pytest.raises(ValueError, match="'x'"):
        Lexer([Rule(A)]).next_token("ax", 1, set())
