"""The commands ``import`` and ``export``: progress, results, and the cache, which is right when
they return."""

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
    ExistingRecords,
    ImportPlan,
    ImportResult,
    Rejects,
    batches,
    look_up,
    store,
    tenant_of,
)
from crm.settings import Settings
from respcache import Cache, InvalidationPending


async def import_files(
    settings: Settings, database_url: str, cache_url: str | None, options: argparse.Namespace
) -> int:
    """Import each file; return the exit status: 0, or 1 when rows were rejected or the cache could
    not be told."""
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    given = dict(pair.partition("=")[::2] for pair in options.map)
    rejected = {options.rejects or Path(f"{path.stem}.rejects.csv"): path for path in options.files}
    if len(rejected) < len(options.files):
        raise ValueError(
            "the rejected rows of several files would go to one: import them one by one"
        )
    results: list[dict[str, Any]] = []
    told = False
    engine = create_async_engine(database_url)
    cache, watching = watched_cache(settings, engine, cache_url)
    await cache.connect()
    try:
        for rejects_path, path in rejected.items():
            known = await look_up(engine, options.tenant, options.kind)
            plan = ImportPlan.make(_opened(path), options.kind, given)
            with closing(Rejects(rejects_path, plan.file.columns)) as rejects:
                outcome = await _import(engine, plan, known, rejects, say, dry_run=options.dry_run)
            results.append(_told(say, plan, outcome, rejects, dry_run=options.dry_run))
    finally:
        told = await _settled(cache, say)
        await cache.close()
        watching.close()
        await engine.dispose()
    if options.json:
        print(json.dumps(results))
    return 0 if told and not any(result["rejected"] for result in results) else 1


async def export_module(database_url: str, options: argparse.Namespace) -> int:
    """Write a module to a file or to standard output."""
    engine = create_async_engine(database_url)
    try:
        tenant = await tenant_of(engine, options.tenant)
        if options.output is None:
            count = await export(engine, tenant, options.module, sys.stdout)
        else:
            with options.output.open("w", newline="", encoding="utf-8") as file:
                count = await export(engine, tenant, options.module, file)
        print(f"{count} {options.module} exported", file=sys.stderr)
    finally:
        await engine.dispose()
    return 0


def _opened(path: Path) -> CsvFile:
    try:
        return CsvFile.open(path)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from None


async def _import(
    engine: AsyncEngine,
    plan: ImportPlan,
    known: ExistingRecords,
    rejects: Rejects,
    say: Console,
    *,
    dry_run: bool,
) -> ImportResult:
    outcome = ImportResult()
    total = sum(1 for _ in plan.file.rows())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=say, transient=True) as progress:
        task = progress.add_task(plan.file.path.name, total=total)
        try:
            for batch in batches(plan.records(known, outcome, rejects)):
                if not dry_run:
                    await store(engine, plan.kind, batch, outcome)
                progress.update(task, completed=outcome.read)
        except asyncio.CancelledError:
            stored = outcome.created + outcome.updated + outcome.unchanged
            say.print(
                f"stopped: the first {stored} rows are in, as whole batches; repeat the import to "
                f"go on"
            )
            raise
    return outcome


async def _settled(cache: Cache, say: Console) -> bool:
    if cache.store is None:
        return True
    try:
        await cache.settled()
    except InvalidationPending:
        say.print(
            "the cache server could not be told: lists may be old for up to their time to live"
        )
        return False
    return True


def _told(
    say: Console, plan: ImportPlan, outcome: ImportResult, rejects: Rejects, *, dry_run: bool
) -> dict[str, Any]:
    mapped = ", ".join(
        f"{column} -> {name or '(dropped)'}" for column, name in plan.mapping.items()
    )
    kept = [column for column in plan.file.columns if column not in plan.mapping]
    say.print(
        f"{plan.file.path.name}: {plan.file.encoding}, {mapped}"
        + (f"; as metadata: {', '.join(kept)}" if kept else "")
    )
    stored = f"{outcome.created} created, {outcome.updated} updated, {outcome.unchanged} unchanged"
    done = f"{outcome.read - outcome.rejected} would be stored" if dry_run else stored
    say.print(f"  {outcome.read} rows read, {done}, {outcome.rejected} rejected")
    if outcome.unlinked:
        say.print(
            f"  {outcome.unlinked} name an account that is not there: its name is kept as metadata"
        )
    if outcome.rejected:
        reasons = ", ".join(
            f"{reason} ({count})" for reason, count in outcome.reasons.most_common(5)
        )
        say.print(f"  rejected rows: {rejects.path} ({reasons})")
    return {
        "file": str(plan.file.path), **asdict(outcome), "reasons": dict(outcome.reasons), "mapping": dict(plan.mapping),
        "rejects": str(rejects.path) if outcome.rejected else None, "dry_run": dry_run,
    }  # fmt: skip
