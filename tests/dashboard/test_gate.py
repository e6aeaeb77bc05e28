"""Who is asking: names of tenants, by which nobody means one and acts on another; credentials are
shown nowhere."""

from collections.abc import Mapping

import pytest
from starlette.requests import Request

from respcache.ops.access import Access, Role
from respcache.ops.dashboard.auth import Authenticator, Viewer
from respcache.ops.explain import ExplainedRequest

pytestmark = pytest.mark.anyio


class Named:
    """A gate of an application that calls its tenants so; everybody operates everything."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    async def sign_in(self, name: str, password: str, address: str) -> str | None:
        return name

    async def access(self, token: str) -> Access | None:
        return Access(name="root", role=Role.OPERATOR)

    async def tenant_names(self) -> Mapping[str, str]:
        return self._names


async def viewer(names: Mapping[str, str]) -> Viewer:
    request = Request({"type": "http", "headers": [(b"authorization", b"Bearer root-token")]})
    found = await Authenticator(Named(names)).by_bearer(request)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ({"t1": "Acme", "t2": "Globex"}, {"t1": "Acme", "t2": "Globex"}),
        ({"t1": " Acme "}, {"t1": "Acme"}),
        ({"t1": "Acme", "t2": "acme", "t3": "Globex"}, {"t1": "t1", "t2": "t2", "t3": "Globex"}),
        ({"t1": "t2", "t2": "Globex"}, {"t1": "t1", "t2": "Globex"}),
        ({"t1": "T2", "t2": "Globex"}, {"t1": "t1", "t2": "Globex"}),
        ({"t1": "t1", "t2": ""}, {"t1": "t1", "t2": "t2"}),
    ],
    ids=["unique", "blanks", "of two", "an id", "an id in capitals", "none"],
)
async def test_what_a_tenant_is_called_leads_to_that_tenant(
    names: dict[str, str], shown: dict[str, str]
) -> None:
    """Names of several tenants, and those that are the id of another one, are not used: such
    tenants are called by their ids."""
    found = await viewer(names)
    assert {tenant: found.name(tenant) for tenant in names} == shown
    for tenant, called in shown.items():
        assert found.tenant(called) == tenant
        assert found.tenant(tenant) == tenant


async def test_credentials_are_in_no_repr() -> None:
    """So that no report of an error carries them."""
    assert "root-token" not in repr(await viewer({}))
    assert "root-token" not in repr(
        ExplainedRequest("GET", "/leads", headers=(("authorization", "Bearer root-token"),))
    )
