"""Write the mini set to disk: ``python -m kardia_jax.dialogue.mini.generate OUT_DIR``.

In: a folder, which is made if need be. Out: ``train.jsonl`` and ``test.jsonl`` there, one row a line, as
``rows`` gives them.
"""

import argparse
import json
import pathlib

from kardia_jax.dialogue.mini import Split, rows


def write(folder: pathlib.Path, seed: int = 0) -> dict[Split, int]:
    """Write both splits and return how many rows each has; files of the same name are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"train": _write(folder, "train", seed), "test": _write(folder, "test", seed)}


def _write(folder: pathlib.Path, split: Split, seed: int) -> int:
    made = rows(split, seed)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
    (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    return len(made)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the synthetic mini set as JSONL.")
    parser.add_argument("folder", type=pathlib.Path, help="where train.jsonl and test.jsonl go")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other dialogues")
    options = parser.parse_args()
    for split, count in write(options.folder, options.seed).items():
        print(f"{options.folder / split}.jsonl: {count:,} rows")


if __name__ == "__main__":
    main()
