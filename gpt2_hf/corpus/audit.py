"""The account of a preparation: what was read, what was kept, what was dropped and why, with examples.

report.json     for programs
report.md       the same for people
logs/dropped.txt  one line for each dropped document: file, line, reason (the first thousand of every task)
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXAMPLES = 5
EXCERPT = 100  # characters of a dropped text that are shown
REPORTS_PER_TASK = 1000  # dropped documents that are listed one by one; all are counted

# Reasons that are the input's fault, which --on_error stop makes fatal, and then those that were asked for.
ERRORS = {
    "empty": "empty text",
    "broken": "not valid UTF-8 or JSON",
    "no_text": "no text in the text field",
    "surrogate": "not valid Unicode",
    "too_long": "a line of more than 64 MiB",
    "damaged": "the file cannot be read from here on",
}
FILTERS = {
    "wikipedia": "a page of Wikipedia",
    "exact_duplicate": "the same text was read before",
    "near_duplicate": "nearly the same text was read before (MinHash)",
    "contaminated": "shares a passage with an evaluation set",
}
REASONS = ERRORS | FILTERS


class Tally:
    """Counts dropped and reported documents of one task, and lists the first of them."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {"read": Counter(), "dropped": Counter(), "reported": Counter()}
        self.bytes: Counter[str] = Counter()  # of text, by reason for dropping
        self.named: set[str] = set()  # ids of the kept documents that were named for validation
        self.reports: list[dict[str, Any]] = []

    def add(self, reason: str, place: dict[str, Any], text: str = "", n_bytes: int = 0, kept: bool = False) -> None:
        """One document that was dropped, or only reported; `place` is its metadata."""
        self.counts["reported" if kept else "dropped"][reason] += 1
        self.bytes[reason] += 0 if kept else n_bytes
        if len(self.reports) < REPORTS_PER_TASK:
            self.show(reason, place, text, kept)

    def show(self, reason: str, place: dict[str, Any], text: str = "", kept: bool = False) -> None:
        """Put a document that is counted already among the reports."""
        shown: dict[str, Any] = {key: place[key] for key in ("file", "line", "offset", "detail") if key in place}
        excerpt = {"text": text[:EXCERPT].encode(errors="replace").decode()} if text else {}
        self.reports.append({"reason": reason, **shown, **excerpt, "kept": kept})

    def as_json(self) -> dict[str, Any]:
        return {**self.counts, "bytes": self.bytes, "named": sorted(self.named), "reports": self.reports}

    def include(self, found: dict[str, Any]) -> None:
        """Add what `as_json` of another tally gave."""
        for name, counter in self.counts.items():
            counter.update(found[name])
        self.bytes.update(found["bytes"])
        self.named.update(found["named"])
        self.reports += found["reports"]


def add_line_numbers(reports: Iterable[dict[str, Any]]) -> None:
    """Turn the "offset" of each report into a "line", in one pass over each file."""
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports:
        if "offset" in report:
            by_file[report["file"]].append(report)
    for path, group in by_file.items():
        line, position = 1, 0
        with open(path, "rb") as file:
            for report in sorted(group, key=lambda report: report["offset"]):
                while block := file.read(min(2**20, report["offset"] - position)):
                    line, position = line + block.count(b"\n"), position + len(block)
                report["line"] = line
                del report["offset"]


def sentence(report: dict[str, Any]) -> str:
    """ "file:line: reason" of a report whose line is known."""
    reason = ": ".join(filter(None, (REASONS[report["reason"]], report.get("detail"))))
    return f"{report['file']}:{report['line']}: {reason}" + (" (kept)" if report["kept"] else "")


def write_reports(
    out: Path, tally: Tally, source: dict[str, Any], splits: dict[str, Any], unread: dict[str, int]
) -> None:
    """Write the three files below `out`, and say on the terminal what was dropped. `unread`: files by their ending.

    File names that are no UTF-8 are escaped.
    """
    add_line_numbers(tally.reports)
    listing = out / "logs" / "dropped.txt"
    listing.unlink(missing_ok=True)
    if tally.reports:
        listing.write_text("".join(sentence(report) + "\n" for report in tally.reports), "utf-8", "backslashreplace")

    def section(kind: str) -> dict[str, Any]:
        found = {}
        for reason, count in sorted(tally.counts[kind].items(), key=lambda item: -item[1]):
            examples = [r for r in tally.reports if r["reason"] == reason and r["kept"] == (kind == "reported")]
            found[reason] = {"documents": count, "bytes": tally.bytes[reason], "meaning": REASONS[reason]}
            found[reason]["examples"] = examples[:EXAMPLES]
        return found

    written = {split: {key: got[key] for key in ("documents", "tokens", "bytes")} for split, got in splits.items()}
    report = {
        "source": source,
        "read": dict(tally.counts["read"]),
        "written": written,
        "dropped": section("dropped"),
        "reported": section("reported"),
        "files_not_read": unread,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (out / "report.json").write_text(text, "utf-8", "backslashreplace")
    (out / "report.md").write_text(_as_markdown(report), "utf-8", "backslashreplace")
    if (dropped := tally.counts["dropped"]).total():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common() if count)
        shown = [sentence(report) for report in tally.reports if not report["kept"]][:EXAMPLES]
        print(*shown, f"dropped {dropped.total():,} documents ({counts}), see {out / 'report.md'}", sep="\n")
    if reported := tally.counts["reported"].total():
        print(f"reported, but kept, {reported:,} documents, see {out / 'report.md'}")


def _as_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    read = report["read"]
    lines = ["# What became of the documents", ""]
    lines += ["| | documents | MB of text | tokens |", "|---|---|---|---|"]
    lines += [f"| read | {read.get('documents', 0):,} | {read.get('bytes', 0) / 1e6:,.1f} | |"]
    for split, got in report["written"].items():
        lines += [f"| written to {split} | {got['documents']:,} | {got['bytes'] / 1e6:,.1f} | {got['tokens']:,} |"]
    for kind in ("dropped", "reported"):
        for reason, found in report[kind].items():
            size = f"{found['bytes'] / 1e6:,.1f}" if found["bytes"] else ""
            lines += [f"| {kind}: {reason} | {found['documents']:,} | {size} | |"]
    if unread := report["files_not_read"]:
        lines += [
            "",
            "Files that were not read, by their ending: " + ", ".join(f"{e} {n:,}" for e, n in unread.items()),
        ]
    for kind, title in (("dropped", "Dropped"), ("reported", "Reported, but kept")):
        for found in report[kind].values():
            lines += ["", f"## {title}: {found['meaning']} ({found['documents']:,})", ""]
            for example in found["examples"]:
                excerpt = " ".join(example.get("text", "").replace("`", "'").split())
                detail = ": ".join(filter(None, (f"`{example['file']}:{example['line']}`", example.get("detail"))))
                lines += [f"- {detail}" + (f"\n  > {excerpt}" if excerpt else "")]
    return "\n".join(lines) + "\n"
