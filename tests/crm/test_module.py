"""What is special about the modules: names that follow, days that end, many records at once,
settings, reports."""

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from crm import auth
from crm.models import Activity, Document, Task

from .conftest import Crm, hit

pytestmark = pytest.mark.anyio


async def make(crm: Crm, path: str, *, user: str = "ann", **body: Any) -> dict[str, Any]:
    """Create a record; return it."""
    answer = await crm.as_user(user).post(f"/api/{path}", json=body)
    assert answer.status_code == 201, answer.text
    [record] = answer.json()["data"].values()
    return record


async def rows_of(crm: Crm, path: str, *, user: str = "ann") -> list[dict[str, Any]]:
    data = (await crm.as_user(user).get(f"/api/{path}")).json()["data"]
    return next(value for value in data.values() if isinstance(value, list))


# -- what records are about ------------------------------------------------------------------------


async def test_an_activity_is_named_after_what_it_is_about_and_follows_its_renames(
    crm: Crm,
) -> None:
    """For each kind of record; the name that the caller claims does not count."""
    named = {
        "account": await make(crm, "accounts", name="Old"),
        "lead": await make(crm, "leads", first_name="Old", last_name="Lead"),
        "contact": await make(crm, "contacts", first_name="Old", last_name="Contact"),
        "opportunity": await make(crm, "opportunities", name="Old"),
        "bizdev_source": await make(crm, "bizdevsources", source_name="Old"),
    }
    for kind, record in named.items():
        made = await make(
            crm,
            "activities",
            type="call",
            related_to=kind,
            related_id=record["id"],
            related_name="Else",
        )
        assert made["related_name"].startswith("Old")
    changes = {
        "account": "name",
        "lead": "first_name",
        "contact": "first_name",
        "opportunity": "name",
        "bizdev_source": "source_name",
    }
    plurals = {
        "account": "accounts",
        "lead": "leads",
        "contact": "contacts",
        "opportunity": "opportunities",
        "bizdev_source": "bizdevsources",
    }
    for kind, record in named.items():
        await crm.as_user("ann").put(
            f"/api/{plurals[kind]}/{record['id']}", json={changes[kind]: "New"}
        )
    names = {row["related_to"]: row["related_name"] for row in await rows_of(crm, "activities")}
    assert names == {
        "account": "New",
        "lead": "New Lead",
        "contact": "New Contact",
        "opportunity": "New",
        "bizdev_source": "New",
    }


async def call_of_suzy_about(crm: Crm, kind: str, key: str) -> None:
    """Make an activity that suzy sees and nora does not, about a record that both see."""
    about = {"related_to": kind, "related_id": key, "assigned_to": str(crm.users["suzy"].id)}
    await make(crm, "activities", user="gus", type="call", **about)
    assert await rows_of(crm, "activities", user="nora") == []


async def test_a_rename_reaches_activities_that_the_caller_does_not_see(crm: Crm) -> None:
    """The name belongs to the record, not to who sees what is about it."""
    account = await make(crm, "accounts", user="gus", name="Old")
    await call_of_suzy_about(crm, "account", account["id"])
    assert (
        await crm.as_user("nora").put(f"/api/accounts/{account['id']}", json={"name": "New"})
    ).status_code == 200
    assert [row["related_name"] for row in await rows_of(crm, "activities", user="suzy")] == ["New"]


async def test_a_deletion_reaches_activities_that_the_caller_does_not_see(crm: Crm) -> None:
    """None is left that points to what is gone."""
    account = await make(crm, "accounts", user="gus", name="Gone")
    await call_of_suzy_about(crm, "account", account["id"])
    assert (await crm.as_user("nora").delete(f"/api/accounts/{account['id']}")).status_code == 200
    (row,) = await rows_of(crm, "activities", user="suzy")
    assert (row["related_id"], row["related_name"]) == (None, "Gone")


async def test_a_promotion_takes_along_what_the_caller_does_not_see(crm: Crm) -> None:
    """Activities of others, and opportunities of others that came from the source."""
    source = (await make(crm, "bizdevsources", user="gus", source_name="Source"))["id"]
    await call_of_suzy_about(crm, "bizdev_source", source)
    hers = {"assigned_to": str(crm.users["suzy"].id)}
    await make(
        crm, "opportunities", user="gus", name="Deal", source=f"bizdev_source:{source}", **hers
    )
    promoted = (await crm.as_user("nora").post(f"/api/bizdevsources/{source}/promote")).json()[
        "data"
    ]
    account = promoted["account"]["id"]
    assert [row["related_id"] for row in await rows_of(crm, "activities", user="suzy")] == [account]
    assert [row["account_id"] for row in await rows_of(crm, "opportunities", user="suzy")] == [
        account
    ]


@pytest.mark.parametrize("path", ["activities", "documents", "tasks"])
async def test_what_a_record_is_about_must_be_the_callers_own(crm: Crm, path: str) -> None:
    """Another tenant's record, an unknown one, one of no kind, one of an unknown kind: 422 that
    names the field."""
    kind, key = {
        "activities": ("related_to", "related_id"),
        "documents": ("related_type", "related_id"),
    }.get(path, ("entity_type", "entity_id"))
    needed = {
        "activities": {"type": "call"},
        "documents": {"name": "x"},
        "tasks": {"description": "x"},
    }[path]
    foreign = await make(crm, "accounts", user="gus", name="Theirs")
    cases = [
        ({kind: "account", key: foreign["id"]}, key),
        ({kind: "account", key: str(uuid4())}, key),
        ({key: foreign["id"]}, kind),
    ]
    for body, field in [*cases, ({kind: "tenant", key: foreign["id"]}, kind)]:
        answer = await crm.as_user("ann").post(f"/api/{path}", json={**needed, **body})
        assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text
    mine = await make(crm, path, **needed)
    answer = await crm.as_user("ann").put(
        f"/api/{path}/{mine['id']}", json={kind: "account", key: foreign["id"]}
    )
    assert (answer.status_code, answer.json()["field"]) == (422, key)


async def test_what_was_about_a_deleted_record_stays_and_points_to_nothing(crm: Crm) -> None:
    """An activity keeps the name: it happened."""
    lead = await make(crm, "leads", first_name="Gone", last_name="Soon")
    await make(crm, "activities", type="call", related_to="lead", related_id=lead["id"])
    await make(crm, "documents", name="Offer", related_type="lead", related_id=lead["id"])
    await make(crm, "tasks", description="Ring", entity_type="lead", entity_id=lead["id"])
    await crm.as_user("ann").delete(f"/api/leads/{lead['id']}")
    [activity], [document], [task] = [
        await rows_of(crm, path) for path in ("activities", "documents", "tasks")
    ]
    assert (activity["related_id"], activity["related_name"]) == (None, "Gone Soon")
    assert (document["related_id"], task["entity_id"]) == (None, None)


async def test_a_conversion_takes_everything_along(crm: Crm) -> None:
    """Activities, documents and tasks, also those that the caller does not see."""
    lead = await make(crm, "leads", user="gus", first_name="Con", last_name="Verted")
    hers = {"assigned_to": str(crm.users["suzy"].id)}
    await make(
        crm, "activities", user="gus", type="call", related_to="lead", related_id=lead["id"], **hers
    )
    await make(
        crm,
        "documents",
        user="gus",
        name="Offer",
        related_type="lead",
        related_id=lead["id"],
        **hers,
    )
    await make(
        crm,
        "tasks",
        user="gus",
        description="Ring",
        entity_type="lead",
        entity_id=lead["id"],
        **hers,
    )
    converted = await crm.as_user("nora").post(f"/api/leads/{lead['id']}/convert", json={})
    contact = converted.json()["data"]["contact"]["id"]
    async with crm.session() as session:
        found = [
            (await session.scalars(select(model))).one() for model in (Activity, Document, Task)
        ]
        assert [str(getattr(row, row.about[1])) for row in found] == [contact] * 3
        assert [getattr(row, row.about[0]) for row in found] == ["contact"] * 3


async def test_records_show_the_names_of_what_they_point_to(crm: Crm) -> None:
    """An opportunity of account, contact and lead; a document of an account."""
    account = await make(crm, "accounts", name="Acorn")
    contact = await make(crm, "contacts", first_name="Con", last_name="Tact")
    lead = await make(crm, "leads", first_name="Lea", last_name="Deed")
    deal = await make(
        crm,
        "opportunities",
        name="Deal",
        account_id=account["id"],
        contact_id=contact["id"],
        lead_id=lead["id"],
    )
    shown = (await crm.as_user("ann").get(f"/api/opportunities/{deal['id']}")).json()["data"][
        "opportunity"
    ]
    assert [shown[f"{name}_name"] for name in ("account", "contact", "lead")] == [
        "Acorn",
        "Con Tact",
        "Lea Deed",
    ]
    await make(crm, "documents", name="Offer", related_type="account", related_id=account["id"])
    assert [row["account_name"] for row in await rows_of(crm, "documents")] == ["Acorn"]


# -- days that end ---------------------------------------------------------------------------------


async def due(crm: Crm, moment: date, **more: Any) -> dict[str, Any]:
    return await make(crm, "activities", type="call", due_date=moment.isoformat(), **more)


async def test_a_list_of_what_is_overdue_does_not_outlive_midnight_where_the_tenant_is(
    crm: Crm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached before midnight, asked after it: the clock of the tenant's time zone decides, not the
    entry's time to live."""
    assert (
        await crm.as_user("abe").put("/api/settings", json={"timezone": "Asia/Tokyo"})
    ).status_code == 200
    moment = datetime(2026, 3, 31, 14, 59, 59, tzinfo=UTC)  # one second before midnight in Tokyo
    monkeypatch.setattr(auth, "now", lambda: moment)
    await due(crm, date(2026, 3, 31))
    for _ in range(2):
        before = await crm.as_user("ann").get("/api/activities?status=overdue")
    assert hit(before)
    assert before.json()["data"]["total"] == 0
    moment += timedelta(seconds=1)
    after = await crm.as_user("ann").get("/api/activities?status=overdue")
    assert [row["is_overdue"] for row in after.json()["data"]["activities"]] == [True]
    bundle = (await crm.as_user("ann").get("/api/reports/dashboard-bundle")).json()["data"]
    assert bundle["overdue_activities"] == 1


async def test_a_new_time_zone_counts_at_once(crm: Crm) -> None:
    """Somewhere it is always another day than elsewhere."""
    today = datetime.now(UTC).date()
    for days in (-1, 0, 1):
        await due(crm, today + timedelta(days=days))
    totals = {}
    for zone in ("Etc/GMT+12", "Pacific/Kiritimati"):
        await crm.as_user("abe").put("/api/settings", json={"timezone": zone})
        totals[zone] = (await crm.as_user("ann").get("/api/activities?status=overdue")).json()[
            "data"
        ]["total"]
    assert totals["Pacific/Kiritimati"] > totals["Etc/GMT+12"]


async def test_marking_overdue_marks_what_is_open_and_late(crm: Crm) -> None:
    """And nothing else; a second time finds nothing."""
    today = datetime.now(UTC).date()
    late = [
        await due(crm, today - timedelta(days=2), status=status)
        for status in ("scheduled", "in_progress")
    ]
    await due(crm, today - timedelta(days=2), status="completed")
    await due(crm, today + timedelta(days=2))
    await make(crm, "activities", type="note")
    await make(crm, "activities", user="gus", type="call", due_date="2020-01-01")
    first, second = [
        (await crm.as_user("ann").post("/api/activities/mark-overdue", json={})).json()["data"]
        for _ in range(2)
    ]
    assert sorted(first["ids"]) == sorted(row["id"] for row in late)
    assert second == {"marked": 0, "ids": []}
    assert (await crm.as_user("ann").get("/api/activities?status=overdue")).json()["data"][
        "total"
    ] == 2
    foreign = await crm.as_user("ann").post(
        "/api/activities/mark-overdue", json={"tenant_id": str(crm.tenants["globex"].id)}
    )
    assert foreign.status_code == 403


# -- many at once ----------------------------------------------------------------------------------


async def test_many_leads_are_deleted_at_once(crm: Crm) -> None:
    """Unknown, foreign and invisible ones are listed and stay; the rest is gone."""
    mine = [
        await make(crm, "leads", user="nora", first_name=str(n), last_name="x") for n in range(3)
    ]
    hers = await make(
        crm,
        "leads",
        user="gus",
        first_name="s",
        last_name="x",
        assigned_to=str(crm.users["suzy"].id),
    )
    foreign = await make(crm, "leads", user="ann", first_name="f", last_name="x")
    ids = [mine[0]["id"], mine[1]["id"], hers["id"], foreign["id"], str(uuid4()), mine[0]["id"]]
    data = (await crm.as_user("nora").post("/api/leads/bulk-delete", json={"ids": ids})).json()[
        "data"
    ]
    assert (data["deleted"], sorted(data["ids"]), data["not_found"]) == (
        2,
        sorted(ids[:2]),
        ids[2:5],
    )
    assert {row["id"] for row in await rows_of(crm, "leads", user="gus")} == {
        mine[2]["id"],
        hers["id"],
    }
    assert len(await rows_of(crm, "leads", user="ann")) == 1


@pytest.mark.parametrize("path", ["leads/bulk-delete", "bizdevsources/archive"])
@pytest.mark.parametrize("ids", [[], ["x"], [str(uuid4())] * 501, None])
async def test_lists_of_ids_are_checked(crm: Crm, path: str, ids: Any) -> None:
    """None, too many, no ids at all."""
    answer = await crm.as_user("ann").post(f"/api/{path}", json={"ids": ids})
    assert (answer.status_code, answer.json()["field"].partition(".")[0]) == (422, "ids")


async def test_many_sources_are_archived_at_once(crm: Crm) -> None:
    """Promoted ones stay promoted."""
    sources = [await make(crm, "bizdevsources", source_name=str(n)) for n in range(3)]
    await crm.as_user("ann").post(f"/api/bizdevsources/{sources[0]['id']}/promote", json={})
    unknown = str(uuid4())
    answer = await crm.as_user("ann").post(
        "/api/bizdevsources/archive", json={"ids": [sources[0]["id"], sources[1]["id"], unknown]}
    )
    assert answer.json()["data"] == {
        "archived": 1,
        "ids": [sources[1]["id"]],
        "not_found": [unknown],
    }
    states = {
        row["source_name"]: (row["status"], row["archived_at"] is not None)
        for row in await rows_of(crm, "bizdevsources")
    }
    assert states == {"0": ("Promoted", False), "1": ("Archived", True), "2": ("active", False)}


# -- figures, settings, reports --------------------------------------------------------------------


async def test_opportunities_are_added_up_by_stage(crm: Crm) -> None:
    """Numbers, amounts, and amounts by probability; of what the caller sees."""
    for stage, amount, probability in (
        ("proposal", 100, 50),
        ("proposal", 50.5, None),
        ("closed_won", 10, 100),
    ):
        await make(
            crm,
            "opportunities",
            user="gus",
            name="x",
            stage=stage,
            amount=amount,
            probability=probability,
        )
    await make(crm, "opportunities", user="gus", name="x", assigned_to=str(crm.users["suzy"].id))
    for user, seen in (("gus", 4), ("nora", 3)):
        for _ in range(2):
            stats = await crm.as_user(user).get("/api/opportunities/stats")
        assert hit(stats)
        data = stats.json()["data"]
        assert data["stages"]["proposal"] == {"count": 2, "amount": 150.5, "weighted": 50.0}
        assert data["stages"]["prospecting"] == {"count": 0, "amount": 0.0, "weighted": 0.0}
        assert data["total"] == {"count": seen, "amount": 160.5, "weighted": 60.0}
        assert (await crm.as_user(user).get("/api/opportunities/count")).json()["data"] == {
            "count": seen,
            "open": seen - 1,
        }


async def test_settings_are_the_tenants_and_an_admins_to_change(crm: Crm) -> None:
    """Defaults where nothing was set; what is not named stays; nonsense is refused."""
    shown = (await crm.as_user("ann").get("/api/settings")).json()["data"]["settings"]
    assert shown == {"visibility_mode": "shared", "timezone": "UTC"}
    refused = await crm.as_user("ann").put("/api/settings", json={"timezone": "Europe/Berlin"})
    assert refused.status_code == 403
    for body, field in (
        ({"timezone": "Mars"}, "timezone"),
        ({"visibility_mode": "x"}, "visibility_mode"),
    ):
        answer = await crm.as_user("abe").put("/api/settings", json=body)
        assert (answer.status_code, answer.json()["field"]) == (422, field)
    await crm.as_user("abe").put(
        "/api/settings",
        json={"timezone": "Europe/Berlin", "tenant_id": str(crm.tenants["acme"].id)},
    )
    await crm.as_user("abe").put("/api/settings", json={"colour": "green"})
    for _ in range(2):
        answer = await crm.as_user("ann").get("/api/settings")
    assert hit(answer)
    assert answer.json()["data"]["settings"] == {
        "visibility_mode": "shared",
        "timezone": "Europe/Berlin",
        "colour": "green",
    }
    assert (await crm.as_user("gus").get("/api/settings")).json()["data"]["settings"][
        "timezone"
    ] == "UTC"


async def test_visibility_changes_take_effect_with_the_next_request(crm: Crm) -> None:
    """Through the API, for lists that are cached."""
    await make(crm, "accounts", user="gus", name="x", assigned_to=str(crm.users["suzy"].id))
    for _ in range(2):
        assert await rows_of(crm, "accounts", user="nora") == []
    await crm.as_user("gus").put("/api/settings", json={"visibility_mode": "shared"})
    assert len(await rows_of(crm, "accounts", user="nora")) == 1
    await crm.as_user("gus").put("/api/settings", json={"visibility_mode": "hierarchical"})
    assert await rows_of(crm, "accounts", user="nora") == []


async def test_the_dashboard_shows_what_the_caller_sees(crm: Crm) -> None:
    """Numbers and the latest records of all modules."""
    for number in range(7):
        await make(crm, "accounts", user="gus", name=str(number))
    await make(crm, "accounts", user="gus", name="hers", assigned_to=str(crm.users["suzy"].id))
    await make(crm, "opportunities", user="gus", name="deal", amount=20)
    data = (await crm.as_user("nora").get("/api/reports/dashboard-bundle")).json()["data"]
    assert data["counts"]["accounts"] == 7
    assert [row["name"] for row in data["latest"]["accounts"]] == ["6", "5", "4", "3", "2"]
    assert (data["open_opportunities"], data["open_amount"], data["counts"]["tasks"]) == (
        1,
        20.0,
        0,
    )
    assert (await crm.as_user("gus").get("/api/reports/dashboard-bundle")).json()["data"]["counts"][
        "accounts"
    ] == 8


async def test_a_superadmin_without_a_tenant_sees_all_and_the_right_total(crm: Crm) -> None:
    """No tenant in the statement must not mean no table in it."""
    for user in ("ann", "ann", "gus"):
        await make(crm, "accounts", user=user, name="x")
    data = (await crm.as_user("root").get("/api/accounts")).json()["data"]
    assert (len(data["accounts"]), data["total"], data["stats"]["total"]) == (3, 3, 3)
    assert (await crm.as_user("root").get("/api/reports/dashboard-bundle")).json()["data"][
        "counts"
    ]["accounts"] == 3
    assert (await crm.as_user("root").get("/api/settings")).status_code == 400
