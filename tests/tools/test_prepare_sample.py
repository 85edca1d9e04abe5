"""The embedded sample: cleaning, splits, near-duplicates, hashes, the fallback, and the same bytes twice."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cheapertraining.config import load_data_config
from cheapertraining.data import get_loader
from cheapertraining.data.shards import read_document_hashes, read_meta
from cheapertraining.data.tokenization import TokenizerWrapper
from cheapertraining.errors import UserError
from tools.prepare_sample import main
from tools.sample import (
    chat,
    conversations,
    faq,
    noise,
    packages,
    parliament,
    python_text,
    wiki,
    word_problem_worker,
    word_problems,
)
from tools.sample.build import MARKER, Options, prepare
from tools.sample.dedup import NearDuplicates
from tools.sample.documents import Document, clean_text, cut, hash_order, take
from tools.sample.splits import SPLITS, split_by_parent

ROOT = Path(__file__).resolve().parents[2]
SMALL = 120_000  # bytes of a source in the tests that make a whole sample


# ---- text and documents ----


def test_clean_text_normalises_line_ends_space_and_invisible_characters() -> None:
    assert clean_text("\ufeffe\u0301te\u0301  \r\n\r\n\r\n\r\nb\xa0c\u200b\x07 \rd \n") == "été\n\nb c\nd"


def test_cut_joins_blocks_up_to_the_target_and_loses_nothing() -> None:
    blocks = ["aaaa", "bbb", "c" * 30, "dd", "e"]
    pieces = cut(blocks, "\n", 10)
    assert pieces == ["aaaa\nbbb", "c" * 30, "dd\ne"]
    assert "\n".join(pieces) == "\n".join(blocks)


def test_take_keeps_whole_parents_up_to_the_budget() -> None:
    documents = [Document(f"p{i // 3}", "x" * 10) for i in range(30)]
    taken = take(documents, 100)
    parents = {document.parent for document in taken}
    assert len(taken) == 3 * len(parents) == 12  # the first four parents in hash order reach 100 bytes
    assert parents == set(hash_order(document.parent for document in documents)[:4])
    assert taken == [document for document in documents if document.parent in parents]


# ---- wiki ----

ARTICLE = """{{Infobox thing|name=Acid {{nested|x}}|size={{convert|3|km|mi}}}}
[[File:Acid.jpg|thumb|A picture of an [[acid]] with a [[link|caption]].]]
An '''acid''' ({{lang-la|acidus}}, {{IPA|abc}}) is a [[molecule]]<ref name="x">A book, p. 3.</ref> that
gives a [[Hydron (chemistry)|hydron]]<ref name=y /> away; {{convert|5|km|mi}} of pipes &mdash; at most.<!-- no -->
A paragraph whose formula <math>pH = {-}\\log a</math> is gone cannot be read and so is not kept at all.
{| class="wikitable"
| a cell that is long enough to be taken for a paragraph if tables were not removed || b
{| nested
|}
|}
* [[A list item|an item]] that is long enough to be taken for a paragraph if lists were kept
==Strength==
''Strong'' acids give all of their hydrons to [http://example.org/water water], weak acids only some.
==See also==
* [[Base]]
===Even deeper===
A paragraph in the end matter that is long enough but must not be kept, whatever its heading says.
==History==
The word was first used by someone long ago, which this sentence says at sufficient length. REST
""".replace("that\ngives", "that gives").replace("REST", "It is old. " * 9)


def test_wiki_markup_becomes_prose() -> None:
    (piece,) = wiki.article_pieces("Acid", ARTICLE)
    assert piece.splitlines() == [
        "Acid",
        "",
        "An acid (acidus) is a molecule that gives a hydron away; 5 km of pipes — at most.",
        "",
        "Strength",
        "Strong acids give all of their hydrons to water, weak acids only some.",
        "",
        "History",
        "The word was first used by someone long ago, which this sentence says at sufficient length. "
        + ("It is old. " * 9).strip(),
    ]


def test_wiki_cuts_long_articles_at_paragraphs_and_drops_stubs() -> None:
    paragraph = "This sentence is repeated until the paragraph is long. " * 20
    pieces = wiki.article_pieces("Long", "\n".join([paragraph] * 9))
    assert len(pieces) > 2
    assert all(300 <= len(piece) <= 3000 for piece in pieces)
    assert wiki.article_pieces("Stub", "A stub is too short to be worth a document of its own, so it goes.") == []


# ---- word problems ----

UTILITIES = "import requests\ndef format_number(x): return str(x)\ndef is_integer(x): return isinstance(x, int)\n"
GENERATOR = """
import math
from random import Random
from reasoning_gym.utils import format_number

def generate_7(rng: Random, difficulty: float = 1.0):
    n, share = rng.randint(2, 9), eval("1/2")
    if n == 5:
        raise ValueError("does not work out")
    return {"question": f"What is half of {n}?", "metadata": {"answer_cot": f"Half.\\n#### {format_number(n * share)}"}}
"""


def test_word_problem_templates_run_apart_and_give_distinct_seeded_instances() -> None:
    first = word_problems.run_templates(UTILITIES, [GENERATOR], 40)
    assert first == word_problems.run_templates(UTILITIES, [GENERATOR], 40)
    assert {question for question, _ in first[7]} == {f"What is half of {n}?" for n in (2, 3, 4, 6, 7, 8, 9)}
    assert len(first[7]) == 7
    assert ("What is half of 3?", "Half.\n#### 1.5") in first[7]


@pytest.mark.parametrize("bad", ["import os", "open('x')", "__import__('socket')", "eval('().__class__')"])
def test_word_problem_templates_cannot_reach_outside(bad: str) -> None:
    with pytest.raises((ImportError, NameError, ValueError)):
        word_problem_worker.make_instances(UTILITIES, [bad], 1)
    with pytest.raises(UserError, match="word problem templates: they did not run"):
        word_problems.run_templates(UTILITIES, [bad], 1)


def test_word_problem_text() -> None:
    text = word_problems.format_problem(" How many? ", "2 + 3 = 5 books.\n#### 5")
    assert text == "Question: How many?\nAnswer: 2 + 3 = 5 books.\nThe answer is 5."


# ---- chat, parliament, faq ----


def _messages(*turns: tuple[str, str]) -> list[list[dict[str, str]]]:
    return [[{"sender": sender, "text": text}] for sender, text in turns]


def test_chat_joins_neighbouring_messages_and_names_speakers() -> None:
    turns = chat.conversation_turns(_messages(("x", "Hi "), ("x", "there"), ("y", " Hello\nyou "), ("x", "")))
    assert turns == ["A: Hi there", "B: Hello you"]


@pytest.mark.parametrize(
    "text", ["see www.example.org", "me@example.org", "call 555-1234", "id 123456", "Shit!", "z" * 50]
)
def test_chat_leaves_out_conversations_with_private_rude_or_random_text(text: str) -> None:
    assert chat.conversation_turns(_messages(("x", "Hi"), ("y", text))) == []


def test_chat_needs_two_people() -> None:
    assert chat.conversation_turns(_messages(("x", "Hi"), ("y", "Hi"), ("z", "Hi"))) == []
    assert chat.conversation_turns(_messages(("x", "Hi"), ("x", "Anybody?"))) == []


def test_speech_spacing_is_repaired_and_remarks_dropped() -> None:
    speech = "Frau Präsidentin ! Am 1 . Juli ( 2001 ) war _ wie gesagt _ nichts , oder ? (Aplausos.) Gracias."
    assert (
        parliament.clean_speech(speech)
        == "Frau Präsidentin! Am 1. Juli (2001) war – wie gesagt – nichts, oder? Gracias."
    )


def test_faq_pairs() -> None:
    answer = "A permit from the municipality, applied for beforehand."
    pairs = [{"id": "a", "q": " What? ", "a": answer}, {"id": "b", "q": "Why?", "a": "Because."}]
    assert faq.pairs_to_documents(pairs) == [Document("a", f"What?\n\n{answer}")]


# ---- conversations for fine-tuning ----


def test_small_talk_in_pieces_that_begin_with_the_user_and_end_with_the_assistant() -> None:
    document = Document("p", "\n".join(f"{'AB'[n % 2]}: turn {n} " + "word " * 8 for n in range(9)).strip())
    records = list(conversations.small_talk([document], 70))
    assert [len(record["messages"]) for record in records] == [2, 2, 2, 2]  # the ninth turn has no answer
    said = [message for record in records for message in record["messages"]]
    assert [message["role"] for message in said] == ["user", "assistant"] * 4
    assert [message["content"].split(" word")[0] for message in said] == [f"turn {n}" for n in range(8)]
    assert [len(record["messages"]) for record in conversations.small_talk([document], 100)] == [4, 4]


def test_questions_from_faq_and_reference_texts() -> None:
    texts = ["What?\n\nThis.\n\nAnd that.", "no answer"]
    assert list(conversations.questions_and_answers(Document("p", text) for text in texts)) == [
        {"prompt": "What?", "response": "This.\n\nAnd that."}
    ]
    texts = [
        "torch.add\n\nadd(input, other) -> Tensor\n\nAdds one tensor\nto another. And more.",
        'The "del" statement\n*******\n\nDeletion is recursively defined.\n\nMore.',
        "A later piece of a text\n\nwhich says something more about it.",
        "torch.short\n\nToo short.",
    ]
    pairs = list(conversations.reference_questions(Document("p", text) for text in texts))
    assert pairs == [
        {"prompt": "What does torch.add do?", "response": "Adds one tensor to another."},
        {"prompt": 'Tell me about this: The "del" statement', "response": "Deletion is recursively defined."},
    ]
    (record,) = conversations.pairs_to_conversations(pairs)
    assert [message["content"] for message in record["messages"]] == [
        text for pair in pairs for text in (pair["prompt"], pair["response"])
    ]


# ---- the interpreter's text ----


def test_code_is_cut_before_definitions_with_their_decorators() -> None:
    method = "    @property\n    def name(self):\n        return '" + "a word " * 20 + "'\n\n"
    source = '"""Doc."""\nimport os\n\n\nclass Thing:\n' + method * 30
    pieces = python_text.code_pieces(source)
    assert len(pieces) > 1
    assert all(piece.startswith("    @property") for piece in pieces[1:])
    assert "".join("".join(pieces).split()) == "".join(source.split())


def test_code_leaves_out_tables_of_numbers() -> None:
    assert python_text.code_pieces("table = [\n" + "    0x1234, 0x5678,\n" * 60 + "]\n") == []


def test_docstrings_are_read_without_running_the_module() -> None:
    source = (
        'raise SystemExit\ndef f():\n    """F."""\nclass C:\n    """C."""\n    def m(self):\n        """M."""\n'
        'add_newdoc("pkg.core", "g", """\n    G.\n    """)\n'
        'add_newdoc("pkg.core", "h", ("attr", "H."))\nadd_docstr(pkg.k, "K {x}.\\n\\n{args}\\n".format(**shared))\n'
    )
    assert list(python_text.docstrings(source, "pkg.mod")) == [
        ("pkg.mod.f", "pkg.mod.f", "F."),
        ("pkg.mod.C", "pkg.mod.C", "C."),
        ("pkg.mod.C", "pkg.mod.C.m", "M."),
        ("pkg.core.g", "pkg.core.g", "G."),
        ("pkg.core.h.attr", "pkg.core.h.attr", "H."),
        ("pkg.k", "pkg.k", "K {x}."),
    ]


# ---- noise ----


@pytest.mark.parametrize("damage", noise.KINDS)
def test_noise_is_damaged_and_seeded(damage: Callable[[str, random.Random], str]) -> None:
    text = "The quick brown fox jumps over the lazy dog and runs home to the old mill. " * 5
    damaged = damage(text, random.Random("a"))
    assert damaged == damage(text, random.Random("a"))
    assert damaged != damage(text, random.Random("b"))
    assert "quick brown fox jumps" not in damaged


def test_noise_has_every_kind_and_stays_in_its_budget() -> None:
    documents = [Document(str(i), f"{i} " + "some words of a document " * 40) for i in range(60)]
    source = noise.make_source({"code": documents}, 20_000)
    assert 20_000 <= sum(len(document.text.encode()) for document in source.documents) < 25_000
    assert any("cookies" in document.text for document in source.documents)
    assert any(set(document.text) <= set(_BASE64) for document in source.documents)


_BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n"


# ---- near-duplicates and splits ----


def test_near_duplicates_are_dropped_across_calls() -> None:
    rng = random.Random(0)
    words = [f"word{i}" for i in range(1000)]
    first = [rng.choice(words) for _ in range(200)]
    other = [rng.choice(words) for _ in range(200)]
    known = NearDuplicates()
    assert len(known.keep([Document("a", " ".join(first)), Document("b", " ".join(other))])) == 2
    half_copied = " ".join(first[:100] + [rng.choice(words) for _ in range(100)])
    quarter_copied = " ".join(first[:50] + [rng.choice(words) for _ in range(150)])
    assert known.keep([Document("c", half_copied)]) == []
    assert known.keep([Document("d", " ".join(first).upper().replace(" ", ", "))]) == []  # case, punctuation
    assert len(known.keep([Document("e", quarter_copied)])) == 1


def test_templated_text_loses_exact_duplicates_only() -> None:
    text = "one two three four five six seven eight nine ten eleven twelve and then the number "
    documents = [Document("t", text + str(n)) for n in (1, 2, 1)]
    assert NearDuplicates().keep(documents, exact_only=True) == documents[:2]
    assert NearDuplicates().keep(documents) == documents[:1]


def test_splits_are_disjoint_by_parent_and_close_to_80_10_10() -> None:
    rng = random.Random(0)
    documents = [Document(f"p{rng.randrange(90)}", f"{i} " + "x" * rng.randrange(50, 500)) for i in range(900)]
    splits = split_by_parent(documents, "test")
    parents = {split: {document.parent for document in splits[split]} for split in SPLITS}
    assert not parents["train"] & parents["probe"]
    assert not parents["train"] & parents["heldout"]
    assert not parents["probe"] & parents["heldout"]
    assert sorted(itertools.chain(*splits.values()), key=id) == sorted(documents, key=id)
    sizes = {split: sum(len(document.text) for document in splits[split]) for split in SPLITS}
    total = sum(sizes.values())
    assert 0.1 <= sizes["probe"] / total < 0.13
    assert 0.1 <= sizes["heldout"] / total < 0.13
    shuffled = random.Random(1).sample(documents, len(documents))
    assert {d.parent for d in split_by_parent(shuffled, "test")["probe"]} == parents["probe"]


def test_splits_of_three_parents_and_of_too_few() -> None:
    documents = [Document(str(i), "x" * 10 ** (i + 1)) for i in range(3)]
    assert all(len(split) == 1 for split in split_by_parent(documents, "test").values())
    with pytest.raises(UserError, match="source 'test': 2 parent documents cannot make three disjoint splits"):
        split_by_parent(documents[:2], "test")


# ---- packages ----


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip asks no index; it finds only the wheels in the folder that is returned."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def _write_wheel(folder: Path, content: str) -> packages.Wheel:
    """A wheel of package ``some-text`` and the pin that fits it."""
    file = folder / "some_text-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_text/text.txt", content)
        archive.writestr("some_text-1.0.dist-info/LICENSE", "Do what you like.\n")
        archive.writestr("some_text-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-text\nVersion: 1.0\n")
        archive.writestr(
            "some_text-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_text-1.0.dist-info/RECORD", "")
    return packages.Wheel("some-text", "1.0", hashlib.sha256(file.read_bytes()).hexdigest())


def test_wheels_are_fetched_once_and_read_as_archives(offline: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(offline, "Text.")
    path = packages.fetch(tmp_path / "cache", (wheel,))["some-text"]
    assert packages.read_member(path, "some_text/text.txt") == b"Text."
    assert packages.licence_texts(path) == "Do what you like."
    (offline / path.name).unlink()
    assert packages.fetch(tmp_path / "cache", (wheel,)) == {"some-text": path}  # nothing is fetched again


def test_a_wheel_with_another_hash_is_refused_by_pip(offline: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(offline, "Text.")
    _write_wheel(offline, "Changed.")
    with pytest.raises(UserError, match=rf"does not have its pinned hash and is not used \(.*{wheel.sha256}"):
        packages.fetch(tmp_path / "cache", (wheel,))
    assert not list((tmp_path / "cache").glob("*.whl"))


def test_a_cached_wheel_with_another_hash_is_refused(offline: Path, tmp_path: Path) -> None:
    wheel = _write_wheel(offline, "Text.")
    path = packages.fetch(tmp_path / "cache", (wheel,))["some-text"]
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(UserError, match=rf"{path.name}: expected sha256 {wheel.sha256} for some-text==1.0, found"):
        packages.fetch(tmp_path / "cache", (wheel,))


def test_members_are_checked(offline: Path) -> None:
    _write_wheel(offline, "Text.")
    path = next(offline.glob("*.whl"))
    with pytest.raises(UserError, match=r"member 'some_text/text\.txt': expected sha256 00, found"):
        packages.read_member(path, "some_text/text.txt", "00")
    with pytest.raises(UserError, match="member 'absent'"):
        packages.read_member(path, "absent")


def test_a_changed_wheel_ends_the_command_with_one_line(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads = tmp_path / "out" / ".downloads"
    downloads.mkdir(parents=True)
    for wheel in packages.WHEELS:
        (downloads / f"{wheel.prefix}py3-none-any.whl").write_bytes(b"not the pinned file")
    assert main(["--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert f"expected sha256 {packages.WHEELS[0].sha256} for gensim==4.4.0" in errors[0]


# ---- the whole sample ----


def _content(folder: Path) -> dict[str, bytes]:
    """All files but those that name the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = ("data.yaml", "downstream.yaml")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.name not in named}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A small sample made where the registry cannot be reached, and what was reported while it was made."""
    out, lines = tmp_path_factory.mktemp("sample") / "made", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.delenv("PIP_FIND_LINKS", raising=False)
        assert prepare(Options(out, bytes_per_source=SMALL, vocab_size=600), lines.append)
    return out, lines


def test_without_the_registry_the_sample_is_made_from_the_interpreter(sample: tuple[Path, list[str]]) -> None:
    out, lines = sample
    (note,) = [line for line in lines if line.startswith("NOTE:")]
    assert "\n" not in note
    assert "the package registry cannot be used (No matching distribution found for gensim==4.4.0" in note
    assert "sources code, docs, noise" in note
    config = load_data_config(out / "data.yaml")
    assert list(config.sources) == ["code", "docs", "noise"]
    assert {name: probe.source for name, probe in config.probes.items()} == {"code": "code"}
    assert (Path(config.local), config.seq_len) == (out, 128)
    assert not (out / ".downloads").exists()
    assert "PSF-2.0" in (out / "SOURCES.md").read_text(encoding="utf-8")


def test_sample_shards_carry_licence_and_origin_and_share_no_document(sample: tuple[Path, list[str]]) -> None:
    out, lines = sample
    tokenizer = TokenizerWrapper(out / "tokenizer")
    seen: set[int] = set()
    documents = 0
    for source in ("code", "docs", "noise"):
        for split in SPLITS:
            meta = read_meta(out / source / split)
            assert meta.tokenizer_fingerprint == tokenizer.fingerprint
            assert (meta.source, meta.split, meta.seq_len) == (source, split, 128)
            assert meta.license
            assert meta.origin
            documents += meta.documents
            seen |= set(read_document_hashes(out / source / split).tolist())
            assert f"{source:<11} {split:<8} {meta.documents:>9} {meta.samples:>8} {meta.tokens:>9}" in "\n".join(lines)
    assert len(seen) == documents


def test_conversations_are_there_for_fine_tuning(sample: tuple[Path, list[str]]) -> None:
    from transformers import AutoTokenizer

    out, _ = sample
    tokenizer = TokenizerWrapper(out / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(out / "tokenizer")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == "User: Hi\nAssistant: Ho<|endoftext|>\n"
    config = load_data_config("downstream", [f"data.local={out}"])
    assert list(config.sources) == list(load_data_config(out / "downstream.yaml").sources) == ["sft_chat", "sft_faq"]
    for source in config.sources:
        splits = [split for split in SPLITS if (out / source / split).is_dir()]
        assert len(splits) == 3 or source == "sft_chat"  # longer ones may be missing in a sample as small as this
        hashes = [set(read_document_hashes(out / source / split).tolist()) for split in splits]
        metas = [read_meta(out / source / split) for split in splits]
        assert len(set().union(*hashes)) == sum(meta.documents for meta in metas)
        assert all(0 < (meta.loss_tokens or 0) < meta.tokens and meta.cut_documents == 0 for meta in metas)
        assert all("made from the source docs: help topics" in meta.origin for meta in metas)
        assert metas[0].license.startswith("PSF-2.0")
    loader = get_loader(config, tokenizer, 4)
    batch = next(iter(loader))
    answers = tokenizer.decode(batch["labels"][batch["labels"] != -100].tolist())
    assert answers.count("<|endoftext|>") >= 4
    assert "Assistant:" not in answers


def test_a_finished_sample_is_left_alone_and_an_unfinished_one_made_anew(
    sample: tuple[Path, list[str]], offline: Path
) -> None:
    out, _ = sample
    before = _content(out)
    options = Options(out, bytes_per_source=SMALL, vocab_size=600)
    lines: list[str] = []
    assert not prepare(options, lines.append)
    assert "is complete: left as it is" in lines[0]
    assert "made without the package registry: use --force" in lines[1]
    (out / MARKER).write_text('{"state": "unfinished"}', encoding="utf-8")
    (out / "code" / "train" / "index.json").unlink()
    (out / "left_over.txt").touch()
    assert prepare(options, lines.append)
    assert _content(out) == before


def test_the_same_bytes_in_another_process(sample: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, _ = sample
    code = (
        "from pathlib import Path; from tools.sample.build import Options, prepare\n"
        f"prepare(Options(Path({str(tmp_path / 'again')!r}), bytes_per_source={SMALL}, vocab_size=600))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PIP_NO_INDEX": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PIP_FIND_LINKS", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, cwd=tmp_path)
    first, second = _content(out), _content(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_folder_with_other_files_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path), "--interpreter-only"]) == 2
    assert f"{tmp_path}: expected an empty folder or an earlier sample" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_another_seq_len_is_another_fingerprint(sample: tuple[Path, list[str]]) -> None:
    fingerprint = json.loads((sample[0] / MARKER).read_text(encoding="utf-8"))["fingerprint"]
    assert (fingerprint["seq_len"], fingerprint["bytes_per_source"]) == (128, SMALL)
    assert fingerprint["packages"]["gensim"] == "4.4.0"


# ---- with the registry ----


@pytest.fixture(scope="module")
def small_wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The two smallest of the pinned wheels (7.5 MB)."""
    chosen = tuple(wheel for wheel in packages.WHEELS if wheel.name in {"reasoning-gym", "zaragoza-construction-faq"})
    try:
        return packages.fetch(tmp_path_factory.mktemp("wheels"), chosen)
    except packages.RegistryUnavailable as error:
        pytest.skip(f"the package registry cannot be used: {error}")


def test_math_from_the_pinned_wheel_is_split_by_template(small_wheels: dict[str, Path]) -> None:
    source = word_problems.make_source(small_wheels["reasoning-gym"], 1_800_000)
    assert source.templated
    assert 1_700_000 < sum(len(document.text.encode()) for document in source.documents) < 1_900_000
    assert all("\nThe answer is " in document.text and "####" not in document.text for document in source.documents)
    splits = split_by_parent(NearDuplicates().keep(source.documents, exact_only=True), "math")
    templates = [{document.parent for document in split} for split in splits.values()]
    assert sum(map(len, templates)) == len(set().union(*templates)) >= 80


def test_faq_from_the_pinned_wheel(small_wheels: dict[str, Path]) -> None:
    source = faq.make_source(small_wheels["zaragoza-construction-faq"], 1_800_000)
    assert len(source.documents) == 503
    assert all("\n\n" in document.text for document in source.documents)
