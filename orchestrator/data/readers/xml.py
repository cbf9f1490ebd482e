"""XML from strangers: parsed without entities, network or unbounded depth, and read by local names."""

from __future__ import annotations

from collections.abc import Callable
from html.entities import html5
from typing import Any

from orchestrator.data.readers import Unreadable

Element = Any
"""An lxml element."""

XML_ID = "{http://www.w3.org/XML/1998/namespace}id"


def parse(data: bytes) -> Element:
    """The root element, without comments, processing instructions and namespaces (tags are local names).

    Nothing outside the data is loaded. Character names of the public DTDs (`&alpha;`) become characters; a document
    that declares entities of its own is refused, so that nothing can expand. libxml2 refuses more than 256 levels.

    Raises:
        Unreadable: broken xml, entity in xml, xml too deep.
    """
    from lxml import etree

    parser = etree.XMLParser(
        resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False, remove_comments=True, remove_pis=True
    )
    try:
        root = etree.fromstring(data.lstrip(), parser)
    except etree.XMLSyntaxError as error:
        raise Unreadable(_reason(str(error))) from None
    except ValueError:
        raise Unreadable("broken xml") from None
    dtd = root.getroottree().docinfo.internalDTD
    if dtd is not None and any(True for _ in dtd.iterentities()):
        raise Unreadable("entity in xml")
    for node in list(root.iter(etree.Entity)):
        _name_to_character(node)
    for element in root.iter(etree.Element):
        if element.tag[0] == "{":
            element.tag = element.tag.rpartition("}")[2]
    return root


def drop(element: Element) -> None:
    """Take an element out and leave the text behind it."""
    _replace(element, "")


def text_of(element: Element | None) -> str:
    """All text inside, without markup; empty for None."""
    return "" if element is None else "".join(element.itertext())


def mixed(element: Element, write: Callable[[Element], str]) -> str:
    """An element's text with each of its children written in place."""
    return (element.text or "") + "".join(write(child) + (child.tail or "") for child in element)


def _reason(error: str) -> str:
    if "depth" in error.lower():
        return "xml too deep"
    return "entity in xml" if "entity" in error.lower() else "broken xml"


def _name_to_character(node: Element) -> None:
    if f"{node.name};" not in html5:
        raise Unreadable("entity in xml")
    _replace(node, html5[f"{node.name};"])


def _replace(node: Element, text: str) -> None:
    text += node.tail or ""
    parent, before = node.getparent(), node.getprevious()
    if before is not None:
        before.tail = (before.tail or "") + text
    else:
        parent.text = (parent.text or "") + text
    parent.remove(node)
