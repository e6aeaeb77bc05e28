"""The modules' routes: records, lists, filters, errors, conversion and promotion."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from crm.errors import ApiError
from crm.filters import parse_filter
from crm.models import ACCOUNT_TYPES, Account, Activity, EntityTransition, Lead, Opportunity

from .conftest import MODULES, NEW, SINGULAR, Crm, hit

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("module", MODULES)
async def test_a_record_is_created_shown_changed_and_deleted(crm: Crm, module: str) -> None:
    """With the envelope, and each step is in the next read of list and detail."""
    http, path, single = crm.as_user("ann"), f"/api/{module}", SINGULAR[module]
    await http.get(path)
    created = await http.post(path, json=NEW[module])
    record = created.json()["data"][single]
    assert (created.status_code, created.json()["status"]) == (201, "success")
    assert record["tenant_id"] == str(crm.tenants["acme"].id)
    for _ in range(2):
        shown = await http.get(f"{path}/{record['id']}")
    assert hit(shown)
    assert {name: shown.json()["data"][single][name] for name in record} == record
    assert (await http.get(path)).json()["data"][module][0]["id"] == record["id"]
    changed = await http.put(f"{path}/{record['id']}", json={"city": "Ulm"})
    assert changed.json()["data"][single]["city"] == "Ulm"
    assert (await http.get(f"{path}/{record['id']}")).json()["data"][single]["city"] == "Ulm"
    assert (await http.get(path)).json()["data"][module][0]["city"] == "Ulm"
    assert (await http.delete(f"{path}/{record['id']}")).status_code == 200
    assert (await http.get(f"{path}/{record['id']}")).status_code == 404
    assert (await http.get(path)).json()["data"]["total"] == 0


async def test_lists_page_newest_first_with_an_exact_total(crm: Crm) -> None:
    """limit, offset, order; stats count all."""
    http = crm.as_user("ann")
    for number in range(5):
        await http.post(
            "/api/accounts",
            json={"name": f"A{number}", "type": "customer" if number % 2 else "vendor"},
        )
    data = (await http.get("/api/accounts?limit=2&offset=1")).json()["data"]
    assert [row["name"] for row in data["accounts"]] == ["A3", "A2"]
    assert (data["total"], data["limit"], data["offset"]) == (5, 2, 1)
    assert data["stats"] == {"total": 5, "customer": 2, "vendor": 3}
    filtered = (await http.get("/api/accounts?type=customer&sort=-name")).json()["data"]
    assert [row["name"] for row in filtered["accounts"]] == ["A3", "A1"]
    assert filtered["total"] == 2


async def test_the_counts_of_a_list_are_in_an_order_of_their_own(crm: Crm) -> None:
    """That of their names, not of PostgreSQL's plan: else an answer made anew would differ from the
    stored one."""
    http = crm.as_user("ann")
    for kind in (*sorted(ACCOUNT_TYPES, reverse=True), None):
        await http.post("/api/accounts", json={"name": "A", "type": kind})
    stats = list((await http.get("/api/accounts")).json()["data"]["stats"])
    assert [name for name in stats if name != "total"] == sorted([*ACCOUNT_TYPES, "none"])


async def test_metadata_merges_and_is_spread_but_never_shadows(crm: Crm) -> None:
    """Unknown keys are kept with the record; a column's name in metadata changes nothing."""
    http = crm.as_user("ann")
    body = {"name": "M", "linkedin": "x", "metadata": {"name": "shadow", "deep": {"a": [1]}}}
    record = (await http.post("/api/accounts", json=body)).json()["data"]["account"]
    assert (record["name"], record["linkedin"], record["deep"]) == ("M", "x", {"a": [1]})
    await http.put(f"/api/accounts/{record['id']}", json={"twitter": "y"})
    shown = (await http.get(f"/api/accounts/{record['id']}")).json()["data"]["account"]
    assert (shown["name"], shown["linkedin"], shown["twitter"]) == ("M", "x", "y")


async def test_contacts_are_found_by_name_mail_and_phone(crm: Crm) -> None:
    """Without regard to case; % is a character like any other; last changed first."""
    http = crm.as_user("ann")
    for first, last, phone in (
        ("Ada", "Lovelace", "+1 23"),
        ("Grace", "Hopper", "+1 99"),
        ("50%", "Off", ""),
    ):
        await http.post(
            "/api/contacts", json={"first_name": first, "last_name": last, "phone": phone}
        )

    async def found(q: str) -> list[str]:
        answer = await http.get("/api/contacts/search", params={"q": q, "tenant_id": "acme"})
        return [row["first_name"] for row in answer.json()["data"]["contacts"]]

    assert await found("LOVE") == ["Ada"]
    assert await found("ada love") == ["Ada"]
    assert await found("+1") == ["Grace", "Ada"]
    assert await found("%") == ["50%"]
    assert (await http.get("/api/contacts/search")).json()["field"] == "q"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("GET", "/api/accounts?limit=0", None, 422, "limit"),
        ("GET", "/api/accounts?limit=201", None, 422, "limit"),
        ("GET", "/api/accounts?offset=-1", None, 422, "offset"),
        ("GET", "/api/accounts?sort=password", None, 400, "sort"),
        ("GET", "/api/accounts?filter={", None, 400, "filter"),
        ("GET", '/api/accounts?filter={"nope":1}', None, 400, "filter"),
        ("GET", '/api/accounts?filter={"score":"many"}', None, 400, "filter"),
        ("GET", "/api/accounts?assigned_to=me", None, 400, "assigned_to"),
        ("GET", "/api/accounts?search=%00", None, 422, "search"),
        ("GET", '/api/leads?status={"$nin":5}', None, 400, "status"),
        ("POST", "/api/accounts", {}, 422, "name"),
        ("POST", "/api/accounts", {"name": "  "}, 422, "name"),
        ("POST", "/api/accounts", {"name": "x" * 201}, 422, "name"),
        ("POST", "/api/accounts", {"name": "x", "type": "friend"}, 422, "type"),
        ("POST", "/api/accounts", {"name": "x", "score": 101}, 422, "score"),
        ("POST", "/api/accounts", {"name": "x", "annual_revenue": 1e14}, 422, "annual_revenue"),
        ("POST", "/api/accounts", {"name": "x\x00"}, 422, "body"),
        ("POST", "/api/accounts", {"name": "x", "extra": ["\ud800"]}, 422, "body"),
        ("POST", "/api/accounts", [1], 422, "body"),
        ("POST", "/api/accounts", {"name": "x", "extra": 2**63}, 422, "body"),
        ("PUT", "/api/settings", {"extra": -(2**63) - 1}, 422, "body"),
        ("POST", "/api/leads", {"first_name": "x"}, 422, "last_name"),
        ("POST", "/api/cache/invalidate", {"modules": ["nope"]}, 400, "modules"),
    ],
)
async def test_bad_input_names_the_field(
    crm: Crm, method: str, path: str, body: Any, status: int, field: str
) -> None:
    """A clear 4xx in the envelope, never a 500."""
    answer = await crm.as_user("abe").request(
        method,
        path,
        content=None if body is None else json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert (answer.status_code, answer.json()["status"], answer.json()["field"]) == (
        status,
        "error",
        field,
    ), answer.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"\xff", b'{"name": NaN}', b"[" * 3000, b'{"name":"x","n":1e400}'],
)
async def test_a_body_that_is_no_json_is_a_4xx(crm: Crm, content: bytes) -> None:
    """Whatever the bytes."""
    answer = await crm.as_user("ann").post(
        "/api/accounts", content=content, headers={"content-type": "application/json"}
    )
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["status"] == "error"


async def test_a_body_of_more_than_a_mebibyte_is_refused(crm: Crm) -> None:
    """Whether or not it says its length."""
    body = json.dumps(
        {"name": "x", **{f"extra{number}": "x" * 100_000 for number in range(12)}}
    ).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    for content in (body, chunks()):
        answer = await crm.as_user("ann").post(
            "/api/accounts", content=content, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, answer.json()["status"]) == (413, "error"), answer.text
    assert (await crm.as_user("ann").get("/api/accounts")).json()["data"]["total"] == 0


async def test_huge_numbers_come_back_as_numbers(crm: Crm) -> None:
    """PostgreSQL keeps 1e300 in three hundred digits."""
    abe, huge = crm.as_user("abe"), {"note": "x", "huge": [1e300]}
    made = (await abe.post("/api/accounts", json={"name": "Huge", **huge})).json()["data"][
        "account"
    ]
    changed = (await abe.put(f"/api/accounts/{made['id']}", json={"note": "y"})).json()["data"][
        "account"
    ]
    listed = (await abe.get("/api/accounts")).json()["data"]["accounts"][0]
    settings = [
        (await ask).json()["data"]["settings"]
        for ask in (abe.put("/api/settings", json=huge), abe.get("/api/settings"))
    ]
    assert [
        [float(number) for number in shown["huge"]] for shown in (made, changed, listed, *settings)
    ] == [[1e300]] * 5


@pytest.mark.parametrize(
    "key", ["1", "x", "%00", "00000000-0000-0000-0000-000000000000", "' OR 1=1"]
)
async def test_any_unknown_id_is_not_found(crm: Crm, key: str) -> None:
    """Also what cannot be an id."""
    answer = await crm.as_user("ann").get(f"/api/accounts/{key}")
    assert (answer.status_code, answer.json()["message"]) == (404, "Account not found")


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
columns = st.sampled_from([*Lead.__table__.c.keys(), "nope", ""])
operators = st.sampled_from(
    [
        "$eq",
        "$ne",
        "$gt",
        "$gte",
        "$lt",
        "$lte",
        "$in",
        "$nin",
        "$contains",
        "$icontains",
        "$startswith",
        "$x",
    ]
)
terms = st.dictionaries(
    columns,
    values | st.dictionaries(operators, values | st.lists(values, max_size=3), max_size=2),
    max_size=3,
)
filters = st.recursive(
    terms,
    lambda inner: st.dictionaries(
        st.sampled_from(["$or", "$and"]), st.lists(inner, max_size=3), max_size=2
    ),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(document=filters)
async def test_no_filter_is_ever_a_server_error(crm: Crm, document: Any) -> None:
    """Every filter is answered, or refused by its field."""
    answer = await crm.as_user("ann").get("/api/leads", params={"filter": json.dumps(document)})
    assert answer.status_code in (200, 400), answer.text


async def test_filters_mean_what_they_say(crm: Crm) -> None:
    """Operators, null, $or, $nin, on real rows."""
    http = crm.as_user("ann")
    for name, city, score in (("A", "Ulm", 10), ("B", "ULMA", 50), ("C", None, 90)):
        await http.post("/api/accounts", json={"name": name, "city": city, "score": score})

    async def found(document: Any) -> str:
        answer = await http.get(
            "/api/accounts", params={"filter": json.dumps(document), "sort": "name"}
        )
        return "".join(row["name"] for row in answer.json()["data"]["accounts"])

    assert await found({"city": {"$icontains": "ulm"}}) == "AB"
    assert await found({"city": {"$contains": "ulm"}}) == ""
    assert await found({"city": None}) == "C"
    assert await found({"city": {"$ne": "Ulm"}}) == "BC"
    assert await found({"city": {"$nin": ["Ulm"]}}) == "BC"
    assert await found({"city": {"$in": ["Ulm", None]}}) == "AC"
    assert await found({"score": {"$gte": 50, "$lt": 90}}) == "B"
    assert await found({"$or": [{"name": "A"}, {"score": 90}], "is_test_data": False}) == "AC"


def test_filters_are_bounded() -> None:
    """Depth, number of terms, length."""
    deep: Any = {"name": "x"}
    for _ in range(6):
        deep = {"$and": [deep]}
    for document in (deep, {"$or": [{"name": "x"}] * 101}, {"name": "x" * 10_001}):
        with pytest.raises(ApiError):
            parse_filter(json.dumps(document), Account.__table__)


# -- conversion and promotion ----------------------------------------------------------------------


async def make_lead(crm: Crm, **values: Any) -> str:
    created = await crm.as_user("ann").post(
        "/api/leads", json={**NEW["leads"], "company": "Globe", **values}
    )
    identity: str = created.json()["data"]["lead"]["id"]
    return identity


async def test_a_conversion_moves_everything_in_one_transaction(crm: Crm) -> None:
    """Contact, account and opportunity appear, activities and opportunities relink, a snapshot
    stays, the lead goes."""
    http, tenant = crm.as_user("ann"), crm.tenants["acme"].id
    lead = await make_lead(crm, estimated_value=500, hobby="chess")
    activity = Activity(
        id=uuid4(), tenant_id=tenant, type="call", related_to="lead", related_id=lead
    )
    opportunity = Opportunity(id=uuid4(), tenant_id=tenant, name="old", lead_id=lead)
    await crm.save(activity, opportunity)
    answer = await http.post(
        f"/api/leads/{lead}/convert", json={"create_account": True, "create_opportunity": True}
    )
    data = answer.json()["data"]
    assert (answer.status_code, answer.json()["message"]) == (
        200,
        "Lead converted and moved to contacts",
    )
    assert (data["contact"]["status"], data["contact"]["hobby"]) == ("prospect", "chess")
    assert (data["account"]["name"], data["contact"]["account_id"]) == (
        "Globe",
        data["account"]["id"],
    )
    assert (
        data["opportunity"]["stage"],
        data["opportunity"]["probability"],
        data["opportunity"]["amount"],
    ) == (
        "prospecting",
        25,
        500,
    )
    async with crm.session() as session:
        moved = await session.get_one(Activity, activity.id)
        assert (moved.related_to, str(moved.related_id), moved.related_name) == (
            "contact",
            data["contact"]["id"],
            "Lea Deed",
        )
        kept = await session.get_one(Opportunity, opportunity.id)
        assert (kept.lead_id, str(kept.contact_id), str(kept.account_id)) == (
            None,
            data["contact"]["id"],
            data["account"]["id"],
        )
        snapshot = await session.scalar(select(EntityTransition.snapshot))
        assert snapshot is not None
        assert snapshot["first_name"] == "Lea"
    assert (await http.post(f"/api/leads/{lead}/convert", json={})).status_code == 409
    assert (await http.get(f"/api/leads/{lead}")).status_code == 404


async def test_a_conversion_finds_the_account_by_name(crm: Crm) -> None:
    """Without regard to case; no second account is made."""
    account = crm.account("acme", "GLOBE")
    await crm.save(account)
    lead = await make_lead(crm)
    answer = await crm.as_user("ann").post(
        f"/api/leads/{lead}/convert", json={"create_account": True}
    )
    assert answer.json()["data"]["account"]["id"] == str(account.id)


async def test_two_conversions_at_once_convert_once(crm: Crm) -> None:
    """The second waits for the first and is refused."""
    lead = await make_lead(crm)
    answers = await asyncio.gather(
        *(crm.as_user("ann").post(f"/api/leads/{lead}/convert", json={}) for _ in range(5))
    )
    assert sorted(answer.status_code for answer in answers)[0] == 200
    assert {answer.status_code for answer in answers} <= {200, 404, 409}
    assert sum(answer.status_code == 200 for answer in answers) == 1
    assert (await crm.as_user("ann").get("/api/contacts")).json()["data"]["total"] == 1


async def test_a_failed_conversion_changes_nothing(crm: Crm) -> None:
    """And invalidates nothing."""
    lead = await make_lead(crm)
    http = crm.as_user("ann")
    for _ in range(2):
        await http.get("/api/leads")
    assert (
        await http.post(f"/api/leads/{lead}/convert", json={"selected_account_id": str(uuid4())})
    ).status_code == 404
    assert hit(await http.get("/api/leads"))
    assert (await http.get(f"/api/leads/{lead}")).status_code == 200


@pytest.mark.parametrize("delete_source", [False, True])
async def test_a_promotion_makes_an_account_and_a_contact(crm: Crm, delete_source: bool) -> None:
    """The source stays as Promoted, or goes; what pointed to it points to the account."""
    http, tenant = crm.as_user("ann"), crm.tenants["acme"].id
    body = {"source_name": "List", "company_name": "Mine Ltd", "contact_person": "Mia Mine"}
    source = (await http.post("/api/bizdevsources", json=body)).json()["data"]["bizdevsource"]["id"]
    opportunity = Opportunity(
        id=uuid4(), tenant_id=tenant, name="o", source=f"bizdev_source:{source}"
    )
    await crm.save(opportunity)
    data = (
        await http.post(
            f"/api/bizdevsources/{source}/promote", json={"delete_source": delete_source}
        )
    ).json()["data"]
    assert (data["account"]["name"], data["account"]["type"]) == ("Mine Ltd", "prospect")
    assert (data["contact"]["first_name"], data["contact"]["last_name"]) == ("Mia", "Mine")
    assert data["bizdev_source_id"] == source
    shown = await http.get(f"/api/bizdevsources/{source}")
    if delete_source:
        assert shown.status_code == 404
    else:
        promoted = shown.json()["data"]["bizdevsource"]
        assert (promoted["status"], promoted["account_id"], promoted["account_name"]) == (
            "Promoted",
            data["account"]["id"],
            "Mine Ltd",
        )
        assert (await http.post(f"/api/bizdevsources/{source}/promote", json={})).status_code == 409
    async with crm.session() as session:
        assert (
            str((await session.get_one(Opportunity, opportunity.id)).account_id)
            == data["account"]["id"]
        )
