"""Check the plain-words rule: find phrases of the old, compressed style in everything a person reads.

Usage: python .ci/prose.py [PATH ...]   (default: every file that git tracks)

Looks at comments and strings of Python files, and at whole Markdown, proto, YAML, TOML and template files. Prints
`file:line: phrase -> plainer wording` for each hit; exits with 1 where there is one.
"""

import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

# A regular expression (matched without regard to case), and what to write instead.
PHRASES = {
    r"\bwhat (?:is|are) no\b": "name the thing: invalid X",
    r"\bwhere there (?:is|are) none\b": "say what is missing: without X",
    r"\bwho(?:ever| it| asks| reads| opens| calls)\b": "name the role: the caller, the user",
    r"\b(?:is|are|was|were|be|been) told\b": "is logged, is reported, is passed",
    r"\btells? (?:of|whoever)\b": "reports",
    r"\bso (?:many|long|often|much)\b(?! as\b| that\b)": "give the number or the limit",
    r"\bof which (?:some|none)\b": "split the sentence",
    r"\b(?:leaves?|left|leaving) away\b": "omit, skip",
    r"\bat the most\b": "at most, maximum",
    r"\bas many as there\b": "the maximum number of",
    r"\bthat (?:is|are) none\b": "invalid, missing",
    r"\bworth nothing\b": "state what it needs",
    r"\bhow far to trust\b": "accuracy",
    r"\bbe it (?:a|an|by|the|one)\b": "either … or",
    r"\bnone of (?:its|their) own\b": "without",
    r"\bin each other's way\b": "conflict",
    r"\b(?:goes|went|going|gone|go) on (?:where|with what)\b": "resumes",
    r"\bwhat it knows\b": "name the data",
    r"\bcannot even\b": "cannot",
    r"\bone (?:a|an) (?:image|row|class|rank|worker|node|query|copy|shard|batch|line|step|bit)\b": "one per X",
    r"\bthose there are\b": "those that exist",
    r"\bfor (?:else|otherwise)\b": "because otherwise",
    r"\bis nothing to\b": "name the reason",
    r"\bthe like\b(?! of)": "name them",
}

_TEXT = {".md", ".proto", ".yaml", ".yml", ".toml", ".jinja", ".css"}
_PATTERNS = [(re.compile(phrase, re.IGNORECASE), plain) for phrase, plain in PHRASES.items()]


def main(arguments: list[str]) -> int:
    """Print the hits in `arguments`, or in all tracked files; the exit code."""
    names = subprocess.run(["git", "ls-files", *arguments], capture_output=True, text=True, check=True).stdout
    num_hits = 0
    for path in map(Path, names.splitlines()):
        if path.resolve() == Path(__file__).resolve() or not path.is_file() or path.match("*_pb2*"):
            continue
        for line, text in _texts(path):
            for pattern, plain in _PATTERNS:
                if found := pattern.search(text):
                    num_hits += 1
                    print(f"{path}:{line}: {found.group()!r} -> {plain}")
    if num_hits:
        print(f"{num_hits} phrases to reword", file=sys.stderr)
    return int(num_hits > 0)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that a person reads, with their numbers."""
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING) or token.type == getattr(
                tokenize, "FSTRING_MIDDLE", -1
            ):
                for offset, text in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, text
    elif path.suffix in _TEXT or path.name == "Makefile":
        yield from enumerate(path.read_text().splitlines(), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
