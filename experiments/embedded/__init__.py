"""The embedded setting: a small byte-level decoder, pretrained on English prose, and Python code to adapt it to.

Both texts are part of every Python installation: prose is the language reference of `pydoc_data.topics` and the
docstrings of the standard library, code is the source of the standard library. Nothing is downloaded.
"""

from embedded.model import CONTEXT, WEIGHTS, ByteDecoder, Output, pretrained, provenance, tiny
from embedded.texts import Chunks, batches, code, digest, docstrings, held_out, library, prose

__all__ = [
    "CONTEXT",
    "WEIGHTS",
    "ByteDecoder",
    "Chunks",
    "Output",
    "batches",
    "code",
    "digest",
    "docstrings",
    "held_out",
    "library",
    "pretrained",
    "prose",
    "provenance",
    "tiny",
]
