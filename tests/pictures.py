"""Looking at what a PNG file shows."""

import struct
import zlib


def pixels(content: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and colours (red, green, blue) of a PNG of 8 bits a channel, with or without transparency."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, width, height, channels = 8, b"", 0, 0, 0
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8 and colour in (2, 6)
            channels = 3 if colour == 2 else 4
        data += body if kind == b"IDAT" else b""
        at += size + 12
    rows = _unfiltered(zlib.decompress(data), width * channels, channels)
    return width, height, {row[i : i + 3] for row in rows for i in range(0, len(row), channels)}


def _unfiltered(data: bytes, stride: int, channels: int) -> list[bytes]:
    """The rows of a PNG, its filters (None, Sub, Up, Average, Paeth) undone."""
    before, rows = bytearray(stride), []
    for start in range(0, len(data), stride + 1):
        kind, row = data[start], bytearray(data[start + 1 : start + 1 + stride])
        for i in range(stride if kind else 0):
            left, corner = (row[i - channels], before[i - channels]) if i >= channels else (0, 0)
            row[i] = (row[i] + _predicted(kind, left, before[i], corner)) % 256
        rows.append(bytes(row))
        before = row
    return rows


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind < 4:
        return (0, left, up, (left + up) // 2)[kind]
    near = left + up - corner
    return min((left, up, corner), key=lambda value: abs(near - value))
