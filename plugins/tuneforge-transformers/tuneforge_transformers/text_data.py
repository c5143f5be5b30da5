"""The dataset `text`: texts with one label each, tokenized for the model.

Shapes: n texts.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from tuneforge import Data, OptionError, Split, UsageError, component, ge, gt, hookimpl, option
from tuneforge.plugin import Check
from tuneforge.sklearn import data_from_arrays
from tuneforge_transformers import pretrained as source
from tuneforge_transformers.text import PackedTokenizer, TextInputs, unpack_tokenizer
from tuneforge_transformers.text_files import TextSplit, read_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from tuneforge import Run

_FRACTION = Check("greater than 0 and less than 1", lambda value: bool(0 < value < 1))
_ONE_CHARACTER = Check("one character", lambda text: len(text) == 1, {"minLength": 1, "maxLength": 1})
_WHERE = "--data.tokenizer"
_MAX_LENGTH = 512  # default limit in tokens; many tokenizers do not know the limit of their model
_PAD_TO_MULTIPLE_OF = 8  # matrix multiplications are faster for such lengths


@component(api=1)
class TextData:
    """Texts with one label each: a CSV file with columns of texts and labels, or a folder of .txt files per class.

    A folder may contain train.csv, val.csv and test.csv, or such folders; a missing split is taken from train.
    """

    path: Path = option(help="The CSV file or the folder.")
    text: str = option(default="text", help="Column of the text, in a CSV file and in rows to predict.")
    label: str = option(default="label", help="Column of the label in a CSV file.")
    tokenizer: str = option(default="", help="Folder or repository of the tokenizer. Empty: that of the model.")
    max_length: int | None = option(
        default=None,
        help="Maximum tokens of a text. None: as many as the longest text has, at most 512 or the model's limit.",
        check=ge(4),
    )
    max_chars: int = option(default=1_000_000, help="Maximum length of a text, in characters.", check=gt(0))
    val: float = option(default=0.15, help="Fraction of each class for validation.", check=_FRACTION)
    test: float = option(default=0.15, help="Fraction of each class for the test.", check=_FRACTION)
    delimiter: str | None = option(
        default=None, help="Character between the cells of a CSV file. Default: detected.", check=_ONE_CHARACTER
    )

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing to train on", fix="lower them")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read and tokenize the texts and split them, stratified by class.

        A finished run that is evaluated on other texts keeps its tokenizer, length and classes, and a resumed run those
        of its run directory.

        Raises:
            DataError: The texts cannot be used; the message names file and line.
            UsageError: No tokenizer was found.
        """
        parts = read_texts(
            self.path,
            text=self.text,
            label=self.label,
            delimiter=self.delimiter,
            max_chars=self.max_chars,
        )
        texts = [text for part in parts.values() for text in part.texts]
        inputs = _get_stored_inputs(run) or self._build_inputs(run, texts)
        labels = {split: np.array(part.labels) for split, part in parts.items()}
        stored = {split: inputs.encode(part.texts) for split, part in parts.items()}
        arrays = data_from_arrays(
            stored["train"], labels["train"], val=self.val, test=self.test,
            x_val=stored.get("val"), y_val=labels.get("val"), x_test=stored.get("test"), y_test=labels.get("test"),
        )  # fmt: skip
        data = arrays.data_prepare(run)
        splits = {
            id(split): _with_text_ids(split, parts.get(name, parts["train"])) for name, split in data.splits().items()
        }
        return attrs.evolve(
            data,
            train=splits[id(data.train)],
            val=splits[id(data.val)],
            test=splits[id(data.test)],
            inputs=inputs,
            notes=(_describe_lengths(inputs, texts),),
        )

    def _build_inputs(self, run: Run, texts: list[str]) -> TextInputs:
        """Return the inputs component of a new run."""
        pretrained = self._load_tokenizer(run)
        tokenizer = pretrained.backend_tokenizer
        if self.max_length is None:
            longest = -(-int(_count_tokens(tokenizer, texts).max()) // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
            length = min(longest, pretrained.model_max_length, _MAX_LENGTH)
        else:
            length = self.max_length
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(
            length=length,
            direction=pretrained.padding_side,
            pad_id=pretrained.pad_token_id,
            pad_token=pretrained.pad_token,
        )
        return TextInputs(
            tokenizer=PackedTokenizer.pack(tokenizer),
            max_length=length,
            column=self.text,
            max_chars=self.max_chars,
        )

    def _load_tokenizer(self, run: Run) -> PreTrainedTokenizerBase:
        """Load the tokenizer of `self.tokenizer`, or that of the model.

        Raises:
            UsageError: There is neither, or the tokenizer is not of the tokenizers library, or it has no padding token.
        """
        options = run.config.model.options
        name = self.tokenizer or str(options.get("pretrained", ""))
        if not name:
            raise UsageError(
                "texts need the tokenizer of a model", where=_WHERE, fix="name its folder: --data.tokenizer FOLDER"
            )
        revision = "main" if self.tokenizer else str(options.get("revision", "main"))
        folder = source.resolve_model_directory(name, revision=revision, files=source.TOKENIZER_FILES, where=_WHERE)
        from transformers import AutoTokenizer

        with source.silence_transformers():
            try:
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # noqa: BLE001 - tokenizers raise many kinds of exceptions for broken files
                raise _no_tokenizer_error(folder, str(error).strip().partition("\n")[0]) from None
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise _no_tokenizer_error(folder, f"{type(tokenizer).__name__} is not of the tokenizers library")
        if tokenizer.pad_token_id is None:
            raise _no_tokenizer_error(folder, "it has no token for padding")
        return tokenizer


def _get_stored_inputs(run: Run) -> TextInputs | None:
    """Return the inputs component of a finished run that is loaded, or of a run that is resumed; else None."""
    if run.restoring:
        return run.data.inputs if isinstance(run.data.inputs, TextInputs) else None
    model_file = None if run.run_dir is None else run.run_dir / "model.json"
    if model_file is None or not model_file.is_file():
        return None
    return TextInputs(**json.loads(model_file.read_text(encoding="utf-8"))["inputs"]["options"])


def _count_tokens(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int64]:
    """Count the tokens of each text (n,); this turns off truncation and padding of the tokenizer."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return np.array([len(each.ids) for each in tokenizer.encode_batch(texts)], dtype=np.int64)


def _describe_lengths(inputs: TextInputs, texts: list[str]) -> str:
    """Return a sentence on the lengths of the texts and on how many are truncated."""
    lengths = _count_tokens(copy.deepcopy(unpack_tokenizer(inputs.tokenizer)), texts)
    median, num_truncated = int(np.median(lengths)), int((lengths > inputs.max_length).sum())
    sentence = f"texts have {median} tokens (median), at most {lengths.max()}; the limit is {inputs.max_length}"
    return sentence + (f", so {num_truncated} text(s) are truncated" if num_truncated else "")


def _no_tokenizer_error(folder: Path, why: str) -> UsageError:
    return UsageError(f"'{folder}' has no tokenizer that can be used", where=_WHERE, why=why, fix="name another folder")


def _with_text_ids(split: Split, texts: TextSplit) -> Split:
    """Return the split with the ids of its texts; its own ids are row numbers of the split that it was taken from."""
    ids = [texts.ids[int(split.id_of(row))] for row in range(len(split))]
    return Split(split.fetch(torch.arange(len(split))), split.targets, ids=ids)
