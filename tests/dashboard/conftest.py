"""The dashboard as the CRM mounts it."""

from tests.crm.conftest import crm

__all__ = ["crm"]
