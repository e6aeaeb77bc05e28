"""The commands ``import`` and ``export``: progress, results, and invalidation of the cache.

When ``import`` returns 0, every cached list shows the imported rows.
"""

import argparse
import asyncio
import json
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from crm.app import watched_cache
from crm.csv_files import CsvFile, UnreadableFile
from crm.exports import export
from crm.imports import (
    ImportPlan,
    ImportResult,
    Rejects,
    batches,
    load_existing,
    store,
    tenant_id,
)
from crm.settings import Settings
from respcache import Cache, InvalidationPending


async def import_files(
    settings: Settings, options: argparse.Namespace, *, database_url: str, cache_url: str | None
) -> int:
    """Import each file; return the exit status.

    It is 1 when rows were rejected, or when the cache server did not confirm the invalidation.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    given = dict(pair.partition("=")[::2] for pair in options.map)
    rejected = {options.rejects or Path(f"{path.stem}.rejects.csv"): path for path in options.files}
    if len(rejected) < len(options.files):
        raise ValueError(
            "the rejected rows of several files would go to one file: import them one by one"
        )
    reports: list[dict[str, Any]] = []
    confirmed = False
    engine = create_async_engine(database_url)
    cache, watching = watched_cache(settings, engine, cache_url)
    await cache.connect()
    try:
        for rejects_path, path in rejected.items():
            plan = ImportPlan.make(_opened(path), options.kind, given)
            with closing(Rejects(rejects_path, plan.file.columns)) as rejects:
                run = _Import(engine, plan, rejects, console=console, dry_run=options.dry_run)
                reports.append(await run.run(options.tenant))
    finally:
        confirmed = await _confirmed(cache, console)
        await cache.close()
        watching.close()
        await engine.dispose()
    if options.json:
        print(json.dumps(reports))
    return 0 if confirmed and not any(report["rejected"] for report in reports) else 1


async def export_module(database_url: str, options: argparse.Namespace) -> int:
    """Write the records of a module to a file or to standard output; return the exit status."""
    engine = create_async_engine(database_url)
    try:
        tenant = await tenant_id(engine, options.tenant)
        if options.output is None:
            count = await export(engine, tenant, options.module, file=sys.stdout)
        else:
            with options.output.open("w", newline="", encoding="utf-8") as file:
                count = await export(engine, tenant, options.module, file=file)
        print(f"{count} {options.module} exported", file=sys.stderr)
    finally:
        await engine.dispose()
    return 0


class _Import:
    """The import of one file."""

    def __init__(
        self,
        engine: AsyncEngine,
        plan: ImportPlan,
        rejects: Rejects,
        *,
        console: Console,
        dry_run: bool,
    ) -> None:
        self._engine = engine
        self._plan = plan
        self._rejects = rejects
        self._console = console
        self._dry_run = dry_run
        self._result = ImportResult()

    async def run(self, tenant: str) -> dict[str, Any]:
        """Import the file into a tenant (slug); print and return what was done."""
        existing = await load_existing(self._engine, tenant, self._plan.kind)
        records = self._plan.records(existing, self._result, self._rejects)
        total = sum(1 for _ in self._plan.file.rows())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(self._plan.file.path.name, total=total)
            try:
                for batch in batches(records):
                    if not self._dry_run:
                        self._result.count(await store(self._engine, self._plan.kind, batch))
                    progress.update(task, completed=self._result.read)
            except asyncio.CancelledError:
                self._console.print(
                    f"stopped: the first {self._result.stored} rows are stored, as whole batches; "
                    f"repeat the import to continue"
                )
                raise
        self._print()
        return self._report()

    def _print(self) -> None:
        file, mapping, result = self._plan.file, self._plan.mapping, self._result
        mapped = ", ".join(f"{column} -> {name or '(dropped)'}" for column, name in mapping.items())
        kept = [column for column in file.columns if column not in mapping]
        self._console.print(
            f"{file.path.name}: {file.encoding}, {mapped}"
            + (f"; as metadata: {', '.join(kept)}" if kept else "")
        )
        done = (
            f"{result.read - result.rejected} would be stored"
            if self._dry_run
            else f"{result.created} created, {result.updated} updated, {result.unchanged} unchanged"
        )
        self._console.print(f"  {result.read} rows read, {done}, {result.rejected} rejected")
        if result.unlinked:
            self._console.print(
                f"  {result.unlinked} rows name an unknown account: the name is kept as metadata"
            )
        if result.rejected:
            reasons = ", ".join(
                f"{reason} ({count})" for reason, count in result.reasons.most_common(5)
            )
            self._console.print(f"  rejected rows: {self._rejects.path} ({reasons})")

    def _report(self) -> dict[str, Any]:
        return {
            "file": str(self._plan.file.path),
            **asdict(self._result),
            "reasons": dict(self._result.reasons),
            "mapping": dict(self._plan.mapping),
            "rejects": str(self._rejects.path) if self._result.rejected else None,
            "dry_run": self._dry_run,
        }


def _opened(path: Path) -> CsvFile:
    try:
        return CsvFile.open(path)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from None


async def _confirmed(cache: Cache, console: Console) -> bool:
    """Wait until the cache server has confirmed all invalidations; return whether it did."""
    if cache.store is None:
        return True
    try:
        await cache.settled()
    except InvalidationPending:
        console.print(
            "the cache server did not confirm the invalidation: cached lists may be outdated for "
            "up to their time to live"
        )
        return False
    return True
