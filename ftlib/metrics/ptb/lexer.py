"""A longest-match lexer: regular expressions, compiled lazily into one automaton.

All rules are matched at once. The longest match wins, including its trailing context, and of equal ones the earlier
rule, as in lexer generators; `re` cannot do this, because there the first alternative wins. The automaton follows
Glushkov (1961): its states are sets of positions in the rules, and a state is a dictionary from the next character to
the next state, filled on first use.

The end of the longest match is known only where no rule can continue, possibly at the end of the text, far after the
token. Positions from which reading on was useless are remembered, so that each character is read only a few times
(Reps 1998, '"Maximal-munch" tokenization in linear time').
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Contains = Callable[[str], bool]
Write = Callable[[str], str]
Barren = set[tuple[int, int]]
"""For one text: positions, and ids of the states there, from which no rule can match."""

_NEAR = 16
"""Within this many characters after a match nothing is remembered: tokens rarely need more."""


class Pattern:
    """A regular expression; `+` is concatenation, `|` alternation."""

    def __add__(self, after: Pattern) -> Pattern:
        return _Chain(self, after)

    def __or__(self, other: Pattern) -> Pattern:
        return _Choice((self, other))

    def maybe(self) -> Pattern:
        """Zero or one."""
        return _Choice((self, _NOTHING))

    def some(self) -> Pattern:
        """One or more."""
        return _Loop(self)

    def many(self) -> Pattern:
        """Zero or more."""
        return _Loop(self).maybe()

    def times(self, least: int, most: int) -> Pattern:
        """From `least` to `most` repetitions."""
        found = _NOTHING
        for count in range(most, 0, -1):
            found = self + found
            if count > least:
                found = found.maybe()
        return found


@dataclass(frozen=True)
class _One(Pattern):
    contains: Contains


@dataclass(frozen=True)
class _Chain(Pattern):
    before: Pattern
    after: Pattern


@dataclass(frozen=True)
class _Choice(Pattern):
    options: tuple[Pattern, ...]


@dataclass(frozen=True)
class _Loop(Pattern):
    body: Pattern


@dataclass(frozen=True)
class _Nothing(Pattern):
    pass


_NOTHING: Pattern = _Nothing()
_SAME_LETTER = {"i": "\u0130\u0131", "k": "\u212a", "s": "\u017f"}
"""Non-ASCII characters whose lower or upper case is an ASCII letter."""


def one(contains: Contains) -> Pattern:
    """A character of a set."""
    return _One(contains)


def any_of(characters: Iterable[str]) -> Pattern:
    """One of these characters, case-sensitive."""
    return _One(frozenset(characters).__contains__)


def none_of(characters: Iterable[str]) -> Pattern:
    """Any other character."""
    excluded = frozenset(characters)
    return _One(lambda character: character not in excluded)


def text(characters: str) -> Pattern:
    """A string, case-insensitive."""
    found: Pattern = _NOTHING
    for character in reversed(characters):
        found = any_of(character.lower() + character.upper() + _SAME_LETTER.get(character.lower(), "")) + found
    return found


def exactly(characters: str) -> Pattern:
    """A string, case-sensitive."""
    found: Pattern = _NOTHING
    for character in reversed(characters):
        found = any_of(character) + found
    return found


def either(*options: Pattern) -> Pattern:
    """One of several patterns."""
    return _Choice(options)


def words(listed: str) -> Pattern:
    """One of the words in a string, case-insensitive."""
    return _Choice(tuple(text(word) for word in listed.split()))


class _Ends(NamedTuple):
    """For a part of a rule: whether it can be empty, and its possible first and last positions."""

    empty: bool
    first: frozenset[int]
    last: frozenset[int]


class State(dict[str, "State | None"]):
    """Next character → next state; None where no rule can continue.

    Attributes:
        rule: the first rule that matches the text so far; −1 if none does.
    """

    def __init__(self, automaton: Automaton, following: frozenset[int], rule: int) -> None:
        super().__init__()
        self.rule = rule
        self._automaton = automaton
        self._following = following

    def __missing__(self, character: str) -> State | None:
        found = self._automaton.after(self._following, character)
        self[character] = found
        return found


class Automaton:
    """Matches several rules at once."""

    def __init__(self, rules: Sequence[Pattern]) -> None:
        self._contains: list[Contains] = []
        self._follow: list[set[int]] = []
        self._rule_at: dict[int, int] = {}
        self._states: dict[frozenset[int], State] = {}
        first: set[int] = set()
        for number, rule in enumerate(rules):
            ends = self._place(rule)
            first |= ends.first
            self._rule_at |= dict.fromkeys(ends.last, number)
        self.start = State(self, frozenset(first), -1)

    def longest(self, read: str, start: int, barren: Barren) -> tuple[int, int]:
        """The rule with the longest match at a position.

        Args:
            barren: see `Barren`; updated in place.

        Returns:
            The rule's number and the end of its match; (−1, start) if none matches.
        """
        state: State | None = self.start
        rule, end = -1, start
        ahead: list[tuple[int, int]] = []
        for place in range(start, len(read)):
            state = state[read[place]]  # type: ignore[index]
            if state is None:
                break
            if state.rule >= 0:
                rule, end = state.rule, place + 1
            elif place - end >= _NEAR:
                if (place, id(state)) in barren:
                    break
                ahead.append((place, id(state)))
        barren.update(known for known in ahead if known[0] >= end)
        return rule, end

    def ends(self, read: str, start: int, stop: int) -> list[int]:
        """All possible ends, up to `stop`, of matches from `start`, in order."""
        state: State | None = self.start
        found = []
        for place in range(start, stop):
            state = state[read[place]]  # type: ignore[index]
            if state is None:
                break
            if state.rule >= 0:
                found.append(place + 1)
        return found

    def after(self, following: frozenset[int], character: str) -> State | None:
        """The state after a character, given the positions that can follow the current state."""
        reached = frozenset(position for position in following if self._contains[position](character))
        if not reached:
            return None
        if reached not in self._states:
            ahead = frozenset().union(*(self._follow[position] for position in reached))
            rule = min((self._rule_at[position] for position in reached if position in self._rule_at), default=-1)
            self._states[reached] = State(self, ahead, rule)
        return self._states[reached]

    def _place(self, pattern: Pattern) -> _Ends:
        """Assign a position to every character of a rule, and record which can follow which."""
        if isinstance(pattern, _One):
            self._contains.append(pattern.contains)
            self._follow.append(set())
            here = frozenset({len(self._follow) - 1})
            return _Ends(False, here, here)
        if isinstance(pattern, _Chain):
            return self._place_chain(pattern)
        if isinstance(pattern, _Choice):
            parts = [self._place(option) for option in pattern.options]
            first = frozenset().union(*(part.first for part in parts))
            last = frozenset().union(*(part.last for part in parts))
            return _Ends(any(part.empty for part in parts), first, last)
        if isinstance(pattern, _Loop):
            body = self._place(pattern.body)
            self._link(body.last, body.first)
            return body
        return _Ends(True, frozenset(), frozenset())

    def _place_chain(self, pattern: _Chain) -> _Ends:
        before, after = self._place(pattern.before), self._place(pattern.after)
        self._link(before.last, after.first)
        return _Ends(
            before.empty and after.empty,
            before.first | after.first if before.empty else before.first,
            before.last | after.last if after.empty else after.last,
        )

    def _link(self, lasts: Iterable[int], firsts: Iterable[int]) -> None:
        for position in lasts:
            self._follow[position].update(firsts)


@dataclass(frozen=True)
class Rule:
    """A kind of token.

    Attributes:
        pattern: of the token.
        write: matched text → token; None for text without a token.
        context: trailing context, which is matched but not consumed.
        back: how many of the matched characters are not consumed.
        twice: whether these characters are part of the token all the same.
    """

    pattern: Pattern
    write: Write | None = str
    context: Pattern | None = None
    back: int = 0
    twice: bool = False

    @functools.cached_property
    def _shapes(self) -> tuple[Automaton, Automaton | None]:
        return Automaton([self.pattern]), None if self.context is None else Automaton([self.context])

    def end_before_context(self, read: str, start: int, end: int) -> int:
        """The end of the longest token for which token and trailing context end at `end`."""
        pattern, context = self._shapes
        if context is None:
            return end
        return next(cut for cut in reversed(pattern.ends(read, start, end)) if end in context.ends(read, cut, end))


class Lexer:
    """Splits a text into tokens."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._automaton = Automaton([rule.pattern + rule.context if rule.context else rule.pattern for rule in rules])

    def next_token(self, read: str, place: int, barren: Barren) -> tuple[str | None, int]:
        """The token at a position (None for text without a token) and the position after it.

        Args:
            barren: the same set for all tokens of one text, empty at its beginning.

        Raises:
            ValueError: no rule matches.
        """
        number, end = self._automaton.longest(read, place, barren)
        if number < 0:
            raise ValueError(f"no rule for {read[place]!r}")
        rule = self._rules[number]
        end = rule.end_before_context(read, place, end)
        after = end - rule.back
        return rule.write(read[place : end if rule.twice else after]) if rule.write else None, after
