"""A form with files (RFC 7578), as OpenAI's client sends a picture: its parts, by name.

The body has its bound from the gate, so it is taken apart as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import BytesHeaderParser

from edge_agent.server.errors import refuse

MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class FormPart:
    """One field: a text, or a file where it has a name of one."""

    name: str
    content: bytes
    is_file: bool


def read_form(content_type: str, body: bytes) -> list[FormPart]:
    """Raises RequestFault for what is no form."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary or not boundary.isascii():
        raise refuse("the form names no boundary", None)
    first, *pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    if first or not pieces or not pieces[-1].startswith(b"--"):
        raise refuse("the form does not end, or has no parts", None)
    if len(pieces) > MAX_PARTS + 1:
        raise refuse(f"the form has {len(pieces) - 1} parts; at most {MAX_PARTS}", None)
    return [_read_part(piece) for piece in pieces[:-1]]


def _read_part(piece: bytes) -> FormPart:
    head, separator, content = piece.partition(b"\r\n\r\n")
    header = BytesHeaderParser().parsebytes(head.lstrip())
    name = header.get_param("name", header="content-disposition")
    if not separator or not isinstance(name, str):
        raise refuse("a part of the form has no name", None)
    return FormPart(name.removesuffix("[]"), content, header.get_filename() is not None)


def to_json(parts: Iterable[FormPart], texts: set[str]) -> bytes:
    """The fields that are no files as a JSON object: numbers as such, unless they are texts."""
    return json.dumps({part.name: _read_value(part, texts) for part in parts}).encode()


def _read_value(part: FormPart, texts: set[str]) -> object:
    try:
        text = part.content.decode()
    except UnicodeDecodeError as error:
        raise refuse(f"{part.name} is not UTF-8", part.name) from error
    if part.name in texts:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text
