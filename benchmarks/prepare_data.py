"""Turn public data sets, as they are downloaded, into the JSON Lines that the benchmarks read.

    wikitext.jsonl      one line per article of WikiText-2 (train), with its title as owner
    wikitext-test.jsonl the same of the test split
    shakespeare.jsonl   one line per speech of Tiny Shakespeare, with its speaker as owner

Example:
    python benchmarks/prepare_data.py DATA build/benchmarks
    DATA holds wikitext-2/wikitext2.zip, wikitext-2/test.txt and
    shakespeare/tinyshakespeare_input.txt.
"""

import json
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

Records = Iterable[dict[str, str]]


def articles(text: str) -> Records:
    """Yield the articles of WikiText-2; each starts with a line " = Title = "."""
    parts = re.split(r"^ = ([^=].*[^=]) = $", text, flags=re.MULTILINE)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        yield {"owner": title.strip(), "text": body.strip()}


def speeches(text: str) -> Records:
    """Yield the speeches of Tiny Shakespeare; each starts with its speaker and a colon."""
    for block in text.split("\n\n"):
        head, _, body = block.partition("\n")
        if head.endswith(":") and body:
            yield {"owner": head[:-1], "text": body}


def write(records: Records, path: Path) -> None:
    """Write one record a line."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} records")


def main(data: Path, out: Path) -> None:
    """Read the data sets and write their records."""
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(data / "wikitext-2" / "wikitext2.zip") as archive:
        write(articles(archive.read("wikitext2/train.txt").decode()), out / "wikitext.jsonl")
    test = (data / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    write(articles(test), out / "wikitext-test.jsonl")
    plays = (data / "shakespeare" / "tinyshakespeare_input.txt").read_text(encoding="utf-8")
    write(speeches(plays), out / "shakespeare.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
