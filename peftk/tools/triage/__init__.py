"""`peftk selftest --triage`: in five minutes on a bare GPU machine, what works, what does not, and how fast it is.

The checks are in groups. Every group has a process of its own under a time limit, which appends a line of JSON to the
group's file before and after every check. So a check that hangs or crashes loses the rest of its group and nothing
else. A folder that already has results is resumed. `docs/gpu.md` says what the groups do and what to send back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rich.console import Console

from peftk.tools.triage import process, records, report
from peftk.tools.triage.group import Group
from peftk.tools.triage.records import Verdict

Command = Callable[[str, Group, Path], list[str]]


def run(
    device: str,
    groups: Sequence[Group],
    folder: Path,
    console: Console,
    *,
    chosen: Collection[str] | None = None,
    command: Command = process.worker,
) -> bool:
    """Runs the groups one after the other and prints a line for each. True if all passed.

    device: cuda, or interpreter for a rehearsal without a GPU. folder: gets GROUP.jsonl and GROUP.log of every group,
    and report.txt. A group of which it has a complete result of this build is not run again. chosen: names of groups;
    only these run, whatever the folder has. command: starts a group's process. console: must record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    build = records.build()
    verdicts: list[Verdict] = []
    report.print_header(console, device, folder)
    for group in groups:
        if chosen is not None and group.name not in chosen:
            continue
        verdict = None if chosen is not None else records.complete(folder, group.name, device, build)
        kept = verdict is not None
        if verdict is None:
            with console.status(f"[dim]{group.name}: {group.title} (at most {group.limit:g} s)"):
                verdict = process.run(device, group, folder, build, command)
        report.print_verdict(console, verdict, kept=kept)
        verdicts.append(verdict)
    report.print_figures(console, folder, verdicts)
    report.print_summary(console, verdicts, folder)
    (folder / "report.txt").write_text(console.export_text(clear=False), encoding="utf-8")
    return all(verdict.state == "passed" for verdict in verdicts)
