"""What goes wrong with files and values: cut off, bits flipped, lengths overwritten, parts doubled, values absurd."""

from __future__ import annotations

import random
import struct
import zlib


_EDGES = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
STRANGE_TEXTS = (
    "", " ", "\0", "a\0b", "\n", "\r\n", "﻿", "‮مرحبا بالعالم", "שלום", "🩻🫁", "👩🏽‍⚕️", "é", "Zalgơ̸̢͈̅",
    "\ud800", "a\udfffb", "𝔘𝔫𝔦", "\x1b[31m", "<image>", "<|mdm_mask|>", "<|eot_id|>", "{{ 7 * 7 }}", "{% raw %}",
    "../../etc/passwd", "/dev/zero", "nan", "-1", "1e400", "%s%n", "'; --", "\u2028", "\uffff", "\U0010ffff",
)  # fmt: skip


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with one to four things wrong with it."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        # Most of a format is decided at the beginning of a file.
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else min(rng.randrange(600), len(data))
        rng.choice(_BYTE_MUTATIONS)(data, place, rng)
    return bytes(data)


def _truncate(data, place, rng):
    del data[place:]


def _flip(data, place, rng):
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[rng.randrange(len(data)) if rng.random() < 0.5 else min(place, len(data) - 1)] ^= 1 << rng.randrange(8)


def _overwrite(data, place, rng):
    data[place : place + 16] = rng.randbytes(rng.randrange(1, 17))


def _set_number(data, place, rng):
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice((*_EDGES, rng.getrandbits(64))) % 256**size
    data[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))


def _insert(data, place, rng):
    data[place:place] = rng.randbytes(rng.choice((1, 2, 16, 300)))


def _delete(data, place, rng):
    del data[place : place + rng.choice((1, 2, 8, 100))]


def _double(data, place, rng):
    part = data[place : place + rng.choice((1, 8, 64, 1000))]
    target = rng.randrange(len(data) + 1)
    data[target:target] = part * rng.choice((1, 1, 50))


def _float(data, place, rng):
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, 1e38, -1e-38))
    data[place : place + 4] = struct.pack(rng.choice("<>") + "f", value)


_BYTE_MUTATIONS = (_truncate, _flip, _flip, _overwrite, _set_number, _set_number, _insert, _delete, _double, _float)


def mend_png(content: bytes) -> bytes:
    """The same PNG with right checksums, so that what is wrong inside its chunks is looked at."""
    data, place = bytearray(content), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data)


def strange_value(rng: random.Random, depth: int = 3):
    """A value of any JSON type, absurd ones included."""
    kinds = ["none", "bool", "int", "float", "text", "list", "dict"] if depth else ["none", "int", "text"]
    kind = rng.choice(kinds)
    if kind == "int":
        return rng.choice((0, 1, -1, 2, 10**9, -(10**9), 2**31, 2**63, 2**64, 10**40))
    if kind == "float":
        return rng.choice((0.0, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")))
    if kind == "text":
        return rng.choice((*STRANGE_TEXTS, "x" * rng.choice((1, 40, 5000))))
    if kind == "list":
        return [strange_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == "dict":
        return {rng.choice(("id", "image", "value", "type", "", "\0")): strange_value(rng, depth - 1) for _ in range(2)}
    return rng.random() < 0.5 if kind == "bool" else None


def mutate_value(value, rng: random.Random):
    """JSON data with one node, anywhere in it, replaced, removed, doubled or added to."""
    if rng.random() < 0.07 or not isinstance(value, (dict, list)) or not value:
        return strange_value(rng)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:place] + value[place + 1 :] if rng.random() < 0.5 else [*value, *value]
        return [*value[:place], mutate_value(value[place], rng), *value[place + 1 :]]
    name = rng.choice(list(value))
    if rng.random() < 0.1:
        return {key: each for key, each in value.items() if key != name}
    if rng.random() < 0.1:
        return {**value, rng.choice(("", "extra", "\ud800", name.upper())): strange_value(rng)}
    return {**value, name: mutate_value(value[name], rng)}
