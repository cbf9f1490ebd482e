from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import Counter

import pytest

from orchestrator.corpus_config import QualityConfig
from orchestrator.data import quality, steps
from tests.conftest import SHARED_DATA
from tests.languages import PARAGRAPHS

DEFAULTS = QualityConfig()
PROSE = PARAGRAPHS["en"]
NOUNS = (
    "laser pump polymer catalyst supplier steel valve powder pharmacy casino bonus serial keygen hotel flights".split()
)
MENU = (
    "Home|About us|Products|Contact us|My account|Sign in|Terms of use|Privacy policy|Cookie settings|Site map|Careers"
)


def rule(limit: str, value: float) -> QualityConfig:
    """One rule alone."""
    return QualityConfig.model_validate({**dict.fromkeys(QualityConfig.model_fields), limit: value})


def junk() -> dict[str, str]:
    """Pages that nobody should learn from, all of them long enough."""
    chance = random.Random(0)
    script = 'var n=function(e){return e.replace(/[x]+$/g,"")},r={init:function(){this.a=1;for(;i<e;i++){t[i]=n}}};'
    teasers = (f"The {chance.choice(NOUNS)} of the {chance.choice(NOUNS)} that was sold and then..." for _ in range(40))
    return {
        "words in a row": " ".join(chance.choice(NOUNS) for _ in range(200)),
        "keywords": ", ".join(chance.choice(NOUNS) for _ in range(200)),
        "hashtags": PROSE + " ".join("#" + chance.choice(NOUNS) for _ in range(40)),
        "menu": "\n".join(MENU.split("|") * 2),
        "names": "\n".join(f"{a} {b}" for a in ("Anna", "Wei", "Olga", "Jean") for b in NOUNS),
        "letters of a scan": " ".join(PROSE),
        "specks of a scan": "\n".join("".join(chance.choices("|.,;:'~^_-lI1/ \\", k=50)) for _ in range(30)),
        "wrapped base64": base64.encodebytes(chance.randbytes(3000)).decode(),
        "embedded image": f"{PROSE} ![plot](data:image/png;base64,{base64.b64encode(chance.randbytes(3000)).decode()})",
        "hex dump": "\n".join(chance.randbytes(16).hex(" ") for _ in range(60)),
        "checksums": "\n".join(f"{hashlib.sha1(bytes([n])).hexdigest()}  file{n}.txt" for n in range(60)),
        "numbers": "\n".join(" ".join(f"{chance.random():.4f}" for _ in range(8)) for _ in range(60)),
        "table of numbers": "\n".join(
            "| " + " | ".join(f"{chance.random():.3f}" for _ in range(6)) + " |" for _ in range(60)
        ),
        "script": script * 20,
        "links": "\n".join(
            f"https://www.example.org/{chance.choice(NOUNS)}/{n}-{chance.choice(NOUNS)}.html" for n in range(60)
        ),
        "one line again and again": "Please enable JavaScript to view the comments.\n" * 40,
        "one phrase again and again": "The speed of the ice doubles in spring, " * 60,
        "one page again and again": (PROSE.replace("\n", " ") + " " + PROSE[::-1]) * 30,
        "teasers": "\n".join(teasers),
        "bullets": "\n".join(f"- The {noun} of the {chance.choice(NOUNS)} is {chance.random():.1f}." for noun in NOUNS),
        "lost characters": PROSE.replace("e", "\ufffd"),
        "log": "\n".join(f"12:{n % 60:02d}:11 INFO worker-{n} heartbeat ok latency={n * 3}ms" for n in range(200)),
    }


@pytest.mark.parametrize("kind", junk())
def test_the_defaults_drop_junk(kind: str) -> None:
    text = steps.clean(junk()[kind])
    assert len(text) >= 200
    assert quality.drop_reason(text, DEFAULTS) not in (None, "too short")


GOOD = {
    "formulas": "# The harmonic oscillator\n\n"
    + PROSE
    + "\n\n$$ m \\ddot{x} = -k x, \\quad \\omega^2 = k / m $$\n\nHere x is the "
    "displacement and k the stiffness. $$ x(t) = A \\cos(\\omega t + \\phi) $$ The phase depends on the start.",
    "table": PROSE
    + "\n\n| sample | T (K) | p (kPa) |\n| --- | --- | --- |\n"
    + "\n".join(f"| ice {n} | {250 + n} | {n * 7.3:.1f} |" for n in range(20)),
    "code": PROSE
    + "\n\n```python\n"
    + "".join(f"def step_{n}(x):\n    return x + {n}\n\n" for n in range(8))
    + "```\n"
    + PROSE,
    "doctest": "Return the mean of the values.\n\nExamples\n--------\n"
    + "\n".join(f">>> mean([{n}, {n + 2}])\n{n + 1}\n>>> for x in data:\n...     print(x)" for n in range(5))
    + "\n\nThe result is a float, and an empty list is an error. See also the median, which is less sensitive.",
    "sequence": PROSE + " The chain is [START_AMINO]" + "MKVLAAGIVGLW" * 60 + "[END_AMINO] and folds in water.",
    "reference": PROSE
    + "\n\n## References\n\n"
    + "\n".join(
        f"{n}. A. Author and B. Writer, On the ice of the glacier {n}, J. Glaciol. {n} ({1950 + n}) {n * 7}."
        for n in range(30)
    ),
}


@pytest.mark.parametrize("kind", GOOD)
def test_the_defaults_keep_what_science_is_written_in(kind: str) -> None:
    assert quality.drop_reason(steps.clean(GOOD[kind]), DEFAULTS) is None


@pytest.mark.parametrize("code", PARAGRAPHS)
def test_the_defaults_keep_every_language(code: str) -> None:
    assert quality.drop_reason("\n\n".join(f"{n}. {PARAGRAPHS[code]}" for n in range(3)), DEFAULTS) is None


def test_each_rule_has_a_limit_and_each_limit_a_rule() -> None:
    assert sorted(rule.limit for rule in quality.RULES) == sorted(QualityConfig.model_fields)


def test_a_rule_that_is_off_drops_nothing() -> None:
    off = QualityConfig.model_validate(dict.fromkeys(QualityConfig.model_fields))
    assert [quality.drop_reason(text, off) for text in (*junk().values(), "", "x")] == [None] * (len(junk()) + 2)


@pytest.mark.parametrize(
    ("limit", "edge", "text", "reason"),
    [
        ("min_characters", 5, "12345", "too short"),
        ("max_characters", 5, "12345", "too long"),
        ("min_mean_word_length", 2.5, "ab cde", "mean word length"),
        ("max_mean_word_length", 2.5, "ab\tcde", "mean word length"),
        ("min_plain_word_share", 0.5, "two (words), x1 3", "few plain words"),
        ("min_prose_share", 0.5, "the ice melts. fast", "no prose"),
        ("max_digit_share", 0.25, "a1 b2 cdef", "digits"),
        ("max_symbol_word_ratio", 0.5, "one #two three... four", "hashtags and ellipses"),
        ("max_short_line_share", 0.375, "three short words\n\na line of five words", "short lines"),
        ("max_bullet_line_share", 0.5, "- one\n  * two\nthree\nfour", "bullet lines"),
        ("max_ellipsis_line_share", 0.5, "one...\n\ntwo…\nthree\nfour", "ellipsis lines"),
        ("max_duplicate_line_share", 0.25, "abcd\n  abcd\nefghijkl", "duplicate lines"),
        ("max_top_ngram_share", 0.5, "ab cd ab cd efghijkl", "repeated words"),
        ("max_unbroken_share", 0.5, "x" * 300 + " " + "ab " * 150, "unbroken text"),
        ("max_replacement_share", 0.25, "a\ufffd bc", "broken characters"),
    ],
)
def test_the_limit_itself_is_within_the_rule(limit: str, edge: float, text: str, reason: str) -> None:
    beyond = edge * (1.01 if limit.startswith("min_") else 0.99)
    assert quality.drop_reason(text, rule(limit, edge)) is None
    strict = rule(limit, beyond if isinstance(edge, float) else edge + (1 if limit.startswith("min_") else -1))
    assert quality.drop_reason(text, strict) == reason


def test_repetition_is_found_at_any_distance() -> None:
    text = PROSE + "".join(random.Random(1).choices("abcdefgh ", k=3000))
    assert quality.drop_reason(text * 8, rule("max_compression_ratio", 4)) == "repetition"
    assert quality.drop_reason(text, rule("max_compression_ratio", 4)) is None


def test_a_long_text_is_not_dropped_for_its_sample() -> None:
    """Tables at the very places that the sample takes, prose everywhere else."""
    step = 8000
    block = " 12.5 17.1" * (quality.PIECE_CHARACTERS // 10) + " " + PROSE * 40
    text = "".join(block[:step] for _ in range(quality.SAMPLE_PIECES))
    sampled = quality._Page(text, DEFAULTS)
    assert (
        quality._plain_word_share(sampled) < 0.2 < quality._plain_word_share(quality._Page(text, DEFAULTS, whole=True))
    )
    assert quality.drop_reason(text, rule("min_plain_word_share", 0.2)) is None


def shared_documents() -> dict[str, list[str]]:
    found = {}
    for file in sorted((SHARED_DATA / "corpus").glob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            found[file.stem] = [json.loads(line)["text"] for line in lines]
    return found


@pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"no {SHARED_DATA}")
def test_the_defaults_keep_real_papers_and_textbooks() -> None:
    for source, texts in shared_documents().items():
        reasons = Counter(quality.drop_reason(steps.clean(text), DEFAULTS) for text in texts)
        dropped = reasons.total() - reasons[None] - reasons["too short"]
        assert dropped < 0.01 * len(texts), f"{source}: {reasons}"
