"""The inputs component `text`: converts texts, files and rows to token ids.

Shapes: b texts in a batch, t tokens of each, including padding.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tuneforge import DataError, Inputs, TensorTree, component, gt, map_inputs, option
from tuneforge.errors import suggest_name
from tuneforge.plugin import TableFile, is_json_name, read_json_rows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"


class PackedTokenizer(str):
    """The compressed JSON of a tokenizer; its `repr` shows the size, because error messages contain option values."""

    __slots__ = ()

    @classmethod
    def pack(cls, tokenizer: Tokenizer) -> PackedTokenizer:
        """Compress a tokenizer with its truncation and padding."""
        return cls(base64.b64encode(zlib.compress(tokenizer.to_str().encode(), 9)).decode())

    def __repr__(self) -> str:
        return f"<a tokenizer of {len(self):,} bytes>"


@component(api=1)
class TextInputs(Inputs):
    """Texts, stored as token ids and attention mask, padded to one length.

    The tokenizer itself is an option, so that a run directory is all that inference needs.
    """

    tabular = True

    tokenizer: str = option(help="The tokenizer's JSON with its truncation and padding, compressed (zlib, base64).")
    max_length: int = option(help="Tokens of each text, including special tokens and padding.", check=gt(0))
    column: str = option(default="text", help="Column of the text in a row.")
    max_chars: int = option(default=1_000_000, help="Maximum length of a text, in characters.", check=gt(0))

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", PackedTokenizer(self.tokenizer))

    def decode(self, raw: Any) -> dict[str, Tensor]:
        """Tokenize one text: `input_ids` int32 (t,) and `attention_mask` uint8 (t,).

        Args:
            raw: A text, a row with a text, the path of a text file, or bytes: a text in UTF-8 or a row in JSON.

        Raises:
            DataError: `raw` contains no text, is not UTF-8, or is too long.
        """
        return {name: tensor[0] for name, tensor in self.encode([self.extract_text(raw)]).items()}

    def read_file(self, source: Path | bytes, *, name: str = "") -> Iterator[tuple[str, Any]]:
        """Yield the rows of a CSV file or a file of JSON lines; any other file is one text.

        Raises:
            DataError: The file cannot be read.
        """
        name = name or str(source)
        if not name.lower().endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
            yield name, source
            return
        rows = (
            read_json_rows(source, name=name)
            if is_json_name(name)
            else TableFile(source, name=name, columns=(self.column,)).rows()
        )
        for row in rows:
            yield f"{name}:{row.line}", row.error or row.cells

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts: `input_ids` int32 (b, t) and `attention_mask` uint8 (b, t)."""
        encodings = unpack_tokenizer(self.tokenizer).encode_batch(list(texts))
        return {
            INPUT_IDS: torch.tensor([each.ids for each in encodings], dtype=torch.int32),
            ATTENTION_MASK: torch.tensor([each.attention_mask for each in encodings], dtype=torch.uint8),
        }

    def preprocess(self, samples: TensorTree) -> TensorTree:
        """Convert ids and mask to int64 (b, t)."""
        return map_inputs(samples, Tensor.long)

    def render_text(self, sample: TensorTree) -> str:
        """Decode the first 200 characters of a stored text."""
        assert isinstance(sample, Mapping)
        words: str = unpack_tokenizer(self.tokenizer).decode(sample[INPUT_IDS][sample[ATTENTION_MASK].bool()].tolist())
        return words[:200]

    def extract_text(self, raw: Any) -> str:
        """Return the text of any form that `decode` accepts.

        Raises:
            DataError: There is no text, or it is too long.
        """
        where = str(raw) if isinstance(raw, Path) else ""
        if isinstance(raw, Path):
            raw = _read_bytes(raw, limit=4 * self.max_chars)
        if isinstance(raw, (bytes, bytearray, memoryview)):
            raw = self._parse_bytes(bytes(raw), where)
        if isinstance(raw, Mapping):
            if self.column not in raw:
                fix = suggest_name(self.column, map(str, raw))
                raise DataError(f"column '{self.column}' is missing", where=where or "the row", fix=fix)
            raw = raw[self.column]
        if not isinstance(raw, str) or not raw.strip():
            what = "an empty text" if isinstance(raw, str) else f"{type(raw).__name__} is not a text"
            raise DataError(what, where=where, fix="give a text, a text file, or a row with a text")
        if len(raw) > self.max_chars:
            what = f"a text of {len(raw):,} characters"
            raise DataError(what, where=where, why=f"at most {self.max_chars:,} are read", fix="shorten it")
        return raw

    def _parse_bytes(self, raw: bytes, where: str) -> Any:
        """Return a row if the bytes are a JSON object with the column, else the text."""
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError("this is not a text", where=where, why=str(error), fix="give UTF-8") from None
        try:
            row = json.loads(text) if text.lstrip().startswith("{") else None
        except (ValueError, RecursionError):
            return text
        return row if isinstance(row, dict) and self.column in row else text


@functools.lru_cache(maxsize=8)
def unpack_tokenizer(packed: str) -> Tokenizer:
    """Return the tokenizer that `PackedTokenizer.pack` compressed.

    Raises:
        DataError: `packed` is not a compressed tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(zlib.decompress(base64.b64decode(packed, validate=True)).decode())
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain Exception
        raise DataError(
            "the option 'tokenizer' is not a compressed tokenizer", why=str(error), fix="restore model.json"
        ) from None


def _read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a file of at most `limit` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DataError("cannot read the file", where=str(path), why=error.strerror or str(error)) from None
    if len(content) > limit:
        raise DataError("the file is too large", where=str(path), why=f"at most {limit:,} bytes are read")
    return content
