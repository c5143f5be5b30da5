"""`--data text`: texts with a label each, tokenized as the model wants them.

Shapes: n texts, t tokens of each.
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
from tuneforge_transformers.text_files import SPLITS, TextSplit, read_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from tuneforge import Run

_FRACTION = Check("greater than 0 and less than 1", lambda value: bool(0 < value < 1))
_ONE_CHARACTER = Check("one character", lambda text: len(text) == 1, {"minLength": 1, "maxLength": 1})
_WHERE = "--data.tokenizer"
_MAX_LENGTH = 512  # tokens, where neither the user nor the tokenizer says how many the model takes
_PAD_TO_MULTIPLE_OF = 8  # kernels like lengths that are multiples of it


@component(api=1)
class TextData:
    """Texts with a label each: a CSV file with a column of each, or a folder of .txt files for each class.

    A folder may hold train.csv, val.csv and test.csv, or folders of these names; what is missing is taken from train.
    """

    path: Path = option(help="The CSV file, or the folder.")
    text_column: str = option(default="text", help="Column of the text, in a CSV and in rows that are to be answered.")
    label_column: str = option(default="label", help="Column of the label, in a CSV.")
    tokenizer: str = option(default="", help="Folder or repository of the tokenizer; empty: that of the model.")
    max_length: int | None = option(
        default=None, help="Most tokens of a text; none: as many as the longest has and the model takes.", check=ge(4)
    )
    max_chars: int = option(default=1_000_000, help="Longest text that is read, in characters.", check=gt(0))
    val: float = option(default=0.15, help="Share of each class for validation.", check=_FRACTION)
    test: float = option(default=0.15, help="Share of each class for the test.", check=_FRACTION)
    delimiter: str = option(default=",", help="What separates the cells of a CSV.", check=_ONE_CHARACTER)

    def __attrs_post_init__(self) -> None:
        if self.val + self.test >= 1:
            raise OptionError(f"val {self.val} and test {self.test} leave nothing to train on", fix="lower them")

    @hookimpl
    def data_prepare(self, run: Run) -> Data:
        """Read, tokenize and divide; each class is divided alike.

        Where a tuned model looks at other texts, its tokenizer, its length and its classes are kept; a run that goes
        on keeps those that its folder holds.

        Raises:
            DataError: The texts cannot be read or learnt from; the message names file and line.
            UsageError: There is no tokenizer.
        """
        parts = read_texts(
            self.path,
            text=self.text_column,
            label=self.label_column,
            delimiter=self.delimiter,
            max_chars=self.max_chars,
        )
        texts = [text for part in parts.values() for text in part.texts]
        inputs = _get_stored_inputs(run) or self._build_inputs(run, texts)
        answers = {split: np.array(part.labels) for split, part in parts.items()}
        stored = {split: inputs.encode(part.texts) for split, part in parts.items()}
        arrays = data_from_arrays(
            stored["train"], answers["train"], val=self.val, test=self.test,
            x_val=stored.get("val"), y_val=answers.get("val"), x_test=stored.get("test"), y_test=answers.get("test"),
        )  # fmt: skip
        data = arrays.data_prepare(run)
        train, val, test = (
            _with_text_ids(split, parts.get(name, parts["train"]))
            for name, split in data.splits().items()
            if name in SPLITS
        )
        return attrs.evolve(
            data, train=train, val=val, test=test, inputs=inputs, notes=(_describe_lengths(inputs, texts),)
        )

    def _build_inputs(self, run: Run, texts: list[str]) -> TextInputs:
        """The contract of the inputs of a new run."""
        whole = self._load_tokenizer(run)
        tokenizer = whole.backend_tokenizer
        if self.max_length is None:
            longest = -(-int(_count_tokens(tokenizer, texts).max()) // _PAD_TO_MULTIPLE_OF) * _PAD_TO_MULTIPLE_OF
            kept = min(longest, whole.model_max_length, _MAX_LENGTH)
        else:
            kept = self.max_length
        tokenizer.enable_truncation(kept)
        tokenizer.enable_padding(
            length=kept, direction=whole.padding_side, pad_id=whole.pad_token_id, pad_token=whole.pad_token
        )
        return TextInputs(
            tokenizer=PackedTokenizer.pack(tokenizer),
            max_length=kept,
            text_column=self.text_column,
            max_chars=self.max_chars,
        )

    def _load_tokenizer(self, run: Run) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder that is named, or of the model's.

        Raises:
            UsageError: No folder is named, or it holds no tokenizer that transformers can make fast, or one that
                cannot pad.
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
                found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # noqa: BLE001 - each kind of tokenizer raises what its files make it raise
                raise _no_tokenizer_error(folder, str(error).strip().partition("\n")[0]) from None
        if not hasattr(found, "backend_tokenizer"):
            raise _no_tokenizer_error(folder, f"{type(found).__name__} is not of the tokenizers library")
        if found.pad_token_id is None:
            raise _no_tokenizer_error(folder, "it has no token for padding")
        return found


def _get_stored_inputs(run: Run) -> TextInputs | None:
    """The contract of a run that was begun before: of a tuned model, or as the folder of a run that goes on has it."""
    if run.restoring:
        return run.data.inputs if isinstance(run.data.inputs, TextInputs) else None
    record = None if run.run_dir is None else run.run_dir / "model.json"
    if record is None or not record.is_file():
        return None
    return TextInputs(**json.loads(record.read_text(encoding="utf-8"))["inputs"]["options"])


def _count_tokens(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int64]:
    """Tokens of each text (n,); truncation and padding are off from here on."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return np.array([len(each.ids) for each in tokenizer.encode_batch(texts)], dtype=np.int64)


def _describe_lengths(inputs: TextInputs, texts: list[str]) -> str:
    """What a person should know about the lengths of the texts."""
    lengths = _count_tokens(copy.deepcopy(unpack_tokenizer(inputs.tokenizer)), texts)
    middle, cut = int(np.median(lengths)), int((lengths > inputs.max_length).sum())
    sentence = f"texts have {middle} tokens in the middle and {lengths.max()} at most; {inputs.max_length} are kept"
    return sentence + (f", so {cut} text(s) are cut" if cut else "")


def _no_tokenizer_error(folder: Path, why: str) -> UsageError:
    return UsageError(f"'{folder}' has no tokenizer that can be used", where=_WHERE, why=why, fix="name another folder")


def _with_text_ids(split: Split, texts: TextSplit) -> Split:
    """The split with the names of its texts: its own ids count rows of the part that it was taken from."""
    ids = [texts.ids[int(split.id_of(row))] for row in range(len(split))]
    return Split(split.fetch(torch.arange(len(split))), split.targets, ids=ids)
