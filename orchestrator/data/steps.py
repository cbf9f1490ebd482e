"""Steps of corpus preparation: pure functions from a document's text to a cleaner text, and to its identity.

`clean` is what every document goes through first, so it costs ASCII text next to nothing and never touches what stands
at the start of a line: code and Markdown lists mean something by it.
"""

from __future__ import annotations

import re
import unicodedata

import xxhash

from orchestrator.data.encoding import superscripts

_CONTROL_TOKENS = re.compile(r"<(s>|/s>|pad>)")
"""In a text, as in `<s>struck out</s>`, they would end its document for the model."""


def clean(text: str) -> str:
    """Mended Unicode in NFC, line ends as \\n, no trailing blanks, one empty line in a row at most, no boilerplate."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.translate(_ASCII_CONTROLS) if text.isascii() else _mend_unicode(text)
    text = superscripts(text)
    if "<" in text:
        text = _CONTROL_TOKENS.sub(r"< \1", text)
    lines = [line.rstrip(" \t") for line in text.split("\n")]
    text = "\n".join([line for line in lines if line[:3] not in _BOILERPLATE_STARTS or not _is_boilerplate(line)])
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip("\n")


def content_hash(text: str) -> bytes:
    """16 bytes, equal for texts that differ in letter case and white space only."""
    return bytes(xxhash.xxh3_128_digest(" ".join(text.lower().split()).encode("utf-8", "surrogatepass")))


def is_held_out(digest: bytes, share: float) -> bool:
    """Whether a document belongs to the held-out split: by its content, so it stays there when the corpus grows."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


_BLANK_LINES = re.compile(r"\n{3,}")


# --- characters -------------------------------------------------------------------------------------------------------

_ASCII_CONTROLS: dict[int, str | None] = {
    **{code: None for code in (*range(0x20), 0x7F) if chr(code) not in "\t\n\r"},
    **{ord(page_break): "\n" for page_break in "\v\f"},
}


def _cp1252(byte: int) -> str:
    """The character of a byte; a control character where cp1252 has none, as browsers read it."""
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


_BLANKS = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
_SURROGATES = "\ud800-\udfff"
_INVISIBLE = (
    "\0-\x08\x0b-\x1f\x7f-\x9f"  # controls
    "\u00ad\u180e\u200b\u2060-\u2065\ufeff"  # soft hyphen, zero width, byte order mark
    "\u200e\u200f\u202a-\u202e\u2066-\u206f"  # writing direction
    "\ufe00-\ufe0f\ufff9-\ufffc\ufffe\uffff"  # variation selectors, annotations and embedded objects, no characters
    "\ue000-\uf8ff\U000e0000-\U0010ffff"  # private use, tags
)
_ODD = re.compile(
    # A soft hyphen at a line end is where a typesetter broke a word.
    "\u00ad[ \t]*\n(?=[^\\W\\d_])"
    # Joiners shape the letters of Arabic and Indic scripts, and are an accident elsewhere.
    "|(?<![\u0600-\u1fff])[\u200c\u200d]"
    f"|[{_INVISIBLE}{_BLANKS}{_SURROGATES}\u2028\u2029\ufb00-\ufb06]"
)
_MENDED = {
    "\v": "\n",
    "\f": "\n",
    "\u2028": "\n",
    "\u2029": "\n\n",
    **dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)),
    # A C1 control character is a byte of cp1252 that was read as Latin-1 (so HTML 5 takes it).
    **{chr(byte): _cp1252(byte) for byte in range(0x80, 0xA0) if _cp1252(byte) != chr(byte)},
}
# What may need mending or is not in NFC for sure: the rest of Unicode neither decomposes nor combines.
_SUSPECT = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\xa0\xad\u0300-\u037e\u0387\u0483-\u0489\u0591-\u1fff\u2000-\u200f\u2028-\u202f\u205f-\u206f"
    "\u20d0-\u20ff\u2126\u212a\u212b\u2329\u232a\u2adc\u2cef-\u2cf1\u2d7f\u2de0-\u2dff\u3000\u302a-\u302f\u3099\u309a"
    "\ua66f-\uabff\ud800-\uf8ff\uf900-\ufaff\ufb00-\ufb4f\ufe00-\ufe2f\ufeff\ufff9-\uffff\U00010000-\U0010ffff]"
)


def _mend_unicode(text: str) -> str:
    if any(lead in text for lead in "ÃâÂÎÏï"):
        text = _mend_mojibake(text)
    if _SUSPECT.search(text):
        text = unicodedata.normalize("NFC", _ODD.sub(_replacement, text))
    return text


def _replacement(match: re.Match[str]) -> str:
    odd = match[0]
    if "\ud800" <= odd <= "\udfff":
        return "\ufffd"
    return _MENDED.get(odd, " " if odd.isspace() and odd > " " else "")


# UTF-8 that was read as cp1252 or Latin-1, where nothing else can be meant. What real text writes is left alone: Å
# before a dash or a square, operators such as Â², a capital before a closing quotation mark.
_CONTINUATION = "".join({character for byte in range(0x80, 0xC0) for character in (chr(byte), _cp1252(byte))})
_EIGHTIES = "".join({character for byte in range(0x80, 0x90) for character in (chr(byte), _cp1252(byte))})
_TO_BYTE = {character: byte for byte in range(0x80, 0x100) for character in (chr(byte), _cp1252(byte))}
_LOWER = "a-zß-öø-ÿ"
_UNQUOTED = re.sub("[\x92\x94’”]", "", _CONTINUATION)
_MOJIBAKE = re.compile(
    f"Ã(?<=[{_LOWER}]Ã)[{_CONTINUATION}]"
    f"|Ã[{_UNQUOTED}](?=[{_LOWER}])"
    "|Ã(?<=[0-9 ]Ã)[—\x97](?=[0-9 ])"
    "|Â[\xa0\xa3\xa5\xa7\xa9\xae\xb0\xb1\xb5\xbc-\xbe]"
    "|Â(?<=[A-Za-z0-9]Â)[\xab\xb2\xb3\xb7\xb9\xbb]"
    f"|Î[{_UNQUOTED}]|Î[”\x94](?=\\w)|Ï[{_EIGHTIES}]"
    f"|â[{_EIGHTIES}][{_CONTINUATION}]"
    "|ï»¿|ï¬[\x80-\x84€‚ƒ„]"
)
_TIMES_ENCODED = 3


def _mend_mojibake(text: str) -> str:
    for _ in range(_TIMES_ENCODED):
        before, text = text, _MOJIBAKE.sub(_decoded_again, text)
        if text == before:
            break
    return text


def _decoded_again(match: re.Match[str]) -> str:
    try:
        return bytes(_TO_BYTE[character] for character in match[0]).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]


# --- boilerplate ------------------------------------------------------------------------------------------------------

_YEAR = r"\b(?:19|20)\d\d\b"
_HOST = r"(?:https?://|www\.|\S+\.(?:org|com|net|edu)\b)"
# name: (how such a line starts, at least three characters; what the whole line is)
BOILERPLATE: dict[str, tuple[tuple[str, ...], str]] = {
    "download stamp": (
        ("Downloaded", "This content downloaded", "All use subject to"),
        rf"Downloaded from {_HOST}.{{0,160}}(?<!\.)|Downloaded by .{{3,120}} (?:at|on) .{{0,60}}{_YEAR}[^.]{{0,20}}"
        rf"|This content downloaded from .{{0,120}}|All use subject to {_HOST}\S*",
    ),
    "licensed use": (
        ("Authorized licensed use", "For personal use only"),
        r"Authorized licensed use limited to: .{0,300}|For personal use only\.?",
    ),
    "copyright": (
        ("© 1", "© 2", "©19", "©20", "Copyright", "This article is protected", "All rights reserved"),
        rf"(?:Copyright:? ?)?© ?{_YEAR}.{{0,400}}|Copyright \([cC]\) ?{_YEAR}.{{0,200}}"
        rf"|Copyright {_YEAR},? by .{{0,200}}|(?:This article is protected by copyright\. )?All rights reserved\.?",
    ),
    "open access notice": (
        ("This is an open",),
        r"This is an open[- ]access article,? (?:freely available|(?:distributed )?under the) .{0,600}",
    ),
    "doi": (
        ("doi", "DOI", "Doi"),
        r"(?:doi|DOI|Doi):? ?(?:https?://(?:dx\.)?doi\.org/)?10\.\d{4,9}/\S+",
    ),
    "editorial dates": (
        ("Received", "Article history", "Manuscript received"),
        rf"(?:Article history:? ?)?(?:Manuscript r|R)eceived:? (?:\d|[A-Z][a-z]+ \d).{{0,60}}{_YEAR}.{{0,80}}"
        rf"[Aa]ccepted:? (?:\d|[A-Z][a-z]+ \d).{{0,60}}{_YEAR}.{{0,120}}",
    ),
    "preprint stamp": (
        ("bioRxiv preprint", "medRxiv preprint", "arXiv:", "(which was not", "The copyright holder"),
        rf"(?:bio|med)Rxiv preprint (?:doi|first posted|this version).{{0,400}}"
        rf"|arXiv:\d{{4}}\.\d{{4,5}}(?:v\d+)? +\[[\w.-]+\] +\d{{1,2}} \w{{3}} {_YEAR}"
        r"|\(which was not certified by peer review\).{0,300}"
        r"|The copyright holder for this (?:preprint|article) .{0,300}",
    ),
    "journal banner": (
        (
            "Contents lists",
            "Journal homepage",
            "journal homepage",
            "Available online at",
            "ISSN",
            "Page ",
            "(page number",
        ),
        rf"Contents lists? available at \S.{{0,40}}|[Jj]ournal homepage: {_HOST}\S*|Available online at {_HOST}\S*"
        r"|ISSN:? ?\d{4}-\d{3}[\dXx](?: \((?:print|online)\))?|Page \d+ of \d+"
        r"|\(page number not for citation purposes\)",
    ),
    "publisher's note": (
        ("Publisher's", "Publisher’s", "Springer Nature remains"),
        r"(?:Publisher['’]s [Nn]ote:? )?Springer Nature remains neutral with regard to jurisdictional claims .{0,80}",
    ),
    "cover sheet": (
        ("See discussions, stats", "View publication stats"),
        r"See discussions, stats, and author profiles for this publication at: \S+|View publication stats",
    ),
    "navigation": (
        ("Skip to", "Back to top", "Open in a new tab", "View Article Online", "Click here for additional"),
        r"Skip to (?:main )?(?:content|navigation)|Back to top|Open in a new tab|View Article Online"
        r"|Click here for additional data file\.?",
    ),
    "badges": (("[![",), r"(?:\[!\[[^\]\n]{0,200}\]\([^)\s]*\)\]\([^)\s]*\) *)+"),
}
_BOILERPLATE_STARTS = frozenset(start[:3] for starts, _ in BOILERPLATE.values() for start in starts)
_BOILERPLATE_LINE = re.compile("|".join(f"(?:{pattern})" for _, pattern in BOILERPLATE.values()))


def _is_boilerplate(line: str) -> bool:
    return _BOILERPLATE_LINE.fullmatch(line) is not None
