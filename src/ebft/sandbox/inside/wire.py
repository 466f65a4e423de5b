"""Plain data as bytes, and frames of bytes through pipes: all that passes between processes that distrust each other.

Not pickle, which runs what it reads, nor JSON or Python literals, which lose tuples and sets or infinities, and whose
modules take longer to import than most programs run.
"""

import os

TYPE_CHECKING = False  # as a checker reads it; to import typing takes longer than most programs run
if TYPE_CHECKING:
    from typing import Any

TYPES = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, frozenset, int, list, object, set, str, tuple, type(None))
}
CONTAINERS = ((list, b"["), (tuple, b"("), (set, b"{"), (frozenset, b"<"))
MAKE = {tag: kind for kind, tag in CONTAINERS}


def encode(value, reference) -> bytes:
    """Bytes of plain data: None, bool, int, float, complex, str, bytes, list, tuple, dict, set, and their types.

    Subclasses become what they are a kind of: a Counter a dict, an IntEnum an int.

    Args:
        value: What to encode.
        reference: Called with anything else; returns the number that stands for it.
    """
    parts = []
    _encode(value, reference, parts)
    return b"".join(parts)


def _encode(value, reference, parts) -> None:
    if value is None or value is True or value is False:
        parts.append(str(value)[0].encode())
    elif isinstance(value, int):
        parts.append(b"i%s;" % int.__format__(value, "x").encode())
    elif isinstance(value, float):
        parts.append(b"f%s;" % float.hex(value).encode())
    elif isinstance(value, complex):
        parts.append(b"c%s;%s;" % (value.real.hex().encode(), value.imag.hex().encode()))
    elif isinstance(value, str):
        data = str.encode(value, "utf-8", "surrogatepass")
        parts.append(b"s%d:%s" % (len(data), data))
    elif isinstance(value, (bytes, bytearray)):
        parts.append(b"b%d:%s" % (len(value), bytes(value)))
    elif isinstance(value, dict):
        parts.append(b"d%d:" % len(value))
        for key, item in value.items():
            _encode(key, reference, parts)
            _encode(item, reference, parts)
    elif isinstance(value, type) and TYPES.get(value.__name__) is value:
        parts.append(b"n%s;" % value.__name__.encode())
    else:
        for kind, tag in CONTAINERS:
            if isinstance(value, kind):
                parts.append(tag + b"%d:" % len(value))
                for item in value:
                    _encode(item, reference, parts)
                return
        parts.append(b"o%x;" % reference(value))


def decode(data: bytes, referred) -> "Any":
    """The value that `encode` was given.

    Args:
        data: What may come from a hostile process.
        referred: Called with the number of a reference; returns what to put in its place.

    Raises:
        ValueError: Not the bytes of a value (or one of its kinds: OverflowError, TypeError, RecursionError).
    """
    value, end = _decode(data, 0, referred)
    if end != len(data):
        raise ValueError("bytes after the end of a value")
    return value


def _decode(data, at, referred) -> "tuple[Any, int]":
    tag, at = data[at : at + 1], at + 1
    if tag in (b"N", b"T", b"F"):
        return {b"N": None, b"T": True, b"F": False}[tag], at
    end = data.index(b":" if tag in b"sbd[({<" else b";", at)
    text, at = data[at:end].decode("ascii"), end + 1
    if tag == b"i":
        return int(text, 16), at
    if tag == b"o":
        return referred(int(text, 16)), at
    if tag == b"f":
        return float.fromhex(text), at
    if tag == b"c":
        end = data.index(b";", at)
        return complex(float.fromhex(text), float.fromhex(data[at:end].decode("ascii"))), end + 1
    if tag == b"n":
        if text not in TYPES:
            raise ValueError("unknown type")
        return TYPES[text], at
    count = int(text)
    if count < 0 or count > len(data) - at:
        raise ValueError("a length beyond the end")
    if tag in (b"s", b"b"):
        piece = data[at : at + count]
        return piece if tag == b"b" else piece.decode("utf-8", "surrogatepass"), at + count
    if tag != b"d" and tag not in MAKE:
        raise ValueError("unknown tag")
    items = []
    for _ in range(2 * count if tag == b"d" else count):
        item, at = _decode(data, at, referred)
        items.append(item)
    return dict(zip(items[::2], items[1::2])) if tag == b"d" else MAKE[tag](items), at  # noqa: B905 as long


def bytes_of(text: str) -> bytes:
    """Text as bytes; halves of surrogate pairs, which models do write, are let through for the compiler to refuse."""
    return text.encode("utf-8", "surrogatepass")


def text_of(data: bytes) -> str:
    """The text that `bytes_of` was given."""
    return data.decode("utf-8", "surrogatepass")


def frame(data: bytes) -> bytes:
    """Data with its length before it."""
    return len(data).to_bytes(8, "big") + data


def send(fd: int, data: bytes) -> None:
    """Write a frame, waiting as long as it takes.

    Raises:
        OSError: The other end is closed.
    """
    rest = memoryview(frame(data))
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int, most: int = 1 << 30) -> bytes:
    """Read a frame, waiting as long as it takes.

    Raises:
        EOFError: The other end is closed.
        ValueError: The frame is longer than `most` bytes.
    """
    size = int.from_bytes(_exactly(fd, 8), "big")
    if size > most:
        raise ValueError(f"more than {most >> 20} MiB of data at once")
    return _exactly(fd, size)


def _exactly(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError("the other process has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
