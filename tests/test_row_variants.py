"""Rows that were evaluated as test data are recognised in every form in which they can be given again."""

from __future__ import annotations

import csv
import gzip
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from adaptermix.baking.activations import read_texts
from adaptermix.errors import PlanError
from adaptermix.tasks import get_task
from adaptermix.tasks.data import DataFile, find_files, read_pairs
from adaptermix.tasks.data.parallel import read_parallel
from adaptermix.tasks.splits import TRAINING, add_to_record, refuse_tested

from .refusals import refuses
from .training.data import Notes

TEXTS = [f"Die {noun} war am {day}, wirklich, sehr schön." for noun in ("Suppe", "Reise", "Musik") for day in "äöü1234"]
ROWS = [(text, ("gut", "schlecht")[number % 2]) for number, text in enumerate(TEXTS)]
ENGLISH = [f"The {noun} was very nice on {day}." for noun in ("soup", "journey", "music") for day in "äöü1234"]
OTHERS = [(f"Ganz andere Zeile Nummer {number} über das Wetter.", "gut") for number in range(30)]


def put(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(task: str, *files: str, rows: str | None = None) -> Sequence[DataFile]:
    return get_task(task).read(list(files), rows=rows)[1]


def record(files: Sequence[DataFile]) -> None:
    add_to_record(files, task="classify", adapter="base", watch=Notes())


def refused(files: Sequence[DataFile]) -> str:
    """Return the counts of the message, such as `12 of 30`; empty if nothing is refused."""
    try:
        refuse_tested({TRAINING: files}, allowed=False)
    except PlanError as error:
        return str(error).split("and ", 1)[1].split(" rows of ")[0]
    return ""


def as_csv(rows: Sequence[tuple[str, str]], quoting: int = csv.QUOTE_MINIMAL, end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator=end).writerows([("text", "label"), *rows])
    return out.getvalue()


def tsv(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{text}\t{label}\n" for text, label in rows)


VARIANTS: dict[str, tuple[str, Callable[[], str | bytes], str]] = {
    "copied": ("copy.de.tsv", lambda: tsv(ROWS), "21 of 21"),
    "packed": ("x.de.tsv.gz", lambda: gzip.compress(tsv(ROWS).encode()), "21 of 21"),
    "one dropped": ("x.de.tsv", lambda: tsv(ROWS[1:]), "20 of 20"),
    "reversed": ("x.de.tsv", lambda: tsv(ROWS[::-1]), "21 of 21"),
    "among others": ("x.de.tsv", lambda: tsv([*OTHERS, *ROWS, *OTHERS, *OTHERS]), "21 of 111"),
    "a third of it": ("x.de.tsv", lambda: tsv([*OTHERS, *ROWS[:7], *OTHERS, *OTHERS]), "7 of 97"),
    "three long ones of seven": ("x.de.tsv", lambda: tsv([*OTHERS[:4], *ROWS[:3]]), "3 of 7"),
    "header": ("x.de.tsv", lambda: "text\tlabel\n" + tsv(ROWS), "21 of 21"),
    "columns changed over": (
        "x.de.tsv",
        lambda: "label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in ROWS),
        "21 of 21",
    ),
    "csv": ("x.de.csv", lambda: as_csv(ROWS), "21 of 21"),
    "csv, all quoted, windows": ("x.de.csv", lambda: as_csv(ROWS, csv.QUOTE_ALL, "\r\n"), "21 of 21"),
    "byte order mark": ("x.de.csv", lambda: b"\xef\xbb\xbf" + as_csv(ROWS).encode(), "21 of 21"),
    "blanks at the ends": ("x.de.tsv", lambda: tsv([(f" {text}  ", label) for text, label in ROWS]), "21 of 21"),
    "blanks inside": ("x.de.tsv", lambda: tsv([(text.replace(" ", "  "), label) for text, label in ROWS]), "21 of 21"),
    "no-break blanks": (
        "x.de.tsv",
        lambda: tsv([(text.replace(" ", "\u00a0"), label) for text, label in ROWS]),
        "21 of 21",
    ),
    "decomposed": ("x.de.tsv", lambda: unicodedata.normalize("NFD", tsv(ROWS)), "21 of 21"),
    "capitals": ("x.de.tsv", lambda: tsv([(text.upper(), label) for text, label in ROWS]), "21 of 21"),
    "other labels": ("x.de.tsv", lambda: tsv([(text, "neutral") for text, _ in ROWS]), "21 of 21"),
    "jsonl with more fields": (
        "x.jsonl",
        lambda: "".join(
            json.dumps({"id": number, "label": label, "lang": "de", "text": text}) + "\n\n"
            for number, (text, label) in enumerate(ROWS)
        ),
        "21 of 21",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_recognised_in_other_files(name: str, tmp_path: Path) -> None:
    file, make, counts = VARIANTS[name]
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(ROWS))))
    assert refused(read("classify", put(tmp_path / file, make()))) == counts


def test_rows_are_recognised_among_those_of_many_files(tmp_path: Path) -> None:
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(ROWS))))
    for number in range(3):
        put(tmp_path / f"part{number}.de.tsv", tsv(OTHERS[10 * number : 10 * number + 10]))
    put(tmp_path / "part3.de.tsv", tsv(ROWS[5:]))
    assert refused(read("classify", str(tmp_path / "part*.tsv"))) == "16 of 16"


def test_rows_that_are_spread_over_many_files_count_together(tmp_path: Path) -> None:
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(ROWS))))
    for number in range(10):
        others = [(f"Zeile {number} {place} handelt vom Wetter auf dem Land.", "gut") for place in range(30)]
        put(tmp_path / f"part{number}.de.tsv", tsv([*others, *ROWS[2 * number : 2 * number + 2]]))
    assert not refused(read("classify", str(tmp_path / "part0*.tsv")))
    files = read("classify", str(tmp_path / "part*.tsv"))
    assert refused(files) == "20 of 320"
    with refuses(r"split.tested: 20 of 320 rows of.*part0\.de\.tsv and 9 other files were evaluated as test"):
        refuse_tested({TRAINING: files}, allowed=False)
    (entry,) = refuse_tested({TRAINING: files}, allowed=True)
    assert entry["tested_rows"] == 20


@pytest.mark.parametrize(
    ("as_test", "as_training", "counts"),
    [
        (":10", "10:", ""),
        ("10:", ":10", ""),
        ("::2", "1::2", ""),
        (":10", "9:", "1 of 12"),
        (None, ":1", "1 of 1"),
        ("5:6", None, "1 of 21"),
    ],
)
def test_disjoint_rows_of_a_file_are_allowed_and_others_are_not(
    as_test: str | None, as_training: str | None, counts: str, tmp_path: Path
) -> None:
    path = put(tmp_path / "de.tsv", tsv(ROWS))
    record(read("classify", path, rows=as_test))
    assert refused(read("classify", path, rows=as_training)) == counts


def test_as_sides_of_pairs_whichever_way_they_go(tmp_path: Path) -> None:
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(ROWS))))
    pairs = list(zip(TEXTS, ENGLISH, strict=True))
    assert refused(read_pairs([put(tmp_path / "de-en.tsv", tsv(pairs))])[1]) == "21 of 21"
    swapped = [(b, a) for a, b in pairs]
    assert refused(read_pairs([put(tmp_path / "en-de.tsv", tsv(swapped))])[1]) == "21 of 21"
    assert refused(read("translate", str(tmp_path / "en-de.tsv"))) == "21 of 21"
    assert not refused(read_pairs([put(tmp_path / "en-fr.tsv", tsv([(b, f"fr {b}") for b in ENGLISH]))])[1])


@pytest.mark.parametrize("form", ["alpaca", "prompt", "messages"])
def test_rows_below_an_instruction_are_recognised(form: str, tmp_path: Path) -> None:
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(ROWS))))
    asked = "Is this good or bad?"
    forms = {
        "alpaca": lambda text, label: {"instruction": asked, "input": text, "output": label},
        "prompt": lambda text, label: {"prompt": f"{asked}\nText: see below\n{text}", "answer": label},
        "messages": lambda text, label: {
            "messages": [{"role": "user", "content": f"{asked}\n\n{text}"}, {"role": "assistant", "content": label}]
        },
    }
    made = "".join(json.dumps(forms[form](*row)) + "\n" for row in [*ROWS, *OTHERS])
    assert refused(read("sft", put(tmp_path / "train.jsonl", made))) == "21 of 51"
    # the instruction alone makes no row the same
    others = "".join(json.dumps(forms[form](*row)) + "\n" for row in OTHERS)
    assert refused(read("sft", put(tmp_path / "others.jsonl", others))) == ""


def test_pairs_are_recognised_swapped_by_one_side_and_as_texts(tmp_path: Path) -> None:
    pairs = list(zip(TEXTS, ENGLISH, strict=True))
    record(read_parallel([put(tmp_path / "de-en.tsv", tsv(pairs))]).files)
    swapped = put(tmp_path / "en-de.tsv", tsv([(b, a) for a, b in pairs]))
    one_side = put(tmp_path / "fr-en.tsv", tsv([(f"fr {b}", b) for b in ENGLISH]))
    texts = put(tmp_path / "texts.txt", "\n".join(ENGLISH))
    alone = put(tmp_path / "en.tsv", tsv([(b, "gut") for b in ENGLISH]))
    prompts = put(tmp_path / "sft.jsonl", "".join(json.dumps({"prompt": "Go", "answer": b}) + "\n" for b in ENGLISH))
    for files in (read_pairs([swapped])[1], read_pairs([one_side])[1], read_texts([texts])[1], read("classify", alone)):
        assert refused(files) == "21 of 21"
    assert refused(read("sft", prompts)) == "21 of 21"
    lines = [put(tmp_path / "x.en", "\n".join(ENGLISH)), put(tmp_path / "x.fr", "\n".join(f"fr {b}" for b in ENGLISH))]
    assert refused(read("translate", *lines)) == "21 of 21"
    assert refused(read_parallel(lines).files) == "21 of 21"


def test_premises_and_hypotheses_alone(tmp_path: Path) -> None:
    rows = [(text, f"Es geht um Nummer {number}, sagt man.") for number, text in enumerate(TEXTS)]
    nli = put(tmp_path / "test.de.tsv", "".join(f"{a}\t{b}\tneutral\n" for a, b in rows))
    record(read("nli", nli))
    assert refused(read_pairs([put(tmp_path / "de-en.tsv", tsv([(b, f"en {b}") for _, b in rows]))])[1]) == "21 of 21"
    others = put(tmp_path / "x.de.tsv", "".join(f"{a}\tDas stimmt so nicht, {a}\tneutral\n" for a, _ in rows))
    assert not refused(read("nli", others))  # three hypotheses of XNLI share a premise
    record(read_texts([put(tmp_path / "x.txt", "\n".join(TEXTS))])[1])
    assert refused(read("nli", others)) == "21 of 21"


def test_questions_as_json_and_as_jsonl(tmp_path: Path) -> None:
    def question(number: int) -> dict[str, object]:
        return {"id": str(number), "question": f"Was geschah am Tag {number}?", "answers": [{"text": "Suppe"}]}

    texts = [" ".join(TEXTS[:7]), " ".join(TEXTS[7:])]
    paragraphs = [{"context": text, "qas": [question(10 * n + m) for m in range(10)]} for n, text in enumerate(texts)]
    record(read("qa", put(tmp_path / "de.json", json.dumps({"data": [{"paragraphs": paragraphs}]})), rows=":13"))
    rows = [
        {"question": qa["question"], "context": text, "answers": ["Suppe"], "more": 1}
        for n, text in enumerate(texts)
        for qa in (question(10 * n + m) for m in range(10))
    ]
    path = put(tmp_path / "de.jsonl", "".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert refused(read("qa", path)) == "13 of 20"
    assert refused(read("qa", path, rows=":7")) == ""  # on a text of which other questions were test
    assert refused(read_texts([put(tmp_path / "x.txt", "\n".join(str(row["question"]) for row in rows))])[1])


def test_commands_in_columns_and_as_json(tmp_path: Path) -> None:
    blocks = [f"# text = {text}\n" + columns(text) for text in TEXTS]
    record(read("slots", put(tmp_path / "de.test.conll", "\n".join(blocks))))
    spelled = "".join(json.dumps({"text": text, "slots": [], "language": "de"}) + "\n" for text in TEXTS)
    assert refused(read("slots", put(tmp_path / "x.jsonl", spelled))) == "21 of 21"
    tokens = [{"tokens": text.replace(",", " ,").split(), "language": "de"} for text in TEXTS]
    entities = "".join(json.dumps(row | {"entities": []}) + "\n" for row in tokens)
    assert refused(read("ner-json", put(tmp_path / "y.jsonl", entities))) == "21 of 21"
    tags = "\n".join("".join(f"{token}\tO\n" for token in row["tokens"]) for row in tokens)
    assert refused(read("ner-json", put(tmp_path / "de.iob2", tags))) == "21 of 21"


def columns(text: str) -> str:
    return "".join(f"{number}\t{token}\tgo\tO\n" for number, token in enumerate(text.split(), start=1))


def test_conversations_by_their_turns(tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": "gut"} for text in TEXTS]
    record(read("sft", put(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))))
    turns = [[("system", "Kurz."), ("user", text), ("assistant", "sehr gut")] for text in TEXTS]
    messages = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in turns]
    path = put(tmp_path / "y.jsonl", "".join(json.dumps(row) + "\n" for row in messages))
    assert refused(read("sft", path)) == "21 of 21"


def test_a_few_rows_that_many_files_share_are_a_warning(tmp_path: Path) -> None:
    common = [("Ja.", "gut"), ("nein", "gut"), ("Danke!", "gut"), ("Bitte sehr", "gut")]
    record(read("classify", put(tmp_path / "test.de.tsv", tsv([*ROWS, *common]))))
    path = put(tmp_path / "de.tsv", tsv([*OTHERS, *common * 5]))
    notes = Notes()
    assert refuse_tested({TRAINING: read("classify", path)}, allowed=False, watch=notes) == []
    assert notes.said == [
        f"warning: 20 of 50 rows of {path} were evaluated as test data before (so few may be the same by chance); they "
        "are used."
    ]


def test_short_rows_count_where_there_are_no_others(tmp_path: Path) -> None:
    short = [(f"ja {letter}", "gut") for letter in "abcdefghij"]
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(short))))
    assert refused(read("classify", put(tmp_path / "de.tsv", tsv([*OTHERS, *short[:8]])))) == "8 of 38"


def test_what_is_allowed_is_counted_in_the_manifest(tmp_path: Path) -> None:
    record(read("classify", put(tmp_path / "test.de.tsv", tsv(ROWS))))
    files = read("classify", put(tmp_path / "de.tsv", tsv([*OTHERS, *ROWS])))
    (entry,) = refuse_tested({TRAINING: files}, allowed=True)
    assert (entry["name"], entry["rows"], entry["tested_rows"]) == ("de.tsv", 51, 21)


def test_an_older_record_counts_whole_files(tmp_path: Path, state: Path) -> None:
    path = put(tmp_path / "de.tsv", tsv(ROWS))
    record(find_files([path]))
    entry = json.loads((state / "tested.jsonl").read_text())
    older = {key: entry[key] for key in ("sha256", "text", "name", "task", "adapter", "date")}
    (state / "tested.jsonl").write_text(json.dumps(older) + "\n")
    assert refused(read("classify", path, rows=":5")) == "5 of 5"
    assert not refused(read("classify", put(tmp_path / "x.de.tsv", tsv(ROWS[1:]))))


def test_rows_of_the_hub_are_recognised_in_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    put(tmp_path / "hub.jsonl", "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in ROWS))
    (tmp_path / "set").mkdir()
    (tmp_path / "hub.jsonl").rename(tmp_path / "set" / "train.jsonl")
    record(read("classify", f"de=hf:{tmp_path / 'set'}"))
    assert refused(read("classify", put(tmp_path / "x.de.csv", as_csv(ROWS[::-1])))) == "21 of 21"
    assert not refused(read("classify", put(tmp_path / "y.de.csv", as_csv(OTHERS))))
