"""The rules of the Stanford PTB tokenizer 3.4.1 with its default settings, in their order.

Of equally long matches the earlier rule wins. The trailing context of a token counts for its length but is not
consumed.
"""

from __future__ import annotations

import functools
import re
from string import ascii_letters, ascii_uppercase, digits

from ftlib.metrics.ptb.lexer import Barren, Lexer, Pattern, Rule, Write, any_of, either, exactly, none_of, text, words

# Letters, marks and digits of the Penn Treebank tokenizer.
#
# Its tables are those of Unicode 6.2 with additions, while Python's change with every version. So they were measured:
# every character of the Basic Multilingual Plane was tokenized inside a word by the program. It treats characters
# beyond that plane neither as letters nor as digits.


def _unpack(packed: str) -> frozenset[str]:
    """Decode run lengths in base 36: characters to skip, characters to take, and so on."""
    steps = [int(step, 36) for step in packed.split()]
    found: list[str] = []
    place = 0
    for skipped, taken in zip(steps[::2], steps[1::2], strict=True):
        place += skipped
        found += map(chr, range(place, place + taken))
        place += taken
    return frozenset(found)


LETTERS = _unpack(
    "1t q 6 q 1b 1 a 1 4 1 5 n 1 v 1 cq 4 c e 5 7 1 1 1 3l 5 1 2 2 4 8 1 1 3 1 1 1 k 1 2b 1 3v 8 4e 9 12 2 1 7 13 20 "
    "r 5 3 19 17 z 2 1 2r 1 1 f 2 7 2 a 3 2 1 g 1 1 u t 2h b 1 o x 9 2 4 1 5 m 4 1 9 1 3 1 n p 1z 1 1 b 2f 1i 3 1 i 1 "
    "7 a f 7 1 7 5 8 2 2 2 m 1 7 1 1 3 4 3 1 g 1 d 2 1 3 e 2 j 6 4 2 2 m 1 7 1 2 1 2 1 2 v 4 1 1 j 3 g 9 1 3 1 m 1 7 "
    "1 2 1 5 3 1 i 1 f 2 z 8 2 2 2 m 1 7 1 2 1 5 3 1 u 2 1 3 f 1 h 1 1 6 3 3 1 4 3 2 1 1 1 2 3 2 3 3 3 c m 1 1g 8 1 3 "
    "1 n 1 a 1 5 3 1 q 2 6 2 z 8 1 3 1 n 1 a 1 5 3 1 w 1 1 2 f 2 i 8 1 3 1 15 2 1 g 1 h 2 o 6 5 i 3 o 1 9 1 1 2 7 1m "
    "1c 1 2 c 7 1m 2 1 1 2 2 1 1 2 1 6 4 1 7 1 3 1 1 1 1 2 2 1 4 1 2 9 1 2 5 1 1 l 4 w 1 1r 8 1 10 r 5 37 17 k 1 g 6 "
    "4 4 3 1 3 2 7 3 4 d c 1 h 12 1 1 5 1 2 17 1 99 1 4 2 7 1 1 1 4 2 15 1 4 2 x 1 4 2 7 1 1 1 4 2 f 1 1l 1 4 2 1v 11 "
    "g g 2d c h8 2 h 1 q 5 23 l d 1 4 e i e i e d 1 3 f 1g z 1 4 1 1v 2g 8 15 1 1 5 1y a t 1f u 2 5 b 18 l 7 1k n 9 "
    "1h 2a 1 2l 1b h 7 1j u d 2 a 18 q 10 15 3 a 10 2z 4 1 4 3 2 9 5c 1s 7q 2 6 2 12 2 6 2 8 1 1 1 1 1 1 1 v 2 1h 1 7 "
    "1 1 3 3 1 7 3 4 2 6 4 d 5 3 1 7 38 1 d 1 g d 2t 1 4 1 2 a 1 1 3 5 6 1 1 1 1 1 1 4 1 b 2 4 5 5 4 1 1g 2 22j 1b 1 "
    "1b 1 3p 6 4 3 2 c 12 1 1 5 1 2 1k 7 1 g n 9 7 1 7 1 7 1 7 1 7 1 7 1 7 1 7 28 1 d1 2 16 5 5 2 4 2e 6 3 1 2i 1 4 5 "
    "15 3 2m h r 1h g e8 52u 22 g5p 1f wd 1v 1a 2 7h 3 g a 2 k 1b g p 8 1y 1d 9 2 2v 2 4 1 4 c b 25 a 1 3 1 4 1 n t "
    "1g e 1e 1q 6 3 1 e s a n p t 7 1b s 1 1c 15 n 3 1 8 k n 3 1 5 1c 1 1 3 2 2 5 2 1 1 1 o 3 2 b 7 3 c 6 2 6 2 6 9 7 "
    "1 7 41 z t 8mc c n 4 1d 6is a6 2 2y 12 7 c 5 5 1 1 a 1 d 1 5 1 1 1 2 1 2 1 30 x a3 i 1s 2 1i 14 c 38 5 1 3r 10 q "
    "6 q b 2h 3 6 2 6 2 6 2 3 "
)
"""Letters of any script."""

MARKS = _unpack(
    "4t 1 es 4 c e 5 7 1 1 1 3l 5 1 2 2 a 2 34 1 3w 5 5u 6 1d 19 1 1 1 2 1 2 1 1 25 6 1c k h 1 2t f 2 7 f 2 g 1 1 1 u "
    "t 2h b 1m 9 7g 4 1k 1 1 h 2 5 c 2 t 3 1k 1 1 7 2 2 2 3 9 1 a 2 t 3 1k 1 1 i 1d 3 1k 1 1 i 4y 1 1n 5 3 3 1 4 1f 3 "
    "1m p 6f 7 1 3 6g 1 2 7 c 8 2q 1 2 9 b 6 "
)
"""Accents, vowel signs and the soft hyphen: they count as letters of plain words, but not in hyphenated ones."""

DIGITS = _unpack(
    "1c a 17q a 3q a 5i a bg a 3a a 3a a 3a a 3a a 3a a 3a a 3a a 3a a 68 a 3a a 1y a 7q a 1y a 1fq a 12 a 8c a 3k a "
    "4m a 6 a 52 a 2e a 3q a 6 a r7q a iu a 12 a 5i a 3a a ba a geu a "
)
"""Decimal digits of any script."""

_CHEROKEE = frozenset(map(chr, range(0x13A0, 0x13F6)))
"""Without lower case in Unicode 6.2."""

CAPITALS = frozenset(filter(str.isupper, LETTERS)) - _CHEROKEE | frozenset(
    chr(code) for first, last in ((0x2160, 0x216F), (0x24B6, 0x24CF)) for code in range(first, last + 1)
)
"""Upper case; Roman numerals and circled letters too."""


# Tokens of the Stanford PTB tokenizer 3.4.1, as patterns for `ftlib.metrics.ptb.lexer`.
#
# As in the program, words are case-insensitive and sets of characters case-sensitive.


def _span(first: str, last: str) -> str:
    return "".join(map(chr, range(ord(first), ord(last) + 1)))


# Characters
_SPACES = " \t\u00a0\u3000" + _span("\u2000", "\u200a")
_BRACKETS = '"<>|(){}'
SPACE = any_of(_SPACES)
NEWLINE = any_of("\r\n\u2028\u2029\v\f\u0085") | exactly("\r\n")
BLANK = SPACE | NEWLINE
ANYTHING = none_of("")
ASCII_LETTER = any_of(ascii_letters)
_ascii_digit = any_of(digits)
_ascii_alnum = any_of(ascii_letters + digits)
_capital_ascii = any_of(ascii_uppercase)
DIGIT = any_of(DIGITS)
PURE_LETTER = any_of(LETTERS)
_pure_alnum = any_of(LETTERS | DIGITS)
_vowel_accent = text("&") + any_of("aeiouAEIOU") + words("acute grave uml") + text(";")
_letter = any_of(LETTERS | MARKS) | _vowel_accent
_alnum = any_of(LETTERS | MARKS | DIGITS) | _vowel_accent
APOSTROPHE = any_of("'\u0092\u2019") | text("&apos;")
_any_apostrophe = APOSTROPHE | any_of("`\u0091\u2018\u201b")
_hyphen = any_of("-_\u058a\u2010\u2011")
_ptb_patterns_ampersand = text("&") | text("&amp;")
INNER_STOP = any_of(",;:\u3001")
_minus_or_space = any_of("- \u00a0")

# Markup
_name = ASCII_LETTER + any_of(ascii_letters + digits + "_:.-").many()
_quoted = text("'") + none_of("'").many() + text("'") | text('"') + none_of('"').many() + text('"')
_attribute = _name + (text(" ").many() + text("=") + text(" ").many() + _quoted).maybe()
TAG = text("<") + either(
    any_of("!?") + any_of(ascii_letters + "-") + none_of(">\r\n").many(),
    _name + (text(" ").some() + _attribute).many() + text(" ").many() + text("/").maybe(),
    text("/") + _name,
)
TAG = TAG + text(" ").many() + text(">")
SENTENCE_END = BLANK + (BLANK | any_of(CAPITALS) | TAG)
DASH = any_of("\u0096\u0097\u2013\u2014\u2015") | text("&") + words("MD mdash ndash") + text(";")
ENTITY = text("&") + (words("HT TL UR LR QC QL QR odq cdq") | text("#") + _ascii_digit.some()) + text(";")

# Words
WORD = _letter + _alnum.many() + (any_of(".!?") + _letter + _alnum.many()).many()
CLITIC = APOSTROPHE + (any_of("msdMSD") | words("re ve ll"))
_soft_hyphen = any_of("\u00ad")
BEFORE_NOT = any_of(ascii_letters + "\u00ad").many() + any_of(set(ascii_letters) - set("nN")) + _soft_hyphen.many()
NOT = text("n") + _any_apostrophe + text("t")
_elided = (any_of("dDoOlL") + _any_apostrophe + _pure_alnum).maybe() + _pure_alnum.some()
COMPOUND = _elided + (_hyphen + _elided).many()
INITIALS = _capital_ascii.some() + ((any_of("+&") | text("&amp;")) + _capital_ascii.some()).some()
_slash = text("\\").maybe() + text("/")
_hyphenated_ascii = _ascii_alnum.some() + (text("-") + ASCII_LETTER.some()).times(0, 2)
SLASHED = _hyphenated_ascii + (_slash + _hyphenated_ascii).times(1, 2)
APOSTROPHE_WORD = either(
    APOSTROPHE + text("n") + APOSTROPHE.maybe(),
    any_of("lLdDjJ") + APOSTROPHE,
    words("Dunkin somethin ol") + APOSTROPHE,
    APOSTROPHE + text("em"),
    any_of(set(ascii_uppercase) - set("IY") | {"n"}) + _any_apostrophe + PURE_LETTER + PURE_LETTER.some(),
    APOSTROPHE + any_of("23456789") + text("0s"),
    APOSTROPHE + text("til") + text("l").maybe(),
    PURE_LETTER.some()
    + any_of("aeiouyAEIOUY")
    + _any_apostrophe
    + any_of("aeiou" + ascii_uppercase)
    + PURE_LETTER.many(),
    APOSTROPHE + text("cause"),
    text("cont'd") + text(".").maybe(),
    words("'twas nor'easter c'mon e'er s'mores ev'ry li'l nat'l"),
    text("o") + _any_apostrophe + text("o"),
)
TREEBANK = either(
    text("-") + words("RRB LRB RCB LCB RSB LSB") + text("-"),
    words("C.D.s pro- anti-"),
    text("S") + _ptb_patterns_ampersand + words("P-500 Ls"),
    text("Cap") + APOSTROPHE + text("n"),
    text("c") + APOSTROPHE + text("est"),
)
_extensions = words(
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py "
    "sql tar txt wav x xml zip"
)
FILE = _alnum.some() + (text(".") + _alnum.some()).many() + text(".") + _extensions

# Addresses
_address = none_of(" \t\n\f\r" + _BRACKETS).some() + none_of(" \t\n\f\r" + _BRACKETS + ".!?,-")
URL = text("http") + text("s").maybe() + text("://") + _address
_path = text("/") + none_of(' \t\n\f\r"<>|()').some() + none_of(" \t\n\f\r" + _BRACKETS + ".!?,-")
_www = text("www.") + (none_of(" \t\n\f\r" + _BRACKETS + ".!?,").some() + text(".")).some()
_www = _www + ASCII_LETTER.times(2, 4)
# A bug of the program: ",-_" in a set is a range of characters, which includes capitals and digits.
_site_letter = none_of(" \t\n\f\r`'$" + _BRACKETS + ".!?" + _span(",", "_"))
_site = (_site_letter.some() + text(".")).some() + words("com net org edu")
WEB = (_www | _site) + _path.maybe()
_not_in_mail = " \t\n\f\r\u00a0" + _BRACKETS
MAIL = (
    (text("<") | text("&lt;")).maybe()
    + _ascii_alnum
    + none_of(_not_in_mail).many()
    + text("@")
    + (none_of(_not_in_mail + ".").some() + text(".")).many()
    + none_of(_not_in_mail + ".").some()
    + (text(">") | text("&gt;")).maybe()
)
HANDLE = text("@") + any_of(ascii_letters + "_") + any_of(ascii_letters + digits + "_").many()
TOPIC = text("#") + _letter.some()

# Numbers
DATE = (DIGIT.times(1, 2) + any_of("-/")).times(2, 2) + DIGIT.times(2, 4)
NUMBER = any_of("+-").maybe() + (DIGIT.some() | DIGIT.many() + (any_of(".:,\u00ad\u066b\u066c") + DIGIT.some()).some())
SCRIPT_NUMBER = any_of("\u207a\u207b\u208a\u208b").maybe() + (
    any_of("\u2070\u00b9\u00b2\u00b3" + _span("\u2074", "\u2079")).some() | any_of(_span("\u2080", "\u2089")).some()
)
FRACTION = (
    (DIGIT.times(1, 4) + _minus_or_space).maybe() + DIGIT.times(1, 4) + (_slash | any_of("\u2044")) + DIGIT.times(1, 4)
)
_plus = text("+").times(1, 2)


def _figures(least: int, most: int) -> Pattern:
    return _ascii_digit.times(least, most)


PHONE = either(
    either(
        text("(") + _figures(2, 3) + text(")") + any_of(" \u00a0").maybe(),
        _plus.maybe() + (_figures(2, 4) + _minus_or_space).maybe() + _figures(2, 4) + _minus_or_space,
    )
    + _figures(3, 4)
    + _minus_or_space.maybe()
    + _figures(3, 5),
    (_plus.maybe() + _figures(2, 4) + text(".")).maybe()
    + _figures(2, 4)
    + text(".")
    + _figures(3, 4)
    + text(".")
    + _figures(3, 5),
)
DOLLAR = _capital_ascii.many() + text("$") | text("#")
CURRENCY = any_of("\u00a2\u00a3\u00a4\u00a5\u0080\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6")

# Abbreviations
_MONTHS_AND_DAYS = "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri"
_STATES = (
    "Ala Ariz Calif Colo Conn Ct Dak Fla Ga Ind Kan Kans Ky Md Mich Minn Mo Mont Neb Nev Okla Penn Tenn Va Vt Wis "
    "Wisc Wyo"
)
_CAPITAL_STATES = "Az Ark Del Ill La Mass Miss Ore Pa Tex Wash"
"""Ordinary words too, unless their first letter is a capital."""
LOWER_CASE_FOLLOWS = either(
    words(f"{_MONTHS_AND_DAYS} {_STATES} Inc Co Cos Corp Ltd Plc Rt Bancorp Bhd Assn Univ Intl Sys"),
    either(*(any_of(state[0]) + text(state[1:]) for state in _CAPITAL_STATES.split())),
    text("P") + text("p").maybe() + text("t") + any_of("ye") + text("s").maybe(),
    words("tel est ext sq Jr Sr Bros Ed.D Ph.D Blvd Rd Esq etc al seq Bldg"),
) + text(".")
_us = either(
    words("Canada Sino Korean EU Japan non") + text("-U.S"),
    words("U.S.-U.K U.S.-U.S.S.R"),
)
_dotted = text(".") + ASCII_LETTER
ACRONYM = ASCII_LETTER + _dotted.many() | _us
_long_acronym = ASCII_LETTER + _dotted.some() | _us
_title = either(
    words("Mr Mrs Ms Dr Drs Prof Profs Sen Sens Rep Reps Atty Attys Lt Col Gen Messrs Gov Govs Adm Rev Maj Sgt Cpl"),
    words("Pvt Capt St Ste Ave Pres Lieut Hon Brig Cmdr Comdr Pfc Spc Supt Supts Det Mt Ft Adj Adv Asst Assoc Ens"),
    words("Insp Mlle Mme Msgr Sfc"),
    exactly("M") + text("iss"),
)
UPPER_CASE_FOLLOWS = either(
    _title,
    words("vs Alex Wm Jos Cie a.k.a cf TREAS Ph Invt Elec Natl Dept"),
    text("M") + any_of("ft") + text("g"),
    ACRONYM,
)
NUMBER_FOLLOWS = words("ca fig figs prop no nos art bldg pp op") + text(".")
_OPENERS = (
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Mr. Ms. "
    "Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet "
    "You"
)
OPENER = either(*(any_of(opener[0]) + text(opener[1:]) for opener in _OPENERS.split()))
HYPHENATED = (
    _ascii_alnum
    + any_of(ascii_letters + digits + ".,\u00ad").many()
    + (text("-") + (any_of(ascii_letters + digits + "\u00ad").some() | _long_acronym + text("."))).some()
)

# Signs
DOUBLE_QUOTE = text('"') | text("&quot;")
QUOTES = either(
    APOSTROPHE,
    text("''"),
    any_of("`\u0091\u0092\u0093\u0094\u00ab\u00bb\u2039\u203a" + _span("\u2018", "\u201f")).times(1, 2),
)
ELLIPSIS = either(
    text(".").times(3, 5),
    (text(".") + any_of(" \u00a0")).times(2, 4) + text("."),
    any_of("\u0085\u2026"),
)
SMILEY = any_of("<>").maybe() + any_of(":;=") + any_of("-o*'").maybe() + any_of("()DPdpO\\{@|[]")
_eye = any_of("^x=~<>")
_open_eye = any_of("-^x=~<>'")
FACE = either(
    _eye + text(".[^x=~<>]"),
    _open_eye + text("_") + _open_eye,
    text("(") + _open_eye + any_of("_.").maybe() + _open_eye + text(")"),
    text("(") + any_of("^x=~<>'") + text("-") + any_of("^x=~<>'`") + text(")"),
)
_SYMBOLS = (
    "+%&~^|\\\u00a6\u00a7\u00a8\u00a9\u00ac\u00ae\u00af\u00b0\u00b1\u00b2\u00b3\u00d7\u00f7\u0387\u05be\u05c0\u05c3"
    "\u05c6\u05f3\u05f4\u060c\u0614\u061b\u061e\u066a\u066d\u07f6\u07f7\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017"
    "\u203b\u2044\u3012\u30fb"
)
_SYMBOL_RUNS = (
    "\u00b4\u00ba \u0600\u0603 \u0606\u060a \u0703\u070d \u2020\u2023 \u2030\u2038 \u203e\u2042 \u207a\u207e "
    "\u208a\u208e \u2100\u214f \u2190\u2bff \uff01\uff0f \uff1a\uff20 \uff3b\uff40 \uff5b\uff65"
)
SYMBOL = any_of(_SYMBOLS + "".join(_span(*run) for run in _SYMBOL_RUNS.split(" ")))
FRACTION_SIGN = any_of("\u00bc\u00bd\u00be" + _span("\u2153", "\u215e"))


# The rules.


def _constant(token: str) -> Write:
    return lambda matched: token


def _replaced(*changes: tuple[str, str]) -> Write:
    """Replace strings one after the other."""

    def write(matched: str) -> str:
        for old, new in changes:
            matched = matched.replace(old, new)
        return matched

    return write


def _without_soft_hyphens(matched: str) -> str:
    return matched.replace("\u00ad", "") or "-"


def _hyphens(matched: str) -> str:
    return "--" if len(matched) in (3, 4) else matched


def _ptb_grammar_ampersand(matched: str) -> str:
    return re.sub("(?i)&amp;", "&", matched)


_CURRENCIES = str.maketrans({"\u00a2": "cents", "\u00a3": "#"} | dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"))
_FRACTIONS = str.maketrans({"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"})
_QUOTES = str.maketrans(
    dict.fromkeys("\u0091\u2018\u201b\u2039", "`")
    | dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0093\u201c\u00ab", "``")
    | dict.fromkeys("\u0094\u201d\u00bb", "''")
)


def _closing(matched: str) -> str:
    """TeX quotes; straight quotes are closing."""
    return matched.replace("&apos;", "'").translate(_QUOTES)


_unbroken = _replaced((" ", "\u00a0"))
_rounded = _replaced(("(", "-LRB-"), (")", "-RRB-"))
_dialed = _replaced((" ", "\u00a0"), ("(", "-LRB-"), (")", "-RRB-"))
_not_letter = none_of(ascii_letters)

RULES: tuple[Rule, ...] = (
    Rule(text("c++")),
    Rule(any_of("cCfF") + text("#")),
    Rule(text("cannot"), back=3),
    Rule(text("'twas"), back=3),
    Rule(text("'tis"), back=2),
    Rule(words("gonna gotta lemme gimme wanna"), back=2),
    Rule(TAG, _unbroken),
    Rule(DASH, _constant("--")),
    Rule(text("&amp;"), _constant("&")),
    Rule(ENTITY),
    Rule(WORD, _without_soft_hyphens, CLITIC),
    Rule(BEFORE_NOT, _without_soft_hyphens, NOT),
    Rule(WORD, _without_soft_hyphens),
    Rule(APOSTROPHE_WORD),
    Rule(text("y") + APOSTROPHE, context=PURE_LETTER),
    Rule(URL),
    Rule(WEB),
    Rule(MAIL),
    Rule(HANDLE | TOPIC),
    Rule(CLITIC | NOT, _closing, _not_letter),
    Rule(DATE),
    Rule(NUMBER, _without_soft_hyphens),
    Rule(SCRIPT_NUMBER),
    Rule(FRACTION, _unbroken),
    Rule(FRACTION_SIGN, lambda matched: matched.translate(_FRACTIONS)),
    Rule(TREEBANK, _ptb_grammar_ampersand),
    Rule(SLASHED | DOLLAR),
    Rule(CURRENCY, lambda matched: matched.translate(_CURRENCIES)),
    Rule(ASCII_LETTER + text("."), context=BLANK.some() + (OPENER | TAG) + BLANK, back=1),
    Rule(ACRONYM + text("."), context=BLANK.some() + (OPENER | TAG) + BLANK, back=1, twice=True),
    Rule(NUMBER_FOLLOWS, context=BLANK.maybe() + DIGIT),
    Rule((text("pt") + any_of("eyEY") | text("co")) + text("."), context=SPACE + words("ltd lim")),
    Rule(LOWER_CASE_FOLLOWS, context=SENTENCE_END, back=1, twice=True),
    Rule(LOWER_CASE_FOLLOWS, context=ANYTHING.times(2, 2)),
    Rule(LOWER_CASE_FOLLOWS, back=1, twice=True),
    Rule(UPPER_CASE_FOLLOWS + text(".")),
    Rule(UPPER_CASE_FOLLOWS, context=SPACE),
    Rule(ACRONYM, context=BLANK),
    Rule(APOSTROPHE + any_of(digits) + any_of(digits), context=BLANK),
    Rule(FILE, context=BLANK | any_of(".?!,")),
    Rule(WORD + text("."), _without_soft_hyphens, INNER_STOP),
    Rule(PHONE, _dialed),
    Rule(DOUBLE_QUOTE, _constant("``"), any_of(ascii_letters + digits + "$")),
    Rule(DOUBLE_QUOTE, _constant("''")),
    Rule(text("\x7f"), None),
    Rule(text("<") | text("&lt;"), _constant("<")),
    Rule(text(">") | text("&gt;"), _constant(">")),
    Rule(SMILEY, _rounded, none_of(ascii_letters + digits)),
    Rule(FACE, _rounded),
    Rule(text("{"), _constant("-LCB-")),
    Rule(text("}"), _constant("-RCB-")),
    Rule(text("["), _constant("-LSB-")),
    Rule(text("]"), _constant("-RSB-")),
    Rule(text("("), _constant("-LRB-")),
    Rule(text(")"), _constant("-RRB-")),
    Rule(text("-").some(), _hyphens),
    Rule(ELLIPSIS, _constant("...")),
    Rule(either(*(text(sign).some() for sign in "@#_*")) | text("\\*").times(1, 3)),
    Rule(INNER_STOP),
    Rule(any_of("?!").some()),
    Rule(any_of(".=/\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700\u0701\u0702\u07fa\u3002")),
    Rule(HYPHENATED + text("."), _without_soft_hyphens, INNER_STOP),
    Rule(HYPHENATED, _without_soft_hyphens),
    Rule(COMPOUND + text("."), context=INNER_STOP),
    Rule(COMPOUND),
    Rule(INITIALS + text("."), _ptb_grammar_ampersand, INNER_STOP),
    Rule(INITIALS, _ptb_grammar_ampersand),
    Rule(text("'"), _constant("`"), ASCII_LETTER + none_of(" \t\n\r\u00a0")),
    Rule(CLITIC | NOT | QUOTES, _closing),
    Rule(exactly("<<") | exactly(">>")),
    Rule(SYMBOL),
    Rule(SPACE.some() | any_of("\0\u200b\u200e\u200f\ufeff") | text("&nbsp;"), None),
    Rule(NEWLINE, _constant("\n")),
    Rule(none_of("\n"), None),
)
"""They match every text. An unknown character is dropped, as in the program (which warns)."""


@functools.cache
def _lexer() -> Lexer:
    return Lexer(RULES)


def next_token(read: str, place: int, barren: Barren) -> tuple[str | None, int]:
    """The token at a position (None for text without a token) and the position after it.

    Args:
        barren: the same set for all tokens of one text, empty at its beginning.
    """
    return _lexer().next_token(read, place, barren)
