"""A tokenizer for code and prose trained on the spot, and any tokenizer folder as a `Tokenize`.

The trained one lower-cases and splits identifiers: `readHTTPResponse_v2` is read, http, response, _, v, 2.
White space gives no tokens, so indentation is free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_services.schema import Item, Ragged, Undecodable, UsageError, text_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNKNOWN, START, MASK = "[PAD]", "[UNK]", "[CLS]", "[MASK]"
_SPECIAL = (PAD, UNKNOWN, START, MASK)
_BYTES = 256
_TEXTS_AT_ONCE = 1024  # what the tokenizer gives of a token, its text among it, takes a hundred times its id
# Between a lower-case letter or digit and a capital (camelCase), and before the last capital of a run where a
# word begins there (HTTPResponse). It has to run before lower-casing, hence as a normalizer.
_CAMEL_CASE = r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"
# Letters, up to three digits, underscores, or a run of punctuation; what is between them is white space.
_WORD = r"[\p{L}\p{M}]+|\p{N}{1,3}|_+|[^\s\p{L}\p{M}\p{N}_]+"


def train_bpe(texts: Iterable[str], vocabulary: int, folder: Path) -> None:
    """Trains a byte-level BPE of `vocabulary` tokens at most and writes it as a Transformers folder.

    Ids: 0 [PAD], 1 [UNK] (never produced: every byte is a token), 2 [CLS], which begins each text, 3 [MASK]. The same
    texts give the same files. Raises UsageError where the vocabulary has no room for a single merge.

    Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; byte-level as in
    Radford et al. 2019, section 2.2.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = _BYTES + len(_SPECIAL) + 1
    if vocabulary < smallest:
        raise UsageError(f"a vocabulary of {vocabulary} tokens is too small; byte-level BPE needs {smallest} or more")
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(_CAMEL_CASE), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, _SPECIAL.index(START))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        mask_token=MASK,
        padding_side="right",
    )
    wrapped.save_pretrained(folder)


class _Loaded(NamedTuple):
    """The Rust tokenizer, without the dictionaries that Transformers builds around it; ids of special tokens."""

    backend: Tokenizer
    special_ids: frozenset[int]


class FolderTokenizer:
    """The tokenizer of a folder with prompts and truncation, token for token what SentenceTransformer makes.

    folder      a Transformers tokenizer folder with a fast tokenizer
    max_tokens  special tokens and prompt included; longer texts are cut where the tokenizer's
                `truncation_side` says
    prompts     put in front of a text as text: by field ("query", "document"), or in its place by task and field
                ("sts-query"); a field without one has none

    It loads the folder when first used or pickled. What is unpickled has it: a data task needs neither the
    folder nor Transformers, whose import takes seconds. Raises UsageError where the folder has no fast tokenizer.
    """

    def __init__(self, folder: Path, max_tokens: int, prompts: Mapping[str, str]) -> None:
        self.folder, self.max_tokens, self.prompts = Path(folder), max_tokens, dict(prompts)
        named = {name: name.rpartition("-") for name in prompts}
        self._of_task = {(text_id(task), field): prompts[name] for name, (task, _, field) in named.items() if task}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": self._loaded}

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Ragged:
        """tasks: `schema.class_id` of each text's task; None: the field's own prompt. Undecodable: one is no text."""
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) < len(items):
            raise Undecodable("an image or a sound, and the model reads texts")
        of_texts = tasks if tasks is not None else itertools.repeat(None, len(texts))
        return self._encode([self.prompt(field, task) + text for text, task in zip(texts, of_texts, strict=True)])

    def prompt(self, field: str, task: int | None = None) -> str:
        """What is put in front of a text of this field and task."""
        prompt = None if task is None else self._of_task.get((task, field))
        return self.prompts.get(field, "") if prompt is None else prompt

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        """Leading tokens that a pooling without the prompt leaves out.

        As Sentence Transformers counts them: the prompt alone, special tokens included, less a last token
        that is special.
        """
        prompt = self.prompt(field, task)
        if not prompt:
            return 0
        ids = self._encode([prompt])[0]
        return len(ids) - int(ids[-1] in self._loaded.special_ids)

    def _encode(self, texts: list[str]) -> Ragged:
        firsts = range(0, max(len(texts), 1), _TEXTS_AT_ONCE)
        parts = [self._encode_some(texts[first : first + _TEXTS_AT_ONCE]) for first in firsts]
        return parts[0] if len(parts) == 1 else Ragged.concat(parts)

    def _encode_some(self, texts: list[str]) -> Ragged:
        lists = [encoding.ids for encoding in self._loaded.backend.encode_batch_fast(texts)]
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        values = np.fromiter(itertools.chain.from_iterable(lists), np.int32, offsets[-1])
        return Ragged(values, offsets)

    @cached_property
    def _loaded(self) -> _Loaded:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.folder} holds no tokenizer: {str(error).splitlines()[0]}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UsageError(f"the tokenizer of {self.folder} has no fast form (tokenizer.json); convert it")
        backend, side = tokenizer.backend_tokenizer, tokenizer.truncation_side
        backend.no_padding()
        backend.enable_truncation(self.max_tokens, strategy="longest_first", direction=side)
        return _Loaded(backend, frozenset(tokenizer.all_special_ids))
