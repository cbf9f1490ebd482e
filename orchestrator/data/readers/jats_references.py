"""The reference list of a JATS article."""

from __future__ import annotations

from orchestrator.data.readers import citations, markup, xml
from orchestrator.data.readers.citations import Bibliography
from orchestrator.data.readers.xml import Element


def read(article: Element) -> Bibliography:
    return Bibliography({ref.get("id") or "": _works(ref) for ref in article.iter("ref")})


def _works(ref: Element) -> list[str]:
    """What an entry cites; chemists cite several works in one."""
    return [_work(entry) for entry in ref.iter("element-citation", "mixed-citation", "nlm-citation", "citation")]


def _work(citation: Element) -> str:
    source = _plain(citation.find(".//source"))
    title = next(filter(None, (_plain(citation.find(f".//{tag}")) for tag in _TITLES)), "")
    author = _first_author(citation)
    if not title and citation.get("publication-type") == "journal":
        return (
            citations.work("", author, source, _plain(citation.find("volume")), _plain(citation.find("fpage")))
            if source
            else ""
        )
    if title or source:
        return citations.work(title or source, author)
    return citations.work_from_text(xml.text_of(citation))


_TITLES = ("article-title", "chapter-title", "part-title", "data-title")


def _first_author(citation: Element) -> str:
    """Family name of the first author, else the group that wrote it, else the first editor."""
    groups = [group for group in citation.iter("person-group") if group.get("person-group-type") != "editor"]
    for place in (*groups[:1], citation):
        for name in place.iter("surname", "string-name", "collab"):
            if name.tag != "string-name" or name.find("surname") is None:
                return _plain(name)
    return ""


def _plain(node: Element | None) -> str:
    return markup.one_line(xml.text_of(node))
