"""What the page says about an answer, in sentences."""

from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound
from orbithash.search.protocol.queries import Coverage
from orbithash.search.web.errors import failure_of
from orbithash.search.web.page.answers import MAX_SORTED, Answers, Shown
from orbithash.search.web.page.state import State

__all__ = ["coverage_sentence", "empty_advice", "problem_of", "summary"]

# The slot of the page that shows the problem of a field of a query.
_SLOTS = {
    "text": "q",
    "key": "q",
    "image": "image",
    "code": "image",
    "vector": "image",
    "filter": "filter",
    "radius": "radius",
    "min_score": "radius",
    "detector": "detector",
    "model": "detector",
    "linear": "detector",
    "weights": "detector",
    "examples": "marks",
    "positives": "marks",
    "negatives": "marks",
    "ids": "marks",
}


def tiles(count: int) -> str:
    """Return a number of tiles in words."""
    return f"{count:,} tile" if count == 1 else f"{count:,} tiles"


def summary(shown: Shown, answers: Answers) -> str:
    """Return the answer in one sentence: the number of tiles, of how many, and their order."""
    state, within = answers.state, shown.within_rows
    if not shown.hits:
        return "No tile is shown."
    is_filtered = shown.matching_rows is not None
    pool = shown.matching_rows if shown.matching_rows is not None else shown.coverage.searched_rows
    of_all = f"of {pool:,} that pass the filters" if is_filtered else f"of {pool:,}"
    by_time = {"newest": ", the newest first", "oldest": ", the oldest first"}.get(state.sort, "")
    if shown.order == "random":
        return f"{tiles(pool)}{' that pass the filters' if is_filtered else ''}, in random order."
    if shown.order == "time":
        return f"{tiles(within or 0)} with a date{by_time}."
    if shown.order == "place":
        return f"{tiles(within or 0)} with a place, the nearest to the chosen place first."
    if shown.is_bounded:
        return f"The {MAX_SORTED:,} nearest {of_all}{by_time}."
    if shown.order == "score" and state.find == "unsure":
        return f"{tiles(within or 0)}, those first about which the detector is least certain."
    if shown.order == "score":
        return f"The detector finds {tiles(within or 0)} {of_all}{by_time or ', the best first'}."
    if state.radius is not None and within is not None:
        bits = "1 bit" if state.radius == 1 else f"{state.radius} bits"
        return f"{tiles(within)} within {bits}, {of_all}{by_time or ', the nearest first'}."
    return f"{tiles(pool)}{' that pass the filters' if is_filtered else ''}{by_time or ', the nearest first'}."


def coverage_sentence(coverage: Coverage) -> str:
    """Return what a partial answer lacks; "" for a complete one."""
    if coverage.fraction >= 1:
        return ""
    # Rounded down: 99.9 % is not all.
    percent = int(coverage.fraction * 100)
    missing = coverage.total_shards - coverage.answered_shards
    parts = f"{missing} of {coverage.total_shards} parts did not answer" if missing else "some parts did not answer"
    return f"Only {percent} % of the archive was searched, because {parts}. Tiles may be missing."


def empty_advice(state: State) -> str:
    """Return what to change to see tiles."""
    if state.radius is not None and not state.is_filtered:
        return "No tile is as near as the cut-off demands. Move the cut-off to the right."
    limits = [
        name
        for name, is_set in (
            ("the classes", state.label),
            ("the dates", state.start or state.end),
            ("the area", state.area),
            ("the expression", state.filter),
            ("the cut-off", state.radius is not None or state.min_score is not None),
        )
        if is_set
    ]
    if not limits:
        return "The archive has no tile to show."
    listed = limits[0] if len(limits) == 1 else f"{', '.join(limits[:-1])} and {limits[-1]}"
    which = "one of them" if len(limits) > 1 else "them" if listed.endswith("s") else "it"
    return f"No tile passes {listed}. Remove or widen {which}."


def problem_of(error: Exception, state: State) -> tuple[str, str]:
    """Return the slot and the sentence of an error that a user sees."""
    if isinstance(error, KeyNotFound):
        return "q", "No tile has this name. Check its spelling, or choose a tile below."
    if isinstance(error, InvalidQuery):
        name, problem = error.violations[0]
        slot = _SLOTS.get(name.split(".")[0].split("[")[0], "address")
        if slot == "filter":
            return (
                ("filter", f"The expression is not valid: {problem}.")
                if state.filter
                else ("area", f"The area is not valid: {problem}.")
            )
        if slot == "image" and state.code:
            return slot, f"The code of the image does not fit this archive ({problem}). Drop the image again."
        return slot, _sentence(problem)
    failure = failure_of(error)
    if failure.status < 500 and failure.status != 429:
        return "address", failure.sentence
    sentence = _sentence(failure.sentence).removesuffix(" Try again in a few seconds.")
    return "gateway", f"{sentence} What you see stays, and the page tries again by itself."


def _sentence(text: str) -> str:
    """Return the message of an error as a sentence."""
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "."
