"""Text written by models and files, made safe to print."""

from __future__ import annotations

import unicodedata

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_KEPT = "\n\t\u200c\u200d"
"""Besides line ends and tabs the joiners: Arabic, Indic scripts and emoji are written with them."""


def visible(text: str) -> str:
    """`text` with control characters and bidi overrides as escapes; newlines and tabs stay.

    A terminal would obey them, a reader would not see them.
    """
    return "".join(_escaped(c) if _is_hidden(c) else c for c in text)


def _is_hidden(c: str) -> bool:
    return c not in _KEPT and unicodedata.category(c) in _HIDDEN


def _escaped(c: str) -> str:
    code = ord(c)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
